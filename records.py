"""JSON that a person or another program may have touched: read, and compared with a type that says what it must hold.

The type is the format's documentation, a TypedDict (of `typing_extensions`, as pydantic wants it before Python 3.12)
whose fields carry their ranges: `step: Annotated[int, Field(ge=0)]`. Fields that it does not name may be there: a newer
version may write more.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator, TypeAdapter, ValidationError

from cli import UsageError


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("should be a string")
    return value


# A name of a file or folder: as Python has it, which pydantic's own strings refuse where it is not UTF-8.
Name = Annotated[Any, PlainValidator(_text)]


class BadRecord(UsageError):
    """JSON that is unreadable, or not what its type says; names the file, the field, its value, what was expected."""


class OtherVersion(BadRecord):
    """JSON whose `format` is another than this version reads."""


def read_record(path: Path, kind: type, what_to_do: str = "", version: int | None = None) -> Any:
    """The content of a JSON file, which is as `kind` says.

    Args:
        kind: a type, such as a TypedDict with ranges (see above).
        what_to_do: ends the message of an error.
        version: what its `format` has to be, which is looked at first: other versions have other fields.

    Raises:
        BadRecord: it cannot be read, is no JSON, is nested too deeply, or differs from `kind`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRecord(f"{path} cannot be read: {error.strerror or error}{_advice(what_to_do)}") from None
    except ValueError as error:  # not UTF-8
        raise BadRecord(f"{path} is not JSON ({error}){_advice(what_to_do)}") from None
    return parse_record(text, kind, path, what_to_do, version)


def parse_record(text: str, kind: type, source: object, what_to_do: str = "", version: int | None = None) -> Any:
    """`read_record` of a text that `source` holds."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise BadRecord(f"{source} is nested too deeply to be read{_advice(what_to_do)}") from None
    except ValueError as error:
        raise BadRecord(f"{source} is not JSON ({error}){_advice(what_to_do)}") from None
    return check_record(content, kind, source, what_to_do, version)


def check_record(content: Any, kind: type, source: object, what_to_do: str = "", version: int | None = None) -> Any:
    """`content`, as it is, if it is as `kind` says; numbers and strings are never taken for one another.

    Raises:
        BadRecord: names `source`, the first field that differs, its value, and what was expected.
    """
    if version is not None and isinstance(content, dict) and content.get("format", version) != version:
        raise OtherVersion(f"{source} has format {content['format']!r}, this version reads {version}")
    try:
        _adapter(kind).validate_python(content, strict=True)
    except ValidationError as failure:
        raise BadRecord(f"{source}: {_in_words(failure)}{_advice(what_to_do)}") from None
    return content


def check_arrays(
    arrays: Mapping[str, Any], axes: Mapping[str, str], source: object, what_to_do: str = "", **sizes: int
) -> dict[str, int]:
    """Compare the shapes of arrays with one another and with what is known.

    Args:
        axes: a letter for each axis of each array; one letter is one size, wherever it stands.
        sizes: those that are known, by letter.

    Returns:
        All sizes by letter.

    Raises:
        BadRecord: names the array, its shape and what was expected.
    """
    for name, letters in axes.items():
        if name not in arrays:
            raise BadRecord(f"{source}: there is no {name}{_advice(what_to_do)}")
        shape = tuple(arrays[name].shape)
        expected = tuple(sizes.get(letter, letter) for letter in letters)
        fits = len(shape) == len(letters)
        for letter, size in zip(letters, shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            expected = str(expected).replace("'", "")
            raise BadRecord(f"{source}: {name} is {shape}, expected {expected}{_advice(what_to_do)}")
    return sizes


def _advice(what_to_do: str) -> str:
    return f"; {what_to_do}" if what_to_do else ""


@cache
def _adapter(kind: type):
    return TypeAdapter(kind)


def _in_words(failure) -> str:
    """`files.ema.bytes is -1, input should be greater than or equal to 0`."""
    error = failure.errors(include_url=False)[0]
    field = ".".join(map(str, error["loc"])) or "the whole"
    if error["type"] == "missing":
        return f"{field} is missing"
    value = repr(error["input"])
    value = value if len(value) <= 60 else f"{value[:60]}..."
    return f"{field} is {value}, {error['msg'][:1].lower()}{error['msg'][1:]}"
