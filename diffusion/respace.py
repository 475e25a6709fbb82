"""Which time steps of a trained diffusion a sampler visits (iDDPM, arXiv 2102.09672, section 4)."""

import itertools

from cli import UsageError


def spaced_timesteps(num_timesteps: int, spec: int | str) -> list[int]:
    """Ascending time steps out of 0..num_timesteps-1.

    250 or "250"   that many, evenly from the first to the last
    "10,15,20"     the range cut into equal sections, that many in each, from its first step to its last
    "ddim50"       that many with a fixed whole stride from 0 (DDIM, arXiv 2010.02502, appendix D)

    A single step in a section is the section's last (not its first), so that 1 starts where the noise is.
    UsageError for a spec that cannot be met.
    """
    text = str(spec).strip()
    if text.startswith("ddim"):
        return _fixed_stride(num_timesteps, _count(text.removeprefix("ddim"), spec))
    counts = [_count(part.strip(), spec) for part in text.split(",")]
    steps, start = [], 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if count > size:
            raise UsageError(f"cannot take {count} steps out of {size} time steps (asked for {spec!r})")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        first = start if count > 1 else start + size - 1
        # Added up and rounded as the published samplers do: for many counts that is another step than k * stride.
        places = itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
        steps += [first + round(place) for place in places]
        start += size
    return steps


def _fixed_stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise UsageError(f"no whole stride takes exactly {count} steps out of {num_timesteps}")


def step_count(spec: int | str) -> int:
    """The number that samplers with times of their own take. UsageError for the other forms of a spec."""
    if not str(spec).isdecimal() or int(spec) < 1:
        raise UsageError(f"this sampler takes a plain number of steps of at least 1, got {spec!r}")
    return int(spec)


def _count(text: str, spec: int | str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"steps must read like 250, '10,15,20' or 'ddim50', got {spec!r}")
    return int(text)
