"""Sizes, published numbers, published names."""

import json

import pytest
import torch
from conftest import Golden, traces_fp32

import families
from cli import UsageError
from configuration import DiTConfig, build_config, infer_config
from families import DiT_models, from_published
from kernels import AdaptiveLayerNorm
from models import CHECKPOINTING, DiT, build_model, count_parameters
from moe import EXPERTS
from routers import load_balancing_loss

GOLDEN = ("dit_moe_timm_attention", "dit_moe_flash_attention", "dit_dense")


def golden_model(golden: Golden) -> DiT:
    state_dict = golden.part("model.")
    shapes = {name: tuple(t.shape) for name, t in from_published(state_dict).items()}
    model = DiT(infer_config(shapes, num_heads=json.loads(golden.metadata["config"])["num_heads"]))
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_golden_outputs_and_gradients(name, backend):
    golden = Golden(name)
    model = golden_model(golden)
    for block in model.blocks:
        if block.is_moe:
            block.moe.experts.backend = backend
    x, t, y = golden["in.x"], golden["in.t"], golden["in.y"]
    torch.testing.assert_close(model.eval()(x, t, y), golden["out.eval"], rtol=0, atol=1e-5)

    out, routings = model.train()(x, t, y, return_routing=True)
    torch.testing.assert_close(out, golden["out.train"], rtol=0, atol=1e-5)
    loss = (out * golden["in.out_weight"]).mean()
    if routings:
        loss = loss + 0.01 * load_balancing_loss(routings).sum()
    loss.backward()
    gradients = families.to_published({n: p.grad for n, p in model.named_parameters()}, flash_names="flash" in name)
    expected = golden.part("grad.")
    assert gradients.keys() == expected.keys()
    largest = max(reference.abs().max().item() for reference in expected.values())
    for key, reference in expected.items():
        error = (gradients[key] - reference).abs().max().item()
        assert error <= 1e-5 * largest, key
        # Against its own largest entry too, but for a key bias, which moves no softmax: its gradient is all rounding.
        # Twice the tolerance, since times near 1000 make angles that fp32 holds to 5e-5.
        if not key.endswith("k_norm.bias"):
            assert error <= 2e-5 * reference.abs().max().item(), key


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_guidance(name):
    from diffusion import classifier_free_guidance

    golden = Golden(name)
    model = golden_model(golden).eval()
    x, t, y = golden["in.x"], golden["in.t"], golden["in.y"]
    half = len(x) // 2
    # The reference has a time for each image; the wrapper of the sampler has one for all.
    denoise = classifier_free_guidance(
        lambda x, _, y: model(x, t[:half].repeat(2), y),
        y[:half],
        model.config.null_class,
        2.5,
        channels=3,
        time_scale=1000,
    )
    torch.testing.assert_close(denoise(x[:half], 500), golden["out.cfg"][:half], rtol=0, atol=2e-5)


SIZES = [  # COMPAT: total, activated
    ("DiT-S/2", 8, 199_307_552, 71_905_568),
    ("DiT-S/2", 16, 369_213_728, 71_942_432),
    ("DiT-B/2", 8, 795_861_536, 286_253_600),
    ("DiT-L/2", 8, 2_823_764_000, 1_011_824_672),
    ("DiT-XL/2", 8, 4_168_172_192, 1_492_730_528),
    ("DiT-G/2", 16, 16_503_731_232, 3_181_573_152),
    ("DiT-S/2", 0, 32_963_360, 32_963_360),
    ("DiT-B/2", 0, 130_512_416, 130_512_416),
    ("DiT-L/2", 0, 458_102_816, 458_102_816),
    ("DiT-XL/2", 0, 675_129_632, 675_129_632),
]


@pytest.mark.parametrize(("name", "experts", "total", "activated"), SIZES)
def test_parameter_counts(name, experts, total, activated):
    with torch.device("meta"):
        assert count_parameters(build_model(name, num_experts=experts)) == (total, activated)


def test_table_has_every_published_size():
    assert {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} < set(DiT_models)
    assert "DiT-G/2" in DiT_models and "DiT-G/4" not in DiT_models


def test_qk_norm_is_the_default_where_it_was_published():
    def of(*arguments, **options) -> str:
        return build_config(*arguments, **options).qk_norm

    assert of("DiT-XL/2", num_experts=8) == of("DiT-G/2", num_experts=16) == of("DiT-S/2", qk_norm=True) == "head"
    assert of("DiT-XL/2") == of("DiT-B/2", num_experts=8) == of("DiT-XL/2", num_experts=8, qk_norm=False) == "none"
    assert of("Large-DiT-3B/2") == of("Large-DiT-3B/2", num_experts=8) == "none"
    assert of("Large-DiT-3B/2", qk_norm=True) == "full"


def tiny(**options) -> DiT:
    torch.manual_seed(0)
    return build_model("DiT-Nano/2", **(dict(input_size=8, num_classes=5, num_experts=4) | options))


def randomized(model: DiT) -> DiT:
    """Weights for which the output depends on everything (fresh ones output zero)."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model: DiT, batch: int = 3):
    config = model.config
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) % config.num_classes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("all", (0, 1, 2)), ("every-2", (1,)), ("deep-half", (1, 2)), ("shallow-half", (0,)), ("2,0", (0, 2))],
)
def test_moe_in_chosen_blocks(spec, expected):
    model = tiny(moe_layers=spec)
    assert tuple(i for i, block in enumerate(model.blocks) if block.is_moe) == expected
    out, routings = model(*inputs(model), return_routing=True)
    assert len(routings) == len(expected) and out.shape == (3, 8, 8, 8)


@pytest.mark.parametrize(
    "options",
    [
        dict(input_size=16),
        dict(in_channels=3, num_classes=1),
        dict(learn_sigma=False),
        dict(class_dropout_prob=0.0),
        dict(expert_ratio=0.5, num_experts=16, num_experts_per_tok=8),
        dict(num_shared_experts=0),
        dict(num_shared_experts=3, shared_expert_ratio=0.5),
        dict(norm_topk_prob=True, qk_norm=True),
        dict(norm_topk_prob=True, routed_scaling_factor=2.0, expert_mlp="gelu", moe_layers="0,2"),
        dict(num_experts=0),
    ],
)
def test_options_train_and_describe_themselves(options):
    model = randomized(tiny(**options))
    x, t, y = inputs(model)
    out = model(x, t, y)
    assert out.shape == (3, model.config.out_channels, *x.shape[2:])
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert DiTConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config


@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(expert_mlp="gelu", moe_layers="every-2")], ids=str)
def test_a_model_made_unit_by_unit_equals_one_made_whole(options):
    whole, units, states = tiny(**options), [], []
    torch.manual_seed(3)
    whole.init_weights()
    for then in (None, units.append):
        with torch.device("meta"):
            model = tiny(**options)
        torch.manual_seed(3)
        model.materialize(torch.device("cpu"), then)
        states.append(model.state_dict())
    first, state = states
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    assert len(units) == 4 and {p for part in units for m in part for p in m.parameters()} == set(model.parameters())
    assert all(torch.equal(first[name], state[name]) for name in first)
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])


def test_fresh_model_outputs_zero():
    model = tiny()
    assert not model(*inputs(model)).any()


def test_output_of_an_image_does_not_depend_on_its_batch():
    model = randomized(tiny())
    x, t, y = inputs(model, 4)
    together = model(x, t, y)
    for i in range(4):
        torch.testing.assert_close(
            model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(name):
    results = []
    for kind in ("none", name):
        model = randomized(tiny())
        model.set_checkpointing(kind)
        out, routings = model(*inputs(model), return_routing=True)
        (out.square().mean() + load_balancing_loss(routings).sum()).backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_activation_checkpointing():
    model = tiny()
    with pytest.raises(UsageError, match="'fall'; did you mean full"):
        model.set_checkpointing("fall")


@pytest.mark.parametrize(
    ("stream", "modulation", "result"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),  # under autocast
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=["fp64", "autocast", "bf16"],
)
def test_adaptive_norm_against_the_formula(stream, modulation, result):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16).to(stream).requires_grad_()
    shift, scale = (torch.randn(3, 16).to(modulation).requires_grad_() for _ in range(2))
    grad = torch.randn(3, 5, 16).to(result)
    out = AdaptiveLayerNorm.apply(x, shift, scale, result)
    found = [out, *torch.autograd.grad(out, (x, shift, scale), grad)]

    centred = x.double() - x.double().mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    out = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
    expected = [out, *torch.autograd.grad(out, (x, shift, scale), grad.double())]
    assert [tensor.dtype for tensor in found] == [result, stream, modulation, modulation]
    tolerance = 1e-10 if stream == torch.float64 else 2e-2
    for mine, exact in zip(found, expected, strict=True):
        assert (mine.double() - exact).norm() < tolerance * exact.norm()


def test_residual_stream_is_contiguous():
    """A transposed one would be copied by every norm, and every sum would go across memory."""
    model = randomized(tiny())
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    streams = []
    model(*inputs(model))
    assert len(streams) == len(model.blocks) and all(x.is_contiguous() for x in streams)


def test_residual_stream_in_bf16():
    """Twice as much is rounded, and no more: tokens are bf16 between blocks, results as near as bf16 products are."""
    model, streams = randomized(tiny()), []
    given = inputs(model)
    expected = model(*given)
    model.residual_dtype = torch.bfloat16
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*given)
    assert streams == [torch.bfloat16] * len(model.blocks)
    assert (out - expected).norm() / expected.norm() < 0.05


def test_stacked_modulations_are_the_same():
    model = randomized(tiny())
    given, weights = inputs(model), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(*given)
        model.stack_modulations()
        torch.testing.assert_close(model(*given), expected)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len({block.adaLN_modulation[1].weight.untyped_storage().data_ptr() for block in model.blocks}) == 1


def test_blocks_that_cannot_be_compiled_run_as_they_are(monkeypatch):
    def refuse(*args):
        raise torch._dynamo.exc.Unsupported("no such thing\nand much more")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    model, notes = randomized(tiny()), []
    expected = model(*inputs(model))
    model.compile_blocks(note=notes.append, or_plain=True)
    assert torch.equal(model(*inputs(model)), expected)
    assert notes == ["WARNING: blocks run uncompiled, Unsupported: no such thing"]
    model.compile_blocks()
    with pytest.raises(torch._dynamo.exc.Unsupported):  # asked for by name
        model(*inputs(model))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_blocks_have_the_gradients(autocast):
    """In bf16, which all supported versions of PyTorch can trace. The more is computed again, the less is kept."""

    def gradients(checkpointing: str, compiled: bool) -> tuple[dict, int]:
        """And the bytes of distinct storages, beside the weights, that the forward saved."""
        torch.compiler.reset()
        blocks = "all" if autocast else "0,2"  # every kind of block is a compilation of its own
        model = randomized(tiny(qk_norm=True, moe_layers=blocks)).to(torch.float32 if autocast else torch.bfloat16)
        model.set_checkpointing(checkpointing)
        if compiled:
            model.compile_blocks()
        saved = {}

        def note(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            out, routings = model(*inputs(model, 16), return_routing=True)
        (out.float().square().mean() + load_balancing_loss(routings).sum()).backward()
        for parameter in model.parameters():
            saved.pop(parameter.untyped_storage()._cdata, None)
        kept = sum(storage.nbytes() for storage in saved.values())
        return {"out": out.detach(), **{name: p.grad for name, p in model.named_parameters()}}, kept

    expected, _ = gradients("none", compiled=False)
    kept = {}
    for checkpointing in CHECKPOINTING if autocast else ["none"]:
        found, kept[checkpointing] = gradients(checkpointing, compiled=True)
        for name, gradient in expected.items():
            if not name.endswith("k_norm.bias"):  # whose gradient is zero but for rounding
                assert (found[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-6, (checkpointing, name)
    if autocast:
        assert kept["full"] < kept["selective"] / 4 and kept["selective"] < 0.75 * kept["none"], kept


@traces_fp32
@pytest.mark.slow
def test_compiled_blocks_agree():
    model = randomized(tiny())
    expected = model(*inputs(model))
    names = set(model.state_dict())
    model.compile_blocks()
    torch.testing.assert_close(model(*inputs(model)), expected, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("backend", ["math", "efficient", "flash"])
def test_attention_backends_agree(backend):
    model = randomized(tiny(qk_norm=True))
    expected = model(*inputs(model))
    model.set_attention(backend)
    if backend == "efficient":  # no CPU kernel: it must say so, not fall back
        with pytest.raises(RuntimeError, match="No (viable backend|available kernel)"):
            model(*inputs(model))
    else:
        torch.testing.assert_close(model(*inputs(model)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["flash-attn", "fa3"])
def test_absent_attention_package_is_named(backend):
    with pytest.raises(UsageError, match=backend):
        tiny().set_attention(backend)


@pytest.mark.parametrize("flash_names", [False, True])
def test_published_names_round_trip(flash_names):
    model = randomized(tiny(qk_norm=True))
    published = families.to_published(model.state_dict(), flash_names)
    assert "blocks.1.moe.experts.3.up_proj.weight" in published
    assert ("blocks.0.attn.Wqkv.weight" in published) == flash_names
    other = tiny(qk_norm=True)
    other.load_state_dict({f"module._orig_mod.{name}": t for name, t in published.items() if name != "pos_embed"})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    again = families.to_published(other.state_dict(), flash_names)
    assert again.keys() == published.keys() and all(torch.equal(again[n], published[n]) for n in published)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/4", "DiT-XL/2", "DiT-G/2"])
@pytest.mark.parametrize("experts", [0, 8])
def test_architecture_is_inferred_from_shapes(name, experts):
    with torch.device("meta"):
        model = build_model(name, num_experts=experts, input_size=64, num_classes=7)
    assert infer_config({n: tuple(t.shape) for n, t in model.state_dict().items()}) == model.config


@pytest.mark.parametrize("kind", EXPERTS)
def test_kind_and_width_of_experts_are_inferred(kind):
    model = tiny(expert_mlp=kind, expert_ratio=1.5, num_shared_experts=0)
    assert infer_config({n: tuple(t.shape) for n, t in model.state_dict().items()}) == model.config
    one = tiny(expert_mlp=kind, num_experts=1, num_experts_per_tok=1)
    assert infer_config({n: tuple(t.shape) for n, t in one.state_dict().items()}) == one.config


def test_widths_survive_their_ratios():
    """Ratios are stored, widths are wanted: 120 / 1408 * 1408 is below 120 in floating point."""
    for width in range(8, 4 * 1408 + 1, 8):
        config = build_config("DiT-G/2", num_experts=4, expert_ratio=width / 1408, mlp_ratio=width / 1408)
        assert (config.expert_width, config.mlp_width) == (width, width)


def test_gelu_experts_are_counted_and_keep_their_names():
    """Four experts have the dense MLP's parameters four times; no published file has such, so the names stay."""
    dense, sparse = tiny(num_experts=0), tiny(expert_mlp="gelu", num_experts=4, num_shared_experts=0)
    per_layer = 2 * 64 * 256 + 256 + 64
    total = count_parameters(dense)[0] + 3 * (3 * per_layer + 4 * 64)
    assert count_parameters(sparse) == (total, total - 3 * 2 * per_layer)
    published = families.to_published(sparse.state_dict())
    assert published.keys() == sparse.state_dict().keys() == from_published(published).keys()


def test_inferring_names_what_is_wrong():
    with pytest.raises(UsageError, match="not the weights of a DiT"):
        infer_config({"conv1.weight": (3, 3)})
    shapes = {n: tuple(t.shape) for n, t in DiT(DiTConfig(2, 48, 2, 6)).state_dict().items()}
    with pytest.raises(UsageError, match="hidden size 48"):
        infer_config(shapes)
    published = families.to_published(tiny().state_dict())
    del published["blocks.0.moe.experts.1.up_proj.weight"]
    with pytest.raises(UsageError, match=r"blocks\.0\.moe\.experts\.1\.up_proj\.weight"):
        from_published(published)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_experts_per_tok=9), "num_experts_per_tok.*num_experts 4.*9"),
        (dict(input_size=7), "7x7.*patches of 2"),
        (dict(num_experts=-1), "num_experts.*-1"),
        (dict(num_classes=0), "num_classes.*0"),
        (dict(class_dropout_prob=1.0), r"class_dropout_prob.*1\.0"),
        (dict(expert_ratio=0.1), "expert width 0.1 x 64"),
        (dict(expert_mlp="glu"), "unknown expert_mlp 'glu'; did you mean .*gelu"),
        (dict(routed_scaling_factor=0.0), r"routed_scaling_factor.*0\.0"),
        (dict(routed_scaling_factor=float("inf")), "routed_scaling_factor.*inf"),
        (dict(moe_layers="every-9"), "every-9.*N up to 3"),
        (dict(moe_layers="0,3"), "0,3.*from 0 to 2"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        tiny(**options)


def test_unknown_model_lists_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean .*DiT-XL/2"):
        build_model("DiT-XXL/2")
    with pytest.raises(UsageError, match="written by a newer version"):
        DiTConfig.from_dict(tiny().config.to_dict() | {"rope": True})
