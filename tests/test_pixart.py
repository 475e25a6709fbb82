"""PixArt-alpha-muP against the public code: outputs, guidance, gradients, initial weights, steps of training."""

import json

import pytest
import torch
from conftest import GOLDEN, Golden

import checkpoint
import families
from base_shapes import base_shapes, read_base_width
from cli import UsageError
from conditions import Prompts
from configuration import build_config, infer_config
from diffusion import GaussianDiffusion, classifier_free_guidance
from models import DiT
from optim import ADAMW
from parametrization import lr_factors, readout_multiplier
from upcycle import Recipe, random_outputs, upcycle

WIDTHS = json.loads((GOLDEN / "pixart_mup.json").read_text())
SMALL = dict(depth=2, hidden_size=32, num_heads=2, input_size=8, caption_width=24, caption_length=6, base_width=64)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("pixart_mup")


@pytest.fixture
def model(golden) -> DiT:
    model = DiT(build_config("PixArt-muP-4h/2", **SMALL))
    model.load_state_dict(golden.part("model."))
    return model.eval()


def prompts(golden, rows=slice(None)) -> Prompts:
    mask = golden["in.mask"][rows].bool()
    return Prompts(golden["in.y"][rows, 0], mask, torch.zeros(len(mask), dtype=torch.bool))


def test_outputs_and_gradients(golden, model):
    x, t, (features, mask, _) = golden["in.x"], golden["in.t"], prompts(golden)
    out = model(x, t, (features, golden["in.mask"]))  # as a notebook writes it
    torch.testing.assert_close(out, golden["out.eval"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x, t, prompts(golden)), out, rtol=0, atol=0)
    whole = model(x, t, (features, torch.ones_like(mask)))
    torch.testing.assert_close(whole, golden["out.nomask"], rtol=0, atol=1e-5)
    (out * golden["in.out_weight"]).mean().backward()
    gradients = families.to_published({n: p.grad for n, p in model.named_parameters()}, config=model.config)
    assert gradients.keys() == golden.part("grad.").keys()
    for name, expected in golden.part("grad.").items():
        assert (gradients[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_a_second_golden_model_with_heads_of_72():
    golden = Golden("pixart_mup_head72")
    sizes = json.loads(golden.metadata["config"])
    config = build_config(
        "PixArt-muP-2h/2",
        depth=sizes["depth"],
        input_size=sizes["input_size"],
        caption_width=sizes["caption_channels"],
        caption_length=sizes["model_max_length"],
    )
    model = DiT(config)
    model.load_state_dict(golden.part("model."))
    out = model(golden["in.x"], golden["in.t"], prompts(golden))
    torch.testing.assert_close(out, golden["out.eval"], rtol=1e-5, atol=1e-5 * golden["out.eval"].abs().max().item())
    (out * golden["in.out_weight"]).mean().backward()
    named = families.to_published({n: p.grad for n, p in model.named_parameters()}, config=config)
    for name, expected in golden.part("grad.").items():
        assert (named[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_an_image_depends_on_its_own_prompt_alone(golden, model):
    x, t = golden["in.x"], golden["in.t"]
    features, mask, _ = prompts(golden)
    together = model(x, t, (features, mask))
    for row in range(len(x)):
        length = int(mask[row].sum())  # without any padding
        alone = model(
            x[row : row + 1], t[row : row + 1], (features[row : row + 1, :length], mask[row : row + 1, :length])
        )
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-5)
    other = torch.where(mask[..., None], features, 1e3)
    torch.testing.assert_close(model(x, t, (other, mask)), together, rtol=0, atol=1e-6)


def test_guidance(golden, model):
    x, t = golden["in.x"][:2], golden["in.t"]  # the halves have times of their own
    half = prompts(golden, slice(0, 2))
    both = Prompts(*(torch.cat(pair) for pair in zip(half, model.config.condition.null_of(half), strict=True)))
    out = model(torch.cat([x, x]), t, both)
    conditional, null = out.chunk(2)
    expected = golden["out.cfg"]
    torch.testing.assert_close(null[:, :3] + 4.5 * (conditional - null)[:, :3], expected[:2, :3], rtol=0, atol=1e-4)
    torch.testing.assert_close(conditional[:, 3:], expected[:2, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "steps", "scale"), [("dpm20", 20, 4.5), ("dpm5", 5, 4.5), ("dpm20_cfg1", 20, 1.0)])
def test_samples(golden, model, name, steps, scale):
    """DPM-Solver++ between the time steps, all channels guided."""
    half = prompts(golden, slice(0, 2))
    null = model.config.condition.null_of(half)
    denoise = classifier_free_guidance(model, half, null, scale, time_scale=1000.0)
    with torch.no_grad():
        for parameter in model.final_layer.linear.parameters():
            parameter.mul_(0.1)
        drawn = GaussianDiffusion().sample(denoise, golden["in.noise"][:2], steps, "dpm-solver")
    expected = golden[f"sample.{name}"]
    assert (drawn - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_losses_along_steps_of_training(golden, model):
    """The public optimizer decays biases and tables too."""
    settings = json.loads(golden.metadata["optimizer"])
    objective, factors = GaussianDiffusion(), lr_factors(model)
    renamed = families.to_published(dict.fromkeys(factors, torch.zeros(2)), config=model.config)
    assert dict(zip(renamed, factors.values(), strict=True)) == json.loads(golden.metadata["lr_multipliers"])
    assert readout_multiplier(model.config) == 2.0
    groups = [
        {"params": [p], "lr": settings["lr"] * factors[n], "weight_decay": settings["weight_decay"] / factors[n]}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, **(ADAMW | {"eps": settings["eps"]}))
    batch, losses = objective.at(golden["in.x"], golden["in.noise"], golden["in.t"]), []
    for _ in range(6):
        terms = objective.loss(model(batch.x_t, batch.t, prompts(golden)), batch)
        if not losses:
            torch.testing.assert_close(terms["loss"], golden["train.loss"], rtol=1e-5, atol=1e-5)
        losses.append(terms["loss"].mean().item())
        terms["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(golden["train.step_losses"].tolist(), rel=1e-5)


def test_the_model_of_1024_pixels_is_that_of_diffusers():
    """Sizes and ratio in the condition, positions between whole numbers, masks: against the library's own network."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    options = dict(sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48)
    theirs = PixArtTransformer2DModel(
        **options, caption_channels=20, use_additional_conditions=True, interpolation_scale=2, patch_size=2
    ).eval()
    sizes = dict(depth=2, hidden_size=48, num_heads=2, input_size=16, caption_width=20, caption_length=6)
    model = DiT(build_config("PixArt-XL/2-1024-MS", **sizes)).eval()
    state = {name: value + 0.02 * torch.randn_like(value) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)

    def embedder(name: str) -> dict:
        return {f"mlp.{i}.{w}": state[f"{name}.linear_{j}.{w}"] for i, j in ((0, 1), (2, 2)) for w in WB}

    WB = ("weight", "bias")
    time = "adaln_single.emb"
    ours = {f"x_embedder.proj.{w}": state[f"pos_embed.proj.{w}"] for w in WB}
    for name, part in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio")):
        ours |= {f"{name}_embedder.{k}": v for k, v in embedder(f"{time}.{part}_embedder").items()}
    ours |= {f"t_block.1.{w}": state[f"adaln_single.linear.{w}"] for w in WB}
    for i, j in ((1, 1), (2, 2)):
        ours |= {f"y_embedder.y_proj.fc{i}.{w}": state[f"caption_projection.linear_{j}.{w}"] for w in WB}
    ours |= {"final_layer.scale_shift_table": state["scale_shift_table"]}
    ours |= {f"final_layer.linear.{w}": state[f"proj_out.{w}"] for w in WB}
    for b in range(2):
        block = f"transformer_blocks.{b}"
        ours[f"blocks.{b}.scale_shift_table"] = state[f"{block}.scale_shift_table"]
        for w in WB:
            q, k, v = (state[f"{block}.attn1.to_{part}.{w}"] for part in "qkv")
            ours[f"blocks.{b}.attn.qkv.{w}"] = torch.cat([q, k, v])
            ours[f"blocks.{b}.attn.proj.{w}"] = state[f"{block}.attn1.to_out.0.{w}"]
            k, v = (state[f"{block}.attn2.to_{part}.{w}"] for part in "kv")
            ours[f"blocks.{b}.cross_attn.kv_linear.{w}"] = torch.cat([k, v])
            ours[f"blocks.{b}.cross_attn.q_linear.{w}"] = state[f"{block}.attn2.to_q.{w}"]
            ours[f"blocks.{b}.cross_attn.proj.{w}"] = state[f"{block}.attn2.to_out.0.{w}"]
            ours[f"blocks.{b}.mlp.fc1.{w}"] = state[f"{block}.ff.net.0.proj.{w}"]
            ours[f"blocks.{b}.mlp.fc2.{w}"] = state[f"{block}.ff.net.2.{w}"]
    missing = model.load_state_dict(families.from_published(ours), strict=False).missing_keys
    assert set(missing) <= {"pos_embed", "y_embedder.y_embedding"}
    x, t, features = torch.randn(3, 4, 16, 16), torch.tensor([1.0, 400.0, 999.0]), torch.randn(3, 6, 20)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    added = {"resolution": torch.full((3, 2), 128.0), "aspect_ratio": torch.ones(3, 1)}
    expected = theirs(
        x, encoder_hidden_states=features, timestep=t, added_cond_kwargs=added, encoder_attention_mask=mask.float()
    ).sample
    torch.testing.assert_close(model(x, t, (features, mask)), expected, rtol=1e-4, atol=1e-4)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert infer_config(shapes, num_heads=2) == model.config


def test_published_sizes():
    with torch.device("meta"):
        models = {heads: DiT(build_config(f"PixArt-muP-{heads}h/2")) for heads in (4, 16)}
    counts = {heads: sum(parameter.numel() for parameter in model.parameters()) for heads, model in models.items()}
    assert {heads: round(count / 1e6, 1) for heads, count in counts.items()} == {4: 39.2, 16: 610.9}


@pytest.mark.parametrize("heads", WIDTHS["heads"])
def test_initial_weights(heads):
    width, golden = 72 * int(heads), WIDTHS["heads"][heads]
    config = build_config("PixArt-muP-4h/2", depth=2, hidden_size=width, num_heads=int(heads))
    torch.manual_seed(0)
    model = DiT(config)
    factors = lr_factors(model)
    assert readout_multiplier(config) == pytest.approx(golden["readout_multiplier"])
    named = families.to_published(dict(model.named_parameters()), config=config)
    for (theirs, parameter), factor in zip(named.items(), factors.values(), strict=True):
        if "blocks.1." in theirs:  # as block 0
            continue
        expected = golden["parameters"][theirs]
        assert factor == pytest.approx(expected["lr_multiplier"]), theirs
        assert 1 / factor == pytest.approx(expected["weight_decay_multiplier"]), theirs
        assert parameter.std(correction=0).item() == pytest.approx(expected["init_std"], rel=0.05), theirs


def test_base_shapes():
    config = build_config("PixArt-muP-16h/2", depth=2)
    path = GOLDEN / "pixart_mup_depth2_width288.bsh"
    assert read_base_width(path, config) == 288
    assert "blocks.0.scale_shift_table" in base_shapes(config, 288)
    with pytest.raises(UsageError, match=r"blocks\.2\..* is absent in the file"):
        read_base_width(path, build_config("PixArt-muP-16h/2", depth=3))


def test_architecture_is_read_off_the_shapes(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert (
        infer_config(shapes, num_heads=2, parametrization="mup-pixart", base_width=64, num_classes=1000) == model.config
    )
    published = families.to_published(model.state_dict(), config=model.config)
    assert families.family_of(published).__name__ == "pixart"
    again = families.from_published(published)
    assert again.keys() == model.state_dict().keys()


def test_published_files_load_and_become_mixtures(golden, model, tmp_path):
    """`{state_dict, state_dict_ema, ...}` without the table of positions, as the public code writes and reads them."""
    tensors = families.to_published(model.state_dict(), config=model.config)
    del tensors["pos_embed"]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save({"state_dict": zeros, "state_dict_ema": tensors, "epoch": 5}, tmp_path / "epoch_5_step_9.pth")
    known = dict(num_heads=2, parametrization="mup-pixart", base_width=64, input_size=8)
    x, t, given = golden["in.x"], golden["in.t"], prompts(golden)
    loaded = checkpoint.load_weights(tmp_path / "epoch_5_step_9.pth", **known)
    assert torch.equal(loaded.build().eval()(x, t, given), model(x, t, given))
    assert not checkpoint.load_weights(tmp_path / "epoch_5_step_9.pth", "model", **known).build()(x, t, given).any()

    mixture = upcycle(model, Recipe(num_experts=4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixture(x, t, given), model(x, t, given), rtol=1e-4, atol=1e-4)
    assert random_outputs(mixture, 1000.0).isfinite().all()


def test_drawn_anew_it_says_the_same_for_every_text(golden):
    """Cross-attention reads nothing at first."""
    model = DiT(build_config("PixArt-muP-4h/2", **SMALL)).eval()
    with torch.no_grad():
        model.final_layer.linear.weight.normal_()
    x, t, given = golden["in.x"], golden["in.t"], prompts(golden)
    other = given._replace(features=torch.randn(given.features.shape))
    assert torch.equal(model(x, t, given), model(x, t, other))
