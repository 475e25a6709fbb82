"""Gaussian diffusion: DDPM (arXiv 2006.11239) with the learned variances of iDDPM (arXiv 2102.09672).

    x_t = signal x0 + noise_level eps,    signal = sqrt(alphas_cumprod),    noise_level = sqrt(1 - alphas_cumprod)

N batch, C channels, H, W size, T time steps. Outputs have C channels (eps, x0 or v), or 2C: then the second half is the
learned variance, which fixed variances ignore.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cli import UsageError, unknown_name
from diffusion.dpm_solver import solve_continuous, solve_diffusion
from diffusion.protocol import SAMPLERS, NoisedBatch, check_sampler, mean_flat
from diffusion.respace import spaced_timesteps, step_count
from diffusion.schedule import Schedule, Step, make_betas

CHOICES = {
    "schedule": ("linear", "cosine"),
    "prediction": ("eps", "x0", "v"),
    "variance": ("learned_range", "fixed_small", "fixed_large"),
    "loss": ("hybrid", "mse"),
}


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) as the network sees it, each (N,C,H,W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class GaussianDiffusion:
    """The DDPM objective; network time is the integer step 0..T-1.

    schedule    betas: "linear" (DDPM) or "cosine" (iDDPM)
    prediction  what the first C channels say: "eps", "x0", or "v" = signal eps - noise_level x0 (arXiv 2202.00512)
    variance    "learned_range" (iDDPM eq. 15), "fixed_small" (posterior), "fixed_large" (beta)
    loss        "hybrid": MSE plus the variational bound of the step, which trains the learned range; or "mse"
    """

    name = "ddpm"
    samplers = SAMPLERS[name]
    default_steps = 250

    def __init__(
        self,
        num_timesteps: int = 1000,
        schedule: str = "linear",
        prediction: str = "eps",
        variance: str = "learned_range",
        loss: str = "hybrid",
    ):
        choices = {"schedule": schedule, "prediction": prediction, "variance": variance, "loss": loss}
        for kind, value in choices.items():
            if value not in CHOICES[kind]:
                raise unknown_name(kind, value, CHOICES[kind])
        if loss == "hybrid" and variance != "learned_range":
            raise UsageError(f"the hybrid loss trains the learned variance; with variance {variance!r} use loss 'mse'")
        fewest = 21 if schedule == "linear" else 2  # with fewer, the last linear beta is 1 or more
        if num_timesteps < fewest:
            raise UsageError(f"the {schedule} schedule needs at least {fewest} time steps, got {num_timesteps}")
        self._config = {"name": self.name, "num_timesteps": num_timesteps, **choices}
        self.num_timesteps, self.time_scale = num_timesteps, float(num_timesteps)
        self.prediction, self.variance, self.hybrid = prediction, variance, loss == "hybrid"
        self.schedule = Schedule((1 - make_betas(schedule, num_timesteps)).cumprod(0))

    def config(self) -> dict:
        return dict(self._config)

    def guided_channels(self, channels: int, sampler: str) -> int | None:
        """How many are guided: 3 of Stable Diffusion's 4, as in the published numbers, else all (None).

        PixArt's numbers are of dpm-solver, and of all.
        """
        return 3 if channels == 4 and sampler != "dpm-solver" else None

    # Training

    def noised(self, x0: Tensor, noise: Tensor, u: Tensor) -> NoisedBatch:
        """The batch at the times whose cumulative probability is u (N,) in [0,1): t = floor(u T)."""
        t = (u * self.num_timesteps).long()
        return self.at(x0, noise, t.clamp(max=self.num_timesteps - 1))  # a u just below 1 may round up

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> NoisedBatch:
        """The batch at given steps t (N,), int64 (DDPM eq. 4)."""
        c = self.schedule.steps(t, like=x0)
        x_t = c.signal * x0 + c.noise_level * noise
        target = {"eps": noise, "x0": x0, "v": c.signal * noise - c.noise_level * x0}[self.prediction]
        return NoisedBatch(x_t, t, target, x0, noise)

    def loss(self, output: Tensor, batch: NoisedBatch) -> dict[str, Tensor]:
        """Loss per sample (N,): MSE, plus for "hybrid" the step's bound in bits per dimension.

        The bound sees the mean detached, so that it trains the variance alone (iDDPM section 3.1), and is not scaled by
        iDDPM's 0.001 T, as the published weights were trained.
        """
        output, channels = output.float(), batch.x0.shape[1]
        self._check_channels(output.shape[1], channels)
        mse = mean_flat((output[:, :channels] - batch.target.float()) ** 2)
        if not self.hybrid:
            return {"loss": mse, "mse": mse}
        vb = self._bound(torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1), batch)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _bound(self, output: Tensor, batch: NoisedBatch) -> Tensor:
        """(N,) bits per dimension: KL(q(x_{t-1}|x_t,x0) || p), or at step 0 the decoder's -log p(x0|x_1)."""
        x0, x_t = batch.x0.float(), batch.x_t.float()
        c = self.schedule.steps(batch.t, like=x0)
        p = self.predict(output, x_t, c)
        kl = _gaussian_kl(c.mean_x0 * x0 + c.mean_xt * x_t, c.log_small, p.mean, p.log_variance)
        decoder = -_discretized_log_likelihood(x0, p.mean, p.log_variance)
        return torch.where(batch.t == 0, mean_flat(decoder), mean_flat(kl)) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(self, denoise: Callable[[Tensor, float], Tensor], x0: Tensor, randn: Callable[[], Tensor]) -> dict:
        """The variational bound of each sample in bits per dimension (DDPM eq. 5), over all T steps.

        x0 (N,C,H,W) is 8-bit data in [-1, 1]. Returns total (N,), prior (N,) and vb (N,T), with total = prior + sum vb.
        """
        x0, terms = x0.float(), []
        for t in range(self.num_timesteps):
            batch = self.at(x0, randn(), torch.full((x0.shape[0],), t, device=x0.device))
            terms.append(self._bound(denoise(batch.x_t, float(t)).float(), batch))
        vb = torch.stack(terms, dim=1)  # (N,T)
        last = self.schedule.step(self.num_timesteps - 1)
        zero = torch.zeros_like(x0)
        prior = mean_flat(_gaussian_kl(last.signal * x0, zero + 2 * math.log(last.noise_level), zero, zero))
        prior = prior / math.log(2)
        return {"total": prior + vb.sum(1), "prior": prior, "vb": vb}

    # The network's view of the reverse process

    def predict_x0(self, output: Tensor, x_t: Tensor, c: Step, clip: bool = False) -> Tensor:
        """The data prediction (N,C,H,W) behind the first C channels of the output."""
        said = output[:, : x_t.shape[1]]
        if self.prediction == "eps":
            x0 = (x_t - c.noise_level * said) / c.signal
        elif self.prediction == "v":
            x0 = c.signal * x_t - c.noise_level * said
        else:
            x0 = said
        return x0.clamp(-1, 1) if clip else x0

    def estimate(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The data (N,C,H,W) that an answer at network time t means; between two time steps, as at the nearest."""
        return self.predict_x0(output.float(), x, self.schedule.step(round(t)))

    def predict(self, output: Tensor, x_t: Tensor, c: Step, clip: bool = False) -> Prediction:
        """p(x_{t-1} | x_t): the posterior mean at the predicted x0 (DDPM eq. 7), and the variance."""
        x0 = self.predict_x0(output, x_t, c, clip)
        mean = c.mean_x0 * x0 + c.mean_xt * x_t
        if self.variance == "learned_range":
            self._check_channels(output.shape[1], x_t.shape[1])
            fraction = (output[:, x_t.shape[1] :] + 1) / 2  # -1 means posterior variance, 1 means beta (iDDPM eq. 15)
            log_variance = fraction * c.log_beta + (1 - fraction) * c.log_small
        else:
            fixed = c.log_small if self.variance == "fixed_small" else c.log_large
            log_variance = torch.zeros_like(mean) + fixed
        return Prediction(mean, log_variance, x0)

    def _check_channels(self, given: int, channels: int) -> None:
        if self.variance == "learned_range" and given != 2 * channels:
            raise UsageError(
                f"a learned variance needs a network with {2 * channels} output channels for {channels} data channels, "
                f"got {given}; use a fixed variance with it"
            )

    # Sampling

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
        eta: float = 0.0,
    ) -> Tensor:
        """From x, pure noise (N,C,H,W), to data in float32; one network evaluation a step.

        denoise    (x, t) -> (N,C or 2C,H,W), t a python float in network time
        num_steps  250, "10,15,20" or "ddim50": see `spaced_timesteps`; dpm++ takes a number only and spaces it itself
        sampler    "ddpm" ancestral, "ddim" (with eta, 0 deterministic), "dpm++", or as PixArt does "dpm-solver"
        randn      fresh noise (N,C,H,W) for the steps that draw some; the caller may seed each image
        progress   wraps the steps, as tqdm does
        clip       keep the data prediction inside [-1, 1] (pixels)
        """
        sampler = check_sampler(self.name, sampler)
        x = x.float()
        if sampler == "dpm++":

            def predict_x0(x: Tensor, t: int) -> Tensor:
                return self.predict_x0(denoise(x, float(t)).float(), x, self.schedule.step(t), clip)

            return solve_diffusion(predict_x0, x, self.schedule.betas, step_count(num_steps), progress)

        if sampler == "dpm-solver":

            def predict_between(x: Tensor, t: float, signal: float, noise_level: float) -> Tensor:
                c = self.schedule.step(0)._replace(signal=float(signal), noise_level=float(noise_level))
                return self.predict_x0(denoise(x, float(t)).float(), x, c, clip)

            alphas = self.schedule.alphas_cumprod
            return solve_continuous(predict_between, x, alphas, step_count(num_steps), progress)

        timesteps = spaced_timesteps(self.num_timesteps, num_steps)
        spaced = Schedule(self.schedule.alphas_cumprod[timesteps])  # the same process, seen at fewer steps
        previous = spaced.alphas_cumprod_prev.tolist()
        randn = randn or (lambda: torch.randn_like(x))

        def ancestral(output: Tensor, x: Tensor, c: Step, i: int) -> Tensor:  # DDPM algorithm 2
            p = self.predict(output, x, c, clip)
            return p.mean + torch.exp(0.5 * p.log_variance) * randn() if i else p.mean

        def implicit(output: Tensor, x: Tensor, c: Step, i: int) -> Tensor:  # DDIM eq. 12 and 16
            x0 = self.predict_x0(output, x, c, clip)
            eps = (x - c.signal * x0) / c.noise_level
            std = eta * math.exp(0.5 * c.log_small) if i else 0.0
            x = math.sqrt(previous[i]) * x0 + math.sqrt(1 - previous[i] - std**2) * eps
            return x + std * randn() if std else x

        advance = {"ddpm": ancestral, "ddim": implicit}[sampler]
        steps = [(i, float(timesteps[i]), spaced.step(i)) for i in reversed(range(len(timesteps)))]
        for i, t, c in progress(steps) if progress else steps:
            x = advance(denoise(x, t).float(), x, c, i)
        return x


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio - 1 + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of N(mean, variance) integrated over x's bin of 256 in [-1, 1], in nats (DDPM eq. 13); the outer are open."""
    scale, half_bin = torch.exp(-0.5 * log_variance), 1 / 255
    upper = _normal_cdf((x - mean + half_bin) * scale)
    lower = _normal_cdf((x - mean - half_bin) * scale)
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return torch.log((upper - lower).clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh fit of the normal distribution, within 2e-4 of it: published losses and bits per dimension use it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
