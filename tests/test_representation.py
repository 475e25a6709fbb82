"""Alignment with the features of an encoder: a tiny DINOv2, made on the spot."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import read_json, script, write_images
from test_extract_features import extract, save_autoencoder
from test_training import TINY, assert_same_state, metrics, refused, run_train, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
import representation
import train
from benchmarks import digits_runs, endless
from benchmarks.alignment import digits_of
from benchmarks.traffic import record
from configuration import build_config
from diffusion import RectifiedFlow
from models import DiT, build_model
from representation import Encoder, Projector
from scripts.digits import split_digits

WIDTH = 16


def save_encoder(folder, **more):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=2)
    config = AutoConfig.for_model(**({"model_type": "dinov2"} | sizes | more))
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory, encoder):
    """Of images of 16 pixels, with features of 4x4 places beside; (images, autoencoder, latents)."""
    home = tmp_path_factory.mktemp("latents")
    images = write_images(home / "images", size=16)
    autoencoder = save_autoencoder(home / "vae")
    return images, autoencoder, extract(images, autoencoder, home / "latents", "--repa", encoder)


def repa(folder, *more) -> list:
    return ["--repa", folder, "--repa-depth", 2, "--repa-width", 24, *more]


@pytest.mark.parametrize("registers", [0, 3])
def test_features_are_the_patch_tokens_of_normalised_images(registers, tmp_path):
    from transformers import AutoModel

    kind = dict(model_type="dinov2_with_registers", num_register_tokens=registers) if registers else {}
    folder = save_encoder(tmp_path, **kind)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    pixels = F.interpolate(pixels, (12, 12), mode="bicubic")
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state
    assert tokens.shape == (3, 1 + registers + 36, WIDTH)
    torch.testing.assert_close(Encoder(str(folder))(images, 6), tokens[:, 1 + registers :])


def test_tokens_that_are_returned_cost_nothing():
    """They are what is there anyway."""
    with FakeTensorMode():
        model = DiT(build_config("DiT-Nano/2", input_size=8, in_channels=3, num_classes=4, num_experts=4))
        t, y = torch.rand(2), torch.zeros(2, dtype=torch.int64)

        def launched(**more) -> int:
            forward, _ = record(lambda x: model(x, t, y, **more), torch.randn(2, 3, 8, 8), grad=False)
            return len(forward.made)

        assert launched(return_tokens=2) == launched() > 100


@pytest.mark.parametrize("name", ["DiT-Nano/2", "Large-DiT-T2I-Nano/2"])
def test_tokens_are_those_behind_a_block_without_the_ends_of_rows(name):
    more = dict(caption_width=8, caption_length=4) if "T2I" in name else {}
    model = build_model(name, input_size=8, in_channels=3, num_classes=4, **more)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    x, t, condition = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    if more:
        condition = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    out, tokens = model(x, t, condition, return_tokens=2)
    assert torch.equal(out, model(x, t, condition)) and tokens.shape[1] == 16
    whole = seen[0]
    if model.config.row_ends:
        assert whole.shape[1] > 16
        whole = whole[:, :20].unflatten(1, (4, 5))[:, :, :4].flatten(1, 2)
    assert torch.equal(tokens, whole)


def test_the_gradient_is_that_of_the_loss_and_minus_the_cosine(images, encoder, monkeypatch):
    """Against plain autograd and a hook: block 2 is one with experts."""
    seen, forward, step, noised = {}, train.DDPEngine.forward, train.DDPEngine.step, RectifiedFlow.noised

    def remember(self, x, t, y, aligned):
        seen["inputs"] = x, t, y
        return forward(self, x, t, y, aligned)

    def remember_target(self, x0, *rest):
        seen["x0"], seen["target"] = x0, noised(self, x0, *rest).target
        return noised(self, x0, *rest)

    def by_hand(self, lr, finite):
        hidden = []
        hook = self.module.blocks[1].register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
        out = self.module(*seen["inputs"])
        hook.remove()
        projected, features = self.projector(hidden[0]), Encoder(str(encoder))(seen["x0"], 4)
        assert projected.shape == features.shape == (8, 16, WIDTH)
        products = (projected * features).sum(-1) / (projected.norm(dim=-1) * features.norm(dim=-1))
        loss = (out[:, :3] - seen["target"]).square().mean() - 0.3 * products.mean()
        parameters = [*self.module.parameters(), *self.projector.parameters()]
        seen["pairs"] = list(zip(torch.autograd.grad(loss, parameters), [p.grad.clone() for p in parameters]))  # noqa: B905
        seen["cosine"] = products.mean().item()
        return step(self, lr, finite)

    monkeypatch.setattr(train.DDPEngine, "forward", remember)
    monkeypatch.setattr(train.DDPEngine, "step", by_hand)
    monkeypatch.setattr(RectifiedFlow, "noised", remember_target)
    run = run_train(images, *repa(encoder, "--repa-weight", 0.3, "--aux-loss-alpha", 0), steps=1)
    for expected, found in seen["pairs"]:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert metrics(run)[0]["alignment"] == pytest.approx(seen["cosine"], rel=1e-4)
    assert seen["pairs"][-1][1].norm() > 0


def test_a_run_goes_on_to_the_bit_and_without_alignment_behind_its_end(images, encoder, capsys, monkeypatch):
    calls, features = [], representation.Alignment.features
    monkeypatch.setattr(representation.Alignment, "features", lambda *a: calls.append(1) or features(*a))
    flags = repa(encoder, "--repa-until", 3, "--weight-decay", 0.1, "--log-every", 2)
    whole = run_train(images, *flags, "--ckpt-every", 1, steps=6)
    assert len(calls) == 3
    cut = images.parent / "cut" / whole.name
    shutil.copytree(whole, cut)
    run_train(images, *flags, "--resume", cut / "checkpoints" / "0000002", steps=6, results="cut")
    assert metrics(whole) == metrics(cut)
    assert_same_state(whole, cut, 6)
    lines = [line.get("alignment") for line in metrics(whole)]
    each = metrics(run_train(images, *flags, "--log-every", 1, steps=3, results="each"))
    values = [line["alignment"] for line in each]
    assert lines == [pytest.approx(sum(values[:2]) / 2), pytest.approx(values[2]), None]
    at_2, at_3, at_6 = (tensors(whole, "projector", step) for step in (2, 3, 6))
    of_cut = tensors(cut, "projector", 6)
    assert all(torch.equal(at_3[name], at_6[name]) and torch.equal(at_6[name], of_cut[name]) for name in at_3)
    assert any(not torch.equal(at_2[name], at_3[name]) for name in at_3)
    assert not any("projector" in name for stem in ("model", "ema") for name in tensors(whole, stem, 6))
    checkpoint.load_weights(whole).build()  # samples as any other
    assert read_json(whole / "checkpoints" / "0000006", "config")["alignment"]["width"] == WIDTH

    # Neither ends nor begins with a resumption, unless told; and it cannot begin with one.
    at = ["--resume", whole / "checkpoints" / "0000004"]
    assert "--repa was an encoder of SHA-256" in (line := refused(images, capsys, *at, steps=8)) and "is off" in line
    assert run_train(images, *at, "--allow-changes", steps=5) == whole
    plain = run_train(images, steps=1, results="plain")
    changed = ["--resume", plain, "--allow-changes", *repa(encoder)]
    assert "has no projector: --repa is of whole runs" in refused(images, capsys, *changed)


@pytest.mark.slow
def test_processes_and_shards_give_one_curve(images, encoder):
    """Two processes, first as they are and then sharded, with accumulation, across the end of the alignment; fp32."""
    flags = [*repa(encoder, "--repa-until", 3), "--accum_iter", 2, "--adam-eps", 1e-4, "--mup", "--base-width", 16]
    one = run_train(images, *flags)
    more = [*TINY, "--data-path", images, "--global-batch-size", 8, "--log-every", 1, *flags]
    more += ["--results-dir", images.parent / "two"]
    script("train.py", *more, "--max-steps", 2, processes=2)
    script("train.py", *more, "--max-steps", 4, "--resume", "auto", "--data-parallel", "fsdp", processes=2)
    two = next((images.parent / "two").iterdir())
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.get("alignment", 2) == pytest.approx(b.get("alignment", 2), rel=1e-4, abs=1e-6), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert ["alignment" in line for line in metrics(one)] == [True] * 3 + [False]
    for name, weight in tensors(one, "ema").items():
        torch.testing.assert_close(tensors(two, "ema")[name], weight, rtol=0, atol=2e-5)


def test_features_beside_latents_are_those_of_the_images(latents, encoder, capsys, tmp_path):
    images, autoencoder, folder = latents
    sizes = ["--image-size", 16, "--vae-path", autoencoder, "--repa-until", 3]
    run = lambda *data: train.main(train.get_parser().parse_args(list(map(str, [  # noqa: E731
        *TINY, *repa(encoder), *sizes, *data, "--global-batch-size", 8, "--log-every", 1, "--max-steps", 4,
    ]))))  # fmt: skip
    run("--data-path", images, "--results-dir", tmp_path / "images")
    run("--feature-path", folder, "--results-dir", tmp_path / "latents")
    lines = [metrics(next((tmp_path / name).iterdir())) for name in ("images", "latents")]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a.get("alignment", 2) == pytest.approx(b.get("alignment", 2), abs=1e-3)
    assert ["alignment" in line for line in lines[1]] == [True] * 3 + [False]
    damaged = folder / "representation-00000.npy"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    flags = [*repa(encoder), *sizes, "--feature-path", folder]
    try:
        assert f"{damaged} is damaged" in refused_without_data(capsys, *flags)
    finally:
        damaged.write_bytes(content)
    elsewhere = save_encoder(tmp_path / "other")
    flags[1] = elsewhere
    assert f"--repa {elsewhere}: the features in {folder} are of {encoder}" in refused_without_data(capsys, *flags)
    flags[1] = encoder
    assert "of 4x4 places, the model has 2x2" in refused_without_data(capsys, *flags, "--patch-size", 4)


def refused_without_data(capsys, *flags) -> str:
    import sys

    import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, [*TINY, *flags])])
        with pytest.raises(SystemExit) as end:
            cli.run(train.main, train.get_parser())
    assert end.value.code == 2
    return capsys.readouterr().err


def test_wrong_encoders_get_one_line(images, encoder, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    lines = {
        "/nowhere": "encoder of images path /nowhere does not exist",
        "dinov2-vit-b": "facebook/dinov2-base is no folder here and not in the hub's local cache",
        str(tmp_path): "a clip aligns nothing here; expected dinov2",
    }
    for name, line in lines.items():
        assert line in refused(images, capsys, *repa(name))
    assert "--repa-depth 9: the model has" in refused(images, capsys, "--repa", encoder, "--repa-depth", 9)
    assert "--repa-weight does nothing without --repa" in refused(images, capsys, "--repa-weight", 1)


def test_a_projector_learns_by_its_width_under_mup(encoder):
    config = build_config("DiT-Nano/2", input_size=8, in_channels=3, parametrization="mup", base_width=16)
    alignment = representation.Alignment(None, None, {"width": WIDTH}, config, 2, 0.5, 24, 0, torch.float32)
    projector = alignment.projector()
    groups = {p: group for group in alignment.groups(projector, 1.0, 0.1) for p in group["params"]}
    assert list(groups) != [] and set(groups) == set(projector.parameters())
    factor = 16 / config.hidden_size
    assert factor < 1 and groups[projector[0].weight]["lr"] == factor
    for name, parameter in projector.named_parameters():
        group = groups[parameter]
        assert group["lr"] * group["weight_decay"] == (pytest.approx(0.1) if name.endswith("weight") else 0)
    wide = Projector(1024, 2048, 16)
    wide.draw()
    assert wide[0].weight.std().item() == pytest.approx(1024**-0.5, rel=0.01)


def test_the_benchmark_trains_like_the_loop_and_knows_its_places(encoder):
    """A weight of 0 changes nothing, another one does."""
    training, held_out = (endless.Scenes(half) for half in split_digits())
    config = build_config("DiT-Nano/2", input_size=16, patch_size=4, in_channels=3, num_classes=100)

    def losses(*weight_and_until) -> torch.Tensor:
        torch.manual_seed(0)
        model, alignment = DiT(config), None
        if weight_and_until:
            weight, until = weight_and_until
            small, known = Encoder(str(encoder)), {"width": WIDTH}
            alignment = representation.Alignment(small, None, known, config, 2, weight, 24, until, torch.float32)
        return digits_runs.train(model, training, held_out, 0, 0, 2, 2, draws=1, alignment=alignment)[-1].losses

    plain = losses()
    assert torch.equal(losses(0.0, 0), plain)
    assert not torch.equal(losses(0.5, 1), plain)
    places = digits_of(torch.tensor([37])).view(4, 4)
    assert places.tolist() == [[3, 3, 7, 7], [3, 3, 7, 7], [7, 7, 3, 3], [7, 7, 3, 3]]
