"""The scripts as a user runs them: help, wrong input, launchers."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, launched, script

import runs
from cli import Parser, boolean, run

SCRIPTS = (
    "train.py",
    "train_deepspeed.py",
    "sample.py",
    "sample_ddp.py",
    "extract_features.py",
    "weights.py",
    "upcycle.py",
)
GOOD = ["--model", "DiT-Nano/2", "--vae-path", "none", "--image-size", "8", "--num-classes", "4", "--device", "cpu"]
GOOD += ["--num-workers", "0", "--global-batch-size", "8", "--max-steps", "1"]


def parser() -> Parser:
    p = Parser(prog="x")
    p.add_argument("--global-batch-size", type=int)
    p.add_argument("--num_experts", type=int)
    p.add_switch(p, "--rf", False, "flow")
    return p


def test_dashes_and_underscores_are_the_same():
    args = parser().parse_args(["--global_batch_size", "3", "--num-experts=4", "--rf"])
    assert (args.global_batch_size, args.num_experts, args.rf) == (3, 4, True)


def test_activation_checkpointing_may_be_named_or_not(capsys):
    p = Parser(prog="x")
    runs.add_training_arguments(p)
    given = {(): "full", ("selective",): "selective", ("yes",): "full", ("False",): "none"}
    for value, meant in given.items():
        assert p.parse_args(["--activation-checkpointing", *value]).activation_checkpointing == meant
    assert p.parse_args([]).activation_checkpointing == "none"
    with pytest.raises(SystemExit):
        p.parse_args(["--activation-checkpointing", "half"])
    assert "expected none, selective, full, True or False, got 'half'" in capsys.readouterr().err


def test_switches_mean_what_they_say():
    assert [parser().parse_args(a).rf for a in ([], ["--rf"], ["--rf", "True"], ["--rf", "False"])] == [
        *(False, True, True, False)
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        boolean("maybe")
    with pytest.raises(SystemExit):
        parser().parse_args(["--glob", "3"])  # no abbreviations


def test_other_errors_keep_their_traceback(monkeypatch):
    def defect(args):
        raise ValueError("ours")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ValueError, match="ours"):
        run(defect, parser())


HELP = """
import os, runpy, sys
import torch  # all that each of them may share with the others

folder, heavy = sys.argv[1], sys.argv[2].split()
for name in sys.argv[3:]:
    if os.fork() == 0:
        sys.stdout = open(os.path.join(folder, name), "w")
        sys.argv = [name, "--help"]
        try:
            runpy.run_path(name, run_name="__main__")
        finally:
            print("heavy:", *[module for module in heavy if module in sys.modules])
        break
    elif os.wait()[1]:
        sys.exit(f"{name} --help failed")
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory) -> Path:
    """A folder with what each script says to --help, in a process that has imported nothing but PyTorch before."""
    heavy = "diffusers torchvision tensorboard matplotlib sklearn accelerate deepspeed"
    folder = tmp_path_factory.mktemp("helps")
    subprocess.run([sys.executable, "-c", HELP, folder, heavy, *SCRIPTS], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_grouped_and_imports_nothing_heavy(name, helps):
    said = (helps / name).read_text()
    assert said.rstrip().endswith("heavy:")
    groups = re.findall(r"^[a-z][^\n]*:$", said, re.MULTILINE)
    assert len(groups) >= (2 if name == "weights.py" else 4), groups
    assert max(map(len, said.splitlines())) <= 120
    assert said.startswith("usage: ")


def check_refused(result, message):
    """Exit code 2 and one line (argparse puts its usage before it), no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(train|sample)\.py: error: ", line) and re.search(message, line), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "DiT-Nano/3"], "unknown model 'DiT-Nano/3'; did you mean DiT-Nano/2"),
        (["--image-size", "9"], "9x9 cannot be cut into patches of 2"),
        (["--accum_iter", "3"], "global batch size 8 is not divisible by 1 processes x 3"),
        (["--num_experts", "2", "--num_experts_per_tok", "3"], "between 1 and num_experts 2, got 3"),
        (["--data-path", "nowhere"], "nowhere"),
        (["--num-classes", "3"], "the data has 4 classes, --num-classes allows 3"),
        (["--vae-path", "./nowhere"], "nowhere"),
        (["--resume", "nowhere"], "nowhere: no such folder"),
        (["--resume", "LICENSE"], "--init-from"),
        (["--init-from", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--feature-path", "x"], "either --data-path .* or --feature-path"),
        (["--global-batch-size", "64"], "40 samples, fewer than one global batch of 64"),
        (["--attention", "fast"], "invalid choice: 'fast'"),
        (["--rf", "perhaps"], "expected True or False, got 'perhaps'"),
        (["--max-steps", "0"], "at least 1, got '0'"),
        (["--results-dir", "LICENSE"], "--results-dir LICENSE cannot be written"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
        (["--attention", "flash-attn"], "pip install flash-attn"),
        (["--lr", "-1"], "--lr.*-1"),
        (["--ema-decay", "1.5"], "--ema-decay.*1.5"),
        (["--num-workers", "-1"], "--num-workers.*-1"),
    ],
)
def test_wrong_training_flags_get_one_line(images, flags, message, capsys, monkeypatch):
    """In this process, which spares each case its imports; the shape of the output is the subprocess's own."""
    import train

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *GOOD, "--data-path", str(images), "--results-dir",
                                      str(images.parent / "results"), *flags])  # fmt: skip
    import torch

    if flags[:2] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as exit:
        run(train.main, train.get_parser())
    assert exit.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: ") and re.search(message, line), line
    assert not (images.parent / "results").exists(), "wrong input must leave nothing behind"


def test_wrong_input_ends_the_process_with_code_2(images, tmp_path):
    check_refused(launched("sample.py", "--ckpt", tmp_path / "no.pt", check=None), "no.pt does not exist")
    check_refused(script("train.py", *GOOD, "--data-path", tmp_path / "no", check=None), "no")
    check_refused(script("sample.py", check=None), "--ckpt")


@pytest.mark.slow
def test_wrong_input_is_said_once_by_many_processes(images, tmp_path):
    result = launched("train.py", *GOOD, "--data-path", images, "--accum_iter", 3, processes=2, check=None)
    assert result.returncode != 0 and result.stderr.count("train.py: error:") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "says"),
    [
        (
            ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=29561"],
            "2 processes x 1 micro-batches, fp32",
        ),
        (
            ["-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"],
            "1 processes x 1 micro-batches, bf16",
        ),
        (
            ["-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "fp16"],
            "1 processes x 1 micro-batches, fp16",
        ),
    ],
)
def test_launchers_of_the_published_commands(images, launcher, says):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *GOOD, "--data-path", str(images)]
    command += ["--results-dir", str(images.parent / "results"), "--num_experts", "8", "--num_experts_per_tok", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (images.parent / "results" / "000-DiT-Nano-2-8E2A-ddpm" / "log.txt").read_text()
    assert says in log and "done: at step 1" in log
