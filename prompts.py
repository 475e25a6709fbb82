"""Lists of prompts, as files hold them: what to draw, and what suites of evaluation keep beside it.

.txt      a prompt a line, as MS-COCO's and MJHQ-30K's `captions.txt` of PixArt
.jsonl    {"prompt": "..."} or {"caption": "..."} a line; GenEval's `evaluation_metadata.jsonl` is one
.csv      with a column prompt or caption
.json     MJHQ-30K's `meta_data.json`: {"name": {"prompt": "..."}}; MS-COCO's `captions_*.json`
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

from cli import UsageError
from files import lines_of

LONGEST = 10_000  # characters of a text; more is a mistake
FIELDS = ("prompt", "caption")


@dataclass(frozen=True)
class Prompt:
    text: str
    about: dict = field(default_factory=dict)  # all that the list says of it


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a list, in its order.

    Raises:
        UsageError: it cannot be read, is none, or has a prompt that is empty or endless.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UsageError(f"prompts are a file with one of the suffixes {' '.join(READERS)}, got {path}")
    try:
        prompts = reader(path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UsageError(f"prompts {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not prompts:
        raise UsageError(f"prompts {path}: there are none in it")
    for number, prompt in enumerate(prompts, start=1):
        if fault := fault_of(prompt.text):
            raise UsageError(f"prompts {path}: number {number} {fault}")
    return prompts


def fault_of(text: str) -> str:
    """What is wrong with a prompt or caption, if anything."""
    if not text:
        return "is empty"
    return f"has {len(text)} characters, {LONGEST} are the most" if len(text) > LONGEST else ""


def _of_lines(path: Path) -> list[Prompt]:
    return [Prompt(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _of_json_lines(path: Path) -> list[Prompt]:
    with open(path, encoding="utf-8") as file:
        lines = enumerate(lines_of(file), start=1)
    return [_prompt(json.loads(line), f"{path}, line {number}") for number, line in lines if line.strip()]


def _of_table(path: Path) -> list[Prompt]:
    with open(path, encoding="utf-8", newline="") as file:
        return [_prompt(row, f"{path}, line {number}") for number, row in enumerate(csv.DictReader(file), start=2)]


def _of_collection(path: Path) -> list[Prompt]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return [_prompt(each, f"{path}, annotations") for each in content["annotations"]]
    if isinstance(content, dict):
        return [
            _prompt(about | {"name": name}, path) if isinstance(about, dict) else _prompt(about, path)
            for name, about in content.items()
        ]
    if isinstance(content, list):
        return [_prompt(each, path) for each in content]
    raise UsageError(f"prompts {path}: expected an object or a list")


def _prompt(about, where: str | Path) -> Prompt:
    text = next((about[name] for name in FIELDS if name in about), None) if isinstance(about, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"prompts {where}: expected a text under {' or '.join(FIELDS)}, got {str(about)[:60]}")
    return Prompt(text.strip(), about)


READERS = {".txt": _of_lines, ".jsonl": _of_json_lines, ".csv": _of_table, ".json": _of_collection}
