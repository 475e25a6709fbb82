"""Averages of weights whose length is chosen after training (EDM2, arXiv 2312.02696, section 3).

Two averages of power-function profiles are kept along with a run, in its checkpoints. The average of any other profile,
at any step, is a sum of these snapshots, with coefficients that bring the sum of their profiles nearest to the profile
that is wanted. A profile's length is its standard deviation over the time that it spans: 0.05 is short, 0.2 long.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from cli import UsageError
from optim import EMA

USUAL = (0.05, 0.10)  # as published
LENGTHS = (1e-3, 0.28)  # from, to
PREFIX = "post-hoc-"  # of the parts of a checkpoint


def exponent(length: float) -> float:
    """gamma of the profile t^gamma whose relative standard deviation is `length`."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA(EMA):
    """The average of all weights so far, those after step t with a weight in proportion to t^gamma."""

    def __init__(self, model: nn.Module, length: float):
        super().__init__(model, 0.0)
        self.length, self.gamma = length, exponent(length)
        self.count = torch.zeros((), dtype=torch.float64)  # updates so far

    def update(self, model: nn.Module) -> None:
        self.count += 1
        self.decay = (1 - 1 / self.count.item()) ** (self.gamma + 1)
        super().update(model)

    @property
    def part(self) -> str:
        """Its name among the parts of a checkpoint."""
        return f"{PREFIX}{self.length:g}"

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return self.as_parameters(model) | {"count": self.count}


def product(step_a: float, gamma_a: float, step_b: float, gamma_b: float) -> float:
    """The integral of the product of two profiles, each of area 1 over 0 to its step."""
    ratio = step_a / step_b
    power = gamma_b if step_a < step_b else -gamma_a
    scale = (gamma_a + gamma_b + 1) * max(step_a, step_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / scale


def coefficients(snapshots: list[tuple[float, float]], step: float, length: float) -> np.ndarray:
    """Of each snapshot (step, gamma), for the average of a length at a step: least squares between profiles."""
    gamma = exponent(length)
    gram = np.array([[product(*a, *b) for b in snapshots] for a in snapshots])
    wanted = np.array([product(*a, step, gamma) for a in snapshots])
    return np.linalg.lstsq(gram, wanted, rcond=1e-12)[0]


def combined(averages: list[tuple[float, float, dict[str, Tensor]]], length: float) -> dict[str, Tensor]:
    """The average of a length at the last step, of snapshots (step, gamma, tensors)."""
    steps, gammas, tensors = zip(*averages, strict=True)
    factors = coefficients(list(zip(steps, gammas, strict=True)), max(steps), length)
    return {
        name: sum(float(factor) * each[name] for factor, each in zip(factors, tensors, strict=True))
        for name in tensors[0]
    }


def reconstruct(run: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], Path]:
    """The average of a length from the checkpoints of a run, and the newest of these that it is made of.

    Args:
        step: of the average; None: that of the newest checkpoint.

    Raises:
        UsageError: no checkpoint holds such averages, or the step is none of theirs.
    """
    snapshots = {each: sorted(each.glob(f"{PREFIX}*.safetensors")) for each in checkpoint.checkpoints_of(run)}
    folders = [folder for folder, files in snapshots.items() if files]
    if not folders:
        raise UsageError(f"{run} has no checkpoints with averages: train.py --post-hoc-ema keeps them")
    steps = [int(folder.name) for folder in folders]
    if step is not None and step not in steps:
        raise UsageError(f"--step {step}: {run} has averages at {', '.join(map(str, sorted(steps)))}")
    folders = [folder for folder in folders if int(folder.name) <= (step or max(steps))]
    for folder in folders:
        checkpoint.verify(folder, tuple(path.name for path in snapshots[folder]))
    files = [path for folder in folders for path in snapshots[folder]]
    tensors = [checkpoint.read_tensors(path.parent, path.stem) for path in files]
    gammas = [exponent(float(path.stem.removeprefix(PREFIX))) for path in files]
    counts = [each["count"].item() for each in tensors]
    average = combined(list(zip(counts, gammas, tensors, strict=True)), length)
    del average["count"]
    return average, folders[0]
