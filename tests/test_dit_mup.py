"""DiT-muP's commands and files with our scripts; muP in runs, resumed, sampled, exported, upcycled."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, read_json, script
from test_large_dit import inputs, randomized
from test_training import assert_same_state, metrics

import checkpoint
import weights as tool
from configuration import build_config
from models import DiT

BSH = GOLDEN / "dit_mup_d2_p4_hd12.bsh"
SIZE = ["--depth", 2, "--num_heads", 6, "--dim_heads", 12, "--patch_size", 4]
MUP = ["--mup", "--load_base_shapes", BSH, *SIZE]
PIXELS = ["--vae", "none", "--device", "cpu"]


def train(images: Path, name: str, *flags, check: int | None = 0):
    """A short run in pixel space with a command of the public code; the run folder, or the error."""
    common = ["--data-path", images, "--image-size", 8, "--num-classes", 4, "--num-workers", 0, "--log-every", 1]
    result = script(
        "train.py",
        *PIXELS,
        *common,
        "--global_batch_size",
        8,
        "--results-dir",
        images.parent / name,
        *flags,
        check=check,
    )
    return max((images.parent / name).iterdir()) if check == 0 else result.stderr


def sample(ckpt: Path, output: Path, *flags, check: int | None = 0):
    """The images, or the error."""
    flags = [*PIXELS, "--num-sampling-steps", 3, "--class-labels", 0, 1, "--output", output, *flags]
    result = script("sample.py", "--ckpt", ckpt, *flags, check=check)
    return np.load(output / "samples.npz")["arr_0"] if check == 0 else result.stderr


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    from conftest import write_images

    images = write_images(tmp_path_factory.mktemp("mup") / "images")
    return train(images, "runs", *MUP, "--loglr", -10, "--logstd", 1, "--epochs", 1, "--ckpt-every", 3)


def test_the_published_training_command(run):
    model = read_json(run / "checkpoints" / "0000005", "config")["model"]
    said = {"depth": 2, "hidden_size": 72, "num_heads": 6, "patch_size": 4, "qk_norm": "none", "num_experts": 0}
    assert said.items() <= model.items()
    assert {"parametrization": "mup", "base_width": 48, "output_mult": 2.0}.items() <= model.items()
    assert run.name == "000-DiT-2L-6h-4-mup-ddpm"
    flags = json.loads((run / "args.json").read_text())
    assert flags["lr"] == 2.0**-10 == metrics(run)[0]["lr"]


def test_sampling_needs_no_flag_and_takes_the_published_ones(run, tmp_path):
    images = sample(run, tmp_path / "plain", "--cfg-scale", 1)
    published = [*MUP, "--logstd", 1, "--cfg_scale", 1, "--image-size", 8, "--num-classes", 4]
    assert np.array_equal(sample(run, tmp_path / "published", *published), images)
    many = [
        "--per-proc-batch-size",
        2,
        "--num-fid-samples",
        2,
        "--num-sampling-steps",
        3,
        "--sample-dir",
        tmp_path / "set",
    ]
    script("sample_ddp.py", "--ckpt", run, *PIXELS, *published, *many)
    record = json.loads(next((tmp_path / "set").glob("*/settings.json")).read_text())
    assert {"parametrization": "mup", "base_width": 48, "output_mult": 2.0}.items() <= record.items()


CONTRADICTIONS = {
    "standard": (["--parametrization", "standard"], "--parametrization standard contradicts"),
    "switch": (["--mup", "False"], "--mup (parametrization standard) contradicts"),
    "multiplier": (["--logstd", 2], "--logstd (output_mult 4.0) contradicts"),
    "base": (["--base-width", 24], "--base-width 24 contradicts"),
    "heads": (["--num_heads", 4], "--num-heads 4 contradicts"),
    "size of heads": (["--dim_heads", 24], "contradicts"),
    "depth": (["--depth", 28], "--depth 28 contradicts"),
    "base shapes": (["--load_base_shapes", GOLDEN / "dit_mup_d2_p4_hd72.bsh"], "hd72.bsh is of width 288"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_flags_that_contradict_a_checkpoint_are_refused(case, run, tmp_path):
    flags, message = CONTRADICTIONS[case]
    error = sample(run, tmp_path / "no", *flags, check=2)
    assert message.replace("-", "_") in error.replace("-", "_"), error
    assert not (tmp_path / "no").exists()


def test_a_resumed_run_needs_no_flag_of_the_parametrization(run):
    """To the bit, by the same command or by the sizes alone."""
    images = run.parent.parent / "images"
    before = run / "checkpoints" / "0000003"
    for name, flags in (("again", [*MUP, "--logstd", 1, "--loglr", -10]), ("sizes", SIZE)):
        copy = images.parent / name / "000-copy" / "checkpoints"
        copy.mkdir(parents=True)
        (copy / "0000003").symlink_to(before)
        resumed = train(images, name, *flags, "--epochs", 1, "--resume", copy.parent, "--ckpt-every", 3)
        assert_same_state(run, resumed, step=5)
    error = train(images, "no", *SIZE, "--parametrization", "standard", "--resume", run, check=2)
    assert "model parametrization was mup, is standard" in error


def test_heads_without_mup_make_the_standard_model(images):
    run = train(images, "standard", *SIZE, "--max-steps", 1)
    model = read_json(run / "checkpoints" / "0000001", "config")["model"]
    assert (model["parametrization"], model["base_width"], model["hidden_size"]) == ("standard", 0, 72)
    assert json.loads((run / "args.json").read_text())["lr"] == 1e-4
    assert "--mup (parametrization mup) contradicts" in sample(run, images.parent / "no", "--mup", check=2)
    refused = train(images, "no", "--mup", "--init-from", run, "--max-steps", 1, check=2)
    assert "--mup (parametrization mup) contradicts" in refused and "has parametrization standard" in refused


def test_a_base_wider_than_the_model_is_allowed_and_said(images):
    run = train(images, "wide", "--model", "DiT-Nano/2", "--mup", "--base-width", 128, "--max-steps", 1)
    assert "muP with a base width of 128, more than the model's 64" in (run / "log.txt").read_text()
    assert run.name == "000-DiT-Nano-2-mup-ddpm"


BAD = {
    "two learning rates": ([*MUP, "--loglr", -9, "--lr", 1e-3], "--loglr and --lr say the same thing"),
    "no head": ([*SIZE, "--dim_heads", 7], "hidden_size 42 must be a multiple of num_heads 6 and of 8"),
    "no whole heads in the base": ([*SIZE, "--mup", "--base-width", 40], "width 40 is no multiple of 12"),
    "shapes without muP": (["--load_base_shapes", BSH, *SIZE], "does nothing without --mup"),
    "multiplier without muP": (["--logstd", 1], "output_mult 2.0 does nothing under the standard parametrization"),
    "shapes of another depth": ([*MUP, "--depth", 3], "blocks.2.adaLN_modulation.1.bias is absent in the file"),
    "two bases": ([*MUP, "--base-width", 24], "--base-width 24 contradicts"),
    "no file": (["--mup", "--load_base_shapes", "nowhere.bsh", *SIZE], "nowhere.bsh cannot be read: No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, images):
    flags, message = BAD[case]
    error = train(images, "no", *flags, check=2)
    assert message in error and "Traceback" not in error
    assert not (images.parent / "no").exists()


def test_the_public_codes_autoencoder_folder(images):
    error = train(images, "no", "--vae", "mse", "--root", images, check=2)
    assert f"{images}/vaes/sd-vae-ft-mse" in error


# ---------------------------------------------------------------------------------------------------------------- files


def published_file(path: Path, **flags) -> DiT:
    """As the public code writes it: `{model, ema, opt, args}`."""
    config = build_config(
        "DiT-muP-4h/2", depth=2, hidden_size=72, num_heads=6, patch_size=4, base_width=48, input_size=8, num_classes=10
    )
    model = randomized(DiT(config))
    model.final_layer.linear.bias.data.zero_()
    state = model.state_dict()
    args = {"mup": True, "logstd": 0, "depth": 2, "num_heads": 6, "dim_heads": 12, "patch_size": 4, "image_size": 64}
    args |= {"load_base_shapes": "width48_d2.bsh", "vae": "ema", "loglr": -10.0} | flags
    torch.save({"model": state, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(**args)}, path)
    return model


def test_published_files_load_and_export(tmp_path):
    model = published_file(tmp_path / "0200000.pt")
    batch = inputs(model.config)
    loaded = checkpoint.load_weights(tmp_path / "0200000.pt")
    assert loaded.config == model.config
    assert loaded.record["space"] == {"path": "ema"} and loaded.objective == {"name": "ddpm"}
    assert torch.equal(loaded.build().eval()(*batch), model(*batch))
    for name in ("x.safetensors", "x.pt"):
        tool.export(loaded, tmp_path / name, None, None)
        assert torch.equal(checkpoint.load_weights(tmp_path / name).build().eval()(*batch), model(*batch))


def test_published_files_of_another_multiplier_and_of_the_standard_way(tmp_path):
    model = published_file(tmp_path / "x.pt", logstd=-1)
    batch = inputs(model.config)
    half = checkpoint.load_weights(tmp_path / "x.pt").build().eval()(*batch)
    torch.testing.assert_close(half, model(*batch) / 2)
    published_file(tmp_path / "y.pt", mup=False)
    assert checkpoint.load_weights(tmp_path / "y.pt").config.parametrization == "standard"


def test_bare_files_are_taken_as_flags_say(tmp_path):
    model = published_file(tmp_path / "x.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    common = ["--num_heads", 6, "--dim_heads", 12, "--cfg-scale", 1]
    vae = ["--vae", "none"]
    error = sample(tmp_path / "bare.pt", tmp_path / "no", *common, *vae, check=2)
    assert "3 channels, the network 4" in error  # all of the flags before were understood
    loaded = checkpoint.load_weights(tmp_path / "bare.pt", num_heads=6, parametrization="mup")
    assert loaded.config.base_width == 48  # four heads
    assert torch.equal(loaded.build().eval()(*inputs(model.config)), model(*inputs(model.config)))
    error = sample(tmp_path / "bare.pt", tmp_path / "no", *common, "--mup", "--load_base_shapes", "no.bsh", check=2)
    assert "no.bsh cannot be read" in error


def test_heads_of_a_published_width_are_compared(tmp_path):
    config = build_config("DiT-muP-4h/2", depth=1, input_size=8, in_channels=3, num_classes=10)
    torch.save(DiT(config).state_dict(), tmp_path / "bare.pt")
    error = sample(tmp_path / "bare.pt", tmp_path / "no", "--num_heads", 8, check=2)
    assert "contradicts" in error and "which says 4" in error


# ------------------------------------------------------------------------------------------------------------ upcycling


def test_a_mup_run_becomes_a_mup_mixture_of_the_same_function(run, tmp_path):
    result = script("upcycle.py", "--ckpt", run, "--num_experts", 4, "--output", tmp_path / "moe")
    assert "differ from the source's by at most" in result.stdout
    dense, moe = (checkpoint.load_weights(path) for path in (run, tmp_path / "moe"))
    assert (moe.config.parametrization, moe.config.base_width, moe.config.output_mult) == ("mup", 48, 2.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    batch = x, torch.tensor([3.0, 900.0]), torch.tensor([0, 1])
    torch.testing.assert_close(moe.build()(*batch), dense.build()(*batch), rtol=1e-5, atol=1e-6)
    gate = moe.state_dict["blocks.0.moe.gate.weight"]
    assert gate.std().item() == pytest.approx(1 / 72, rel=0.2)
    images = run.parent.parent / "images"
    trained = train(images, "upcycled", "--init-from", tmp_path / "moe", "--max-steps", 1)
    assert read_json(trained / "checkpoints" / "0000001", "config")["model"]["base_width"] == 48
    assert json.loads((trained / "args.json").read_text())["lr"] == 2.0**-10
