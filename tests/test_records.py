"""What is read from JSON is what its type says, or one line tells why not."""

import json
from typing import Annotated

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from records import BadRecord, check_record, read_record


class Part(TypedDict):
    bytes: Annotated[int, Field(ge=0)]


class Record(TypedDict):
    step: Annotated[int, Field(ge=1, le=100)]
    scale: Annotated[float, Field(allow_inf_nan=False)]
    parts: dict[str, Part]


GOOD = {"step": 1, "scale": 2, "parts": {"a": {"bytes": 0}}, "of a newer version": None}


def test_what_fits_comes_back_as_it_is(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(GOOD))
    assert read_record(path, Record) == GOOD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 0}, ["step", "0", "1"]),
        ({"step": 1.5}, ["step", "1.5", "integer"]),
        ({"step": True}, ["step", "True", "integer"]),
        ({"step": "1"}, ["step", "'1'", "integer"]),
        ({"scale": float("nan")}, ["scale", "nan", "finite"]),
        ({"parts": {"a": {"bytes": -1}}}, ["parts.a.bytes", "-1", "0"]),
        ({"parts": {"a": {}}}, ["parts.a.bytes", "missing"]),
        ({"parts": [1]}, ["parts", "[1]", "dictionary"]),
    ],
)
def test_what_differs_is_named(change, words):
    with pytest.raises(BadRecord) as error:
        check_record(GOOD | change, Record, "record.json", "write it again")
    message = str(error.value)
    assert message.startswith("record.json: ") and message.endswith("; write it again") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[]", r"the whole is \[\], "),
    ],
)
def test_a_file_that_is_no_record_is_one_line(tmp_path, text, words):
    path = tmp_path / "record.json"
    path.write_bytes(text)
    with pytest.raises(BadRecord, match=words):
        read_record(path, Record)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(BadRecord, match=r"gone\.json cannot be read: No such file"):
        read_record(tmp_path / "gone.json", Record)
