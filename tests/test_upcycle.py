"""Dense to sparse: the same function at step 0, the right change where one is asked for, files to go on from."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import Golden, read_json, script

import checkpoint
import families
import models
import sample
import train
import upcycle
from cli import UsageError, run
from diffusion import RectifiedFlow
from models import DiT, build_model
from moe import EXPERTS
from upcycle import Recipe, break_symmetry, mlp_of, random_outputs, replicate


def random_model(**options) -> DiT:
    """A model whose output depends on everything, and is of order one."""
    torch.manual_seed(0)
    model = build_model("DiT-Nano/2", **(dict(input_size=8, in_channels=3, num_classes=4) | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.07)
    return model.eval().requires_grad_(False)


def make(source: DiT, seed: int = 0, **recipe) -> DiT:
    recipe = Recipe(seed=seed, **recipe)
    generator = torch.Generator().manual_seed(seed)
    model = upcycle.upcycle(source, recipe, generator)
    break_symmetry(model, source, recipe, generator)
    return model


def assert_same_function(model: DiT, source: DiT, time_scale: float = 1.0) -> None:
    expected = random_outputs(source, time_scale)
    assert 0.3 < expected.abs().max() < 3
    torch.testing.assert_close(random_outputs(model, time_scale), expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("routing", upcycle.ROUTINGS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 3), (4, 4), (8, 1), (8, 2), (8, 5), (8, 8)])
def test_every_number_of_experts_computes_the_dense_model(experts, top_k, routing):
    source = random_model()
    model = make(source, num_experts=experts, num_experts_per_tok=top_k, routing=routing)
    assert model.config.expert_mlp == "gelu" and model.config.moe_indices == (0, 1, 2)
    assert_same_function(model, source)


@pytest.mark.parametrize("routing", upcycle.ROUTINGS)
def test_golden_dense_model(tmp_path, routing):
    golden = Golden("dit_dense")
    torch.save(golden.part("model."), tmp_path / "dense.pt")
    heads = json.loads(golden.metadata["config"])["num_heads"]
    source = upcycle.load_source(checkpoint.load_weights(tmp_path / "dense.pt", num_heads=heads))
    model = make(source, num_experts=8, num_experts_per_tok=2, routing=routing)
    inputs = golden["in.x"], golden["in.t"], golden["in.y"]
    torch.testing.assert_close(model(*inputs), source(*inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(*inputs), golden["out.eval"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layers", "expected"), [("every-2", (1,)), ("deep-half", (1, 2)), ("2,0", (0, 2))])
def test_chosen_blocks_become_sparse(layers, expected):
    source = random_model()
    model = make(source, num_experts=4, moe_layers=layers)
    assert tuple(i for i, block in enumerate(model.blocks) if block.is_moe) == expected
    assert_same_function(model, source)


@pytest.mark.parametrize(
    ("split", "experts", "top_k"), [(2, 4, 2), (2, 8, 2), (2, 8, 4), (4, 8, 4), (4, 16, 8), (8, 8, 8)]
)
def test_narrow_experts_compute_the_dense_model(split, experts, top_k):
    source = random_model()
    model = make(source, split=split, num_experts=experts, num_experts_per_tok=top_k)
    assert model.config.expert_width == 256 // split and model.config.routed_scaling_factor == split
    assert_same_function(model, source)
    _, routings = model(torch.randn(8, 3, 8, 8), torch.rand(8), torch.zeros(8, dtype=torch.long), return_routing=True)
    for routing in routings:  # whole replicas: each one that a token has at all, it has G times
        replicas = torch.nn.functional.one_hot(routing.expert_ids // split).sum(dim=1)
        assert set(replicas.unique().tolist()) <= {0, split}


def test_slices_are_laid_out_replica_by_replica():
    source = random_model()
    model = make(source, split=2, num_experts=8, num_experts_per_tok=2)
    mlp, experts = source.blocks[1].mlp, model.blocks[1].moe.experts
    for expert in range(8):
        part = slice(0, 128) if expert % 2 == 0 else slice(128, 256)
        assert torch.equal(experts.fc1_weight[expert], mlp.fc1.weight[part])
        assert torch.equal(experts.fc1_bias[expert], mlp.fc1.bias[part])
        assert torch.equal(experts.fc2_weight[expert], mlp.fc2.weight[:, part])
        assert torch.equal(experts.fc2_bias[expert], mlp.fc2.bias / 2)
    rows = model.blocks[1].moe.gate.weight.unflatten(0, (4, 2))
    assert torch.equal(rows[:, 0], rows[:, 1]) and len(rows[:, 0].unique(dim=0)) == 4


def test_a_zero_router_may_split_where_all_experts_are_chosen():
    source = random_model()
    assert_same_function(make(source, split=2, num_experts=4, num_experts_per_tok=4, routing="scale"), source)


def test_shared_expert_adds_nothing_at_first():
    source = random_model()
    model = make(source, num_experts=4, shared_expert=True)
    assert model.config.shared_width == 128
    assert_same_function(model, source)
    model.requires_grad_(True)
    random_input = torch.randn(2, 3, 8, 8), torch.rand(2), torch.arange(2)
    model(*random_input).square().sum().backward()
    assert model.blocks[0].moe.shared_experts.down_proj.weight.grad.any()


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_shared_experts=0),
        dict(num_shared_experts=3, shared_expert_ratio=0.5, moe_layers="0,2"),
        dict(routed_scaling_factor=2.0, norm_topk_prob=True),
    ],
)
@pytest.mark.parametrize("recipe", [dict(), dict(routing="scale"), dict(split=2, num_experts_per_tok=4)])
def test_one_expert_becomes_many(kind, options, recipe):
    """The published way: the source is a mixture of one expert, which keeps its kind and its shared expert."""
    source = random_model(num_experts=1, num_experts_per_tok=1, expert_mlp=kind, **options)
    model = make(source, num_experts=8, **recipe)
    assert model.config.expert_mlp == kind and model.config.moe_indices == source.config.moe_indices
    assert_same_function(model, source)


def test_a_shared_expert_can_be_added_to_one_expert():
    source = random_model(num_experts=1, num_experts_per_tok=1, num_shared_experts=0)
    assert_same_function(make(source, num_experts=4, shared_expert=True), source)


def test_what_is_not_an_expert_is_shared_with_the_source():
    source = random_model()
    model, ours = make(source, num_experts=4, moe_layers="1"), dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert (".moe." in name) == (name not in ours or parameter.data_ptr() != ours[name].data_ptr())


def test_router_of_one_expert_per_token_learns_with_scale_alone():
    source = random_model()
    for routing, learns in (("scale", True), ("normalize", False)):
        model = make(source, num_experts=4, num_experts_per_tok=1, routing=routing).requires_grad_(True)
        model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.arange(2)).square().sum().backward()
        gradient = model.blocks[0].moe.gate.weight.grad
        assert (gradient.abs().max() > 1e-3) == learns


# ------------------------------------------------------------------------------------------------ breaking the symmetry


def test_the_seed_decides_everything():
    recipe = dict(num_experts=4, expert_noise=0.1, drop_ratio=0.5, shared_expert=True)
    source = random_model()
    one, same, other = (make(source, seed=seed, **recipe).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    differ = {name.split(".moe.")[1] for name in one if ".moe." in name and not torch.equal(one[name], other[name])}
    assert {"gate.weight", "experts.fc1_weight", "experts.fc1_bias", "experts.fc2_weight"} <= differ


@pytest.mark.parametrize("sparse", [False, True])
def test_noise_is_relative_to_each_matrix(sparse):
    source = random_model(**(dict(num_experts=1, num_experts_per_tok=1) if sparse else {}))
    for name, parameter in source.named_parameters():
        if name.endswith(("fc2.weight", "down_proj")):
            parameter.mul_(3)  # so that the matrices differ in scale
    model = make(source, num_experts=4, expert_noise=0.25)
    for before, after in zip(source.blocks, model.blocks, strict=True):
        original, experts = mlp_of(before).hidden_units(), after.moe.experts.hidden_units()
        for name, units in experts.items():
            noise = (units - original[name]) / original[name].std()  # (E, F, I)
            if name.endswith("bias"):
                assert not noise.any()
            else:
                assert noise.std(dim=(1, 2)).tolist() == pytest.approx([0.25] * 4, rel=0.05)
                assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.05
    difference = (random_outputs(model, 1.0) - random_outputs(source, 1.0)).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("split", [1, 2])
def test_dropped_units_are_the_right_share_with_the_right_statistics(ratio, split):
    source = random_model()
    for name, parameter in source.named_parameters():
        if ".mlp." in name:
            parameter.mul_(2.0).add_(0.05)  # a mean to be found again
    recipe = dict(num_experts=8, num_experts_per_tok=2, split=split)
    plain, model = make(source, **recipe), make(source, drop_ratio=ratio, **recipe)
    width = 256 // split
    for index in range(3):
        original = mlp_of(source.blocks[index]).hidden_units()
        before = plain.blocks[index].moe.experts.hidden_units()
        after = model.blocks[index].moe.experts.hidden_units()
        changed = (before["fc1"] != after["fc1"]).any(dim=2)  # (E, F)
        assert changed.sum(dim=1).tolist() == [round(ratio * width)] * 8
        if ratio < 1:
            assert len(changed.unique(dim=0)) == 8  # each expert's own choice
        for name, units in after.items():
            assert torch.equal((units != before[name]).any(dim=2), changed)  # in and out of the same units
            fresh, mean, std = units[changed], original[name].mean(), original[name].std()
            tolerance = 5 * std / fresh.numel() ** 0.5
            assert abs(fresh.mean() - mean) < tolerance and abs(fresh.std() - std) < tolerance
        assert torch.equal(model.blocks[index].moe.experts.fc2_bias, plain.blocks[index].moe.experts.fc2_bias)
    assert (random_outputs(model, 1.0) - random_outputs(source, 1.0)).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------------- the command line


def command(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *map(str, flags)])
    run(upcycle.main, upcycle.get_parser())


def save_as_flow(model: DiT, path, **dtype) -> None:
    """A published file of a network that was trained with rectified flow: its variance channels are zero."""
    model.final_layer.linear.weight.unflatten(0, (-1, 2, model.config.in_channels))[:, 1] = 0
    torch.save(families.to_published(model.to(**dtype).state_dict()), path)


def test_published_file_to_checkpoint(tmp_path, monkeypatch, capsys):
    source = random_model()
    save_as_flow(source, tmp_path / "dense.pt")
    command(monkeypatch, "--ckpt", tmp_path / "dense.pt", "--num_experts", 8, "--output", tmp_path / "a" / "moe")
    out = capsys.readouterr().out
    assert "DiT-Nano/2, dense, 4 classes" in out and "DiT-Nano/2, 8 experts, 4 classes" in out
    total, activated = models.count_parameters(make(source, num_experts=8))
    assert f"{total:,} parameters, {activated:,} activated" in out
    assert "3 of 3 blocks, 2 experts per token, gelu experts of width 256, normalize routing" in out
    assert float(out.partition("by at most ")[2].split()[0]) < 1e-6

    checkpoint.verify(tmp_path / "a" / "moe")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"moe"}
    record = read_json(tmp_path / "a" / "moe", "config")
    assert record["objective"]["name"] == "rf" and record["step"] == 0
    assert record["upcycled"]["source"] == "dense.pt" and record["upcycled"]["num_experts"] == 8
    for which in ("ema", "model"):
        weights = checkpoint.load_weights(tmp_path / "a" / "moe", which)
        model = DiT(weights.config)
        checkpoint.load_into(model, weights)
        assert_same_function(model, source)


def test_changes_are_measured_and_said(tmp_path, monkeypatch, capsys):
    save_as_flow(random_model(), tmp_path / "dense.pt")
    flags = ["--ckpt", tmp_path / "dense.pt", "--num_experts", 4, "--num_experts_per_tok", 1]
    command(monkeypatch, *flags, "--output", tmp_path / "moe", "--expert-noise", 0.1, "--drop-ratio", 0.5)
    out = capsys.readouterr().out
    before, after = out.partition("by at most ")[2].split("; with noise 0.1 and drop ratio 0.5 by ")
    assert float(before) < 1e-6 and float(after.split()[0]) > 1e-2
    assert "only the balance loss trains the router" in out


def test_half_precision_becomes_full(tmp_path, monkeypatch):
    save_as_flow(random_model(), tmp_path / "dense.pt", dtype=torch.float16)
    command(monkeypatch, "--ckpt", tmp_path / "dense.pt", "--num_experts", 4, "--output", tmp_path / "moe")
    tensors = checkpoint.read_tensors(tmp_path / "moe", "ema")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    source = random_model().half().float()
    assert torch.equal(tensors["blocks.0.moe.experts.fc1_weight"][3], source.blocks[0].mlp.fc1.weight)


def trained(images, *flags):
    """The run folder of a few steps in this process: after the first ones, no adaLN gate is zero any more."""
    results = images.parent / "results"
    argv = ["--model", "DiT-Nano/2", "--data-path", images, "--vae-path", "none", "--image-size", 8, "--num-classes", 4]
    argv += ["--rf", "--num-workers", 0, "--device", "cpu", "--global-batch-size", 8]
    argv += ["--results-dir", results, "--lr", "1e-3", "--ema-decay", 0.5, "--max-steps", 4, *flags]
    train.main(train.get_parser().parse_args(list(map(str, argv))))
    return max(results.iterdir())


@pytest.mark.parametrize("noise", [0, 0.1])
def test_a_run_of_ours_is_upcycled_sampled_and_trained(images, tmp_path, monkeypatch, noise):
    dense = trained(images, "--timestep-shift", 2)
    folder = tmp_path / "moe"
    command(monkeypatch, "--ckpt", dense, "--num_experts", 4, "--output", folder, "--expert-noise", noise)
    record = read_json(folder, "config")
    assert record["objective"]["shift"] == 2 and record["space"]["path"] == "none" and record["data"]["samples"] == 40

    flags = ["--ckpt", folder, "--output", tmp_path / "out", "--num-sampling-steps", 2, "--device", "cpu"]
    sample.main(sample.get_parser().parse_args(list(map(str, flags))))
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (4, 8, 8, 3)

    with pytest.raises(UsageError, match="it holds weights, not the state of a run; use --init-from"):
        trained(images, "--resume", folder)
    run = trained(images, "--init-from", folder, "--max-steps", 1)
    before, after = checkpoint.load_weights(folder), checkpoint.load_weights(run, "model")
    assert after.config == before.config
    for index in range(3):
        name = f"blocks.{index}.moe.experts.fc1_weight"
        moved = (after.state_dict[name] != before.state_dict[name]).flatten(1).float().mean(dim=1)
        assert (moved > 0.5).all()  # every expert got a gradient
        distance = torch.pdist(after.state_dict[name].flatten(1)).min().item()
        assert distance > (1.0 if noise else 0)  # copies part too, but by no more than a step


@pytest.fixture
def files(tmp_path) -> dict:
    paths = {name: tmp_path / f"{name}.pt" for name in ("dense", "sparse", "fresh", "one")}
    paths["exists"], paths["file"], paths["new"] = tmp_path / "exists", tmp_path / "file", tmp_path / "new"
    save_as_flow(random_model(), paths["dense"])
    torch.save(families.to_published(random_model(num_experts=4).state_dict()), paths["sparse"])
    torch.save(families.to_published(build_model("DiT-Nano/2", input_size=8).state_dict()), paths["fresh"])
    one = random_model(num_experts=1, num_experts_per_tok=1, moe_layers="1")
    torch.save(families.to_published(one.state_dict()), paths["one"])
    paths["recorded"] = tmp_path / "recorded.pt"
    save_as_flow(random_model(), paths["recorded"])
    record = {"format": 1, "model": random_model().config.to_dict(), "objective": RectifiedFlow().config()}
    (tmp_path / "recorded.json").write_text(json.dumps(record))
    paths["exists"].mkdir()
    paths["file"].write_text("not a checkpoint")
    return paths


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "sparse"], "the source has 4 experts already"),
        (["--ckpt", "file"], "file is not a (readable )?PyTorch file|refused to load"),
        (["--ckpt", "absent.pt"], "checkpoint absent.pt does not exist"),
        (["--ckpt", "exists"], "exists holds no checkpoint"),
        (["--ckpt", "fresh"], "does not tell its objective: say --rf"),
        (["--ckpt", "recorded", "--rf", "False"], "--rf False contradicts .*recorded.pt, which says rf"),
        (["--ckpt", "one", "--moe-layers", "all"], "--moe-layers all: the source's experts are in 1"),
        (["--ckpt", "one", "--shared-expert"], "the source has a shared expert already"),
        (["--num_experts", "0"], "--num_experts: expected a whole number of at least 1"),
        (["--num_experts_per_tok", "9"], "between 1 and num_experts 8, got 9"),
        (["--moe-layers", "0,3"], "moe_layers '0,3' is none of"),
        (["--split", "3"], "--num_experts 8 is not a multiple of --split 3"),
        (["--split", "4"], "--num_experts_per_tok 2 is not a multiple of --split 4"),
        (
            ["--split", "3", "--num_experts", "9", "--num_experts_per_tok", "3"],
            "--split 3 does not divide the 256 hidden",
        ),
        (["--split", "64", "--num_experts", "64", "--num_experts_per_tok", "64"], "= 4 must be a multiple of 8"),
        (["--split", "2", "--routing", "scale"], "--split 2 needs a router that tells replicas apart"),
        (["--split", "2", "--router-init-std", "0"], "--split 2 needs a router that tells replicas apart"),
        (["--routing", "scale", "--router-init-std", "0.1"], "--router-init-std 0.1 with --routing scale"),
        (["--routing", "softmax"], "--routing: invalid choice: 'softmax'"),
        (["--router-init-std", "-1"], "--router-init-std: expected a number from 0"),
        (["--expert-noise", "-0.1"], "--expert-noise: expected a number from 0"),
        (["--drop-ratio", "1.5"], "--drop-ratio: expected a number from 0 to 1, got '1.5'"),
        (["--num-heads", "7"], "hidden_size 64 must be a multiple of num_heads 7"),
        (["--output", "exists"], "exists; name another folder"),
        (["--output", "moe.safetensors"], "a folder is written.*use --output moe$"),
        (["--output", "file/moe"], "cannot be written: .*file is no writable folder"),
    ],
)
def test_wrong_input_gets_one_line_and_leaves_nothing(files, tmp_path, monkeypatch, capsys, flags, message):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    flags = [str(files.get(flag, flag)) for flag in flags]
    defaults = {"--ckpt": files["dense"], "--num_experts": 8, "--output": files["new"]}
    flags += [part for flag, value in defaults.items() if flag not in flags for part in (flag, value)]
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, *flags)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("upcycle.py: error: ") and re.search(message, line), line
    assert captured.out == "" and sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_said_and_leaves_nothing(files, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SystemExit):
        command(monkeypatch, "--ckpt", files["dense"], "--num_experts", 4, "--output", files["new"])
    assert "new cannot be written: No space left on device" in capsys.readouterr().err
    assert not files["new"].exists() and not list(files["new"].parent.glob(".unfinished*"))


def test_wrong_routing_is_named():
    with pytest.raises(UsageError, match="unknown routing 'divide'"):
        Recipe(8, routing="divide")


def test_as_a_process(files):
    result = script("upcycle.py", "--ckpt", files["dense"], "--num_experts", 4, "--output", files["new"])
    assert "written" in result.stdout and checkpoint.is_checkpoint(files["new"])
    again = script("upcycle.py", "--ckpt", files["dense"], "--num_experts", 4, "--output", files["new"], check=2)
    assert "Traceback" not in again.stderr
    assert again.stderr.strip().splitlines()[-1].startswith("upcycle.py: error: --output")


def test_replicate_is_what_narrow_experts_of_one_replica_sum_to():
    """The slices of an MLP sum to it: the claim that `split` rests on, without a router."""
    for kind, experts in EXPERTS.items():
        torch.manual_seed(0)
        whole, slices = experts(16, 32, 1), experts(16, 8, 4)
        for parameter in whole.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        replicate(whole, slices)
        x = torch.randn(5, 16)
        offsets = torch.tensor([5, 10, 15, 20], dtype=torch.int32)
        parts = slices(x.repeat(4, 1), offsets).unflatten(0, (4, 5)).sum(dim=0)
        torch.testing.assert_close(parts, whole(x, offsets[:1]), msg=lambda m, kind=kind: f"{kind}: {m}")
