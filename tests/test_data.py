"""data.py against slow formulations, real broken files, and itself cut among workers, processes and resumed runs."""

import json
import os
import pickle
import re
import time
import warnings
from itertools import chain, islice, product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import autoencoders
import data
from autoencoders import PixelSpace, SpaceInfo
from benchmarks.data import write_shards
from cli import UsageError
from data import AS_BEFORE, BatchSchedule, ImageData, Reading, UnreadableImages
from latents import LatentFiles, LatentShards, open_features, write_manifest

LATENT = SpaceInfo("tiny", channels=4, downsample=4, scaling_factor=1.0, shift_factor=0.0, samples_posterior=True)


def noise_image(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_images(root, classes=("ant", "bee"), per_class=4, size=(16, 16)):
    """root/CLASS/i.png, every image different."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            noise_image(*size, seed=100 * label + i).save(root / name / f"{i}.png")
    return root


def write_latents(root, labels=(2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1), shape=(1, 4, 8, 8), prefix="imagenet256"):
    for kind in ("features", "labels"):
        (root / f"{prefix}_{kind}").mkdir(parents=True)
    for i, label in enumerate(labels):
        np.save(root / f"{prefix}_features" / f"{i}.npy", np.full(shape, i, dtype=np.float32))
        np.save(root / f"{prefix}_labels" / f"{i}.npy", np.array([label]))
    return root


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Images


def on_white(image: Image.Image) -> np.ndarray:
    """By the definition: alpha times colour, and the rest white."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def test_transparency_shows_the_background(tmp_path):
    """Colours under alpha 0 are anything: they do not show. Also as one transparent value of RGB and of 16-bit grey."""
    rng = np.random.default_rng(0)
    hidden = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    assert (np.asarray(data.load_image(str(tmp_path / "hidden.png"))) == 255).all()
    half = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    Image.fromarray(half).save(tmp_path / "half.png")
    loaded = np.asarray(data.load_image(str(tmp_path / "half.png"))).astype(int)
    assert np.abs(loaded - on_white(Image.fromarray(half))).max() <= 1
    black = np.asarray(data.load_image(str(tmp_path / "half.png"), Reading("#000"))).astype(int)
    assert np.abs(black - half[..., :3] * (half[..., 3:] / 255)).max() <= 1
    before = np.asarray(data.load_image(str(tmp_path / "half.png"), AS_BEFORE))
    assert np.array_equal(before, half[..., :3])
    rgb = half[..., :3].copy()
    rgb[0] = (1, 2, 3)
    Image.fromarray(rgb).save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    keyed = np.asarray(data.load_image(str(tmp_path / "keyed.png")))
    assert (keyed[0] == 255).all() and np.array_equal(keyed[1:], rgb[1:])
    grey = rng.integers(0, 60_000, (6, 8)).astype(np.uint16)
    grey[2] = 7
    Image.fromarray(grey).save(tmp_path / "deep.png", transparency=7)
    deep = np.asarray(data.load_image(str(tmp_path / "deep.png")))
    assert (deep[2] == 255).all() and np.array_equal(deep[3, :, 0], np.round(grey[3] / 257))
    with pytest.raises(UsageError, match="--background mauvish is no colour"):
        Reading("mauvish")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }
    assert np.array_equal(np.asarray(data.load_image(str(tmp_path / "x.png"))), turned[orientation])
    assert np.array_equal(np.asarray(data.load_image(str(tmp_path / "x.png"), AS_BEFORE)), pixels)


def test_broken_exif_tells_nothing(tmp_path):
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    broken = (b"Exif\x00\x00", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff", b"MM", b"\xff" * 40)
    for number, exif in enumerate(broken):
        path = str(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(path, exif=exif)
        assert np.array_equal(np.asarray(data.load_image(path)), pixels)


def test_hidden_names_are_no_data(tmp_path):
    """Neither classes nor images: labels and order are those of the same folder without them."""
    root = write_images(tmp_path / "images", ("class0", "class1"), 2)
    _, names, labels, _ = data.images_by_class(str(root))
    plain = ImageData(str(root), 8, autoencoders.space_info("none"), seed=0)
    for folder in ("__MACOSX/class0", ".thumbnails", "class0/.cache", "class1/__MACOSX"):
        (root / folder).mkdir(parents=True)
        (root / folder / "x.png").write_bytes(b"no image")
    (root / "class0" / "._0.png").write_bytes(b"no image")
    found = data.images_by_class(str(root))
    assert found == (["class0", "class1"], names, labels, []) and len(names) == 4
    assert ImageData(str(root), 8, autoencoders.space_info("none"), seed=0).fingerprint() == plain.fingerprint()


def test_pictures_that_are_not_read_are_said(tmp_path):
    root = write_images(tmp_path / "images", ("class0", "class1"), 2)
    Image.new("RGB", (8, 8)).save(root / "class1" / "x.gif")
    for name in ("notes.txt", "paper.pdf", "data.h5", "figure.eps"):
        (root / "class0" / name).write_text("no picture")
    (note,) = ImageData(str(root), 8, autoencoders.space_info("none"), seed=0).notes
    assert re.match(r"1 images are not read, for their suffix \(\.gif\): class1/x\.gif", note)


def test_how_pixels_are_read_is_part_of_the_fingerprint(tmp_path):
    root = str(write_images(tmp_path / "images", ("class0", "class1"), 2))
    readings = (Reading(), Reading("black"), Reading(upright=False), AS_BEFORE)
    sets = [ImageData(root, 8, autoencoders.space_info("none"), seed=0, reading=reading) for reading in readings]
    assert len({each.fingerprint() for each in sets}) == 4
    assert [each.record().get("reading") for each in sets] == [reading.config() for reading in readings[:3]] + [None]


def test_every_mode_becomes_rgb_without_a_warning(tmp_path):
    rgb = noise_image(8, 6)
    grey = rgb.convert("L")
    palette = rgb.quantize(16)
    palette.info["transparency"] = bytes([0, 128] + [255] * 14)
    grey_rgb = np.asarray(grey.convert("RGB"))
    cases = {
        "rgb.png": (rgb, np.asarray(rgb)),
        "grey.png": (grey, grey_rgb),
        "grey_alpha.png": (grey.convert("LA"), grey_rgb),
        "rgba.png": (rgb.convert("RGBA"), np.asarray(rgb)),
        "one_bit.png": (grey.convert("1"), np.asarray(grey.convert("1").convert("RGB"))),
        "palette.png": (palette, on_white(palette.copy())),
        "cmyk.tif": (rgb.convert("CMYK"), np.asarray(rgb)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (image, expected) in cases.items():
            image.save(tmp_path / name)
            loaded = data.load_image(str(tmp_path / name))
            assert loaded.mode == "RGB"
            assert np.array_equal(np.asarray(loaded), expected), name


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / name)
    loaded = np.asarray(data.load_image(str(tmp_path / name)))
    assert np.array_equal(loaded, np.repeat(np.round(values / 257)[..., None], 3, axis=2))


@pytest.mark.parametrize("values", [np.full((4, 4), 70000, dtype=np.int32), np.full((4, 4), 0.5, dtype=np.float32)])
def test_grey_without_a_known_white_is_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="known white"):
        data.load_image(str(tmp_path / "x.tif"))


def slow_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop in float64 numpy, (H,W,3) to (size,size,3). As Pillow: columns, then rows, rounding after each."""

    def to_8_bit(x):
        return np.floor(x + 0.5).clip(0, 255)

    def halve(x):  # axis 0, of even length
        return to_8_bit((x[::2] + x[1::2]) / 2)

    def bicubic(x, length):  # axis 0; the kernel (a = -0.5) is widened by the shrinking factor
        scale = len(x) / length
        rows = []
        for i in range(length):
            distance = np.abs((np.arange(len(x)) + 0.5 - (i + 0.5) * scale) / max(scale, 1))
            near = 1.5 * distance**3 - 2.5 * distance**2 + 1
            far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
            weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
            rows.append(np.tensordot(weights / weights.sum(), x, 1))
        return to_8_bit(np.stack(rows))

    x = pixels.astype(np.float64)
    while min(x.shape[:2]) >= 2 * size:
        x = halve(halve(x.swapaxes(0, 1)).swapaxes(0, 1))
    height, width = (round(side * size / min(x.shape[:2])) for side in x.shape[:2])
    x = bicubic(bicubic(x.swapaxes(0, 1), width).swapaxes(0, 1), height)
    top, left = (height - size) // 2, (width - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height", [(20, 16), (23, 40), (64, 88), (92, 72), (10, 13), (132, 68)])
def test_center_crop_equals_the_slow_formulation(width, height):
    image = noise_image(width, height)
    cropped = data.center_crop(image, 16)
    assert cropped.size == (16, 16)
    assert np.abs(np.asarray(cropped, dtype=np.float64) - slow_crop(np.asarray(image), 16)).max() <= 1


def test_center_crop_leaves_an_exact_image_alone_and_gives_the_size_for_any_other():
    image = noise_image(16, 16)
    assert np.array_equal(np.asarray(data.center_crop(image, 16)), np.asarray(image))
    middle = np.asarray(noise_image(20, 16))[:, 2:18]
    assert np.array_equal(np.asarray(data.center_crop(noise_image(20, 16), 16)), middle)
    for width, height in product((1, 7, 15, 17, 31, 32, 33, 65), repeat=2):
        assert data.center_crop(Image.new("RGB", (width, height)), 16).size == (16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Image folders


def test_item_of_an_image_folder(tmp_path):
    dataset = ImageData(str(write_images(tmp_path / "d")), 16, PixelSpace(), seed=3, flip=False)
    assert (len(dataset), dataset.num_classes, dataset.class_names) == (8, 2, ["ant", "bee"])
    assert dataset.latent_shape == (3, 16, 16)
    item = dataset[2, 5]
    assert set(item) == {"x", "y", "noise", "u", "drop_u", "index", "unreadable"}
    pixels = np.asarray(Image.open(tmp_path / "d" / "bee" / "1.png"))
    assert torch.equal(item["x"], torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    assert (item["x"].dtype, item["noise"].dtype, item["u"].dtype) == (torch.float32, torch.float32, torch.float64)
    assert (item["y"], item["index"], item["unreadable"]) == (1, 5, -1)
    assert {item[name].dtype for name in ("y", "index", "unreadable")} == {torch.int64}
    assert dataset.name_of(5) == str(tmp_path / "d" / "bee" / "1.png")


def test_randomness_is_that_of_seed_epoch_and_index(tmp_path):
    dataset = ImageData(str(write_images(tmp_path / "d")), 16, LATENT, seed=3)
    item = dataset[2, 5]
    rng = np.random.default_rng([3, 2, 5])
    u, drop_u, _ = rng.random(3)
    assert (item["u"].item(), item["drop_u"].item()) == (u, drop_u)
    assert item["noise"].shape == dataset.latent_shape == (4, 4, 4)
    for name in ("noise", "vae_noise"):
        assert torch.equal(item[name], torch.tensor(rng.standard_normal((4, 4, 4), dtype=np.float32)))
    for other in (dataset[3, 5], dataset[2, 6], ImageData(str(tmp_path / "d"), 16, LATENT, seed=4)[2, 5]):
        assert not torch.equal(item["noise"], other["noise"])
        assert item["u"] != other["u"]
    pixels = ImageData(str(tmp_path / "d"), 16, PixelSpace(), seed=3)[2, 5]
    assert pixels["u"] == item["u"]  # the space does not move the small draws
    assert torch.equal(pixels["x"], item["x"])


def test_half_of_the_images_are_flipped(tmp_path):
    root = str(write_images(tmp_path / "d", per_class=1))
    plain = ImageData(root, 16, PixelSpace(), seed=0, flip=False)
    flipping = ImageData(root, 16, PixelSpace(), seed=0)
    straight = plain[0, 0]["x"]
    flips = 0
    for epoch in range(200):
        assert torch.equal(plain[epoch, 0]["x"], straight)
        x = flipping[epoch, 0]["x"]
        assert torch.equal(x, straight) or torch.equal(x, straight.flip(-1))
        flips += torch.equal(x, straight.flip(-1))
    assert 70 < flips < 130


def test_classes_are_the_visible_folders_and_may_be_empty(tmp_path):
    root = write_images(tmp_path / "d", classes=("b", "d"), per_class=1)
    for name in (".cache", "a", "c"):
        (root / name).mkdir()
    (root / "b" / "notes.txt").write_text("no image")
    dataset = ImageData(str(root), 16, PixelSpace(), seed=0)
    assert dataset.class_names == ["a", "b", "c", "d"]
    assert [dataset[0, i]["y"].item() for i in range(len(dataset))] == [1, 3]


def test_fingerprint_follows_names_sizes_and_labels(tmp_path):
    def fingerprint(path):
        return ImageData(str(path), 16, PixelSpace(), seed=0).fingerprint()

    root = write_images(tmp_path / "d")
    before = fingerprint(root)
    assert len(bytes.fromhex(before)) == 32

    copy = tmp_path / "elsewhere"  # files made in another order, another root
    for file in sorted(root.rglob("*.png"), reverse=True):
        (copy / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(root)).write_bytes(file.read_bytes())
    assert fingerprint(copy) == before

    (copy / "zebra").mkdir()
    seen = {before, fingerprint(copy)}
    (copy / "ant" / "0.png").write_bytes(b"shorter")
    seen.add(fingerprint(copy))
    (copy / "ant" / "0.png").rename(copy / "ant" / "00.png")
    seen.add(fingerprint(copy))
    (copy / "ant" / "00.png").unlink()
    seen.add(fingerprint(copy))
    (copy / "ant" / "00.png").symlink_to(copy / "gone.png")
    seen.add(fingerprint(copy))
    assert len(seen) == 6


def image_errors(tmp_path):
    """Cases (arguments of ImageData after the path, words of the message); each makes its own folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    noise_image(4, 4).save(tmp_path / "flat" / "0.png")
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    write_images(tmp_path / "good", per_class=1)
    return {
        "missing": (16, "does not exist"),
        "file": (16, "not a folder"),
        "empty": (16, "one folder per class"),
        "flat": (16, "one folder per class"),
        "hollow": (16, "no images"),
        "good": (18, "18 is not divisible by 4.*16 and 20"),
    }


def test_errors_of_an_image_folder_are_one_line(tmp_path):
    for name, (size, words) in image_errors(tmp_path).items():
        with pytest.raises(UsageError, match=words) as caught:
            ImageData(str(tmp_path / name), size, LATENT, seed=0)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images


def spoil(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "header only":
        path.write_bytes(content[:12])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404 Not Found</html>")
    elif how == "bad checksum":
        path.write_bytes(content[:40] + bytes([content[40] ^ 255]) + content[41:])
    elif how == "bad chunk":
        length = content.index(b"IDAT") - 4
        path.write_bytes(content[:length] + (10).to_bytes(4, "big") + content[length + 4 :])
    elif how == "dangling link":
        path.unlink()
        path.symlink_to(path.parent / "gone.png")
    elif how == "float":
        Image.fromarray(np.zeros((16, 16), dtype=np.float32)).save(path, "TIFF")


@pytest.mark.parametrize(
    "how", ["truncated", "header only", "empty", "text", "bad checksum", "bad chunk", "dangling link", "float", "bomb"]
)
def test_an_unreadable_image_is_replaced_by_the_next_one(tmp_path, monkeypatch, how):
    root = write_images(tmp_path / "d")
    dataset = ImageData(str(root), 16, PixelSpace(), seed=0, flip=False)
    good = {index: dataset[0, index] for index in (0, 3, 4, 7)}
    if how == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow refuses beyond twice as many
        noise_image(32, 32).save(root / "ant" / "3.png")
        noise_image(32, 32).save(root / "bee" / "3.png")
        for index in (0, 4):
            noise_image(12, 12).save(dataset.name_of(index))
        good[0]["x"], good[4]["x"] = dataset[0, 0]["x"], dataset[0, 4]["x"]
    else:
        spoil(root / "ant" / "3.png", how)
        spoil(root / "bee" / "3.png", how)

    item = dataset[0, 3]  # the next one has another label
    assert_same(item, good[3] | {"x": good[4]["x"], "y": good[4]["y"], "unreadable": torch.tensor(3)})
    item = dataset[0, 7]  # the last one: the next is the first
    assert_same(item, good[7] | {"x": good[0]["x"], "y": good[0]["y"], "unreadable": torch.tensor(7)})


def test_no_readable_image_at_all(tmp_path, monkeypatch):
    root = write_images(tmp_path / "d")
    dataset = ImageData(str(root), 16, PixelSpace(), seed=0)
    for index in range(len(dataset)):
        if index != 5:
            spoil(root / dataset.name_of(index), "text")
    assert dataset[0, 6]["unreadable"] == 6  # found after 7 others
    monkeypatch.setattr(data, "MAX_REPLACEMENTS", 4)
    assert dataset[0, 1]["unreadable"] == 1
    with pytest.raises(RuntimeError, match=r"ant/0\.png.*UnidentifiedImageError"):
        dataset[0, 0]


def test_unreadable_images_are_counted_once_and_stop_the_run_above_the_limit(tmp_path):
    class Numbers:
        def __len__(self):
            return 200

        def name_of(self, index):
            return f"image {index}"

    bad = UnreadableImages(set(), limit=0.01)
    assert bad.update([], Numbers()) == []
    assert bad.update([7, 7], Numbers()) == ["image 7"]
    assert bad.update([7, 3], Numbers()) == ["image 3"]
    assert bad.update([3, 7], Numbers()) == []
    with pytest.raises(RuntimeError, match=r"3 of 200 images \(1\.5%, limit 1\.0%\).*image 3, image 7, image 9"):
        bad.update([9], Numbers())


def test_one_folder_too_high_is_noticed(tmp_path):
    write_images(tmp_path / "imagenet" / "train")
    with pytest.raises(UsageError, match=r"did you mean one of them, such as .*imagenet/train"):
        ImageData(str(tmp_path / "imagenet"), 16, PixelSpace(), seed=0)


def test_one_bad_image_in_a_tiny_data_set_does_not_stop_the_run(tmp_path):
    dataset = ImageData(str(write_images(tmp_path / "d")), 16, PixelSpace(), seed=0)
    bad = UnreadableImages(set())
    assert bad.update([2], dataset) == [dataset.name_of(2)]
    with pytest.raises(RuntimeError, match="2 of 8"):
        bad.update([4], dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Latent files


@pytest.mark.parametrize("prefix", ["imagenet256", "birds"])
def test_item_of_latent_files(tmp_path, prefix):
    dataset = LatentFiles(str(write_latents(tmp_path, prefix=prefix)), seed=3)
    assert (len(dataset), dataset.num_classes, dataset.latent_shape) == (12, 3, (4, 8, 8))
    assert dataset.class_names == ["0", "1", "2"]
    item = dataset[1, 10]  # files in the order of their numbers, not 0, 1, 10, 11, 2
    assert dataset.name_of(10) == str(tmp_path / f"{prefix}_features" / "10.npy")
    assert torch.equal(item["x"], torch.full((4, 8, 8), 10.0))
    assert (item["y"], item["index"], item["unreadable"]) == (0, 10, -1)
    assert set(item) == {"x", "y", "noise", "u", "drop_u", "index", "unreadable"}
    _, drawn = data.draw_randomness(3, 1, 10, (4, 8, 8), posterior=False)
    assert_same({name: item[name] for name in drawn}, drawn)


def test_fingerprint_of_latent_files_follows_labels(tmp_path):
    def fingerprint():
        return LatentFiles(str(tmp_path), seed=0).fingerprint()

    write_latents(tmp_path)
    before = fingerprint()
    assert fingerprint() == before
    np.save(tmp_path / "imagenet256_labels" / "0.npy", np.array([1]))
    assert fingerprint() != before


def rewrite(path, array):
    """A file that holds something else; None removes it, bytes are written as they are."""
    if array is None:
        path.unlink()
    elif isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("labels/11.npy", None, "12 files in .*, 11 in .*11.npy"),
        ("features/11.npy", None, "11 files in .*, 12 in .*11.npy"),
        ("labels/12.npy", np.array([0]), "do not match"),
        ("features/0.npy", np.zeros((1, 4, 8, 8)), "float64"),
        ("features/0.npy", np.zeros((4, 8, 8), dtype=np.float32), r"\(4, 8, 8\)"),
        ("features/0.npy", np.zeros((2, 4, 8, 8), dtype=np.float32), r"\(2, 4, 8, 8\)"),
        ("features/0.npy", b"", "cannot read"),
        ("features/0.npy", b"junk", "cannot read"),
        ("features/0.npy", np.array([{}]), "cannot read"),
        ("features/7.npy", np.zeros((1, 4, 8, 8), dtype=np.float16), "7.npy is not as large"),
        ("features/7.npy", b"", "7.npy is not as large"),
        ("labels/7.npy", np.array([1], dtype=np.int32), "7.npy is not a label"),
        ("labels/7.npy", np.array([1.0]), "7.npy is not a label"),
        ("labels/7.npy", np.array([1, 2]), "7.npy is not a label"),
        ("labels/7.npy", np.array([-1]), "7.npy is not a label"),
        ("labels/7.npy", b"", "7.npy is not a label"),
    ],
)
def test_errors_of_latent_files(tmp_path, file, content, words):
    write_latents(tmp_path)
    rewrite(tmp_path / f"imagenet256_{file}", content)
    with pytest.raises(UsageError, match=words) as caught:
        LatentFiles(str(tmp_path), seed=0)
    assert "\n" not in str(caught.value)


def test_errors_of_latent_folders(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        LatentFiles(str(tmp_path / "missing"), seed=0)
    with pytest.raises(UsageError, match=r"no \*_features folder"):
        LatentFiles(str(tmp_path), seed=0)
    (tmp_path / "a_features").mkdir()
    with pytest.raises(UsageError, match="a_features but no a_labels"):
        LatentFiles(str(tmp_path), seed=0)
    (tmp_path / "a_labels").mkdir()
    with pytest.raises(UsageError, match=r"no \.npy files"):
        LatentFiles(str(tmp_path), seed=0)
    write_latents(tmp_path, prefix="b")
    with pytest.raises(UsageError, match=r"several feature folders.*a_features, b_features"):
        LatentFiles(str(tmp_path), seed=0)


def test_a_latent_file_that_breaks_is_replaced_and_named(tmp_path):
    """Of another shape, gone, not finite: the next good one takes its place, with its label."""
    dataset = LatentFiles(str(write_latents(tmp_path)), seed=0)
    np.save(dataset.name_of(3), np.zeros((1, 4, 8, 9), dtype=np.float32))
    (tmp_path / "imagenet256_features" / "4.npy").unlink()
    np.save(dataset.name_of(5), np.full((1, *dataset.latent_shape), np.nan, dtype=np.float32))
    for index in (3, 4, 5):
        item = dataset[0, index]
        assert torch.equal(item["x"], dataset[0, 6]["x"]) and item["y"] == dataset.labels[6]
        assert item["index"] == item["unreadable"] == index
    assert dataset[0, 6]["unreadable"] == -1


def test_labels_that_are_none(tmp_path):
    write_latents(tmp_path)
    label = tmp_path / "imagenet256_labels" / "2.npy"
    for value in (-1, 10**9):
        np.save(label, np.array([value]))
        with pytest.raises(UsageError, match=r"2\.npy is not a label: expected one int64 from 0 to 9999999"):
            LatentFiles(str(tmp_path), seed=0)
    label.unlink()
    label.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"the label .*2\.npy cannot be read: No such file"):
        LatentFiles(str(tmp_path), seed=0)


def test_hidden_latents_are_no_data(tmp_path):
    plain = LatentFiles(str(write_latents(tmp_path)), seed=0)
    (tmp_path / "imagenet256_features" / "._0.npy").write_bytes(b"x")
    (tmp_path / "__MACOSX_features").mkdir()
    assert len(LatentFiles(str(tmp_path), seed=0)) == len(plain)


# ---------------------------------------------------------------------------------------------------------------------
# Shards of moments


def make_shards(root, images=11, shard_size=4, dtype=np.float16, **changes):
    """(folder, moments (N,2,2,C,h,w), labels) of random shards, the last one shorter."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((images, 2, 2, 2, 4, 4)).astype(dtype)
    labels = np.arange(images) // 3
    return write_shards(root / "shards", moments, labels, shard_size, **({"image_size": 16} | changes)), moments, labels


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_item_of_latent_shards(tmp_path, dtype):
    folder, moments, labels = make_shards(tmp_path, dtype=dtype)
    dataset = LatentShards(folder, 16, seed=3)
    assert (len(dataset), dataset.num_classes, dataset.latent_shape) == (11, 4, (2, 4, 4))
    flips = 0
    for epoch, index in product(range(3), range(11)):
        item = dataset[epoch, index]
        assert set(item) == {"x", "y", "noise", "u", "drop_u", "vae_noise", "index", "unreadable"}
        flip, drawn = data.draw_randomness(3, epoch, index, (2, 4, 4), posterior=True)
        assert_same({name: item[name] for name in drawn}, drawn)
        mean, std = torch.from_numpy(moments[index, int(flip)]).float()
        torch.testing.assert_close(item["x"], (mean + std * drawn["vae_noise"]) * 0.18215)
        assert (item["y"], item["index"], item["unreadable"]) == (labels[index], index, -1)
        assert (item["x"].dtype, item["y"].dtype) == (torch.float32, torch.int64)
        flips += flip
    assert 0 < flips < 33
    unflipped = LatentShards(folder, 16, seed=3, flip=False)
    for index in range(11):
        mean, std = torch.from_numpy(moments[index, 0]).float()
        item = unflipped[0, index]
        torch.testing.assert_close(item["x"], (mean + std * item["vae_noise"]) * 0.18215)


def test_a_batch_read_at_once_is_its_items(tmp_path):
    dataset = LatentShards(make_shards(tmp_path)[0], 16, seed=3)
    keys = [(5, index) for index in (7, 0, 10, 3, 3, 4, 8)] + [(6, 7)]
    assert_same(dataset.__getitems__(keys), default_collate([dataset[key] for key in keys]))


def test_shards_in_loaders_with_and_without_workers(tmp_path):
    dataset = LatentShards(make_shards(tmp_path)[0], 16, seed=3)
    alone = batches(dataset, num_workers=0)
    assert alone[0]["x"].shape == (4, 2, 4, 4)
    for batch, same in zip(alone, batches(dataset, num_workers=2), strict=True):
        assert_same(batch, same)
    halves = [batches(dataset, 0, world_size=2, rank=rank) for rank in range(2)]
    for batch, *parts in zip(alone, *halves, strict=True):
        assert_same(batch, {name: torch.cat([part[name] for part in parts]) for name in batch})


def test_shards_are_opened_by_whoever_reads_them(tmp_path):
    """Copies for worker processes carry no contents, and no shard is opened before it is needed."""
    dataset = LatentShards(make_shards(tmp_path, images=64, shard_size=32)[0], 16, seed=3)
    before = dataset[0, 1]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 4000 < sum(path.stat().st_size for path in dataset.folder.glob("*.npy"))
    assert_same(pickle.loads(pickled)[0, 1], before)
    assert [shard is not None for shard in dataset._moments._shards] == [True, False]


def test_the_fingerprint_of_shards_follows_contents_and_labels(tmp_path):
    rng = np.random.default_rng(0)
    moments, labels = rng.standard_normal((4, 2, 2, 2, 4, 4)).astype(np.float16), np.array([0, 0, 1, 1])
    cases = {"same": (moments, labels), "again": (moments, labels), "other": (moments * 2, labels)}
    cases["labels"] = moments, labels[[0, 2, 1, 3]]
    seen = {
        name: LatentShards(write_shards(tmp_path / name, *case, 2, image_size=16), 16, seed=0).fingerprint()
        for name, case in cases.items()
    }
    assert seen["same"] == seen["again"] and len(set(seen.values())) == 3


def test_either_format_is_recognised(tmp_path):
    assert isinstance(open_features(make_shards(tmp_path)[0], 16, 0, True), LatentShards)
    assert isinstance(open_features(write_latents(tmp_path / "files"), 64, 0, True), LatentFiles)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="fast-DiT .*manifest.json"):
        open_features(tmp_path / "empty", 16, 0, True)
    with pytest.raises(UsageError, match="does not exist"):
        open_features(tmp_path / "none", 16, 0, True)


def damage_shards(folder, how):
    manifest, shard = folder / "manifest.json", folder / "shard-00001.npy"
    if how == "no manifest":
        manifest.unlink()
    elif how == "unfinished":
        manifest.rename(folder / "extraction.json")
    elif how == "missing shard":
        shard.unlink()
    elif how == "short shard":
        os.truncate(shard, 1000)
    elif how == "edited manifest":
        manifest.write_text(manifest.read_text().replace("0.18215", "0.13025"))
    elif how == "cut manifest":
        os.truncate(manifest, 200)
    elif how == "no object":
        manifest.write_text("[]")


@pytest.mark.parametrize(
    "how, words",
    [
        ("no manifest", "no manifest.json in .*extract_features.py"),
        ("unfinished", "has not finished: run the same extract_features.py command again"),
        ("missing shard", "shard-00001.npy is missing; delete that file and run"),
        ("short shard", "shard-00001.npy is damaged: it has 1000 bytes, not 1152; delete that file and run"),
        ("edited manifest", "manifest.json is damaged: .*its own SHA-256"),
        ("cut manifest", "manifest.json is not JSON .*extract the features anew"),
        ("no object", "manifest.json: the whole is .*should be a valid dictionary"),
    ],
)
def test_errors_of_latent_shards(tmp_path, how, words):
    folder, *_ = make_shards(tmp_path)
    damage_shards(folder, how)
    with pytest.raises(UsageError, match=words) as caught:
        open_features(folder, 16, 0, True)
    assert "\n" not in str(caught.value)


def test_shards_of_another_size_format_or_autoencoder(tmp_path):
    folder, *_ = make_shards(tmp_path)
    with pytest.raises(UsageError, match="images of 16 pixels, not 256: --image-size 16, or other features"):
        LatentShards(folder, 256, seed=0)
    dataset = LatentShards(folder, 16, seed=0)
    dataset.compare_with(dataset.space)
    other = SpaceInfo("other", 2, dataset.space.downsample, 0.13025, 0.0, True)
    with pytest.raises(UsageError, match="sd-vae with scaling_factor 0.18215; --vae-path other has 0.13025"):
        dataset.compare_with(other)
    folder, *_ = make_shards(tmp_path / "new", format=2)
    with pytest.raises(UsageError, match="has format 2, this version reads 1"):
        LatentShards(folder, 16, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data class_names": ["a", "b"]}, "shard-00001.npy has label 2, but there are 2 class names"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"shard_size": 3}, "3 shards of 3 for 11 samples"),
        ({"data samples": 12}, "shard-00002.npy of .* bytes, expected shard-00002.npy of"),
        ({"dtype": "float32"}, "shard-00000.npy of .* bytes, expected shard-00000.npy of"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"item_shape": [2, 2, 3, 4, 4]}, "item_shape is .*expected 2, 2, 2 channels"),
        ({"shards": []}, "shards is"),
        ({"shards 0 labels": [[-1, 4]]}, "shards.0.labels.0.0 is -1"),
        ({"shards 0 labels": [[0, 3]]}, "shard-00000.npy has 3 labels for 4 images"),
        ({"shards 0 labels": [[99, 4]]}, "shard-00000.npy has label 99, but there are 4 class names"),
        ({"shards 1 file": "../x.npy"}, r"\.\./x\.npy of .* bytes, expected shard-00001\.npy"),
        ({"shards 1 unreadable": [{"index": 11, "name": "x"}]}, "an unreadable image beyond the 11"),
        ({"autoencoder scaling_factor": 0.0}, "scaling_factor is 0.0, input should be greater than 0"),
        ({"image_size": "16"}, "image_size is '16'"),
    ],
)
def test_manifests_that_disagree_with_themselves(tmp_path, change, message):
    folder, *_ = make_shards(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for path, value in change.items():
        *parts, last = path.split()
        inner = manifest
        for part in parts:
            inner = inner[int(part) if part.isdecimal() else part]
        inner[last] = value
    write_manifest(folder, manifest)
    with pytest.raises(UsageError, match=message) as caught:
        open_features(folder, 16, 0, True)
    assert "\n" not in str(caught.value)


def test_moments_that_are_not_finite_are_replaced_and_named(tmp_path):
    folder, moments, labels = make_shards(tmp_path)
    good = LatentShards(folder, 16, seed=0, flip=False)
    expected = good.__getitems__([(0, index) for index in range(11)])
    shard = np.load(folder / "shard-00000.npy")
    shard[3, 0, 1, 0, 0, 0] = np.inf
    shard[2, 1] = np.nan  # of the mirror image, which is not asked for
    np.save(folder / "shard-00000.npy", shard)
    shard = np.load(folder / "shard-00001.npy")
    shard[0, 0, 0] = np.nan
    np.save(folder / "shard-00001.npy", shard)
    broken = LatentShards(folder, 16, seed=0, flip=False)
    items = broken.__getitems__([(0, index) for index in range(11)])
    assert items["unreadable"].tolist() == [-1, -1, -1, 3, 4, *[-1] * 6]
    assert items["y"].tolist() == [*labels[:3], labels[5], labels[5], *labels[5:]]
    same = [0, 1, 2, *range(5, 11)]
    assert torch.equal(items["x"][same], expected["x"][same]) and items["x"].isfinite().all()
    mean, std = torch.from_numpy(moments[5, 0]).float()
    assert torch.equal(items["x"][3], good.space.latents(mean, std, items["vae_noise"][3]))


def test_a_shard_replaced_during_the_run_is_named(tmp_path):
    folder, *_ = make_shards(tmp_path)
    dataset = LatentShards(folder, 16, seed=0)
    np.save(folder / "shard-00001.npy", np.zeros((4, 2, 2, 2, 4, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="shard-00001.npy does not begin as an array of float16"):
        dataset[0, 5]


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples


def steps(schedule: BatchSchedule, start: int, number: int) -> list:
    """[step][micro-batch] -> keys"""
    stream = schedule.micro_batches(start)
    return [[next(stream) for _ in range(schedule.accumulation)] for _ in range(number)]


def test_an_epoch_is_a_permutation_without_its_rest(tmp_path):
    schedule = BatchSchedule(50, 8, 2, rank=0, world_size=1, seed=1)
    assert schedule.steps_per_epoch == 6
    orders = []
    for epoch in range(3):
        keys = [key for step in steps(schedule, 6 * epoch, 6) for micro in step for key in micro]
        assert {e for e, _ in keys} == {epoch}
        orders.append([index for _, index in keys])
        assert len(set(orders[-1])) == 48
        assert sorted(schedule.order(epoch).tolist()) == list(range(50))
        assert schedule.order(epoch)[:48].tolist() == orders[-1]
    assert orders[0] != orders[1] != orders[2]
    assert BatchSchedule(50, 8, 2, 0, 1, seed=2).order(0).tolist() != schedule.order(0).tolist()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_what_one_process_would_see(world_size, accumulation):
    def schedule(rank, world_size):
        return BatchSchedule(100, 24, accumulation, rank, world_size, seed=5)

    alone = schedule(0, 1)
    ranks = [schedule(rank, world_size) for rank in range(world_size)]
    for together, *parts in zip(steps(alone, 2, 5), *(steps(rank, 2, 5) for rank in ranks), strict=True):
        for micro in range(accumulation):
            assert list(chain.from_iterable(part[micro] for part in parts)) == together[micro]
            assert {len(part[micro]) for part in parts} == {ranks[0].micro_batch_size}
            assert torch.equal(torch.cat([rank.positions(micro) for rank in ranks]), alone.positions(micro))
    everywhere = [rank.positions(micro) for micro in range(accumulation) for rank in ranks]
    assert torch.equal(torch.cat(everywhere), torch.arange(24))


def test_accumulation_does_not_change_the_global_batch():
    whole = steps(BatchSchedule(100, 24, 1, 0, 1, seed=5), 0, 6)
    cut = steps(BatchSchedule(100, 24, 3, 0, 1, seed=5), 0, 6)
    assert [step[0] for step in whole] == [list(chain.from_iterable(step)) for step in cut]


def test_resuming_continues_the_stream():
    def schedule():
        return BatchSchedule(50, 8, 2, rank=1, world_size=2, seed=1)

    whole = steps(schedule(), 0, 20)
    for start in (1, 5, 6, 13):
        assert steps(schedule(), start, 20 - start) == whole[start:]


def test_errors_of_the_schedule():
    with pytest.raises(UsageError, match=r"100 .* 8 processes x 3 .*= 24; nearest sizes: 96 and 120"):
        BatchSchedule(1000, 100, 3, 0, 8, seed=0)
    with pytest.raises(UsageError, match=r"nearest sizes: 8$"):
        BatchSchedule(1000, 4, 1, 0, 8, seed=0)
    with pytest.raises(UsageError, match="15 samples, fewer than one global batch of 16"):
        BatchSchedule(15, 16, 1, 0, 1, seed=0)
    with pytest.raises(UsageError, match="seed -1"):
        BatchSchedule(16, 16, 1, 0, 1, seed=-1)
    assert BatchSchedule(16, 16, 1, 0, 1, seed=0).steps_per_epoch == 1


def batches(dataset, num_workers, start=0, number=6, world_size=1, rank=0):
    schedule = BatchSchedule(len(dataset), 4, 1, rank, world_size, seed=0)
    loader = data.make_loader(dataset, schedule, start, num_workers, pin_memory=False)
    return list(islice(loader, number))


def test_loader_gives_the_same_batches_for_workers_processes_and_resumed_runs(tmp_path):
    root = write_images(tmp_path / "d", per_class=5)
    spoil(root / "ant" / "2.png", "text")
    dataset = ImageData(str(root), 16, LATENT, seed=0)
    alone = batches(dataset, num_workers=0)
    assert alone[0]["x"].shape == (4, 3, 16, 16) and alone[0]["u"].dtype == torch.float64
    assert sum((batch["unreadable"] >= 0).sum() for batch in alone) > 0  # the replaced image is among them
    for batch, same in zip(alone, batches(dataset, num_workers=2), strict=True):
        assert_same(batch, same)
    for batch, same in zip(alone[3:], batches(dataset, 0, start=3, number=3), strict=True):
        assert_same(batch, same)
    halves = [batches(dataset, 0, world_size=2, rank=rank) for rank in range(2)]
    for batch, *parts in zip(alone, *halves, strict=True):
        assert_same(batch, {name: torch.cat([part[name] for part in parts]) for name in batch})


@pytest.mark.slow
def test_loader_works_where_workers_are_spawned(tmp_path):
    dataset = LatentFiles(str(write_latents(tmp_path)), seed=0)
    alone = batches(dataset, num_workers=0, number=3)
    schedule = BatchSchedule(len(dataset), 4, 1, 0, 1, seed=0)
    loader = data.make_loader(dataset, schedule, 0, 1, pin_memory=False)
    loader.multiprocessing_context = "spawn"
    for batch, same in zip(alone, islice(loader, 3), strict=True):
        assert_same(batch, same)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoders


def test_pixel_space_is_the_identity():
    space = autoencoders.load_space("none")
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(space.to("cpu").encode(x, torch.randn_like(x)), x)
    assert torch.equal(space.decode(x), x)
    assert space.decode(torch.tensor([-1.5, 2.0])).tolist() == [-1, 1]  # a sampler may overshoot
    assert (space.channels, space.downsample, space.samples_posterior) == (3, 1, False)
    assert autoencoders.space_info("none").config() == space.config()
    assert json.loads(json.dumps(space.config())) == {
        "path": "none", "scaling_factor": 1.0, "downsample": 1, "channels": 3
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """(folder, the AutoencoderKL saved there): 2 latent channels, 4 times smaller."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder, vae


@pytest.fixture
def vae_copy(tiny_vae, tmp_path):
    """A copy of the folder, to be spoilt."""
    for file in tiny_vae[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@torch.no_grad()
def test_latent_vae_encodes_and_decodes_as_by_hand(tiny_vae):
    folder, vae = tiny_vae
    space = autoencoders.load_space(str(folder)).to("cpu")
    assert (space.channels, space.downsample, space.samples_posterior) == (2, 4, True)
    assert space.config() == {"path": str(folder), "scaling_factor": 0.5, "downsample": 4, "channels": 2}
    assert autoencoders.space_info(str(folder)) == SpaceInfo(str(folder), 2, 4, 0.5, 0.25, True)

    x, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 2, 4, 4)
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    latents = (mean + (log_variance / 2).exp() * noise - 0.25) * 0.5
    images = vae.decoder(vae.post_quant_conv(latents / 0.5 + 0.25))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a training loop's autocast does not reach it
        torch.testing.assert_close(space.encode(x, noise), latents)
        torch.testing.assert_close(space.decode(latents), images.clamp(-1, 1))
        assert space.decode(latents.bfloat16()).dtype == torch.float32
    assert space.decode(100 * latents).abs().max() <= 1
    assert not space.vae.training and not any(p.requires_grad for p in space.vae.parameters())


def test_defaults_of_an_old_config_without_scaling_factor(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]})
    )
    assert autoencoders.space_info(str(tmp_path)) == SpaceInfo(str(tmp_path), 4, 8, 0.18215, 0.0, True)


def test_a_pipeline_a_relative_path_and_home(vae_copy, monkeypatch):
    pipeline = vae_copy.parent / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    vae_copy.rename(pipeline / "vae")
    monkeypatch.chdir(pipeline.parent)
    monkeypatch.setenv("HOME", str(pipeline.parent))
    assert autoencoders.space_info("~/pipeline") == autoencoders.space_info("pipeline")
    space = autoencoders.load_space("pipeline")
    assert space.config()["path"] == str(pipeline)
    assert space.encode(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 2, 2)).shape == (1, 2, 2, 2)


@pytest.mark.parametrize("path", ["/nowhere/vae", "./vae", "../vae", "~/no/vae", "a/b/vae", "vae"])
def test_a_missing_folder_is_found_at_once(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # not even tried
    start = time.perf_counter()
    with pytest.raises(UsageError, match="does not exist"):
        autoencoders.load_space(path)
    assert time.perf_counter() - start < 0.5


def test_folders_that_hold_no_autoencoder(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        autoencoders.load_space(str(tmp_path))
    config = tmp_path / "config.json"
    for content, words in {
        '{"_class_name": "UNet2DModel"}': "UNet2DModel; expected an AutoencoderKL",
        '{"model_type": "clip"}': "clip; expected",
        "{}": "unknown kind",
        '{"_class_name": ': "is not JSON",
        '{"_class_name": "AutoencoderKL", "scaling_factor": 0}': "scaling_factor is 0, input should be greater than 0",
        '{"_class_name": "AutoencoderKL", "latent_channels": "4"}': "latent_channels is '4'",
        '{"_class_name": "AutoencoderKL"}': "no autoencoder weights",
    }.items():
        config.write_text(content)
        with pytest.raises(UsageError, match=words):
            autoencoders.load_space(str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        autoencoders.load_space(str(config))


@pytest.mark.parametrize(
    "damage, words",
    [
        ("truncated", "cannot load"),
        ("empty", "cannot load"),
        ("wrong shape", "cannot load"),
        ("missing tensor", r"lack 1 tensors, e\.g\. decoder\.conv_in\.bias"),
    ],
)
def test_broken_weights(vae_copy, damage, words):
    from safetensors.torch import load_file, save_file

    weights = vae_copy / autoencoders.VAE_WEIGHTS
    state = load_file(weights)
    bias = state.pop("decoder.conv_in.bias")
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "wrong shape":
        save_file(state | {"decoder.conv_in.bias": bias[:3]}, weights)
    else:
        save_file(state, weights)
    with pytest.raises(UsageError, match=words) as caught:
        autoencoders.load_space(str(vae_copy))
    assert "\n" not in str(caught.value)


def test_a_cached_hub_name_needs_no_network(tiny_vae, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    repo = tmp_path / "models--stabilityai--sd-vae-ft-ema"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123456789" * 4)
    (repo / "snapshots").mkdir()
    os.symlink(tiny_vae[0], repo / "snapshots" / ("0123456789" * 4))
    space = autoencoders.load_space("ema")
    assert space.config()["path"] == "stabilityai/sd-vae-ft-ema"
    assert space.scaling_factor == 0.5


def test_an_unreachable_hub_fails_soon_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    for name in ("mse", "owner/name", "owner/no name"):
        with pytest.raises(UsageError, match=r"download it .* give its folder") as caught:
            autoencoders.load_space(name)
        assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5
