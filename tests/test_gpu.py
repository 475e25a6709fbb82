"""What only a GPU can show: `python -m pytest -m gpu`. Skipped, with a word, where there is none."""

import numpy as np
import pytest
import torch
from conftest import Golden, write_images
from test_models import golden_model
from test_moe import gradients, make_moe, per_token
from test_sampling import generate, random_model

import train
from diffusion import GaussianDiffusion, RectifiedFlow
from layers import ATTENTION_BACKENDS
from routers import load_balancing_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["dit_moe_timm_attention", "dit_moe_flash_attention", "dit_dense"])
def test_golden_outputs(name):
    golden = Golden(name)
    model = golden_model(golden).to(CUDA).eval()
    out = model(golden["in.x"].to(CUDA), golden["in.t"].to(CUDA), golden["in.y"].to(CUDA))
    torch.testing.assert_close(out.cpu(), golden["out.eval"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("experts", [8, 64])
def test_grouped_product_in_bf16(experts):
    """The fast path, all bf16, against the per-token loop in fp32 on the CPU: outputs and every gradient."""
    moe = make_moe(experts=experts, hidden=64, width=128, shared=64)
    x = torch.randn(2, 33, 64)
    expected = per_token(moe, x)
    slow = gradients(moe, expected.square().mean())
    moe.to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        out, routing = moe(x.to(CUDA))
    assert out.dtype == torch.bfloat16 and routing.probs.dtype == torch.float32
    fast = gradients(moe, out.float().square().mean())
    assert (out.float().cpu() - expected).norm() / expected.norm() < 1e-2
    for name, gradient in slow.items():
        if gradient.norm() > 1e-6:
            assert (fast[name].cpu() - gradient).norm() / gradient.norm() < 5e-2, name


def test_no_synchronisation_in_the_layer():
    moe = make_moe(experts=8, hidden=64, width=128, shared=64).to(CUDA).bfloat16()
    x = torch.randn(4, 64, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    moe(x)[0].float().sum().backward()  # first calls may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, routing = moe(x)
        (out.float().sum() + load_balancing_loss([routing]).sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeat_runs_are_bit_identical():
    moe = make_moe(experts=8, hidden=64, width=128, shared=64).to(CUDA)
    x = torch.randn(8, 64, 64, device=CUDA)
    runs = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            out, routing = moe(x)
        loss = out.float().square().mean() + load_balancing_loss([routing]).sum()
        runs.append(gradients(moe, loss) | {"out": out.detach()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(
    "backend", [name for name in ATTENTION_BACKENDS if name in ("flash", "efficient", "cudnn", "math")]
)
def test_attention_backends_agree(backend):
    model = random_model(qk_norm=True).to(CUDA).bfloat16()
    x, t, y = torch.randn(2, 3, 8, 8, device=CUDA), torch.rand(2, device=CUDA), torch.tensor([0, 1], device=CUDA)
    model.set_attention("math")
    expected = model(x, t, y).float()
    model.set_attention(backend)
    out = model(x, t, y).float()
    assert (out - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("objective", [RectifiedFlow(), GaussianDiffusion()], ids=lambda o: o.name)
def test_images_agree_with_the_cpu(objective):
    model = random_model()
    slow = generate(model, objective, [0, 1, 2, 3]).astype(int)
    fast = generate(model.to(CUDA), objective, [0, 1, 2, 3]).astype(int)
    assert np.abs(fast - slow).max() <= 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16"],
        ["--precision", "fp16", "--rf", "False"],
        ["--precision", "tf32", "--activation-checkpointing"],
        ["--precision", "bf16", "--compile", "--accum_iter", "2"],
        ["--precision", "bf16", "--residual-dtype", "bf16"],
        ["--precision", "bf16", "--compile", "--activation-checkpointing", "selective"],
        ["--precision", "fp32", "--deterministic"],
    ],
    ids=" ".join,
)
def test_training_follows_the_cpu(tmp_path, flags):
    from test_training import TINY, metrics, tensors

    images = write_images(tmp_path / "images")
    runs = []
    for device in ("cpu", "cuda", "cuda"):
        results = tmp_path / f"results-{len(runs)}"
        argv = [*TINY, "--data-path", images, "--results-dir", results, "--max-steps", 4, "--global-batch-size", 8]
        argv += ["--log-every", 1, *(flags if device == "cuda" else flags[2:]), "--device", device, "--sample-every", 4]
        argv = [value for value in argv if device == "cuda" or value != "--compile"]
        train.main(train.get_parser().parse_args(list(map(str, argv))))
        runs.append(next(results.iterdir()))
    for slow, fast in zip(metrics(runs[0]), metrics(runs[1]), strict=True):
        assert slow["loss"] == pytest.approx(fast["loss"], rel=3e-2)
    if "--deterministic" in flags:
        one, two = tensors(runs[1], "model"), tensors(runs[2], "model")
        assert all(torch.equal(one[name], two[name]) for name in one)
