"""How long does the quick start take, from images to judged samples?

    python -m benchmarks.quickstart
    python -m benchmarks.quickstart --steps 3000

Runs scripts/quickstart.sh with the Python that runs this, in a temporary folder, and notes when each of its stages
begins. What it says of its samples stands with the times: a faster run that draws worse digits is none.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path

import cli
from benchmarks import harness
from benchmarks.report import Bench

SCRIPT = Path(__file__).parent.parent / "scripts" / "quickstart.sh"


def get_parser() -> cli.Parser:
    parser = harness.get_parser("quickstart", __doc__, budget=1200)
    parser.add_argument("--steps", type=cli.positive_int, help="of training (default: the script's)")
    return parser


def main(args) -> None:
    bench = Bench(args)
    bench.run({"quick start": partial(stage_rows, bench, args.steps or (20 if args.quick else None))})


def stage_rows(bench: Bench, steps: int | None) -> Iterator[tuple[str, list[dict]]]:
    with tempfile.TemporaryDirectory() as folder:
        seconds, result = run(Path(folder), steps, bench.args.threads, bench.device.type)
    print("\n".join(result) + "\n")
    bench.record["result"] = result
    whole = sum(seconds.values())
    rows = [{"share": value / whole, "stage": stage, "s": value} for stage, value in seconds.items()]
    yield "quick start", [*rows, {"share": 1.0, "stage": "all", "s": whole}]


def run(folder: Path, steps: int | None, threads: int, device: str) -> tuple[dict[str, float], list[str]]:
    """(seconds of each stage, the lines that the last one printed)."""
    variables = {
        "QUICKSTART_PYTHON": sys.executable,
        "RESULTS": str(folder / "results"),
        "DATA": str(folder / "digits"),
    }
    variables |= {"OMP_NUM_THREADS": str(threads)} | ({"STEPS": str(steps)} if steps else {})
    variables |= {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "errors", "w+") as errors:
        command = ["bash", str(SCRIPT)]
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        lines, began = [], {}  # stage -> when it began, and how many lines there were
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("== "):
                began[re.split(r"[:,]", line[3:].strip())[0]] = time.perf_counter(), len(lines)
        if process.wait():
            errors.seek(0)
            raise cli.RunStopped("scripts/quickstart.sh failed:\n" + "\n".join(lines[-5:]) + errors.read()[-2000:])
    times = [*(start for start, _ in began.values()), time.perf_counter()]
    seconds = {stage: end - start for stage, (start, end) in zip(began, pairwise(times), strict=True)}
    result = lines[next(reversed(began.values()))[1] :]
    return seconds, list(takewhile(lambda line: not line.startswith("picture"), result))  # what follows is advice


if __name__ == "__main__":
    cli.run(main, get_parser())
