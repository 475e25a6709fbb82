"""The kernels in Triton against plain formulas: by Triton's interpreter on a CPU in fp32, and on a GPU as they are."""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused
from benchmarks.traffic import KERNELS
from kernels import SwiGLUDown

pytest.importorskip("triton")  # and so there are modules to forget
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
loads_single_values = pytest.mark.skipif(
    not ON_GPU and torch.__version__ < "2.15", reason="the interpreter of older Tritons loads no single values"
)


def copy_of(name: str):
    """The module anew, under another name."""
    spec = importlib.util.spec_from_file_location(name, Path(fused.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_move_whole_vectors():
    """Compiled for an H100, which takes no GPU: every access of a row's values is one of 16 bytes.

    Comes first: Triton's interpreter changes its language for good.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)  # of this copy, Triton is that of everybody
        module = copy_of("fused_compiled")
    rows = {"rows": "i32", "width": "i32"}
    tiles = {"ROWS": 4, "COLUMNS": 512}
    rest = {"width": "i32", "places": "*i64", "weights": "*fp32", "grad_weights": "*fp32"}
    whole = {"K": 2, "COLUMNS": 1024}
    vectors = {
        "_swiglu": (rows, tiles | {"WEIGHTED": False}, 4, 2),  # with 16 values a thread
        "_swiglu_backward": (rows, tiles, 6, 4),
        "_swiglu_again": (rest, {"WEIGHTED": True, "COLUMNS": 1024}, 3, 3),
        "_swiglu_again of few": (rest | {"warps": 1}, {"WEIGHTED": True, "COLUMNS": 256}, 3, 3),
        "_spread": (rest, whole, 1, 2),
        "_gather_sum": (rest, whole, 2, 1),
    }
    for name, (types, constants, loads, stores) in vectors.items():
        code = assembly(getattr(module, name.split()[0]), types, constants)
        assert (code.count("ld.global.v4"), code.count("st.global.v4")) == (loads, stores), name


def assembly(kernel, types: dict[str, str], constants: dict[str, int]) -> str:
    """PTX of a kernel whose arguments are pointers to bf16 if `types` does not say otherwise, all divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types, warps = dict(types), types.get("warps", 4)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in names}
    divisible = [name for name in names if name not in constants and (name, types.get(name)) != ("rows", "i32")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


@pytest.fixture(scope="module")
def kernels():
    """The module; without a GPU, a copy of it whose kernels are interpreted, and of Triton, which decides on import."""
    if ON_GPU:
        return fused
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
            patch.delitem(sys.modules, name)
        return copy_of("fused_interpreted")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 2 * 24), (3, 3, 2 * 300), (2, 2 * 1024), (0, 2 * 16)], ids=str)
def test_swiglu(kernels, shape):
    gate_up = randn(*shape)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    grad = torch.randn_like(expected)
    (grads,) = torch.autograd.grad(expected, gate_up, grad)
    torch.testing.assert_close(kernels.swiglu(gate_up.detach()), expected)
    torch.testing.assert_close(kernels.swiglu_backward(grad, gate_up.detach()), grads)


@loads_single_values
@pytest.mark.parametrize("has_weights", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("shape", [(5, 2 * 24), (300, 2 * 40), (300, 2 * 64), (3, 2 * 1100), (0, 2 * 16)], ids=str)
def test_swiglu_of_weighted_rows_and_again(kernels, shape, has_weights):
    gate_up, weights = randn(*shape), randn(shape[0]) if has_weights else None
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up * (weights.unsqueeze(-1) if has_weights else 1)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [gate_up, weights] if has_weights else [gate_up], grad)
    given = weights.detach() if has_weights else None
    torch.testing.assert_close(kernels.swiglu(gate_up.detach(), given), expected)
    grads, hidden, grad_weights = kernels.swiglu_again(grad.clone(), gate_up.detach(), given)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(grads, wanted[0])
    if has_weights:
        torch.testing.assert_close(grad_weights, wanted[1])
    else:
        assert grad_weights is None


@loads_single_values
@pytest.mark.parametrize("size", [(7, 2, 20), (4, 1, 1100), (6, 3, 64), (0, 2, 8)], ids=str)
def test_tokens_to_their_places_and_back(kernels, size):
    tokens, top_k, width = size
    inverse = torch.randperm(tokens * top_k, device=DEVICE)  # of assignment -> place
    order, places = inverse.argsort(), inverse.view(tokens, top_k)
    x, y = randn(tokens, width), randn(tokens * top_k, width)

    rows = x.detach().repeat_interleave(top_k, dim=0)[order]
    assert torch.equal(kernels.spread(x.detach(), places), rows)

    chosen = y[inverse].unflatten(0, (tokens, top_k))
    torch.testing.assert_close(kernels.gather_sum(y.detach(), places), chosen.sum(dim=1))


@loads_single_values
@pytest.mark.parametrize("has_weights", [True, False], ids=["weighted", "plain"])
def test_experts_by_these_kernels(kernels, monkeypatch, has_weights):
    """The autograd function around them: results, and every gradient, of the same formulas in PyTorch."""
    gate_up, down = randn(10, 2 * 16), randn(3, 8, 16)
    weights, offsets = randn(10) if has_weights else None, torch.tensor([4, 4, 10], dtype=torch.int32, device=DEVICE)
    inputs = [each for each in (gate_up, weights, down) if each is not None]

    def both() -> list[torch.Tensor]:
        out = SwiGLUDown.apply(gate_up, weights, down, offsets)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(dim=0))]

    monkeypatch.setattr(kernels, "serves", lambda *tensors: False)
    monkeypatch.setattr("kernels.fused", kernels)
    expected = both()
    monkeypatch.setattr(kernels, "serves", lambda *tensors: True)
    for found, wanted in zip(both(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_traffic_knows_their_arguments(kernels):
    for name, (read, written) in KERNELS.items():
        mine = list(dict.fromkeys([*read.split(), *written.split()]))
        kernel = getattr(kernels, name)
        assert list(getattr(kernel, "arg_names", None) or inspect.signature(kernel.fn).parameters)[: len(mine)] == mine


def test_plain_formulas_serve_elsewhere():
    assert not fused.serves(torch.randn(2, 4)) and fused.AVAILABLE == ON_GPU


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
def test_bf16_repeats_and_rounds_once():
    gate_up = randn(4096, 2 * 1536).detach().bfloat16()
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert torch.equal(fused.swiglu(gate_up), (F.silu(gate) * up).bfloat16()) or torch.allclose(
        fused.swiglu(gate_up).float(), F.silu(gate) * up, rtol=2**-8, atol=1e-6
    )
    assert torch.equal(fused.swiglu(gate_up), fused.swiglu(gate_up))
