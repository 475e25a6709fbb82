"""Latents on disk, to train without the autoencoder: shards of moments (ours) or one file per image (fast-DiT's).

N batch, n images of a shard, C latent channels, h w latent height and width.

A folder that extract_features.py has finished:

    manifest.json     what was extracted, from what and how; the shards' labels; SHA-256 of every file, and its own
    images.json       the images' names, in the order of the data set
    shard-00000.npy   (n,2,2,C,h,w) of each image as it is and mirrored, of these the posterior's mean and standard
    ...               deviation
    captions-...      features of captions, where there are some: caption_features.py
    representation-00000.npy    (n,2,T,F) float16 of the same images, the features of an encoder in each of T places,
    ...                         which training may be aligned with: representation.py

Moments are kept instead of a sample, so that every epoch draws its own latents, as it does from images. They stand in
the autoencoder's own units: its deviations lie in [e^-15, e^10], which float16 holds, never as 0 and never as infinity
(they are 0 where an image has one latent alone);
times Stable Diffusion's 0.18 the smallest would be less than float16's smallest step. Shift and scale come when a
sample is drawn.
"""

import functools
import io
import math
import mmap
import os
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from autoencoders import KINDS, Measured, SpaceInfo
from caption_features import TextSettings
from cli import UsageError
from configuration import LIMITS
from data import (
    FileSamples,
    Samples,
    draw_batch,
    draw_randomness,
    file_size,
    is_data,
    parallel,
    require_folder,
    successors,
)
from files import digest, digest_of, replace_json
from hub import brief
from records import BadRecord, Name, read_record

FORMAT = 1
MANIFEST, NAMES = "manifest.json", "images.json"
PLAN = "extraction.json"  # the settings of an extraction that is under way
LEAST_VARIANCE = 1e-12  # of a channel that does not vary, which is to be divided by its root
FACTOR = 8  # pixels of an image's side for each of its latents', in fast-DiT's features, which do not say it
ITEM_AXES = ["as it is, mirrored", "mean, standard deviation", "channel", "row", "column"]


Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class File(TypedDict):
    file: str
    bytes: Natural
    sha256: str


class Unreadable(TypedDict):
    index: Natural
    name: Name


class Shard(File):
    labels: Annotated[list[Annotated[list[Natural], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    unreadable: list[Unreadable]
    captions: NotRequired[list[File]]  # features, and where they end
    sums: NotRequired[Annotated[list[list[float]], Field(min_length=2, max_length=2)]]  # `sums_of` its latents
    representation: NotRequired[list[File]]


class Autoencoder(Measured):
    path: Name
    channels: Positive
    downsample: Positive
    scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    shift_factor: Annotated[float, Field(allow_inf_nan=False)]
    kind: NotRequired[Literal[tuple(KINDS)]]
    sha256: NotRequired[str]


class Images(TypedDict):
    samples: Positive
    fingerprint: NotRequired[str]
    class_names: list[Name]


class Representation(TypedDict):
    """Features of an encoder of images."""

    name: Name
    side: Positive  # places in a row, and in a column
    width: Positive
    sha256: str


class Settings(TypedDict):
    """extraction.json: what shapes the features."""

    format: int
    image_size: Positive
    dtype: Literal["float16", "float32"]
    item_shape: Annotated[list[Positive], Field(min_length=5, max_length=5)]
    shard_size: Positive
    autoencoder: Autoencoder
    data: Images
    text: NotRequired[TextSettings]  # of features of captions
    text_encoder: NotRequired[dict]
    representation: NotRequired[Representation]
    captions: NotRequired[list[Name]]  # the first ones


class Manifest(Settings):
    """manifest.json"""

    images: NotRequired[File]
    empty: NotRequired[File]  # features of the empty caption
    statistics: NotRequired[Measured]  # of the latents, which --latent-stats may ask for
    shards: Annotated[list[Shard], Field(min_length=1)]
    sha256: str


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def representation_path(folder: Path, number: int) -> Path:
    return folder / f"representation-{number:05d}.npy"


def open_features(path: str | Path, image_size: int | None, seed: int, flip: bool) -> "LatentShards | LatentFiles":
    """The latents in a folder, in whichever of the two formats they are; `image_size` None: of whatever images.

    Raises:
        UsageError: neither format, unfinished, damaged, or of another image size.
    """
    require_folder(path, "feature path")
    if any((Path(path) / name).exists() for name in (MANIFEST, PLAN)) or shard_path(Path(path), 0).exists():
        return LatentShards(path, image_size, seed, flip)
    data = LatentFiles(path, seed)
    if image_size not in (None, data.image_size):
        raise UsageError(f"the features in {path} are of images of {data.image_size} pixels, not {image_size}")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Shards of moments


class LatentShards(Samples):
    """Moments of images and mirrored images. Items are those of ImageData, but x holds the (C,h,w) latents that the
    autoencoder would give for that image, flip and noise. With `reads_representation`, they have features (T,F), too.

    Batches are read whole (`__getitems__`); what is drawn for a sample is the same as one by one.
    """

    def __init__(self, path: str | Path, image_size: int | None, seed: int, flip: bool = True):
        self.folder = Path(path)
        manifest = self.manifest = read_manifest(self.folder)
        if image_size not in (None, manifest["image_size"]):
            raise UsageError(
                f"the features in {path} are of images of {manifest['image_size']} pixels, not {image_size}: "
                f"--image-size {manifest['image_size']}, or other features"
            )
        shards = manifest["shards"]
        for record in (*shards, *([manifest["empty"]] if "empty" in manifest else ())):
            if problem := damage(self.folder, record, read=False):
                raise UsageError(f"{problem}; {REPAIR}")
        labels, counts = zip(*(run for record in shards for run in record["labels"]), strict=True)
        names = manifest["data"]["class_names"]
        super().__init__(np.repeat(labels, counts), names, manifest["item_shape"][2:], seed)

        self.image_size = manifest["image_size"]
        facts = manifest["autoencoder"]
        self.sha256 = facts.get("sha256")  # of the autoencoder's weights
        self.space = SpaceInfo.recorded(facts)
        self.flip = flip
        self.shard_size = manifest["shard_size"]
        self.dtype = np.dtype(manifest["dtype"])
        self._moments = MappedShards(self, shard_path, self.dtype, (2, *self.latent_shape))
        self._representation, self.reads_representation = None, False
        if stored := manifest.get("representation"):
            shape = (stored["side"] ** 2, stored["width"])
            self._representation = MappedShards(self, representation_path, np.dtype(np.float16), shape)
        self.unreadable = np.full(len(self), -1)
        replaced = [image["index"] for record in shards for image in record["unreadable"]]
        self.unreadable[replaced] = replaced
        self._fingerprint = manifest["sha256"]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """A batch, put together: every entry of an item, with N in front."""
        indices = np.array([index for _, index in keys])
        flips, drawn = draw_batch(self.seed, keys, self.latent_shape, posterior=True)
        mirrored = flips & self.flip
        moments, found = self.moments(indices, mirrored).float(), indices.copy()
        for row in np.flatnonzero(~_are_finite(moments)):
            moments[row], found[row] = self._next_finite(indices[row], mirrored[row])
        mean, std = moments.unbind(1)  # (N,C,h,w) each
        if self.reads_representation:
            drawn["features"] = self._representation.rows(found, mirrored)
        return {
            "x": self.space.latents(mean, std, drawn["vae_noise"]),
            "y": torch.from_numpy(self.labels[found]),
            "index": torch.from_numpy(indices),
            "unreadable": torch.from_numpy(np.where(found == indices, self.unreadable[indices], indices)),
            **drawn,
        }

    def _next_finite(self, index: int, mirrored: bool) -> tuple[Tensor, int]:
        """(2,C,h,w) moments of the first image after `index` whose moments are finite, and which that is."""
        for candidate in successors(index, len(self)):
            moments = self.moments(np.array([candidate]), np.array([mirrored])).float()
            if _are_finite(moments).all():
                return moments[0], candidate
        raise RuntimeError(f"{self.name_of(index)} is not finite, nor are those that follow it")

    def moments(self, indices: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(N,2,C,h,w) mean and standard deviation as stored, of the images or of their mirror images."""
        return self._moments.rows(indices, mirrored)

    def compare_with(self, space: SpaceInfo) -> None:
        """Raises UsageError if `space`, which is to decode what is learned from these latents, is another."""
        ours, of_channels = self.space_record(), dict.fromkeys(Measured.__annotations__)
        for field, theirs in (of_channels | space.record()).items():
            usual = (theirs,) if field in of_channels else (None, theirs)
            if field != "path" and ours.get(field) not in usual:
                raise UsageError(
                    f"the features in {self.folder} were made by the autoencoder {self.space.path} with {field} "
                    f"{ours[field]}; --vae-path {space.path} has {theirs}"
                )

    def space_record(self) -> dict:
        """`SpaceInfo.record` of the autoencoder that made these latents."""
        return self.space.record() | ({"sha256": self.sha256} if self.sha256 else {})

    def name_of(self, index: int) -> str:
        number, row = divmod(index, self.shard_size)
        return f"{self._image_names[index]} ({shard_path(self.folder, number)}, row {row})"

    @functools.cached_property
    def _image_names(self) -> list[str]:
        names = read_record(self.folder / NAMES, list[Name], REPAIR)
        if len(names) != len(self):
            raise BadRecord(f"{self.folder / NAMES} has {len(names)} names for {len(self)} images; {REPAIR}")
        return names

    def fingerprint(self) -> str:
        """Of the manifest, and so of every byte and label."""
        return self._fingerprint


def _are_finite(latents: Tensor) -> np.ndarray:
    """(N, ...) -> (N,) bool."""
    return latents.isfinite().flatten(1).all(dim=1).numpy()


class MappedShards:
    """Arrays (n,2,...) of the images of each shard and their mirror images, memory-mapped: of an item (2,`shape`)."""

    def __init__(self, data: LatentShards, path_of, dtype: np.dtype, shape: tuple[int, ...]):
        self.folder, self.path_of, self.dtype, self.shape = data.folder, path_of, dtype, shape
        self.count, self.shard_size = len(data), data.shard_size
        self._shards: list[_MappedShard | None] = [None] * -(-self.count // self.shard_size)

    def rows(self, indices: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(N, `shape`) as stored, of the images or of their mirror images."""
        gathered = np.empty((len(indices), *self.shape), self.dtype)
        rows = gathered.reshape(len(indices), -1)
        shards, places = np.divmod(indices, self.shard_size)
        wanted = list(zip(map(self._shard, shards.tolist()), (2 * places + mirrored).tolist(), strict=True))
        for shard, place in wanted:  # the disk fetches all while the first is copied
            shard.read_ahead(place)
        for row, (shard, place) in enumerate(wanted):  # gathered shard by shard, all would be copied twice
            rows[row] = shard.rows[place]
        return torch.from_numpy(gathered)

    def _shard(self, number: int) -> "_MappedShard":
        """Mapped when it is first needed in this process."""
        if self._shards[number] is None:
            count = min(self.shard_size, self.count - number * self.shard_size)
            self._shards[number] = _MappedShard(self.path_of(self.folder, number), self.dtype, (count, 2, *self.shape))
        return self._shards[number]

    def __getstate__(self) -> dict:
        """For workers that are spawned: they map the shards themselves; pickled maps would be read as a whole."""
        return vars(self) | {"_shards": [None] * len(self._shards)}


class _MappedShard:
    """A shard in memory as far as it has been read: `rows` (2n, ...), flat."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        header = npy_header(dtype, shape)
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise ValueError(f"{path} does not begin as an array of {dtype} {shape}")
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.rows = np.frombuffer(self.memory, dtype, offset=len(header)).reshape(2 * shape[0], -1)
        self.offset, self.row_bytes = len(header), self.rows[0].nbytes

    def read_ahead(self, place: int) -> None:
        """Have a row fetched, without waiting: from a cold disk, one row after the other takes many times longer."""
        start = self.offset + place * self.row_bytes
        self.memory.madvise(mmap.MADV_WILLNEED, start - start % mmap.PAGESIZE, self.row_bytes + start % mmap.PAGESIZE)


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """How an .npy file of such an array begins."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


REPAIR = "delete that file and run the same extract_features.py command again: it makes what is missing"


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished extraction.

    Raises:
        UsageError: there is none, or it is not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PLAN).exists():
            raise UsageError(
                f"the extraction into {folder} has not finished: run the same extract_features.py command again"
            )
        raise UsageError(f"no {MANIFEST} in {folder}: not a folder that extract_features.py has written")
    manifest = read_record(path, Manifest, "extract the features anew", FORMAT)
    if manifest["sha256"] != digest_of({key: value for key, value in manifest.items() if key != "sha256"}):
        raise BadRecord(f"{path} is damaged: it does not match its own SHA-256; extract the features anew")
    check_agreement(path, manifest)
    return manifest


def check_agreement(path: Path, manifest: "Manifest") -> None:
    """Raises UsageError for a manifest whose parts contradict one another."""
    data, shards, size = manifest["data"], manifest["shards"], manifest["shard_size"]
    samples, classes, shape = data["samples"], len(data["class_names"]), manifest["item_shape"]

    def wrong(what: str) -> BadRecord:
        return BadRecord(f"{path}: {what}; extract the features anew")

    if shape[:2] != [2, 2] or shape[2] != manifest["autoencoder"]["channels"]:
        raise wrong(f"item_shape is {shape}, expected 2, 2, {manifest['autoencoder']['channels']} channels, h, w")
    if len(shards) != -(-samples // size):
        raise wrong(f"{len(shards)} shards of {size} for {samples} samples")
    for number, shard in enumerate(shards):
        name, count = shard_path(Path(), number).name, min(size, samples - number * size)
        header = len(npy_header(np.dtype(manifest["dtype"]), (count, *shape)))
        expected = header + count * math.prod(shape) * np.dtype(manifest["dtype"]).itemsize
        if (shard["file"], shard["bytes"]) != (name, expected):
            raise wrong(f"{shard['file']} of {shard['bytes']} bytes, expected {name} of {expected}")
        if sum(run for _, run in shard["labels"]) != count:
            raise wrong(f"{name} has {sum(run for _, run in shard['labels'])} labels for {count} images")
        if (label := max(label for label, _ in shard["labels"])) >= (classes or 1):
            raise wrong(f"{name} has label {label}, but there are {classes} class names")
        if any(image["index"] >= samples for image in shard["unreadable"]):
            raise wrong(f"{name} has an unreadable image beyond the {samples}")


def write_manifest(folder: Path, manifest: dict) -> None:
    """Put it in place, whole and with its own SHA-256. Raises OSError."""
    replace_json(folder / MANIFEST, manifest | {"sha256": digest_of(manifest)})


def sums_of(moments: np.ndarray) -> np.ndarray:
    """(n,2,2,C,h,w) moments -> (2,C) float64: sums of latents and of their squares, mirror images counted too."""
    mean, std = moments.astype(np.float64).swapaxes(0, 2).reshape(2, -1, *moments.shape[3:])  # each (2n,C,h,w)
    return np.stack([mean.sum(axis=(0, 2, 3)), (mean**2 + std**2).sum(axis=(0, 2, 3))])


def statistics_of(sums: np.ndarray, count: int) -> dict:
    """`sums_of` a data set with `count` values in each channel -> its `Measured`."""
    mean, square = sums / count
    return {
        "latents_mean": mean.tolist(),
        "latents_std": np.sqrt(np.maximum(square - mean**2, LEAST_VARIANCE)).tolist(),
    }


def damage(folder: Path, record: dict, read: bool = True) -> str | None:
    """What is wrong with a file that a manifest names: nothing, or a line. Compares the size, and reads it if asked.

    Of a shard its features of captions, and of an encoder of images, count too.
    """
    for other in (*record.get("captions", ()), *record.get("representation", ())):
        if problem := damage(folder, other, read):
            return problem
    path, expected = folder / record["file"], record["bytes"]
    size = file_size(path)
    if size < 0:
        return f"{path} is missing"
    if size != expected:
        return f"{path} is damaged: it has {size} bytes, not {expected}"
    if read and digest(path)["sha256"] != record["sha256"]:
        return f"{path} is damaged: its SHA-256 is not the one in the manifest"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# One file per image


class LatentFiles(FileSamples):
    """Latents as fast-DiT extracts them: NAME_features/{i}.npy float32 (1,C,h,w), already scaled, and
    NAME_labels/{i}.npy int64 (1,), both folders in `path`. Items as ImageData's, x being the (C,h,w) latents.

    Reads every label at the start: classes are 0 to the largest label.
    """

    def __init__(self, path: str, seed: int):
        require_folder(path, "feature path")
        features, labels = _feature_folders(path)
        names, label_names = (
            [name for name in os.listdir(folder) if name.endswith(".npy") and is_data(name)]
            for folder in (features, labels)
        )
        names.sort(key=lambda name: (len(name), name))
        if not names:
            raise UsageError(f"no .npy files in {features}")
        if unpaired := set(label_names).symmetric_difference(names):
            counts = f"{len(names)} files in {features}, {len(label_names)} in {labels}"
            raise UsageError(f"features and labels do not match: {counts}; {min(unpaired)} is in one of them only")

        paths = [os.path.join(features, name) for name in names]
        try:
            latent_shape = _load_latent(paths[0]).shape
        except ValueError as error:
            raise UsageError(str(error)) from error
        sizes = parallel(file_size, paths)
        if odd := next((name for name, size in zip(paths, sizes, strict=True) if size != sizes[0]), None):
            raise UsageError(f"{odd} is not as large as {paths[0]}: latents must have one shape and float32 values")
        values = _read_labels([os.path.join(labels, name) for name in names])
        class_names = [str(label) for label in range(max(values) + 1)]
        super().__init__(features, names, values, class_names, latent_shape, seed)
        self.image_size = FACTOR * latent_shape[1]
        self.notes.append(
            f"features of one file per image: taken for images of {self.image_size} pixels ({FACTOR} for one of the "
            f"latents'); there are no mirror images among them, whatever --flip says"
        )

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        _, entries = draw_randomness(self.seed, epoch, index, self.latent_shape, posterior=False)
        found, latent = self.first_readable(index, self._load)
        return self._item(torch.from_numpy(latent), entries, index, found)

    def _load(self, name: str) -> np.ndarray:
        latent = _load_latent(name)
        if latent.shape != self.latent_shape:
            raise ValueError(f"{name} has latents {latent.shape}, the others {self.latent_shape}")
        if not np.isfinite(latent).all():
            raise ValueError(f"{name} has latents that are not finite")
        return latent


def _feature_folders(path: str) -> tuple[str, str]:
    """The one pair of folders NAME_features, NAME_labels in `path`."""
    folders = {entry.name for entry in os.scandir(path) if entry.is_dir() and is_data(entry.name)}
    features = sorted(name for name in folders if name.endswith("_features"))
    pairs = [(name, name.removesuffix("_features") + "_labels") for name in features]
    complete = [pair for pair in pairs if pair[1] in folders]
    if len(complete) > 1:
        raise UsageError(f"several feature folders in {path}: {', '.join(name for name, _ in complete)}; keep one")
    if not complete:
        what = f"{pairs[0][0]} but no {pairs[0][1]}" if pairs else "no *_features folder"
        raise UsageError(
            f"{what} in {path}: expected imagenet256_features/0.npy, ... and imagenet256_labels/0.npy, ... as fast-DiT "
            f"writes them, or {MANIFEST} and shards as extract_features.py does"
        )
    return os.path.join(path, complete[0][0]), os.path.join(path, complete[0][1])


def _load_latent(path: str) -> np.ndarray:
    """(C,h,w) float32 from a file that holds (1,C,h,w). Raises ValueError."""
    try:
        latent = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read the latents {path}: {brief(error)}") from error
    if latent.dtype != np.float32 or latent.ndim != 4 or len(latent) != 1:
        raise ValueError(f"{path} holds {latent.dtype} {latent.shape}: latents must be float32 (1, C, h, w)")
    return latent[0]


def _read_labels(paths: list[str]) -> list[int]:
    """Class numbers from files of int64 (1,), whose header is known: parsing a million of them would take a minute."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1, dtype=np.int64))
    header = buffer.getvalue()[:-8]

    _, largest = LIMITS["num_classes"]

    def read(path: str) -> int:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UsageError(f"the label {path} cannot be read: {error.strerror or error}") from None
        label = int.from_bytes(content[-8:], "little", signed=True)
        if content[:-8] != header or not 0 <= label < largest:
            raise UsageError(f"{path} is not a label: expected one int64 from 0 to {largest - 1}, shape (1,)")
        return label

    return parallel(read, paths)
