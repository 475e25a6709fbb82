"""Classifier-free guidance (arXiv 2207.12598) as one wrapper around the network."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UsageError


def classifier_free_guidance(
    model: Callable[..., Tensor],
    condition: Tensor | tuple,
    null: Tensor | tuple | int | None,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    time_scale: float = 1.0,
    guide: Callable[..., Tensor] | None = None,
) -> Callable[[Tensor, float], Tensor]:
    """The `denoise(x, t)` that samplers call: null + scale * (conditional - null).

    model      (x (N,C,H,W), t (N,), condition) -> (N,C or 2C,H,W)
    condition  what each image is of: labels (N,), or a NamedTuple of tensors (N, ...)
    null       the same of nothing, or the label that means it; None where the network has none: only scale 1 works then
    channels   how many of the first channels are guided, None for all of x's; the rest, the variance among it, is the
               conditional's. The published DDPM numbers guide 3 of 4 latent channels.
    interval   guide only where low <= t / time_scale <= high (arXiv 2404.07724); elsewhere one plain forward
    time_scale network time at pure noise
    guide      a weaker network, whose answer stands in for that to null (autoguidance, arXiv 2406.02507)

    Guided, a step is one forward of 2N, conditional half first, or one of N by each network; otherwise one of N.
    """
    low, high = interval
    if scale != 1 and null is None and guide is None:
        raise UsageError(f"guidance scale {scale} needs a null class, which this model does not have; use scale 1")
    if not (math.isfinite(scale) and 0 <= low <= high <= 1):
        raise UsageError(f"guidance takes a finite scale and 0 <= low <= high <= 1, got {scale} and {low}, {high}")
    both = condition if scale == 1 or guide is not None else _join(condition, null)  # 2N

    def denoise(x: Tensor, t: float) -> Tensor:
        assert scale == 1 or 0 <= t <= time_scale, f"time {t} is outside 0..{time_scale}: whose time_scale is this?"
        if scale == 1 or not low <= t / time_scale <= high:
            return model(x, _expand(t, x), condition)
        if guide is None:
            x2 = torch.cat([x, x])  # (2N,C,H,W)
            conditional, nothing = model(x2, _expand(t, x2), both).float().chunk(2)  # each (N,C or 2C,H,W)
        else:
            conditional, nothing = (each(x, _expand(t, x), condition).float() for each in (model, guide))
        k = x.shape[1] if channels is None else min(channels, x.shape[1])
        guided = nothing[:, :k] + scale * (conditional[:, :k] - nothing[:, :k])
        return torch.cat([guided, conditional[:, k:]], dim=1)

    return denoise


def _join(condition: Tensor | tuple, null: Tensor | tuple | int):
    """Both in one batch, condition first."""
    if isinstance(condition, Tensor):
        return torch.cat(of_one_size(condition, torch.full_like(condition, null) if isinstance(null, int) else null))
    return type(condition)(*(_join(a, b) for a, b in zip(condition, null, strict=True)))


def of_one_size(*batches: Tensor) -> list[Tensor]:
    """(N, ...) each, padded with zeros to the largest of each dimension but the first: texts of several lengths."""
    size = [max(sizes) for sizes in zip(*(batch.shape[1:] for batch in batches), strict=True)]
    missing = (
        [more for s, there in zip(size, batch.shape[1:], strict=True) for more in (s - there, 0)] for batch in batches
    )
    return [F.pad(batch, more[::-1]) for batch, more in zip(batches, missing, strict=True)]


def _expand(t: float, x: Tensor) -> Tensor:
    """(N,) float32 on x's device; `full` writes it there, so the host does not wait."""
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
