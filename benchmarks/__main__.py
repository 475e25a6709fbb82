"""All speed benchmarks, one after another, and one table of what they say about the goals.

    python -m benchmarks            # a GPU: below 10 minutes on an H200; a CPU: a small selection

Each runs in a process of its own, so that one which fails takes no other with it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import cli
from benchmarks import harness

NAMES = ("traffic", "attention", "moe_block", "train_step", "sample_step", "optimizer_ema", "data", "quickstart")


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="of a CPU")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for the JSON files")
    parser.add_switch(parser, "--quick", False, "tiny sizes, to see that all run; the numbers mean nothing")
    return parser


def main(args) -> None:
    flags = ["--device", args.device, "--threads", str(args.threads), "--quick", str(args.quick)]
    failed, goals, began = [], [], time.perf_counter()
    for name in args.only:
        output = args.output / f"{name}.json"
        print(f"== {name}\n", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags, "--output", str(output)]).returncode:
            failed.append(name)
        else:
            goals += [harness.Goal.from_record(goal) for goal in json.loads(output.read_text())["goals"]]
        print(f"\n{time.perf_counter() - start:.0f} s\n", flush=True)
    goals.sort(key=lambda goal: int(goal.row))
    print(f"== goals\n\n{harness.goals_table(goals)}\n\n{time.perf_counter() - began:.0f} s in all")
    if failed:
        raise cli.RunStopped(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(main, get_parser())
