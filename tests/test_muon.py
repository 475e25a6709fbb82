"""Muon: against PyTorch's own, matrix by matrix, by every engine, across widths."""

import json

import pytest
import torch
from conftest import script
from test_training import assert_same_state

import checkpoint
from configuration import build_config
from models import DiT
from muon import build_muon, orthogonal, pieces

NANO = dict(depth=2, input_size=8, num_classes=4, num_experts=4, expert_ratio=1.0)


def test_singular_values_become_one():
    torch.manual_seed(0)
    for shape in ((8, 8), (24, 6), (3, 6, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has one since 2.9")
def test_a_matrix_moves_as_with_pytorchs_own():
    """Which iterates in bf16; three steps with momentum and decay."""
    model = DiT(build_config("DiT-Nano/2", **NANO))
    theirs = torch.nn.Parameter(model.blocks[0].attn.proj.weight.detach().clone())
    options = dict(lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    reference = torch.optim.Muon([theirs], **options)
    ours = build_muon(model, 0.02, 0.1, 1e-8, False)
    for step in range(3):
        grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(step))
        theirs.grad, model.blocks[0].attn.proj.weight.grad = grad.clone(), grad.clone()
        reference.step()
        ours.step()
    moved = model.blocks[0].attn.proj.weight
    assert (moved - theirs).abs().max() < 0.02 * 0.02 and (moved - theirs).norm() < 0.02 * theirs.norm()


def test_every_matrix_is_one_of_its_own():
    """Experts, query and key and value, gate and up, modulations: each as if it stood alone."""
    torch.manual_seed(0)
    model = DiT(build_config("DiT-Nano/2", **NANO))
    optimizer = build_muon(model, 0.1, 0.0, 1e-8, False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    for name, rows in (("attn.qkv.weight", [64] * 3), ("adaLN_modulation.1.weight", [64] * 6)):
        full = f"blocks.0.{name}"
        assert pieces(model)[full] == rows
        for b, a, g in zip(*(t.split(rows) for t in (before[full], after[full], after[full].grad)), strict=True):
            torch.testing.assert_close(b - a, 0.1 * 0.2 * 8 * orthogonal(g * (1 - 0.95 * 0.95)), rtol=1e-3, atol=1e-5)
    experts = "blocks.0.moe.experts.gate_up_proj"
    delta, grad = (before[experts] - after[experts]).detach(), after[experts].grad
    for expert in range(4):
        for half in range(2):
            rows = slice(64 * half, 64 * half + 64)
            expected = 0.1 * 0.2 * 8 * orthogonal(grad[expert, rows])
            torch.testing.assert_close(delta[expert, rows], expected, rtol=1e-2, atol=1e-3)
    for name in (
        "x_embedder.proj.weight",
        "blocks.0.moe.gate.weight",
        "final_layer.linear.weight",
        "blocks.0.attn.qkv.bias",
    ):
        moved = (before[name] - after[name]).abs()
        assert torch.allclose(moved, torch.full_like(moved, 0.1), rtol=1e-3), name  # AdamW's first step


def test_under_mup_features_move_alike_at_every_width():
    """Of an update, the spectral norm over sqrt(O/I) is the same; at the base width it is that of the standard."""
    norms = {}
    for width, mup in ((64, "standard"), (64, "mup"), (128, "mup"), (256, "mup")):
        torch.manual_seed(0)
        options = dict(parametrization=mup) | (dict(base_width=64) if mup == "mup" else {})
        sizes = NANO | dict(hidden_size=width, num_heads=width // 16)
        model = DiT(build_config("DiT-Nano/2", **sizes, **options))
        optimizer = build_muon(model, 0.1, 0.0, 1e-8, False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for name in ("blocks.0.attn.proj.weight", "blocks.0.moe.shared_experts.down_proj.weight"):
            moved = before[name] - dict(model.named_parameters())[name]
            norms.setdefault(name, []).append(torch.linalg.matrix_norm(moved, 2).item())
    for values in norms.values():
        assert values == pytest.approx([values[0]] * 4, rel=0.25)


@pytest.mark.slow
def test_one_curve_by_every_engine(images):
    """One process resumed to the bit; replicated, sharded, with experts over two processes; ZeRO refuses."""
    flags = ["--data-path", images, "--model", "DiT-Nano/2", "--depth", 2, "--num_experts", 4, "--expert-ratio", 1]
    flags += ["--vae-path", "none", "--image-size", 8, "--num-classes", 4, "--num-workers", 0, "--device", "cpu"]
    flags += ["--global-batch-size", 8, "--optimizer", "muon", "--lr", 1e-2, "--weight-decay", 0.1, "--log-every", 1]
    flags += ["--ckpt-every", 2, "--lr-schedule", "wsd", "--cooldown", 0.5, "--rf", "--precision", "fp32"]
    runs = {}
    for name, more, options in (
        ("one", [], {}),
        ("ddp", [], {"processes": 2}),
        ("fsdp", ["--data-parallel", "fsdp"], {"processes": 2}),
        ("experts", ["--data-parallel", "fsdp", "--expert-parallel", 2], {"processes": 2}),
    ):
        script("train.py", *flags, *more, "--results-dir", images.parent / name, "--max-steps", 4, **options)
        runs[name] = next((images.parent / name).iterdir())
    lines = {
        name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for name, run in runs.items()
    }
    assert [line["lr"] for line in lines["one"]] == [0.01, 0.01, 0.01, 0.005]
    expected = [line["loss"] for line in lines["one"]]
    for name, of in lines.items():
        assert [line["loss"] for line in of] == pytest.approx(expected, rel=1e-3), name
    copy = images.parent / "resumed" / "000-x" / "checkpoints"
    copy.mkdir(parents=True)
    (copy / "0000002").symlink_to(runs["one"] / "checkpoints" / "0000002")
    script("train.py", *flags, "--results-dir", images.parent / "resumed", "--resume", copy.parent, "--max-steps", 4)
    assert_same_state(runs["one"], copy.parent)
    kept = checkpoint.read_tensors(runs["one"] / "checkpoints" / "0000004", "optimizer")
    assert "blocks.0.attn.qkv.weight.momentum_buffer" in kept and "blocks.0.attn.qkv.bias.exp_avg" in kept
    config = ["--deepspeed_config", "config/zero2.json", "--results-dir", images.parent / "zero", "--max-steps", 1]
    error = script("train_deepspeed.py", *flags, *config, check=2).stderr
    assert "--optimizer muon is of train.py" in error
