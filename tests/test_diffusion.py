"""Both objectives against published numbers, against exact denoisers, and against obvious slow versions.

The exact denoiser: for data N(MU, SD^2), independent in every entry, E[x0 | x_t] is known in closed form, and so is the
end of the probability-flow ODE from any noise. A sampler given it must land on known numbers.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributions import Normal, kl_divergence

from cli import UsageError
from diffusion import (
    GaussianDiffusion,
    RectifiedFlow,
    classifier_free_guidance,
    objective_from_config,
    shift_time,
    spaced_timesteps,
    stratify,
)
from diffusion.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

MU, SD = 0.7, 0.4
PREDICTIONS = ("eps", "x0", "v")


@pytest.fixture(scope="module")
def golden():
    with safe_open(Path(__file__).parent / "golden" / "diffusion.safetensors", "pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        return arrays, json.loads(file.metadata()["spaced_timesteps"])


@pytest.fixture
def G(golden):
    return golden[0]


@pytest.fixture
def toy(G):
    """The network of the golden file: 4 predictions, then 4 variances."""

    def model(x, t, y):
        out = torch.einsum("oc,nchw->nohw", G["W"], x)
        return out + (0.1 * torch.sin(0.01 * t.float()) + 0.05 * y.float())[:, None, None, None]

    return model


def close(actual, expected, tolerance=1e-5):
    """Within the tolerance of the largest entry (of 1 where that is smaller)."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def fixed(schedule="linear", prediction="eps", **settings):
    return GaussianDiffusion(
        **{"variance": "fixed_small", "loss": "mse", **settings}, schedule=schedule, prediction=prediction
    )


# Published numbers


def test_golden_schedule(G):
    schedule = GaussianDiffusion().schedule
    for ours, theirs in {
        "betas": "betas",
        "alphas_cumprod": "alphas_cumprod",
        "posterior_variance": "posterior_variance",
        "posterior_log_variance": "posterior_log_variance_clipped",
        "posterior_mean_x0": "posterior_mean_coef1",
        "posterior_mean_xt": "posterior_mean_coef2",
    }.items():
        torch.testing.assert_close(getattr(schedule, ours), G[f"schedule.{theirs}"], rtol=1e-12, atol=1e-14)


def test_golden_training_and_posterior(G, toy):
    ddpm = GaussianDiffusion()
    batch = ddpm.at(G["x0"], G["noise"], G["t"])
    output = toy(batch.x_t, batch.t, G["y"])
    close(batch.x_t, G["q_sample"])
    losses = ddpm.loss(output, batch)
    for key in ("loss", "mse", "vb"):
        close(losses[key], G[f"training_losses.{key}"])
    step = ddpm.schedule.steps(G["t"], like=output)
    p = ddpm.predict(output, batch.x_t, step)
    close(p.mean, G["p_mean_variance.mean"])
    close(p.log_variance, G["p_mean_variance.log_variance"])
    close(p.log_variance.exp(), G["p_mean_variance.variance"])
    close(p.x0, G["p_mean_variance.pred_xstart"])
    close(ddpm.predict(output, batch.x_t, step, clip=True).mean, G["p_mean_variance_clipped.mean"])


def test_golden_samples(G, toy):
    ddpm, denoise = GaussianDiffusion(), classifier_free_guidance(toy, G["y"], None, 1.0)
    close(ddpm.sample(denoise, G["z"], 20, "ddim"), G["ddim.sample"])
    noises = iter(G["ddpm.step_noise"])
    ours, theirs = ddpm.sample(denoise, G["z"], "20", randn=lambda: next(noises)), G["ddpm.sample"]
    # This toy's variances explode: most published entries are NaN (infinite variance times no noise at the last step),
    # the others reach 1e31, where float32 rounding inside the exponentials is magnified.
    finite = theirs.isfinite()
    assert finite.sum() == 78
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-3, atol=1e-5)
    flow = RectifiedFlow()
    close(flow.sample(denoise, G["z"], 7), G["rf.sample"])
    guided = classifier_free_guidance(toy, G["y"], 10, 2.0, flow.guided_channels(4, "euler"))
    close(flow.sample(guided, G["z"], 10), G["rf.sample_cfg"])


def test_golden_flow_loss(G, toy):
    flow = RectifiedFlow()
    batch = flow.at(G["x0"], G["noise"], G["rf.t"])
    close(flow.loss(toy(batch.x_t, batch.t, G["y"]), batch)["loss"], G["rf.loss"])


def test_spaced_timesteps_add_the_stride_up():
    """As the published samplers do: a running sum is rounded, which for 278 counts differs from k * stride."""
    multiples = 0
    for count in range(2, 1001):
        expected, place, stride = [], 0.0, 999 / (count - 1)
        for _ in range(count):
            expected.append(round(place))
            place += stride
        assert spaced_timesteps(1000, count) == expected
        multiples += expected != [round(k * stride) for k in range(count)]
    assert multiples == 278


def test_golden_spaced_timesteps(golden):
    for spec, steps in golden[1].items():
        assert spaced_timesteps(1000, spec) == steps
    assert spaced_timesteps(1000, 250) == golden[1]["250"]
    assert spaced_timesteps(1000, 1) == [999]


# Exact denoisers


def levels(diffusion):
    """Signal and noise level (T,) from the definition of each schedule, for the default 1000 steps."""
    if diffusion.config()["schedule"] == "linear":
        betas = [1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(1000)]
    else:
        power = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(power)]
    signal_power = torch.tensor([1 - beta for beta in betas], dtype=torch.float64).cumprod(0)
    return signal_power.sqrt().tolist(), (1 - signal_power).sqrt().tolist()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules(schedule):
    ddpm = fixed(schedule)
    signal, noise_level = (torch.tensor(level, dtype=torch.float64) for level in levels(ddpm))
    torch.testing.assert_close(ddpm.schedule.alphas_cumprod, signal**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(1 - ddpm.schedule.alphas_cumprod, noise_level**2, rtol=1e-9, atol=0)


def exact_x0(x, signal, noise_level):
    """E[x0 | x_t] and its variance."""
    gain = signal * SD**2 / (signal**2 * SD**2 + noise_level**2)
    return MU + gain * (x - signal * MU), SD**2 * (1 - gain * signal)


def exact_denoiser(objective, calls=None):
    """The network that knows the data; its calls are appended to `calls`."""
    if isinstance(objective, GaussianDiffusion):
        table = list(zip(*levels(objective), strict=True))
        kind = objective.config()["prediction"]

    def denoise(x, t):
        assert isinstance(t, float)
        assert x.dtype == torch.float32
        if calls is not None:
            calls.append(t)
        if isinstance(objective, RectifiedFlow):
            time = t / objective.time_scale
            x0, _ = exact_x0(x, 1 - time, time)
            said = (x - x0) / time  # = noise - x0
        else:
            signal, noise_level = table[int(t)]
            x0, _ = exact_x0(x, signal, noise_level)
            eps = (x - signal * x0) / noise_level
            said = {"eps": eps, "x0": x0, "v": signal * eps - noise_level * x0}[kind]
        return torch.cat([said, torch.full_like(said, 1e3)], dim=1)  # nobody may read what is not a learned variance

    return denoise


def ode_end(objective, z):
    """Where the probability-flow ODE carries z: the map between the two Gaussians that keeps the order."""
    if isinstance(objective, RectifiedFlow):
        return MU + SD * z
    signal, noise_level = (level[-1] for level in levels(objective))
    return MU + SD * (z - signal * MU) / math.sqrt(signal**2 * SD**2 + noise_level**2)


def ode_error(objective, num_steps, sampler):
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = objective.sample(exact_denoiser(objective), z, num_steps, sampler)
    assert out.shape == z.shape
    return (out - ode_end(objective, z)).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_diffusion_odes_converge(schedule, prediction):
    ddpm = fixed(schedule, prediction)
    ddim = [ode_error(ddpm, n, "ddim") for n in (20, 40, 80)]
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(ddim))  # first order
    dpm = [ode_error(ddpm, n, "dpm++") for n in (20, 50)]
    assert dpm[0] < 0.6 * ddim[0]
    assert dpm[1] < 0.0025 < 0.3 * ddim[1]
    assert (
        ode_error(ddpm, 250, "dpm++") < {"linear": 1e-3, "cosine": 2e-3}[schedule]
    )  # cosine: it starts at MIN_LOG_SNR


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0, "time_scale": 1000.0}])
def test_flow_odes_converge(settings):
    flow = RectifiedFlow(**settings)
    euler, heun, dpm = ([ode_error(flow, n, sampler) for n in (20, 40, 80)] for sampler in flow.samplers)
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(euler))
    assert all(3.4 < coarse / fine < 4.6 for coarse, fine in pairwise(heun))  # second order
    assert heun[0] < euler[1]  # at equal evaluations
    assert all(d < 0.4 * e for d, e in zip(dpm, euler, strict=True))
    assert flow.sample(exact_denoiser(flow), torch.zeros(1, 1, 1, 1), 250, "dpm++").item() == pytest.approx(
        MU, abs=5e-3
    )


def moments(x, mean, std):
    assert abs(x.mean().item() - mean) < 0.01
    assert abs(x.std().item() - std) < 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_samples_have_the_moments_of_the_data(schedule, prediction):
    generator = torch.Generator().manual_seed(0)
    randn = lambda: torch.randn(4, 1, 64, 64, generator=generator)  # noqa: E731
    ddpm = fixed(schedule, prediction)
    moments(ddpm.sample(exact_denoiser(ddpm), randn(), 1000, "ddpm", randn), MU, SD)


@pytest.mark.parametrize("num_steps", [4, 10])
def test_learned_range_reaches_the_exact_variance_in_few_steps(num_steps):
    """p(x_{t-1} | x_t) is Gaussian here, so the right variance makes coarse sampling exact; a fixed one misses."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda: torch.randn(4, 1, 128, 128, generator=generator)  # noqa: E731
    learned = GaussianDiffusion(prediction="x0")
    signal, noise_level = levels(learned)
    times = [-1, *spaced_timesteps(1000, num_steps)]

    def denoise(x, t):
        a, s = signal[int(t)], noise_level[int(t)]
        x0, x0_variance = exact_x0(x, a, s)
        before = times[times.index(int(t)) - 1]
        if before < 0:
            return torch.cat([x0, x0], dim=1)
        a_before, s_before = signal[before], noise_level[before]
        beta = 1 - (a / a_before) ** 2
        small = beta * (s_before / s) ** 2
        true = small + (beta * a_before / s**2) ** 2 * x0_variance
        fraction = math.log(true / small) / math.log(beta / small)
        return torch.cat([x0, torch.full_like(x0, 2 * fraction - 1)], dim=1)

    moments(learned.sample(denoise, randn(), num_steps, randn=randn), MU, SD)
    miss = fixed(prediction="x0").sample(denoise, randn(), num_steps, randn=randn).std()
    assert abs(miss - SD) > 0.02


def test_ddim_with_eta_1_is_ancestral_sampling():
    """DDIM section 4.1: eta = 1 gives the mean and the posterior variance of DDPM."""
    ddpm, noises = fixed(), torch.randn(11, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    one, two = iter(noises), iter(noises)
    ancestral = ddpm.sample(exact_denoiser(ddpm), next(one), 10, "ddpm", lambda: next(one))
    implicit = ddpm.sample(exact_denoiser(ddpm), next(two), 10, "ddim", lambda: next(two), eta=1.0)
    torch.testing.assert_close(ancestral, implicit, rtol=1e-4, atol=1e-5)
    assert len(list(one)) == len(list(two)) == 1  # the last step draws nothing


def test_fixed_large_adds_beta():
    x, output = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    step = GaussianDiffusion().schedule.step
    large = fixed(variance="fixed_large")
    beta = 1e-4 + (2e-2 - 1e-4) * 500 / 999
    assert large.predict(output, x, step(500)).log_variance.mean().item() == pytest.approx(math.log(beta), rel=1e-5)
    small = fixed().predict(output, x, step(0)).log_variance
    assert torch.equal(large.predict(output, x, step(0)).log_variance, small)


@pytest.mark.parametrize(
    "objective, sampler, num_steps, evaluations",
    [
        (fixed(), "ddpm", "10,15,20", 45),
        (fixed(), "ddim", "ddim50", 50),
        (fixed(), "dpm++", 12, 12),
        (fixed("cosine"), "dpm++", 12, 12),
        (RectifiedFlow(), "euler", "12", 12),
        (RectifiedFlow(), "heun", 12, 23),
        (RectifiedFlow(time_scale=1000.0), "dpm++", 12, 12),
    ],
)
def test_evaluations_and_progress(objective, sampler, num_steps, evaluations):
    calls, seen = [], []

    def progress(steps):
        assert len(steps) == (12 if sampler == "heun" else evaluations)
        for step in steps:
            seen.append(step)
            yield step

    objective.sample(exact_denoiser(objective, calls), torch.randn(1, 1, 4, 4), num_steps, sampler, progress=progress)
    assert len(calls) == evaluations
    assert len(seen) == (12 if sampler == "heun" else evaluations)
    assert calls == sorted(calls, reverse=True)
    assert 0.97 * objective.time_scale < calls[0] <= objective.time_scale
    assert calls[-1] < 0.12 * objective.time_scale


def test_dpm_solver_times():
    """Time uniform before the shift and not rounded; on the cosine schedule no noisier than log-SNR -5.1."""
    flow, x, calls = RectifiedFlow(shift=3.0, time_scale=1000.0), torch.randn(1, 1, 4, 4), []
    flow.sample(exact_denoiser(flow, calls), x, 7, "dpm++")
    assert calls == pytest.approx([1000 * shift_time(0.999 * (1 - i / 7), 3.0) for i in range(7)], rel=1e-6)
    for schedule in ("linear", "cosine"):
        ddpm, calls = fixed(schedule), []
        ddpm.sample(exact_denoiser(ddpm, calls), x, 7, "dpm++")
        usable = sum(a / s >= math.exp(-5.1) for a, s in zip(*levels(ddpm), strict=True))
        assert calls == pytest.approx([(usable - 1) * (1 - i / 7) for i in range(7)], abs=0.5)


def test_a_single_step_starts_at_pure_noise():
    for objective in (fixed(), RectifiedFlow()):
        for sampler in objective.samplers:
            calls = []
            out = objective.sample(exact_denoiser(objective, calls), torch.randn(1, 1, 4, 4), 1, sampler)
            assert calls == [pytest.approx(objective.time_scale, rel=2e-3)]
            assert out.isfinite().all()
            assert (out - MU).abs().max() < 0.05  # the best guess from noise is the mean


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler", "heun"])
def test_clip_keeps_the_data_prediction_inside(sampler):
    objective = fixed() if sampler in GaussianDiffusion.samplers else RectifiedFlow()
    x = 4 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, clipped = (
        objective.sample(lambda x, t: -x, x, 10, sampler, clip=clip).abs().max().item() for clip in (False, True)
    )
    assert plain > 1.1
    assert 0.9 < clipped <= 1 + 1e-5


# Training


def test_time_from_u():
    n = 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    steps = fixed().noised(x, x, u).t
    assert steps.dtype == torch.int64
    assert torch.equal(steps.bincount(), torch.full((1000,), 4))
    torch.testing.assert_close(RectifiedFlow("uniform").noised(x, x, u).t.double(), u, rtol=0, atol=1e-7)

    t = RectifiedFlow().noised(x, x, u).t.double()
    torch.testing.assert_close(torch.logit(t), Normal(0, 1).icdf(u), rtol=0, atol=1e-4)
    batch = RectifiedFlow(shift=3.0, time_scale=1000.0).noised(x, x + 1, u)
    shifted = batch.t.double()
    torch.testing.assert_close(
        (batch.x_t - x).flatten().double(), shifted / 1000, rtol=0, atol=1e-6
    )  # (1-t) x + t (x+1)
    torch.testing.assert_close(shifted, 1000 * 3 * t / (1 + 2 * t), rtol=1e-5, atol=1e-3)
    for shift in (
        0.3,
        1.1,
        1.7,
        3.0,
    ):  # sampling starts and ends exactly at the ends, inside a closed guidance interval
        assert [shift_time(t, shift) for t in (0.0, 1.0)] == [0, 1]


def test_time_at_the_ends_of_u():
    x = torch.ones(3, 1, 1, 1)
    u = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)  # 1.0: stratify may round up
    assert fixed().noised(x, x, u).t.tolist() == [0, 999, 999]
    flow = RectifiedFlow().noised(x, 2 * x, u)
    assert ((flow.t > 0) & (flow.t < 1)).all()
    assert flow.x_t.isfinite().all()


@pytest.mark.parametrize("objective", [RectifiedFlow("uniform"), RectifiedFlow(), RectifiedFlow(shift=2.0), fixed()])
def test_stratified_batches_have_one_sample_in_every_stratum(objective):
    total, generator = 16, torch.Generator().manual_seed(0)
    u = torch.rand(total, dtype=torch.float64, generator=generator)
    position = torch.randperm(total, generator=generator)
    x = torch.zeros(total, 1, 1, 1)
    t = objective.noised(x, x, stratify(u, position, total)).t
    edges = (torch.arange(total + 1) / total).double()
    borders = objective.noised(torch.zeros(total + 1, 1, 1, 1), torch.zeros(total + 1, 1, 1, 1), edges).t
    assert torch.equal(torch.searchsorted(borders[1:-1].contiguous(), t, right=True), position)
    assert stratify(0.25, 3, 4) == 0.8125


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_says_the_target_is_perfect(prediction):
    """The target and predict_x0 are inverse to each other, and the loss of the target is zero."""
    ddpm, x0 = fixed(prediction=prediction), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    batch = ddpm.noised(x0, torch.randn_like(x0), torch.rand(5, dtype=torch.float64))
    torch.testing.assert_close(ddpm.predict_x0(batch.target, batch.x_t, ddpm.schedule.steps(batch.t, x0)), x0)
    assert ddpm.loss(batch.target, batch)["loss"].abs().max() == 0
    assert ddpm.loss(batch.target + 2, batch)["loss"].tolist() == pytest.approx([4.0] * 5)


def test_hybrid_loss_trains_the_variance_alone_by_the_bound():
    ddpm, x0 = GaussianDiffusion(), torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = ddpm.at(x0, torch.randn_like(x0), torch.tensor([0, 1, 400, 999]))
    output = torch.zeros(4, 4, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ddpm.loss(output, batch)["vb"].sum(), output)
    assert grad[:, :2].abs().max() == 0
    assert (grad[:, 2:].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert grad.isfinite().all()
    losses = ddpm.loss(output, batch)
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])


def test_flow_ignores_extra_channels():
    flow, x = RectifiedFlow(), torch.randn(2, 3, 4, 4)
    batch = flow.noised(x, torch.randn_like(x), torch.rand(2, dtype=torch.float64))
    extra = torch.cat([batch.target, torch.full_like(x, 1e3)], dim=1)
    assert flow.loss(extra, batch)["loss"].tolist() == flow.loss(batch.target, batch)["mse"].tolist() == [0, 0]


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_bits_per_dim_against_a_slow_version(variance):
    T, generator = 25, torch.Generator().manual_seed(0)
    ddpm = GaussianDiffusion(T, variance=variance, loss="hybrid" if variance == "learned_range" else "mse")
    x0 = (torch.randint(256, (2, 1, 3, 3), generator=generator) / 127.5 - 1).double()
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # the open bins
    noises = torch.randn(T, *x0.shape, generator=generator)

    def denoise(x, t):
        return torch.cat([0.9 * x + 0.01 * t, 0.3 * x], dim=1)

    betas = [40 * (1e-4 + (2e-2 - 1e-4) * t / (T - 1)) for t in range(T)]
    power = [math.prod(1 - beta for beta in betas[:t]) for t in range(T + 1)]  # power[t]: signal power before step t
    vb = torch.zeros(2, T, dtype=torch.float64)
    for t, beta in enumerate(betas):
        x_t = math.sqrt(power[t + 1]) * x0 + math.sqrt(1 - power[t + 1]) * noises[t].double()
        eps, said = denoise(x_t, t).chunk(2, dim=1)
        x0_said = (x_t - math.sqrt(1 - power[t + 1]) * eps) / math.sqrt(power[t + 1])

        def posterior(x0, t=t, beta=beta, x_t=x_t):  # Bayes: q(x_{t-1} | x0) times q(x_t | x_{t-1}), by precisions
            before, after = 1 / max(1 - power[t], 1e-300), (1 - beta) / beta
            mean = before * math.sqrt(power[t]) * x0 + after * x_t / math.sqrt(1 - beta)
            return mean / (before + after), 1 / (before + after)

        small = posterior(x0, max(t, 1), betas[max(t, 1)])[1]
        fractions = {"learned_range": (said + 1) / 2, "fixed_small": 0 * said, "fixed_large": 0 * said + (t > 0)}
        fraction = fractions[variance]
        std = beta ** (fraction / 2) * small ** ((1 - fraction) / 2)
        p = Normal(posterior(x0_said)[0], std)
        if t > 0:
            bits = kl_divergence(Normal(posterior(x0)[0], math.sqrt(small)), p)
        else:
            upper = torch.where(x0 == 1, 1.0, p.cdf(x0 + 1 / 255))
            lower = torch.where(x0 == -1, 0.0, p.cdf(x0 - 1 / 255))
            bits = -(upper - lower).clamp(min=1e-12).log()
        vb[:, t] = bits.mean(dim=(1, 2, 3)) / math.log(2)
    end = Normal(math.sqrt(power[T]) * x0, math.sqrt(1 - power[T]))
    prior = kl_divergence(end, Normal(torch.zeros_like(x0), 1.0)).mean(dim=(1, 2, 3)) / math.log(2)

    draws = iter(noises)
    bound = ddpm.bits_per_dim(denoise, x0, lambda: next(draws))
    torch.testing.assert_close(bound["vb"][:, 1:].double(), vb[:, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bound["vb"][:, 0].double(), vb[:, 0], rtol=0.02, atol=0.02)  # the decoder's fitted cdf
    torch.testing.assert_close(bound["prior"].double(), prior, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bound["total"], bound["prior"] + bound["vb"].sum(1))


# Guidance


class Recorder:
    """A network whose output is 100 (class + 1) + its channel + t; remembers what it was asked."""

    def __init__(self, channels):
        self.channels, self.calls = channels, []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        assert t.dtype == torch.float32
        assert t.shape == y.shape == x.shape[:1]
        out = torch.arange(self.channels).view(1, -1, 1, 1) + (100.0 * (y + 1) + t).view(-1, 1, 1, 1)
        return out.expand(-1, -1, *x.shape[2:])


@pytest.mark.parametrize("channels, guided", [(3, 3), (None, 4), (1, 1), (9, 4)])
def test_guidance_mixes_the_first_channels(channels, guided):
    model, y, x = Recorder(8), torch.tensor([2, 5]), torch.randn(2, 4, 3, 3)
    out = classifier_free_guidance(model, y, 10, 1.5, channels, time_scale=1000.0)(x, 7.0)
    ((x2, t2, y2),) = model.calls  # one forward
    assert torch.equal(x2, torch.cat([x, x]))
    assert t2.tolist() == [7.0] * 4
    assert y2.tolist() == [2, 5, 10, 10]
    for i, label in enumerate((2, 5)):
        for c in range(8):
            conditional, null = 100 * (label + 1) + c + 7, 1100 + c + 7
            expected = null + 1.5 * (conditional - null) if c < guided else conditional
            assert out[i, c].unique().tolist() == [expected]


def test_guidance_interval_and_scale_1():
    x, y = torch.randn(2, 4, 3, 3), torch.tensor([1, 2])
    for scale_of_time in (1.0, 1000.0):
        model = Recorder(8)
        denoise = classifier_free_guidance(model, y, 3, 4.0, None, (0.25, 0.75), scale_of_time)
        outs = [denoise(x, scale_of_time * t) for t in (0.2, 0.25, 0.5, 0.75, 0.8)]
        assert [len(call[0]) for call in model.calls] == [2, 4, 4, 4, 2]
        assert torch.equal(outs[0], model(x, torch.full((2,), scale_of_time * 0.2), y))
    with pytest.raises(AssertionError, match="time_scale"):  # or else DDPM would run unguided without a word
        classifier_free_guidance(model, y, 3, 4.0)(x, 999.0)
    model = Recorder(4)
    out = classifier_free_guidance(model, y, 3, 1.0)(x, 0.5)
    assert [call[2].tolist() for call in model.calls] == [[1, 2]]
    assert torch.equal(out, model(x, torch.full((2,), 0.5), y))


# What users may get wrong


@pytest.mark.parametrize(
    "objective",
    [
        GaussianDiffusion(),
        GaussianDiffusion(500, "cosine", "v", "fixed_large", "mse"),
        RectifiedFlow(),
        RectifiedFlow("uniform", 3.0, 1000.0),
    ],
)
def test_config_round_trip(objective):
    config = json.loads(json.dumps(objective.config()))
    again = objective_from_config(config)
    assert type(again) is type(objective)
    assert again.config() == objective.config() == config
    assert again.time_scale == objective.time_scale
    x = torch.randn(3, 2, 2, 2)
    u = torch.rand(3, dtype=torch.float64)
    for one, two in zip(again.noised(x, x + 1, u), objective.noised(x, x + 1, u), strict=True):
        assert torch.equal(one, two)


X = torch.zeros(2, 4, 2, 2)
Y = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "message, action",
    [
        ("'euler' belongs to the objective 'rf'.*ddpm, ddim", lambda: fixed().sample(None, X, 10, "euler")),
        ("'ddim' belongs to the objective 'ddpm'.*heun", lambda: RectifiedFlow().sample(None, X, 10, "ddim")),
        ("unknown sampler 'plms'.*euler, heun", lambda: RectifiedFlow().sample(None, X, 10, "plms")),
        ("plain number.*'10,15'", lambda: RectifiedFlow().sample(None, X, "10,15")),
        ("plain number.*'ddim50'", lambda: fixed().sample(None, X, "ddim50", "dpm++")),
        ("plain number.*0", lambda: RectifiedFlow().sample(None, X, 0, "heun")),
        ("1000 different steps out of 1000", lambda: fixed().sample(None, X, 1000, "dpm++")),
        ("1001 steps out of 1000", lambda: spaced_timesteps(1000, 1001)),
        ("400 steps out of 333", lambda: spaced_timesteps(1000, "10,10,400")),
        ("exactly 300", lambda: spaced_timesteps(1000, "ddim300")),
        ("must read like.*'fast'", lambda: spaced_timesteps(1000, "fast")),
        ("must read like.*'10,,5'", lambda: spaced_timesteps(1000, "10,,5")),
        ("must read like.*0", lambda: spaced_timesteps(1000, 0)),
        ("must read like.*-5", lambda: spaced_timesteps(1000, -5)),
        ("must read like.*'ddim'", lambda: spaced_timesteps(1000, "ddim")),
        ("8 output channels for 4.*got 4", lambda: GaussianDiffusion().sample(lambda x, t: x, X, 10)),
        ("8 output channels for 4.*got 4", lambda: GaussianDiffusion().loss(X, GaussianDiffusion().at(X, X, Y))),
        ("got 4; use a fixed", lambda: GaussianDiffusion(loss="mse").loss(X, GaussianDiffusion().at(X, X, Y))),
        ("hybrid.*'fixed_small'", lambda: GaussianDiffusion(variance="fixed_small")),
        ("at least 21 time steps, got 20", lambda: GaussianDiffusion(20)),
        ("at least 2 time steps, got 1", lambda: GaussianDiffusion(1, "cosine")),
        ("unknown schedule 'linaer'.*linear", lambda: GaussianDiffusion(schedule="linaer")),
        ("unknown prediction 'noise'", lambda: GaussianDiffusion(prediction="noise")),
        ("unknown variance 'learned'", lambda: GaussianDiffusion(variance="learned")),
        ("unknown loss 'l1'", lambda: GaussianDiffusion(loss="l1")),
        ("unknown t distribution 'normal'", lambda: RectifiedFlow("normal")),
        ("positive, got 0", lambda: RectifiedFlow(shift=0)),
        ("positive, got 1.0 and -1", lambda: RectifiedFlow(time_scale=-1)),
        ("unknown objective 'edm'", lambda: objective_from_config({"name": "edm"})),
        ("unknown objective 'None'", lambda: objective_from_config({})),
        ("'rf' has no setting 'betas'", lambda: objective_from_config({"name": "rf", "betas": 1})),
        ("scale 4.0 needs a null class", lambda: classifier_free_guidance(None, Y, None, 4.0)),
        ("got 2.0 and 0.8, 0.2", lambda: classifier_free_guidance(None, Y, 1, 2.0, interval=(0.8, 0.2))),
        ("got nan", lambda: classifier_free_guidance(None, Y, 1, math.nan)),
    ],
)
def test_usage_errors(message, action):
    with pytest.raises(UsageError, match=message):
        action()


# -------------------------------------------------------------------------------------- what no other test would notice


def test_prior_of_the_bound():
    """KL from what is left of the data at the last step to pure noise, in bits per dimension."""
    diffusion = GaussianDiffusion(num_timesteps=30)
    diffusion.schedule = Schedule(torch.linspace(0.99, 0.5, 30, dtype=torch.float64))  # much is left of the data
    x0 = torch.rand(3, 2, 4, 4) * 2 - 1
    network = lambda x, t: torch.zeros(3, 4, 4, 4)  # noqa: E731
    prior = diffusion.bits_per_dim(network, x0, lambda: torch.randn(3, 2, 4, 4))["prior"]
    last = diffusion.schedule.step(29)
    expected = kl_divergence(Normal(last.signal * x0, last.noise_level), Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(prior, expected / math.log(2), rtol=1e-4, atol=1e-6)


def test_guidance_of_a_network_in_half_precision_rounds_once():
    conditional, null = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16()
    denoise = classifier_free_guidance(lambda x, t, y: torch.cat([conditional, null]), torch.zeros(2).long(), 1, 7.5)
    expected = null.float() + 7.5 * (conditional.float() - null.float())
    assert torch.equal(denoise(torch.zeros(2, 4, 3, 3), 0.5), expected)


def test_a_stride_counts_the_step_at_zero():
    assert spaced_timesteps(1000, "ddim334") == list(range(0, 1000, 3))
    with pytest.raises(UsageError, match="no whole stride takes exactly 333 steps"):
        spaced_timesteps(1000, "ddim333")
