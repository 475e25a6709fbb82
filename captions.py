"""Images with captions, of which one counts each time: where both are found, and how they come together as samples.

A `--data-path` of them is one of

    a folder of `X.png` with `X.txt` beside it
    a folder with `captions.jsonl`, for each image a line `{"path": "images/1.png", "caption": "..."}`, or with
    `captions.csv` of the columns path and caption; or such a table anywhere, whose folder the paths are below. An image
    may have several lines
    a `.yaml` of Large-DiT-T2I: `META`, a list of `path` (.json or .jsonl of `path` and `prompt`, or of `image` and
    `conversations`), `root` (of `image`) and `ratio` (how much of it); paths are as they stand there
    a folder of tar files as webdataset has them, whose members `X.jpg` and `X.txt` belong together
    the SA-1B of PixArt: `images/X.jpg`, `captions/X.txt`, the names X in `partition/*.txt`; with captions' features of
    PixArt's extraction in `caption_feature_wmask/X.npz`, which count where no encoder is named

and a `--feature-path` one that extract_features.py wrote with `--text-encoder`, or the SA-1B, whose latents lie in
`img_vae_feature/train_vae_256/noflip/X.npy`.

N samples of a batch · L tokens · C width of a token's features
"""

import csv
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import default_collate

from autoencoders import SpaceInfo, Statistics, space_info
from caption_features import FeatureShards, StoredTexts
from cli import UsageError
from data import FileSamples, ImageData, Reading, Samples, draw_randomness, is_data, parallel, require_folder
from files import lines_of
from hub import brief
from latents import MANIFEST, LatentShards, read_manifest
from prompts import fault_of
from text import padded

TABLES = ("captions.jsonl", "captions.csv")
KNOWN = 16  # captions that checkpoints keep, for what draws without being asked
SA1B_FEATURES, SA1B_LATENTS = "caption_feature_wmask", os.path.join("img_vae_feature", "train_vae_256", "noflip")


# ---------------------------------------------------------------------------------------------------------------- texts


class Texts:
    """The captions of images, in one block that worker processes need not copy: `texts[number]`."""

    def __init__(self, of_images: Sequence[Sequence[str]]):
        encoded = [text.encode(errors="surrogateescape") for texts in of_images for text in texts]
        self._ends, self._block = np.cumsum([len(text) for text in encoded]), b"".join(encoded)
        self.first = np.concatenate([[0], np.cumsum([len(texts) for texts in of_images])])  # number, of each image

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        begin = self._ends[number - 1] if number else 0
        return self._block[begin : self._ends[number]].decode(errors="surrogateescape")

    def of_image(self, index: int) -> list[str]:
        return [self[number] for number in range(self.first[index], self.first[index + 1])]

    def digest(self) -> bytes:
        return hashlib.sha256(self._block + self._ends.tobytes() + self.first.tobytes()).digest()


class Features(Protocol):
    """Features of captions that are on disk."""

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(N, L, C) fp32 and (N, L) of captions by their numbers."""


class CaptionedSamples(Samples):
    """`images` gives x, of each image one of its captions gives the rest: drawn for each epoch where it has several.

    Items are those of `images`, whose labels are their own numbers; y is the number of the caption, and text (L, C) and
    text_mask (L,) its features where they are on disk.
    """

    def __init__(
        self, images: Samples, first: np.ndarray, texts: Texts | None = None, features: Features | None = None
    ):
        super().__init__(np.arange(len(images)), [], images.latent_shape, images.seed)
        self.images, self.first, self.texts, self.features = images, first, texts, features
        images.labels = self.labels
        self.image_size, self.notes = images.image_size, images.notes

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        whole = getattr(self.images, "__getitems__", None)
        batch = whole(keys) if whole else default_collate([self.images[key] for key in keys])
        pairs = zip(keys, batch["y"].tolist(), strict=True)
        numbers = [self.choose(epoch, image) for (epoch, _), image in pairs]
        batch["y"] = torch.tensor(numbers)
        if self.features is not None:
            batch["text"], batch["text_mask"] = self.features.batch(numbers)
        return batch

    def choose(self, epoch: int, image: int) -> int:
        """The number of a caption of an image. The 3 sets its generator apart from the others of the sample."""
        count = int(self.first[image + 1] - self.first[image])
        drawn = 0 if count == 1 else int(np.random.default_rng([self.seed, epoch, image, 3]).integers(count))
        return int(self.first[image]) + drawn

    def caption(self, number: int) -> str:
        return self.texts[number]

    def name_of(self, index: int) -> str:
        return self.images.name_of(index)

    def fingerprint(self) -> str:
        """As of the images, and over the captions, or how many of them each image has."""
        return self._with_captions(self.images.fingerprint())

    def _with_captions(self, images: str) -> str:
        captions = self.first.tobytes() if self.texts is None else self.texts.digest()
        return hashlib.sha256(images.encode() + captions).hexdigest()

    def record(self) -> dict:
        record = self.images.record()
        record["fingerprint"] = self._with_captions(record["fingerprint"])
        del record["class_names"]
        return record | {"captions": self.known()}

    def known(self) -> list[str]:
        """The first captions."""
        return [] if self.texts is None else [self.texts[number] for number in range(min(KNOWN, len(self.texts)))]


# --------------------------------------------------------------------------------------------------------------- images


class NamedImages(ImageData):
    """Images by their names below a folder, without classes."""

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        image_size: int,
        space: SpaceInfo,
        seed: int,
        flip: bool,
        reading: Reading,
    ):
        side = self._side(image_size, space)
        shape = (space.channels, side, side)
        super(ImageData, self).__init__(str(root), names, np.arange(len(names)), [], shape, seed)
        self.image_size, self.posterior = image_size, space.samples_posterior
        self.flip, self.reading = flip, reading


class TarImages(NamedImages):
    """Images within tar files; a name is that of the tar file and of the member, with a slash between."""

    def __init__(self, root: str, members: "Sequence[Member]", *settings):
        super().__init__(root, [f"{tar}/{name}" for tar, name, _, _ in members], *settings)
        self.tars = sorted({tar for tar, _, _, _ in members})
        number = {tar: i for i, tar in enumerate(self.tars)}
        self.places = np.array([(number[tar], offset, size) for tar, _, offset, size in members], dtype=np.int64)

    def source(self, index: int) -> io.BytesIO:
        tar, offset, size = self.places[index]
        with open(os.path.join(self.root, self.tars[tar]), "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def _sizes(self) -> list[int]:
        return self.places[:, 2].tolist()


Member = tuple[str, str, int, int]  # tar file, name in it, offset, bytes


def open_captioned(
    path: Path, image_size: int, space: SpaceInfo, seed: int, flip: bool, reading: Reading, encoded: bool = True
) -> CaptionedSamples:
    """Images and captions of a `--data-path`.

    Args:
        encoded: the caller encodes texts; else features on disk are what counts.

    Raises:
        UsageError: no captions, no image for one or none for an image, no UTF-8, an empty or endless caption.
    """
    settings = (image_size, space, seed, flip, reading)
    if (path / "partition").is_dir():
        return open_sa1b(path, lambda names: NamedImages(str(path / "images"), names, *settings), encoded)
    if not encoded:
        raise UsageError(f"--data-path {path} has no features of captions: --text-encoder NAME reads the captions")
    if path.is_dir() and (tars := sorted(path.glob("*.tar"))):
        members, texts = read_tars(path, tars)
        return _with_texts(TarImages(str(path), members, *settings), texts)
    root, pairs = read_captions(path)
    of_images: dict[str, list[str]] = {}
    for name, caption in pairs:
        of_images.setdefault(name, []).append(caption)
    return _with_texts(NamedImages(str(root), list(of_images), *settings), list(of_images.values()))


def _with_texts(images: Samples, of_images: Sequence[Sequence[str]]) -> CaptionedSamples:
    texts = Texts(of_images)
    return CaptionedSamples(images, texts.first, texts)


def read_captions(path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """(folder, (name below it, caption) of each image) of a table or of pairs of files. Raises UsageError."""
    if path.suffix in (".yaml", ".yml"):
        root, table = Path(), path
    elif path.suffix in (".jsonl", ".csv"):
        root, table = path.parent, path
    else:
        require_folder(path, "data path")
        root, table = path, next((path / name for name in TABLES if (path / name).is_file()), None)
    if table is None:
        pairs = _of_pairs(root)
    else:
        pairs = _of_meta(table) if table.suffix in (".yaml", ".yml") else _of_table(table)
    for name, text in pairs:
        check_caption(text, name, root)
    if absent := [name for name, _ in pairs if not (root / name).is_file()]:
        raise UsageError(f"{table} has a caption for {absent[0]}, which is not in {root} ({len(absent)} such images)")
    return root, pairs


def check_caption(text: str, name: str, root: Path) -> None:
    if fault := fault_of(text):
        raise UsageError(f"{root}: the caption of {name} {fault}")


def _of_table(table: Path) -> list[tuple[str, str]]:
    pairs, is_csv = [], table.suffix == ".csv"
    try:
        with open(table, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if is_csv else lines_of(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, row in enumerate(rows, start=2 if is_csv else 1):
        try:
            row = row if is_csv else json.loads(row)
            pairs.append((row["path"], row["caption"].strip()))
        except (ValueError, KeyError, TypeError, AttributeError):
            expected = "the columns path and caption" if is_csv else '{"path": "IMAGE", "caption": "TEXT"}'
            raise UsageError(f"{table}, line {number}: expected {expected}, got {str(row)[:60]}") from None
    if not pairs:
        raise UsageError(f"{table} has no captions")
    return pairs


def _of_meta(path: Path) -> list[tuple[str, str]]:
    """Of a YAML that names lists of items. Raises UsageError."""
    expected = "META: a list of {path: LIST.json, root: FOLDER, ratio: SHARE}"
    try:
        lists = yaml.safe_load(path.read_text(encoding="utf-8"))["META"]
        pairs = [pair for each in lists for pair in _of_items(each["path"], each.get("root"), each.get("ratio", 1))]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read ({brief(error)}): expected {expected}") from None
    if not pairs:
        raise UsageError(f"{path} has no captions")
    return pairs


def _of_items(path: str, root: str | None, ratio: float) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            items = list(map(json.loads, lines_of(file))) if path.endswith(".jsonl") else json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if ratio < 1:
        items = random.Random(0).sample(items, int(len(items) * ratio))
    pairs = []
    for number, item in enumerate(items):
        try:
            if "image" in item:
                name = item["image"] if root is None else os.path.join(root, item["image"])
                pairs.append((name, item["conversations"][1]["value"].strip()))
            else:
                pairs.append((item["path"], item["prompt"].strip()))
        except (KeyError, TypeError, IndexError, AttributeError):
            raise UsageError(f"{path}, item {number}: expected path and prompt, got {str(item)[:60]}") from None
    return pairs


def _of_pairs(root: Path) -> list[tuple[str, str]]:
    files = sorted(os.path.relpath(file, root) for file in root.rglob("*") if is_data(file.name) and file.is_file())
    images = pair_names(files, root)
    return list(zip(images, parallel(lambda name: read_text(root / f"{stem(name)}.txt"), images), strict=True))


def pair_names(files: Sequence[str], root: Path) -> list[str]:
    """The images among names of files, each with a text of its name. Raises UsageError."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    images = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
    texts, stems = {stem(name) for name in files if name.endswith(".txt")}, {stem(name) for name in images}
    if lonely := sorted(stems - texts):
        raise UsageError(f"{root} has no {lonely[0]}.txt with the caption of that image, and no {TABLES[0]}")
    if lonely := sorted(texts - stems):
        raise UsageError(f"{root} has a caption {lonely[0]}.txt, but no image of that name")
    if not images:
        raise UsageError(f"no images with captions in {root}: expected X.png and X.txt, or {TABLES[0]}")
    return images


def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def read_text(path: Path) -> str:
    """Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_tars(root: Path, tars: Sequence[Path]) -> tuple[list[Member], list[list[str]]]:
    """The images in tar files and their captions. Raises UsageError."""
    members, captions = [], []
    for tar in tars:
        found, texts = {}, {}
        try:
            with tarfile.open(tar) as archive:
                for member in archive:
                    if not member.isfile() or not is_data(os.path.basename(member.name)):
                        continue
                    if member.name.endswith(".txt"):
                        texts[stem(member.name)] = archive.extractfile(member).read().decode().strip()
                    found[member.name] = (tar.name, member.name, member.offset_data, member.size)
        except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise UsageError(f"{tar} cannot be read: {brief(error)}") from None
        for name in pair_names(sorted(found), tar):
            check_caption(texts[stem(name)], name, tar)
            members.append(found[name])
            captions.append([texts[stem(name)]])
    return members, captions


# --------------------------------------------------------------------------------------------------------------- SA-1B


class NpzFeatures:
    """One file for each caption, as PixArt's extraction writes them: tokens that are masked are not there."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, np.array([os.fsencode(name) for name in names])
        self.shape = self._arrays(0)[0].shape  # tokens, masked ones too, and their width

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        return padded([self._read(number) for number in numbers])

    def _read(self, number: int) -> Tensor:
        features, mask = self._arrays(number)
        return torch.from_numpy(features[mask.astype(bool)]).float()

    def _arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.folder / f"{os.fsdecode(self.names[number])}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                features = file["caption_feature"]  # each access reads and unpacks it
                features = features.reshape(-1, features.shape[-1])
                mask = file["attention_mask"].reshape(-1) if "attention_mask" in file.files else np.ones(len(features))
        except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
            raise UsageError(f"{path} holds no features of a caption: {brief(error)}") from None
        if len(mask) != len(features) or not mask.any():
            raise UsageError(f"{path} has {len(features)} tokens and a mask of {int(mask.sum())} among {len(mask)}")
        return features, mask


class NpyMoments(FileSamples):
    """Latents of one file per image, (2C,h,w): mean and deviation, of which a sample is drawn when it is read."""

    def __init__(self, root: str, names: Sequence[str], space: SpaceInfo, seed: int):
        super().__init__(root, [f"{name}.npy" for name in names], np.arange(len(names)), [], (0, 0, 0), seed)
        channels, *sides = self._load(self.name_of(0)).shape
        self.latent_shape, self.space = (channels // 2, *sides), space
        self.image_size = sides[0] * space.downsample

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        _, entries = draw_randomness(self.seed, epoch, index, self.latent_shape, posterior=True)
        found, moments = self.first_readable(index, self._load)
        mean, std = torch.from_numpy(moments).float().chunk(2)
        return self._item(self.space.latents(mean, std, entries["vae_noise"]), entries, index, found)

    def _load(self, name: str) -> np.ndarray:
        moments = np.load(name, allow_pickle=False)
        if moments.ndim != 3 or moments.shape[0] % 2 or not np.isfinite(moments).all():
            raise ValueError(f"{name} holds {moments.shape}: expected finite (2C, h, w), means and deviations")
        return moments


def open_captioned_features(
    path: Path,
    image_size: int | None,
    vae_path: str,
    seed: int,
    flip: bool,
    statistics: Statistics | None = None,
    *,
    encoded: bool,
) -> CaptionedSamples:
    """Latents of images and captions, or their features, of a `--feature-path`.

    Args:
        vae_path: the autoencoder of latents that do not tell theirs: those of the SA-1B layout.
        statistics: of those latents, as in `space_info`.
        encoded: the caller encodes texts; else features on disk are what counts.

    Raises:
        UsageError: it has no captions, is damaged, or of another image size.
    """
    if (path / "partition").is_dir():
        space = space_info(vae_path, statistics)
        data = open_sa1b(
            path, lambda names: NpyMoments(str(path / SA1B_LATENTS), names, space, seed), encoded, bare=True
        )
        if image_size not in (None, data.image_size):
            raise UsageError(f"the features in {path} are of images of {data.image_size} pixels, not {image_size}")
        return data
    images = LatentShards(path, image_size, seed, flip)
    manifest = images.manifest
    if "text" not in manifest:
        raise UsageError(f"{path} has latents without captions: extract them with --text-encoder")
    features = FeatureShards(path, len(manifest["shards"]), manifest["text"])
    if len(features.first) != len(images) + 1:
        raise UsageError(f"{path}: captions of {len(features.first) - 1} images, latents of {len(images)}")
    return CaptionedSamples(images, features.first, Texts([[text] for text in manifest["captions"]]), features)


def stored_texts(path: Path) -> StoredTexts | None:
    """What is known of features of captions in a `--data-path` or `--feature-path`; None where there are none."""
    if (path / "partition").is_dir() and (path / SA1B_FEATURES).is_dir():
        found = next((path / SA1B_FEATURES).rglob("*.npz"), None)
        if found is None:
            raise UsageError(f"{path / SA1B_FEATURES} has no .npz files")
        one = NpzFeatures(found.parent, [found.stem])
        length, width = one.shape
        return StoredTexts(width, length, {"name": "t5", "kind": "t5", "length": length})
    if (path / MANIFEST).is_file() and "text" in (manifest := read_manifest(path)):
        record = manifest["text_encoder"]
        return StoredTexts(manifest["text"]["width"], record["length"], record)
    return None


def open_sa1b(path: Path, images: Callable[[Sequence[str]], Samples], encoded: bool, bare: bool = False):
    """PixArt's layout: `images` opens what the names (`bare`: without suffix) in `partition/` name.

    Raises:
        UsageError: a part of it is missing.
    """
    lists = sorted((path / "partition").glob("*.txt"))
    names = [line.strip() for each in lists for line in read_text(each).splitlines() if line.strip()]
    names = [stem(name) if name.lower().endswith((".jpg", ".png")) else name for name in names]
    if not names:
        raise UsageError(f"{path / 'partition'} names no images: expected part00.txt with a name a line")
    opened = images(names if bare else [f"{name}.jpg" for name in names])
    first, features, texts = np.arange(len(names) + 1), None, None
    if not encoded and (path / SA1B_FEATURES).is_dir():
        features = NpzFeatures(path / SA1B_FEATURES, names)
    if features is None and not encoded:
        raise UsageError(f"{path} has no {SA1B_FEATURES}: --text-encoder NAME reads the captions")
    some = names if features is None else names[:KNOWN]
    if features is None or all((path / "captions" / f"{name}.txt").is_file() for name in some):
        captions = parallel(lambda name: read_text(path / "captions" / f"{name}.txt"), some)
        for name, caption in zip(some, captions, strict=True):
            check_caption(caption, name, path)
        texts = Texts([[caption] for caption in captions])
    return CaptionedSamples(opened, first, texts, features)
