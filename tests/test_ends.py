"""How processes end: alone and together, interrupted, and when nobody reads what they say."""

import contextlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_training import run_train

import checkpoint
import cli

LATE = """
import time
import torch
import torch.distributed as dist
from scripts import ends
import distributed

class Slow:
    def __del__(self):
        time.sleep(1)

def late(args):
    processes = distributed.start("cpu")
    ends.kept.extend([dist.group.WORLD, Slow()])
    time.sleep(0.3 * processes.rank)
    dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda future: None)
    if processes.rank:
        time.sleep(0.2)
    distributed.stop()

print(ends.pair(late), [ends.pair(ends.exchange) for _ in range(3)])
"""


def test_processes_of_a_group_end_with_0(tmp_path):
    """Also where a thread of the group needs Python while it is being taken down, which is slow here."""
    result = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.stdout == "[0, 0] [[0, 0], [0, 0], [0, 0]]\n", result.stderr


def run(main, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as end:
        cli.run(main, cli.Parser(prog="x"))
    return end.value.code


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    assert run(interrupted, monkeypatch) == 130
    assert capsys.readouterr().err == "x: interrupted\n"


@contextlib.contextmanager
def unread():
    """Standard output is a pipe that nobody reads, as after `| head`."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stream, contextlib.redirect_stdout(stream):
        yield
        cli.send_nowhere(stream)  # what is still in its buffer


def test_tools_that_nobody_reads_end_without_a_word(monkeypatch, capsys):
    def at_once(args):
        print("line", flush=True)

    def at_the_end(args):
        print("line")

    def turned_into_another_error(args):
        try:
            at_once(args)
        except OSError as error:
            raise cli.RunStopped(f"{error}: free some space") from None

    for tool in (at_once, at_the_end, turned_into_another_error):
        with unread():
            assert run(tool, monkeypatch) == 141
    assert capsys.readouterr().err == ""


def test_training_that_nobody_reads_goes_on(images):
    with unread():
        folder = run_train(images, steps=2)
    checkpoint.verify(folder / "checkpoints" / "0000002")
    log = (folder / "log.txt").read_text()
    assert "step 2/2" in log and "done: " in log
