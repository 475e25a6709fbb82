"""Large-DiT-T2I against the public code: outputs, guidance, gradients, images of several sizes, folders."""

import argparse
import dataclasses

import pytest
import torch
from conftest import GOLDEN, Golden, traces_fp32

import checkpoint
import families
import weights as tool
from cli import UsageError
from conditions import Captions, Prompts
from configuration import build_config
from diffusion import GaussianDiffusion, classifier_free_guidance
from models import DiT
from upcycle import Recipe, upcycle

SMALL = dict(depth=2, hidden_size=32, num_heads=4, condition_width=32, mlp_multiple=16, input_size=8, caption_width=24)
FOLDER = GOLDEN / "large_dit_t2i_ckpt_1way"


def tiny(**options):
    return build_config("Large-DiT-T2I-600M/2", **(SMALL | {"qk_norm": True} | options))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("large_dit_t2i")


@pytest.fixture
def model(golden) -> DiT:
    model = DiT(tiny())
    model.load_state_dict(golden.part("model."))
    return model.eval()


def images_of(golden, name: str) -> list[torch.Tensor]:
    return list(golden.part(f"in.{name}.").values())


def test_outputs_and_gradients(golden, model):
    x, t, texts = golden["in.x"], golden["in.t"], (golden["in.cap_feats"], golden["in.cap_mask"])
    out = model(x, t, texts)
    torch.testing.assert_close(out, golden["out.eval"], rtol=0, atol=1e-5)
    scaled = DiT(tiny(position_scaling=2.0)).eval()
    scaled.load_state_dict(model.state_dict())
    torch.testing.assert_close(scaled(x, t, texts), golden["out.rope_scaled"], rtol=0, atol=1e-5)
    (out * golden["in.out_weight"]).mean().backward()
    gradients = families.to_published({n: p.grad for n, p in model.named_parameters()}, config=model.config)
    assert gradients.keys() == golden.part("grad.").keys()
    for name, expected in golden.part("grad.").items():
        error = (gradients[name] - expected).abs().max()
        if not name.endswith(("k_norm.bias", "ky_norm.bias")):  # they move few softmaxes: rounding
            assert error <= 2e-5 * expected.abs().max(), name


def test_an_image_depends_on_its_own_prompt_alone(golden, model):
    x, t, features, mask = (golden[f"in.{name}"] for name in ("x", "t", "cap_feats", "cap_mask"))
    together = model(x, t, (features, mask))
    torch.testing.assert_close(golden["out.pad_changed"], golden["out.eval"], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model(x, t, (torch.where(mask[..., None], features, 7.0), mask)), together, rtol=0, atol=1e-6
    )
    for row in range(len(x)):
        one, length = slice(row, row + 1), int(mask[row].sum())
        alone = model(x[one], t[one], (features[one, :length], mask[one, :length]))
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-5)


def test_guidance(golden, model):
    x, t = golden["in.x"], golden["in.t"]
    half = len(x) // 2
    out = model(torch.cat([x[:half]] * 2), t, (golden["in.cap_feats"], golden["in.cap_mask"]))
    conditional, null = out.chunk(2)
    expected = golden["out.cfg"]
    guided = null[:, :3] + 2.5 * (conditional - null)[:, :3]
    torch.testing.assert_close(guided, expected[:half, :3], rtol=0, atol=1e-4)
    torch.testing.assert_close(conditional[:, 3:], expected[:half, 3:], rtol=0, atol=1e-5)


def test_images_of_several_sizes_in_a_batch(golden, model):
    x, noise = images_of(golden, "list_x"), images_of(golden, "list_noise")
    count = len(x)
    t, texts = golden["in.t"][:count], (golden["in.cap_feats"][:count], golden["in.cap_mask"][:count])
    outs = model(x, t, texts)
    for out, expected in zip(outs, golden.part("out.list.").values(), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    objective = GaussianDiffusion()
    losses = {"loss": [], "mse": [], "vb": []}
    for index in range(count):
        batch = objective.at(x[index][None], noise[index][None], t[index : index + 1])
        alone = Prompts(*(each[index : index + 1] for each in texts))
        terms = objective.loss(model([batch.x_t[0]], batch.t, alone), batch)
        for name, values in losses.items():
            values.append(terms[name].item())
    for name, values in losses.items():
        assert values == pytest.approx(golden[f"train.{name}"].tolist(), rel=1e-5), name
    with pytest.raises(UsageError, match="an image of 20 rows of 2 patches does not fit into a sequence of 24 tokens"):
        model([torch.randn(4, 40, 4)], t[:1], Prompts(*(each[:1] for each in texts)))
    with pytest.raises(UsageError, match="needs a network with row_ends"):
        DiT(build_config("DiT-Nano/2", input_size=8))([torch.randn(4, 8, 8)], t[:1], torch.zeros(1).long())


@pytest.mark.parametrize(
    ("size", "width", "plain", "normed"),
    [
        ("600M", 4096, 814_312_480, 814_459_936),
        ("3B", 4096, 5_046_053_920, 5_046_643_744),
        ("7B", 4096, 8_370_356_256, 8_371_142_688),
        ("600M", 5120, 865_711_136, 865_858_592),
        ("3B", 5120, 5_248_463_904, 5_249_053_728),
        ("7B", 5120, 8_639_875_104, 8_640_661_536),
    ],
)
def test_published_sizes(size, width, plain, normed):
    for qk_norm, expected in ((False, plain), (True, normed)):
        with torch.device("meta"):
            model = DiT(build_config(f"Large-DiT-T2I-{size}/2", qk_norm=qk_norm, caption_width=width))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.fixture
def heads(monkeypatch):
    """The folder's row, which is in no table of published sizes."""
    import large_dit

    row = large_dit._row(2, 32, 4)
    for table in (large_dit.ROWS, families.DiT_models):
        monkeypatch.setitem(table, "DiT_Llama_Tiny_patch2", row | {"condition_width": 0, "mlp_multiple": 16})


def test_folders_load_and_are_written(golden, heads, tmp_path):
    expected = Golden("large_dit_t2i_ckpt_1way.expected")
    x, t, texts = golden["in.x"], golden["in.t"], (golden["in.cap_feats"], golden["in.cap_mask"])
    for which, name in (("model", "out.eval"), ("ema", "out.ema_eval")):
        loaded = checkpoint.load_weights(FOLDER, which)
        assert loaded.record["text"] == {"name": "meta-llama/Llama-2-7b-hf", "length": 128}
        assert loaded.config.row_ends and loaded.config.reading == "gated" and loaded.config.caption_length == 128
        small = checkpoint.load_weights(FOLDER, which)
        small.config = tiny(mlp_multiple=loaded.config.mlp_multiple, mlp_ratio=loaded.config.mlp_ratio)
        torch.testing.assert_close(small.build().eval()(x, t, texts), expected[name], rtol=0, atol=1e-5)

    nano = DiT(build_config("Large-DiT-T2I-Nano/2", input_size=8, caption_width=24, qk_norm=True)).eval()
    record = {"image_size": 64, "text": {"name": "LLAMA", "length": 128}, "objective": {"name": "ddpm"}}
    held = checkpoint.Weights(nano.state_dict(), nano.state_dict(), nano.config, record, tmp_path)
    tool.export(held, tmp_path / "out", None, None)
    args = vars(checkpoint.load_pickle(tmp_path / "out" / "model_args.pth", argparse.Namespace))
    assert args["lm"] == "LLAMA" and args["max_text_tokens"] == 128 and "num_classes" not in args
    again = checkpoint.load_weights(tmp_path / "out")
    assert again.config == nano.config and again.record["text"] == record["text"]


def test_drawn_anew_it_reads_nothing_at_first(golden):
    model = DiT(tiny()).eval()
    with torch.no_grad():
        model.final_layer.linear.weight.normal_()
        for block in model.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.1)
    x, t, features, mask = (golden[f"in.{name}"] for name in ("x", "t", "cap_feats", "cap_mask"))
    assert torch.equal(model(x, t, (features, mask)), model(x, t, (features + 1, mask)))
    mixture = upcycle(model, Recipe(num_experts=4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixture(x, t, (features, mask)), model(x, t, (features, mask)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@traces_fp32
@pytest.mark.parametrize("row", ["Large-DiT-T2I-Nano/2"])
def test_compiled_without_a_break(row):
    """All of a block in one graph, with what it reads, forward and backward."""
    torch.compiler.reset()  # of what other tests have compiled
    sizes = dict(depth=1, hidden_size=32, num_heads=4, input_size=8, caption_width=24, caption_length=7, num_experts=2)
    config = build_config(row, qk_norm=True, **sizes)
    models = [DiT(config) for _ in range(2)]
    with torch.no_grad():
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            theirs.copy_(ours.normal_(std=0.1))
    models[1].compile_blocks(fullgraph=True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    outs = [model(x, t, (torch.ones(2, 7, 24), mask)) for model in models]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    for out in outs:
        out.square().mean().backward()
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp(min=1e-3)
        assert (ours.grad - theirs.grad).abs().max() < 1e-3 * scale, name


def test_no_text_is_the_empty_one():
    """Its own features and mask, however long the captions beside it are."""
    features = {"": torch.full((2, 3), 7.0), "a": torch.ones(1, 3), "a b c": torch.arange(9.0).view(3, 3)}

    def encode(texts):
        from text import padded

        return padded([features[text] for text in texts])

    kind = Captions(3, 9, dropout=0.5, nothing="", encode=encode)
    batch = kind.batch(["a", "a b c"], torch.device("cpu"))
    dropped = kind.drop(batch, torch.tensor([0.9, 0.1]))
    assert dropped.mask.sum(dim=1).tolist() == [1, 2] and (dropped.features[1, :2] == 7).all()
    one = kind.batch(["a"], torch.device("cpu"))
    kept = dataclasses.replace(kind, dropout=0.0)
    assert kept.drop(batch, torch.zeros(2)) is batch
    seen = []
    denoise = classifier_free_guidance(lambda x, t, c: seen.append(c) or x, one, kind.null_of(one), 2.0, time_scale=1.0)
    denoise(torch.zeros(1, 4, 2, 2), 0.5)
    assert seen[0].mask.tolist() == [[True, False], [True, True]] and seen[0].features.shape == (2, 2, 3)
