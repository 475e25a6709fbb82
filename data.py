"""From images to training samples: image folders and the resumable order of samples.

N batch, C latent channels, H W image height and width, h w latent height and width. Latents on disk: latents.py.

Everything random about a sample (flip, time, label drop, both noises) is a function of (seed, epoch, index), and the
order of samples is a function of (seed, epoch). So the number of workers, of processes and of micro-batches changes
nothing, and a run resumed at a step sees what the unbroken run would have seen.
"""

import contextlib
import hashlib
import os
import signal
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from autoencoders import SpaceInfo
from cli import RunStopped, UsageError

MAX_REPLACEMENTS = 100  # images tried in place of an unreadable one

# What Pillow raises for truncated, empty, foreign and oversized files.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
EXIF_ERRORS = (*IMAGE_ERRORS, KeyError, TypeError, AttributeError, ZeroDivisionError)
NOT_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # to Pillow they are images too


# ---------------------------------------------------------------------------------------------------------------------
# Images


def is_data(name: str) -> bool:
    """Whether a file or folder is the user's: neither hidden nor left by macOS's archiver (`._x.png`, `__MACOSX`)."""
    return not name.startswith(".") and name != "__MACOSX"


@dataclass(frozen=True)
class Reading:
    """How pixels are made of a file; part of what identifies a data set."""

    background: str | None = "white"  # under transparency, as `PIL.ImageColor` names it; None: hidden colours show
    upright: bool = True  # turned as EXIF says

    def __post_init__(self):
        if self.background is not None:
            try:
                ImageColor.getrgb(self.background)
            except ValueError:
                raise UsageError(
                    f"--background {self.background} is no colour; expected a name such as white, or #rrggbb"
                ) from None

    def config(self) -> dict:
        return asdict(self)


AS_BEFORE = Reading(background=None, upright=False)  # of runs that did not record how they read


def load_image(path: str | BinaryIO, reading: Reading = Reading()) -> Image.Image:
    """Read an image of any mode as 8-bit RGB; of an animation the first frame counts.

    Raises one of IMAGE_ERRORS if that cannot be done.
    """
    with Image.open(path) as image:
        image.load()
        if reading.upright:
            with contextlib.suppress(*EXIF_ERRORS):  # broken EXIF tells nothing
                image = ImageOps.exif_transpose(image)
        return _flattened(image, reading) if reading.background and _is_transparent(image) else _as_rgb(image)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _flattened(image: Image.Image, reading: Reading) -> Image.Image:
    """An image with transparency, on a background."""
    if image.mode.startswith("I"):  # 16-bit grey, of which one value is transparent
        opaque = Image.fromarray(np.asarray(image) != image.info["transparency"])
        image = _as_rgb(image)
        image.putalpha(opaque.convert("L"))
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(reading.background)[:3], 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit grey values have no known white")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey values have no known white")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The preprocessing of ADM (arXiv 2105.05233), a (size, size) image: halve with a box filter while the short side
    is at least 2*size, resize it to size (bicubic), cut out the centre. An image of that size is returned unchanged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def draw_randomness(
    seed: int, epoch: int, index: int, latent_shape: tuple[int, int, int], posterior: bool
) -> tuple[bool, dict[str, Tensor]]:
    """All random numbers of one sample: whether to flip it, and its entries u, drop_u, noise and, if the autoencoder
    samples its posterior, vae_noise. The small ones come first: they do not depend on the shape of the latents.
    """
    flips, entries = draw_batch(seed, [(epoch, index)], latent_shape, posterior)
    return bool(flips[0]), {name: values[0] for name, values in entries.items()}


def draw_batch(
    seed: int, keys: list[tuple[int, int]], latent_shape: tuple[int, int, int], posterior: bool
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """`draw_randomness` of samples (epoch, index), put together as it is drawn: flips (N,), entries (N, ...)."""
    small = np.empty((len(keys), 3))
    names = ("noise", "vae_noise") if posterior else ("noise",)
    noises = {name: np.empty((len(keys), *latent_shape), dtype=np.float32) for name in names}
    for place, (epoch, index) in enumerate(keys):
        rng = np.random.default_rng([seed, epoch, index])
        rng.random(out=small[place])
        for noise in noises.values():
            rng.standard_normal(dtype=np.float32, out=noise[place])
    u, drop_u, flips = small.T
    entries = {"u": u.copy(), "drop_u": drop_u.copy(), **noises}
    return flips < 0.5, {name: torch.from_numpy(values) for name, values in entries.items()}


def successors(index: int, count: int) -> list[int]:
    """The samples of `count` that are tried in place of an unreadable one."""
    return [(index + step) % count for step in range(1, 1 + min(count - 1, MAX_REPLACEMENTS))]


class Samples(Dataset):
    """What all data sets are: labelled samples. Keys are (epoch, index), items are dicts; subclasses say what is in x.

    Labels and names are arrays because worker processes copy lists of a million Python objects page by page.
    """

    def __init__(self, labels, class_names: list[str], latent_shape, seed: int):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.latent_shape = tuple(latent_shape)  # C, h, w
        self.seed = seed
        self.notes: list[str] = []  # what is worth a line in the log

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 that tells whether a resumed run has the data it began with."""
        raise NotImplementedError

    def record(self) -> dict:
        """What checkpoints say of the data."""
        return {"samples": len(self), "fingerprint": self.fingerprint(), "class_names": self.class_names}


class FileSamples(Samples):
    """Samples that are named files below a root."""

    def __init__(self, root: str, names: list[str], labels, class_names: list[str], latent_shape, seed: int):
        super().__init__(labels, class_names, latent_shape, seed)
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])

    def _item(self, x: Tensor, entries: dict[str, Tensor], index: int, found: int) -> dict[str, Tensor]:
        """The sample asked for as `index`, with the image and label of `found`."""
        return {
            "x": x,
            "y": torch.tensor(self.labels[found]),
            "index": torch.tensor(index),
            "unreadable": torch.tensor(-1 if found == index else index),
            **entries,
        }

    def first_readable(self, index: int, load: Callable[[Any], Any]) -> tuple[int, Any]:
        """The first of index, index+1, ... whose `source` is readable, and what `load` makes of it.

        `load` raises one of IMAGE_ERRORS where it is not.
        """
        reason = None
        for candidate in (index, *successors(index, len(self))):
            try:
                return candidate, load(self.source(candidate))
            except IMAGE_ERRORS as error:
                reason = reason or f"{type(error).__name__}: {error}"
        raise RuntimeError(f"cannot read {self.name_of(index)} ({reason}), nor any of the files tried in its place")

    def name_of(self, index: int) -> str:
        """Path of a sample's file."""
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def source(self, index: int) -> Any:
        """What a sample is read from: its path, or an open file."""
        return self.name_of(index)

    def _sizes(self) -> list[int]:
        """Of every sample's file."""
        return parallel(file_size, [self.name_of(index) for index in range(len(self))])

    def fingerprint(self) -> str:
        """Over class names and every sample's relative name, file size and label. One `stat` per file; contents are not
        read.
        """
        digest = hashlib.sha256(os.fsencode("\0".join(self.class_names)))
        for name, size, label in zip(self.names, self._sizes(), self.labels, strict=True):
            digest.update(b"\n%s\0%d\0%d" % (name, size, label))
        return digest.hexdigest()


def images_by_class(path: str) -> tuple[list[str], list[str], list[int], list[str]]:
    """Of a folder of class folders: sorted class names; name (below `path`) and label of each image; names of files
    that hold images too, but are not read.
    """
    class_names = sorted(e.name for e in os.scandir(path) if e.is_dir() and is_data(e.name))
    if not class_names:
        return [], [], [], []

    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    others = other_suffixes()
    passed_over = []

    def is_image(file: str) -> bool:
        name = os.path.relpath(file, path)
        if not all(map(is_data, name.split(os.sep))):
            return False
        if name.lower().endswith(others):
            passed_over.append(name)
        return name.lower().endswith(IMG_EXTENSIONS)

    class_ids = {name: label for label, name in enumerate(class_names)}
    files = make_dataset(path, class_ids, is_valid_file=is_image, allow_empty=True)
    names = [os.path.relpath(file, path) for file, _ in files]
    return class_names, names, [label for _, label in files], passed_over


def other_suffixes() -> tuple[str, ...]:
    """Of pictures that Pillow reads and training does not."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    known = Image.registered_extensions().items()
    pictures = {suffix for suffix, kind in known if kind in Image.OPEN and kind not in NOT_PICTURES}
    return tuple(sorted(pictures - set(IMG_EXTENSIONS)))


class ImageData(FileSamples):
    """A folder with one folder of images per class; labels follow the sorted class names.

    An item holds x (3,H,W) float32 in [-1,1]; y int64; noise (C,h,w) float32 for the diffusion; u and drop_u float64 in
    [0,1) for time and label drop; vae_noise (C,h,w) float32 if `space` samples a posterior; index int64, as asked for;
    unreadable int64: -1, or the index if its image cannot be read. Then x and y are those of the next readable image.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        space: SpaceInfo,
        seed: int,
        flip: bool = True,
        reading: Reading = Reading(),
    ):
        require_folder(path, "data path")
        side = self._side(image_size, space)
        class_names, names, labels, passed_over = images_by_class(path)
        layout = f"expected {os.path.join(path, 'CLASS', 'IMAGE')}, one folder per class"
        if not class_names:
            raise UsageError(f"no class folders in data path {path}: {layout}")

        if not names:
            from torchvision.datasets.folder import IMG_EXTENSIONS

            raise UsageError(f"no images ({' '.join(IMG_EXTENSIONS)}) in the class folders of {path}: {layout}")
        if all(name.count(os.sep) > 1 for name in names):  # CLASS/... holds folders only: those are the classes
            raise UsageError(
                f"the class folders of {path} hold folders of images, not images: did you mean one of them, "
                f"such as {os.path.join(path, class_names[0])}? {layout}"
            )
        super().__init__(path, names, labels, class_names, (space.channels, side, side), seed)
        self.image_size = image_size
        self.posterior = space.samples_posterior
        self.flip, self.reading = flip, reading
        if passed_over:
            suffixes = " ".join(sorted({os.path.splitext(name)[1] for name in passed_over}))
            self.notes.append(
                f"{len(passed_over)} images are not read, for their suffix ({suffixes}): {passed_over[0]}"
            )

    @staticmethod
    def _side(image_size: int, space: SpaceInfo) -> int:
        """Of the latents."""
        if image_size % space.downsample:
            raise UsageError(
                f"image size {image_size} is not divisible by {space.downsample}, by which the autoencoder "
                f"{space.path} shrinks images; nearest sizes: {_nearest_multiples(image_size, space.downsample)}"
            )
        return image_size // space.downsample

    def fingerprint(self) -> str:
        """As of `FileSamples`, and over how pixels are made of files where that is not as before there was a choice."""
        files = super().fingerprint()
        if self.reading == AS_BEFORE:
            return files
        return hashlib.sha256(f"{files} {self.reading.config()}".encode()).hexdigest()

    def record(self) -> dict:
        return super().record() | ({} if self.reading == AS_BEFORE else {"reading": self.reading.config()})

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        flip, entries = draw_randomness(self.seed, epoch, index, self.latent_shape, self.posterior)
        pixels, found = self.pixels(index)
        if self.flip and flip:
            pixels = pixels.flip(-1)
        return self._item(to_unit_range(pixels), entries, index, found)

    def pixels(self, index: int) -> tuple[Tensor, int]:
        """(3,H,W) uint8 of the first readable image from `index` on, and which that is."""
        found, image = self.first_readable(index, self._load)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), found

    def _load(self, source: str | BinaryIO) -> Image.Image:
        return center_crop(load_image(source, self.reading), self.image_size)


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1,1]."""
    return pixels / 127.5 - 1


class UnreadableImages:
    """Counts the distinct images that batches report as unreadable and stops the run when they are too many."""

    def __init__(self, seen: set[int], limit: float = 0.01):
        self.seen = seen  # grows in place
        self.limit = limit  # share of the data set; a single image is always tolerated

    def update(self, indices: list[int], dataset: Samples) -> list[str]:
        """Paths of the images reported for the first time. Raises RunStopped above the limit."""
        new = sorted(set(indices) - self.seen)
        self.seen.update(new)
        if len(self.seen) > max(1, self.limit * len(dataset)):
            names = ", ".join(dataset.name_of(index) for index in sorted(self.seen)[:5])
            raise RunStopped(
                f"{len(self.seen)} of {len(dataset)} images ({len(self.seen) / len(dataset):.1%}, "
                f"limit {self.limit:.1%}) cannot be read, among them {names}"
            )
        return [dataset.name_of(index) for index in new]


def require_folder(path: str, what: str) -> None:
    if not os.path.exists(path):
        raise UsageError(f"{what} {path} does not exist")
    if not os.path.isdir(path):
        raise UsageError(f"{what} {path} is not a folder")


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} and {below + unit}" if below else str(unit)


def file_size(path: str) -> int:
    """-1 for what is not there, such as a dangling link: reading it is where that is reported."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def parallel(function, items: list) -> list:
    """[function(item) for item in items] on threads, in chunks: network file systems answer many requests at once."""
    chunks = [items[start : start + 1000] for start in range(0, len(items), 1000)]
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
        return [result for chunk in results for result in chunk]


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples


class BatchSchedule:
    """The endless stream of global batches, a pure function of the seed.

    Global batch s (an optimizer step, from 0) is a stretch of a permutation of epoch s // steps_per_epoch; what is left
    over at the end of an epoch is dropped. A global batch is cut into `accumulation` micro-batches, each of these into
    one contiguous part per process: the samples of a micro-batch do not depend on the number of processes.
    """

    def __init__(
        self, num_samples: int, global_batch_size: int, accumulation: int, rank: int, world_size: int, seed: int
    ):
        parts = world_size * accumulation
        if global_batch_size % parts:
            raise UsageError(
                f"global batch size {global_batch_size} is not divisible by {world_size} processes x {accumulation} "
                f"accumulation steps = {parts}; nearest sizes: {_nearest_multiples(global_batch_size, parts)}"
            )
        if num_samples < global_batch_size:
            raise UsageError(
                f"the data set has {num_samples} samples, fewer than one global batch of {global_batch_size}"
            )
        if seed < 0:
            raise UsageError(f"seed {seed} is negative; expected 0 or more")
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.seed = seed
        self.steps_per_epoch = num_samples // global_batch_size
        self.micro_batch_size = global_batch_size // parts  # samples of one process
        self._micro_stride = global_batch_size // accumulation
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def order(self, epoch: int) -> np.ndarray:
        """(num_samples,) the epoch's permutation; the last one asked for is kept."""
        if epoch != self._epoch:
            # num_samples is an index that no sample has: the permutation shares no random stream with a sample.
            rng = np.random.default_rng([self.seed, epoch, self.num_samples])
            self._epoch, self._order = epoch, rng.permutation(self.num_samples)
        return self._order

    def positions(self, micro: int) -> Tensor:
        """(micro_batch_size,) places within the global batch of this process's samples in micro-batch `micro`."""
        start = micro * self._micro_stride + self.rank * self.micro_batch_size
        return torch.arange(start, start + self.micro_batch_size)

    def micro_batches(self, start_step: int) -> Iterator[list[tuple[int, int]]]:
        """Keys (epoch, index) of this process's micro-batches from optimizer step `start_step` on, without end."""
        for step in count(start_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            for micro in range(self.accumulation):
                places = place * self.global_batch_size + self.positions(micro).numpy()
                yield [(epoch, index) for index in self.order(epoch)[places].tolist()]


def make_loader(
    dataset: Dataset, schedule: BatchSchedule, start_step: int, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Endless batches of one micro-batch each, from optimizer step `start_step` on. To be iterated once.

    DataLoader gives each of its workers a single thread.
    """
    return DataLoader(
        dataset,
        batch_sampler=schedule.micro_batches(start_step),
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_loop,
    )


def _leave_signals_to_the_loop(worker: int) -> None:
    """SIGTERM and SIGINT often go to all processes of a job; a step that the main one ends still needs its data."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _collate(batch: list[dict] | dict) -> dict[str, Tensor]:
    """A data set with `__getitems__` has put its batch together itself."""
    return batch if isinstance(batch, dict) else default_collate(batch)
