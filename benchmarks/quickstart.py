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
from itertools import pairwise, takewhile
from pathlib import Path

import cli
from benchmarks import harness

SCRIPT = Path(__file__).parent.parent / "scripts" / "quickstart.sh"


def get_parser() -> cli.Parser:
    parser = harness.get_parser("quickstart", __doc__)
    parser.add_argument("--steps", type=cli.positive_int, help="of training (default: the script's)")
    return parser


def main(args) -> None:
    device = harness.start(args)
    steps = args.steps or (20 if args.quick else None)
    with tempfile.TemporaryDirectory() as folder:
        seconds, result = run(Path(folder), steps, args.threads, device.type)
    whole = sum(seconds.values())
    rows = [{"share": value / whole, "stage": stage, "s": value} for stage, value in seconds.items()]
    rows.append({"share": 1.0, "stage": "all", "s": whole})
    print("\n".join(result) + "\n")
    harness.report(args, device, {"quick start": rows}, [], result=result)


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
