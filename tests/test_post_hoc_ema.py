"""Averages of any length after training: profiles, reconstruction, runs of every engine."""

import numpy as np
import pytest
import torch
from conftest import script
from torch import nn

import checkpoint
from post_hoc_ema import PowerEMA, coefficients, exponent, product, reconstruct


def test_lengths_are_relative_deviations():
    for length in (0.05, 0.1, 0.25):
        gamma = exponent(length)
        t = (np.arange(100_000) + 0.5) / 100_000
        weight = t**gamma / (t**gamma).sum()
        mean = (weight * t).sum()
        assert np.sqrt((weight * (t - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)
    assert exponent(0.1) == pytest.approx(6.94, abs=0.01)  # as published


def test_products_are_integrals():
    t = (np.arange(200_000) + 0.5) / 200_000 * 30

    def profile(step: float, gamma: float) -> np.ndarray:
        return np.where(t <= step, (gamma + 1) * t**gamma / step ** (gamma + 1), 0)

    for a, b in (((10, 3), (30, 7)), ((30, 7), (10, 3)), ((20, 5), (20, 9))):
        assert product(*a, *b) == pytest.approx((profile(*a) * profile(*b)).mean() * 30, rel=1e-3)


def test_any_length_is_reconstructed_from_two():
    """Of a random walk, against the average that was kept all along."""
    module = nn.Linear(40, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    kept = {length: PowerEMA(module, length) for length in (0.05, 0.1, 0.15, 0.07)}
    snapshots, tensors = [], []
    for step in range(1, 401):
        with torch.no_grad():
            module.weight += 0.1 * torch.randn(1, 40, generator=generator)
        for average in kept.values():
            average.update(module)
        if step % 20 == 0:
            for length in (0.05, 0.1):
                snapshots.append((float(step), exponent(length)))
                tensors.append(kept[length].average["weight"].double().clone())
    for length in (0.15, 0.07, 0.1):
        factors = coefficients(snapshots, 400.0, length)
        found = sum(factor * tensor for factor, tensor in zip(factors, tensors, strict=True))
        expected = kept[length].average["weight"]
        assert (found - expected).norm() < 0.02 * expected.norm(), length
    assert np.allclose(coefficients(snapshots, 400.0, 0.1)[-1], 1, atol=1e-3)


def test_a_run_keeps_them_and_is_averaged(images):
    """One process, two shards, resumed: the same; a stored length comes back; sampled without a flag."""
    flags = ["--data-path", images, "--model", "DiT-Nano/2", "--depth", 1, "--num_experts", 2, "--expert-ratio", 1]
    flags += ["--vae-path", "none", "--image-size", 8, "--num-classes", 4, "--num-workers", 0, "--device", "cpu"]
    flags += ["--global-batch-size", 8, "--ckpt-every", 2, "--lr", 0.01, "--rf", "--post-hoc-ema"]
    runs = {}
    for name, more, options in (
        ("one", [], {}),
        ("two", ["--data-parallel", "fsdp"], {"processes": 2}),
    ):
        script("train.py", *flags, *more, "--results-dir", images.parent / name, "--max-steps", 6, **options)
        runs[name] = next((images.parent / name).iterdir())
    copy = images.parent / "resumed" / "000-x" / "checkpoints"
    copy.mkdir(parents=True)
    for step in (2, 4):
        (copy / f"{step:07d}").symlink_to(runs["one"] / "checkpoints" / f"{step:07d}")
    script("train.py", *flags, "--results-dir", images.parent / "resumed", "--resume", copy.parent, "--max-steps", 6)
    runs["resumed"] = copy.parent
    for length in (0.1, 0.2):
        found = {name: reconstruct(run, length)[0] for name, run in runs.items()}
        for name, tensor in found["one"].items():
            assert torch.equal(found["resumed"][name], tensor)
            torch.testing.assert_close(found["two"][name], tensor, rtol=1e-3, atol=1e-3)
    stored = checkpoint.read_tensors(runs["one"] / "checkpoints" / "0000006", "post-hoc-0.1")
    found, _ = reconstruct(runs["one"], 0.1)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-3, atol=1e-4)
    output = images.parent / "averaged.safetensors"
    said = script("weights.py", "ema", runs["one"], "--length", 0.15, "--step", 4, "--output", output).stdout
    assert "length 0.15 at step 4" in said
    draw = ["--class-labels", 1, "--num-sampling-steps", 2, "--device", "cpu", "--output", images.parent / "x"]
    script("sample.py", "--ckpt", output, *draw)
    error = script("weights.py", "ema", runs["one"], "--length", 0.1, "--step", 3, "--output", output, check=2).stderr
    assert "has averages at 2, 4, 6" in error
    where = ["--results-dir", images.parent / "resumed", "--resume", copy.parent, "--max-steps", 8, "--allow-changes"]
    error = script("train.py", *flags, "0.2", *where, check=2).stderr
    assert "has no average of length 0.2: --post-hoc-ema is of whole runs" in error
    error = script("weights.py", "ema", images, "--length", 0.1, "--output", output, check=2).stderr
    assert "train.py --post-hoc-ema keeps them" in error
