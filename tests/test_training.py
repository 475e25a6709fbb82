"""Training compared with itself: accumulated, distributed, resumed, in other precisions; and what a run leaves."""

import errno
import fcntl
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import torch
from conftest import Started, read_json, script, started_together
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

import checkpoint
import cli
import distributed
import runs
import train
import training
from compiling import choose_compile
from configuration import build_config
from diffusion import RectifiedFlow
from distributed import Processes
from models import build_model
from optim import EMA, lr_factor, parameter_groups
from routers import load_balancing_loss

TINY = ["--model", "DiT-Nano/2", "--num_experts", "4", "--vae-path", "none", "--image-size", "8", "--num-classes", "4"]
TINY += ["--rf", "--num-workers", "0", "--device", "cpu", "--lr", "1e-3", "--ema-decay", "0.9"]
TIMES = {"images_per_second", "data_wait_share", "peak_memory_gb"}
CPU = torch.device("cpu")


def run_train(images: Path, *flags, steps: int = 4, results: str = "results") -> Path:
    """Train in this process; returns the run folder."""
    results_dir = images.parent / results
    argv = [*TINY, "--data-path", str(images), "--results-dir", str(results_dir), "--max-steps", str(steps)]
    argv += ["--global-batch-size", "8", "--log-every", "1", *map(str, flags)]
    before = set(results_dir.glob("*")) if results_dir.exists() else set()
    train.main(train.get_parser().parse_args(argv))
    new = set(results_dir.glob("*")) - before
    return new.pop() if new else max(results_dir.glob("*"))


def refused(images: Path, capsys, *flags, steps: int = 4) -> str:
    """The one line that the command line answers, with exit code 2."""
    argv = [
        *TINY,
        "--data-path",
        str(images),
        "--results-dir",
        str(images.parent / "results"),
        "--max-steps",
        str(steps),
    ]
    argv += ["--global-batch-size", "8", *map(str, flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as end:
            cli.run(train.main, train.get_parser())
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: ")
    return line


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors(run: Path, stem: str, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:07d}" / f"{stem}.safetensors")


def assert_same_state(one: Path, other: Path, step: int = 4) -> None:
    for stem in ("model", "ema", "optimizer"):
        a, b = tensors(one, stem, step), tensors(other, stem, step)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ----------------------------------------------------------------------------------------------------- same curve again


def test_repeat_runs_and_workers_give_the_same_bits(images):
    runs = [run_train(images), run_train(images), run_train(images, "--num-workers", "2")]
    for other in runs[1:]:
        assert metrics(runs[0]) == metrics(other)
        assert_same_state(runs[0], other)
    assert metrics(run_train(images, "--global-seed", "1")) != metrics(runs[0])


@pytest.mark.parametrize("objective", [[], ["--rf", "False"]])
def test_accumulation_equals_the_big_batch(images, objective):
    """Without the balance loss, whose load is that of a micro-batch, the two are the same sum."""
    flags = ["--aux-loss-alpha", "0", "--grad-clip", "0.5", *objective]
    big, cut = run_train(images, *flags), run_train(images, *flags, "--accum_iter", "4")
    for a, b in zip(metrics(big), metrics(cut), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, weight in tensors(big, "model").items():
        torch.testing.assert_close(tensors(cut, "model")[name], weight, rtol=0, atol=2e-5)


def test_clipping_leaves_a_small_gradient_as_it_is(images):
    """Moments of AdamW tell: its updates do not depend on the gradient's scale."""
    free, bound = run_train(images), run_train(images, "--grad-clip", "1000")
    assert max(line["grad_norm"] for line in metrics(free)) < 100
    assert_same_state(free, bound)
    small = run_train(images, "--grad-clip", "0.01", steps=1)
    moments = [value for name, value in tensors(small, "optimizer", 1).items() if name.endswith(".exp_avg")]
    assert torch.nn.utils.get_total_norm(moments) == pytest.approx(0.01 * 0.1, rel=1e-3)  # 0.1 = 1 - beta1


def test_labels_are_dropped_as_often_as_the_flag_says():
    config = build_config("DiT-Nano/2", input_size=4, in_channels=3, num_classes=7, class_dropout_prob=0.1)
    args = SimpleNamespace(feature_path="latents", stratified_t=False)
    run = SimpleNamespace(
        args=args,
        config=config,
        condition=config.condition,
        data=None,  # labels are in the batch
        objective=RectifiedFlow(),
        processes=Processes(0, 0, 1, CPU),
    )
    drop_u = torch.arange(100) / 100
    batch = {"x": torch.zeros(100, 3, 4, 4), "noise": torch.zeros(100, 3, 4, 4), "u": drop_u, "drop_u": drop_u}
    _, labels = training.make_batch(run, batch | {"y": torch.arange(100) % 7}, torch.arange(100))
    assert labels[:10].tolist() == [7] * 10  # the null class
    assert labels[10:].tolist() == [i % 7 for i in range(10, 100)]


def test_accumulated_gradient_is_the_mean_over_micro_batches_balance_loss_included(images, monkeypatch):
    """Against plain autograd on the very same micro-batches."""
    seen = []
    forward = train.DDPEngine.forward

    def remember(self, x, t, y, *more):
        seen.append((x, t, y))
        return forward(self, x, t, y, *more)

    norms = []
    step = train.DDPEngine.step

    def keep_gradient(self, lr, finite):
        norms.append({name: p.grad.clone() for name, p in self.module.named_parameters()})
        return step(self, lr, finite)

    targets = []
    noised = RectifiedFlow.noised

    def remember_target(self, *arguments):
        targets.append(noised(self, *arguments).target)
        return noised(self, *arguments)

    monkeypatch.setattr(train.DDPEngine, "forward", remember)
    monkeypatch.setattr(train.DDPEngine, "step", keep_gradient)
    monkeypatch.setattr(RectifiedFlow, "noised", remember_target)
    first = run_train(images, steps=1)
    second = run_train(images, "--init-from", first, "--accum_iter", "2", "--aux-loss-alpha", "0.3", steps=1)

    weights = checkpoint.load_weights(first)
    model = build_model("DiT-Nano/2", input_size=8, in_channels=3, num_classes=4, num_experts=4)
    checkpoint.load_into(model, weights)
    loss = 0
    for (x, t, y), target in zip(seen[1:], targets[1:], strict=True):
        assert len(x) == 4
        out, routings = model(x, t, y, return_routing=True)
        micro = (out[:, :3] - target).square().mean() + 0.3 * load_balancing_loss(routings).sum()
        loss = loss + micro / 2
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(norms[1][name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert second.name.startswith("001-")


@pytest.mark.slow
def test_two_processes_equal_one(images):
    """Same samples, same noise, balance loss over the global batch: the curve does not depend on the processes."""
    flags = [*TINY, "--data-path", images, "--max-steps", 4, "--global-batch-size", 8, "--log-every", 1]
    flags += ["--aux-loss-alpha", "0.1", "--stratified-t", "--accum_iter", 2]
    script("train.py", *flags, "--results-dir", images.parent / "one")
    script("train.py", *flags, "--results-dir", images.parent / "two", processes=2)
    one, two = (next((images.parent / name).iterdir()) for name in ("one", "two"))
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in ("loss", "balance_loss", "load_cv", "load_max_over_mean", "router_entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, weight in tensors(one, "ema").items():
        torch.testing.assert_close(tensors(two, "ema")[name], weight, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("few_grid_steps")
def test_sharded_and_elastic(images):
    """DDP, FSDP and SDP on 1, 2 and 4 processes, resumed from each other's checkpoints in mid-epoch: one curve.

    Epochs have 5 steps; the checkpoints are of steps 4 and 8.
    """
    flags = [*TINY, "--data-path", images, "--global-batch-size", 8, "--log-every", 1, "--ckpt-every", 4]
    flags += ["--aux-loss-alpha", "0.1", "--accum_iter", 2, "--grad-clip", 1, "--weight-decay", "0.1"]
    flags += ["--mup", "--base-width", 16]

    def go(results: str, kind: str, processes: int, steps: int, *more) -> Path:
        results_dir = images.parent / results
        flags_now = [*flags, "--results-dir", results_dir, "--data-parallel", kind, "--max-steps", steps, *more]
        script("train.py", *flags_now, processes=processes)
        return max(results_dir.iterdir())

    whole = go("whole", "ddp", 1, 12)
    elastic = go("elastic", "fsdp", 2, 4)
    go("elastic", "sdp", 4, 8, "--resume", "auto", "--sample-every", 6)
    go("elastic", "ddp", 2, 9, "--resume", "auto", "--sample-every", 9)
    go("elastic", "fsdp", 2, 12, "--resume", "auto", "--sample-every", 12)
    for a, b in zip(metrics(whole), metrics(elastic), strict=True):
        for key in ("loss", "balance_loss", "load_cv"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert (elastic / "checkpoints" / "0000008" / "sharded").is_dir()
    assert not (elastic / "checkpoints" / "0000009" / "sharded").exists()
    for name, weight in tensors(whole, "ema", 12).items():
        torch.testing.assert_close(tensors(elastic, "ema", 12)[name], weight, rtol=0, atol=2e-5)
    assert (elastic / "samples" / "0000012.png").is_file()
    loaded = checkpoint.load_weights(elastic)
    assert loaded.source.name == "0000012" and loaded.record["objective"]["name"] == "rf"


def command_of(images: Path, *flags) -> list:
    place = ["--data-path", images, "--results-dir", images.parent / "results"]
    return ["train.py", *TINY, *place, "--global-batch-size", 8, "--log-every", 1, *flags]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(images):
    command = command_of(images, "--max-steps", 100_000, "--ckpt-every", 100_000)
    first, second = started_together(*command, processes=2, folder=images.parent)
    try:
        wait_for_step(images, 3)
        os.kill(second.pid, signal.SIGTERM)
        codes = [process.wait()[0] for process in (first, second)]
        assert codes == [143, 143], first.wait()
    finally:
        first.end()
        second.end()
    run = next((images.parent / "results").iterdir())
    (saved,) = checkpoint.checkpoints_of(run)
    checkpoint.verify(saved)
    assert int(saved.name) == metrics(run)[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_dead_process_ends_the_others(images, number):
    command = command_of(images, "--max-steps", 100_000, "--timeout", 6)
    first, second = started_together(*command, processes=2, folder=images.parent)
    try:
        wait_for_step(images, 3)
        os.kill(second.pid, number)
        code, _, errors = first.wait()
        assert code == 1, errors
        assert "train.py: stopped: lost another process" in errors and "Traceback" not in errors, errors
    finally:
        first.end()
        second.end()


@pytest.mark.slow
def test_sharded_half_precision_and_recomputation(images):
    """bf16 on two shards with activation checkpointing follows one process without; routers stay fp32."""
    flags = [*TINY, "--data-path", images, "--global-batch-size", 8, "--log-every", 1, "--max-steps", 5]
    flags += ["--precision", "bf16"]
    script("train.py", *flags, "--results-dir", images.parent / "one")
    more = ["--data-parallel", "fsdp", "--activation-checkpointing"]
    script("train.py", *flags, *more, "--results-dir", images.parent / "two", processes=2)
    one, two = (metrics(next((images.parent / name).iterdir())) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["router_entropy"] == pytest.approx(b["router_entropy"], rel=5e-3)


# ----------------------------------------------------------------------------------------------------------- init-from


def without(*names: str) -> list[str]:
    """TINY without some flags and their values."""
    flags = list(TINY)
    for name in names:
        place = flags.index(name)
        del flags[place : place + 2]
    return flags


def test_init_from_takes_the_architecture_of_the_file(images, monkeypatch):
    """Weights alone: step, optimizer and EMA begin anew; nothing about the model has to be said again."""
    first = run_train(images, "--moe-layers", "every-2", "--num_shared_experts", 1, steps=2)
    flags = without("--model", "--num_experts", "--num-classes")
    monkeypatch.setattr(sys.modules[__name__], "TINY", [*flags, "--init-from", str(first)])
    second = run_train(images, "--lr", 0, "--class-dropout-prob", 0.5, steps=1)
    assert second.name == "001-DiT-Nano-2-4E2A-rf"
    before, after = tensors(first, "ema", 2), tensors(second, "model", 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = read_json(second / "checkpoints" / "0000001", "config")["model"]
    assert config["moe_layers"] == "every-2" and config["class_dropout_prob"] == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_experts", "8"], "--num_experts 8 contradicts"),
        (["--model", "DiT-S/2"], "DiT-S/2 contradicts"),
        (["--class-dropout-prob", "0"], "which has a null class"),
    ],
)
def test_init_from_refuses_flags_that_contradict_the_file(images, capsys, flags, message):
    run = run_train(images, steps=1)
    assert message in refused(images, capsys, "--init-from", run, *flags)


def test_init_from_another_image_size(tmp_path):
    from conftest import write_images

    small = run_train(write_images(tmp_path / "small", size=8), steps=1)
    images = write_images(tmp_path / "large", size=16)
    run = run_train(images, "--image-size", 16, "--init-from", small, "--lr", 0, steps=1, results="large-results")
    before, after = tensors(small, "ema", 1), tensors(run, "model", 1)
    assert after["pos_embed"].shape == (1, 64, 64)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "pos_embed")


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("flags", [[], ["--rf", "False", "--precision", "fp16", "--accum_iter", "2"]])
def test_resumed_run_continues_to_the_bit(images, flags):
    """Stopped in the middle of an epoch (5 steps each), of a log window, and resumed by the same command."""
    flags = [*flags, "--log-every", 4, "--lr-schedule", "cosine", "--warmup-steps", 2, "--epochs", 2]
    whole = run_train(images, *flags, "--ckpt-every", "3", steps=99, results="whole")
    # The same run, had it been killed after step 7: what the uninterrupted one wrote up to then.
    resumed = images.parent / "results" / whole.name
    resumed.parent.mkdir()
    subprocess.run(["cp", "-r", whole, resumed], check=True)
    for step in ("0000009", "0000010"):
        subprocess.run(["rm", "-r", resumed / "checkpoints" / step], check=True)
    assert run_train(images, *flags, "--ckpt-every", "3", "--resume", "auto", steps=99) == resumed
    assert metrics(resumed) == metrics(whole)
    assert_same_state(resumed, whole, step=10)
    state = [read_json(run / "checkpoints" / "0000010", "state") for run in (resumed, whole)]
    assert state[0]["window"] == state[1]["window"] and state[0]["scaler"] == state[1]["scaler"]


def test_resume_auto_starts_anew_where_there_is_nothing(images, capsys):
    run = run_train(images, "--resume", "auto", steps=1)
    assert "starting anew" in capsys.readouterr().out
    assert run.name == "000-DiT-Nano-2-4E2A-rf"


def test_resume_falls_back_from_a_damaged_checkpoint(images, capsys):
    run = run_train(images, "--ckpt-every", "2")
    newest = run / "checkpoints" / "0000004"
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    run_train(images, "--resume", "auto", steps=5)
    assert re.search(r"skipping a damaged checkpoint: .*0000004/optimizer.safetensors", capsys.readouterr().err)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    assert (run / "checkpoints" / "0000005").is_dir()
    aside = newest.with_name("abandoned-0000004")  # the run went back behind it and will write its own
    assert not newest.exists() and "optimizer.safetensors is damaged" in refused(images, capsys, "--resume", aside)


def test_profile(images):
    run = run_train(images, "--profile", 2, steps=8)
    trace = json.loads((run / "profile" / "trace.json").read_text())
    steps = [event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")]
    assert sorted(set(steps)) == ["ProfilerStep#5", "ProfilerStep#6"]
    table = (run / "profile" / "kernels.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table


def test_going_back_sets_later_checkpoints_aside(images):
    """A run resumed from an older checkpoint neither loses what it writes nor picks up the abandoned way again."""
    run = run_train(images, "--ckpt-every", 1, steps=6)
    old = run / "checkpoints" / "0000002"
    run_train(images, "--resume", old, "--lr", "1e-5", "--allow-changes", "--keep-last", 2, "--ckpt-every", 1, steps=4)
    assert [int(path.name) for path in checkpoint.checkpoints_of(run)] == [4, 3]
    assert sorted(p.name for p in (run / "checkpoints").glob("abandoned-*")) == [
        f"abandoned-{s:07d}" for s in (3, 4, 5, 6)
    ]
    assert read_json(run / "checkpoints" / "0000004", "state")["flags"]["lr"] == 1e-5
    assert checkpoint.set_aside(run, 3) == [run / "checkpoints" / "abandoned-0000004-2"]  # the first one stays


def test_a_run_folder_belongs_to_one_process(images):
    run = run_train(images, steps=1)
    holder = faults.holder_of(run, images.parent / "holder.txt")
    try:
        with pytest.raises(cli.UsageError, match=f"another process trains in {run}"):
            run_train(images, "--resume", run, steps=2)
    finally:
        holder.kill()
        holder.wait()
    run_train(images, "--resume", run, steps=2)
    assert metrics(run)[-1]["step"] == 2


def test_disks_that_know_neither_locks_nor_flushing(images, monkeypatch, capsys):
    """As some of clusters: said once, and training goes on. A lock that is denied is another process's."""

    def answering(*numbers):
        answers = itertools.chain(numbers, itertools.repeat(numbers[-1]))

        def answer(*arguments):
            raise OSError(number := next(answers), os.strerror(number))

        return answer

    cli.warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "lockf", answering(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", answering(errno.EINVAL))
    run = run_train(images, "--ckpt-every", 1, steps=2)
    assert len(checkpoint.checkpoints_of(run)) == 2
    assert [line.partition(":")[2][:9] for line in capsys.readouterr().err.splitlines()] == [" no locks", " this dis"]
    for number in (errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "lockf", answering(number))
        distributed.claim(run, "held").close()
    for number in (errno.EACCES, errno.EAGAIN):
        monkeypatch.setattr(fcntl, "lockf", answering(number))
        with pytest.raises(cli.UsageError, match="held"):
            distributed.claim(run, "held")


@pytest.mark.parametrize("name", [".lock", "args.json"])
def test_a_run_folder_that_cannot_be_written_is_one_line(images, capsys, name):
    run = run_train(images, steps=1)
    (run / name).unlink()
    (run / name).mkdir()
    assert f"{run} cannot be written: " in refused(images, capsys, "--resume", run)


def test_resume_auto_looks_at_the_newest_run_alone(images, capsys):
    old = run_train(images, steps=2)
    (old.parent / "001-DiT-Nano-2-4E2A-rf").mkdir()
    run = run_train(images, "--resume", "auto", steps=1)
    assert run.name.startswith("002-") and "starting anew" in capsys.readouterr().out


def test_resume_compares_what_the_flags_lead_to(images, capsys):
    run = run_train(images, "--lr-schedule", "cosine", steps=2)
    assert "number of steps, which the learning rate follows, was 2, is 4" in refused(
        images, capsys, "--resume", run, "--lr-schedule", "cosine"
    )
    state = read_json(run / "checkpoints" / "0000002", "state")
    assert state["flags"]["precision"] == "fp32" and state["flags"]["qk_norm"] == "none"
    assert "--precision was fp32, is bf16" in refused(
        images, capsys, "--resume", run, "--lr-schedule", "cosine", "--precision", "bf16", steps=2
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global-batch-size", "4"], "--global_batch_size was 8, is 4"),
        (["--num_experts", "8"], "model num_experts was 4, is 8"),
        (["--rf", "False"], "objective name was rf, is ddpm"),
        (["--global-seed", "5"], "--global_seed was 0, is 5"),
    ],
)
def test_resume_refuses_what_would_bend_the_curve(images, capsys, flags, message):
    run = run_train(images, steps=1)
    assert message in refused(images, capsys, "--resume", run, *flags)


def test_resume_refuses_changed_data_unless_told(images, capsys):
    run = run_train(images, steps=1)
    (images / "class0" / "extra.png").write_bytes((images / "class0" / "000.png").read_bytes())
    assert "data fingerprint was" in refused(images, capsys, "--resume", run)
    run_train(images, "--resume", run, "--allow-changes", steps=2)
    assert (run / "checkpoints" / "0000002").is_dir()


def wait_for_step(images: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for path in (images.parent / "results").glob("*/metrics.jsonl"):
            if len(path.read_text().splitlines()) >= step:
                return
        time.sleep(0.05)
    raise AssertionError("training did not reach the step in time")


@pytest.mark.slow
def test_killed_run_restarts_with_the_same_command(images):
    command = command_of(images, "--max-steps", 40, "--ckpt-every", 2, "--resume", "auto")
    process = Started(*command, folder=images.parent)
    wait_for_step(images, 15)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    assert "resumed from" in script(*command).stdout
    killed = next((images.parent / "results").iterdir())
    whole = run_train(images, "--ckpt-every", "40", steps=40, results="whole")
    assert metrics(killed) == metrics(whole)
    assert_same_state(killed, whole, step=40)
    assert not list((killed / "checkpoints").glob(".unfinished*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_last_step(images, number, code):
    """Sent to the whole process group, as terminals and schedulers do: the workers go on until the step is done."""
    flags = ["--max-steps", 100_000, "--ckpt-every", 100_000, "--num-workers", 2, "--accum_iter", 8]
    process = Started(*command_of(images, *flags), folder=images.parent)
    wait_for_step(images, 5)
    os.killpg(process.pid, number)
    ended, output, errors = process.wait()
    assert ended == code and "stopped by a signal after step" in output + errors
    run = next((images.parent / "results").iterdir())
    (saved,) = checkpoint.checkpoints_of(run)
    checkpoint.verify(saved)
    assert metrics(run)[-1]["step"] == read_json(saved, "state")["step"] == int(saved.name)


# ------------------------------------------------------------------------------------------------------ precision, NaN


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_precisions_follow_the_fp32_curve(images, precision):
    exact, rounded = metrics(run_train(images)), metrics(run_train(images, "--precision", precision))
    for a, b in zip(exact, rounded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert a["balance_loss"] == pytest.approx(b["balance_loss"], rel=2e-2)
    assert ("loss_scale" in rounded[0]) == (precision == "fp16")


def test_fp16_scaler_recovers_from_overflow(images, monkeypatch):
    """A scale far too large: the first steps overflow and are skipped but are no failures; then training goes on."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**40, **k))
    lines = metrics(run_train(images, "--precision", "fp16", "--rf", "False", steps=30))
    assert 6 < lines[-1]["skipped_steps"] < 25
    assert lines[-1]["loss_scale"] < 2.0**34 and math.isfinite(lines[-1]["grad_norm"])


def poison(monkeypatch, bad_steps, spoil=torch.mul) -> None:
    """`spoil(loss, NaN)` in the third sample of the batch at the given 0-based steps."""
    loss, calls = RectifiedFlow.loss, []

    def poisoned(self, output, batch):
        terms = loss(self, output, batch)
        if len(calls) in bad_steps:
            neutral = 1.0 if spoil is torch.mul else 0.0
            terms["loss"] = spoil(terms["loss"], torch.where(torch.arange(len(output)) == 2, torch.nan, neutral))
        calls.append(1)
        return terms

    monkeypatch.setattr(RectifiedFlow, "loss", poisoned)


@pytest.mark.parametrize("spoil", [torch.mul, torch.add])
def test_a_loss_that_is_not_finite_skips_the_update(images, monkeypatch, spoil):
    """With a gradient that is not finite either, or (NaN added) with one that is."""
    poison(monkeypatch, {1}, spoil)
    run = run_train(images, "--ckpt-every", 1, steps=3)
    a, b, c = (tensors(run, "model", step) for step in (1, 2, 3))
    averages = [tensors(run, "ema", step) for step in (1, 2)]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in a)
    assert not all(torch.equal(b[name], c[name]) for name in b)
    assert metrics(run)[-1]["skipped_steps"] == 1
    assert "step 2: loss not finite, update skipped (1 so far)" in (run / "log.txt").read_text()


def test_losses_that_stay_bad_stop_the_run_and_name_the_sample(images, monkeypatch):
    poison(monkeypatch, set(range(2, 99)))
    with pytest.raises(
        cli.RunStopped, match=r"not finite in 5 steps in a row, the last at step 7.*\(1 of 8\)"
    ) as error:
        run_train(images, steps=20)
    name = re.search(r"such a loss: (\S+) ", str(error.value))[1]
    assert Path(name).is_file() and images in Path(name).parents


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_run_folder(images):
    run = run_train(images, "--sample-every", "2", "--stratified-t", "--compile", "False")
    assert run.name == "000-DiT-Nano-2-4E2A-rf"
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and "tensorboard" not in str(p)} - {".lock"}
    files = ("config.json", "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors")
    assert names == {
        *("args.json", "log.txt", "metrics.jsonl", "samples/0000002.png", "samples/0000004.png"),
        *(f"checkpoints/0000004/{name}" for name in (*files, "state.json")),
    }
    assert list((run / "tensorboard").glob("events*"))
    line = metrics(run)[-1]
    assert {"step", "loss", "mse", "balance_loss", "grad_norm", "lr", "skipped_steps"} < line.keys()
    for key in ("load_max_over_mean", "load_cv", "router_entropy"):
        assert len(line[key]) == 3
    config = read_json(run / "checkpoints" / "0000004", "config")
    assert config["objective"]["name"] == "rf" and config["model"]["num_experts"] == 4
    assert config["space"]["path"] == "none" and config["image_size"] == 8 and config["step"] == 4
    assert json.loads((run / "args.json").read_text())["lr"] == 1e-3
    assert run_train(images, steps=1).name == "001-DiT-Nano-2-4E2A-rf"
    assert run_train(images, "--num_experts", "0", "--rf", "False", steps=1).name == "002-DiT-Nano-2-ddpm"


def test_dense_model_logs_no_experts(images):
    line = metrics(run_train(images, "--num_experts", "0", "--diffusion-loss", "mse", "--rf", "False", steps=1))[0]
    assert "balance_loss" not in line and "load_cv" not in line and "vb" not in line


def test_ema_averages_from_the_first_step(images):
    run = run_train(images, "--ckpt-every", "1")
    with torch.device("meta"):
        start = build_model("DiT-Nano/2", input_size=8, in_channels=3, num_classes=4, num_experts=4)
    torch.manual_seed(0)
    start.materialize(torch.device("cpu"))
    start = start.state_dict()
    average = {name: weight.double() for name, weight in start.items()}
    for step in range(1, 5):
        weights = tensors(run, "model", step)
        average = {name: 0.9 * average[name] + 0.1 * weights[name].double() for name in average}
    for name, weight in tensors(run, "ema").items():
        torch.testing.assert_close(weight.double(), average[name], rtol=1e-5, atol=1e-7)


def test_balance_loss_evens_the_load(images):
    """What the loss is for: with it, training ends more evenly loaded than without."""
    flags = ["--lr", "3e-3", "--num_experts", "8"]
    uneven = metrics(run_train(images, *flags, "--aux-loss-alpha", "0", steps=60))[-1]
    even = metrics(run_train(images, *flags, "--aux-loss-alpha", "0.1", steps=60))[-1]
    assert sum(even["load_cv"]) < 0.7 * sum(uneven["load_cv"])


def test_unreadable_images_are_named_and_replaced(tmp_path):
    from conftest import write_images

    images = write_images(tmp_path / "images", per_class=40)
    bad = images / "class1" / "003.png"
    bad.write_bytes(bad.read_bytes()[:40])
    run = run_train(images, "--epochs", 1, steps=99)
    assert (run / "log.txt").read_text().count(f"unreadable image, replaced by its successor: {bad}") == 1
    assert all(math.isfinite(line["loss"]) for line in metrics(run))


@pytest.mark.slow
def test_unreadable_images_of_any_process_are_named_and_counted(tmp_path):
    from conftest import write_images

    images = write_images(tmp_path / "images", per_class=40)
    bad = sorted(images.rglob("*.png"))[::53]  # 4 of 160
    for path in bad:
        path.write_bytes(b"")
    flags = [
        *TINY,
        "--data-path",
        images,
        "--global-batch-size",
        8,
        "--epochs",
        1,
        "--results-dir",
        tmp_path / "results",
    ]
    result = script("train.py", *flags, processes=2, check=None)
    assert result.returncode == 1
    stopped = r"train\.py: stopped: [234] of 160 images \(.*limit 1\.0%\) cannot be read"
    assert re.search(stopped, result.stderr)  # said by the first process to end; the launcher may end the other
    (log,) = (tmp_path / "results").glob("*/log.txt")
    assert re.search(r"stopped: .* cannot be read, among them .*\.png", log.read_text())


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space and resume"), (errno.EIO, "mend that and resume")]
)
def test_a_bad_disk_costs_a_warning_and_then_the_run(images, monkeypatch, number, advice):
    save, calls = checkpoint.save, []

    def full_from_the_second(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", full_from_the_second)
    with pytest.raises(cli.RunStopped, match=rf"could not write .*0000004.*{os.strerror(number)}; {advice}"):
        run_train(images, "--ckpt-every", "1", steps=9)
    run = next((images.parent / "results").iterdir())
    assert (run / "log.txt").read_text().count("WARNING: checkpoint") == 3
    assert [p.name for p in checkpoint.checkpoints_of(run)] == ["0000001"]


# ---------------------------------------------------------------------------------------------------------------- parts


def test_learning_rate_schedules():
    assert [lr_factor(s, "constant", 4, 10) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor(s, "linear", 0, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert lr_factor(5, "cosine", 0, 10) == pytest.approx(0.5)
    assert lr_factor(2, "cosine", 2, 10) == 1.0 and lr_factor(10, "cosine", 2, 10) == pytest.approx(0.0)


def test_weight_decay_spares_biases_norms_and_tables():
    model = build_model("DiT-Nano/2", num_experts=4, qk_norm=True)
    decayed, spared = parameter_groups(model, 1e-4, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert "y_embedder.embedding_table.weight" in spared_names and "blocks.0.attn.q_norm.weight" in spared_names
    assert all(name.endswith(("bias", "norm.weight", "table.weight")) for name in spared_names)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    assert len(parameter_groups(model, 1e-4, 0.0)) == 1


def test_ema_swaps_in_and_out():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(model)
    with ema.swapped_into(model):
        torch.testing.assert_close(model.weight.detach(), start + 0.5)
    torch.testing.assert_close(model.weight.detach(), start + 1)
    torch.testing.assert_close(ema.average["weight"], start + 0.5)


def test_saved_progress_is_a_copy():
    """It is written by a thread while the next steps go on."""
    progress = training.Progress(window=training.Window(1, 2), unreadable={3})
    progress.window.add({"loss": 1.0}, torch.tensor([[1.0, 2.0]]))
    state = progress.state()
    before = json.dumps(state)
    progress.window.add({"loss": 1.0}, torch.tensor([[1.0, 2.0]]))
    progress.unreadable.add(4)
    assert json.dumps(state) == before


def test_first_slurm_node():
    from distributed import _first_node

    assert _first_node("gpu[03-05,9],cpu1") == "gpu03" and _first_node("a-1,a-2") == "a-1" and _first_node("n7") == "n7"


def test_precision_of_accelerate_launch_is_used(monkeypatch):
    cpu = torch.device("cpu")
    assert runs.choose_precision(None, cpu) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert runs.choose_precision(None, cpu) == "fp16" and runs.choose_precision("bf16", cpu) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert runs.choose_precision(None, cpu) == "fp32"


def test_processes_of_one_need_no_process_group():
    alone = Processes(0, 0, 1, torch.device("cpu"))
    assert alone.from_main(3) == 3 and alone.gather("x") == ["x"] and alone.sum(torch.ones(2)).tolist() == [1.0, 1.0]


def test_selective_checkpointing_needs_whole_blocks():
    """FSDP's own work within a block would not be the same the second time."""
    args = SimpleNamespace(activation_checkpointing="selective", data_parallel="sdp")
    run = SimpleNamespace(args=args, processes=SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(cli.UsageError, match="selective does not go with --data-parallel sdp.*use full"):
        train.FSDPEngine(run)


def test_experts_that_an_old_pytorch_cannot_trace_are_refused(monkeypatch):
    sparse, dense = build_config("DiT-Nano/2", num_experts=4), build_config("DiT-Nano/2")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(cli.UsageError, match="experts in float16 needs PyTorch 2.15 or newer, this is 2.11.0"):
        choose_compile(True, sparse, CPU, torch.float16)
    assert choose_compile(True, sparse, CPU, torch.bfloat16) and choose_compile(True, dense, CPU, torch.float32)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.15.0"))
    assert choose_compile(True, sparse, CPU, torch.float32)


def test_blocks_are_compiled_unasked_where_it_pays():
    sparse, pooled = (build_config("DiT-Nano/2", num_experts=4, router=r) for r in ("softmax", "batch-pool"))
    gpu = torch.device("cuda")
    assert choose_compile("auto", sparse, gpu, torch.bfloat16) is True
    others = (sparse, CPU, torch.bfloat16), (sparse, gpu, torch.float16), (pooled, gpu, torch.bfloat16)
    assert not any(choose_compile("auto", *other) for other in others)
    assert choose_compile(False, sparse, gpu, torch.bfloat16) is False


@pytest.mark.parametrize("name", [b"caf\xe9.png", "caf\u00e9.png".encode()])
def test_an_unreadable_image_may_have_any_name(images, name):
    """A name that is not UTF-8 is logged, by its bytes."""
    with open(os.path.join(os.fsencode(images), b"class1", name), "wb") as file:
        file.write(b"no image")
    run = run_train(images, "--epochs", 1, steps=99)
    logged = (run / "log.txt").read_text(encoding="utf-8")
    assert "unreadable image, replaced by its successor" in logged and "caf" in logged
