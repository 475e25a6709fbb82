"""Rectified flow (arXiv 2209.03003): a straight path from data to noise and its velocity.

    x_t = (1-t) x0 + t noise,    dx_t/dt = noise - x0

t = 0 is data and t = 1 noise, as in SD3 (arXiv 2403.03206). Outputs have C or more channels; the first C are the
velocity, any others stay unused.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cli import UsageError, unknown_name
from diffusion.dpm_solver import solve_flow
from diffusion.protocol import SAMPLERS, NoisedBatch, check_sampler, mean_flat
from diffusion.respace import step_count


def shift_time(t, shift: float):
    """t' = s t / (1 + (s-1) t), SD3 eq. 23: s > 1 spends more time near the noise, as larger images need.

    Written so that 0 and 1 stay exactly 0 and 1.
    """
    return t / (t + (1 - t) / shift)


class RectifiedFlow:
    """The flow objective. Network time is t * time_scale: raw 0..1 for the published weights.

    t_distribution  "lognormal": t = sigmoid(N(0,1)), the logit-normal of SD3 eq. 19 under its published name; "uniform"
    shift           timestep shift, in training and sampling alike
    """

    name = "rf"
    samplers = SAMPLERS[name]
    default_steps = 50

    def __init__(self, t_distribution: str = "lognormal", shift: float = 1.0, time_scale: float = 1.0):
        if t_distribution not in ("lognormal", "uniform"):
            raise unknown_name("t distribution", t_distribution, ("lognormal", "uniform"))
        if not (shift > 0 and time_scale > 0):
            raise UsageError(f"shift and time scale must be positive, got {shift} and {time_scale}")
        self.t_distribution, self.shift, self.time_scale = t_distribution, shift, time_scale

    def config(self) -> dict:
        settings = {"t_distribution": self.t_distribution, "shift": self.shift, "time_scale": self.time_scale}
        return {"name": self.name, **settings}

    def guided_channels(self, channels: int, sampler: str) -> int | None:
        """How many are guided: all (None)."""
        return None

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> NoisedBatch:
        """The batch at the times whose cumulative probability is u (N,) in [0,1)."""
        t = u.double()
        if self.t_distribution == "lognormal":
            tiny = torch.finfo(t.dtype).eps  # the inverse normal distribution is infinite at 0 and 1
            t = torch.sigmoid(torch.special.ndtri(t.clamp(tiny, 1 - tiny)))
        return self.at(x0, noise, self.time_scale * shift_time(t, self.shift))

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> NoisedBatch:
        """The batch at given network times t (N,)."""
        fraction = (t / self.time_scale).to(x0.dtype).view(-1, 1, 1, 1)
        return NoisedBatch((1 - fraction) * x0 + fraction * noise, t.float(), noise - x0, x0, noise)

    def loss(self, output: Tensor, batch: NoisedBatch) -> dict[str, Tensor]:
        """Mean squared error of the velocity, (N,)."""
        mse = mean_flat((output[:, : batch.x0.shape[1]].float() - batch.target.float()) ** 2)
        return {"loss": mse, "mse": mse}

    def estimate(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The data (N,C,H,W) that an answer at network time t means."""
        return x - t / self.time_scale * output[:, : x.shape[1]].float()

    @torch.no_grad()
    def sample(
        self,
        denoise: Callable[[Tensor, float], Tensor],
        x: Tensor,
        num_steps: int | str,
        sampler: str | None = None,
        randn: Callable[[], Tensor] | None = None,
        progress: Callable | None = None,
        clip: bool = False,
    ) -> Tensor:
        """Solve dx/dt = v from t = 1 (x, pure noise (N,C,H,W)) to 0; float32.

        Network evaluations: euler and dpm++ num_steps, heun 2 num_steps - 1. Every method is deterministic: `randn` is
        accepted and unused. clip: keep the data prediction inside [-1, 1] (pixels).
        """
        sampler = check_sampler(self.name, sampler)
        num_steps, x = step_count(num_steps), x.float()

        def velocity(x: Tensor, t: float) -> Tensor:
            v = denoise(x, t * self.time_scale)[:, : x.shape[1]].float()
            return (x - (x - t * v).clamp(-1, 1)) / t if clip else v

        if sampler == "dpm++":
            return solve_flow(lambda x, t: x - t * velocity(x, t), x, num_steps, self.shift, progress)
        step = {"euler": _euler_step, "heun": _heun_step}[sampler]
        times = [shift_time(1 - i / num_steps, self.shift) for i in range(num_steps + 1)]  # 1 .. 0
        spans = list(pairwise(times))
        for t, t_next in progress(spans) if progress else spans:
            x = step(velocity, x, t, t_next)
        return x


def _euler_step(velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    return x + (t_next - t) * velocity(x, t)


def _heun_step(velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """Trapezoid rule with an Euler predictor; the last step is Euler: no network is trained at t = 0."""
    v = velocity(x, t)
    ahead = x + (t_next - t) * v
    if t_next == 0:
        return ahead
    return x + (t_next - t) * 0.5 * (v + velocity(ahead, t_next))
