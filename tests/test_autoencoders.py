"""Autoencoders of several classes, and latents that are standardised channel by channel."""

import json

import numpy as np
import pytest
import torch
from conftest import read_json, write_images
from test_extract_features import extract, manifest_of, refused

import autoencoders
import sample
import sampling
import train
from autoencoders import Statistics
from cli import UsageError
from configuration import build_config, row_name
from latents import LatentShards


def dc(folder):
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    both = {
        "block_out_channels": (16, 16, 16), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ()),
    }  # fmt: skip
    options = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()}
    AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.41, **options).save_pretrained(folder)
    return folder


def tiny(folder):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(latent_channels=4, **blocks).save_pretrained(folder)
    return folder


def with_statistics(folder):
    """As VA-VAE: 4 channels, each with a mean and a deviation in config.json."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    numbers = dict(scaling_factor=0.5, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.1, 0.2, 0.3, 0.4))
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks, **numbers).save_pretrained(
        folder
    )
    return folder


MADE = {
    "AutoencoderDC": (dc, 8, 4, 0.41),
    "AutoencoderTiny": (tiny, 4, 2, 1.0),
    "AutoencoderKL": (with_statistics, 4, 2, 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", MADE)
def test_an_autoencoder_is_opened_by_its_class(tmp_path, kind):
    make, channels, factor, scale = MADE[kind]
    space = autoencoders.load_space(str(make(tmp_path / "vae")))
    assert (space.kind, space.channels, space.downsample, space.scaling_factor) == (kind, channels, factor, scale)
    assert autoencoders.SpaceInfo.recorded(space.record()) == autoencoders.space_info(str(tmp_path / "vae"))
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, channels, 16 // factor, 16 // factor)
    encoded = space.vae.encode(x)
    if kind == "AutoencoderKL":
        own = encoded.latent_dist.mean + encoded.latent_dist.std * noise
        mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ((1.0, 2.0, 3.0, 4.0), (0.1, 0.2, 0.3, 0.4)))
        expected = (own - mean) / std * scale
    else:
        own = encoded.latent if kind == "AutoencoderDC" else encoded.latents
        expected = own * scale
    latents = space.encode(x, noise)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(space.decode(latents), space.vae.decode(own).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_statistics_that_do_not_fit_are_refused(tmp_path):
    folder = with_statistics(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    for field, words in {
        "latents_mean": "statistics of 3 channels, and 4",
        "latents_std": "latents_std.2 is 0.0",
    }.items():
        wrong = config | ({field: [1.0, 2.0, 3.0]} if field == "latents_mean" else {field: [1.0, 1.0, 0.0, 1.0]})
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=words):
            autoencoders.space_info(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="latent statistics of 2 channels, .* has 4"):
        autoencoders.space_info(str(folder), Statistics((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(UsageError, match="--vae-path none has pixels"):
        autoencoders.space_info("none", Statistics((0.0,), (1.0,)))
    (tmp_path / "odd.json").write_text("{}")
    torch.save({"mean": torch.zeros(1, 4, 1, 1)}, tmp_path / "odd.pt")
    for name, words in {
        "odd.json": "has no latents_mean",
        "odd.pt": "expected mean and std",
        "x": "does not exist",
    }.items():
        with pytest.raises(UsageError, match=words):
            autoencoders.read_statistics(tmp_path / name)
    torch.save({"mean": torch.arange(4.0).view(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "vavae.pt")
    assert autoencoders.read_statistics(tmp_path / "vavae.pt") == Statistics((0.0, 1.0, 2.0, 3.0), (1.0,) * 4)


def test_measured_statistics_from_extraction_to_images(tmp_path, capsys):
    """Deep latents, rows of patch 1: features tell their statistics, runs keep them, and sampling takes no others."""
    images, vae = write_images(tmp_path / "images", per_class=5, size=16), dc(tmp_path / "vae")
    features = extract(images, vae, tmp_path / "f")
    measured, shards = manifest_of(features)["statistics"], sorted(features.glob("shard-*.npy"))
    moments = np.concatenate([np.load(shard) for shard in shards]).astype(np.float64)  # (n,2,2,C,h,w)
    assert not moments[:, :, 1].any()  # one latent alone
    mean, std = moments[:, :, 0].mean(axis=(0, 1, 3, 4)), moments[:, :, 0].std(axis=(0, 1, 3, 4))
    np.testing.assert_allclose(measured["latents_mean"], mean, atol=1e-6)
    np.testing.assert_allclose(measured["latents_std"], std, rtol=1e-5)

    data = LatentShards(features, 16, seed=0, flip=True)
    data.space.standardised(autoencoders.read_statistics(features))
    x = torch.stack([data[epoch, index]["x"] for epoch in range(4) for index in range(len(data))])
    assert x.mean((0, 2, 3)).abs().max() < 0.2 and (x.std((0, 2, 3)) - 1).abs().max() < 0.2

    argv = ["--model", "DiT-Nano/1", "--num-classes", 4, "--num-workers", 0, "--global-batch-size", 8, "--device=cpu"]
    argv += ["--max-steps", 1, "--results-dir", tmp_path / "results", "--feature-path", features, "--rf"]
    train.main(train.get_parser().parse_args([*map(str, argv), "--latent-stats", str(features)]))
    (run,) = (tmp_path / "results").iterdir()
    space = read_json(run / "checkpoints" / "0000001", "config")["space"]
    assert (
        space["kind"] == "AutoencoderDC"
        and space["scaling_factor"] == 1
        and space["latents_std"] == measured["latents_std"]
    )
    line = refused(train.main, train.get_parser(), [*argv, "--resume", run], capsys)
    assert "cannot resume" in line and "space latents_mean was" in line

    args = ["--ckpt", str(run), "--seed", "1"]
    loaded = sampling.load_for_sampling(sample.get_parser().parse_args(args), torch.device("cpu"))
    assert loaded.space.statistics == Statistics.of(measured) and loaded.model.config.patch_size == 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}))
    line = refused(sample.main, sample.get_parser(), [*args, "--latent-stats", other], capsys)
    assert "--latent-stats contradict" in line and "trained with other ones" in line
    (vae / "config.json").write_text(
        json.dumps(json.loads((vae / "config.json").read_text()) | json.loads(other.read_text()))
    )
    line = refused(sample.main, sample.get_parser(), args, capsys)
    assert "has other statistics of its channels" in line and "give the autoencoder of its training" in line


def test_rows_of_patch_1():
    config = build_config("DiT-XL/1", in_channels=32, input_size=8)
    assert config.tokens == 64 and row_name(config) == "DiT-XL/1" and config.hidden_size == 1152
