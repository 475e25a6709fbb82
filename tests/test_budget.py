"""What one MoE layer may launch and allocate: an exact budget, so that an operation added by accident is noticed.

Counted are operations that reach the dispatcher below autograd, on fake tensors, without those that launch nothing:
views, bare allocations, questions for a property. A GPU runs one kernel for most of them, several to sort or for top-k.
A change for the better lowers a number here.
"""

import pytest
import torch
from conftest import traces_fp32
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks.naive import NaiveMoE
from benchmarks.traffic import Case, case_rows, record, weights_of
from configuration import build_config
from diffusion import classifier_free_guidance
from models import DiT, DiTBlock
from moe import ExpertsConfig, MoE
from routers import RouterConfig, load_balancing_loss

pytestmark = traces_fp32
TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 32, 8, 2
WIDE = TOKENS * HIDDEN  # elements of an activation; nothing else in the layer is as large but weights


def layer(dtype: torch.dtype = torch.float32) -> tuple[MoE, torch.Tensor]:
    with weights_of(dtype):
        return MoE(HIDDEN, ExpertsConfig(4 * HIDDEN, RouterConfig(EXPERTS, TOP_K), 2 * HIDDEN)), torch.randn(
            1, TOKENS, HIDDEN, requires_grad=True
        )


@pytest.mark.parametrize(
    ("dtype", "autocast", "forward", "backward"),
    [
        (torch.float32, False, 21, 33),
        (torch.bfloat16, False, 24, 39),  # the router's input and weight to fp32, its result back
        (torch.float32, True, 27, 41),  # and the weights, each step anew
    ],
    ids=["fp32", "bf16 weights", "bf16 autocast"],
)
def test_kernels_of_a_layer(dtype, autocast, forward, backward):
    with FakeTensorMode():
        moe, x = layer(dtype)
        x = x.detach().to(torch.bfloat16 if autocast else dtype).requires_grad_()  # as the norm before it gives it
        sampling, _ = record(moe, x, autocast=autocast, grad=False)
        training = record(moe, x, autocast=autocast)
    assert len(sampling.made) == forward, [name for name, _ in sampling.made]
    assert len(training[0].made) == forward, [name for name, _ in training[0].made]
    assert len(training[1].made) == backward, [name for name, _ in training[1].made]


@pytest.mark.parametrize(
    ("experts", "forward", "both"), [("8", 39, 115), ("64 narrow", 68, 173)], ids=["8", "64 narrow"]
)
def test_traffic_of_a_layer(experts, forward, both):
    """Outside of products, in activations of one width, bf16: what an XL layer reads and writes, to one of them."""
    rows = case_rows(Case("layer", "XL", experts, 16384), flops=1, bandwidth=1)
    moved = {(row["what"], row["pass"]): round(row["widths moved outside products"]) for row in rows}
    assert [row["kernels"] for row in rows] == [19, 43, 3, 8]
    assert moved == {
        ("layer, MoE", "forward"): forward,
        ("layer, MoE", "forward + backward"): both,
        ("layer, dense", "forward"): 30,
        ("layer, dense", "forward + backward"): 80,
    }


def test_kernels_of_a_guided_step():
    """Of two blocks, and of three: their modulations are one product, and so no kernels of a block."""
    found = []
    for depth in (2, 3):
        config = build_config(
            "DiT-S/2", depth=depth, hidden_size=HIDDEN, num_heads=2, num_experts=EXPERTS, input_size=8
        )
        with FakeTensorMode(), weights_of(torch.bfloat16):
            model = DiT(config).eval().requires_grad_(False)
            model.stack_modulations()
            x, labels = torch.randn(2, 4, 8, 8, dtype=torch.float32), torch.zeros(2, dtype=torch.int64)
            denoise = classifier_free_guidance(model, labels, config.null_class, 4.0)
            step, _ = record(lambda x, denoise=denoise: x - 0.1 * denoise(x, 0.7)[:, :4], x, grad=False)
        found.append(len(step.made))
    assert (found[0], found[1] - found[0]) == (126, 43), [name for name, _ in step.made]


@pytest.mark.parametrize("experts", [4, 64])
def test_kernels_do_not_grow_with_experts(experts):
    with FakeTensorMode():
        moe, x = (
            MoE(HIDDEN, ExpertsConfig(4 * HIDDEN, RouterConfig(experts, TOP_K), 2 * HIDDEN)),
            torch.randn(TOKENS, HIDDEN),
        )
        forward, _ = record(moe, x, grad=False)
    assert len(forward.made) == 21


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
    """No index tensors of T x D; in bf16, only the router's input and its gradient are fp32, one at a time."""
    config = build_config("DiT-S/2", depth=1, hidden_size=HIDDEN, num_heads=2, num_experts=EXPERTS)
    with FakeTensorMode(), weights_of(torch.bfloat16):
        block = DiTBlock(config, is_moe=True)
        x, c = torch.randn(1, TOKENS, HIDDEN, requires_grad=True), torch.randn(1, HIDDEN)
        forward, backward = record(block, x, c)
    for recorder in (forward, backward):
        assert recorder.wide(WIDE, lambda dtype: not dtype.is_floating_point) == []
    assert forward.wide(WIDE, lambda dtype: dtype == torch.float32) == ["aten._to_copy.default"]
    assert backward.wide(WIDE, lambda dtype: dtype == torch.float32) == ["aten.mm.default", "aten._to_copy.default"]


def test_naive_way_breaks_the_rule():
    """Which shows that the test above can fail."""
    moe, x = layer()
    moe.init_weights()
    moe.gate.weight.data.zero_()
    moe.gate.weight.data[0] = 1  # one expert gets every token of positive sum, or none
    forward, _ = record(NaiveMoE(moe), torch.rand_like(x), grad=False)
    assert forward.wide(WIDE, lambda dtype: not dtype.is_floating_point) == ["aten.repeat.default"] * 2
