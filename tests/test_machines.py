"""Faults of several machines: disks that are not shared, disks that are full, processes that disagree."""

import errno
import json
import os
import re
import resource
import subprocess
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
from conftest import import_deepspeed, script
from test_training import TINY, metrics
from torch.distributed.checkpoint import filesystem

import checkpoint
import cli
import distributed
import runs
import train_deepspeed

COMMON = [*TINY, "--global-batch-size", 8, "--log-every", 1, "--precision", "fp32"]
TRAINERS = {
    "sdp": ["train.py", "--data-parallel", "sdp"],
    "fsdp": ["train.py", "--data-parallel", "fsdp"],
    "ZeRO-1": ["train_deepspeed.py", "--deepspeed_config", "{root}/zero1.json"],
    "ZeRO-3": ["train_deepspeed.py", "--deepspeed_config", "{root}/zero3.json"],
}
several_trainers = pytest.mark.parametrize("trainer", ["sdp", "ZeRO-1"])


def command(trainer: str, images: Path, *flags) -> list:
    name, *own = TRAINERS[trainer]
    if name == "train_deepspeed.py":
        import_deepspeed()
    config = Path(__file__).parent.parent / "config"
    return [name, *(part.format(root=config) for part in own), *COMMON, "--data-path", images, *flags]


def last_line(result: subprocess.CompletedProcess) -> str:
    """Of the errors, which has to be the only one."""
    (line,) = [line for line in result.stderr.splitlines() if ": error: " in line or ": stopped: " in line]
    assert "Traceback" not in result.stderr
    return line


# ------------------------------------------------------------------------------------------------------- separate disks


@pytest.mark.slow
@several_trainers
def test_shards_on_disks_that_are_not_shared_are_refused_before_the_first_step(images, monkeypatch, trainer):
    monkeypatch.setattr(distributed, "SEEN_WITHIN", 0.5)
    disks = [images.parent / "disk0", images.parent / "disk1"]
    for disk in disks:
        disk.mkdir()
    flags = ["--max-steps", 1, "--results-dir", "results"]
    result = script(*command(trainer, images, *flags), cwd=disks, processes=2, check=1)
    assert re.search(r"results/000-\S+ is not the same folder on all machines: \S+ cannot see", last_line(result))
    assert not list(disks[0].rglob("*.jsonl")) and not list(disks[0].rglob(".probe*"))


@pytest.mark.slow
def test_replicas_need_no_shared_disk_until_they_resume(images):
    disks = [images.parent / "disk0", images.parent / "disk1"]
    for disk in disks:
        disk.mkdir()
    flags = ["--max-steps", 1, "--results-dir", "results"]
    script("train.py", *COMMON, "--data-path", images, *flags, cwd=disks, processes=2)
    flags = ["--max-steps", 2, "--results-dir", "results", "--resume", "auto"]
    result = script("train.py", *COMMON, "--data-path", images, *flags, cwd=disks, processes=2, check=1)
    assert re.search(r"process 1 on \S+ has in \S+/manifest.json the SHA-256 \(no such file\)", last_line(result))


def test_a_part_that_another_process_wrote_elsewhere_is_missed(tmp_path):
    beside = checkpoint.begin(tmp_path / "0000001")
    (beside / "mine").write_bytes(b"here")
    with pytest.raises(FileNotFoundError, match=r"do all machines share this disk.*theirs"):
        checkpoint.commit(beside, tmp_path / "0000001", {}, {}, ["mine", "theirs"])
    checkpoint.commit(beside, tmp_path / "0000001", {}, {}, ["mine"])
    checkpoint.verify(tmp_path / "0000001")


# ----------------------------------------------------------------------------------------------------------- full disks


def fail_on_the_second_process(function, step: int):
    """`function`, which writes something of the checkpoint of that step, finds the disk full there."""

    def full(*arguments, **options):
        if os.environ.get("RANK") == "1" and any(f"-{step:07d}" in str(argument) for argument in arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **options)

    return full


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sdp", "ZeRO-3"])
def test_a_disk_full_on_one_process_costs_a_checkpoint_and_no_more(images, monkeypatch, trainer):
    monkeypatch.setattr(Path, "write_bytes", fail_on_the_second_process(Path.write_bytes, 1))  # by ZeRO
    opened = filesystem.FileSystem.create_stream
    monkeypatch.setattr(filesystem.FileSystem, "create_stream", fail_on_the_second_process(opened, 1))  # by DCP
    flags = ["--max-steps", 2, "--ckpt-every", 1, "--results-dir", images.parent / "results"]
    script(*command(trainer, images, *flags), processes=2)
    (run,) = (images.parent / "results").iterdir()
    assert [path.name for path in checkpoint.checkpoints_of(run)] == ["0000002"]
    assert "0000001 not written ([Errno 28] No space left on device)" in (run / "log.txt").read_text()
    assert not list((run / "checkpoints").glob(".*"))


def test_a_full_disk_of_logs_ends_no_run(tmp_path):
    """Neither the log, nor the metrics, nor TensorBoard's thread, nor an output that goes to that disk."""

    def work():
        log = distributed.Logger(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # for every file of this process
        for step in range(1000):
            log.metrics(step, {"loss": 1.0, "router_entropy": [1.0] * 10})
        log.image(1000, "samples", np.zeros((64, 64, 3), dtype=np.uint8))
        for step in range(100):
            log.info(f"step {step}")
        log.close()

    child = faults.Child(work, tmp_path / "output.txt")
    assert child.wait() == 0
    output = (tmp_path / "output.txt").read_text()
    for name in ("metrics.jsonl", "tensorboard"):
        assert f"{name} cannot be written (File too large); the run goes on without" in output
    assert (tmp_path / "log.txt").stat().st_size <= 2000


# ---------------------------------------------------------------------------------------------- processes that disagree


def on_the_second_process(monkeypatch, change) -> None:
    """`change(args)` there, before anything is prepared."""
    prepare = runs.prepare

    def changed(args, processes):
        if processes.rank == 1:
            change(args)
        return prepare(args, processes)

    monkeypatch.setattr(runs, "prepare", changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.5, r"process 1 on \S+ has --lr 0.5, process 0 on \S+ has 0.001; all must be started with the same"),
        ("start_timeout", 7.0, r"process 1 on \S+ has --start-timeout 7.0, process 0 on \S+ has 1800"),
        ("data_path", "other", r"process 1 on \S+ has data fingerprint \w+, process 0 on \S+ has \w+;"),
    ],
)
def test_processes_that_disagree_are_told_by_the_first_difference(images, monkeypatch, name, value, message):
    if name == "data_path":  # as many images, of other contents and names
        value = images.parent / "other"
        subprocess.run(["cp", "-r", images, value], check=True)
        (value / "class0" / "000.png").rename(value / "class0" / "0000.png")
    on_the_second_process(monkeypatch, lambda args: setattr(args, name, value))
    flags = ["--max-steps", 1, "--results-dir", images.parent / "results"]
    result = script("train.py", *COMMON, "--data-path", images, *flags, processes=2, check=1)
    assert re.search(message, last_line(result))
    assert not (images.parent / "results").exists()


def test_other_packages_and_paths(images, monkeypatch):
    """Packages have to be the same, the place of the data need not be."""
    monkeypatch.setattr(runs, "versions", lambda: {"torch": f"2.{os.environ['RANK']}"})
    flags = ["--max-steps", 1, "--results-dir", images.parent / "results"]
    result = script("train.py", *COMMON, "--data-path", images, *flags, processes=2, check=1)
    assert re.search(r"has the version of torch 2.1, process 0 on \S+ has 2.0", last_line(result))
    monkeypatch.undo()
    copy = images.parent / "copy"
    subprocess.run(["cp", "-r", images, copy], check=True)
    on_the_second_process(monkeypatch, lambda args: setattr(args, "data_path", copy))
    script("train.py", *COMMON, "--data-path", images, *flags, processes=2)


# ------------------------------------------------------------------------------------------------- other ways to resume


def test_resuming_fp32_in_fp16(images):
    flags = ["--results-dir", images.parent / "results", "--resume", "auto"]
    script("train.py", *COMMON, "--data-path", images, *flags, "--max-steps", 1)
    flags += ["--allow-changes", "--precision", "fp16", "--max-steps", 3]
    script("train.py", *COMMON, "--data-path", images, *flags)
    (run,) = (images.parent / "results").iterdir()
    assert [line["step"] for line in metrics(run)] == [1, 2, 3] and metrics(run)[-1]["loss_scale"] > 1


@pytest.mark.slow
def test_a_zero_state_that_cannot_be_converted_ends_every_process(images, monkeypatch):
    pytest.importorskip("deepspeed")
    flags = ["--results-dir", images.parent / "results", "--resume", "auto"]
    script(*command("ZeRO-1", images, *flags, "--max-steps", 1))
    failed = SimpleNamespace(returncode=1, stderr="MemoryError: no more")
    monkeypatch.setattr(train_deepspeed.subprocess, "run", lambda *_, **__: failed)
    result = script(*command("ZeRO-1", images, *flags, "--max-steps", 2), processes=2, check=1)
    assert re.search(r"stopped: could not convert \S+0000001: MemoryError: no more", last_line(result))
    assert not list((images.parent / "results").rglob(".unfinished*"))


def test_a_batch_of_each_process_does_not_hide_the_flag_of_all():
    """Even where that says what is its default."""
    for flags in (["--global-batch-size", "256"], ["--global_batch_size=256"]):
        args = train_deepspeed.get_parser().parse_args(["--train_batch_size", "32", *flags])
        with pytest.raises(cli.UsageError, match="a batch of 64, --global-batch-size says 256"):
            train_deepspeed.set_global_batch_size(args, 2)
    args = train_deepspeed.get_parser().parse_args(["--train_batch_size", "32"])
    train_deepspeed.set_global_batch_size(args, 2)
    assert args.global_batch_size == 64 and json.dumps(cli.values(args), default=str)
