"""What the tests share: golden data, tiny models and data sets, and a way to run the scripts as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on a loaded machine can be 20 times slower than one

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)

traces_fp32 = pytest.mark.skipif(torch.__version__ < "2.15", reason="PyTorch before 2.15 traces bf16 experts alone")


class Golden:
    """One file of reference numbers: `golden["in.x"]`, `golden.part("model.")`."""

    def __init__(self, name: str):
        with safe_open(ROOT / "tests" / "golden" / f"{name}.safetensors", "pt") as file:
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


def script(*arguments, cwd: Path = ROOT, processes: int = 1, check: int | None = 0, env: dict | None = None):
    """Run a script in a process of its own (or several, under torchrun) and return the completed process.

    `check` is the exit code it must end with; None: any.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [*launcher, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment)
    if check is not None:
        assert result.returncode == check, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def read_json(folder: Path, stem: str) -> dict:
    """A JSON file of a checkpoint, as it stands there."""
    return json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
