"""Files that are whole or absent, and the sums that tell whether they still are what was written. Standard library."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from cli import warn_once

UNFINISHED = ".unfinished-"  # how names begin of what is being written; a kill leaves them behind


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in. It becomes `path` when the block ends, complete and on disk; an exception leaves no trace.

    Raises:
        OSError: the disk is full or not writable; what stood at `path` before is as it was.
    """
    beside = path.with_name(f"{UNFINISHED}{path.name}-{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            _flush(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems answer that have no such thing
            raise
        warn_once(f"this disk does not flush when it is asked to ({error.strerror}); it is left to do so by itself")


@contextlib.contextmanager
def dispensable(path: Path) -> Iterator[None]:
    """Around writing what a run can do without: where that fails, it is said once and what follows goes on."""
    try:
        yield
    except OSError as error:
        warn_once(f"{path} cannot be written ({error.strerror or error}); the run goes on without")


def remedy(error: OSError) -> str:
    """What to do when a file could not be written: a full disk is one cause among others."""
    return "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"


def write_json(path: Path, record: dict | list) -> None:
    path.write_text(_as_json(record), encoding="utf-8")


def replace_json(path: Path, record: dict | list) -> None:
    """`write_json`, whole and on disk or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(_as_json(record).encode())


def replace_lines(path: Path, records: Iterable[dict]) -> None:
    """A file of records, one a line, whole and on disk or not at all. Raises OSError."""
    with replacing(path) as file:
        for record in records:
            file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode(errors="backslashreplace"))


def lines_of(file: Iterable[str]) -> list[str]:
    """Of an open file of texts: they end with its newlines alone, as texts may hold what Unicode calls a line's end."""
    return [line.rstrip("\r\n") for line in file]


def _as_json(record: dict | list) -> str:
    return json.dumps(record, indent=1) + "\n"


def digest(path: Path) -> dict:
    """What a manifest says of a file."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def digest_of(record: dict) -> str:
    """SHA-256 of a record: a manifest's own."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
