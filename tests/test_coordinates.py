"""The coordinate check passes for every family, and sees each rule that is broken; the sweep of learning rates."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, script, write_images

from analysis import coordinates, lr_transfer
from configuration import config_said
from parametrization import RULES

CPU = torch.device("cpu")
TINY = ["--steps", "3", "--seeds", "2", "--device", "cpu"]
GOOD = ["--steps", "4", "--seeds", "4", "--loglr", "-8"]


def verdicts(*flags, widths=(32, 64, 128, 256)) -> dict[str, dict]:
    """Of a model of one block with all roles, and heads of 16."""
    args = coordinates.get_parser().parse_args([*TINY, "--depth", "1", "--mup", "--base-width", "64", *flags])
    args.num_classes = 10
    config = config_said(args, "DiT-Nano/2")
    make_batch, config = coordinates.open_data(args, config, CPU)
    return coordinates.check([config.at_width(width) for width in widths], make_batch, args, CPU).verdicts(0.15)


SPARSE = ("--num_experts", "4")


@pytest.mark.parametrize("flags", [(), ("--model", "Large-DiT-Nano/2"), SPARSE], ids=["dense", "Large-DiT", "MoE"])
def test_every_layer_keeps_its_size(flags):
    found = verdicts(*GOOD, *flags)
    assert {name: verdict for name, verdict in found.items() if not verdict["good"]} == {}
    if flags == SPARSE:
        names = {"gate", "experts.0", "experts.3", "shared_experts.gate_up_proj", "shared_experts.down_proj"}
        assert {f"blocks.0.moe.{name}" for name in names} | {"blocks.0.moe", "blocks.0", "output"} <= found.keys()


BROKEN = {  # rule: what it is for the moment, and a layer that has to notice; inputs do not grow: they have no m
    "learning rate of table": ("table", dict(learning_rate=lambda m: 1 / m), "y_embedder.embedding_table"),
    "learning rate of hidden": ("hidden", dict(learning_rate=lambda m: 1.0), "blocks.0.attn.qkv"),
    "learning rate of modulation": ("modulation", dict(learning_rate=lambda m: 1.0), "blocks.0.adaLN_modulation.1"),
    "learning rate of output": ("output", dict(learning_rate=lambda m: 1 / m), "output"),
    "learning rate of router": ("router", dict(learning_rate=lambda m: 1.0), "blocks.0.moe.gate"),
    "learning rate of expert": ("expert", dict(learning_rate=lambda m: 1.0), "blocks.0.moe.experts.0"),
    "learning rate of vector": ("vector", dict(learning_rate=lambda m: m**2), "x_embedder.proj"),
    "deviation of table": ("table", dict(deviation=lambda fan_in: fan_in**-0.5), "y_embedder.embedding_table"),
    "deviation of hidden": ("hidden", dict(deviation=lambda fan_in: 0.1), "blocks.0.attn.qkv"),
    "deviation of modulation": ("modulation", dict(deviation=lambda fan_in: 1 / fan_in), "blocks.0.adaLN_modulation.1"),
    "deviation of output": ("output", dict(deviation=lambda fan_in: 1.0), "output"),
    "deviation of router": ("router", dict(deviation=lambda fan_in: 1.0), "blocks.0.moe.gate"),
    "deviation of expert": ("expert", dict(deviation=lambda fan_in: 0.1), "blocks.0.moe.experts.0"),
    "deviation of vector": ("vector", dict(deviation=lambda fan_in: fan_in**0.5), "t_embedder.mlp.0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_every_broken_rule_is_noticed(case, monkeypatch):
    role, rule, layer = BROKEN[case]
    monkeypatch.setitem(RULES, role, RULES[role]._replace(**rule))
    assert not verdicts("--num_experts", "4")[layer]["good"]


def test_a_readout_without_its_multiplier_is_noticed(monkeypatch):
    monkeypatch.setattr("models.readout_multiplier", lambda config: 1.0)
    assert not verdicts()["output"]["good"]


def test_standard_is_beside_it_and_is_not_good(tmp_path):
    flags = [
        "--num_experts",
        "4",
        "--depth",
        "1",
        "--mup",
        *TINY,
        "--widths",
        64,
        128,
        "--tolerance",
        1,
        "--output",
        tmp_path,
    ]
    result = script("analysis/coordinates.py", *flags)
    assert "slopes over widths [64, 128]" in result.stdout
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "coordinates.json").read_text())
    shape = np.array(record["standard"]["size"]["output"]).shape
    assert shape == (4, 2, 2) and record["model"]["base_width"] == 64
    assert record["standard"]["size"]["output"][3] != record["mup"]["size"]["output"][3]


def test_a_check_that_fails_is_exit_code_1_and_still_writes(tmp_path):
    flags = ["--depth", 1, *TINY, "--widths", 32, 64, "--tolerance", 0.0, "--output", tmp_path]
    result = script("analysis/coordinates.py", *flags, check=1)
    assert "layers do not keep their size: x_embedder.proj" in result.stderr
    assert (tmp_path / "coordinates.json").exists()


def test_on_images_with_the_published_flags(tmp_path):
    images = write_images(tmp_path / "images")
    flags = ["--data_path", images, "--vae-path", "none", "--image-size", 8, "--batch_size", 2, "--seed", 1]
    flags += ["--work_dir", tmp_path / "out", "--coord_check_nsteps", 1, "--coord_check_nseeds", 1, "--lr", "1e-3"]
    script("analysis/coordinates.py", *flags, "--depth", 1, "--widths", 64, 128, "--tolerance", 5)
    assert json.loads((tmp_path / "out" / "coordinates.json").read_text())["model"]["in_channels"] == 3


def test_base_shapes_are_written_and_read(tmp_path):
    flags = ["--num_heads", 4, "--depth", 2, "--patch_size", 4]
    script("analysis/coordinates.py", *flags, "--write-bsh", tmp_path / "x.bsh")
    ours, golden = ((path.read_text().splitlines()) for path in (tmp_path / "x.bsh", GOLDEN / "dit_mup_d2_p4_hd72.bsh"))
    assert [line for line in ours if line[0] != "#"] == [line for line in golden if line[0] != "#"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", 64], "a slope needs two widths"),
        (["--widths", 64, 100], "width 100 is no multiple of 16, the size of a head"),
        (["--data-path", "nowhere"], "nowhere"),
        (["--loglr", -8, "--lr", 0.1], "--loglr and --lr say the same thing"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    assert message in script("analysis/coordinates.py", *flags, check=2).stderr


# ------------------------------------------------------------------------------------------------------- learning rates


def test_a_sweep_goes_on_where_it_was_and_does_not_depend_on_processes(tmp_path, monkeypatch):
    flags = ["--kinds", "dense", "--widths", 16, 32, "--loglrs", -8, 10, "--seeds", 1, "--steps", 2]

    def go(name: str, *more) -> dict:
        where = ["--runs", tmp_path / name, "--output", tmp_path / f"{name}.png"]
        result = script("analysis/lr_transfer.py", *flags, *where, *more)
        assert "| 32 |" in result.stdout
        return json.loads((tmp_path / f"{name}.json").read_text())

    one = go("one", "--processes", 1)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 8
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[3].unlink()
    assert go("one", "--processes", 1) == one
    changed = {path for path in files if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {files[3]}
    assert go("two", "--processes", 2) == one
    sweep = one["sweeps"]["dense, mup"]
    assert sweep["best_loglr"] == [-8.0, -8.0] and sweep["shift_in_notches"] == [0, 0]


def test_shifts_and_costs_of_a_sweep():
    losses = np.array([[3.0, 1.0, 2.0], [1.5, 2.5, np.inf], [2.0, 1.0, 0.5]])[:, :, None]
    found = lr_transfer.summary(losses, [32, 64, 128], [-8, -7, -6])
    assert found["best_loglr"] == [-7, -8, -6] and found["shift_in_notches"] == [0, -1, 1]
    assert found["cost_of_the_narrow_ones"] == [0.0, 1.0, 0.5] and found["loss"][1][2] is None
    lines = lr_transfer.table(found, [32, 64, 128], [-8, -7, -6]).splitlines()
    assert lines[3] == "| 64 | **1.5000** | 2.5000 | diverged | -1 | 1.0000 |"


def test_a_run_that_breaks_down_is_infinitely_bad(tmp_path):
    trial = lr_transfer.Trial("dense", "standard", 16, 90.0, 0, 2, 16)
    assert lr_transfer.run((tmp_path, trial))[1] == np.inf
    assert lr_transfer.stored(tmp_path, trial) == np.inf
    assert lr_transfer.stored(tmp_path, dataclasses.replace(trial, steps=3)) is None
