"""Nothing is lost: killed while saving, killed while training, bits flipped, the disk full."""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from conftest import read_json
from test_training import TINY, assert_same_state, metrics, run_train

import checkpoint
import cli
import train


def train_in_a_child(images: Path, *flags) -> faults.Child:
    argv = [*TINY, "--data-path", str(images), "--results-dir", str(images.parent / "results"), "--resume", "auto"]
    argv += ["--global-batch-size", "8", "--log-every", "1", *map(str, flags)]

    def work():
        sys.argv = ["train.py", *argv]
        cli.run(train.main, train.get_parser())

    return faults.Child(work, images.parent / "output.txt")


def run_folder(images: Path) -> Path:
    """The newest: a run killed before its first checkpoint starts anew, in a folder of its own."""
    return max((images.parent / "results").iterdir())


def steps_logged(images: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in (images.parent / "results").glob("*/metrics.jsonl"))


def test_killed_while_saving_a_hundred_times(tmp_path):
    """A child saves as fast as it can, keeping two; whenever it dies, the newest checkpoint is whole and in order."""
    rng, folder = random.Random(0), tmp_path / "checkpoints"
    committed = tmp_path / "committed"
    died_in_the_middle = 0

    def save_for_ever():
        step = int(committed.read_text() or 0) if committed.exists() else 0
        while True:
            step += 1
            tensors = {"model": {"w": torch.full((20_000,), float(step))}}
            checkpoint.save(folder / f"{step:07d}", tensors, {"config": {}, "state": {"step": step}})
            committed.write_text(str(step))
            checkpoint.prune(folder, keep_last=2, keep_every=0)

    for _ in range(100):
        child = faults.Child(save_for_ever, tmp_path / "output.txt")
        time.sleep(rng.uniform(0.005, 0.06))
        child.kill()
        assert child.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
        if not committed.exists() or not committed.read_text():
            continue
        died_in_the_middle += any(folder.glob(".unfinished*"))
        newest = checkpoint.checkpoints_of(folder)[0]
        checkpoint.verify(newest)
        step = read_json(newest, "state")["step"]
        assert step >= int(committed.read_text())
        assert torch.equal(checkpoint.read_tensors(newest, "model")["w"], torch.full((20_000,), float(step)))
        checkpoint.sweep(folder)
        checkpoint.prune(folder, keep_last=2, keep_every=0)  # kills between saving and this leave one more each
        assert not list(folder.glob(".*")) and len(checkpoint.checkpoints_of(folder)) <= 2
    assert died_in_the_middle > 10, "the kills must hit the writing to mean anything"


def test_two_hundred_flipped_bits_are_all_noticed(images):
    run = run_train(images, steps=1)
    (folder,) = checkpoint.checkpoints_of(run)
    rng = random.Random(0)
    files = set()
    for _ in range(200):
        path, before = faults.flip_a_bit(folder, rng)
        files.add(path.name)
        with pytest.raises(checkpoint.DamagedCheckpoint, match=path.name):
            checkpoint.verify(folder)
        path.write_bytes(before)
    assert len(files) == 6
    checkpoint.verify(folder)


@pytest.mark.slow
def test_terminated_ten_times_ends_as_if_never(images):
    """SIGTERM at random moments: exit code 143 and no step lost; the curve is that of the uninterrupted run."""
    rng, flags = random.Random(0), ["--max-steps", 200, "--ckpt-every", 1000, "--accum_iter", 2, "--keep-last", 2]
    for _ in range(10):
        before = steps_logged(images)
        child = train_in_a_child(images, *flags)
        faults.wait_until(lambda before=before: steps_logged(images) > before)
        time.sleep(rng.uniform(0, 0.1))
        child.kill(signal.SIGTERM)
        assert child.wait() == 143, (images.parent / "output.txt").read_text()
        run = run_folder(images)
        newest = checkpoint.newest_good(run)
        assert read_json(newest, "state")["step"] == metrics(run)[-1]["step"] == steps_logged(images)
        assert len(checkpoint.checkpoints_of(run)) <= 2
    assert train_in_a_child(images, *flags).wait() == 0
    whole = run_train(images, "--accum_iter", 2, "--ckpt-every", 1000, steps=200, results="whole")
    assert metrics(run) == metrics(whole)
    assert_same_state(run, whole, step=200)


@pytest.mark.slow
def test_killed_while_training_ten_times_ends_as_if_never(images):
    rng, flags = random.Random(1), ["--max-steps", 120, "--ckpt-every", 2, "--keep-last", 2, "--keep-every", 40]
    for _ in range(10):
        child = train_in_a_child(images, *flags)
        before = steps_logged(images)
        faults.wait_until(lambda before=before: steps_logged(images) != before)
        time.sleep(rng.uniform(0, 0.15))
        child.kill()
        assert child.wait() in (-signal.SIGKILL, 0), (images.parent / "output.txt").read_text()
    assert train_in_a_child(images, *flags).wait() == 0
    run = run_folder(images)
    whole = run_train(images, "--ckpt-every", 120, steps=120, results="whole")
    assert metrics(run) == metrics(whole)
    assert_same_state(run, whole, step=120)
    kept = {int(folder.name) for folder in checkpoint.checkpoints_of(run)}
    assert kept == {40, 80, 118, 120} and not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_disk_full_in_the_middle(images):
    """The file that grows past the limit fails half-way: a warning, the old checkpoint stays, then room again."""
    child = train_in_a_child(images, "--max-steps", 100_000, "--ckpt-every", 20)
    faults.wait_until(lambda: steps_logged(images) > 45)
    run, log = run_folder(images), run_folder(images) / "log.txt"
    child.limit_file_size(1_500_000)  # the model's weights are 3 MB, the log is far smaller
    faults.wait_until(lambda: "WARNING: checkpoint" in log.read_text())
    good = checkpoint.newest_good(run)
    child.allow_any_file_size()
    faults.wait_until(lambda: checkpoint.newest_good(run) not in (good, None))
    child.limit_file_size(1_500_000)
    assert child.wait() == 1
    output = (images.parent / "output.txt").read_text()
    assert re.search(
        r"^train.py: stopped: could not write .*File too large.*; mend that and resume$", output, re.MULTILINE
    ), output
    assert log.read_text().count("WARNING: checkpoint") >= 4
    assert not list((run / "checkpoints").glob(".*"))
    step = read_json(checkpoint.newest_good(run), "state")["step"]
    run_train(images, "--resume", "auto", "--ckpt-every", 20, steps=step + 1)


@pytest.mark.slow
def test_resumes_exactly_with_four_workers(images):
    flags = ["--num-workers", 4, "--ckpt-every", 3]
    whole = run_train(images, *flags, steps=7, results="whole")
    run_train(images, *flags, steps=3)
    resumed = run_train(images, *flags, "--resume", "auto", steps=7)
    assert [line["loss"] for line in metrics(resumed)] == [line["loss"] for line in metrics(whole)]
    assert_same_state(resumed, whole, step=7)


def test_damage_is_named_on_the_command_line(images, monkeypatch, capsys):
    run = run_train(images, steps=2)
    (folder,) = checkpoint.checkpoints_of(run)
    (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:-8])
    for module, argv in (
        (train, [*TINY, "--data-path", str(images), "--global-batch-size", "8", "--resume", str(folder)]),
        (__import__("sample"), ["--ckpt", str(folder)]),
    ):
        monkeypatch.setattr("sys.argv", [module.__name__, *argv])
        with pytest.raises(SystemExit) as end:
            cli.run(module.main, module.get_parser())
        assert end.value.code == 2
        assert re.search(r"ema\.safetensors is damaged", capsys.readouterr().err)
    assert json.loads((folder / "config.json").read_text())["step"] == 2
