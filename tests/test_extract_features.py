"""Extraction compared with the autoencoder by hand, with training from images, and with itself: cut among processes,
killed, resumed, damaged.
"""

import functools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script, write_images
from faults import Child, wait_until
from PIL import Image

import autoencoders
import cli
import data
import extract_features
import train
from autoencoders import load_space
from cli import RunStopped, UsageError
from data import ImageData
from latents import LatentShards

NANO = ["--model", "DiT-Nano/2", "--num-classes", "4", "--num-workers", "0", "--global-batch-size", "8", "--device=cpu"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """2 times smaller, 4 channels; scale and shift are not 1 and 0."""
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def save_autoencoder(folder: Path, log_variance: torch.Tensor | None = None, mean: float | None = None) -> Path:
    """With `log_variance` (4,) the posterior's does not depend on the image; nor with `mean` its mean."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    options = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    vae = AutoencoderKL(**options, **blocks, scaling_factor=0.5, shift_factor=0.25)
    with torch.no_grad():
        for part, value in ((slice(0, 4), mean), (slice(4, 8), log_variance)):
            if value is not None:
                vae.quant_conv.weight[part] = 0
                vae.quant_conv.bias[part] = value
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", per_class=5, size=16)


def flags(images: Path, vae: Path, features: Path, *more) -> list[str]:
    argv = ["--data-path", images, "--vae-path", vae, "--features-path", features, "--image-size", 16, "--device=cpu"]
    return [str(word) for word in [*argv, "--num-workers", 0, "--shard-size", 6, "--batch-size", 4, *more]]


def extract(images: Path, vae: Path, features: Path, *more) -> Path:
    """In this process; later flags win."""
    extract_features.main(extract_features.get_parser().parse_args(flags(images, vae, features, *more)))
    return features


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def refused(main, parser: cli.Parser, argv: list, capsys, code: int = 2) -> str:
    """The one line that the command line answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [parser.prog, *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli.run(main, parser)
    assert end.value.code == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"{parser.prog}: ")
    return line


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@torch.no_grad()
def test_shards_hold_the_moments_of_images_and_mirror_images(images, autoencoder, tmp_path, capsys):
    folder = extract(images, autoencoder, tmp_path / "f", "--model", "DiT-XL/2")
    assert {path.name for path in folder.iterdir()} == {
        *("manifest.json", "images.json"),
        *(f"shard-0000{number}.npy" for number in range(4)),
    }
    assert "20 images (0 unreadable, replaced) of 4 classes, 4 shards" in capsys.readouterr().out

    vae = load_space(str(autoencoder)).vae
    names = json.loads((folder / "images.json").read_text())
    for index, name in enumerate(names):
        stored = np.load(folder / f"shard-0000{index // 6}.npy", mmap_mode="r")[index % 6]
        assert (stored.dtype, stored.shape) == (np.float16, (2, 2, 4, 8, 8))
        pixels = torch.tensor(np.asarray(Image.open(images / name))).permute(2, 0, 1) / 127.5 - 1
        for x, (mean, std) in zip((pixels, pixels.flip(-1)), torch.tensor(stored).float(), strict=True):
            posterior = vae.encode(x[None]).latent_dist
            torch.testing.assert_close(mean, posterior.mean[0], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(std, posterior.std[0], rtol=1e-3, atol=1e-5)


def test_the_manifest_says_all_about_them(images, autoencoder, tmp_path):
    folder = extract(images, autoencoder, tmp_path / "f")
    manifest = manifest_of(folder)
    facts = autoencoders.space_info(str(autoencoder))
    dataset = ImageData(str(images), 16, facts, seed=0)
    assert manifest["data"] == {
        "samples": 20,
        "fingerprint": dataset.fingerprint(),
        "reading": {"background": "white", "upright": True},
        "class_names": ["class0", "class1", "class2", "class3"],
        "class_counts": [5] * 4,
    }
    assert len(manifest["autoencoder"].pop("sha256")) == 64
    assert manifest["autoencoder"] == facts.config() | {"shift_factor": 0.25}
    assert manifest["autoencoder"]["scaling_factor"] == 0.5
    said = {key: manifest[key] for key in ("format", "image_size", "dtype", "item_shape", "shard_size", "precision")}
    assert said == {"format": 1, "image_size": 16, "dtype": "float16", "item_shape": [2, 2, 4, 8, 8], "shard_size": 6,
                    "precision": "fp32"}  # fmt: skip
    assert set(manifest["versions"]) == {"torch", "diffusers", "numpy"} and manifest["unreadable"] == 0
    assert [shard["labels"] for shard in manifest["shards"]] == [[[0, 5], [1, 1]], [[1, 4], [2, 2]], [[2, 3], [3, 3]],
                                                                 [[3, 2]]]  # fmt: skip
    features = LatentShards(folder, 16, seed=0)
    assert features.labels.tolist() == dataset.labels.tolist() and features.class_names == dataset.class_names
    assert features.name_of(7) == f"class1/002.png ({folder / 'shard-00001.npy'}, row 1)"
    assert features.space == facts


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_training_sees_the_same_samples_from_features_as_from_images(images, autoencoder, tmp_path, dtype):
    space = load_space(str(autoencoder))
    dataset = ImageData(str(images), 16, space, seed=3)
    features = LatentShards(extract(images, autoencoder, tmp_path / "f", "--dtype", dtype), 16, seed=3)
    assert len(features) == len(dataset) and features.latent_shape == dataset.latent_shape
    for epoch in range(2):
        keys = [(epoch, index) for index in range(20)]
        batch = torch.utils.data.default_collate([dataset[key] for key in keys])
        same = features.__getitems__(keys)
        assert batch.keys() == same.keys()
        for name in batch.keys() - {"x"}:
            assert torch.equal(batch[name], same[name]), name
        latents = space.encode(batch["x"], batch["vae_noise"])
        tolerance = dict(rtol=2**-10, atol=2**-11) if dtype == "fp16" else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(same["x"], latents, **tolerance)
        straight = space.encode(dataset_without_flips(dataset, keys), batch["vae_noise"])
        assert (straight - latents).flatten(1).abs().amax(1).gt(0.01).any()  # some were mirrored


def dataset_without_flips(dataset: ImageData, keys) -> torch.Tensor:
    return torch.stack([data.to_unit_range(dataset.pixels(index)[0]) for _, index in keys])


def losses(results: Path, *more) -> list[float]:
    argv = [
        *NANO,
        "--image-size",
        "16",
        "--num_experts",
        "4",
        "--rf",
        "--max-steps",
        "6",
        "--log-every",
        "1",
        "--lr=1e-3",
    ]
    train.main(train.get_parser().parse_args([*argv, "--results-dir", str(results), *map(str, more)]))
    lines = next(results.glob("*/metrics.jsonl")).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("fp32", 1e-5)])
def test_losses_from_features_are_those_from_images(images, autoencoder, tmp_path, dtype, tolerance):
    features = extract(images, autoencoder, tmp_path / "f", "--dtype", dtype)
    expected = losses(tmp_path / "a", "--data-path", images, "--vae-path", autoencoder)
    found = losses(tmp_path / "b", "--feature-path", features, "--num-workers", 2)
    assert len(set(expected)) == 6 and found == pytest.approx(expected, rel=tolerance)
    for run, part in (("a", "data"), ("b", "features")):
        record = json.loads(next((tmp_path / run).glob("*/checkpoints/0000006/config.json")).read_text())
        assert record["space"]["path"] == str(autoencoder), part  # though --vae-path was not given
        assert record["data"]["class_names"] == ["class0", "class1", "class2", "class3"]


def test_sample_grids_from_features_load_the_autoencoder(images, autoencoder, tmp_path, capsys):
    features = extract(images, autoencoder, tmp_path / "f")
    argv = ["--feature-path", features, "--vae-path", autoencoder, "--sample-every", 6]
    losses(tmp_path / "a", *argv)
    assert len(list((tmp_path / "a").glob("*/samples/*.png"))) == 1

    from diffusers import AutoencoderKL

    other = tmp_path / "other"
    config = AutoencoderKL.load_config(autoencoder) | {"scaling_factor": 0.75}
    AutoencoderKL.from_config(config).save_pretrained(other)
    line = refused(
        train.main, train.get_parser(), [*NANO, "--image-size", 16, *argv[:2], "--vae-path", other, *argv[4:]], capsys
    )
    assert re.search("with scaling_factor 0.5; --vae-path .*other has 0.75", line)


@pytest.mark.parametrize("log_variance", [-1000.0, -30.0, -18.0, 0.0, 20.0, 1000.0])
def test_float16_keeps_every_deviation_that_an_autoencoder_can_give(images, tmp_path, log_variance):
    vae = save_autoencoder(tmp_path / "vae", log_variance=torch.full((4,), log_variance))
    folder = extract(images, vae, tmp_path / "f")
    std = np.load(folder / "shard-00000.npy")[:, :, 1].astype(np.float64)
    exact = np.exp(np.clip(log_variance, -30, 20) / 2)  # AutoencoderKL's limits
    step = 2.0**-24  # the smallest number of float16
    assert np.isfinite(std).all() and (std > 0).all()
    assert np.abs(std - exact).max() <= max(step / 2, exact * 2**-11)

    exactly = LatentShards(extract(images, vae, tmp_path / "g", "--dtype", "fp32"), 16, seed=0)
    item, same = LatentShards(folder, 16, seed=0)[0, 3], exactly[0, 3]
    torch.testing.assert_close(item["x"], same["x"], rtol=2**-10, atol=2**-10)


def test_moments_beyond_float16_stop_the_extraction(images, tmp_path, capsys):
    vae = save_autoencoder(tmp_path / "vae", mean=1e5)
    argv = flags(images, vae, tmp_path / "f")
    line = refused(extract_features.main, extract_features.get_parser(), argv, capsys, code=1)
    assert re.search("class0/000.png are not finite in float16: --dtype fp32, or another autoencoder", line)
    mean = np.load(extract(images, vae, tmp_path / "g", "--dtype", "fp32") / "shard-00000.npy")[:, :, 0]
    assert (mean == 1e5).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_other_precisions_are_near(images, autoencoder, tmp_path, precision):
    exact = np.load(extract(images, autoencoder, tmp_path / "a") / "shard-00000.npy").astype(np.float64)
    near = np.load(extract(images, autoencoder, tmp_path / "b", "--precision", precision) / "shard-00000.npy")
    assert manifest_of(tmp_path / "b")["precision"] == precision
    error = np.abs(near - exact).max() / exact.std()
    assert error < (0.1 if precision == "bf16" else 0.02)
    assert (error == 0) == (precision == "tf32")  # which a CPU does not have


def test_a_batch_that_overflows_in_float16_is_encoded_in_float32(images, autoencoder, tmp_path, monkeypatch):
    exact = content(extract(images, autoencoder, tmp_path / "a"))
    moments = autoencoders.LatentVAE.moments

    def overflowing(self, x, dtype=torch.float32):
        mean, std = moments(self, x)
        return (mean * float("nan"), std) if dtype == torch.float16 else (mean, std)

    monkeypatch.setattr(autoencoders.LatentVAE, "moments", overflowing)
    found = content(extract(images, autoencoder, tmp_path / "b", "--precision", "fp16"))
    assert all(found[name] == exact[name] for name in exact if name.endswith(".npy"))


# ---------------------------------------------------------------------------------------------------------------------
# How it is written


def test_batches_and_workers_do_not_change_the_features(images, autoencoder, tmp_path):
    """Batches of another size differ by rounding alone; workers by nothing."""
    expected = content(extract(images, autoencoder, tmp_path / "a"))
    assert content(extract(images, autoencoder, tmp_path / "b", "--num-workers", 2)) == expected
    extract(images, autoencoder, tmp_path / "c", "--batch-size", 32)
    for number in range(4):
        found, same = (np.load(tmp_path / f / f"shard-0000{number}.npy").astype(float) for f in "ac")
        np.testing.assert_allclose(found, same, rtol=2**-10, atol=1e-6)


def test_a_compiled_autoencoder_gives_the_same_features(images, autoencoder, tmp_path, monkeypatch, capsys):
    """Traced, and run without Inductor, which would take half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    extract(images, autoencoder, tmp_path / "a")
    assert "convolutions" not in capsys.readouterr().out  # by itself on a GPU alone
    extract(images, autoencoder, tmp_path / "b", "--compile")
    for number in range(4):
        found, same = (np.load(tmp_path / f / f"shard-0000{number}.npy").astype(float) for f in "ab")
        np.testing.assert_allclose(found, same, rtol=2**-10, atol=1e-6)
    assert "convolutions compiled, in " in capsys.readouterr().out


@pytest.mark.slow
def test_processes_do_not_change_the_features(images, autoencoder, tmp_path):
    alone = content(extract(images, autoencoder, tmp_path / "a"))
    result = script("extract_features.py", *flags(images, autoencoder, tmp_path / "b"), processes=2)
    assert content(tmp_path / "b") == alone
    assert result.stdout.count("20 images (0 unreadable") == 1 and "images/s" in result.stdout
    result = script("extract_features.py", "--features-path", tmp_path / "b", "--verify", "--device=cpu", processes=2)
    assert result.stdout.count("4 shards, every byte as the manifest says") == 1

    damaged = tmp_path / "b" / "shard-00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    arguments = ("--features-path", tmp_path / "b", "--verify", "--device=cpu")
    result = script("extract_features.py", *arguments, processes=2, check=None)
    assert result.returncode and result.stderr.count("shard-00001.npy is damaged: its SHA-256") == 1


def slow_encoding(monkeypatch, seconds: float = 0.05) -> None:
    encode = extract_features.encode

    def slowly(*arguments):
        time.sleep(seconds)
        return encode(*arguments)

    monkeypatch.setattr(extract_features, "encode", slowly)


def test_a_killed_extraction_goes_on_where_it_was(images, autoencoder, tmp_path, monkeypatch, capsys):
    whole = content(extract(images, autoencoder, tmp_path / "whole"))
    folder = tmp_path / "f"
    with monkeypatch.context() as patch:
        slow_encoding(patch)
        child = Child(lambda: extract(images, autoencoder, folder), tmp_path / "output")
        wait_until(lambda: len(list(folder.glob("shard-*.json"))) == 2 and list(folder.glob(".unfinished-*")))
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert not (folder / "manifest.json").exists() and list(folder.glob(".unfinished-shard-00002*"))
    line = refused(train.main, train.get_parser(), [*NANO, "--image-size", 16, "--feature-path", folder], capsys)
    assert "has not finished: run the same extract_features.py command again" in line
    line = refused(
        extract_features.main, extract_features.get_parser(), ["--features-path", folder, "--verify"], capsys
    )
    assert "has not finished" in line

    finished = {name: (folder / name).stat() for name in ("shard-00000.npy", "shard-00001.npy")}
    extract(images, autoencoder, folder)
    assert content(folder) == whole
    for name, before in finished.items():
        after = (folder / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "was made anew"


def test_what_is_complete_is_left_alone(images, autoencoder, tmp_path, monkeypatch, capsys):
    folder = extract(images, autoencoder, tmp_path / "f")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = tmp_path / "moved"
    for source in sorted(autoencoder.iterdir()):  # the same autoencoder in another place
        moved.mkdir(exist_ok=True)
        (moved / source.name).write_bytes(source.read_bytes())
    extract(images, moved, folder, "--batch-size", 3)
    assert "complete already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("lost", ["shard-00002.npy", "images.json"])
def test_a_deleted_file_is_made_again(images, autoencoder, tmp_path, lost):
    folder = extract(images, autoencoder, tmp_path / "f")
    before = content(folder)
    kept = (folder / "shard-00000.npy").stat().st_ino
    (folder / lost).unlink()
    extract(images, autoencoder, folder)
    assert content(folder) == before and (folder / "shard-00000.npy").stat().st_ino == kept


def test_a_kill_while_the_last_files_are_written_loses_nothing(images, autoencoder, tmp_path, monkeypatch):
    """Whichever write it is that does not happen any more."""
    whole = content(extract(images, autoencoder, tmp_path / "whole"))
    folder = extract(images, autoencoder, tmp_path / "f")
    (folder / "shard-00001.npy").unlink()  # so that opening has to write as well

    class Killed(BaseException):
        pass

    deaths = 0
    for survived in range(100):
        writes = iter(range(survived))
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "unlink")):
                function = getattr(owner, name)

                def dying(*arguments, function=function, writes=writes, **named):
                    if next(writes, None) is None:
                        raise Killed
                    return function(*arguments, **named)

                patch.setattr(owner, name, dying)
            try:
                extract(images, autoencoder, folder)
            except Killed:
                deaths += 1
                continue
        break
    assert deaths > 5 and content(folder) == whole


def test_verify_finds_every_kind_of_damage(images, autoencoder, tmp_path, capsys):
    folder = extract(images, autoencoder, tmp_path / "f")
    argv = ["--features-path", folder, "--verify", "--device", "cpu"]
    extract_features.main(extract_features.get_parser().parse_args([str(word) for word in argv]))
    assert "4 shards, every byte as the manifest says" in capsys.readouterr().out
    for name, change, words in (
        ("shard-00002.npy", lambda old: old[:500] + bytes([old[500] ^ 4]) + old[501:], "its SHA-256"),
        ("shard-00003.npy", lambda old: old[:-1], "it has .* bytes, not"),
        ("images.json", lambda old: old.replace(b"class0", b"class9"), "its SHA-256"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(change(before))
        line = refused(extract_features.main, extract_features.get_parser(), argv, capsys, code=1)
        assert re.search(f"{name} is damaged: {words}.*delete that file", line)
        (folder / name).write_bytes(before)


def test_damage_between_writing_and_the_end_is_found(images, autoencoder, tmp_path, monkeypatch, capsys):
    wait_for_all = extract_features.wait_for_all

    def meanwhile(job):
        wait_for_all(job)
        path = job.folder / "shard-00001.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    with monkeypatch.context() as patch:
        patch.setattr(extract_features, "wait_for_all", meanwhile)
        argv = flags(images, autoencoder, tmp_path / "f")
        line = refused(extract_features.main, extract_features.get_parser(), argv, capsys, code=1)
    assert re.search("shard-00001.npy is damaged: its SHA-256.*delete that file", line)
    (tmp_path / "f" / "shard-00001.npy").unlink()
    extract(images, autoencoder, tmp_path / "f")
    assert content(tmp_path / "f") == content(extract(images, autoencoder, tmp_path / "whole"))


def test_a_full_disk_keeps_what_is_finished(images, autoencoder, tmp_path, monkeypatch):
    folder, output = tmp_path / "f", tmp_path / "output"
    slow_encoding(monkeypatch)
    command = [*flags(images, autoencoder, folder)]

    def work():
        sys.argv = ["extract_features.py", *command]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
        cli.run(extract_features.main, extract_features.get_parser())

    child = Child(work, output)
    wait_until((folder / "shard-00000.json").exists)
    child.limit_file_size(1000)
    assert child.wait() == 1
    assert re.search("stopped: .*shard-0000.* not written .*finished shards are kept", output.read_text())
    assert not list(folder.glob(".unfinished-*")) and not (folder / "manifest.json").exists()
    extract(images, autoencoder, folder)
    assert content(folder) == content(extract(images, autoencoder, tmp_path / "whole"))


def test_progress_tells_speed_and_time_left(images, autoencoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract_features, "REPORT_EVERY", 0)
    extract(images, autoencoder, tmp_path / "f")
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert [int(line.split("/")[0]) for line in lines] == [4, 6, 10, 12, 16, 18, 20, 20]
    assert all(re.fullmatch(r"\d+/20 images \(\d+\.0%\)  \d+\.\d images/s  \d:\d\d:\d\d left", line) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images


def test_an_unreadable_image_is_replaced_as_in_training(images, autoencoder, tmp_path, capsys):
    (images / "class1" / "004.png").write_text("no image")  # its successor is of another class
    folder = extract(images, autoencoder, tmp_path / "f")
    assert "unreadable image, replaced by its successor" in (out := capsys.readouterr().out) and "(1 unreadable" in out
    manifest = manifest_of(folder)
    assert manifest["unreadable"] == 1 and manifest["data"]["class_counts"] == [5, 4, 6, 5]
    assert [shard["unreadable"] for shard in manifest["shards"]] == [
        [], [{"index": 9, "name": "class1/004.png"}], [], []
    ]  # fmt: skip

    space = load_space(str(autoencoder))
    dataset, features = ImageData(str(images), 16, space, seed=3), LatentShards(folder, 16, seed=3)
    for index in (8, 9, 10):
        expected, found = dataset[0, index], features[0, index]
        for name in ("y", "index", "unreadable", "noise"):
            assert torch.equal(expected[name], found[name]), name
        latents = space.encode(expected["x"][None], expected["vae_noise"][None])[0]
        torch.testing.assert_close(found["x"], latents, rtol=2**-10, atol=2**-11)
    assert found["unreadable"] == -1 and features[0, 9]["unreadable"] == 9 and features[0, 9]["y"] == 2


def test_too_many_unreadable_images_stop_it(images, autoencoder, tmp_path, capsys):
    for name in ("class1/004.png", "class3/000.png"):
        (images / name).write_text("no image")
    for attempt in range(2):  # those of finished shards are not forgotten
        argv = flags(images, autoencoder, tmp_path / "f", "--batch-size", 2 + attempt)
        line = refused(extract_features.main, extract_features.get_parser(), argv, capsys, code=1)
        assert re.search(r"2 of 20 images \(10\.0%.*cannot be read, among them .*class1/004.png", line)
        assert [path.name for path in sorted((tmp_path / "f").glob("*.npy"))] == ["shard-00000.npy", "shard-00001.npy"]


def test_unreadable_images_of_all_processes_count(images, autoencoder, tmp_path):
    """Each process tolerates its own; together they are too many."""
    args = extract_features.get_parser().parse_args(flags(images, autoencoder, tmp_path / "f"))
    for name in ("class0/001.png", "class3/000.png"):
        (images / name).write_text("no image")
    alone = extract_features.distributed.start("cpu")
    job = extract_features.prepare(args, alone)
    for mine in ([0, 1], [2, 3]):
        job.mine = mine
        extract_features.extract(job)
    with pytest.raises(RunStopped, match="2 of 20 images"):
        extract_features.finish(job)
    assert not (tmp_path / "f" / "manifest.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--image-size", 8], "image_size was 16, is 8"),
        (["--dtype", "fp32"], "dtype was float16, is float32"),
        (["--shard-size", 7], "shard_size was 6, is 7"),
        (["--precision", "bf16"], "precision was fp32, is bf16"),
        ("vae", "autoencoder sha256 was .*, is "),
        ("images", "data samples was 20, is 21; data fingerprint was"),
    ],
)
def test_other_settings_or_images_are_refused_and_harm_nothing(
    images, autoencoder, tmp_path, capsys, change, words, complete
):
    folder = extract(images, autoencoder, tmp_path / "f")
    if not complete:
        extract_features.reopen(folder, manifest_of(folder), dict(enumerate(manifest_of(folder)["shards"][:2])))
    before = content(folder)
    if change == "vae":
        autoencoder = save_autoencoder(tmp_path / "other", mean=0.0)
    if change == "images":
        Image.new("RGB", (16, 16)).save(images / "class0" / "new.png")
    argv = flags(images, autoencoder, folder, *(change if isinstance(change, list) else []))
    line = refused(extract_features.main, extract_features.get_parser(), argv, capsys)
    assert re.search(f"holds features of other settings or images: .*{words}.*give another folder", line), line
    assert content(folder) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data-path", "nowhere"], "data path nowhere does not exist"),
        (["--vae-path", "none"], "--vae-path none has nothing to extract"),
        (["--vae-path", "./nowhere"], "nowhere"),
        (["--image-size", "17"], "17 is not divisible by 2"),
        (["--image-size", "0"], "at least 1, got '0'"),
        (["--features-path", "LICENSE"], "--features-path .*LICENSE cannot be written: File exists"),
        (["--features-path", "images"], "images holds other files; give a new or empty folder"),
        (["--shard-size", "0"], "at least 1, got '0'"),
        (["--dtype", "bf16"], "invalid choice: 'bf16'"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--verify"], "no manifest.json in .*f: not a folder that extract_features.py has written"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
    ],
)
def test_wrong_input_gets_one_line(images, autoencoder, tmp_path, capsys, monkeypatch, change, words):
    if change == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LICENSE").write_text("")
    before = sorted(tmp_path.rglob("*"))
    argv = flags(images, autoencoder, tmp_path / "f", *change)
    line = refused(extract_features.main, extract_features.get_parser(), argv, capsys)
    assert re.search(words, line), line
    assert sorted(tmp_path.rglob("*")) == before, "wrong input must leave nothing behind"


def test_missing_paths_are_named(images, autoencoder, tmp_path, capsys):
    parser = extract_features.get_parser()
    line = refused(extract_features.main, parser, ["--features-path", tmp_path / "f", "--device", "cpu"], capsys)
    assert "--data-path is missing" in line
    assert "--features-path" in refused(extract_features.main, parser, ["--data-path", images], capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image-size", 32], "images of 16 pixels, not 32: --image-size 16"),
        (["--num-classes", 3], "the data has 4 classes, --num-classes allows 3"),
        (["damage"], "shard-00002.npy is damaged: it has .* delete that file"),
        (["missing"], "no manifest.json in"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_training(images, autoencoder, tmp_path, capsys, more, words):
    folder = extract(images, autoencoder, tmp_path / "f")
    if more == ["damage"]:
        os.truncate(folder / "shard-00002.npy", 300)
    if more == ["missing"]:
        (folder / "manifest.json").unlink()
    more = more if len(more) > 1 else []
    argv = [*NANO, "--image-size", 16, "--feature-path", folder, "--results-dir", tmp_path / "results", *more]
    assert re.search(words, refused(train.main, train.get_parser(), argv, capsys))
    assert not (tmp_path / "results").exists()


def test_shard_sizes():
    choose = extract_features.choose_shard_size
    assert [choose(None, n) for n in (1, 50_000, 512 * 1024, 512 * 1024 + 1, 1_281_167, 14_197_122)] == [
        *(1024, 1024, 1024, 2048, 4096, 32768)
    ]
    assert choose(3, 1536) == 3
    with pytest.raises(UsageError, match="--shard-size 3 would make 513 files, .*; 4 or more makes at most 512"):
        choose(3, 1537)


def test_the_script_as_a_user_runs_it(images, autoencoder, tmp_path):
    result = script("extract_features.py", *flags(images, autoencoder, tmp_path / "f"), "--vae", autoencoder)
    assert "20/20 images (100.0%)" in result.stdout and not result.stderr
