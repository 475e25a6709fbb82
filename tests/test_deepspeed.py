"""train_deepspeed.py against train.py, and what it saves; two gloo processes, forked, stand for the GPUs."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, import_deepspeed, import_for_children, read_json, script
from faults import Child
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import cli
import train
import train_deepspeed
import training

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install -r requirements.txt)"
)

TINY = ["--model", "DiT-Nano/2", "--num_experts", "4", "--vae-path", "none", "--image-size", "8", "--num-classes", "4"]
TINY += ["--rf", "--num-workers", "0", "--device", "cpu", "--lr", "1e-3", "--ema-decay", "0.9", "--log-every", "1"]
BATCH = ["--global-batch-size", "8"]
HARD = ["--accum_iter", 2, "--grad-clip", 0.5, "--weight-decay", 0.1, "--aux-loss-alpha", 0.3]
TIMES = {"images_per_second", "data_wait_share", "peak_memory_gb"}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Once, before any fork: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        import_deepspeed()
        import_for_children()
        yield


def zero(stage) -> Path:
    return ROOT / "config" / f"zero{stage}.json"


def go(
    images: Path, *flags, module=train_deepspeed, processes: int = 2, results: str = "results", code: int = 0
) -> Path:
    """Train in forked processes; returns the newest run folder."""
    argv = [*TINY, *BATCH, "--data-path", images, "--results-dir", images.parent / results, *flags]
    args = module.get_parser().parse_args(list(map(str, argv)))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def work(rank: int):
        def live():
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            try:
                module.main(args)
            except cli.UsageError as error:
                print(f"error: {error}")
                raise SystemExit(2) from None
            except cli.RunStopped as error:
                print(f"stopped: {error}")
                raise SystemExit(1) from None

        return live

    logs = [images.parent / f"process{rank}.log" for rank in range(processes)]
    for log in logs:
        log.unlink(missing_ok=True)
    children = [Child(work(rank), log) for rank, log in enumerate(logs)]
    codes = [child.wait() for child in children]
    assert codes == [code] * processes, "\n".join(log.read_text()[-4000:] for log in logs)
    return max((images.parent / results).glob("*/"), default=None)


def zero_go(images: Path, stage, *flags, **options) -> Path:
    return go(images, "--deepspeed_config", zero(stage), *flags, **options)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors(run: Path, stem: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:07d}" / f"{stem}.safetensors")


def assert_same_curve(one: Path, other: Path, rel: float = 1e-5) -> None:
    """Norms of gradients are compared ten times less strictly."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert (a["loss"], a["balance_loss"]) == pytest.approx((b["loss"], b["balance_loss"]), rel=rel)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * rel)


def assert_close_weights(one: Path, other: Path, step: int, atol: float = 2e-6) -> None:
    for stem in ("model", "ema"):
        a, b = tensors(one, stem, step), tensors(other, stem, step)
        assert a.keys() == b.keys()
        for name in a:
            # Of a bias of keys the gradient is zero but for rounding, which Adam makes a step of.
            allowed = 10 * atol if name.endswith("attn.qkv.bias") else atol
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=allowed)


def cut_back(run: Path, step: int, to: Path) -> Path:
    """A copy of the run without that checkpoint: as if it had been killed before."""
    to.mkdir()
    subprocess.run(["cp", "-r", run, to], check=True)
    subprocess.run(["rm", "-r", to / run.name / "checkpoints" / f"{step:07d}"], check=True)
    return to / run.name


# ------------------------------------------------------------------------------------------------------------ the curve


@pytest.mark.slow
@pytest.mark.usefixtures("few_grid_steps")
def test_every_stage_follows_ddp_and_resumes(images):
    """fp32, with accumulation, clipping, decay and a strong balance loss: curve, weights, EMA and sample grid.

    Then 2 and 3 resume from step 2 of 4: to the bit on as many processes, on another number within rounding.
    """
    flags = [*HARD, "--precision", "fp32", "--max-steps", 4, "--mup", "--base-width", 16]
    more = {stage: ["--ckpt-every", 2] for stage in (1, 2, 3, "3_offload")}
    more[2] = more[3] = ["--ckpt-every", 2, "--sample-every", 4]
    ddp = go(images, *flags, *more[2], module=train, results="ddp")
    runs = {stage: zero_go(images, stage, *flags, *more[stage], results=f"zero{stage}") for stage in more}
    for run in runs.values():
        assert_same_curve(ddp, run)
        assert_close_weights(ddp, run, 4)
        saved = run / "checkpoints" / "0000004"
        checkpoint.verify(saved)
        names = read_json(saved, "manifest")["files"]
        assert sum(name.startswith("deepspeed/") for name in names) >= 3
    for stage, processes in ((2, 4), (3, 1)):
        run = runs[stage]
        grids = [np.asarray(Image.open(r / "samples" / "0000004.png"), dtype=int) for r in (ddp, run)]
        assert abs(grids[0] - grids[1]).max() <= 1

        again = cut_back(run, 4, images.parent / f"again{stage}")
        assert zero_go(images, stage, *flags, "--resume", "auto", results=f"again{stage}") == again
        assert metrics(again) == metrics(run)
        assert_close_weights(again, run, 4, atol=0)

        elastic = cut_back(run, 4, images.parent / f"elastic{stage}")
        zero_go(images, stage, *flags, "--resume", "auto", results=f"elastic{stage}", processes=processes)
        assert_same_curve(run, elastic)
        assert_close_weights(run, elastic, 4)
        assert not list((elastic / "checkpoints").glob(".unfinished*"))


FP16 = pytest.param(
    *(2, "fp16"),
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="DeepSpeed takes no fp16 on a CPU without it"
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "bf16"), FP16])
def test_half_precision(images, stage, precision):
    """Follows fp32, balance loss and accumulation included, keeps fp32 weights and averages those, resumes exactly."""
    flags = [*HARD, "--max-steps", 3, "--ckpt-every", 1]
    exact = go(images, *flags, "--precision", "fp32", module=train, processes=1, results="exact")
    half = ["--precision", precision] if precision != "bf16" else []  # the default
    run = zero_go(images, stage, *flags, *half)
    assert_same_curve(exact, run, rel=5e-3)
    assert (metrics(run)[0].get("loss_scale") == 65536) == (precision == "fp16")

    average = tensors(run, "ema", 1)
    for step in (2, 3):
        weights = tensors(run, "model", step)
        average = {name: 0.9 * value + 0.1 * weights[name] for name, value in average.items()}
    for name, value in tensors(run, "ema", 3).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, average[name], rtol=0, atol=1e-6)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    weight = weights["blocks.0.attn.qkv.weight"]
    assert not torch.equal(weight, weight.to(dtype).float())

    if (stage, precision) in ((1, "bf16"), (2, "fp16")):
        again = cut_back(run, 3, images.parent / "again")
        zero_go(images, stage, *flags, *half, "--resume", "auto", results="again")
        assert metrics(again) == metrics(run)
        assert_close_weights(run, again, 3, atol=0)


def test_accumulation_equals_the_big_batch(images):
    flags = ["--aux-loss-alpha", 0, "--grad-clip", 0.5, "--precision", "fp32", "--max-steps", 3]
    big = zero_go(images, 2, *flags, processes=1, results="big")
    cut = zero_go(images, 2, *flags, "--accum_iter", 4, processes=1, results="cut")
    for a, b in zip(metrics(big), metrics(cut), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert_close_weights(big, cut, 3, atol=2e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_clipping_leaves_a_small_gradient_as_it_is(images, stage):
    flags = ["--precision", "fp32", "--max-steps", 2]
    free = zero_go(images, stage, *flags, processes=1, results="free")
    bound = zero_go(images, stage, *flags, "--grad-clip", 1000, processes=1, results="bound")
    assert max(line["grad_norm"] for line in metrics(free)) < 100
    assert_close_weights(free, bound, 2, atol=0)


def test_starts_from_exact_weights_and_gives_them_to_sample_py(images):
    """--init-from is not rounded to bf16 on its way into the fp32 weights; sample.py needs no flag for the model."""
    first = zero_go(images, 2, "--max-steps", 1, processes=1)
    second = zero_go(images, 3, "--max-steps", 1, "--init-from", first, "--lr", 0, processes=1)
    assert second.name.startswith("001-")
    for name, value in tensors(first, "ema", 1).items():
        assert torch.equal(tensors(second, "model", 1)[name], value)
    out = images.parent / "drawn"
    script("sample.py", "--ckpt", second, "--device", "cpu", "--num-sampling-steps", 2, "--output", out)
    assert (out / "grid.png").is_file()


# -------------------------------------------------------------------------------------------------------- when it fails


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), FP16, (3, "fp32")])
def test_update_is_skipped_when_the_loss_is_not_finite(images, monkeypatch, stage, precision):
    """Even where its gradient would be finite, as here, where inf is added to it."""
    steps = iter(range(100))
    total_loss = training.total_loss

    def spoilt(*arguments):
        loss, values, counts = total_loss(*arguments)
        if next(steps) == 1:
            loss, values = loss + torch.inf, {name: value + torch.inf for name, value in values.items()}
        return loss, values, counts

    monkeypatch.setattr(training, "total_loss", spoilt)
    run = zero_go(images, stage, "--precision", precision, "--max-steps", 3, "--ckpt-every", 1, processes=1)
    assert [line["skipped_steps"] for line in metrics(run)] == [0, 1, 1]
    for stem in ("model", "ema"):
        first, second, third = (tensors(run, stem, step) for step in (1, 2, 3))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in second)
    assert all(value.isfinite().all() for value in third.values())


@pytest.mark.slow
def test_a_full_disk_on_one_process_costs_a_checkpoint_and_no_more(images, monkeypatch):
    write = Path.write_bytes

    def fail(self, data):
        if os.environ.get("RANK") == "1" and "-0000001" in str(self):
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    run = zero_go(images, 2, "--precision", "fp32", "--max-steps", 2, "--ckpt-every", 1)
    assert [path.name for path in checkpoint.checkpoints_of(run)] == ["0000002"]
    assert "0000001 not written ([Errno 28] No space left on device)" in (run / "log.txt").read_text()


# ----------------------------------------------------------------------------------------------------------- as started


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [("torch.distributed.launch", 2), ("deepspeed", 1)])
def test_published_commands(images, launcher, processes):
    """Batch of one GPU, `--rf True`, a relative config, and whatever the launcher adds."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    start = {
        "torch.distributed.launch": [
            "-m",
            launcher,
            "--nnodes=1",
            f"--nproc_per_node={processes}",
            f"--master_port={port}",
        ],
        "deepspeed": ["-m", "deepspeed.launcher.runner", f"--num_gpus={processes}", f"--master_port={port}"],
    }[launcher]
    command = [sys.executable, *start, "train_deepspeed.py", "--deepspeed_config", "config/zero2.json"]
    command += ["--model", "DiT-Nano/2", "--rf", "True", "--num_experts", "4", "--num_experts_per_tok", "2"]
    command += ["--data-path", images, "--vae-path", "none", "--train_batch_size", "4"]
    command += ["--image-size", "8", "--num-classes", "4", "--num-workers", "0", "--device", "cpu"]
    command += ["--max-steps", "1", "--results-dir", images.parent / "results"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = f"rf, batch {4 * processes} = {processes} processes x 1 micro-batches, bf16 on cpu"
    assert expected in result.stdout


def refused(images: Path, capsys, config: str | dict, *flags) -> str:
    """The one line that the command line answers, with exit code 2, to a configuration file."""
    path = images.parent / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps({"zero_optimization": {"stage": 2}} | config))
    argv = [*TINY, "--data-path", images, "--results-dir", images.parent / "results", "--deepspeed_config", path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_deepspeed.py", *map(str, [*argv, *flags])])
        with pytest.raises(SystemExit) as end:
            cli.run(train_deepspeed.main, train_deepspeed.get_parser())
    assert end.value.code == 2
    assert not (images.parent / "results").exists()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train_deepspeed.py: error: ")
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 2},}', "is not strict JSON: .*line 1 column"),
        ('{"zero_optimization": {"stage": 2}} // two', "is not strict JSON: Extra data"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "'stage' is given twice"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": NaN}', "NaN is not a JSON number"),
        ("{}", "zero_optimization.stage of 1, 2 or 3; without sharding use train.py"),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization.stage of 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "nvme is not supported"),
        ("[2]", "zero_optimization.stage"),
    ],
)
def test_configuration_is_strict(images, capsys, text, message):
    assert re.search(message, refused(images, capsys, text))


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({"train_batch_size": 64}, ["--global-batch-size", 8], "train_batch_size 64, --global-batch-size says 8"),
        ({"train_batch_size": 64}, ["--train_batch_size", 8], "train_batch_size 64, --global-batch-size says 8"),
        ({"gradient_accumulation_steps": 2}, BATCH, "gradient_accumulation_steps 2, --accum_iter says 1"),
        ({"gradient_clipping": 1.0}, [*BATCH, "--grad-clip", 2], "gradient_clipping 1.0, --grad-clip says 2.0"),
        ({"fp16": {"enabled": True}}, BATCH, "fp16.enabled true, --precision bf16, that is, says false"),
        ({"bf16": {"enabled": False}}, BATCH, "bf16.enabled false, --precision bf16"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, BATCH, "optimizer.params.lr 0.1, --lr says 0.001"),
        ({"optimizer": {"type": "Lion"}}, BATCH, "optimizer.type Lion"),
        ({"scheduler": {"type": "WarmupLR"}}, BATCH, "has a scheduler; delete it, --lr-schedule"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, BATCH, 'reduce_bucket_size "auto"'),
        ({}, ["--train_batch_size", 8, "--global-batch-size", 16], "--train_batch_size 8 on each of 1 processes"),
        ({"zero_optimization": {"stage": 3}}, [*BATCH, "--compile"], "--compile does not go with ZeRO-3"),
    ],
)
def test_contradictions_name_both_sides(images, capsys, config, flags, message):
    assert message in refused(images, capsys, config, *flags)


def test_agreeing_numbers_and_auto_are_accepted(images):
    config = {"zero_optimization": {"stage": 2}, "train_batch_size": 8, "gradient_clipping": "auto"}
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999]}}, "bf16": {"enabled": True}}
    (images.parent / "ds.json").write_text(json.dumps(config))
    go(images, "--deepspeed_config", images.parent / "ds.json", "--max-steps", 1, processes=1)


def test_checkpoints_of_others_are_refused(images):
    def answer(*flags) -> str:
        go(images, *flags, "--max-steps", 2, results="other", processes=1, code=2)
        return (images.parent / "process0.log").read_text()

    ddp = go(images, "--precision", "bf16", "--max-steps", 1, module=train, processes=1, results="ddp")
    assert "was not written by train_deepspeed.py" in answer("--resume", ddp)
    two = zero_go(images, 2, "--max-steps", 1, processes=1, results="two")
    assert "is of ZeRO stage 2, --deepspeed_config has stage 3" in answer(
        "--resume", two, "--deepspeed_config", zero(3)
    )
    assert "holds DeepSpeed's state in bf16, --precision is fp32; resume in bf16" in answer(
        "--resume", two, "--precision", "fp32", "--allow-changes"
    )


def test_absent_package_is_one_line(images, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "train_deepspeed.py needs DeepSpeed" in refused(images, capsys, {}, *BATCH)


def test_selective_checkpointing_does_not_go_with_zero3():
    """DeepSpeed adds biases in place, to the very results that selective checkpointing keeps."""
    args = SimpleNamespace(activation_checkpointing="selective", compile=False)
    run = SimpleNamespace(args=args, processes=SimpleNamespace(device=torch.device("cpu"), world_size=1))
    with pytest.raises(cli.UsageError, match="selective does not go with ZeRO-3"):
        train_deepspeed.ZeroEngine(run, {"zero_optimization": {"stage": 3}})
