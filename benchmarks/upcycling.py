"""Does upcycling help? A dense DiT-Nano/2 on the digits, continued densely, upcycled in several ways, and from scratch.

    python -m benchmarks.upcycling              # 3 seeds, about 10 minutes on one CPU core

Every variant sees the same batches, noises and times in the same order, starts with a fresh optimizer, and is judged by
its averaged weights on digits that no variant has seen, at fixed noises and times. Writes results/upcycling.json and
benchmarks/upcycling.png, and prints the table of benchmarks/RESULTS.md.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import cli
from benchmarks.digits_runs import MODEL, Point, train
from configuration import build_config
from models import DiT, count_parameters
from scripts.digits import split_digits
from upcycle import Recipe, break_symmetry, upcycle

SHAPE = dict(num_experts=8, num_experts_per_tok=2)

VARIANTS: dict[str, Recipe | str] = {  # what the second phase starts from
    "dense, continued": "dense",
    "upcycled": Recipe(**SHAPE),
    "upcycled, drop 0.5": Recipe(**SHAPE, drop_ratio=0.5),
    "upcycled, noise 0.1": Recipe(**SHAPE, expert_noise=0.1),
    "upcycled, zero router": Recipe(**SHAPE, routing="scale"),
    "upcycled, 2 slices": Recipe(num_experts=16, num_experts_per_tok=4, split=2),
    "MoE from scratch": "scratch",
}
STYLES = [
    dict(color="black"),
    dict(color="#0072b2"),
    dict(color="#d55e00"),
    dict(color="#56b4e9", linestyle="--"),
    dict(color="#cc79a7"),
    dict(color="#009e73", linestyle="--"),
    dict(color="#e69f00"),
]


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks.upcycling", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="runs of everything")
    parser.add_argument("--dense-steps", type=cli.positive_int, default=400, help="of the dense model, before")
    parser.add_argument("--steps", type=cli.positive_int, default=300, help="of each variant, after")
    parser.add_argument("--eval-every", type=cli.positive_int, default=25, help="steps between points of a curve")
    parser.add_argument("--json", type=Path, default=Path("results/upcycling.json"), help="curves of every run")
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/upcycling.png"), help="their picture")
    return parser


def main(args) -> None:
    if args.dense_steps % args.eval_every or args.steps % args.eval_every:
        raise cli.UsageError(f"--dense-steps and --steps must be multiples of --eval-every {args.eval_every}")
    torch.set_num_threads(1)
    began = time.perf_counter()
    training, held_out = split_digits()
    curves = {name: [] for name in ("dense", *VARIANTS)}  # name -> per seed, [(step, loss)]
    parameters = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        dense = DiT(build_config("DiT-Nano/2", **MODEL))
        curves["dense"].append(curve(train(dense, training, held_out, seed, 0, args.dense_steps, args.eval_every)))
        for name, start in VARIANTS.items():
            model = build(start, dense, seed)
            parameters[name] = count_parameters(model)
            # From scratch: as many steps as the dense model and its successors together, on the same batches.
            first = 0 if start == "scratch" else args.dense_steps
            last = args.dense_steps + args.steps
            curves[name].append(curve(train(model, training, held_out, seed, first, last, args.eval_every)))
            print(f"seed {seed}  {name:<24} {curves[name][-1][-1][1]:.4f}  {time.perf_counter() - began:4.0f} s")
    settings = {name: value for name, value in cli.values(args).items() if not isinstance(value, Path)}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"settings": settings, "curves": curves, "parameters": parameters}, indent=1))
    draw(curves, args.dense_steps, args.plot)
    print(table(curves, parameters, args.dense_steps, args.dense_steps + args.steps))
    fresh = mean_and_spread(losses_at(curves["MoE from scratch"], args.steps))
    print(f"MoE from scratch after {args.steps} steps, as many as the others had as a MoE: {fresh}")


def build(start: Recipe | str, dense: DiT, seed: int) -> DiT:
    """A model of its own memory: what `upcycle` takes over from the dense one must not be trained twice."""
    torch.manual_seed(seed)
    if start == "dense":
        model = DiT(dense.config)
        model.load_state_dict(dense.state_dict())
    elif start == "scratch":
        options = dict(num_shared_experts=0, expert_mlp="gelu", norm_topk_prob=True)
        model = DiT(build_config("DiT-Nano/2", **MODEL, **SHAPE, **options))
    else:
        generator = torch.Generator().manual_seed(seed)
        sparse = upcycle(dense, start, generator)
        break_symmetry(sparse, dense, start, generator)
        model = DiT(sparse.config)
        model.load_state_dict(sparse.state_dict())
    return model


# --------------------------------------------------------------------------------------------------------------- report

Curves = list[list[tuple[int, float]]]  # per seed


def curve(points: list[Point]) -> list[tuple[int, float]]:
    """(step, mean held-out loss)"""
    return [(point.step, point.losses.mean().item()) for point in points]


def losses_at(curves: Curves, step: int) -> np.ndarray:
    """(seeds,)"""
    return np.array([dict(curve)[step] for curve in curves])


def mean_and_spread(values: np.ndarray, digits: int = 4) -> str:
    """Over seeds: mean ± standard deviation."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=len(values) > 1):.{digits}f}"


def table(curves: dict[str, Curves], parameters: dict[str, tuple[int, int]], start: int, end: int) -> str:
    """The last column is paired: seed by seed, against the continued dense model, which saw the same batches."""
    lines = [
        f"| variant | parameters (activated) | loss at step {start} | at {end} | at {end}, less dense |",
        "|---|---|---|---|---|",
    ]
    baseline = losses_at(curves["dense, continued"], end)
    for name in VARIANTS:
        total, activated = parameters[name]
        final = losses_at(curves[name], end)
        columns = [f"{total / 1e6:.2f} M ({activated / 1e6:.2f} M)"]
        columns += [mean_and_spread(losses_at(curves[name], start)), mean_and_spread(final)]
        columns += [mean_and_spread(final - baseline)]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def draw(curves: dict[str, Curves], start: int, path: Path) -> None:
    """Left: the loss from the first step on. Right: what each variant gains on the continued dense model."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot(left, "dense, before", [step for step, _ in curves["dense"][0]], curves["dense"], color="0.3", linestyle=":")
    for name, style in zip(VARIANTS, STYLES, strict=True):
        steps = [step for step, _ in curves[name][0]]
        plot(left, name, steps, curves[name], **style)
        plot(right, name, [s for s in steps if s >= start], curves[name], curves["dense, continued"], **style)
    left.set(title="held-out loss", xlabel="training step", yscale="log", ylim=(0.24, 1.8))
    left.set_yticks([0.25, 0.3, 0.4, 0.6, 1.0, 1.6], labels=["0.25", "0.3", "0.4", "0.6", "1.0", "1.6"])
    left.minorticks_off()
    right.set(title="the same, minus that of the continued dense model", xlabel="training step", ylim=(-0.028, 0.02))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def plot(axes, label: str, steps: list[int], curves: Curves, baseline: Curves | None = None, **style) -> None:
    """Mean over seeds, in a band of one standard deviation; with `baseline`, of the differences seed by seed."""
    losses = np.stack([losses_at(curves, step) for step in steps])  # (steps, seeds)
    if baseline is not None:
        losses = losses - np.stack([losses_at(baseline, step) for step in steps])
    mean, spread = losses.mean(axis=1), losses.std(axis=1, ddof=losses.shape[1] > 1)
    axes.plot(steps, mean, label=label, linewidth=1.6, **style)
    axes.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


if __name__ == "__main__":
    cli.run(main, get_parser())
