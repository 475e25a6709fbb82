"""DPM-Solver++ (2M) of arXiv 2211.01095, algorithm 2, through diffusers' multistep scheduler.

The solver integrates the data prediction, so each objective hands over its own x0, and the scheduler never sees the
kind of output, the variance channels or the network's time. One network evaluation a step.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cli import UsageError

PredictX0 = Callable[[Tensor, float], Tensor]  # (x (N,C,H,W), time) -> x0 (N,C,H,W)

# Noisiest level used, as log(signal / noise_level). The cosine schedule ends at -10, where x0 from eps magnifies the
# error of the network 20000-fold; the linear schedule ends just inside this bound.
MIN_LOG_SNR = -5.1


def solve_diffusion(predict_x0: PredictX0, x: Tensor, betas: Tensor, num_steps: int, progress=None) -> Tensor:
    """From noise to data along a variance-preserving diffusion, with steps uniform in time.

    Unlike the other samplers it does not evaluate step 0, the far end of log-SNR: a second-order step of that length
    extrapolates worse than a first-order one. UsageError for more steps than the diffusion has.
    """
    scheduler = _scheduler(trained_betas=betas.tolist(), num_train_timesteps=len(betas), lambda_min_clipped=MIN_LOG_SNR)
    scheduler.set_timesteps(num_steps)
    times = scheduler.timesteps.tolist()  # integers, descending
    if len(set(times)) < num_steps:
        raise UsageError(f"dpm++ cannot take {num_steps} different steps out of {len(betas)} time steps")
    return _run(scheduler, predict_x0, x, times, progress)


def solve_continuous(predict_x0: Callable, x: Tensor, alphas_cumprod: Tensor, num_steps: int, progress=None) -> Tensor:
    """The same between the time steps, as PixArt-alpha samples: from the last one to the first, log alpha is linear.

    Args:
        predict_x0: (x, t, signal, noise_level) -> x0, t in steps and perhaps between two of them.
    """
    count = len(alphas_cumprod)
    log_signal = alphas_cumprod.double().log().numpy() / 2
    places = np.linspace(count - 1, 0, num_steps + 1)  # of times in the table
    signal = np.exp(np.interp(places, np.arange(count), log_signal))
    noise_level = np.sqrt(1 - signal**2)
    scheduler = _scheduler(lower_order_final=num_steps < 10, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.from_numpy(noise_level / signal).float()

    def predict(x: Tensor, step: int) -> Tensor:
        return predict_x0(x, places[step], signal[step], noise_level[step])

    return _run(scheduler, predict, x, list(range(num_steps)), progress)


def solve_flow(predict_x0: PredictX0, x: Tensor, num_steps: int, shift: float, progress=None) -> Tensor:
    """From noise to data along x_t = (1-t) x0 + t noise, with the shifted times of SD3.

    The log-SNR is infinite at t = 1, so the first time is 0.999 (before the shift).
    """
    scheduler = _scheduler(use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(num_steps)
    times = scheduler.sigmas[:-1].tolist()  # not scheduler.timesteps, which are rounded to integers
    return _run(scheduler, predict_x0, x, times, progress)


def _scheduler(**settings):
    from diffusers import DPMSolverMultistepScheduler  # seconds to import, and only this sampler needs it

    return DPMSolverMultistepScheduler(solver_order=2, prediction_type="sample", **settings)


def _run(scheduler, predict_x0: PredictX0, x: Tensor, times: list, progress: Callable | None) -> Tensor:
    scheduler.set_begin_index(0)  # or else it would look the first time up in a tensor
    for t in progress(times) if progress else times:
        x = scheduler.step(predict_x0(x, t), t, x).prev_sample
    return x
