"""Captioned images as data: several captions, tar files, SA-1B, features on disk; and runs on all of these."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_json, script
from PIL import Image
from test_extract_features import save_autoencoder

import text
from autoencoders import space_info
from caption_features import FeatureShards, in_half, write_captions
from captions import open_captioned, open_captioned_features, stored_texts
from cli import UsageError
from data import Reading, to_unit_range
from latents import read_manifest

COUNT = 12
CAPTIONS = [f"picture {['seven', 'two', 'nine', 'one'][i % 4]} of {'many ' * (i % 3)}{i}" for i in range(COUNT)]


def pixels(index: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(index)).save(file, format="png")
    return file.getvalue()


def opened(path, **options):
    return open_captioned(path, 16, space_info("none"), 0, False, Reading(), **options)


def pairs(folder, suffix="png"):
    folder.mkdir(parents=True)
    for index, caption in enumerate(CAPTIONS):
        (folder / f"{index:02d}.{suffix}").write_bytes(png(index))
        (folder / f"{index:02d}.txt").write_text(caption)
    return folder


def test_tar_files_hold_the_same_samples(tmp_path):
    plain = opened(pairs(tmp_path / "plain"))
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"{number:05d}.tar", "w") as tar:
            for index in range(number * 6, number * 6 + 6):
                for suffix, content in (("png", png(index)), ("txt", CAPTIONS[index].encode()), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{index:02d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    tars = opened(tmp_path / "tars")
    keys = [(3, index) for index in range(COUNT)]
    ours, theirs = tars.__getitems__(keys), plain.__getitems__(keys)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [tars.caption(number) for number in ours["y"].tolist()] == CAPTIONS
    assert tars.name_of(7).endswith("00001.tar/07.png")
    before = tars.fingerprint()
    content = (tmp_path / "tars" / "00000.tar").read_bytes()
    (tmp_path / "tars" / "00000.tar").write_bytes(content.replace(CAPTIONS[0].encode(), CAPTIONS[0].upper().encode()))
    assert opened(tmp_path / "tars").fingerprint() != before
    (tmp_path / "tars" / "00001.tar").write_bytes(content[:700])
    with pytest.raises(UsageError, match=r"00001\.tar (cannot be read|has no)"):
        opened(tmp_path / "tars")


def test_an_image_may_have_several_captions(tmp_path):
    """One of them an epoch, by (seed, epoch, image) alone."""
    folder = pairs(tmp_path / "x")
    rows = [{"path": "00.png", "caption": f"caption {i}"} for i in range(4)] + [{"path": "01.png", "caption": "other"}]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = opened(folder)
    assert len(data) == 2 and len(data.texts) == 5
    drawn = [data.caption(int(data[epoch, 0]["y"])) for epoch in range(40)]
    assert set(drawn) == {f"caption {i}" for i in range(4)}
    assert drawn == [data.caption(number) for number in data.__getitems__([(e, 0) for e in range(40)])["y"].tolist()]
    assert data.caption(int(data[5, 1]["y"])) == "other"


def test_lists_of_large_dit(tmp_path):
    """Both kinds of items; a share of a list is the same one each time."""
    folder = pairs(tmp_path / "x")
    first = [{"path": str(folder / f"{i:02d}.png"), "prompt": CAPTIONS[i]} for i in range(8)]
    second = [{"image": "09.png", "conversations": [{"value": "draw"}, {"value": "nine"}]}]
    (tmp_path / "a.json").write_text(json.dumps(first))
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in second))
    meta = tmp_path / "data.yaml"
    meta.write_text(
        f"META:\n- path: {tmp_path}/a.json\n  type: x\n  ratio: 0.5\n- path: {tmp_path}/b.jsonl\n  root: {folder}\n"
    )
    data = opened(meta)
    captions = [data.caption(number) for number in range(len(data))]
    assert len(data) == 5 and captions[-1] == "nine" and set(captions[:4]) < set(CAPTIONS[:8])
    index = CAPTIONS.index(captions[0])
    assert torch.equal(data[0, 0]["x"], to_unit_range(torch.from_numpy(pixels(index)).permute(2, 0, 1)))
    assert opened(meta).fingerprint() == data.fingerprint()
    absent = f"META:\n- path: {tmp_path}/c.json\n"
    for content, message in (("META: 3\n", "expected META"), (absent, r"c\.json cannot be read")):
        meta.write_text(content)
        with pytest.raises(UsageError, match=message):
            opened(meta)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_features_on_disk_are_the_encoders(dtype, tmp_path):
    encoder = text.Words(width=24)
    of_images = [[CAPTIONS[0]], CAPTIONS[1:4], [CAPTIONS[4]]]
    from caption_features import EMPTY, write_array

    records = write_captions(tmp_path, 0, of_images, encoder, dtype, batch_size=2)
    records += write_captions(tmp_path, 1, [[CAPTIONS[5]]], encoder, dtype)
    write_array(tmp_path / EMPTY, in_half(encoder([""])[0][0], dtype))
    shards = FeatureShards(tmp_path, 2, {"width": 24, "dtype": dtype})
    assert shards.first.tolist() == [0, 1, 4, 5, 6] and shards.nothing == 6
    numbers = [5, 2, 6, 0, 2]
    features, mask = shards.batch(numbers)
    expected, there = encoder([*(CAPTIONS[n] for n in numbers[:2]), "", *(CAPTIONS[n] for n in numbers[3:])])
    assert torch.equal(mask, there) and features.dtype == getattr(torch, dtype)
    assert torch.equal(features, expected.to(features.dtype))
    tokens = sum(len(caption.split()) + 1 for caption in CAPTIONS[:5])
    assert records[0]["bytes"] == 128 + 2 * 24 * tokens  # what is masked takes no room
    with pytest.raises(ValueError, match="do not fit into float16"):
        in_half(torch.tensor([1e6]), "float16")


# ----------------------------------------------------------------------------------------------------------------- runs

TINY = [
    "--model",
    "DiT-Nano/2",
    "--depth",
    1,
    "--num_experts",
    2,
    "--expert-ratio",
    1,
    "--flip",
    "False",
    "--log-every",
]
TINY += [1, "--device", "cpu", "--num-workers", 0, "--global-batch-size", 6, "--max-steps", 3, "--image-size", 16]
WORDS = ["--text-encoder", "words", "--max-text-tokens", 9]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Images, an autoencoder, features of both by one process."""
    home = tmp_path_factory.mktemp("captioned")
    pairs(home / "images")
    save_autoencoder(home / "vae")
    (home / "images" / "03.png").write_bytes(b"no image")  # its place is taken by its successor, with the caption
    extract(home, "features")
    return home


def extract(home, name: str, *flags, **options):
    command = [
        "extract_features.py",
        "--data-path",
        home / "images",
        "--features-path",
        home / name,
        "--image-size",
        16,
    ]
    command += ["--vae-path", home / "vae", "--device", "cpu", "--num-workers", 0, "--shard-size", 5, "--dtype", "fp32"]
    return script(*command, *WORDS, *flags, **options)


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(home, name: str, *flags, **options):
    script("train.py", *TINY, "--results-dir", home / name, *flags, **options)
    return next((home / name).iterdir())


def test_latents_and_captions_of_any_number_of_processes(extracted):
    said = extract(extracted, "again", processes=2).stdout
    assert "12 images (1 unreadable, replaced) with 12 captions of" in said
    one, two = (extracted / name for name in ("features", "again"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and "captions-00002-ends.npy" in names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    data = open_captioned_features(one, None, "none", 0, False, encoded=False)
    features, mask = data.features.batch([3, 4])
    assert torch.equal(features[0], features[1])  # of the successor
    expected, _ = text.Words(length=9)([CAPTIONS[4]])
    assert torch.equal(features[0][mask[0]], expected[0].half())
    assert (
        "every byte as the manifest says"
        in script("extract_features.py", "--features-path", one, "--verify", "--device", "cpu").stdout
    )
    (two / "captions-00001.npy").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"captions-00001\.npy is damaged: it has 1 bytes"):
        open_captioned_features(two, None, "none", 0, False, encoded=False)
    extract(extracted, "again")
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_run_on_features_is_that_on_images(extracted, tmp_path):
    """Losses agree to half precision; the checkpoint names the encoder, and draws from new prompts."""
    images = train(tmp_path, "images", "--data-path", extracted / "images", "--vae-path", extracted / "vae", *WORDS)
    features = train(tmp_path, "features", "--feature-path", extracted / "features", "--sample-every", 3)
    assert losses(features) == pytest.approx(losses(images), rel=1e-3)
    two = train(tmp_path, "two", "--feature-path", extracted / "features", "--data-parallel", "fsdp", processes=2)
    assert losses(two) == pytest.approx(losses(features), rel=1e-4)
    configs = [read_json(run / "checkpoints" / "0000003", "config") for run in (images, features)]
    assert configs[0]["text"] == configs[1]["text"] == {"name": "words", "width": 128, "length": 9}
    assert (features / "samples" / "0000003.png").is_file()
    script(
        *("sample.py", "--ckpt", features, "--prompt", "something else", "--device", "cpu", "--output", tmp_path / "x"),
        *("--num-sampling-steps", 2),
    )
    copy = tmp_path / "resumed" / "000-copy" / "checkpoints"
    copy.mkdir(parents=True)
    (copy / "0000003").symlink_to(features / "checkpoints" / "0000003")
    flags = ["--feature-path", extracted / "features", "--resume", copy.parent, "--max-steps", 4]
    assert len(losses(train(tmp_path, "resumed", *flags))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["PixArt-muP-2h/2", "DiT_Llama_Nano_patch2"])
def test_one_curve_by_every_engine(model, extracted, tmp_path):
    """One process, experts over two, ZeRO-2 or 3; blocks computed again, micro-batches: of both ways to read."""
    flags = ["--feature-path", extracted / "features", "--model", model, "--depth", 1, "--num_heads", 4]
    flags += ["--dim_heads", 8, "--global-batch-size", 4, "--lr", 1e-3, "--warmup-steps", 0, "--precision", "fp32"]
    if "muP" in model:
        flags += ["--base-width", 16]
    config = Path(__file__).parent.parent / "config"
    one = losses(train(tmp_path, "one", *flags, "--accum_iter", 2, "--activation-checkpointing"))
    assert len(set(one)) == 3
    two = [*flags, "--data-parallel", "fsdp", "--expert-parallel", 2]
    assert losses(train(tmp_path, "two", *two, processes=2)) == pytest.approx(one, rel=1e-5)
    for stage in (2,) if "muP" in model else (3,):
        zero = ["--deepspeed_config", config / f"zero{stage}.json", "--results-dir", tmp_path / f"zero{stage}"]
        script("train_deepspeed.py", *TINY, *flags, *zero, processes=2)
        run = next((tmp_path / f"zero{stage}").iterdir())
        assert losses(run) == pytest.approx(one, rel=1e-5)
        draw = ["--prompt", "a seven", "--device", "cpu", "--num-sampling-steps", 2, "--output", tmp_path / f"x{stage}"]
        script("sample.py", "--ckpt", run, *draw)


def test_what_does_not_fit_is_one_line(extracted, tmp_path):
    def refused(*flags) -> str:
        error = script("train.py", *TINY, "--results-dir", tmp_path / "no", *flags, check=2).stderr
        assert not (tmp_path / "no").exists() and "Traceback" not in error
        return error

    features = ["--feature-path", extracted / "features"]
    assert "has length 40, the features in" in refused(*features, "--text-encoder", "words")
    assert "are of images of 16 pixels, not 32" in refused(*features, "--image-size", 32)
    assert "--num_classes does nothing: the images have captions" in refused(*features, "--num-classes", 3)
    manifest = read_manifest(extracted / "features")
    assert manifest["captions"] == [CAPTIONS[4] if i == 3 else c for i, c in enumerate(CAPTIONS)]
    error = extract(extracted, "features", "--caption-dtype", "bf16", check=2).stderr
    assert "text dtype was float16, is bfloat16" in error
    error = script(
        *("extract_features.py", "--data-path", extracted / "images", "--features-path", extracted / "no"),
        *("--caption-dtype", "bf16", "--vae-path", extracted / "vae", "--device", "cpu"),
        check=2,
    ).stderr
    assert "--caption-dtype does nothing without --text-encoder" in error


def sa1b(folder, width: int = 8, tokens: int = 6):
    """PixArt's layout, with features of texts and of images."""
    for name in ("images", "captions", "partition", "caption_feature_wmask", "img_vae_feature/train_vae_256/noflip"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, caption in enumerate(CAPTIONS):
        (folder / "images" / f"sa_{index}.jpg").write_bytes(png(index))
        (folder / "captions" / f"sa_{index}.txt").write_text(caption)
        mask = (np.arange(tokens) <= index % tokens).astype(np.int64)[None]
        features = rng.standard_normal((1, tokens, width), dtype=np.float32)
        np.savez(folder / "caption_feature_wmask" / f"sa_{index}.npz", caption_feature=features, attention_mask=mask)
        moments = np.concatenate([rng.standard_normal((4, 4, 4)), np.full((4, 4, 4), 0.1)]).astype(np.float32)
        np.save(folder / "img_vae_feature" / "train_vae_256" / "noflip" / f"sa_{index}.npy", moments)
    for part in range(2):
        names = [f"sa_{index}\n" for index in range(part * 6, part * 6 + 6)]
        (folder / "partition" / f"part{part:02d}.txt").write_text("".join(names))
    return folder


def test_pixarts_layout_cached_and_not(tmp_path):
    """Pixels or latents, captions' features or texts: four mixtures."""
    root = sa1b(tmp_path / "SA1B")
    stored = stored_texts(root)
    assert (stored.width, stored.length, stored.record()["kind"]) == (8, 6, "t5")
    data = opened(root, encoded=False)
    batch = data.__getitems__([(0, 7), (0, 3)])
    assert batch["text"].shape == (2, 4, 8) and batch["text_mask"].sum(dim=1).tolist() == [2, 4]
    with np.load(root / "caption_feature_wmask" / "sa_7.npz") as file:
        assert np.array_equal(batch["text"][0, :2].numpy(), file["caption_feature"][0, :2])
    assert torch.equal(opened(root, encoded=True).__getitems__([(0, 7)])["x"], batch["x"][:1])

    vae = tmp_path / "vae"
    save_autoencoder(vae)
    for where, encoded, count in (("--data-path", False, 3), ("--data-path", True, 3), ("--feature-path", False, 3)):
        flags = [where, root, *(WORDS if encoded else ())]
        flags += ["--vae-path", vae if where == "--feature-path" else "none"]
        if where == "--feature-path":
            flags += ["--image-size", 8]
        run = train(tmp_path, f"{where}{encoded}", *flags, "--sample-every", 3)
        assert len(losses(run)) == count and (run / "samples" / "0000003.png").is_file()
        config = read_json(run / "checkpoints" / "0000003", "config")
        assert config["text"]["name"] == ("words" if encoded else "t5")
    (root / "caption_feature_wmask" / "sa_3.npz").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"sa_3\.npz holds no features of a caption"):
        data.__getitems__([(0, 3)])
    (root / "partition" / "part01.txt").write_text("")
    (root / "partition" / "part00.txt").write_text("")
    with pytest.raises(UsageError, match="partition names no images"):
        opened(root, encoded=False)
