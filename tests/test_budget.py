"""What one MoE layer may launch and allocate: an exact budget, so that an operation added by accident is noticed.

Counted are operations that reach the dispatcher below autograd, on fake tensors, without those that launch nothing:
views, bare allocations, questions for a property. A GPU runs one kernel for most of them, several to sort or for top-k.
A change for the better lowers a number here.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.naive import NaiveMoE
from models import DiTBlock, build_config
from moe import MoE, load_balancing_loss

TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 32, 8, 2
WIDE = TOKENS * HIDDEN  # elements of an activation; nothing else in the layer is as large but weights
NO_KERNEL = ("prim.device", "aten.detach", "aten.empty", "aten.new_empty", "aten.empty_like", "aten._unsafe_view")


class Recorder(TorchDispatchMode):
    """Notes every operation that launches a kernel, with what it makes."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        if not function.is_view and not name.startswith(NO_KERNEL):
            self.made += [(name, each) for each in (out if isinstance(out, (tuple, list)) else [out])[:1]]
        return out

    def wide(self, matches) -> list[str]:
        """Operations that make something as large as an activation, of a dtype that `matches`."""
        return [name for name, made in self.made if made.numel() >= WIDE and matches(made.dtype)]


@contextlib.contextmanager
def weights_of(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def layer(dtype: torch.dtype = torch.float32) -> tuple[MoE, torch.Tensor]:
    with weights_of(dtype):
        return MoE(HIDDEN, 4 * HIDDEN, EXPERTS, TOP_K, 2 * HIDDEN), torch.randn(1, TOKENS, HIDDEN, requires_grad=True)


def record(module, x, autocast: bool = False, grad: bool = True) -> tuple[Recorder, Recorder]:
    """Forward and backward to input and weights."""
    parameters = [x, *module.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad), Recorder() as forward:
        out = module(x)[0]
    if not grad:
        return forward, Recorder()
    gradient = torch.randn_like(out)
    with Recorder() as backward:
        torch.autograd.grad(out, parameters, gradient)
    return forward, backward


@pytest.mark.parametrize(
    ("dtype", "autocast", "forward", "backward"),
    [
        (torch.float32, False, 20, 36),
        (torch.bfloat16, False, 23, 39),  # the router's input and weight to fp32, its result back
        (torch.float32, True, 26, 42),  # and the weights, each step anew
    ],
    ids=["fp32", "bf16 weights", "bf16 autocast"],
)
def test_kernels_of_a_layer(dtype, autocast, forward, backward):
    with FakeTensorMode():
        sampling, _ = record(*layer(dtype), autocast, grad=False)
        training = record(*layer(dtype), autocast)
    assert len(sampling.made) == forward, [name for name, _ in sampling.made]
    assert len(training[0].made) == forward, [name for name, _ in training[0].made]
    assert len(training[1].made) == backward, [name for name, _ in training[1].made]


@pytest.mark.parametrize("experts", [4, 64])
def test_kernels_do_not_grow_with_experts(experts):
    with FakeTensorMode():
        moe, x = MoE(HIDDEN, 4 * HIDDEN, experts, TOP_K, 2 * HIDDEN), torch.randn(TOKENS, HIDDEN)
        forward, _ = record(moe, x, grad=False)
    assert len(forward.made) == 20


def test_host_never_waits():
    """A fake tensor has no values that the host could read, in either direction; the naive loop wants to."""
    with FakeTensorMode():
        moe, x = layer()
        out, routing = moe(x)
        (out.sum() + load_balancing_loss([routing]).sum()).backward()
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
            ):
                NaiveMoE(moe)(x)


def test_nothing_wide_of_integers_or_fp32():
    """No index tensors of T x D; in bf16, activations in fp32 are the router's input and its gradient alone."""
    config = build_config("DiT-S/2", depth=1, hidden_size=HIDDEN, num_heads=2, num_experts=EXPERTS)
    with FakeTensorMode(), weights_of(torch.bfloat16):
        block = DiTBlock(config, is_moe=True)
        c = torch.randn(1, HIDDEN)
        x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)

        class WithCondition(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.block = block

            def forward(self, x):
                return self.block(x, c)

        forward, backward = record(WithCondition(), x)
    for recorder in (forward, backward):
        assert recorder.wide(lambda dtype: not dtype.is_floating_point) == []
    assert forward.wide(lambda dtype: dtype == torch.float32) == ["aten._to_copy.default"]
    assert backward.wide(lambda dtype: dtype == torch.float32) == ["aten.mm.default"]


def test_naive_way_breaks_the_rule():
    """Which shows that the test above can fail."""
    moe, x = layer()
    moe.init_weights()
    moe.gate.weight.data.zero_()
    moe.gate.weight.data[0] = 1  # one expert gets every token of positive sum, or none
    forward, _ = record(NaiveMoE(moe), torch.rand_like(x), grad=False)
    assert forward.wide(lambda dtype: not dtype.is_floating_point) == ["aten.repeat.default"] * 2
