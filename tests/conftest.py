"""What the tests share: golden data, tiny models and data sets, and a way to run the scripts as a user does."""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on a loaded machine can be 20 times slower than one
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its pool would not live in the processes that tests fork

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
torch.set_num_threads(1)
# The first backward decides for good which devices have threads, with which a process cannot fork. Later it may come
# under FakeTensorMode, which feigns a GPU.
torch.ones(1, requires_grad=True).sum().backward()

traces_fp32 = pytest.mark.skipif(torch.__version__ < "2.15", reason="PyTorch before 2.15 traces bf16 experts alone")


LONGEST = ("scripts", "deepspeed", "expert_parallel", "training", "analysis", "metrics", "cli", "evidence")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of several workers none is left with one of them while the others have nothing to do."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


class Golden:
    """One file of reference numbers: `golden["in.x"]`, `golden.part("model.")`."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def write_images(folder: Path, classes: int = 4, per_class: int = 10, size: int = 8) -> Path:
    """A folder of class folders of distinct random PNG files."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index:03d}.png")
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def few_grid_steps(monkeypatch) -> None:
    """Images that are drawn while training take 4 sampling steps instead of 50: each is a pass of every process."""
    monkeypatch.setattr("training.GRID_STEPS", 4)


def script(*arguments, cwd=ROOT, processes: int = 1, check: int | None = 0, env: dict | None = None):
    """Run a script as `__main__`, in a process of its own or in several of one group, and return how that ended.

    The processes are forked from this one, which has imported everything: they start in no time, and what a test has
    patched in a shared module holds in them. Where a launcher, or a really new process, is what is tested: `launched`.

    `check` is the exit code it must end with; None: any. Several processes end with 1 if one of them fails.
    `cwd` is one folder for all, or a list with one for each: as machines with disks of their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder) / f"{rank}.{name}" for name in ("out", "err")] for rank in range(processes)]
        group = group_of(processes) if processes > 1 else [{}]
        children = {}
        for rank, (files, place) in enumerate(zip(outputs, group, strict=True)):
            folder_of_rank = cwd[rank] if isinstance(cwd, list) else cwd
            children[_fork(arguments, folder_of_rank, place | (env or {}), files)] = rank
        codes = _wait_for(children)
        out, err = (
            "".join(files[stream].read_text(errors="backslashreplace") for files in outputs) for stream in (0, 1)
        )
    code = codes[0] if processes == 1 else int(any(codes.values()))
    if check is not None:
        assert code == check, f"exit code {code}\n{out}\n{err}"
    return subprocess.CompletedProcess(arguments, code, out, err)


class Started:
    """A script like `script`'s in one process, which is not waited for: to be killed or stopped in between.

    It leads a process group of its own. What it prints goes to two files `name` in `folder`.
    """

    def __init__(self, *arguments, folder: Path, name: str = "started", env: dict | None = None):
        self.files = [folder / f"{name}.{stream}" for stream in ("out", "err")]
        self.pid = _fork(arguments, ROOT, env or {}, self.files)
        self.code = None

    def wait(self) -> tuple[int, str, str]:
        """Its exit code (minus the number of the signal that ended it) and what it has printed."""
        if self.code is None:
            self.code = _wait_for({self.pid: 0})[0]
        return self.code, *(file.read_text(errors="backslashreplace") for file in self.files)

    def end(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def started_together(*arguments, processes: int, folder: Path) -> list[Started]:
    """The processes of one group, without a launcher that would clean up after one that is killed."""
    group = enumerate(group_of(processes))
    return [Started(*arguments, folder=folder, name=f"process{rank}", env=place) for rank, place in group]


def group_of(processes: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of each process."""
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@functools.cache
def import_for_children() -> None:
    """What scripts import only where they need it, once, instead of in each forked process."""
    for name in ("torchvision.datasets.folder", "torch.utils.tensorboard", "analysis.plots"):
        importlib.import_module(name)


@functools.cache
def import_deepspeed() -> None:
    """Before a fork too, with what its optimizers import: seconds each time."""
    import train_deepspeed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        train_deepspeed.import_deepspeed("cpu")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _fork(arguments, cwd: Path, env: dict, outputs: list[Path]) -> int:
    import_for_children()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    gc.freeze()  # what it was born with: looking through that again and again costs more than its own work
    try:
        os.setsid()
        atexit._clear()  # of this process's functions
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.stderr.reconfigure(errors="backslashreplace")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        warnings.resetwarnings()
        os.environ.update(env)
        os.chdir(cwd)
        sys.argv = list(map(str, arguments))
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _wait_for(children: dict[int, int], seconds: float = 600) -> dict[int, int]:
    """The exit code of each rank; when one has failed, the others are asked to end, as launchers do."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(children):
        running = [pid for pid, rank in children.items() if rank not in codes]
        ended = [(pid, status) for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in running) if pid]
        codes |= {children[pid]: os.waitstatus_to_exitcode(status) for pid, status in ended}
        for pid in set(running) - {pid for pid, _ in ended}:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            elif any(codes[children[other]] for other, _ in ended):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    return codes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launched(*arguments, processes: int = 1, check: int | None = 0) -> subprocess.CompletedProcess:
    """`script` as a user starts it: a new Python, or torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [*launcher, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    if check is not None:
        assert result.returncode == check, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def read_json(folder: Path, stem: str) -> dict:
    """A JSON file of a checkpoint, as it stands there."""
    return json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))


CHROMIUM = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"]


@pytest.fixture
def browser():
    if not all(CHROMIUM):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*QUIET, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMIUM[1]))
        yield driver
        driver.quit()


def asked_for(browser) -> list[str]:
    """The addresses that the page in a browser wanted; nothing may stand in its console."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    own = ("data:", "blob:", "chrome:", "chrome-untrusted:", "chrome-extension:")  # the browser's first page, too
    return [url for url in asked if not url.startswith(own)]
