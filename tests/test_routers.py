"""Every router of the field: against its public code, against a loop over tokens, and by the same scripts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Golden, read_json, script, traces_fp32
from test_training import assert_same_state

import checkpoint
import families
import weights as tool
from analysis.routing import RoutingData
from configuration import DiTConfig, build_config, infer_config, row_name
from models import DiT, count_parameters
from moe import ExpertsConfig, MoE
from routers import ROUTERS, RouterConfig, Where

SMALL = dict(depth=2, hidden_size=32, num_heads=2, input_size=8, patch_size=2, moe_layers="1", num_experts=4)
OF_PROMOE = dict(
    num_experts_per_tok=1,
    expert_ratio=2.0,
    expert_mlp="gelu",
    num_shared_experts=1,
    shared_expert_ratio=2.0,
    shared_mlp="gelu",
)
OF_DIFFMOE = dict(num_experts_per_tok=1, expert_ratio=4.0, expert_mlp="gelu", num_shared_experts=0)
PUBLIC = {  # golden file: fields of the model
    "router_promoe_tc": OF_PROMOE | {"router": "prototypes"},
    "router_promoe_ec": OF_PROMOE | {"router": "prototypes-expert-choice"},
    "router_ecdit": OF_DIFFMOE | {"router": "expert-choice"},
    "router_diffmoe": OF_DIFFMOE | {"router": "batch-pool"},
    "router_dsmoe": dict(
        router="sigmoid",
        router_bias=True,
        router_groups=2,
        router_kept_groups=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        num_experts_per_tok=2,
        expert_ratio=2.0,
        num_shared_experts=1,
        shared_expert_ratio=2.0,
        positions="rope2d-half",
        mlp="silu",
    ),
}


def load(name: str) -> tuple[Golden, DiT]:
    golden = Golden(name)
    model = DiT(DiTConfig(**SMALL, **PUBLIC[name]))
    model.load_state_dict(golden.part("model."))
    return golden, model


@pytest.mark.parametrize("name", PUBLIC)
def test_outputs_losses_and_gradients_are_those_of_the_public_code(name):
    golden, model = load(name)
    inputs = [golden[f"in.{key}"] for key in ("x", "t", "y")]
    gate = model.blocks[1].moe.gate
    if name == "router_diffmoe":
        gate.published_pool = True
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs), golden["out.eval"], rtol=0, atol=1e-5)
        alone = model(*(each[:1] for each in inputs))
        torch.testing.assert_close(alone, golden["out.eval_first_alone"], rtol=0, atol=1e-5)
    out, (routing,) = model.train()(*inputs, return_routing=True)
    torch.testing.assert_close(out, golden["out.train"], rtol=0, atol=1e-5)
    loss = (out * golden["in.out_weight"]).mean()
    for key, value in routing.losses.items():
        assert value.item() == pytest.approx(golden[f"train.{key}_loss"].item(), rel=1e-5)
        loss = loss + value
    loss.backward()
    named = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    gradients = families.to_published(named, config=model.config)
    for key, expected in golden.part("grad.").items():
        found = gradients.get(key, torch.zeros_like(expected))
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-9, key
    after = golden.part("after.")
    if after:
        gate.after_step(routing.tokens_per_expert, routing.observed)
        torch.testing.assert_close(gate.expert_threshold, after["blocks.1.mlp.expert_threshold"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PUBLIC)
def test_published_names_are_read_and_written(name):
    golden, model = load(name)
    theirs = golden.part("model.")
    family = families.family_of(theirs)
    assert families.family_for(model.config) is family
    written = families.to_published(model.state_dict(), config=model.config)
    assert written.keys() == theirs.keys() and all(torch.equal(written[key], theirs[key]) for key in theirs)
    shapes = {key: tuple(value.shape) for key, value in families.from_published(theirs).items()}
    known = families.known_of(theirs) | {"num_heads": 2, "input_size": 8, "router": model.config.router}
    assert infer_config(shapes, **known).to_dict() == model.config.to_dict()


PUBLISHED = {  # row: millions of parameters that a token uses, as its authors say; and of all, counted by hand below
    **{"DSMoE-S/2": 33, "DSMoE-B/2": 132, "DSMoE-L/2": 465, "DSMoE-3B/2": 965, "DiffMoE-S/2": 32},
    **{"DiffMoE-B/2": 130, "DiffMoE-L/2": 458, "DiffMoE-XL/2": None, "EC-DiT-L/2": None},
    **{"ProMoE-S/2": None, "ProMoE-B/2": None, "ProMoE-L/2": None, "ProMoE-XL/2": None},
}


def by_hand(c: DiTConfig) -> int:
    """From the configuration: embeddings, attention, modulations, dense and sparse feed-forwards, routers."""
    D, half = c.hidden_size, c.depth // 2
    ends = 16 * D + D + 256 * D + D + D * D + D + 1001 * D + 2 * (D * D + D) + 32 * D + 32
    ends += 256 * D if c.positions == "sincos" else 0  # the table
    block = 4 * (D * D + D) + 6 * (D * D + D)
    dense = 8 * D * D + 5 * D

    def perceptron(width: int, kind: str) -> int:
        return 3 * D * width if kind == "swiglu" else 2 * D * width + width + D

    sparse = c.expert_count * perceptron(c.expert_width, c.expert_mlp) + c.num_experts * D
    sparse += perceptron(c.shared_width, c.shared_mlp) if c.num_shared_experts else 0
    sparse += c.num_experts if c.router_bias else 0
    if c.router == "batch-pool":
        sparse += D * D + D + c.num_experts * D + c.num_experts + c.num_experts + 1
    return ends + c.depth * block + (c.depth - half) * dense + half * sparse


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_sizes(row):
    with torch.device("meta"):
        model = DiT(build_config(row))
    total, activated = count_parameters(model)
    assert total == by_hand(model.config)
    if PUBLISHED[row] is not None:
        assert 0 <= activated / 1e6 / PUBLISHED[row] - 1 < 0.07  # they leave something out: labels, the predictor


def options(kind: str, **more) -> dict:
    return SMALL | dict(router=kind, num_experts_per_tok=2, expert_ratio=1.0, moe_layers="all") | more


def randomized(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("kind", ROUTERS)
def test_an_image_does_not_depend_on_the_others(kind):
    model = randomized(DiTConfig(**options(kind))).eval()
    x, t, y = torch.randn(32, 4, 8, 8), torch.linspace(0, 999, 32), torch.arange(32) % 11 * 100
    with torch.no_grad():
        together, alone = (
            model(x, t, y),
            torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(32)]),
        )
    assert 1000 in y  # of nothing
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_fast_path_is_the_sum_over_chosen_experts(kind, training):
    """Outputs and every gradient, of all experts by their dense weights."""
    moe = randomized(DiTConfig(**options(kind))).blocks[0].moe.train(training)
    x, null = torch.randn(4, 16, 32, requires_grad=True), torch.tensor([False, True, False, False])
    out, routing = moe(x, null)
    assert routing.chosen.sum() == (routing.dense_weights != 0).sum()
    assert torch.equal(routing.chosen.sum(dim=0) <= routing.tokens_per_expert, torch.ones(moe_count(moe)).bool())
    assert torch.allclose(routing.probs.sum(dim=1), torch.ones(64))
    tokens = x.flatten(0, 1)
    each = []
    for expert in range(moe_count(moe)):
        ends = torch.zeros(moe_count(moe), dtype=torch.int32)
        ends[expert:] = len(tokens)
        each.append(moe.experts(tokens, ends))
    dense = (torch.stack(each, dim=1) * routing.dense_weights.unsqueeze(-1)).sum(dim=1)
    expected = moe.shared_experts(tokens, dense).view(x.shape)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    parameters = [x, *(p for name, p in moe.named_parameters() if "capacity" not in name)]
    weight = torch.randn(out.shape)
    ours, theirs = (torch.autograd.grad((o * weight).sum(), parameters, retain_graph=True) for o in (out, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def moe_count(moe) -> int:
    return moe.gate.config.experts + moe.gate.extra_experts


# -------------------------------------------------------------------------------------------------- by the same scripts

NANO = ["--model", "DiT-Nano/2", "--depth", 2, "--num_experts", 4, "--expert-ratio", 1, "--moe-layers", "every-2"]
NANO += ["--vae-path", "none", "--image-size", 8, "--num-classes", 4, "--flip", "False", "--num-workers", 0]
NANO += ["--device", "cpu", "--log-every", 1, "--global-batch-size", 8, "--lr", 1e-2, "--rf", "--time-scale", 1000]


def train(images, name: str, *flags, script_name: str = "train.py", **options) -> Path:
    where = ["--data-path", images, "--results-dir", images.parent / name]
    script(script_name, *where, *NANO, *flags, **options)
    return next((images.parent / name).iterdir())


def logged(run, *names) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names if name in line] for line in lines]


def test_every_router_trains_resumes_and_is_sampled(images):
    """To the bit after a resume, buffers included; prototypes and pools tell their own losses."""
    for kind in ("sigmoid", "batch-pool", "prototypes-expert-choice"):  # those with buffers, and with bags
        flags = ["--router", kind, "--ckpt-every", 2]
        flags += ["--balance", "aux", "z", "bias", "--router-groups", 2] if kind == "sigmoid" else []
        whole = train(images, f"{kind}-whole", *flags, "--max-steps", 4)
        copy = images.parent / kind / "000-copy" / "checkpoints"
        copy.mkdir(parents=True)
        (copy / "0000002").symlink_to(whole / "checkpoints" / "0000002")
        resumed = train(images, kind, *flags, "--max-steps", 4, "--resume", copy.parent)
        assert_same_state(whole, resumed)
        found = {name for line in logged(whole) for name in line} | set(
            json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
        )
        own = {"batch-pool": "capacity_loss", "sigmoid": "z_loss"}.get(kind, "balance_loss")
        assert ("contrastive_loss" if kind.startswith("prototypes") else own) in found
        draw = ["sample.py", "--ckpt", whole, "--num-sampling-steps", 2, "--class-labels", 1, 2, "--cfg-scale", 2]
        script(*draw, "--device", "cpu", "--output", images.parent / f"{kind}-half", "--precision", "bf16")
        if kind == "batch-pool":
            tensors = checkpoint.read_tensors(whole / "checkpoints" / "0000004", "model")
            assert tensors["blocks.1.moe.gate.expert_threshold"].any()


CONFIG = Path(__file__).parent.parent / "config" / "zero2.json"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "prototypes-expert-choice"])  # a table and bags
def test_one_curve_by_every_engine(kind, images):
    """Experts over two processes; ZeRO-2; micro-batches; blocks computed again. The bias follows the tokens of all.

    The contrastive loss is of the tokens of a process, as published: there a curve begins alike, and stays near.
    """
    flags = ["--router", kind, "--max-steps", 3]
    flags += ["--balance", "bias", "sequence", "--router-groups", 2] if kind == "sigmoid" else []
    half = ["--precision", "bf16", "--deepspeed_config", CONFIG, "--max-steps", 1]
    train(images, "half", *flags, *half, script_name="train_deepspeed.py")
    dealt_over, tolerance = (1, 0.02) if kind.startswith("prototypes") else (2, 1e-4)
    one = train(images, "one", *flags, "--activation-checkpointing", "--accum_iter", 2 if kind == "sigmoid" else 1)
    sharded = ["--data-parallel", "fsdp", "--expert-parallel", dealt_over]
    two = train(images, "two", *flags, *sharded, processes=2)
    zero = {"script_name": "train_deepspeed.py"}
    zero = train(images, "zero", *flags, "--deepspeed_config", CONFIG, "--precision", "fp32", processes=2, **zero)
    names = ("loss",) if kind == "sigmoid" else ("loss", "balance_loss")  # which is of a micro-batch
    expected = logged(one, *names)
    for run in (two, zero):
        found = logged(run, *names)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    if kind == "sigmoid":
        of_runs = (checkpoint.load_weights(run).state_dict["blocks.1.moe.gate.bias"] for run in (one, two, zero))
        first, *others = of_runs
        assert first.any() and all(torch.equal(first, other.float()) for other in others)


REFUSED = {
    "groups": (["--router-groups", 3], "router_groups 3 must divide num_experts 4"),
    "few experts in groups": (["--router-groups", 4], "num_experts_per_tok 2: of 1 groups a token sees 1"),
    "groups of another router": (
        ["--router", "expert-choice", "--router-groups", 2],
        "is of routers softmax and sigmoid",
    ),
    "a scale of another router": (["--router", "prototypes", "--norm-topk-prob"], "weighs experts as they are"),
    "bias of another router": (
        ["--router", "expert-choice", "--balance", "bias"],
        "router_bias True is of routers softmax",
    ),
    "none and more": (["--balance", "none", "aux"], "none and another one contradict each other"),
    "no such router": (["--router", "switch"], "invalid choice: 'switch'"),
    "z without logits": (["--router", "prototypes", "--balance", "z"], "--balance z is of routers with logits"),
    "a pool of one": (["--router", "batch-pool", "--accum_iter", 8], "competes over the images of a process"),
    "a factor of nothing": (["--z-loss-alpha", 0.1], "--z-loss-alpha does nothing without --balance z"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_routers_that_do_not_fit_are_one_line(case, images):
    flags, message = REFUSED[case]
    error = script(
        *("train.py", "--data-path", images, "--results-dir", images.parent / "no", *NANO, *flags), check=2
    ).stderr
    assert message in error and "Traceback" not in error and not (images.parent / "no").exists()


def test_buffers_stay_in_full_precision():
    moe = MoE(16, ExpertsConfig(16, RouterConfig(4, 2, "sigmoid", bias=True))).to(torch.bfloat16)
    assert moe.gate.bias.dtype == torch.float32 and moe.gate.weight.dtype == torch.bfloat16
    moe.gate.bias.fill_(0.5)
    moe.gate.after_step(torch.tensor([8192.0, 8193, 8193, 8194]), None)
    assert moe.gate.bias.tolist() == pytest.approx([0.501, 0.5, 0.5, 0.499])


def test_a_bias_evens_out_a_collapsed_load():
    """Of a router that prefers two experts for every token: in some hundred steps all of them work."""
    moe = randomized(DiTConfig(**options("sigmoid", router_bias=True))).blocks[0].moe
    with torch.no_grad():
        moe.gate.weight.mul_(0.1)
        moe.gate.weight[:2, 0] += 3
    generator = torch.Generator().manual_seed(0)
    loads = []
    for _ in range(1500):
        x = torch.randn(4, 16, 32, generator=generator) * 0.3
        x[..., 0] = 1
        with torch.no_grad():
            counts = moe.gate(x.flatten(0, 1), Where(4)).tokens_per_expert
        loads.append(counts.max().item() / counts.float().mean().item())
        moe.gate.after_step(counts, None)
    assert loads[0] == 2.0 and sum(loads[-100:]) / 100 < 1.5


def test_dead_experts_are_reported_once(images):
    """Of prototypes, the expert for unconditional images when no label is dropped."""
    run = train(
        images, "dead", "--router", "prototypes", "--class-dropout-prob", 1e-9, "--max-steps", 5, "--dead-after", 3
    )
    lines = [line for line in (run / "log.txt").read_text().splitlines() if "had no token in 3 steps" in line]
    assert len(lines) == 1 and "expert 4 of block 1" in lines[0]


@pytest.mark.slow
@traces_fp32
@pytest.mark.parametrize("kind", ["prototypes-expert-choice"])  # bags, and an expert more
def test_compiled_without_a_break(kind):
    torch.compiler.reset()  # of what other tests have compiled
    config = DiTConfig(**options(kind))
    models = [randomized(config).train() for _ in range(2)]
    models[1].compile_blocks(fullgraph=True)
    x, t, y = torch.randn(4, 4, 8, 8), torch.linspace(0, 999, 4), torch.tensor([1, 1000, 2, 3])
    outs = [model(x, t, y, return_routing=True) for model in models]
    torch.testing.assert_close(outs[1][0], outs[0][0], rtol=1e-3, atol=1e-3)
    for out, routings in outs:
        (out.square().mean() + sum(sum(routing.losses.values()) for routing in routings)).backward()
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().clamp(min=1e-3)
            assert (ours.grad - theirs.grad).abs().max() < 5e-3 * scale, name


def test_a_run_goes_on_with_another_router(images):
    """What both have is taken; what is new is said; one with more experts is refused."""
    first = train(images, "first", "--max-steps", 1)
    flags = ["--init-from", first, "--balance", "aux", "bias", "--router", "sigmoid", "--norm-topk-prob"]
    flags += ["--max-steps", 1]
    where = ["--data-path", images, "--results-dir", images.parent / "second", *NANO]
    script("train.py", *where, *flags)
    second = next((images.parent / "second").iterdir())
    assert "blocks.1.moe.gate.bias" in (second / "log.txt").read_text()
    model = read_json(second / "checkpoints" / "0000001", "config")["model"]
    assert (model["router"], model["router_bias"], model["norm_topk_prob"]) == ("sigmoid", True, True)
    error = script("train.py", *where, "--init-from", first, "--router", "prototypes", check=2).stderr
    assert "router softmax has 4 experts, prototypes 5: experts cannot be taken over" in error


@pytest.mark.parametrize("script_name", ["train.py", pytest.param("train_deepspeed.py", marks=pytest.mark.slow)])
def test_a_run_begins_with_the_biases_of_a_file(images, script_name):
    router = ["--router", "sigmoid", "--balance", "bias", "--max-steps", 1]
    tensors = dict(checkpoint.load_weights(train(images, "first", *router)).state_dict)
    biases = tensors["blocks.1.moe.gate.bias"] = torch.arange(4.0)
    torch.save({"model": tensors, "ema": tensors}, images.parent / "x.pt")
    zero = ["--deepspeed_config", CONFIG] if "deepspeed" in script_name else []
    run = train(images, "next", *router, *zero, "--init-from", images.parent / "x.pt", script_name=script_name)
    ours = checkpoint.load_weights(run).state_dict["blocks.1.moe.gate.bias"]
    assert ((ours - biases).abs() < 0.01).all()  # one step of the rule


@pytest.mark.parametrize("name", ["ProMoE-S/2", "EC-DiT-L/2", "DiffMoE-S/2", "DSMoE-S/2"])
def test_files_of_published_rows_are_known_as_such(name):
    row = build_config(name)
    with torch.device("meta"):
        theirs = families.to_published(DiT(row).state_dict(), config=row)
    known = families.known_of(theirs) | {"num_heads": row.num_heads, "input_size": row.input_size}
    shapes = {key: tuple(value.shape) for key, value in families.from_published(theirs).items()}
    assert row_name(infer_config(shapes, **known)) == name


@pytest.mark.parametrize("name", PUBLIC)
def test_published_files_are_taken_as_they_are(name, tmp_path):
    """With the objective that they were trained with; another rule of the same parameters by a flag."""
    golden, _ = load(name)
    theirs = golden.part("model.")
    zeros = {key: torch.zeros_like(value) for key, value in theirs.items()}
    keys = ("model_state_dict", "ema_model_state_dict") if "promoe" in name else ("model", "ema")
    torch.save(dict(zip(keys, (zeros, theirs), strict=True)) | {"step": 5}, tmp_path / "x.pth")
    known = {"num_heads": 2, "input_size": 8}
    if name == "router_promoe_ec":
        known["router"] = "prototypes-expert-choice"
    weights = checkpoint.load_weights(tmp_path / "x.pth", **known)
    inputs = [golden[f"in.{key}"][:1] for key in ("x", "t", "y")]
    with torch.no_grad():
        built = weights.build().eval()
        if name == "router_diffmoe":
            built.blocks[1].moe.gate.published_pool = True
        torch.testing.assert_close(built(*inputs), golden["out.eval_first_alone"], rtol=0, atol=1e-5)
    assert weights.objective in ({"name": "rf", "time_scale": 1000.0}, {"name": "ddpm"})
    tool.export(weights, tmp_path / "back.pt", None, None)
    back = torch.load(tmp_path / "back.pt")["ema"]
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_experts_in_odd_blocks():
    assert DiTConfig(**(SMALL | {"depth": 7, "moe_layers": "odd"})).moe_indices == (1, 3, 5)


@pytest.mark.parametrize("kind", ["expert-choice", "prototypes"])
def test_their_choices_are_analysed(kind, images, tmp_path):
    """Every assignment is counted, of any number for a token; with maps and a page."""
    run = train(images, kind, "--router", kind, "--max-steps", 1)
    path = tmp_path / "routing.npz"
    draw = ["--device", "cpu", "--num-sampling-steps", 2, "--images-per-class", 1, "--cfg-scale", 2, "--output", path]
    script("analysis/expert_data.py", "--ckpt", run, *draw)
    data = RoutingData.load(path)
    experts = 4 + (kind == "prototypes")
    assert data["step_counts"].shape[-1] == experts
    assert np.allclose(data["step_probs"].astype(float).sum(axis=-1), 1, atol=2e-2)
    if kind == "expert-choice":
        assert (data["step_counts"] == 4 * 8).all()  # 4 images of 16 tokens, 2 of 4 experts each
    if kind == "prototypes":
        assert (data["step_counts"][1, ..., :4] == 0).all() and (data["step_counts"][0, ..., 4] == 0).all()
    assert "by-class" in script("analysis/heatmaps.py", path, "--formats", "png", "--dpi", 40).stdout
    script("analysis/report.py", path)
