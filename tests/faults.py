"""Faults on purpose: processes killed at seeded random moments, bits flipped, disks that fill up.

Children are forked, not spawned: they need no imports of their own, so hundreds of deaths take seconds.
"""

import gc
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import distributed


class Child:
    """A forked process that runs `work`; its output goes to a file."""

    def __init__(self, work: Callable[[], None], output: Path):
        sys.stdout.flush()
        sys.stderr.flush()
        self.output = output
        self.pid = os.fork()
        if self.pid == 0:
            self._live(work)

    def _live(self, work) -> None:
        """The child's whole life; never returns into the test."""
        code = 1
        gc.freeze()  # what it was born with: looking through that again and again costs more than its own work
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; minus the number of the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def limit_file_size(self, size: int) -> None:
        """From now on every file of the child that grows past `size` bytes fails half-way, as on a full disk."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def allow_any_file_size(self) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def holder_of(folder: Path, output: Path) -> Child:
    """A process that has claimed the folder and keeps it until it is killed."""

    def hold():
        claim = distributed.claim(folder, "no")
        print("held", flush=True)
        time.sleep(600)
        claim.close()

    child = Child(hold, output)
    wait_until(lambda: output.exists() and "held" in output.read_text())
    return child


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def flip_a_bit(folder: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Flip one random bit of one random file; returns the file and what it held."""
    path = rng.choice(sorted(folder.iterdir()))
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    return path, before
