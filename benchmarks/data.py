"""How fast is training data read? Shards of moments, in batches or item by item, against one .npy file per image.

    python -m benchmarks.data

Random latents of 256-pixel images in a temporary folder, read in random order by one process. The ways take turns, so
that what else the machine does hits all alike; medians over the rounds. Four questions:

    read         latents and labels of a batch as they are on disk, from the page cache
    item         all that a training sample needs, with the noise drawn for it and put together as a batch
    cold read    latents and labels when the contents of the files, not their names, have left the page cache
    captions     features of captions of a batch from the page cache: tokens that there are, in half precision, against
                 one .npz of 120 tokens in fp32 for each caption, as PixArt's extraction writes them
"""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

import cli
from benchmarks import harness
from benchmarks.report import Bench
from caption_features import EMPTY, FeatureShards, write_array, write_captions
from captions import NpzFeatures
from data import BatchSchedule
from files import digest
from latents import FORMAT, LatentFiles, LatentShards, shard_path, write_manifest

SHAPE, IMAGE_SIZE, CLASSES, SCALE = (4, 32, 32), 256, 1000, 0.18215


def write_shards(folder: Path, moments: np.ndarray, labels: np.ndarray, shard_size: int, **changes) -> Path:
    """`moments` (N,2,2,C,h,w) as extract_features.py leaves them; `changes` to the manifest."""
    folder.mkdir(parents=True)
    records = []
    for number, start in enumerate(range(0, len(moments), shard_size)):
        path, part = shard_path(folder, number), slice(start, start + shard_size)
        np.save(path, moments[part])
        runs = [[int(label), 1] for label in labels[part]]
        records.append({"file": path.name, **digest(path), "labels": runs, "unreadable": []})
    autoencoder = {"path": "sd-vae", "channels": moments.shape[3], "downsample": IMAGE_SIZE // moments.shape[-1]}
    manifest = {
        "format": FORMAT,
        "image_size": IMAGE_SIZE,
        "dtype": moments.dtype.name,
        "item_shape": list(moments.shape[1:]),
        "shard_size": shard_size,
        "autoencoder": autoencoder | {"scaling_factor": SCALE, "shift_factor": 0.0},
        "data": {"samples": len(moments), "class_names": [str(label) for label in range(labels.max() + 1)]},
        "shards": records,
    }
    write_manifest(folder, manifest | changes)
    return folder


def write_files(folder: Path, latents: np.ndarray, labels: np.ndarray) -> Path:
    """`latents` (N,C,h,w) in fast-DiT's layout."""
    for kind, arrays in (("features", latents[:, None]), ("labels", labels[:, None])):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
        for index, array in enumerate(arrays):
            np.save(folder / f"imagenet256_{kind}" / f"{index}.npy", array)
    return folder


class Ways:
    """Every way to read the samples `keys`; the first of each kind is what the others are measured against."""

    def __init__(self, folder: Path, images: int, shard_size: int):
        rng = np.random.default_rng(0)
        moments = rng.standard_normal((images, 2, 2, *SHAPE), dtype=np.float32).astype(np.float16)
        labels = np.sort(rng.integers(0, CLASSES, images))
        self.shards = LatentShards(write_shards(folder / "shards", moments, labels, shard_size), IMAGE_SIZE, seed=0)
        latents = moments[:, 0, 0].astype(np.float32) * np.float32(SCALE)
        self.files = LatentFiles(str(write_files(folder / "files", latents, labels)), seed=0)
        self.paths = list(folder.rglob("*.npy"))
        os.sync()  # what is not on disk yet stays in the page cache

    def kinds(self) -> dict[str, dict[str, Callable]]:
        read = {
            "shards, batched": self.read_batch,
            "shards, item by item": self.read_items,
            "one .npy per image, another per label": self.read_files,
            "one .npy per image, labels in memory": self.read_files_without_labels,
        }
        return {
            "read": read,
            "item": {
                "shards, batched": lambda keys: self.shards.__getitems__(keys),
                "shards, item by item": lambda keys: default_collate([self.shards[key] for key in keys]),
                "one .npy per image, labels in memory": lambda keys: default_collate([self.files[key] for key in keys]),
            },
            "cold read": read,
        }

    def forget(self) -> None:
        """Drop the files from the page cache; what is mapped would stay, so the shards are opened anew."""
        self.shards = copy.copy(self.shards)
        for path in self.paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def read_batch(self, keys) -> tuple[Tensor, Tensor]:
        indices = np.array([index for _, index in keys])
        mirrored = indices % 2 == 1
        return self.shards.moments(indices, mirrored), torch.from_numpy(self.shards.labels[indices])

    def read_items(self, keys) -> tuple[Tensor, Tensor]:
        items = [self.read_batch([key]) for key in keys]
        return torch.cat([moments for moments, _ in items]), torch.cat([label for _, label in items])

    def read_files(self, keys) -> tuple[Tensor, Tensor]:
        names = [self.files.name_of(index) for _, index in keys]
        latents = [torch.from_numpy(np.load(name)) for name in names]
        labels = [torch.from_numpy(np.load(name.replace("_features/", "_labels/"))) for name in names]
        return torch.cat(latents), torch.cat(labels)

    def read_files_without_labels(self, keys) -> tuple[Tensor, Tensor]:
        latents = [torch.from_numpy(np.load(self.files.name_of(index))) for _, index in keys]
        return torch.cat(latents), torch.from_numpy(self.files.labels[[index for _, index in keys]])

    def check(self, keys) -> None:
        """All ways give the same numbers."""
        read, item = self.kinds()["read"], self.kinds()["item"]
        moments, labels = read["shards, batched"](keys)
        for name, way in read.items():
            latents, same_labels = way(keys)
            assert torch.equal(labels, same_labels), name
            if "shards" in name:
                assert torch.equal(moments, latents), name
            else:  # the files hold means of images that are not mirrored
                plain = [place for place, (_, index) in enumerate(keys) if index % 2 == 0]
                assert torch.equal(moments[plain, 0].float() * SCALE, latents[plain]), name
        batch = item["shards, batched"](keys)
        for name, way in item.items():
            for entry, values in way(keys).items():
                if "shards" in name or entry != "x":
                    assert torch.equal(batch[entry], values), (name, entry)


class CaptionWays:
    """Captions of 10 to 40 tokens whose features are as wide as those of T5-XXL."""

    def __init__(self, folder: Path, count: int, width: int = 4096, length: int = 120):
        rng = np.random.default_rng(0)
        tokens = rng.integers(10, 41, count)

        def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
            numbers = np.array([int(text) for text in texts])
            mask = torch.arange(tokens[numbers].max()) < torch.from_numpy(tokens[numbers])[:, None]
            return torch.from_numpy(rng.standard_normal((*mask.shape, width), dtype=np.float32)), mask

        (folder / "captions").mkdir()
        records = write_captions(folder / "captions", 0, [[str(i)] for i in range(count)], encode, "float16")
        write_array(folder / "captions" / EMPTY, np.zeros((1, width), dtype=np.float16))
        self.shards = FeatureShards(folder / "captions", 1, {"width": width, "dtype": "float16"})
        self.bytes = sum(record["bytes"] for record in records) / count
        self.files = []
        for number in range(count):
            features, mask = self.shards.batch([number])
            padded = np.zeros((1, length, width), dtype=np.float32)
            padded[:, : mask.sum()] = features.numpy()
            path, there = folder / "captions" / f"{number}.npz", np.arange(length)[None] < int(mask.sum())
            np.savez(path, caption_feature=padded, attention_mask=there.astype(np.int64))
            self.files.append(path)
        self.npz = NpzFeatures(folder / "captions", [str(number) for number in range(count)])

    def kinds(self) -> dict[str, dict[str, Callable]]:
        def numbers(keys) -> list[int]:
            return [index for _, index in keys]

        ways = {"shards, batched": lambda keys: self.shards.batch(numbers(keys))}
        return {"captions": ways | {"one padded .npz per caption": lambda keys: self.npz.batch(numbers(keys))}}

    def check(self, keys) -> None:
        (ours, there), (theirs, same) = (way(keys) for way in self.kinds()["captions"].values())
        assert torch.equal(there, same) and torch.equal(ours.float(), theirs)


def measure(ways: Ways | CaptionWays, kind: str, batches: list, rounds: int) -> dict[str, float]:
    """Images per second: the median over rounds in which the ways of a kind take turns, after one that does not count.

    A kind is measured to its end before the next begins: cold reads would take from the page cache what others need.
    """
    functions = ways.kinds()[kind]
    rates = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, way in functions.items():
            if kind == "cold read":
                ways.forget()
            began = time.perf_counter()
            for keys in batches:
                way(keys)
            rates[name].append(sum(map(len, batches)) / (time.perf_counter() - began))
    return {name: statistics.median(rate[1:]) for name, rate in rates.items()}


def main(args) -> None:
    if args.quick:
        args.images, args.shard_size, args.batch_size, args.batches, args.captions = 64, 16, 16, 2, 16
    bench = Bench(args, latent_shape=SHAPE)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        @cache
        def latents() -> tuple[Ways, list]:
            ways = Ways(Path(folder), args.images, args.shard_size)
            return ways, checked_batches(ways, args.images, args)

        @cache
        def captions() -> tuple[CaptionWays, list]:
            ways = CaptionWays(Path(folder), args.captions)
            bench.record["bytes_per_caption"] = round(ways.bytes)
            return ways, checked_batches(ways, args.captions, args)

        kinds = {"read": latents, "item": latents, "cold read": latents, "captions": captions}
        bench.run({kind: partial(kind_rows, kind, make, args.rounds) for kind, make in kinds.items()})


def checked_batches(ways: Ways | CaptionWays, count: int, args) -> list:
    """What to read, in random order."""
    stream = BatchSchedule(count, min(args.batch_size, count), 1, 0, 1, seed=0).micro_batches(0)
    batches = [next(stream) for _ in range(args.batches)]
    ways.check(batches[0])
    return batches


def kind_rows(kind: str, make: Callable, rounds: int) -> Iterator[tuple[str, list[dict]]]:
    rate = measure(make()[0], kind, make()[1], rounds)
    best, what = rate["shards, batched"], "captions/s" if kind == "captions" else "images/s"
    slower = "times slower than shards, batched"
    yield kind, [{slower: best / value, "way": way, what: value} for way, value in rate.items()]


def get_parser() -> cli.Parser:
    parser = harness.get_parser("data", __doc__, budget=300)
    parser.add_argument("--images", type=cli.positive_int, default=8192, help="samples in the data set")
    parser.add_argument("--shard-size", type=cli.positive_int, default=1024, help="of them in a shard")
    parser.add_argument("--batch-size", type=cli.positive_int, default=256, help="samples read at once")
    parser.add_argument("--captions", type=cli.positive_int, default=512, help="with features on disk")
    parser.add_argument("--batches", type=cli.positive_int, default=8, help="that each way reads in a round")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    return parser


if __name__ == "__main__":
    cli.run(main, get_parser())
