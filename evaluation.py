"""Sets of images against a reference: turned into features by all processes, kept as statistics, compared.

N images · n of a batch · F features

`measure` goes once through a set of images, each process through its share. It keeps moments, the same for any number
of processes, and features of the images for what moments cannot tell. Statistics of a reference are kept in a file:
`mu, sigma` (and `mu_s, sigma_s`, for sFID) under the names of ADM's references, which are read too.
"""

import contextlib
import functools
import json
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

import distributed
import image_files
import metrics
import sampling
from cli import UsageError
from data import IMAGE_ERRORS, FileSamples, center_crop, images_by_class, is_data, load_image
from extractors import Extractor, full_precision, load_extractor
from files import digest, replacing
from hub import brief
from records import BadRecord, check_arrays, parse_record

VERSION = 1  # of the evaluator: another one may give other numbers for the same images
FORMAT = 1  # of a file of statistics
KEPT = 10_000  # images of a reference whose features are kept: as many as ADM's references hold
JUDGED = 2_000  # images that a judge learns, at most: an SVM takes minutes for many more
NEIGHBOURS = 3  # k of precision and recall

TITLES = {  # metric: its name in a table
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "fd_dinov2": "FD-DINOv2",
    "fd_pixels": "Frechet distance of pixels",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "in class, by the judge",
    "accuracy_of_real": "  of real images the judge has not seen",
    "diversity": "diversity in a class, over the reference's",
    "nearest": "distance to the nearest training image",
    "nearest_of_reference": "  of a reference image",
    "memorisation": "  ratio (1: as far as new images; 0: copies)",
}
FRECHET = {"inception": "fid", "dinov2": "fd_dinov2", "pixels": "fd_pixels"}


# ------------------------------------------------------------------------------------------------------ sets of images


class Images(Protocol):
    """A set of square images of one size."""

    count: int
    size: int  # pixels of a side
    labels: np.ndarray | None  # (N,)

    def read(self, indices: range) -> np.ndarray:
        """(n, H, W, 3) uint8. Raises UsageError."""

    def describe(self) -> dict:
        """What results say of them."""


class StoredImages:
    """`arr_0` (N, H, W, 3) uint8 of an `.npz` file, memory-mapped if it can be, with `labels` (or ADM's `arr_1`)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, np.load(path) as file:
                try:
                    self.images = image_files.map_array(path, archive, "arr_0.npy")
                except ValueError:
                    self.images = file["arr_0"]
                self.labels = next((file[name] for name in ("labels", "arr_1") if name in file.files), None)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is not a whole .npz file of images ({brief(error)})") from None
        shape, dtype = self.images.shape, self.images.dtype
        if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or dtype != np.uint8:
            raise UsageError(f"{path}: expected arr_0 (N, H, H, 3) uint8, got {shape} {dtype}")
        if self.labels is not None and (self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu"):
            kind = f"{self.labels.shape} {self.labels.dtype}"
            raise UsageError(f"{path}: expected as many whole-numbered labels as the {shape[0]} images, got {kind}")
        self.count, self.size = shape[:2]

    def read(self, indices: range) -> np.ndarray:
        return np.array(self.images[indices.start : indices.stop])

    def describe(self) -> dict:
        settings = {}
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads(self.path.with_name("settings.json").read_text(encoding="utf-8"))  # sample_ddp.py's
        return {"source": str(self.path), "settings": settings}


class FolderImages:
    """The images in a folder, or in folders of classes, whose sorted names give the labels.

    `size`: cut them to it as training does; None: they are of one size, that of the first.
    """

    def __init__(self, path: Path, size: int | None = None):
        from torchvision.datasets.folder import IMG_EXTENSIONS

        names = sorted(entry.name for entry in path.iterdir() if entry.name.lower().endswith(IMG_EXTENSIONS))
        names = [name for name in names if is_data(name)]
        classes, labels, self.labels = [], [0] * len(names), None
        if not names:
            classes, names, labels, _ = images_by_class(str(path))
            self.labels = np.array(labels)
        if not names:
            raise UsageError(f"no images ({' '.join(IMG_EXTENSIONS)}) in {path}, nor in its folders")
        self.path, self.cut = path, size
        self.files = FileSamples(str(path), names, labels, classes, (), 0)
        self.count = len(names)
        self.size = size or self._first_size()

    def _first_size(self) -> int:
        image = self._load(0)
        if image.width != image.height:
            raise UsageError(
                f"{self.files.name_of(0)} of {image.width}x{image.height} is not square; --image-size N cuts images"
            )
        return image.width

    def _load(self, index: int):
        name = self.files.name_of(index)
        try:
            return load_image(name)
        except IMAGE_ERRORS as error:
            raise UsageError(f"image {name} cannot be read ({brief(error)}); remove or replace it") from None

    def _pixels(self, index: int) -> np.ndarray:
        image = self._load(index)
        if self.cut:
            image = center_crop(image, self.cut)
        elif image.size != (self.size, self.size):
            raise UsageError(
                f"images of several sizes: {self.files.name_of(0)} of {self.size}x{self.size}, "
                f"{self.files.name_of(index)} of {image.width}x{image.height}; --image-size N cuts all to one"
            )
        return np.asarray(image)

    def read(self, indices: range) -> np.ndarray:
        with ThreadPoolExecutor(8) as pool:
            return np.stack(list(pool.map(self._pixels, indices)))

    def describe(self) -> dict:
        return {"source": str(self.path)}


class DrawnImages:
    """Images that a model draws when they are read: image i of the seed, of what was asked for as number i.

    Args:
        options: of `sampling.draw`, such as what encodes prompts.
    """

    def __init__(
        self,
        model,
        objective,
        space,
        asked: sampling.Asked,
        settings: sampling.Settings,
        size: int,
        record: dict,
        options: dict | None = None,
    ):
        self.labels = None if asked.prompts else np.array(asked.numbers)
        self.model, self.objective, self.space, self.settings = model, objective, space, settings
        self.asked, self.count, self.size, self.record, self.options = asked, len(asked), size, record, options or {}
        self.options.get("kind", model.config.condition).check(asked.of(range(self.count)))

    def read(self, indices: range) -> np.ndarray:
        wanted = self.asked.of(indices)
        return sampling.draw(self.model, self.objective, self.space, wanted, self.settings, indices, **self.options)

    def describe(self) -> dict:
        return self.record


def open_images(path: Path, size: int | None = None) -> StoredImages | FolderImages:
    """The images of an `.npz` file or a folder (of its `samples.npz`, where sample.py has left one).

    Args:
        size: cut the images of a folder to it.

    Raises:
        UsageError: there are none, or they are not of one square size.
    """
    if path.is_dir() and not (path / "samples.npz").is_file():
        return FolderImages(path, size)
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected an .npz file or a folder of images")
    images = StoredImages(path / "samples.npz" if path.is_dir() else path)
    if size not in (None, images.size):
        raise UsageError(f"--image-size {size} contradicts {images.path}, whose images are {images.size}x{images.size}")
    return images


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass
class Statistics:
    """What is known of a set of images."""

    images: dict  # what results say of them
    extractor: dict  # `Extractor.describe()`; of ADM's files only the name is known
    size: int | None  # of the images, where the file tells it
    count: int | None
    moments: dict[str, tuple[Tensor, Tensor]]  # of `features`, of `spatial`: mean (F,), covariance (F, F)
    features: Tensor | None = None  # (n, F) fp32, of all images or of KEPT, evenly chosen, in order
    labels: np.ndarray | None = None  # (n,)

    def save(self, path: Path) -> None:
        """Write a file that `load` reads. Raises OSError."""
        arrays = {} if self.features is None else {"features": self.features.numpy()}
        arrays |= {} if self.labels is None else {"labels": self.labels}
        for kind, (mean, covariance) in self.moments.items():
            suffix = SUFFIXES[kind]
            arrays |= {f"mu{suffix}": mean.cpu().numpy(), f"sigma{suffix}": covariance.cpu().numpy()}
        record = {"format": FORMAT, "images": self.images, "extractor": self.extractor}
        record |= {"size": self.size, "count": self.count}
        with replacing(path) as file:
            np.savez(file, record=np.array(json.dumps(record)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Statistics | None":
        """Of a file of ours or of ADM's; None for a file that holds images alone.

        Raises:
            UsageError: it is damaged, or something else.
        """
        advice = "make it anew with calculate_metrics.py ref"
        try:
            with zipfile.ZipFile(path), np.load(path) as file:
                if "mu" not in file.files:
                    return None
                arrays = {name: file[name] for name in STORED if name in file.files}
                text = str(file["record"]) if "record" in file.files else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is not a whole .npz file of statistics ({brief(error)})") from None
        needed = {"mu", "sigma"} | ({"mu_s", "sigma_s"} if "mu_s" in arrays else set())
        check_arrays(
            arrays, {name: axes for name, axes in STORED.items() if name in needed | set(arrays)}, path, advice
        )
        for name in arrays.keys() - {"labels"}:
            if arrays[name].dtype.kind != "f":
                raise BadRecord(f"{path}: {name} holds {arrays[name].dtype}, expected floating point; {advice}")
            metrics.check_finite(f"{name} in {path}", torch.from_numpy(arrays[name]))
        found = {"features": ""} | ({"spatial": "_s"} if "mu_s" in arrays else {})
        moments = {
            kind: (torch.from_numpy(arrays[f"mu{suffix}"]), torch.from_numpy(arrays[f"sigma{suffix}"]))
            for kind, suffix in found.items()
        }
        if text is None:
            return cls({"source": str(path)}, {"name": "inception"}, None, None, moments)
        record = parse_record(text, StatisticsRecord, path, advice, FORMAT)
        features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
        kept = {name: record[name] for name in ("images", "extractor", "size", "count")}
        return cls(**kept, moments=moments, features=features, labels=arrays.get("labels"))


SUFFIXES = {"features": "", "spatial": "_s"}  # of `mu` and `sigma` in a file
STORED = {  # arrays of a file: an axis of one letter has one length
    **{"mu": "F", "sigma": "FF", "mu_s": "G", "sigma_s": "GG", "features": "nF", "labels": "n"},
}


class ExtractorRecord(TypedDict):
    name: str
    weights: NotRequired[str]


class StatisticsRecord(TypedDict):
    """What a file of ours says of its arrays."""

    format: int
    images: dict[str, Any]
    extractor: ExtractorRecord
    size: Annotated[int, Field(ge=1)] | None
    count: Annotated[int, Field(ge=2)] | None


def measure(
    images: Images,
    extractor: Extractor,
    processes: distributed.Processes,
    batch_size: int,
    *,
    keep: int | None = None,
    title: str = "features",
) -> Statistics:
    """The statistics of a set of images, with a progress bar. All processes take part; rank 0 alone gets the features.

    Batch b holds images b * batch_size and following, whichever process reads it. In the last round a process without
    a batch goes through the last one again, for nothing: a model whose parameters are sharded needs all processes.

    Args:
        keep: features of so many images are kept (None: of all).

    Raises:
        UsageError: there are fewer than two images, or one cannot be read.
    """
    if images.count < 2:
        raise UsageError(f"{images.describe()['source']} holds {images.count} image: too few to compare")
    kept = np.ones(images.count, dtype=bool)
    if keep is not None and keep < images.count:
        kept = np.isin(np.arange(images.count), np.arange(keep) * images.count // keep)
    batches = math.ceil(images.count / batch_size)
    moments: dict[str, metrics.Moments] = {}
    mine: list[tuple[int, Tensor]] = []  # first index of a batch, the features kept of it
    with distributed.progress_bar(processes, total=images.count, desc=title, unit="image", leave=False) as bar:
        for first in range(0, batches, processes.world_size):
            batch = first + processes.rank
            start = min(batch, batches - 1) * batch_size
            indices = range(start, min(start + batch_size, images.count))
            pixels = processes.together(lambda indices=indices: images.read(indices))
            features_of = functools.partial(_features, extractor, pixels, images, indices)
            output = processes.together(features_of)
            for kind, values in output.items():
                moments.setdefault(kind, metrics.Moments()).update(values if batch < batches else values[:0])
            if batch < batches:
                chosen = torch.from_numpy(kept[indices.start : indices.stop])
                mine.append((start, output["features"].float().cpu()[chosen]))
            bar.update(min(images.count - first * batch_size, processes.world_size * batch_size))

    whole = {kind: part.merged(processes.sum) for kind, part in moments.items()}
    parts = sorted((part for share in processes.gather(mine) for part in share), key=lambda part: part[0])
    return Statistics(
        images=images.describe(),
        extractor=extractor.describe(),
        size=images.size,
        count=images.count,
        moments={kind: (part.mean, part.covariance) for kind, part in whole.items()},
        features=torch.cat([features for _, features in parts]) if processes.is_main else None,
        labels=images.labels[kept] if images.labels is not None else None,
    )


def _features(extractor: Extractor, pixels: np.ndarray, images: Images, indices: range) -> dict[str, Tensor]:
    output = extractor(pixels)
    what = f"features of images {indices[0]} to {indices[-1]} of {images.describe()['source']}"
    metrics.check_finite(what, *output.values())
    return output


def measure_reference(
    path: Path,
    extractor: Extractor,
    processes: distributed.Processes,
    batch_size: int,
    size: int | None = None,
) -> Statistics:
    """The statistics of a file of ours or of ADM's, or those of the images in an `.npz` file or a folder.

    ADM's files have moments of many images, and the images of some, from which come the features. `images["sha256"]`
    tells the reference: of the file, or of the names and sizes of a folder's files.

    Raises:
        UsageError: there is no such thing, or it was made with another extractor.
    """
    stored = None if path.is_dir() else processes.together(lambda: _load_reference(path, extractor))
    if stored is None or (stored.features is None and _has_images(path)):
        images = processes.together(lambda: open_images(path, size))
        measured = measure(images, extractor, processes, batch_size, keep=KEPT, title=f"features of {path.name}")
        if stored is not None:
            measured = replace(measured, moments=stored.moments, count=None)
    else:
        images, measured = None, stored
    if isinstance(images, FolderImages):
        sha256 = processes.on_main(images.files.fingerprint)
    else:
        sha256 = processes.on_main(lambda: digest(path if images is None else images.path)["sha256"])
    return replace(measured, images=measured.images | {"source": str(path), "sha256": sha256})


def _load_reference(path: Path, extractor: Extractor) -> Statistics | None:
    if not path.is_file():
        raise UsageError(f"reference {path} does not exist; expected statistics, an .npz file or a folder of images")
    stored = Statistics.load(path)
    if stored is not None:
        _check_extractor(path, stored, extractor)
    return stored


def _has_images(path: Path) -> bool:
    with np.load(path) as file:
        return "arr_0" in file.files


def _check_extractor(path: Path, stored: Statistics, extractor: Extractor) -> None:
    ours = extractor.describe()
    if stored.extractor["name"] != ours["name"]:
        raise UsageError(f"{path} has statistics of {stored.extractor['name']} features, not of {ours['name']}")
    if "weights" in stored.extractor and stored.extractor["weights"] != ours["weights"]:
        raise UsageError(
            f"{path} has statistics of {ours['name']} features with weights {stored.extractor['weights'][:8]}..., "
            f"the weights here are {ours['weights'][:8]}...: make it anew, or use those weights"
        )


# ----------------------------------------------------------------------------------------------------------- comparing


class Evaluator:
    """A reference that sets of images are compared with.

    Args:
        training: images that a model was trained on, none of them in the reference: they tell how well the judge
            knows real images, and whether the model repeats them.
    """

    def __init__(
        self,
        reference: Statistics,
        extractor: Extractor,
        device: torch.device,
        training: Statistics | None = None,
    ):
        self.reference, self.extractor, self.device, self.training = reference, extractor, device, training
        if training is not None:
            self.check(training.size, training.count, training.images["source"])

    def check(self, size: int, count: int, what: str) -> None:
        """Raises UsageError unless so many images of this size can be compared with the reference's."""
        expected = self.reference.size
        if expected not in (None, size):
            raise UsageError(
                f"{what}: images of {size}x{size}, but {self.reference.images['source']} is of {expected}x{expected}"
            )
        if count <= NEIGHBOURS:
            raise UsageError(f"{what}: {count} images are too few, at least {NEIGHBOURS + 1} are needed")

    def compare(self, samples: Statistics) -> dict[str, float]:
        """Every metric that features, reference and labels allow, by its name in TITLES. Rank 0 alone can.

        Raises:
            UsageError: another image size, too few images, labels that the reference has not.
        """
        self.check(samples.size, samples.count, samples.images["source"])
        with full_precision(self.device):
            return self._compare(samples)

    def _compare(self, samples: Statistics) -> dict[str, float]:
        name, features = samples.extractor["name"], self._on_device(samples)
        values = {FRECHET[name]: self._distance(samples, "features")}
        if {"spatial"} <= samples.moments.keys() & self.reference.moments.keys():
            values["sfid"] = self._distance(samples, "spatial")
        if name == "inception":
            values["inception_score"] = metrics.inception_score(self.extractor.logits(features))
        if self.reference.features is not None:
            known = self._on_device(self.reference)
            values["precision"], values["recall"] = metrics.precision_recall(known, features, NEIGHBOURS)
        if name == "pixels":
            values |= self._small_images(samples, features)
        return values

    def _on_device(self, statistics: Statistics) -> Tensor:
        return statistics.features.to(self.device)

    def _distance(self, samples: Statistics, kind: str) -> float:
        parts = (*self.reference.moments[kind], *samples.moments[kind])
        return metrics.frechet_distance(*(part.to(self.device) for part in parts))

    def _small_images(self, samples: Statistics, features: Tensor) -> dict[str, float]:
        """What pixels tell: classes, diversity, distance to the training images."""
        values, reference, training = {}, self.reference, self.training
        if samples.labels is not None and self.judge is not None:
            if unknown := set(samples.labels.tolist()) - set(reference.labels.tolist()):
                classes = sorted(set(reference.labels.tolist()))
                raise UsageError(
                    f"label {min(unknown)} of the samples is not one of the reference's {len(classes)} classes, "
                    f"{classes[0]} to {classes[-1]}"
                )
            values["accuracy"] = self._recognised(samples)
            if training is not None and training.labels is not None:
                values["accuracy_of_real"] = self._recognised(training)
            labels, known = torch.from_numpy(samples.labels), torch.from_numpy(reference.labels)
            diversity = metrics.diversity(features.cpu(), labels, reference.features, known)
            values |= {} if math.isnan(diversity) else {"diversity": diversity}
        if training is not None:
            seen = self._on_device(training)
            values["nearest"] = metrics.nearest_distances(features, seen).mean().item()
            new = metrics.nearest_distances(self._on_device(reference), seen).mean().item()
            if new == 0:
                raise UsageError("every image of the reference is among those of --train; give images kept out of it")
            values["nearest_of_reference"], values["memorisation"] = new, values["nearest"] / new
        return values

    @functools.cached_property
    def judge(self) -> metrics.Judge | None:
        """Trained on the reference, once; None where that has no labels or a single class."""
        labels = self.reference.labels
        if labels is None or len(set(labels.tolist())) < 2:
            return None
        chosen = slice(None, None, math.ceil(len(labels) / JUDGED))
        return metrics.Judge(_images(self.reference)[chosen], labels[chosen])

    def _recognised(self, statistics: Statistics) -> float:
        return self.judge.recognises(_images(statistics), statistics.labels).mean().item()

    def warnings(self, samples: Statistics) -> list[str]:
        """What makes the numbers less than they seem."""
        found = []
        for what, statistics in (("samples", samples), ("the reference", self.reference)):
            width = len(statistics.moments["features"][0])
            if statistics.count is not None and statistics.count <= width:
                found.append(
                    f"{statistics.count} images of {what} for {width} features: their covariance is singular, and the "
                    f"Frechet distance larger than that of many images (50,000 in the literature)"
                )
        if self.reference.features is None:
            found.append("no precision and recall: the reference has neither images nor features")
        return found


def _images(statistics: Statistics) -> np.ndarray:
    """(n, H, W, 3) uint8, back from features that are pixels."""
    pixels = (statistics.features * 255).round().byte()
    return pixels.view(-1, statistics.size, statistics.size, 3).numpy()


def evaluator_for_training(
    path: Path, weights: Path | None, size: int, count: int, batch_size: int, processes: distributed.Processes
) -> Evaluator:
    """Against a file of statistics, which tells its extractor.

    Args:
        size: of the images that will be compared, and `count`: how many.

    Raises:
        UsageError: no such file, no weights for its extractor, images of another size, too few.
    """
    stored = processes.together(lambda: _load_statistics(path))
    name = stored.extractor["name"]
    extractor = load_extractor(name, weights, "--metrics-weights", processes)
    reference = measure_reference(path, extractor, processes, batch_size)
    evaluator = Evaluator(reference, extractor, processes.device)
    processes.together(lambda: evaluator.check(size, count, "--metrics-every"))
    return evaluator


def _load_statistics(path: Path) -> Statistics:
    stored = Statistics.load(path) if path.is_file() else None
    if stored is None:
        raise UsageError(f"--metrics-ref {path} is no file of statistics; `calculate_metrics.py ref` makes one")
    return stored
