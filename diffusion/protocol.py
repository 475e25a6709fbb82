"""What both objectives share: the noised batch, the table of samplers, the place of a sample in time."""

from typing import NamedTuple

from torch import Tensor

from cli import UsageError

# The first sampler of an objective is its default.
SAMPLERS = {"ddpm": ("ddpm", "ddim", "dpm++", "dpm-solver"), "rf": ("euler", "heun", "dpm++")}


class NoisedBatch(NamedTuple):
    """One training batch after the forward process."""

    x_t: Tensor  # (N,C,H,W) what the network sees
    t: Tensor  # (N,) network time
    target: Tensor  # (N,C,H,W) what its first C channels should say
    x0: Tensor  # (N,C,H,W) data
    noise: Tensor  # (N,C,H,W)


def check_sampler(objective: str, sampler: str | None) -> str:
    """The sampler to use. A network is never sampled with a method of the other objective: that gives noise or NaN."""
    known = SAMPLERS[objective]
    if sampler is None or sampler in known:
        return sampler or known[0]
    owners = [name for name, samplers in SAMPLERS.items() if sampler in samplers]
    what = f"sampler {sampler!r} belongs to the objective {owners[0]!r}" if owners else f"unknown sampler {sampler!r}"
    raise UsageError(f"{what}; this network was trained with {objective!r}, whose samplers are {', '.join(known)}")


def stratify(u: Tensor, position: Tensor | int, total: int) -> Tensor:
    """Move u in [0,1) into stratum `position` of `total`, (position + u) / total.

    With `position` the place of a sample in the global batch, every batch covers the whole time distribution, whatever
    that distribution is, because both objectives turn u into t by the inverse of its cumulative distribution.
    """
    return (position + u) / total


def mean_flat(x: Tensor) -> Tensor:
    """(N,...) -> (N,): the mean over all but the batch."""
    return x.flatten(1).mean(1)
