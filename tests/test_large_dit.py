"""Large-DiT against the public code: outputs, guidance, gradients, folders; and the same scripts for it."""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Golden, read_json, script, traces_fp32
from test_extract_features import save_autoencoder
from test_training import metrics

import checkpoint
import families
import large_dit
import weights as tool
from cli import UsageError
from configuration import build_config, infer_config
from diffusion import classifier_free_guidance
from files import digest, digest_of
from models import DiT, count_parameters
from routers import load_balancing_loss

GOLDEN = Path(__file__).parent / "golden"


def tiny(**options):
    """The golden models' shape: 2 layers of width 32, 4 heads, 4 x 8 x 8 latents, 10 classes."""
    fields = {"depth": 2, "hidden_size": 32, "num_heads": 4, "condition_width": 32, "mlp_multiple": 16}
    return build_config("Large-DiT-600M/2", **(fields | {"input_size": 8, "num_classes": 10} | options))


def randomized(model: DiT) -> DiT:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1) * 0.5)
    return model.eval()


def inputs(config, batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, config.input_size, config.input_size, generator=generator)
    return x, torch.linspace(0, 999, batch), torch.arange(batch) % config.num_classes


# -------------------------------------------------------------------------------------------------------- the function


def test_golden_outputs_guidance_and_gradients():
    golden = Golden("large_dit")
    model = DiT(tiny(qk_norm=True))
    model.load_state_dict(golden.part("model."))
    x, t, y = golden["in.x"], golden["in.t"], golden["in.y"]
    torch.testing.assert_close(model.eval()(x, t, y), golden["out.eval"], rtol=0, atol=1e-5)

    half = len(x) // 2
    denoise = classifier_free_guidance(
        lambda x, _, y: model(x, t[:half].repeat(2), y), y[:half], model.config.null_class, 2.5, 3, time_scale=1000.0
    )
    expected = golden["out.cfg"]  # both halves guided alike, the rest of each its own
    torch.testing.assert_close(denoise(x[:half], 0.0), expected[:half], rtol=0, atol=1e-5)

    out = model.train()(x, t, y)
    torch.testing.assert_close(out, golden["out.train"], rtol=0, atol=1e-5)
    (out * golden["in.out_weight"]).mean().backward()
    gradients = families.to_published({n: p.grad for n, p in model.named_parameters()}, config=model.config)
    expected = golden.part("grad.")
    assert gradients.keys() == expected.keys()
    for name, reference in expected.items():
        error = (gradients[name] - reference).abs().max()
        if not name.endswith("k_norm.bias"):  # it moves no softmax: all rounding, without rotations
            assert error <= 2e-5 * reference.abs().max(), name


@pytest.mark.parametrize(
    ("size", "plain", "normed"),
    [
        ("600M", 609_738_272, 609_836_576),
        ("3B", 4_237_430_816, 4_237_824_032),
        ("7B", 7_293_295_648, 7_293_819_936),
    ],
)
def test_published_sizes(size, plain, normed):
    for name in (f"Large-DiT-{size}/2", f"DiT_Llama_{size}_patch2"):
        with torch.device("meta"):
            counts = [count_parameters(DiT(build_config(name, qk_norm=qk_norm)))[0] for qk_norm in (False, True)]
        assert counts == [plain, normed]


def test_experts_are_its_feed_forward():
    for size, width in (("600M", 4096), ("3B", 8192), ("7B", 11008)):
        config = build_config(f"Large-DiT-{size}/2", num_experts=8)
        assert config.expert_width == config.mlp_width == width
    assert build_config("Large-DiT-3B/2", num_experts=8, expert_ratio=1.0).expert_width == 3072
    assert build_config("DiT-XL/2", num_experts=8).expert_width == 4 * 1152


def naive_rotation(x, rotation):
    """(N, T, h, d) by complex numbers, as the public code has it."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(rotation.contiguous())[:, None]).flatten(-2)


def test_rotary_positions():
    from layers import rotary_1d, rotary_2d, rotate

    x = torch.randn(2, 16, 3, 8)
    for table in (rotary_1d(4, 8, x.device), rotary_2d(4, 8, x.device)):
        assert table.shape == (16, 4, 2)
        torch.testing.assert_close(rotate(x, table), naive_rotation(x, table))
        torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    line = rotary_1d(4, 8, x.device)
    assert torch.allclose(
        line[5, 1],
        torch.tensor([5 / 10.0]).cos().repeat(2) * 0
        + torch.stack([torch.tensor(5 / 10.0).cos(), torch.tensor(5 / 10.0).sin()]),
    )
    plane = rotary_2d(4, 8, x.device)
    rows, columns = plane[:, :2].unflatten(0, (4, 4)), plane[:, 2:].unflatten(0, (4, 4))
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
    # What attention sees is the distance: q and k turned by 3 and 1, or by 2 and 0, meet at the same angle.
    q, k = torch.randn(1, 1, 1, 8).expand(1, 16, 1, 8), torch.randn(1, 1, 1, 8).expand(1, 16, 1, 8)
    q, k = rotate(q, line)[0, :, 0], rotate(k, line)[0, :, 0]
    torch.testing.assert_close(q[3] @ k[1], q[2] @ k[0])


OPTIONS = [
    dict(norm="rms"),
    dict(positions="rope", qk_norm="full"),
    dict(positions="rope2d", qk_norm="head"),
    dict(mlp="swiglu", attention_bias=False),
    dict(num_kv_heads=2, qk_norm="full"),
    dict(num_kv_heads=1, qk_norm="head", positions="rope"),
    dict(condition_width=16, norm="rms", positions="rope2d", mlp="swiglu"),
]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_part_with_and_without_experts(options, experts):
    """Trains, in bf16 too; names, counts and configuration survive a file."""
    config = build_config("DiT-Nano/2", input_size=8, num_classes=10, num_experts=experts, **options)
    model = randomized(DiT(config))
    batch = inputs(config)
    out, routings = model(*batch, return_routing=True)
    loss = out.square().mean() + (load_balancing_loss(routings).sum() if routings else 0)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for n, p in model.named_parameters()
        if not n.endswith(("k_norm.bias", "y_embedder.embedding_table.weight"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        close = model(*batch)
    assert (close.float() - out).abs().mean() < 0.05 * out.abs().mean()
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unseen = {name: getattr(config, name) for name in ("positions", "mlp_ratio", "mlp_multiple", "mlp")}
    assert infer_config(shapes, **({"input_size": 8} | unseen)) == config


def test_fewer_keys_are_the_same_keys_for_several_heads():
    narrow = randomized(DiT(tiny(num_kv_heads=2)))
    wide = DiT(tiny())
    state = narrow.state_dict()
    for name, tensor in state.items():
        if name.endswith("qkv.weight"):
            q, k, v = tensor.split([32, 16, 16])
            k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
            state[name] = torch.cat([q, k, v])
    wide.load_state_dict(state)
    torch.testing.assert_close(wide.eval()(*inputs(wide.config)), narrow(*inputs(wide.config)), rtol=1e-5, atol=1e-6)


def test_the_modulated_rms_norm_against_plain_autograd():
    from kernels import AdaptiveRMSNorm

    x, weight, shift, scale = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 8), (8,), (3, 8), (3, 8))
    )

    def plain(x, weight, shift, scale):
        normed = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight
        return normed * (1 + scale[:, None]) + shift[:, None]

    arguments = [each.detach().float().requires_grad_() for each in (x, weight, shift, scale)]
    out, expected = AdaptiveRMSNorm.apply(*arguments, torch.float32), plain(x, weight, shift, scale)
    torch.testing.assert_close(out, expected.float())
    direction = torch.randn_like(expected)
    expected.backward(direction)
    out.backward(direction.float())
    for ours, theirs in zip(arguments, (x, weight, shift, scale), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(input_size=130, positions="rope"), "4096 positions, an input of 130x130 in patches of 2 has 4225"),
        (dict(num_kv_heads=3), "num_kv_heads 3 must divide num_heads 4"),
        (dict(norm="batch"), "unknown norm 'batch'"),
        (dict(qk_norm="half"), "unknown qk_norm 'half'"),
        (dict(hidden_size=24, num_heads=4, positions="rope2d"), "heads of 6 cannot be cut into pairs"),
    ],
)
def test_wrong_parts_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        build_config("DiT-Nano/2", **options)


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def heads(monkeypatch):
    """The golden folders' model is in no table."""
    monkeypatch.setitem(large_dit.ROWS, "DiT_Llama_Tiny_patch2", large_dit.COMMON | {"num_heads": 4})


def folder(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def evaluated(weights: checkpoint.Weights) -> DiT:
    return weights.build().eval()


@pytest.mark.parametrize("name", ["large_dit_ckpt_1way", "large_dit_ckpt_2way"])
@pytest.mark.parametrize("which", ["model", "ema"])
def test_published_folders(heads, name, which):
    expected = Golden(f"{name}.expected")
    weights = checkpoint.load_weights(GOLDEN / name, which)
    assert weights.record["space"] == {"path": "ema"} and weights.record["image_size"] == 64
    assert weights.objective == {"name": "ddpm"}
    out = evaluated(weights)(expected["in.x"], expected["in.t"], expected["in.y"])
    reference = expected["out.eval" if which == "model" else "out.ema_eval"]
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-5 * reference.abs().max().item())


def test_split_qk_norm_is_refused(heads):
    with pytest.raises(UsageError, match="split over 2 processes and has QK-norm"):
        checkpoint.load_weights(GOLDEN / "large_dit_ckpt_2way_qknorm")


def spoil(path: Path, change) -> None:
    loaded = {name: tensor.clone() for name, tensor in checkpoint.load_pickle(path).items()}  # off the file
    change(loaded)
    torch.save(loaded, path)


def test_what_is_wrong_with_a_folder_is_said(heads, tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(UsageError) as error:
            evaluated(checkpoint.load_weights(path, "model"))
        return str(error.value)

    two = folder(tmp_path, "large_dit_ckpt_2way")
    spoil(two / "consolidated.01-of-02.pth", lambda s: s.update({"layers.0.attention.wo.weight": torch.zeros(32, 9)}))
    assert "layers.0.attention.wo.weight is (32, 9), in consolidated.00-of-02.pth (32, 16)" in refused(two)
    spoil(two / "consolidated.01-of-02.pth", lambda s: s.pop("layers.0.attention.wo.weight"))
    assert "consolidated.01-of-02.pth lacks layers.0.attention.wo.weight" in refused(two)
    (two / "consolidated.01-of-02.pth").unlink()
    assert "lacks consolidated.01-of-02.pth: 1 of 2 parts are there" in refused(two)

    one = folder(tmp_path, "large_dit_ckpt_1way")
    (one / "model_args.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model_args.pth is a Git-LFS pointer" in refused(one)
    torch.save(Path("evil"), one / "model_args.pth")
    assert "refused to load" in refused(one) and "only tensors and argparse.Namespace" in refused(one)
    torch.save({"model": "x"}, one / "model_args.pth")
    assert "holds a dict, not a Namespace" in refused(one)
    for path in one.glob("consolidated*"):
        path.unlink()
    assert "no consolidated.00-of-01.pth: download the weights too" in refused(one)


def test_a_run_folder_gives_its_newest_whole_checkpoint(heads, tmp_path):
    checkpoints = tmp_path / "results" / "checkpoints"
    for number in ("0000010", "0000020", "0000100"):
        shutil.copytree(GOLDEN / "large_dit_ckpt_2way", checkpoints / number)
    (checkpoints / "0000100" / "model_args.pth").unlink()  # it is written last
    (checkpoints / "0000020" / "consolidated_ema.01-of-02.pth").unlink()
    weights = checkpoint.load_weights(tmp_path / "results", "model")
    assert weights.source.parent.name == "0000020"
    only_ema = folder(tmp_path, "large_dit_ckpt_1way")
    (only_ema / "consolidated.00-of-01.pth").unlink()
    assert checkpoint.load_weights(only_ema, "model").source.name == "consolidated_ema.00-of-01.pth"


@pytest.mark.parametrize("experts", [0, 4])
def test_names_round_trip(experts):
    model = randomized(DiT(tiny(qk_norm=True, num_kv_heads=2, num_experts=experts)))
    published = families.to_published(model.state_dict(), config=model.config)
    assert all(name.startswith(("layers.", "x_embedder.", "t_", "y_", "final_")) for name in published)
    assert "x_embedder.weight" in published and published["layers.0.attention.wk.weight"].shape == (16, 32)
    again = families.from_published(published)
    state = model.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


# ------------------------------------------------------------------------------------------------- by the same scripts

NANO = ["--model", "DiT_Llama_Nano_patch2", "--vae", "none", "--image_size", 8, "--num_classes", 4, "--flip", "False"]
NANO += ["--num_workers", 0, "--device", "cpu", "--log_every", 1, "--global_batch_size", 8, "--lr", 1e-3]
PUBLISHED = ["--micro_batch_size", 2, "--precision", "fp32", "--grad_precision", "fp32", "--wd", 0.1, "--qk_norm"]
PUBLISHED += ["--no_auto_resume", "--master_port", 18181, "--model_parallel_size", 1, "--ckpt_every", 2]


def train(images: Path, results: str, *flags, processes: int = 1, name: str = "train.py") -> Path:
    where = ["--data_path", images, "--results_dir", images.parent / results]
    script(name, *where, *NANO, *flags, processes=processes)
    return max((images.parent / results).iterdir())


@pytest.mark.slow
def test_published_commands_train_everywhere_alike(images):
    """One process, two sharded ones, ZeRO-3: one curve; then resumed, drawn, exported and measured."""
    one = train(images, "one", *PUBLISHED, "--max_steps", 4)
    sharded = train(images, "two", *PUBLISHED, "--max_steps", 2, "--data_parallel", "fsdp", processes=2)
    train(images, "two", *PUBLISHED, "--max_steps", 4, "--resume", sharded, "--data_parallel", "sdp", processes=2)
    zero = Path(__file__).parent.parent / "config" / "zero3.json"
    zero = ["--deepspeed_config", zero, "--max_steps", 4]
    deepspeed = train(images, "zero", *PUBLISHED, *zero, processes=2, name="train_deepspeed.py")
    curves = [[line["loss"] for line in metrics(run)] for run in (one, sharded, deepspeed)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5) and curves[2] == pytest.approx(curves[0], rel=1e-5)
    state = read_json(one / "checkpoints" / "0000004", "state")
    assert (state["flags"]["grad_clip"], state["flags"]["accum_iter"], state["flags"]["qk_norm"]) == (2.0, 4, "full")

    exported = images.parent / "large.pt"
    script("weights.py", "export", one, "--output", exported)
    assert "layers.2.attention.wk.weight" in torch.load(exported)["ema"]
    drawn = []
    for ckpt in (one, exported):
        path = images.parent / f"{ckpt.stem}.png"
        flags = ["--num_gpus", 1, "--cfg_scale", 2, "--class_labels", 1, 3, "--num_sampling_steps", 3]
        script("sample.py", "--ckpt", ckpt, *flags, "--precision", "tf32", "--image_save_path", path, "--device", "cpu")
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_mixtures_of_it_and_of_its_parts(images):
    """What nobody has: Large-DiT with experts, over processes; DiT-MoE with its positions and norms; upcycled."""
    experts = ["--num_experts", 4, "--max_steps", 2, "--precision", "fp32"]
    one = train(images, "one", *experts)
    over = ["--data_parallel", "fsdp", "--expert_parallel", 2]
    two = train(images, "two", *experts, *over, processes=2)
    curves = [[line[key] for line in metrics(run) for key in ("loss", "balance_loss")] for run in (one, two)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)

    parts = ["--norm", "rms", "--positions", "rope2d", "--qk-norm", "head", "--num-kv-heads", 2]
    mixed = train(images, "mixed", *experts, *parts, "--model", "DiT-Nano/2")
    model = read_json(mixed / "checkpoints" / "0000002", "config")["model"]
    assert [model[key] for key in ("norm", "positions", "qk_norm", "num_kv_heads", "mlp")] == [
        *("rms", "rope2d", "head", 2, "gelu")
    ]
    result = script(
        *("train.py", "--data_path", images, "--results_dir", images.parent / "mixed", *NANO, *experts),
        *("--model", "DiT-Nano/2", "--init-from", mixed, "--norm", "layer"),
        check=2,
    )
    assert "--norm layer contradicts" in result.stderr and "which has norm rms" in result.stderr

    dense = train(images, "dense", "--max_steps", 1)
    upcycled = images.parent / "upcycled"
    result = script("upcycle.py", "--ckpt", dense, "--num_experts", 4, "--output", upcycled)
    differ = float(re.search(r"differ from the source's by at most (\S+)", result.stdout)[1])
    assert differ < 1e-6 and read_json(upcycled, "config")["model"]["expert_mlp"] == "swiglu"


def test_flags_that_made_sense_elsewhere(images):
    def refused(*flags) -> str:
        result = script(
            "train.py", "--data_path", images, "--results_dir", images.parent / "no", *NANO, *flags, check=2
        )
        assert not (images.parent / "no").exists() and "Traceback" not in result.stderr
        return result.stderr

    assert "only 1 is possible here (use --data-parallel fsdp), got '2'" in refused("--model_parallel_size", 2)
    assert "only fp32 is possible here" in refused("--grad_precision", "bf16")
    assert "--micro-batch-size 3 on 1 processes does not make a batch of 8" in refused("--micro_batch_size", 3)
    assert "4096 positions, an input of 192x192" in refused("--image_size", 192)
    missing = refused("--vae", "ema", "--local_diffusers_model_root", images)
    assert f"{images}/stabilityai/sd-vae-ft-ema" in missing


@pytest.mark.slow
@traces_fp32
@pytest.mark.parametrize("experts", [0, 4])
def test_compiled_without_a_break(experts):
    """All of a block in one graph, forward and backward, rotations and norms included."""
    options = {"num_experts": experts, "num_kv_heads": 2, "qk_norm": "full", "positions": "rope2d"}
    config = build_config("Large-DiT-Nano/2", input_size=8, num_classes=10, **options)
    plain, compiled = randomized(DiT(config)), randomized(DiT(config))
    compiled.compile_blocks(fullgraph=True)
    batch = inputs(config)
    outs = [model(*batch) for model in (plain, compiled)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    for out in outs:
        out.square().mean().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp(min=1e-3)
        assert (ours.grad - theirs.grad).abs().max() < 1e-3 * scale, name


def test_runs_of_before_resume(images):
    """A checkpoint whose record knows none of the new fields, and QK-norm as true or false."""
    flags = ["--max_steps", 1, "--qk-norm", "True", "--num_experts", 4, "--model", "DiT-Nano/2"]
    run = train(images, "old", *flags)
    saved = run / "checkpoints" / "0000001"
    config, state = read_json(saved, "config"), read_json(saved, "state")
    new = ("condition_width", "norm", "positions", "num_kv_heads", "attention_bias", "mlp", "mlp_multiple")
    config["model"] = {k: v for k, v in config["model"].items() if k not in new} | {"qk_norm": True}
    state["flags"] = {k: v for k, v in state["flags"].items() if k not in new} | {"qk_norm": True}
    for stem, record in (("config", config), ("state", state)):
        (saved / f"{stem}.json").write_text(json.dumps(record))
    manifest = read_json(saved, "manifest")
    manifest["files"] |= {name: digest(saved / name) for name in ("config.json", "state.json")}
    manifest["sha256"] = digest_of({"format": 1, "files": manifest["files"]})
    (saved / "manifest.json").write_text(json.dumps(manifest))
    train(images, "old", *flags, "--max_steps", 3, "--resume", run)
    whole = train(images, "whole", *flags, "--max_steps", 3)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole)]


def test_folders_are_written_as_they_are_read(tmp_path):
    model = randomized(DiT(build_config("Large-DiT-Nano/2", input_size=8, num_classes=10, qk_norm=True)))
    record = {"objective": {"name": "ddpm"}, "space": {"path": "mse"}, "image_size": 64}
    state = model.state_dict()
    tool.export(checkpoint.Weights(state, state, model.config, record, tmp_path), tmp_path / "folder", None, None)
    assert vars(checkpoint.load_pickle(tmp_path / "folder" / "model_args.pth", argparse.Namespace)) == {
        **{"model": "DiT_Llama_Nano_patch2", "image_size": 64, "num_classes": 10, "qk_norm": True, "vae": "mse"},
        "model_parallel_size": 1,
    }
    weights = checkpoint.load_weights(tmp_path / "folder")
    assert weights.config == model.config and weights.record["space"] == {"path": "mse"}
    torch.testing.assert_close(evaluated(weights)(*inputs(model.config)), model(*inputs(model.config)))
    assert checkpoint.describe(model.config).startswith("Large-DiT-Nano/2, dense")


def test_folders_that_the_public_code_could_not_use_are_refused(tmp_path):
    for options, record, message in (
        ({"num_experts": 4}, None, "know no experts"),
        ({"depth": 5}, None, "know no model of this size"),
        ({"in_channels": 3}, None, "know no latents but"),
        ({}, {"objective": {"name": "rf"}}, "know no rectified flow"),
    ):
        model = DiT(build_config("Large-DiT-Nano/2", input_size=8, **options))
        held = checkpoint.Weights(model.state_dict(), model.state_dict(), model.config, record, tmp_path)
        with pytest.raises(UsageError, match=message):
            tool.export(held, tmp_path / "folder", None, None)
        assert not list(tmp_path.iterdir())


def test_folders_given_to_other_commands(images, heads):
    folder, up = GOLDEN / "large_dit_ckpt_1way", images.parent / "up"
    result = script("upcycle.py", "--ckpt", folder, "--num_experts", 4, "--output", up)
    differ = float(re.search(r"differ from the source's by at most (\S+)", result.stdout)[1])
    assert differ < 1e-5 and read_json(up, "config")["space"] == {"path": "ema"}
    lines = script("weights.py", "inspect", folder).stdout
    assert "53,024 in total" in lines and "objective    ddpm" in lines
    result = script("train.py", "--resume", folder, "--data-path", images, *NANO, check=2)
    assert f"it holds published weights; --init-from {folder} starts from them" in result.stderr

    start = ["--init-from", folder, "--fresh-parts", "--max_steps", 1, "--data_path", images]
    start += [flag for i, flag in enumerate(NANO[2:]) if "--num_classes" not in NANO[2:][max(0, i - 1) : i + 1]]
    script("train.py", *start, "--results_dir", images.parent / "tuned")
    (run,) = (images.parent / "tuned").iterdir()
    model = read_json(run / "checkpoints" / "0000001", "config")["model"]
    assert (model["norm"], model["num_heads"], model["in_channels"], model["num_classes"]) == ("rms", 4, 3, 4)


def test_folders_are_sampled_by_both_samplers(tmp_path, heads):
    """With an autoencoder where the public code keeps it: `--local_diffusers_model_root`, and `ema` by the folder."""
    save_autoencoder(tmp_path / "stabilityai" / "sd-vae-ft-ema")
    common = ["--ckpt", GOLDEN / "large_dit_ckpt_2way", "--local_diffusers_model_root", tmp_path, "--device", "cpu"]
    common += ["--num_sampling_steps", 3, "--cfg_scale", 4.0, "--seed", 1]
    script("sample.py", *common, "--no_ema", "--class_labels", 1, 7, "--image_save_path", tmp_path / "model.png")
    script("sample.py", *common, "--ema", "--class_labels", 1, 7, "--image_save_path", tmp_path / "ema.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("model", "ema")]
    assert pictures[0] != pictures[1]
    script(
        "sample_ddp.py", *common, "--num-fid-samples", 6, "--sample-dir", tmp_path / "set", "--per-proc-batch-size", 4
    )
    (archive,) = (tmp_path / "set").rglob("samples.npz")
    with np.load(archive) as file:
        assert len(file["arr_0"]) == 6 and file["labels"].max() < 10
