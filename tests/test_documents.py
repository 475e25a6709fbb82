"""The commands that README and docs/ show: each names scripts, modules and flags that exist, with values they take."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("python", "python3", "torchrun", "deepspeed", "accelerate", "srun")
OTHERS = ("pip", "conda", "git", "cd", "export", "tensorboard")  # whose words are no business of ours
LEFT_OUT = "..."  # stands for what the reader knows


def commands(document: str) -> list[list[str]]:
    """The words of each command in its ```bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def fault(command: list[str]) -> str | None:
    """What is wrong with a command: nothing, or a line."""
    variables = [word.partition("=")[0] for word in command if re.match(r"[A-Z_]+=", word)]
    words = command[len(variables) :]
    if absent := [word for word in words if word.startswith(("config/", "scripts/")) and not (ROOT / word).is_file()]:
        return f"there is no {absent[0]}"
    if words[0] == "bash":
        return fault_of_shell(ROOT / words[1], variables, words[2:])
    if words[0] in OTHERS:
        return None
    at = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")), None)
    if at is None or (at and words[0] not in LAUNCHERS):
        return f"{words[0]} runs none of our scripts"
    module = words[at + 1] if words[at] == "-m" else words[at].removesuffix(".py").replace("/", ".")
    return fault_of_script(module, words[at + 1 + (words[at] == "-m") :])


def fault_of_script(module: str, words: list[str]) -> str | None:
    if not any((ROOT / module.replace(".", "/")).with_suffix(s).exists() for s in (".py", "")):
        return f"there is no {module}"
    if (ROOT / module / "__main__.py").exists():
        module += ".__main__"
    parser = importlib.import_module(module).get_parser()
    try:
        parser.parse_args([word for word in words if word != LEFT_OUT])
    except Refused as refused:
        if LEFT_OUT in words and "arguments are required" in str(refused):
            return None
        return str(refused)


def fault_of_shell(script: Path, variables: list[str], words: list[str]) -> str | None:
    """Its variables and further flags have to be known to it, to what it sources, or to a script that it runs."""
    text = "".join(path.read_text() for path in (script, ROOT / "scripts" / "_launch.sh"))
    if unread := [name for name in variables if not re.search(rf"\b{name}\b", text)]:
        return f"{script.name} reads no {unread[0]}"
    runs = {name for name in re.findall(r"\b(\w+)\.py\b", text) if (ROOT / f"{name}.py").is_file()}
    known = {flag for name in runs for flag in importlib.import_module(name).get_parser()._option_string_actions}
    if strange := [word for word in words if word.startswith("--") and word not in known and word not in text]:
        return f"{script.name} takes no {strange[0]}"


class Refused(Exception):
    """In place of argparse's exit."""


@pytest.fixture(autouse=True)
def refusing(monkeypatch):
    def error(self, message):
        raise Refused(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", error)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_taken(path):
    found = commands(path.read_text())
    assert found or path.name == "code.md"
    assert [(" ".join(command), wrong) for command in found if (wrong := fault(command))] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python trian.py --rf", "there is no trian"),
        ("python -m analysis.plans", "there is no analysis.plans"),
        ("torchrun --nproc_per_node=8 train.py --num_expert 8 ...", "unrecognized arguments: --num_expert 8"),
        ("python train.py \\\n    --epochs none", "argument --epochs"),
        ("python calculate_metrics.py evaluate x", "invalid choice: 'evaluate'"),
        ("deepspeed train_deepspeed.py --deepspeed_config config/zero4.json", "there is no config/zero4.json"),
        ("bash scripts/train_S.sh", "there is no scripts/train_S.sh"),
        ("DATAPATH=x bash scripts/train_S_2_8E2A.sh", "train_S_2_8E2A.sh reads no DATAPATH"),
        ("DATA_PATH=x bash scripts/train_S_2_8E2A.sh --wrong", "train_S_2_8E2A.sh takes no --wrong"),
        ("pyhton train.py", "pyhton runs none of our scripts"),
    ],
)
def test_what_is_wrong_is_found(line, message):
    (command,) = commands(f"text\n```bash\n{line}   # comment\n```\n")
    assert message in fault(command)
