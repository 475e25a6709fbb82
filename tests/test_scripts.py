"""The shell scripts, with fakes in place of whatever is slow or needs the network, and the digits."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import conftest
import numpy as np
import pytest
from PIL import Image

import calculate_metrics
import sample
import train
import train_deepspeed
from cli import UsageError
from scripts import digits

ROOT = Path(__file__).resolve().parent.parent
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
RECIPES = {  # script: model, experts, engine, recomputes activations
    "train_S_2_8E2A.sh": ("DiT-S/2", 8, "ddp", False),
    "train_S_2_16E2A.sh": ("DiT-S/2", 16, "ddp", False),
    "train_B_2_8E2A.sh": ("DiT-B/2", 8, "ddp", False),
    "train_L_2_8E2A.sh": ("DiT-L/2", 8, "sdp", True),
    "train_XL_2_8E2A.sh": ("DiT-XL/2", 8, "fsdp", True),
    "train_G_2_16E2A.sh": ("DiT-G/2", 16, "fsdp", True),
}


DIT_MUP = "train_DiT_muP.sh"
OF_TEXTS = {"train_T2I_MoE.sh": "sdp", "train_Large_DiT_T2I_3B.sh": "fsdp"}
PIXART = "train_PixArt_muP.sh"
LARGE_DIT = {"train_Large_DiT_600M.sh": "ddp", "train_Large_DiT_3B.sh": "fsdp", "train_Large_DiT_7B.sh": "fsdp"}


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def bash(script: Path, *args: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run a script with `variables` and little else in its environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    return subprocess.run(
        ["bash", str(script), *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def flags(command: list[str]) -> dict[str, str]:
    """Flag -> the value that argparse would keep: the last one."""
    pairs = zip(command, [*command[1:], "--"], strict=True)
    return {name: "" if value.startswith("--") else value for name, value in pairs if name.startswith("--")}


def accepted_by(script, command: list[str]) -> None:
    """The flags of a command that runs `script` are flags that it knows."""
    start = [Path(word).name for word in command].index(f"{script.__name__}.py")
    script.get_parser().parse_args(command[start + 1 :])


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------- training scripts


@pytest.fixture
def torchrun(tmp_path):
    """Call a script with a torchrun and a python that only note their arguments; returns them."""
    note = tmp_path / "arguments"
    for program in ("torchrun", "python"):
        write_program(tmp_path / "bin" / program, f'printf "%s\\n" "$@" > {note}')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def call(script: str, *args: str, **variables: str) -> list[str]:
        result = bash(ROOT / "scripts" / script, *args, cwd=tmp_path, PATH=path, **variables)
        assert result.returncode == 0, result.stderr
        return note.read_text().splitlines()

    call.path = path
    return call


def test_every_published_size_has_a_script():
    assert {path.name for path in (ROOT / "scripts").glob("train_*.sh")} == {
        *(*RECIPES, *LARGE_DIT, *OF_TEXTS, DIT_MUP, PIXART)
    }


@pytest.mark.parametrize("script", OF_TEXTS)
def test_training_from_texts(script, torchrun):
    command = torchrun(script, DATA_PATH="/images", TEXT_ENCODER="/my/encoder")
    accepted_by(train, command)
    given = flags(command)
    assert given.get("--text-encoder", given.get("--lm")) == "/my/encoder" and "--num-classes" not in given
    assert given["--data-path"] == "/images" and given["--data-parallel"] == OF_TEXTS[script]
    given = flags(torchrun("train_T2I_MoE.sh", FEATURE_PATH="/features"))
    assert given["--feature-path"] == "/features" and not {"--data-path", "--text-encoder"} & given.keys()


def test_training_pixart(torchrun, tmp_path):
    published = {"--precision": "fp16", "--weight-decay": "0.03", "--adam-eps": "1e-10", "--grad-clip": "0.01"}
    published |= {"--warmup-steps": "1000", "--rf": "False", "--vae-path": "ema", "--ema-decay": "0.9999"}
    wide = {"--model": "PixArt-muP-16h/2", "--loglr": "-10", "--epochs": "30", "--global-batch-size": "5632"}
    narrow = {"--model": "PixArt-muP-4h/2", "--loglr": "-12", "--epochs": "5", "--global-batch-size": "1408"}
    for what, expected in (("target", wide), ("search", narrow), ("standard", {"--model": "PixArt-XL/2"})):
        command = torchrun(PIXART, what, DATA_PATH="/SA1B", LOGLRS="-12")
        accepted_by(train, command)
        assert (published | expected).items() <= flags(command).items() and "--num-classes" not in flags(command)
    assert bash(ROOT / "scripts" / PIXART, "sweep", DATA_PATH="/images").returncode == 2


@pytest.mark.parametrize("script", LARGE_DIT)
def test_training_large_dit(script, torchrun):
    command = torchrun(script, "--num_experts", "8", DATA_PATH="/images")
    accepted_by(train, command)
    size = script.removeprefix("train_Large_DiT_").removesuffix(".sh")
    expected = {
        **{"--model": f"Large-DiT-{size}/2", "--data-parallel": LARGE_DIT[script], "--rf": "False", "--qk-norm": ""},
        **{"--global-batch-size": "512", "--vae-path": "ema", "--grad-clip": "2", "--max-steps": "3000000"},
        "--num_experts": "8",
    }
    assert expected.items() <= flags(command).items()
    assert flags(torchrun(script, DATA_PATH="/images", OBJECTIVE="rf", VAE_PATH="/vae"))["--vae-path"] == "/vae"


def test_training_dit_mup(torchrun, tmp_path):
    command = torchrun(DIT_MUP, "target", "--num_experts", "8", DATA_PATH="/images")
    accepted_by(train, command)
    expected = {"--num_heads": "16", "--loglr": "-10", "--epochs": "480", "--mup": "", "--global-batch-size": "256"}
    results = str(ROOT / "results" / "DiT_muP-ddpm" / "h16-loglr-10")
    assert (expected | {"--num_experts": "8", "--results-dir": results, "--rf": "False"}).items() <= flags(
        command
    ).items()

    variables = {"DATA_PATH": "/images", "HEADS": "2 4", "LOGLRS": "-11 -9", "RESULTS_DIR": str(tmp_path / "runs")}
    command = torchrun(DIT_MUP, "search", **variables)
    accepted_by(train, command)
    last = {"--num_heads": "4", "--loglr": "-9", "--epochs": "40", "--results-dir": f"{tmp_path}/runs/h4-loglr-9"}
    assert last.items() <= flags(command).items()
    for name, loss in (("h2-loglr-11", "0.2"), ("h4-loglr-9", "0.1")):
        (tmp_path / "runs" / name / "000-x").mkdir(parents=True)
        (tmp_path / "runs" / name / "000-x" / "log.txt").write_text(
            f"step 1/9  loss 0.5\nstep 9/9  loss {loss}  more\n"
        )
    said = bash(ROOT / "scripts" / DIT_MUP, "search", cwd=tmp_path, PATH=torchrun.path, **variables).stdout
    assert "h2-loglr-11 step 9/9  loss 0.2\nh4-loglr-9 step 9/9  loss 0.1\n" in said
    assert bash(ROOT / "scripts" / DIT_MUP, "sweep", DATA_PATH="/images").returncode == 2


@pytest.mark.parametrize("script", [*RECIPES, *LARGE_DIT])
def test_training_without_data_says_so(script):
    result = bash(ROOT / "scripts" / script)
    assert result.returncode != 0 and "DATA_PATH: set it to the folder of training images" in result.stderr


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
@pytest.mark.parametrize("script", RECIPES)
def test_training_command(script, objective, torchrun):
    model, experts, engine, recompute = RECIPES[script]
    command = torchrun(script, "--lr", "3e-4", "--init-from", "two words", DATA_PATH="/my images", OBJECTIVE=objective)
    accepted_by(train, command)
    given = flags(command)
    assert ("--activation-checkpointing" in given) == recompute
    expected = {
        "--model": model,
        "--num_experts": str(experts),
        "--num_experts_per_tok": "2",
        "--data-parallel": engine,
        "--rf": {"rf": "True", "ddpm": "False"}[objective],
        "--data-path": "/my images",
        "--global-batch-size": "1024",
        "--ema-decay": "0.9999",
        "--weight-decay": "0",
        "--resume": "auto",
        "--lr": "3e-4",  # what the user adds wins
        "--init-from": "two words",
        "--standalone": "",
    }
    assert expected.items() <= given.items()
    size = script.removeprefix("train_").removesuffix(".sh")
    assert given["--results-dir"] == str(ROOT / "results" / f"{size}-{objective}")
    assert "--vae-path" not in given


def test_training_with_deepspeed(torchrun):
    command = torchrun("train_L_2_8E2A.sh", DATA_PATH="/images", ENGINE="zero2")
    accepted_by(train_deepspeed, command)
    given = flags(command)
    assert given["--deepspeed_config"] == str(ROOT / "config" / "zero2.json")
    assert given["--global-batch-size"] == "1024" and "--data-parallel" not in given


def test_training_variables(torchrun):
    given = flags(
        torchrun(
            "train_S_2_8E2A.sh",
            DATA_PATH="/images",
            VAE_PATH="/my vae",
            RESULTS_DIR="/results",
            GLOBAL_BATCH_SIZE="256",
            NPROC_PER_NODE="4",
            NNODES="2",
            NODE_RANK="1",
            MASTER_ADDR="10.0.0.1",
            MASTER_PORT="1234",
        )
    )
    expected = {
        "--vae-path": "/my vae",
        "--results-dir": "/results",
        "--global-batch-size": "256",
        "--nproc-per-node": "4",
        "--nnodes": "2",
        "--node-rank": "1",
        "--master-addr": "10.0.0.1",
        "--master-port": "1234",
    }
    assert expected.items() <= given.items() and "--standalone" not in given


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"OBJECTIVE": "flow"}, "OBJECTIVE must be rf or ddpm, got 'flow'"),
        ({"ENGINE": "fast"}, "ENGINE must be ddp, sdp, fsdp or zero1, zero2, zero3, zero3_offload, got 'fast'"),
        ({"NNODES": "2"}, "NODE_RANK: set it"),
    ],
)
def test_training_refuses_wrong_variables(variables, message):
    result = bash(ROOT / "scripts" / "train_S_2_8E2A.sh", DATA_PATH="/images", **variables)
    assert result.returncode != 0 and message in result.stderr


def test_sampling_command(torchrun):
    result = bash(ROOT / "scripts" / "sample.sh")
    assert result.returncode != 0 and "CKPT: set it" in result.stderr

    command = torchrun("sample.sh", "--seed", "3", CKPT="my run")
    given = flags(command)
    accepted_by(sample, command)
    assert {"--ckpt": "my run", "--cfg-scale": "1.5", "--seed": "3"}.items() <= given.items()
    assert "--rf" not in given  # the checkpoint knows
    assert flags(torchrun("sample.sh", CKPT="x.pt", OBJECTIVE="ddpm"))["--rf"] == "False"


# --------------------------------------------------------------------------------------------------------------- set-up

FAKE_PYTHON = r"""
case "$1 $2" in
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip") echo "$@" >> "$NOTES" && exit "${PIP_EXIT:-0}" ;;
  "--version ") echo "Python 3.11.0" ;;
  "-c "*) exit "${VERSION_EXIT:-0}" ;;
esac"""


class Checkout:
    """A copy of what setup.sh needs, with a Python that installs nothing but notes each call of pip."""

    def __init__(self, folder: Path):
        self.folder, self.notes = folder / "a checkout", folder / "notes"
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", self.folder / "scripts")
        (self.folder / "requirements.txt").write_text("one==1\n")
        write_program(folder / "bin" / "python3", FAKE_PYTHON)
        for tool in ("bash", "dirname", "cmp", "cp", "rm", "mkdir"):  # nothing else: no other Python is found
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        self.variables = {"PATH": str(folder / "bin"), "NOTES": str(self.notes)}

    def setup(self, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
        script = self.folder / "scripts" / "setup.sh"
        return bash(script, cwd=cwd or self.folder, **(self.variables | variables))

    @property
    def installs(self) -> int:
        return len(self.notes.read_text().splitlines()) if self.notes.exists() else 0


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_setup_installs_once(checkout):
    first = checkout.setup(cwd=checkout.folder.parent)
    assert first.returncode == 0, first.stderr
    assert "some minutes" in first.stdout and checkout.installs == 1
    assert "pip install" in checkout.notes.read_text() and "requirements.txt" in checkout.notes.read_text()

    second = checkout.setup()
    assert (second.returncode, second.stdout, checkout.installs) == (0, "", 1)


def test_setup_follows_changed_requirements(checkout):
    checkout.setup()
    (checkout.folder / "requirements.txt").write_text("one==2\n")
    assert checkout.setup().returncode == 0 and checkout.installs == 2
    assert checkout.setup().stdout == "" and checkout.installs == 2


def test_failed_install_is_repeated(checkout):
    assert checkout.setup(PIP_EXIT="1").returncode != 0
    assert not (checkout.folder / ".venv" / "requirements.installed").exists()
    assert checkout.setup().returncode == 0 and checkout.installs == 2


def test_setup_repairs_a_half_made_environment(checkout):
    packages = checkout.folder / ".venv" / "lib" / "python3.11" / "site-packages"
    whole, cut = packages / "whole-1.dist-info", packages / "cut-1.dist-info"
    for package in (whole, cut):
        package.mkdir(parents=True)
    (whole / "RECORD").touch()
    assert checkout.setup().returncode == 0 and checkout.installs == 1
    assert whole.exists() and not cut.exists()


def test_setup_without_python_says_what_to_do(checkout):
    result = checkout.setup(VERSION_EXIT="1")
    assert result.returncode != 0 and "no Python 3.11 or newer" in result.stderr and "PYTHON=" in result.stderr
    assert not (checkout.folder / ".venv").exists()


def test_stages_of_quickstart_and_test(checkout):
    """Both scripts hand the right commands to the environment's Python, from whichever folder they are called."""
    for script in ("quickstart.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / script, checkout.folder / "scripts")
    checkout.setup()
    write_program(
        checkout.folder / ".venv" / "bin" / "python",
        '[[ $1 == -c ]] && exit; echo "$OMP_NUM_THREADS $@" >> "$NOTES"; mkdir -p results/quickstart/000-DiT-Nano-2-rf',
    )
    folder, path = checkout.folder / "scripts", os.environ["PATH"]

    checkout.notes.unlink()
    result = bash(folder / "quickstart.sh", cwd=folder, PATH=path, NOTES=str(checkout.notes), STEPS="7")
    assert result.returncode == 0, result.stderr
    commands = [line.split()[1:] for line in checkout.notes.read_text().splitlines()]
    programs = [" ".join(command[:3] if command[0] == "-m" else command[:1]) for command in commands]
    digits_tool = "-m scripts.digits"
    expected = [f"{digits_tool} write", "train.py", "sample.py", f"{digits_tool} curve", "calculate_metrics.py"]
    assert programs == expected
    assert {"--model": "DiT-Nano/2", "--max-steps": "7"}.items() <= flags(commands[1]).items()
    for script, command in zip([train, sample, calculate_metrics], [*commands[1:3], commands[4]], strict=True):
        accepted_by(script, command)
    run = "results/quickstart/000-DiT-Nano-2-rf"
    assert flags(commands[2])["--ckpt"] == run and f"{run}/samples/grid.png" in result.stdout

    checkout.notes.unlink()
    result = bash(folder / "test.sh", "-k", "two words", cwd=folder, PATH=path, NOTES=str(checkout.notes))
    assert result.returncode == 0, result.stderr
    assert checkout.notes.read_text().splitlines() == [
        "1 -m ruff check .",
        "1 -m ruff format --check .",
        "1 -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 -k two words",
    ]


# --------------------------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def halves():
    return digits.split_digits()


def test_split_is_disjoint_complete_and_stratified(halves):
    training, held_out = halves
    assert sorted([*training.indices, *held_out.indices]) == list(range(1797))
    assert len(training.labels) == digits.TRAINING_DIGITS
    assert np.abs(np.bincount(training.labels) - np.bincount(held_out.labels)).max() <= 1
    assert training.images.dtype == np.uint8 and training.images.min() == 0 and training.images.max() == 255


def write(folder: Path) -> None:
    digits.write(digits.get_parser().parse_args(["write", str(folder)]))


@pytest.mark.parametrize("half, name", [(0, "train"), (1, "held-out")])
def test_written_digits_are_the_halves(tmp_path, halves, half, name):
    write(tmp_path)
    paths = sorted((tmp_path / name).glob("*/*.png"), key=lambda path: path.stem)
    assert [int(path.stem) for path in paths] == halves[half].indices.tolist()
    assert [int(path.parent.name) for path in paths] == halves[half].labels.tolist()
    images = [np.array(Image.open(path)) for path in paths]
    np.testing.assert_array_equal(np.stack(images), halves[half].images)


def test_writing_again_changes_nothing(tmp_path, capsys):
    write(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    write(tmp_path)
    assert capsys.readouterr().out.count("digits are there already") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_writing_after_an_interruption_and_over_foreign_files(tmp_path, halves):
    cut = tmp_path / "train.unfinished" / "0"
    cut.mkdir(parents=True)
    (cut / "0000.png").write_bytes(b"cut off")
    target = tmp_path / "train"
    assert digits.write_digits(halves[0], target) and not digits.write_digits(halves[0], target)
    (target / "0" / "cat.png").touch()
    with pytest.raises(UsageError, match="holds 898 files"):
        digits.write_digits(halves[0], target)


def test_curve(tmp_path, capsys):
    rows = [{"step": step, "loss": 1 / step, "load_max_over_mean": [1.5, 1.25]} for step in range(1, 101)]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, '{"step": 50, "fid": 3.0}', '{"step": 101, "lo']))
    digits.curve(digits.get_parser().parse_args(["curve", str(path)]))
    printed = capsys.readouterr().out
    assert "0.2929 -> 0.0105" in printed and "steps 1 to 100" in printed and "1.50 1.25" in printed
    assert Image.open(tmp_path / "curve.png").size == (960, 720)


def test_curve_of_a_dense_run_and_of_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "load_max_over_mean": []}\n')
    rows = digits.read_metrics(path)
    digits.draw_curve(rows, tmp_path / "curve.png")
    assert "load" not in digits.summarise(rows)
    path.write_text("")
    with pytest.raises(UsageError, match="no training step yet"):
        digits.read_metrics(path)


def test_sparkline():
    assert digits.sparkline([0.0, 1.0, 2.0, 3.5, 7.0]) == "▁▂▃▅█"  # 3.5 of 7 rounds to the even step
    assert digits.sparkline([2.0, 2.0]) == "▁▁"
    assert len(digits.sparkline(list(range(1000)))) == 60
    assert digits.sparkline([1.0, float("nan")]) == "(some values are not finite)"


@pytest.mark.slow
def test_quickstart_reaches_its_goal(tmp_path):
    """The real thing: at least 99 % of the samples are the digit asked for."""
    if not (ROOT / ".venv" / "requirements.installed").is_file():
        pytest.skip("no .venv here: bash scripts/test.sh makes it")
    variables = {"RESULTS": str(tmp_path / "goal"), "DATA": str(tmp_path / "digits"), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh")]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "goal" / "000-DiT-Nano-2-4E2A-rf"
    results = json.loads((run / "metrics.json").read_text())
    assert results["samples"]["count"] == 1000 and results["metrics"]["accuracy"] >= 0.99
    assert f"{results['metrics']['accuracy']:.4f}" in result.stdout
    assert (run / "samples" / "grid.png").is_file()


@pytest.mark.slow
def test_quickstart_repeats_itself(tmp_path):
    """Two calls print the same numbers; their commands are forked here, which spares them their imports."""
    run = "000-DiT-Nano-2-4E2A-rf"
    write_program(tmp_path / "python", f'printf "%s\\n" "$@" "" >> "$NOTES"; mkdir -p "$RESULTS/{run}"')

    def quickstart(name: str) -> str:
        results, notes = tmp_path / name, tmp_path / f"{name}.notes"
        variables = {"RESULTS": str(results), "DATA": str(tmp_path / "digits"), "NOTES": str(notes)}
        variables |= {"QUICKSTART_PYTHON": str(tmp_path / "python"), "STEPS": "20", "SAMPLES": "100"}
        assert bash(ROOT / "scripts" / "quickstart.sh", **variables).returncode == 0
        (results / run).rmdir()  # training makes it
        printed = ""
        for command in notes.read_text().strip().split("\n\n"):
            command = command.replace("-m\nscripts.digits", "scripts/digits.py").split("\n")
            printed += conftest.script(*command).stdout
        speed = r"[\d.]+ img/s  data \d+%  mem [\d.]+ GB"  # the only numbers that the machine's mood decides
        printed = re.sub(speed, "", printed.replace(str(results), "RESULTS"))
        return printed.replace("digits are there already", "digits written")

    first = quickstart("one")
    accuracy = json.loads((tmp_path / "one" / run / "metrics.json").read_text())["metrics"]["accuracy"]
    assert f"{accuracy:.4f}" in first and quickstart("two") == first
