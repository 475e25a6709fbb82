"""All speed benchmarks, the most valuable first, and one table of what they say about the goals.

    python -m benchmarks --device cuda --budget 600            # what a GPU shows in ten minutes
    python -m benchmarks --device cuda --budget 600 --resume   # and what was missing, ten minutes later

Each part runs in a process of its own, so that one which fails takes no other with it, and has its share of the time
that is left: what a part does not use is for those after it. One that goes on for too long is ended; what it had
measured counts. `summary.json` and the table of goals are there after each part.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cli
import distributed
from benchmarks import harness
from benchmarks.report import NOT_BEGUN, Goal, command, goals_table
from files import replace_json

TESTS = Path("tests")
SHORTEST = 10  # seconds, below which no part is begun
GRACE = 3  # seconds to end in when asked to


@dataclass(frozen=True)
class Part:
    """What one process does. Its shares of the time on a GPU and on a CPU are in no unit; 0: only if asked for."""

    name: str  # of its file
    gpu: float
    cpu: float
    module: str | None = None  # where that is not its name
    flags: tuple[str, ...] = ()

    def weight(self, device: str) -> float:
        return self.gpu if device == "cuda" else self.cpu


PARTS = (
    Part("moe_block", gpu=140, cpu=100),
    Part("train_step", gpu=140, cpu=100, flags=("--parts", "steps")),
    Part("sample_step", gpu=80, cpu=100),
    Part("attention", gpu=25, cpu=30),
    Part("memory", gpu=50, cpu=10, module="train_step", flags=("--parts", "memory")),
    Part("dense_table", gpu=55, cpu=0, module="train_step", flags=("--parts", "table")),
    Part("cold_start", gpu=40, cpu=0, module="train_step", flags=("--parts", "cold-start")),
    Part("tests", gpu=50, cpu=0),
    Part("optimizer_ema", gpu=20, cpu=60),
    Part("traffic", gpu=0, cpu=30),
    Part("data", gpu=0, cpu=100),
    Part("quickstart", gpu=0, cpu=400),
)
NAMES = tuple(part.name for part in PARTS)
PROFILED = ("moe_block", "train_step", "sample_step")


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    harness.add_common_arguments(parser, budget=1000)
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for the JSON files")
    parser.add_switch(parser, "--profile", False, f"the kernels that take the most time: {', '.join(PROFILED)}")
    return parser


def main(args) -> None:
    device = distributed.choose_device(args.device).type
    parts = [part for part in PARTS if (part.name in args.only if args.only else part.weight(device))]
    args.output.mkdir(parents=True, exist_ok=True)
    began, summary = time.monotonic(), Summary(args.output / "summary.json", parts)
    for number, part in enumerate(parts):
        left = args.budget - (time.monotonic() - began)
        share = left * share_of(part, parts[number:], device)
        if share < SHORTEST and not args.quick:
            continue
        print(f"== {part.name}: {share:.0f} of {left:.0f} s\n", flush=True)
        summary.note(part, run(command_of(part, args, device, share), min(left - GRACE, 1.3 * share + 20)))
        summary.show()
    summary.show(whole=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    if summary.failed:
        raise cli.RunStopped(f"failed: {', '.join(summary.failed)}")


def share_of(part: Part, parts: list[Part], device: str) -> float:
    """Of the time that is left, for the first of some parts; one that is asked for on another device counts too."""
    weights = [each.weight(device) or max(each.gpu, each.cpu) for each in parts]
    return (part.weight(device) or max(part.gpu, part.cpu)) / sum(weights)


def command_of(part: Part, args, device: str, seconds: float) -> list[str]:
    if part.name == "tests":
        files = sorted(str(path) for path in TESTS.glob("test_*.py") if "mark.gpu" in path.read_text())
        return [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-m", "gpu", *files]
    flags = ["--device", device, "--threads", str(args.threads), "--budget", f"{seconds:.0f}"]
    flags += [f"--quick={args.quick}", f"--resume={args.resume}", "--output", str(args.output / f"{part.name}.json")]
    flags += [f"--profile={args.profile}"] if part.name in PROFILED else []
    return [sys.executable, "-m", f"benchmarks.{part.module or part.name}", *flags, *part.flags]


def run(command: list[str], seconds: float) -> int | None:
    """Its exit code; None: it was ended after so long, and all that it had started with it."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """As Ctrl-C does, so that it takes its temporary files with it; what does not listen is killed."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Summary:
    """What the parts' files say, in one file and one table, after each of them."""

    def __init__(self, path: Path, parts: list[Part]):
        self.path, self.failed = path, []
        self.found: dict[tuple[str, str], Goal] = {}  # several parts speak of some
        self.began, self.clock = time.time(), time.monotonic()
        self.parts = {part.name: {"ended": NOT_BEGUN, "missing": {}} for part in parts}
        self.command = command()

    def note(self, part: Part, code: int | None) -> None:
        ended = "stopped: it took too long" if code is None else "done" if code == 0 else f"failed: exit code {code}"
        if code:
            self.failed.append(part.name)
        found, file = {}, self.path.with_name(f"{part.name}.json")
        if file.is_file() and file.stat().st_mtime >= self.began:  # not one of an earlier run
            found = json.loads(file.read_text())
        for goal in map(Goal.from_record, found.get("goals", ())):
            if goal.value is not None or (goal.row, goal.what) not in self.found:
                self.found[goal.row, goal.what] = goal
        self.parts[part.name] = {"ended": ended, "missing": found.get("missing", {})}
        self._write()

    @property
    def goals(self) -> list[Goal]:
        return sorted(self.found.values(), key=lambda goal: int(goal.row))

    def _write(self) -> None:
        record = {"command": self.command, "seconds": round(time.monotonic() - self.clock, 1), "parts": self.parts}
        replace_json(self.path, record | {"goals": [goal.record() for goal in self.goals]})

    def show(self, whole: bool = False) -> None:
        """The goals of which there is something so far; in the end all, and what is missing."""
        shown = [goal for goal in self.goals if whole or goal.value is not None]
        if shown:
            print(f"\n== goals{'' if whole else ', so far'}\n\n{goals_table(shown)}\n", flush=True)
        for name, part in self.parts.items() if whole else ():
            if part["ended"] != "done":
                print(f"{name}: {part['ended']}")
            for case, why in part["missing"].items():
                print(f"missing: {name}: {case}: {why}")
        sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    cli.run(main, get_parser())
