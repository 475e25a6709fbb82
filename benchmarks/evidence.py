"""Mechanism checks on small images: experts, balance, samplers, parts of blocks, routers, optimizers, averages, guides.

    python -m benchmarks.evidence                        # every experiment, 3 seeds: six hours of one CPU core
    python -m benchmarks.evidence experts balance        # some; `--help` lists them
    python -m benchmarks.evidence routers --jobs 16      # several runs at a time, each in a process of one thread

A run (a row of `SETUPS`, with a seed) is kept in results/evidence/, so a killed command, given again, goes on where it
was, and tables and pictures are made again without training. Writes benchmarks/evidence_<experiment>.png. What a step
takes is measured for the table, networks taking turns: it does not matter what the machine did while they were trained.
"""

import functools
import itertools
import json
import multiprocessing
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import cli
from analysis.plan import flops, parameter_counts, tokens_per_image
from analysis.plots import LINE_COLOURS
from autoencoders import load_space
from benchmarks import harness
from benchmarks.digits_runs import ALPHA, BATCH, EMA_DECAY, FLOW, LR, MODEL, Learner, Point, evaluate, train
from benchmarks.endless import Endless, Patterns, Scenes
from benchmarks.scoring import Interval, PatternScorer, SceneScorer, Scorer, interval
from configuration import DiTConfig, build_config
from diffusion import GaussianDiffusion, RectifiedFlow
from files import replacing
from models import DiT
from optim import EMA
from post_hoc_ema import USUAL, PowerEMA, combined
from sampling import Settings, generate
from scripts.digits import Digits, split_digits

# The published proportions of routed to shared width, at 1/4 of the widths; blocks without experts are as dear.
BASE = dict(
    depth=4,
    mlp_ratio=3.75,
    num_experts=8,
    num_experts_per_tok=2,
    expert_ratio=1.0,
    num_shared_experts=1,
    shared_expert_ratio=0.5,
)
EVALUATIONS = (5, 10, 25, 50, 250)  # of the network; Heun's steps cost two, its last one
SWEEP_IMAGES = 200
JUDGED = {"euler 25": 600}  # the samples by which networks are compared: "sampler steps" -> images

STEP_ROUNDS = 21  # that the time of a training step is a median over


def steps_for(sampler: str, evaluations: int) -> int:
    return (evaluations + 1) // 2 if sampler == "heun" else evaluations


def sweep(objective) -> dict[str, int]:
    """What `Setup.samples` is where every sampler of an objective is compared."""
    return {f"{name} {steps_for(name, n)}": SWEEP_IMAGES for name in objective.samplers[:3] for n in EVALUATIONS}


class Guide(NamedTuple):
    """A weaker network to guide away from: one of its own, trained on the same batches."""

    part: float  # of the steps of the network that it guides
    model: dict  # over that network's


@dataclass(frozen=True)
class Setup:
    """What a run does; the defaults are 8 experts trained with rectified flow."""

    model: dict = field(default_factory=dict)  # over BASE
    objective: RectifiedFlow | GaussianDiffusion = FLOW
    alpha: float = ALPHA
    loss_scale: float | None = None
    accumulation: int = 1
    part: float = 1.0  # of the steps
    balance: tuple[str, ...] = ("aux",)
    scenes: bool = False  # endless scenes of four digits in place of 898 digits
    patterns: int = 0  # endless scenes of so many patterns in place of either
    samples: dict[str, int] = field(default_factory=lambda: JUDGED)  # "sampler steps" -> images
    optimizer: str = "adamw"
    lr: float = LR
    schedule: str = "constant"
    seeds: int | None = None  # no more than these, of a trial
    lengths: tuple[float, ...] = ()  # of averages that are made of the run afterwards
    guides: dict[str, Guide | None] = field(default_factory=dict)  # that it is drawn with afterwards; None: no label
    scales: tuple[float, ...] = ()  # of their guidance

    @property
    def learning(self) -> dict:
        """Options of `Learner`."""
        names = ("objective", "optimizer", "lr", "alpha", "loss_scale", "accumulation", "balance")
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> DiTConfig:
        data = PATTERNS if self.patterns else SCENES if self.scenes else MODEL
        return build_config("DiT-Nano/2", **(data | BASE | self.model))


SCENES = dict(input_size=16, patch_size=4, in_channels=3, num_classes=100)
PATTERNS = SCENES | dict(num_classes=10)


def routed(router: str, *balance: str, **more) -> Setup:
    """On endless scenes, somewhat longer; what a token costs is what it costs in the dense network.

    The rate falls to zero in the end: at a constant one the seeds differ by more than the networks do.
    """
    options = dict(part=1.25, balance=balance or ("none",), scenes=True, schedule="wsd")
    return Setup(dict(router=router) | more, **options)


ALWAYS_ON = dict(num_experts=1, num_experts_per_tok=1, expert_ratio=2.0)
MUON = dict(optimizer="muon", lr=2 * LR)
SOFTMAX = routed("softmax", "aux")
RATES = (2e-3, 4e-3, 8e-3)
TRIALS = {  # of learning rates
    f"{name}, {lr:g}": replace(SOFTMAX, optimizer=name.lower(), lr=lr, part=0.5, samples={}, seeds=1)
    for name in ("AdamW", "Muon")
    for lr in RATES
}
LENGTHS = (0.02, 0.05, 0.1, 0.2)
GUIDES = {"no label": None, "itself, earlier": Guide(0.5, {}), "smaller, earlier": Guide(0.25, dict(depth=2))}
SCALES = (1.5, 2.0)
LAST, NO_GUIDANCE = "no average", "no guidance"

ROUTING = dict(part=0.5, samples={})  # the load of experts settles early
SETUPS = {
    "8 experts": Setup(samples=sweep(FLOW) | JUDGED),
    "dense": Setup(dict(num_experts=0)),
    "1 expert": Setup(ALWAYS_ON),
    "4 experts": Setup(dict(num_experts=4)),
    "16 experts": Setup(dict(num_experts=16)),
    "8 experts, normalized": Setup(dict(norm_topk_prob=True)),  # weights of a token's experts sum to 1
    "alpha 0": Setup(alpha=0.0, **ROUTING),
    "alpha 0.01": Setup(alpha=0.01, **ROUTING),
    "alpha 0.05": Setup(alpha=0.05, **ROUTING),
    "scaled by 2^16": Setup(loss_scale=2.0**16, **ROUTING),
    "2 micro-batches": Setup(accumulation=2, **ROUTING),
    "DDPM, linear, eps": Setup(objective=GaussianDiffusion(), samples=sweep(GaussianDiffusion)),
    "DDPM, cosine, v": Setup(
        objective=GaussianDiffusion(schedule="cosine", prediction="v"), samples=sweep(GaussianDiffusion)
    ),
    "no shared expert": Setup(dict(num_shared_experts=0, expert_ratio=1.25)),
    "deep half": Setup(dict(moe_layers="deep-half")),
    "shallow half": Setup(dict(moe_layers="shallow-half")),
    "every second": Setup(dict(moe_layers="every-2")),
    "dense, scenes": routed("softmax", num_experts=0),
    "1 expert, scenes": routed("softmax", "none", **ALWAYS_ON),
    "softmax, 4": routed("softmax", "aux", num_experts=4),
    "softmax": SOFTMAX,
    "softmax, 16": routed("softmax", "aux", num_experts=16),
    "softmax, 16, shorter": replace(routed("softmax", "aux", num_experts=16), part=0.875),
    "sigmoid, bias": routed("sigmoid", "bias", norm_topk_prob=True, router_bias=True),
    "expert choice": routed("expert-choice"),
    "batch pool": routed("batch-pool"),
    "prototypes": routed("prototypes"),
    "softmax, twice the rate": replace(SOFTMAX, lr=2 * LR),  # the best of the trials, of both optimizers
    "softmax, Muon": replace(SOFTMAX, **MUON),
    "dense, Muon": replace(routed("softmax", num_experts=0), **MUON),
    "1 expert, Muon": replace(routed("softmax", "none", **ALWAYS_ON), **MUON),
    "softmax, 16, Muon": replace(routed("softmax", "aux", num_experts=16), **MUON),
    "softmax, 16, Muon, shorter": replace(routed("softmax", "aux", num_experts=16), part=0.875, **MUON),
    **TRIALS,
    "softmax, afterwards": replace(SOFTMAX, schedule="constant", lengths=LENGTHS, guides=GUIDES, scales=SCALES),
    "dense, longer": replace(routed("softmax", num_experts=0), part=2.0),
    "softmax, 16, longer": replace(routed("softmax", "aux", num_experts=16), part=2.0),
    "RoPE": Setup(dict(num_experts=0, positions="rope2d")),
    "SwiGLU": Setup(dict(num_experts=0, mlp="swiglu", mlp_multiple=8)),
    "RoPE, SwiGLU": Setup(dict(num_experts=0, positions="rope2d", mlp="swiglu", mlp_multiple=8)),
}
ROUTED = (
    *("dense, scenes", "1 expert, scenes", "softmax, 4", "softmax", "softmax, 16", "softmax, 16, shorter"),
    *("sigmoid, bias", "expert choice", "batch pool", "prototypes"),
)
NUMBERS = (30, 100, 300, 1000, 3000, 10_000)  # of patterns
AMONG = 1000  # at which all networks are compared


def on_patterns(name: str, count: int) -> str:
    return f"{name.removesuffix(', scenes')}, {count} patterns"


BY_NUMBER = ("dense, scenes", "softmax, 16", "softmax, 16, shorter")  # which are compared at all of them
SETUPS |= {
    on_patterns(name, count): replace(SETUPS[name], scenes=False, patterns=count)
    for count in NUMBERS
    for name in (ROUTED if count == AMONG else BY_NUMBER)
}
AT_TWICE = {  # the rate: for which of them is the usual one a handicap?
    f"{name}, twice the rate": replace(SETUPS[name], lr=2 * LR)
    for name in (on_patterns("dense, scenes", AMONG), on_patterns("softmax, 16", AMONG))
}
SETUPS |= AT_TWICE
EXPERIMENTS = {
    "experts": ("dense", "1 expert", "4 experts", "8 experts", "16 experts", "8 experts, normalized"),
    "balance": ("alpha 0", "8 experts", "alpha 0.01", "alpha 0.05", "scaled by 2^16", "2 micro-batches"),
    "samplers": ("8 experts", "DDPM, linear, eps", "DDPM, cosine, v"),
    "places": ("8 experts", "no shared expert", "deep half", "shallow half", "every second", "dense"),
    "routers": ROUTED,
    "patterns": (*(on_patterns(name, AMONG) for name in ROUTED), *AT_TWICE),
    "memory": tuple(on_patterns(name, count) for count in NUMBERS for name in BY_NUMBER),
    "parts": ("dense", "RoPE", "SwiGLU", "RoPE, SwiGLU"),  # dense: a table of sine and cosine, GELU
    "muon": ("dense, Muon", "1 expert, Muon", "softmax, Muon", "softmax, 16, Muon", "softmax, 16, Muon, shorter"),
    "longer": ("dense, longer", "softmax, 16, longer"),
    "optimizers": ("softmax", "softmax, twice the rate", "softmax, Muon", *TRIALS),
    "averages": ("softmax, afterwards",),
    "guides": ("softmax, afterwards",),
}


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="runs of everything")
    parser.add_argument(
        "--steps", type=cli.positive_int, default=800, help="of a run; some go on for a part or a multiple"
    )
    parser.add_argument("--eval-every", type=cli.positive_int, default=50, help="steps between points of a curve")
    parser.add_argument("--jobs", type=cli.positive_int, default=1, help="runs at a time, on a core each")
    parser.add_argument("--runs", type=Path, default=Path("results/evidence"), help="folder of finished runs")
    parser.add_argument("--pictures", type=Path, default=Path("benchmarks"), help="folder of evidence_*.png")
    return parser


def main(args) -> None:
    torch.set_num_threads(1)
    chosen = args.experiments or list(EXPERIMENTS)
    for name in chosen:
        if name not in EXPERIMENTS:
            raise cli.unknown_name("experiment", name, EXPERIMENTS)
    if args.steps % (2 * args.eval_every):
        raise cli.UsageError(f"--steps {args.steps} must be a multiple of twice --eval-every {args.eval_every}")
    names = list(dict.fromkeys(name for experiment in chosen for name in EXPERIMENTS[experiment]))
    runs = all_runs(names, args)
    for experiment in chosen:
        scorer = scorer_of(SETUPS[EXPERIMENTS[experiment][0]])
        table, figure = REPORTS[experiment]({name: runs[name] for name in EXPERIMENTS[experiment]}, scorer)
        with replacing(args.pictures / f"evidence_{experiment}.png") as file:
            figure.savefig(file, format="png", dpi=150)
        print(f"\n{experiment}\n\n{table}")


# ----------------------------------------------------------------------------------------------------------------- runs


LATER = {  # fields that runs of before do not name
    *("balance", "scenes", "patterns", "optimizer", "lr", "schedule", "seeds", "lengths", "guides", "scales")
}
Run = dict[str, np.ndarray]
Runs = dict[str, list[Run]]  # setup -> per seed


def all_runs(names: Sequence[str], args) -> Runs:
    """Of these setups, `--jobs` at a time; a killed command loses those that were under way."""
    wanted = [(seed, name) for seed in range(args.seeds) for name in names if seed < (SETUPS[name].seeds or seed + 1)]
    seeds, setups = zip(*wanted, strict=True)
    work = functools.partial(cached_run, args=args)
    if args.jobs == 1:
        found = list(map(work, setups, seeds))
    else:  # forked: nothing has computed yet, and they need not import all this again
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
            found = list(pool.map(work, setups, seeds))
    return {name: [run for run, setup in zip(found, setups, strict=True) if setup == name] for name in names}


def cached_run(name: str, seed: int, args) -> Run:
    """The run of `--runs`, trained now if it is not there, or was made with other settings.

    Arrays of the curve's P points: steps (P,), seconds (P,), losses (P, N), load (P, L, E); and images (n, H, W, 3)
    uint8 for each "sampler steps". Of what was done afterwards: "losses <average>" (N,), "images <average>",
    "images <guide> <scale>".
    """
    setup = SETUPS[name]
    usual = {name: value for name, value in vars(Setup()).items() if name in LATER}
    settings = {name: value for name, value in vars(setup).items() if name not in usual or usual[name] != value}
    settings |= {"model": setup.config.to_dict(), "objective": setup.objective.config()}
    steps = round(setup.part * args.steps)
    settings = json.dumps(settings | {"steps": steps, "eval_every": args.eval_every})
    path = args.runs / f"{name.replace(',', '').replace(' ', '-')}-{seed}.npz"
    if path.is_file():
        try:
            with np.load(path) as file:
                if file["settings"].item() == settings:
                    return dict(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise cli.UsageError(f"{path} is not a finished run: delete it, and it is trained again") from None
    arrays = run(setup, seed, steps, args.eval_every)
    args.runs.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, settings=settings, **arrays)
    loss, seconds = arrays["losses"][-1].mean(), arrays["seconds"][-1]
    line = f"seed {seed}  {name:<19} loss {loss:.4f}  {seconds:.0f} s of training\n"
    print(line, end="", flush=True)  # in one piece: several processes say theirs
    return arrays


def run(setup: Setup, seed: int, last: int, eval_every: int) -> Run:
    training, held_out = data_of(setup)
    model = new_network(setup, seed)
    powers = [PowerEMA(model, length) for length in USUAL if setup.lengths]
    averages = [*powers, EMA(model, 0.0)] if powers else []  # the last one: no average at all
    options = dict(draws=1, averages=averages, schedule=setup.schedule, **setup.learning)
    points = train(model, training, held_out, seed, 0, last, eval_every, **options)
    model.eval()
    arrays = {
        "steps": np.array([point.step for point in points]),
        "seconds": np.array([point.seconds for point in points]),
        "losses": np.stack([point.losses.numpy() for point in points]),
        "load": np.stack([point.load.numpy() for point in points]),
    }
    for sampler, count in setup.samples.items():
        arrays[sampler] = sample(model, setup.objective, sampler, count, seed)
    if setup.scenes:
        arrays["losses, other writers"] = evaluate(model, setup.objective, Scenes(split_digits()[1]), draws=1)[
            0
        ].numpy()
        model.eval()
    (judged,) = JUDGED.items()
    for name, guide in setup.guides.items():
        weaker = None if guide is None else weaker_network(setup, guide, seed, last)
        for scale in setup.scales:
            arrays[f"images {name} {scale:g}"] = sample(model, setup.objective, *judged, seed, scale, weaker)
    for name, weights in averages_of(points, powers, setup.lengths).items():
        model.load_state_dict(weights, strict=False)
        arrays[f"losses {name}"] = evaluate(model, setup.objective, held_out, draws=1)[0].numpy()
        model.eval()
        arrays[f"images {name}"] = sample(model, setup.objective, *judged, seed)
    return arrays


def data_of(setup: Setup) -> tuple[Digits, Digits] | tuple[Endless, Endless]:
    """(to learn from, held out). Of scenes that are held out a network has seen the digits, and no scene twice."""
    if setup.patterns:
        return (Patterns(setup.patterns),) * 2
    training, held_out = split_digits()
    return (Scenes(training), Scenes(training)) if setup.scenes else (training, held_out)


@functools.cache
def made_scorer(patterns: int, scenes: bool) -> Scorer:
    return PatternScorer(patterns) if patterns else SceneScorer() if scenes else Scorer()


def scorer_of(setup: Setup) -> Scorer:
    return made_scorer(setup.patterns, setup.scenes)


def new_network(setup: Setup, seed: int) -> DiT:
    torch.manual_seed(seed)
    return DiT(setup.config)


def averages_of(points: list[Point], powers: list[PowerEMA], lengths: Sequence[float]) -> dict[str, dict[str, Tensor]]:
    """Weights of the end of a run: as they are, and averages of several lengths, made of those that were kept along."""
    if not lengths:
        return {}
    snapshots = [
        (point.step, power.gamma, tensors)
        for point in points
        for power, tensors in zip(powers, point.averages, strict=False)
    ]
    averages = {f"length {length:g}": combined(snapshots, length) for length in lengths}
    return {LAST: points[-1].averages[-1]} | averages


def weaker_network(setup: Setup, guide: Guide, seed: int, steps: int) -> DiT:
    weaker = replace(setup, model=setup.model | guide.model)
    model, steps = new_network(weaker, seed), round(guide.part * steps)
    train(model, *data_of(weaker), seed, 0, steps, steps, draws=1, schedule=weaker.schedule, **weaker.learning)
    return model.eval()


def sample(model: DiT, objective, name: str, count: int, seed: int, scale: float = 1.0, guide: DiT | None = None):
    """(count, H, W, 3) uint8, by "sampler steps", of the labels 0, 1, 2, ..., 0, ...; without guidance at scale 1."""
    sampler, steps = name.split()
    settings = Settings(steps, sampler, cfg_scale=scale, seed=seed)
    labels = [index % model.config.num_classes for index in range(count)]
    drawn = generate(model, objective, load_space("none"), labels, settings, guide=guide, batch_size=150)
    return np.concatenate(list(drawn))


# ----------------------------------------------------------------------------------------------------------- statistics


def stacked(runs: list[Run], key: str) -> np.ndarray:
    """(S, ...) of the runs of S seeds."""
    return np.stack([run[key] for run in runs])


def load_cv(runs: list[Run]) -> np.ndarray:
    """(S, P) coefficient of variation of what the experts of a layer get, mean over layers."""
    load = stacked(runs, "load")  # (S, P, L, E)
    return (load.std(axis=3) / load.mean(axis=3)).mean(axis=2)


def dead_experts(runs: list[Run]) -> np.ndarray:
    """(S, P) experts, over all layers, that get less than 1 % of an even share."""
    load = stacked(runs, "load")
    return (load < 0.01 * load.mean(axis=3, keepdims=True)).sum(axis=(2, 3))


def step_seconds(names: Iterable[str], to: str) -> dict[str, float]:
    """CPU time of a training step of each setup, in proportion to that of one of them: all take turns."""
    ways, numbers = {}, itertools.count()
    for name in names:
        learner = Learner(new_network(SETUPS[name], 0), data_of(SETUPS[name])[0], 0, **SETUPS[name].learning)
        ways[name] = functools.partial(lambda learner: learner.step(next(numbers)), learner)
    times = harness.measure(ways, torch.device("cpu"), STEP_ROUNDS)
    return {name: times.median(to) * times.ratio(name, to) for name in ways}


# -------------------------------------------------------------------------------------------------------------- reports

LOSSES = (0.25, 0.3, 0.4, 0.6, 1.0, 1.3, 1.6)  # named on logarithmic axes
DISTANCES = (1, 1.5, 2, 3, 4, 5)
COLORS = (*LINE_COLOURS, "#8c510a", "#6a3d9a", "#1b7837", "#b2182b")


def said(name: str) -> str:
    """Of a setup, without what all of a table share."""
    return name.replace(f", {AMONG} patterns", "").removesuffix(", scenes")


def report_experts(runs: Runs, scorer: Scorer, to: str = "dense") -> tuple[str, Figure]:
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    (over_steps, over_flops), (over_time, difference) = figure.subplots(2, 2)
    seconds, beginning = step_seconds(runs, to), 0.0
    for (name, mine), color in zip(runs.items(), COLORS, strict=False):
        steps, losses = mine[0]["steps"], stacked(mine, "losses")  # (P,), (S, P, N)
        per_seed = losses.mean(axis=2, keepdims=True)
        teraflops = steps * BATCH * flops(SETUPS[name].config).training / 1e12
        for axes, x in ((over_steps, steps), (over_flops, teraflops), (over_time, steps * seconds[name])):
            band(axes, x, per_seed, said(name), color)
        beginning = max(beginning, per_seed.mean(axis=0)[len(steps) // 8, 0])
        if len(steps) == len(runs[to][0]["steps"]):
            band(difference, steps, losses - stacked(runs[to], "losses"), said(name), color)
    over_steps.set(xlabel="training step", ylabel="held-out loss")
    over_flops.set(xlabel="training compute (TFLOP)", ylabel="held-out loss")
    over_time.set(xlabel="training time (CPU seconds of one core)", ylabel="held-out loss")
    difference.set(xlabel="training step", ylabel=f"held-out loss, less that of {said(to)}")
    for axes in (over_steps, over_flops, over_time):
        axes.set_yscale("log")
        axes.set_yticks(LOSSES, labels=map(str, LOSSES))
        axes.minorticks_off()
        axes.set_ylim(0.98 * min(run["losses"].mean(axis=1).min() for mine in runs.values() for run in mine), beginning)
    finish(figure, over_steps)
    whole = {name: mine[0]["steps"][-1] * seconds[name] for name, mine in runs.items()}
    more = [
        (f"time of training, over {said(to)}", [f"{each / whole[to]:.2f}" for each in whole.values()]),
        *of_load(runs),
    ]
    if all("losses, other writers" in run for mine in runs.values() for run in mine):
        others = {name: stacked(mine, "losses, other writers") for name, mine in runs.items()}
        more += [("loss, other writers", [f"{each.mean():.4f}" for each in others.values()])]
        more += [(f"less {said(to)}", [versus(others, name, to) for name in runs])]
    return comparison(runs, to, scorer, seconds, more), figure


def report_memory(runs: Runs, scorer: Scorer) -> tuple[str, Figure]:
    """How far mixtures are ahead of the dense network, by how much there is to learn by heart; each has its scorer."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = ahead, right = figure.subplots(1, 2)
    losses, shares, (to, *mixtures) = {}, {}, BY_NUMBER
    for name, color in zip(BY_NUMBER, COLORS, strict=False):
        each = {count: runs[on_patterns(name, count)] for count in NUMBERS}
        losses[name] = np.stack([stacked(mine, "losses")[:, -1] for mine in each.values()], axis=1)  # (S, numbers, N)
        shares[name] = np.stack([recognised(mine, made_scorer(count, False)) for count, mine in each.items()], axis=1)
        for axes, values in ((ahead, losses[name] - losses[to]), (right, shares[name])):
            band(axes, np.array(NUMBERS), values, said(name), color, marker="o", markersize=4)
    ahead.set(xlabel="patterns", ylabel="held-out loss, less that of dense")
    right.set(xlabel="patterns", ylabel="share of cells that show\na pattern of their label")
    for axes in panels:
        axes.set(xscale="log")
    finish(figure, right)
    seconds = step_seconds([on_patterns(name, AMONG) for name in BY_NUMBER], on_patterns(to, AMONG))
    whole = {name: SETUPS[name].part * seconds[on_patterns(name, AMONG)] for name in BY_NUMBER}
    header = [
        "patterns",
        "loss, dense",
        *(f"{name} ({whole[name] / whole[to]:.2f} of its time), less dense" for name in mixtures),
    ]
    header += [f"recognised, {said(name)}" for name in BY_NUMBER]
    rows = [
        [
            *(f"{count:,}", f"{losses[to][:, place].mean():.4f}"),
            *(interval(losses[name][:, place] - losses[to][:, place]) for name in mixtures),
            *(f"{shares[name][:, place].mean():.1%}" for name in BY_NUMBER),
        ]
        for place, count in enumerate(NUMBERS)
    ]
    return markdown(header, rows), figure


def report_differences(runs: Runs, scorer: Scorer, to: str) -> tuple[str, Figure]:
    """Losses and distances less those of one of them."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_steps, final = figure.subplots(1, 2)
    baseline = runs[to]
    for place, ((name, mine), color) in enumerate(zip(runs.items(), COLORS, strict=False)):
        difference = stacked(mine, "losses") - stacked(baseline, "losses")
        half = len(mine[0]["steps"]) // 2  # before, seeds differ more than places
        band(over_steps, mine[0]["steps"][half:], difference[:, half:], name, color)
        distances = distance(mine, scorer) - distance(baseline, scorer)
        mean, low, high = interval(distances)
        final.plot([low, high], [place, place], color=color)
        final.plot(distances[:, 0], [place] * len(distances), "o", color=color, markersize=4, alpha=0.5)
        final.plot(mean, place, "D", color=color)
    over_steps.set(xlabel="training step", ylabel=f"held-out loss, less that of {to}")
    final.set(xlabel=f"Fréchet distance of samples, less that of {to}")
    final.locator_params(axis="x", nbins=6)
    final.set_yticks(range(len(runs)), labels=runs)
    final.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    final.invert_yaxis()
    finish(figure, over_steps)
    return comparison(runs, to, scorer, step_seconds(runs, to)), figure


def report_optimizers(runs: Runs, scorer: Scorer) -> tuple[str, Figure]:
    """Whole runs, and the trials that their learning rates are from."""
    whole, figure = report_experts({name: mine for name, mine in runs.items() if name not in TRIALS}, scorer, "softmax")
    rows = {}
    for name in TRIALS:
        rows.setdefault(name.partition(",")[0], []).append(f"{runs[name][0]['losses'][-1].mean():.4f}")
    steps = runs[next(iter(TRIALS))][0]["steps"][-1]
    header = [f"loss of seed 0 after {steps} steps", *(f"learning rate {lr:g}" for lr in RATES)]
    return f"{whole}\n\n{markdown(header, [[name, *cells] for name, cells in rows.items()])}", figure


def report_averages(runs: Runs, scorer: Scorer) -> tuple[str, Figure]:
    """What averages of the weights are worth, all of the same run."""
    (mine,) = runs.values()
    lengths = {f"length {length:g}": length for length in LENGTHS}
    (sampler,) = JUDGED
    made = {
        name: [dict(losses=run[f"losses {name}"][None]) | {sampler: run[f"images {name}"]} for run in mine]
        for name in (LAST, *lengths)
    }
    usual = {f"decay {EMA_DECAY:g}": [dict(losses=run["losses"][-1:]) | {sampler: run[sampler]} for run in mine]}
    made = {LAST: made[LAST]} | usual | made
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    measures = (lambda each: stacked(each, "losses")[:, -1], functools.partial(distance, scorer=scorer))
    for axes, measure in zip(panels, measures, strict=True):
        values = np.stack([measure(made[name]) for name in lengths], axis=1)
        band(axes, np.array(LENGTHS), values, "power function", COLORS[1])
        for name, style, color in ((LAST, ":", COLORS[0]), (*usual, "--", COLORS[2])):
            axes.axhline(measure(made[name]).mean(), label=name, color=color, linestyle=style)
        axes.set(xlabel="length of the average, over that of the training", xscale="log")
        axes.set_xticks(LENGTHS, labels=map(str, LENGTHS))
        axes.minorticks_off()
    panels[0].set(ylabel="held-out loss")
    panels[1].set(ylabel="Fréchet distance")
    finish(figure, panels[0])
    return table(made, [*of_losses(made, LAST), *of_samples(made, LAST, scorer)], scorer, "weights"), figure


def report_guides(runs: Runs, scorer: Scorer) -> tuple[str, Figure]:
    """Samples of one network, guided away from several."""
    (mine,), (sampler,) = runs.values(), JUDGED
    drawn = {NO_GUIDANCE: [{sampler: run[sampler]} for run in mine]}
    for guide, scale in itertools.product(GUIDES, SCALES):
        drawn[f"{guide}, {scale:g}"] = [{sampler: run[f"images {guide} {scale:g}"]} for run in mine]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = far, right = figure.subplots(1, 2)
    for guide, color in zip(GUIDES, COLORS[1:], strict=False):
        ways = [drawn[name] for name in (NO_GUIDANCE, *(f"{guide}, {scale:g}" for scale in SCALES))]
        for axes, measure in zip(panels, (distance, recognised), strict=True):
            values = np.stack([measure(each, scorer) for each in ways], axis=1)
            band(axes, np.array([1.0, *SCALES]), values, guide, color, marker="o", markersize=4)
    far.set(xlabel="guidance scale", ylabel="Fréchet distance")
    right.set(xlabel="guidance scale", ylabel="share recognised")
    finish(figure, far)
    return table(drawn, of_samples(drawn, NO_GUIDANCE, scorer), scorer, "guided away from, scale"), figure


def report_balance(runs: Runs, scorer: Scorer) -> tuple[str, Figure]:
    figure = Figure(figsize=(11, 4), layout="constrained")
    cv, dead, difference = figure.subplots(1, 3)
    steps = runs["alpha 0"][0]["steps"]  # 8 experts went on, for the other experiments
    points = len(steps)
    baseline = stacked(runs["8 experts"], "losses")[:, :points]
    rows = []
    for (name, mine), color in zip(runs.items(), COLORS, strict=False):
        setup, losses = SETUPS[name], stacked(mine, "losses")[:, :points]
        label = f"α = {setup.alpha:g}" + (f", {name}" if setup.loss_scale or setup.accumulation > 1 else "")
        style = dict(linestyle="--" if setup.loss_scale else ":" if setup.accumulation > 1 else "-")
        loads, deads = load_cv(mine)[:, :points, None], dead_experts(mine)[:, :points, None]
        for axes, values in ((cv, loads), (dead, deads), (difference, losses - baseline)):
            band(axes, steps, values, label, color, **style)
        ends = [interval(loads[:, -1]), f"{deads[:, -1].mean():.1f}", f"{losses[:, -1].mean():.4f}"]
        against = interval((losses - baseline)[:, -1]), f"{np.abs(losses - baseline).max():.1e}"
        rows.append([label, *ends, *(against if mine is not runs["8 experts"] else ("", ""))])
    experts = runs["8 experts"][0]["load"][0].size
    cv.set(xlabel="training step", ylabel="coefficient of variation of load")
    dead.set(xlabel="training step", ylabel=f"dead experts, of {experts}")
    difference.set(xlabel="training step", ylabel="held-out loss, less that of α = 0.005")
    finish(figure, cv)
    header = ["run", "load CV", f"dead experts of {experts}", "loss", "less α = 0.005", "largest difference"]
    return markdown(header, rows), figure


def report_samplers(runs: Runs, scorer: Scorer) -> tuple[str, Figure]:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    distances, shares = figure.subplots(1, 2)
    rows = []
    for (name, mine), color in zip(runs.items(), COLORS, strict=False):
        objective = SETUPS[name].objective
        for sampler, line, marker in zip(objective.samplers[:3], ("-", "--", ":"), "os^", strict=True):
            label = f"{'flow' if objective is FLOW else name}, {sampler}"
            style = dict(color=color, linestyle=line, marker=marker, markersize=4)
            drawn = [[run[f"{sampler} {steps_for(sampler, n)}"][:SWEEP_IMAGES] for run in mine] for n in EVALUATIONS]
            evaluations = [2 * steps_for(sampler, n) - 1 if sampler == "heun" else n for n in EVALUATIONS]
            far = [interval(np.array([[scorer.distance(images)] for images in each])) for each in drawn]
            right = [interval(np.stack([scorer.recognised(images) for images in each])) for each in drawn]
            for axes, points in ((distances, far), (shares, right)):
                mean, low, high = np.array(points).T
                axes.plot(evaluations, mean, label=label, **style)
                axes.fill_between(evaluations, low, high, color=color, alpha=0.15, linewidth=0)
            rows.append([label, *(f"{a.mean:.2f} · {b.mean:.1%}" for a, b in zip(far, right, strict=True))])
    real = scorer.distance(scorer.real[:SWEEP_IMAGES])
    distances.axhline(real, color="0.5", linewidth=0.8, linestyle=":", label=f"{SWEEP_IMAGES} real digits")
    distances.set(xlabel="network evaluations", ylabel="Fréchet distance to held-out digits", yscale="log")
    shares.set(xlabel="network evaluations", ylabel="share recognised as the digit asked for")
    distances.set_yticks(DISTANCES, labels=map(str, DISTANCES))
    for axes in (distances, shares):
        axes.set_xscale("log")
        axes.set_xticks(EVALUATIONS, labels=map(str, EVALUATIONS))
        axes.minorticks_off()
    finish(figure, distances)
    rows.append([f"{SWEEP_IMAGES} real digits", *[f"{real:.2f}"] * len(EVALUATIONS)])
    return markdown(["objective, sampler", *(f"{n} evaluations" for n in EVALUATIONS)], rows), figure


REPORTS = {
    "experts": report_experts,
    "balance": report_balance,
    "samplers": report_samplers,
    "routers": functools.partial(report_experts, to="dense, scenes"),
    "longer": functools.partial(report_experts, to="dense, longer"),
    "patterns": functools.partial(report_experts, to=on_patterns("dense, scenes", AMONG)),
    "memory": report_memory,
    "muon": functools.partial(report_experts, to="dense, Muon"),
    "places": functools.partial(report_differences, to="8 experts"),
    "parts": functools.partial(report_differences, to="dense"),
    "optimizers": report_optimizers,
    "averages": report_averages,
    "guides": report_guides,
}

# -------------------------------------------------------------------------------------------------- tables and pictures


Columns = list[tuple[str, list]]  # (header, a cell for each of some runs)


def comparison(runs: Runs, to: str, scorer: Scorer, seconds: dict[str, float], more: Columns = ()) -> str:
    """Networks by what they cost, their loss and their samples; `more` after the losses."""
    columns = [*of_costs(runs, seconds), *of_losses(runs, to), *more, *of_samples(runs, to, scorer)]
    return table(runs, columns, scorer)


def of_costs(runs: Runs, seconds: dict[str, float]) -> Columns:
    configs = [SETUPS[name].config for name in runs]
    counts = [parameter_counts(config) for config in configs]
    per_token = [flops(config).forward / tokens_per_image(config) for config in configs]
    return [
        ("parameters (activated)", [f"{each.total / 1e6:.2f} M ({each.activated / 1e6:.2f} M)" for each in counts]),
        ("MFLOP a token", [f"{each / 1e6:.3f}" for each in per_token]),
        ("CPU a step", [f"{1000 * seconds[name]:.0f} ms" for name in runs]),
    ]


def of_losses(runs: Runs, to: str) -> Columns:
    """The last ones."""
    losses = {name: stacked(mine, "losses")[:, -1] for name, mine in runs.items()}
    return [
        ("loss", [f"{each.mean():.4f}" for each in losses.values()]),
        (f"less {said(to)}", [versus(losses, name, to) for name in runs]),
    ]


def of_load(runs: Runs) -> Columns:
    """In the end, of the experts that tokens compete for."""
    cells = {"load CV": [], "dead experts": []}
    for name, mine in runs.items():
        count = SETUPS[name].config.num_experts
        ends = [{"load": run["load"][-1:, :, :count]} for run in mine]  # a last one may be of unconditional images
        cells["load CV"].append(f"{load_cv(ends).mean():.3f}" if count else None)
        cells["dead experts"].append(f"{dead_experts(ends).mean():.1f} of {ends[0]['load'].size}" if count else None)
    return list(cells.items())


def of_samples(runs: Runs, to: str, scorer: Scorer) -> Columns:
    far = {name: distance(mine, scorer) for name, mine in runs.items()}
    right = {name: recognised(mine, scorer) for name, mine in runs.items()}
    return [
        ("recognised", [f"{each.mean():.1%}" for each in right.values()]),
        (f"less {said(to)}", [versus(right, name, to) for name in runs]),
        ("Fréchet distance", [f"{each.mean():.3f}" for each in far.values()]),
        (f"less {said(to)}", [versus(far, name, to) for name in runs]),
    ]


def versus(values: dict[str, np.ndarray], name: str, to: str) -> Interval | None:
    """The paired difference of (S, N) each."""
    return interval(values[name] - values[to]) if name != to else None


def judged(runs: list[Run]) -> list[np.ndarray]:
    """The samples by which networks are compared, of each seed."""
    (name,) = JUDGED
    return [run[name] for run in runs]


def recognised(runs: list[Run], scorer: Scorer) -> np.ndarray:
    """(S, N)"""
    return np.stack([scorer.recognised(images) for images in judged(runs)]).astype(float)


def distance(runs: list[Run], scorer: Scorer) -> np.ndarray:
    """(S, 1)"""
    return np.array([[scorer.distance(images)] for images in judged(runs)])


def table(runs: Runs, columns: Columns, scorer: Scorer, what: str = "run") -> str:
    """A row for each run, and one of real images."""
    header, cells = zip(*columns, strict=True)
    rows = [[said(name), *row] for name, row in zip(runs, zip(*cells, strict=True), strict=True)]
    (images,) = JUDGED.values()
    real = {"Fréchet distance": f"{scorer.distance(scorer.real[:images]):.3f}"}
    rows.append([f"{images} real ones", *(real.get(each) for each in header)])
    return markdown([what, *header], rows)


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def band(axes, x: np.ndarray, values: np.ndarray, label: str, color: str, **style) -> None:
    """The mean of values (S, P, N) over x (P,), in its 95 % interval."""
    mean, low, high = np.array([interval(values[:, point]) for point in range(len(x))]).T
    axes.plot(x, mean, label=label, color=color, linewidth=1.6, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def finish(figure: Figure, legend_of) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = legend_of.get_legend_handles_labels()
    columns = 4 if len(labels) > 10 else 5
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


if __name__ == "__main__":
    cli.run(main, get_parser())
