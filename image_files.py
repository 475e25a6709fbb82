"""Images as files: PNG, grids, and `.npz` files of many, as the ADM evaluation suite reads them.

N images · H, W image size
"""

import base64
import io
import itertools
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cli import UsageError
from files import replacing


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """(N, H, W, 3) -> one picture, `columns` wide, with a margin of 2 pixels; tiny images are enlarged to see them."""
    columns, factor = min(columns, len(images)), max(1, 48 // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 2) + 2, i % columns * (width + 2) + 2
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(path: Path, image: np.ndarray) -> None:
    with replacing(path) as file:
        file.write(png_bytes(image))


def png_bytes(image: np.ndarray, optimize: bool = False) -> bytes:
    """(H, W, 3) uint8; `optimize`: fewer bytes, for more time."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png", optimize=optimize)
    return file.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A file inside a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def save_npz(path: Path, batches: Iterable[np.ndarray], labels: Sequence[int]) -> None:
    """Write `arr_0` (N, H, W, 3) uint8 and `labels` (N,) int64, one batch (n, H, W, 3) in memory at a time.

    `np.load` and the ADM evaluation suite read the file; its bytes depend on the images and labels alone.
    """
    labels = np.asarray(labels, dtype=np.int64)
    batches = iter(batches)
    first, written = next(batches), 0
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch in itertools.chain([first], batches):
                assert batch.dtype == np.uint8 and batch.shape[1:] == first.shape[1:]
                member.write(np.ascontiguousarray(batch))
                written += len(batch)
        assert written == len(labels), f"{written} images for {len(labels)} labels"
        with archive.open(zipfile.ZipInfo("labels.npy"), "w") as member:
            np.lib.format.write_array(member, labels, version=(1, 0))


def open_npz(path: Path, verify: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) uint8, memory-mapped, and labels (N,) of a file that `save_npz` wrote.

    Args:
        verify: read all of it, to compare its checksums.

    Raises:
        UsageError: it is missing, cut, damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if verify and (damaged := archive.testzip()):
                raise ValueError(f"the checksum of {damaged} is wrong")
            with archive.open("labels.npy") as member:
                labels = np.lib.format.read_array(member)
            images = map_array(path, archive, "arr_0.npy")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a whole .npz file of images and labels ({error})") from None
    return images, labels


def map_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of the `.npz` file at `path`, opened as `archive`, memory-mapped.

    Raises:
        ValueError: it is compressed, or in another format than `np.savez` writes.
        KeyError: there is none of this name.
    """
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # of the local header's 30 bytes, the last four: lengths of what follows
        file.seek(member.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist()))
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"{name} has a header of version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if fortran else "C")
