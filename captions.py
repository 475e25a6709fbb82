"""Images with captions: a folder of `X.png` with `X.txt` beside it, or with a table of both.

The table is `captions.jsonl` in the folder, for each image a line `{"path": "images/1.png", "caption": "..."}`, or
`captions.csv` with the columns path and caption; or such a file anywhere, whose folder the paths are below.
"""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from autoencoders import SpaceInfo
from cli import UsageError
from data import ImageData, Reading, is_data, require_folder

TABLES = ("captions.jsonl", "captions.csv")
LONGEST = 10_000  # characters of a caption; more is a mistake
KNOWN = 16  # captions that checkpoints keep, for what draws without being asked


class CaptionedImages(ImageData):
    """Items are those of `ImageData`; y is the number of the sample whose caption counts."""

    def __init__(self, path: str, image_size: int, space: SpaceInfo, seed: int, flip: bool, reading: Reading):
        root, pairs = read_captions(Path(path))
        side = self._side(image_size, space)
        names = [name for name, _ in pairs]
        super(ImageData, self).__init__(str(root), names, np.arange(len(names)), [], (space.channels, side, side), seed)
        self.image_size, self.posterior = image_size, space.samples_posterior
        self.flip, self.reading = flip, reading
        texts = [text.encode() for _, text in pairs]  # in one block, which workers need not copy
        self._ends, self._text = np.cumsum([len(text) for text in texts]), b"".join(texts)

    def caption(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        return self._text[begin : self._ends[index]].decode()

    def fingerprint(self) -> str:
        """As of `ImageData`, and over the captions."""
        return hashlib.sha256(super().fingerprint().encode() + self._text).hexdigest()

    def record(self) -> dict:
        record = super().record()
        del record["class_names"]
        return record | {"captions": [self.caption(index) for index in range(min(KNOWN, len(self)))]}


def read_captions(path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """(folder, (name below it, caption) of each image).

    Raises:
        UsageError: no captions, no image for one or none for an image, no UTF-8, an empty or endless caption.
    """
    if path.suffix in (".jsonl", ".csv"):
        root, table = path.parent, path
    else:
        require_folder(path, "data path")
        root, table = path, next((path / name for name in TABLES if (path / name).is_file()), None)
    pairs = _of_pairs(root) if table is None else _of_table(table)
    for name, text in pairs:
        if not text or len(text) > LONGEST:
            what = "is empty" if not text else f"has {len(text)} characters, {LONGEST} are the most"
            raise UsageError(f"{root}: the caption of {name} {what}")
    if absent := [name for name, _ in pairs if not (root / name).is_file()]:
        raise UsageError(f"{table} has a caption for {absent[0]}, which is not in {root} ({len(absent)} such images)")
    return root, pairs


def _of_table(table: Path) -> list[tuple[str, str]]:
    pairs, is_csv = [], table.suffix == ".csv"
    try:
        with open(table, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if is_csv else file.read().splitlines()
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


def _of_pairs(root: Path) -> list[tuple[str, str]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = sorted(os.path.relpath(file, root) for file in root.rglob("*") if is_data(file.name) and file.is_file())
    images = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
    texts = {os.path.splitext(name)[0] for name in files if name.endswith(".txt")}
    stems = {os.path.splitext(name)[0] for name in images}
    if lonely := sorted(stems - texts):
        raise UsageError(f"{root} has no {lonely[0]}.txt with the caption of that image, and no {TABLES[0]}")
    if lonely := sorted(texts - stems):
        raise UsageError(f"{root} has a caption {lonely[0]}.txt, but no image of that name")
    if not images:
        raise UsageError(f"no images with captions in {root}: expected X.png and X.txt, or {TABLES[0]}")
    pairs = []
    for name in images:
        text = root / f"{os.path.splitext(name)[0]}.txt"
        try:
            pairs.append((name, text.read_text(encoding="utf-8").strip()))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{text} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return pairs
