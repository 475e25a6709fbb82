"""Features of captions on disk, in the shards of extract_features.py, beside the latents of the images they are of.

N captions of a batch · L tokens · C width of a token's features

    captions-00000.npy         (tokens, C) of all captions of the images of a shard, one behind the other
    captions-00000-ends.npy    (captions, 2) int64: which image of the shard it is of, and where its tokens end
    captions-empty.npy         (L, C) of the empty caption

Only tokens that there are, in half precision: bfloat16, which NumPy does not know, as its 16 bits.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from cli import UsageError
from files import digest, replacing

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
EMPTY = "captions-empty.npy"


class TextSettings(TypedDict):
    """What shapes the features of captions, besides their encoder."""

    width: int
    dtype: Literal["float16", "bfloat16"]


def features_path(folder: Path, number: int) -> Path:
    return folder / f"captions-{number:05d}.npy"


def ends_path(folder: Path, number: int) -> Path:
    return folder / f"captions-{number:05d}-ends.npy"


# -------------------------------------------------------------------------------------------------------------- writing


def in_half(features: Tensor, dtype: str) -> np.ndarray:
    """Raises ValueError for values that float16 does not hold."""
    half = features.to(getattr(torch, dtype)).cpu()
    if not half.isfinite().all():
        raise ValueError(f"features of captions do not fit into {dtype}")
    return half.view(torch.int16).numpy() if dtype == "bfloat16" else half.numpy()


def write_array(path: Path, array: np.ndarray) -> dict:
    """Whole and on disk or not at all; what a manifest says of it. Raises OSError."""
    with replacing(path) as file:
        np.save(file, array)
    return {"file": path.name} | digest(path)


def write_captions(
    folder: Path, number: int, of_images: Iterable[Sequence[str]], encoder, dtype: str, batch_size: int = 256
) -> list[dict]:
    """A shard of captions, from those of each of its images; what the manifest will say of its files.

    Raises:
        OSError: a full disk.
        ValueError: as `in_half`.
    """
    captions = [(image, text) for image, texts in enumerate(of_images) for text in texts]
    pieces, ends = [], np.zeros((len(captions), 2), dtype=np.int64)
    for start in range(0, len(captions), batch_size):
        part = captions[start : start + batch_size]
        features, mask = encoder([text for _, text in part])
        pieces.append(in_half(features[mask], dtype))
        ends[start : start + len(part), 0] = [image for image, _ in part]
        ends[start : start + len(part), 1] = mask.sum(dim=1).cpu()
    ends[:, 1] = np.cumsum(ends[:, 1])
    return [
        write_array(features_path(folder, number), np.concatenate(pieces)),
        write_array(ends_path(folder, number), ends),
    ]


# -------------------------------------------------------------------------------------------------------------- reading


class FeatureShards:
    """Features of captions, memory-mapped; the number after the last one is that of the empty caption."""

    def __init__(self, folder: Path, shards: int, settings: TextSettings):
        self.folder, self.dtype, self.width = folder, settings["dtype"], settings["width"]
        tables = [self._load(ends_path(folder, number)) for number in range(shards)]
        counts = [np.bincount(table[:, 0]) for table in tables]
        self.first = np.concatenate([[0], np.cumsum(np.concatenate(counts))])  # caption, of each image
        self.ends = [np.concatenate([[0], table[:, 1]]) for table in tables]
        self.begins = np.concatenate([[0], np.cumsum([len(table) for table in tables])])  # caption, of each shard
        self.empty = self._load(folder / EMPTY)
        self._shards: list[np.ndarray | None] = [None] * shards

    @property
    def nothing(self) -> int:
        """The number of the empty caption."""
        return int(self.begins[-1])

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(N, L, C) in the stored precision, and (N, L) bool."""
        rows = [self._rows(number) for number in numbers]
        features = np.zeros((len(rows), max(map(len, rows)), self.width), dtype=self.empty.dtype)
        mask = np.zeros(features.shape[:2], dtype=bool)
        for place, row in enumerate(rows):
            features[place, : len(row)] = row
            mask[place, : len(row)] = True
        tensor = torch.from_numpy(features)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor, torch.from_numpy(mask)

    def _rows(self, number: int) -> np.ndarray:
        if number == self.nothing:
            return self.empty
        shard = int(np.searchsorted(self.begins, number, side="right")) - 1
        place = number - int(self.begins[shard])
        if self._shards[shard] is None:  # mapped when it is first needed in this process
            self._shards[shard] = self._load(features_path(self.folder, shard), mapped=True)
        ends = self.ends[shard]
        return self._shards[shard][ends[place] : ends[place + 1]]

    def _load(self, path: Path, mapped: bool = False) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"{path} cannot be read ({error}); extract the features anew") from None

    def __getstate__(self) -> dict:
        """For workers that are spawned: they map the shards themselves."""
        return vars(self) | {"_shards": [None] * len(self._shards)}


class StoredTexts:
    """A `TextEncoder` that knows the captions of a data set alone, whose features are on disk."""

    def __init__(self, width: int, length: int, record: dict):
        self.width, self.length, self._record = width, length, record
        self.data = None  # of `CaptionedSamples`, when it is open

    def record(self) -> dict:
        return self._record

    def to(self, device: torch.device) -> "StoredTexts":
        return self

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        known = {text: number for number, text in enumerate(self.data.known())}
        nothing = getattr(self.data.features, "nothing", None)
        if nothing is not None:
            known[""] = nothing
        if unknown := [text for text in texts if text not in known]:
            raise UsageError(f"{unknown[0]!r} is none of the captions whose features are on disk: --text-encoder NAME")
        return self.data.features.batch([known[text] for text in texts])
