"""How processes that worked together end: starts pairs of them, again and again, and counts their exit codes.

    python scripts/ends.py --pairs 200

Each process does what every script does that several processes run: it joins, exchanges, keeps its groups, as engines
do, and ends through `cli.run`. They are forked, which spares them their imports but not their ends.
"""

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

import cli
import distributed

EXCHANGES = 10
kept = []  # groups that outlive `distributed.stop()`


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="ends.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=cli.positive_int, default=20, help="how many to start, one after the other")
    return parser


def main(args) -> None:
    codes = Counter(code for _ in range(args.pairs) for code in pair(exchange))
    print(", ".join(f"{count} processes ended with {code}" for code, count in sorted(codes.items())))
    if set(codes) != {0}:
        raise cli.RunStopped("not all ended well")


def exchange(args) -> None:
    """The least that a script of several processes does."""
    processes = distributed.start("cpu")
    try:
        kept.extend([dist.group.WORLD, dist.new_group(backend="gloo")])
        for turn in range(EXCHANGES):
            processes.gather({"turn": turn})
            processes.sum(torch.ones(3))
            dist.all_gather_object([None, None], turn, group=kept[1])
    finally:
        distributed.stop()


def pair(script: Callable) -> list[int]:
    """Run `script(args)` as the main of two processes; returns their exit codes, minus the signal for one that died."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    sys.stdout.flush()
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = ["ends.py"]
            cli.run(script, get_parser())
            raise SystemExit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    cli.run(main, get_parser())
