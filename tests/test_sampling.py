"""Sampling from trained checkpoints and from published files; images depend on seed, index and label alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_json, script
from PIL import Image

import families
import sample
import sample_ddp
import sampling
import train
from autoencoders import PixelSpace
from cli import RunStopped, UsageError
from data import draw_randomness
from diffusion import GaussianDiffusion, RectifiedFlow, classifier_free_guidance
from models import build_model

TINY = ["--model", "DiT-Nano/2", "--num_experts", "4", "--vae-path", "none", "--image-size", "8", "--num-classes", "4"]


def trained(images: Path, *flags) -> Path:
    """A run of two steps whose weights are then made random, so that images depend on everything."""
    argv = [*TINY, "--rf", "--num-workers", "0", "--data-path", str(images), "--global-batch-size", "8", "--max-steps"]
    argv += ["2", "--results-dir", str(images.parent / "results"), *map(str, flags)]
    train.main(train.get_parser().parse_args(argv))
    return max((images.parent / "results").iterdir())


def draw(*flags) -> tuple[np.ndarray, Path]:
    args = sample.get_parser().parse_args([str(f) for f in flags])
    sample.main(args)
    with np.load(args.output / "samples.npz") as file:
        return file["arr_0"], args.output


def random_model(**options):
    torch.manual_seed(0)
    options = dict(input_size=8, in_channels=3, num_classes=4, num_experts=4) | options
    model = build_model("DiT-Nano/2", **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def generate(model, objective, labels, batch_size=32, indices=None, **settings) -> np.ndarray:
    defaults = dict(steps=4, sampler=objective.samplers[0], cfg_scale=2.0)
    settings = sampling.Settings(**(defaults | settings))
    batches = sampling.generate(
        model, objective, PixelSpace(), labels, settings, batch_size=batch_size, indices=indices
    )
    return np.concatenate(list(batches))


@pytest.mark.parametrize("objective", [RectifiedFlow(), GaussianDiffusion()], ids=lambda o: o.name)
def test_an_image_depends_on_its_seed_index_and_label_alone(objective):
    model, labels = random_model(), [0, 1, 2, 3, 1]
    together = generate(model, objective, labels).astype(int)
    for batch_size in (1, 2):
        assert np.abs(generate(model, objective, labels, batch_size) - together).max() <= 1
    last = generate(model, objective, [1], indices=[4]).astype(int)
    assert np.abs(last[0] - together[4]).max() <= 1
    assert np.abs(together[1] - together[4]).max() > 20  # the same label, another index
    assert np.abs(generate(model, objective, labels, seed=1).astype(int) - together).max() > 20


def test_noise_does_not_depend_on_the_batch():
    shape, cpu = (3, 8, 8), torch.device("cpu")
    whole = sampling.ImageNoise(7, [0, 1, 2], shape, cpu)
    first, second = whole(), whole()
    alone = sampling.ImageNoise(7, [2], shape, cpu)
    assert torch.equal(alone()[0], first[2]) and torch.equal(alone()[0], second[2])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler", "heun"])
def test_every_sampler_and_guidance_setting_draws(sampler):
    objective = RectifiedFlow() if sampler in RectifiedFlow.samplers and sampler != "dpm++" else GaussianDiffusion()
    model = random_model()
    plain = generate(model, objective, [0, 1], sampler=sampler, cfg_scale=1.0)
    assert plain.shape == (2, 8, 8, 3) and plain.dtype == np.uint8
    guided = generate(model, objective, [0, 1], sampler=sampler, cfg_scale=4.0)
    never = generate(model, objective, [0, 1], sampler=sampler, cfg_scale=4.0, cfg_interval=(0.0, 0.0))
    assert (guided != plain).any() and np.abs(never.astype(int) - plain).max() <= (60 if sampler == "ddpm" else 3)


def test_sample_script_from_a_run(images, tmp_path, capsys):
    run = trained(images, "--ckpt-every", 1)
    drawn, folder = draw("--ckpt", run, "--output", tmp_path / "a", "--images-per-class", 2, "--batch-size", 3)
    assert drawn.shape == (8, 8, 8, 3)
    with np.load(folder / "samples.npz") as file:
        assert file["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {p.name for p in folder.iterdir()} == {
        "samples.npz",
        "grid.png",
        "settings.json",
        *(f"{i:06d}.png" for i in range(8)),
    }
    assert np.array_equal(np.asarray(Image.open(folder / "000005.png")), drawn[5])
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert grid.shape == (4 * 50 + 2, 2 * 50 + 2, 3) and np.array_equal(grid[2:50:6, 52:100:6], drawn[1])
    assert "8 images of 8x8 (euler50-cfg4-seed0, fp32)" in capsys.readouterr().out

    again, _ = draw("--ckpt", run / "checkpoints" / "0000002", "--output", tmp_path / "b", "--images-per-class", 2)
    assert np.abs(again.astype(int) - drawn).max() <= 1
    flags = ["--model", "DiT-Nano/2", "--rf", "--num_experts", 4, "--image-size", 8, "--vae-path", "none"]
    told, _ = draw("--ckpt", run, *flags, "--output", tmp_path / "c", "--images-per-class", 2, "--batch-size", 3)
    assert np.array_equal(told, drawn)
    chosen, folder = draw("--ckpt", run, "--class-labels", 3, 1, "--grid", 0, "--output", tmp_path / "d", "--png=False")
    assert len(chosen) == 2 and {p.name for p in folder.iterdir()} == {"samples.npz", "settings.json"}


def test_the_default_folder_tells_the_settings(images, tmp_path, monkeypatch):
    run = trained(images)
    monkeypatch.chdir(tmp_path)
    args = ["--ckpt", str(run), "--num-sampling-steps", "3", "--cfg-scale", "1.5", "--seed", "2"]
    sample.main(sample.get_parser().parse_args(args))
    assert (tmp_path / "samples" / f"{run.name}-0000002-euler3-cfg1.5-seed2" / "grid.png").is_file()


def publish(path: Path, model, rf: bool) -> Path:
    if rf:
        with torch.no_grad():
            model.final_layer.linear.weight.unflatten(0, (-1, 2, model.config.in_channels))[:, 1] = 0
    torch.save({"ema": families.to_published(model.state_dict())}, path)
    return path


def test_published_file_needs_no_flags_about_the_network(tmp_path, capsys):
    """Its shapes tell the architecture, its untrained variance rows that it is rectified flow."""
    path = publish(tmp_path / "flow.pt", random_model(), rf=True)
    silent, _ = draw("--ckpt", path, "--vae-path", "none", "--output", tmp_path / "a")
    assert "(euler50-" in capsys.readouterr().out
    flags = ["--model", "DiT-Nano/2", "--num_experts", 4, "--num_experts_per_tok", 2, "--rf", "True"]
    told, _ = draw("--ckpt", path, "--vae-path", "none", *flags, "--output", tmp_path / "b")
    assert np.array_equal(silent, told)
    other, _ = draw("--ckpt", path, "--vae-path", "none", "--num_experts_per_tok", 3, "--output", tmp_path / "c")
    assert (other != told).any()
    path = publish(tmp_path / "ddpm.pt", random_model(), rf=False)
    draw("--ckpt", path, "--vae-path", "none", "--num-sampling-steps", 5, "--output", tmp_path / "d")
    assert "(ddpm5-" in capsys.readouterr().out


def test_half_precision_weights_draw_nearly_the_same(tmp_path):
    path = publish(tmp_path / "flow.pt", random_model(), rf=True)
    exact, _ = draw("--ckpt", path, "--vae-path", "none", "--output", tmp_path / "a", "--cfg-scale", 1)
    half, _ = draw(
        "--ckpt", path, "--vae-path", "none", "--output", tmp_path / "b", "--cfg-scale", 1, "--precision=bf16"
    )
    assert np.abs(exact.astype(int) - half).mean() < 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rf", "False"], "--rf False contradicts .*trained with rf"),
        (["--num_experts", "8"], "--num_experts 8 contradicts .*which says 4"),
        (["--num_experts_per_tok", "3"], "--num_experts_per_tok 3 contradicts"),
        (["--image-size", "256"], "--image-size 256 contradicts .*which says 8"),
        (["--num-classes", "1000"], "--num-classes 1000 contradicts"),
        (["--model", "DiT-S/2"], "--model DiT-S/2 contradicts .*DiT-Nano/2, 4 experts"),
        (["--model", "DiT-S/3"], "unknown model 'DiT-S/3'; did you mean DiT-S/"),
        (["--sampler", "ddpm"], "belongs to the objective 'ddpm'"),
        (["--class-labels", "4"], r"class label 4 .*0\.\.3"),
        (["--cfg-interval", "0.5", "0.2"], "0 <= LOW <= HIGH <= 1, got 0.5 0.2"),
        (["--cfg-channels", "few"], "--cfg-channels expects a number from 1 to 3, or all, got 'few'"),
        (["--cfg-channels", "4"], "--cfg-channels expects a number from 1 to 3, or all, got '4'"),
        (["--cfg-scale", "1", "--cfg-channels", "3"], "--cfg-channels does nothing without guidance"),
        (["--cfg-scale", "1", "--cfg-interval", "0", "1"], "--cfg-interval does nothing without guidance"),
        (["--num-sampling-steps", "zero"], "zero"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(images, flags, message):
    run = trained(images)
    with pytest.raises(UsageError, match=message):
        draw("--ckpt", run, *flags, "--output", images.parent / "out")
    assert not (images.parent / "out").exists()


def test_guidance_needs_a_null_class(images):
    run = trained(images, "--class-dropout-prob", "0")
    with pytest.raises(UsageError, match="null class"):
        draw("--ckpt", run, "--output", images.parent / "out")
    assert len(draw("--ckpt", run, "--output", images.parent / "out", "--cfg-scale", 1)[0]) == 4


def test_autoencoder_must_fit(images):
    run = trained(images)
    record = run / "checkpoints" / "0000002" / "config.json"
    assert json.loads(record.read_text())["space"]["path"] == "none"
    with pytest.raises(UsageError, match="4 channels"):
        draw("--ckpt", run, "--vae-path", tiny_vae(images.parent / "vae"), "--output", images.parent / "out")


def tiny_vae(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **blocks)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_training_and_sampling_in_latent_space(tmp_path):
    """The whole chain with an autoencoder: 16-pixel images, 8x8 latents of 4 channels, DDPM."""
    from conftest import write_images

    images, vae = write_images(tmp_path / "images", size=16), tiny_vae(tmp_path / "vae")
    flags = ["--vae-path", vae, "--image-size", 16, "--rf", "False", "--sample-every", 2]
    run = trained(images, *flags)
    assert np.asarray(Image.open(run / "samples" / "0000002.png")).shape == (2 * 50 + 2, 8 * 50 + 2, 3)
    record = read_json(run / "checkpoints" / "0000002", "config")
    assert record["space"]["scaling_factor"] == 0.5 and record["model"]["input_size"] == 8
    drawn, _ = draw("--ckpt", run, "--num-sampling-steps", 5, "--output", tmp_path / "out")
    assert drawn.shape == (4, 16, 16, 3)


def test_training_from_fast_dit_features(tmp_path):
    features, labels = tmp_path / "imagenet256_features", tmp_path / "imagenet256_labels"
    features.mkdir(), labels.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        np.save(features / f"{i}.npy", rng.standard_normal((1, 4, 32, 32), dtype=np.float32))
        np.save(labels / f"{i}.npy", np.array([i % 4]))
    argv = ["--model", "DiT-Nano/2", "--feature-path", str(tmp_path), "--num-classes", "4", "--num-workers", "0"]
    argv += ["--global-batch-size", "4", "--max-steps", "2", "--results-dir", str(tmp_path / "results")]
    args = train.get_parser().parse_args(argv)
    train.main(args)
    record = read_json(tmp_path / "results/000-DiT-Nano-2-ddpm/checkpoints/0000002", "config")
    assert record["model"]["input_size"] == 32 and record["model"]["in_channels"] == 4


def test_a_broken_network_draws_nothing(tmp_path):
    model = random_model()
    torch.nn.init.constant_(model.blocks[2].attn.proj.bias, float("nan"))
    path = publish(tmp_path / "broken.pt", model, rf=True)
    with pytest.raises(RunStopped, match="NaN or infinity, from evaluation 1 of 50 of the network on"):
        draw("--ckpt", path, "--vae-path", "none", "--output", tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


def test_infinity_of_the_autoencoder_is_noticed():
    class Space:
        def decode(self, latents):
            return latents * float("inf")

    settings = sampling.Settings(2, "euler", 1.0)
    with pytest.raises(RunStopped, match="from the autoencoder on"):
        next(sampling.generate(random_model(), RectifiedFlow(), Space(), [0], settings))


@pytest.mark.parametrize("channels", [3, 4, 16])
def test_guidance_acts_on_the_channels_that_are_colours(channels):
    assert GaussianDiffusion().guided_channels(channels, "ddpm") == (3 if channels == 4 else None)
    assert GaussianDiffusion().guided_channels(channels, "dpm-solver") is None
    assert RectifiedFlow().guided_channels(channels, "euler") is None


def test_a_folder_of_another_tool_is_left_alone(tmp_path):
    path = publish(tmp_path / "flow.pt", random_model(), rf=True)
    flags = ["--ckpt", path, "--vae-path", "none", "--num-sampling-steps", 2]
    argv = [*flags, "--sample-dir", tmp_path / "set", "--num-samples", 4, "--device", "cpu"]
    sample_ddp.main(sample_ddp.get_parser().parse_args(argv))
    (folder,) = (tmp_path / "set").iterdir()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for break_mark, message in (
        (lambda: None, "holds images of sample_ddp.py: use another --output"),
        (lambda: (folder / "settings.json").write_text("["), "settings.json is not JSON.*use another --output"),
        (lambda: (folder / "settings.json").unlink(), "holds samples.npz, which this script did not make"),
    ):
        break_mark()
        with pytest.raises(UsageError, match=message):
            draw(*flags, "--output", folder)
        after = {file: file.read_bytes() for file in folder.iterdir() if file.name != "settings.json"}
        assert after == {file: content for file, content in before.items() if file.name != "settings.json"}

    mine = tmp_path / "mine"
    draw(*flags, "--output", mine, "--images-per-class", 2)
    (mine / "notes.txt").write_text("keep")
    draw(*flags, "--output", mine, "--class-labels", 1, "--grid", 0)
    assert {file.name for file in mine.iterdir()} == {"notes.txt", "samples.npz", "settings.json", "000000.png"}


def test_images_are_rounded_to_the_nearest_grey():
    class Space:
        def decode(self, latents):
            return torch.full((len(latents), 3, 8, 8), (100.6 - 127.5) / 127.5)

    settings = sampling.Settings(2, "euler", 1.0)
    assert (next(sampling.generate(random_model(), RectifiedFlow(), Space(), [0], settings)) == 101).all()


def test_noise_of_an_image_is_no_noise_of_training():
    """Images of a seed must not be those whose noise the network has seen in training with that seed."""
    shape = (3, 8, 8)
    drawn = sampling.ImageNoise(0, range(20), shape, torch.device("cpu"))()
    for epoch in range(3):
        for index in range(20):
            _, entries = draw_randomness(0, epoch, index, shape, posterior=True)
            for name in ("noise", "vae_noise"):
                closest = (drawn - entries[name]).abs().flatten(1).mean(dim=1).min()
                assert closest > 0.5


# ------------------------------------------------------------------------------------------------------- autoguidance


def test_a_weaker_network_guides():
    """weak + scale * (strong - weak), both of the label; by a network without null class too."""
    strong, weak = (lambda x, t, y, f=factor: f * x + y.view(-1, 1, 1, 1) for factor in (3.0, 1.0))
    x, y = torch.randn(2, 4, 2, 2), torch.tensor([1, 2])
    denoise = classifier_free_guidance(strong, y, None, 2.5, guide=weak)
    expected = weak(x, 0, y) + 2.5 * (strong(x, 0, y) - weak(x, 0, y))
    torch.testing.assert_close(denoise(x, 0.5), expected)
    half = classifier_free_guidance(strong, y, None, 2.5, channels=3, interval=(0.0, 0.4), guide=weak)
    assert torch.equal(half(x, 0.5), strong(x, 0, y))
    assert torch.equal(half(x, 0.2)[:, 3:], strong(x, 0, y)[:, 3:])


def test_samples_guided_by_a_checkpoint(images):
    """An earlier one of the run guides the last; itself changes nothing but rounding; others are refused."""
    flags = ["--data-path", images, "--results-dir", images.parent / "runs", "--model", "DiT-Nano/2", "--depth", 1]
    flags += ["--vae-path", "none", "--image-size", 8, "--num-classes", 4, "--num-workers", 0, "--device", "cpu"]
    flags += ["--global-batch-size", 8, "--max-steps", 2, "--ckpt-every", 1, "--lr", 0.1, "--ema-decay", 0, "--rf"]
    script("train.py", *flags)
    run = next((images.parent / "runs").iterdir())
    draw = [
        "sample.py",
        "--ckpt",
        run,
        "--device",
        "cpu",
        "--num-sampling-steps",
        3,
        "--class-labels",
        1,
        2,
        "--output",
    ]

    def drawn(name: str, *more) -> np.ndarray:
        script(*draw, images.parent / name, *more)
        return np.load(images.parent / name / "samples.npz")["arr_0"].astype(int)

    plain, guided = drawn("plain", "--cfg-scale", 1), ["--cfg-scale", 3, "--guide"]
    assert np.abs(drawn("itself", *guided, run) - plain).max() <= 1
    assert not np.array_equal(drawn("early", *guided, run / "checkpoints" / "0000001"), plain)
    settings = json.loads((images.parent / "early" / "settings.json").read_text())
    assert len(settings["guide"]) == 16
    error = script(*draw, images.parent / "no", "--cfg-scale", 1, "--guide", run, check=2).stderr
    assert "--guide does nothing without guidance" in error
    script("train.py", *flags, "--num-classes", 5, "--results-dir", images.parent / "other")
    other = next((images.parent / "other").iterdir())
    error = script(*draw, images.parent / "no", *guided, other, check=2).stderr
    assert "has num_classes 5, " in error and "Traceback" not in error
