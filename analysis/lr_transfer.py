"""Does a learning rate of a narrow model suit a wide one? Widths x learning rates x seeds, on the digits.

    python -m analysis.lr_transfer                       # dense and MoE, standard and muP: an hour of two CPU cores
    python -m analysis.lr_transfer --kinds dense --widths 32 64 --seeds 1 --processes 1

Each run is kept in results/lr_transfer/, so a killed command, given again, goes on where it was, and several commands,
on machines that share the folder, share the work. Writes a table, benchmarks/lr_transfer.png and .json.
"""

import itertools
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import cli
from benchmarks.digits_runs import BATCH, MODEL, train
from configuration import DiTConfig, build_config
from files import replace_json, replacing
from models import DiT
from parametrization import PARAMETRIZATIONS
from scripts.digits import split_digits

HEAD = 16  # of every width
KINDS = {  # what blocks are made of; experts in the published proportions, at a quarter of the widths
    "dense": dict(num_experts=0),
    "MoE": dict(num_experts=8, num_experts_per_tok=2, expert_ratio=1.0, num_shared_experts=1, shared_expert_ratio=0.5),
}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    kind: str  # a key of KINDS
    parametrization: str
    width: int
    loglr: float
    seed: int
    steps: int
    base_width: int

    @property
    def config(self) -> DiTConfig:
        base = {} if self.parametrization == "standard" else {"base_width": self.base_width}
        sizes = dict(hidden_size=self.width, num_heads=self.width // HEAD, parametrization=self.parametrization)
        return build_config("DiT-Nano/2", **(MODEL | KINDS[self.kind] | sizes | base))

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.parametrization}-w{self.width}-lr{self.loglr:g}-seed{self.seed}.json"


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m analysis.lr_transfer", description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="dense, MoE")
    parser.add_argument("--parametrizations", nargs="+", choices=PARAMETRIZATIONS, default=["standard", "mup"])
    parser.add_argument("--widths", nargs="+", type=cli.positive_int, default=[32, 64, 128], help="the first: base")
    parser.add_argument(
        *("--loglrs", "--loglr"),
        nargs="+",
        type=cli.number_in(-30, 10),
        default=[-10, -9, -8, -7, -6, -5, -4],
        help="learning rates, as powers of 2",
    )
    parser.add_argument("--seeds", type=cli.positive_int, default=2, help="runs of everything")
    parser.add_argument("--steps", type=cli.positive_int, default=300, help=f"of each run, of {BATCH} images")
    parser.add_argument("--processes", type=cli.positive_int, default=os.cpu_count(), help="that train at a time")
    parser.add_argument("--runs", type=Path, default=Path("results/lr_transfer"), help="folder of finished runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/lr_transfer.png"), help=".json goes beside it")
    return parser


def main(args) -> None:
    if wrong := [width for width in args.widths if width % HEAD]:
        raise cli.UsageError(f"--widths {wrong[0]} is no multiple of the size of a head, {HEAD}")
    loglrs, widths = sorted(set(args.loglrs)), sorted(set(args.widths))
    grid = itertools.product(range(args.seeds), args.kinds, args.parametrizations, widths, loglrs)
    trials = [
        Trial(kind, how, width, float(loglr), seed, args.steps, widths[0]) for seed, kind, how, width, loglr in grid
    ]
    try:
        args.runs.mkdir(parents=True, exist_ok=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UsageError(f"--runs {args.runs} or --output {args.output} cannot be written: {error}") from None
    losses = {trial: loss for trial in trials if (loss := stored(args.runs, trial)) is not None}
    losses |= run_all(args.runs, [trial for trial in trials if trial not in losses], args.processes)

    sweeps = {
        (kind, how): np.array(  # (W, R, S)
            [
                [
                    [losses[Trial(kind, how, w, float(r), seed, args.steps, widths[0])] for seed in range(args.seeds)]
                    for r in loglrs
                ]
                for w in widths
            ]
        )
        for kind in args.kinds
        for how in args.parametrizations
    }
    report = {f"{kind}, {how}": summary(values, widths, loglrs) for (kind, how), values in sweeps.items()}
    with replacing(args.output) as file:
        draw(sweeps, widths, loglrs).savefig(file, format="png", dpi=150)
    settings = {"widths": widths, "loglrs": loglrs, "seeds": args.seeds, "steps": args.steps, "batch": BATCH}
    replace_json(args.output.with_suffix(".json"), settings | {"sweeps": report})
    for name, sweep in report.items():
        print(f"\n{name}\n\n{table(sweep, widths, loglrs)}")
    print(f"\npicture {args.output}")


# ----------------------------------------------------------------------------------------------------------------- runs


def run_all(folder: Path, trials: list[Trial], processes: int) -> dict[Trial, float]:
    """Train what is not there yet, the same whatever the number of processes."""
    from tqdm import tqdm

    jobs, bar = [(folder, trial) for trial in trials], tqdm(total=len(trials), unit="run", disable=None)
    losses = {}
    if processes == 1 or len(trials) < 2:
        for trial, loss in map(run, jobs):
            losses[trial] = loss
            bar.update()
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
            for trial, loss in pool.map(run, jobs):
                losses[trial] = loss
                bar.update()
    bar.close()
    return losses


def run(job: tuple[Path, Trial]) -> tuple[Trial, float]:
    """The held-out loss of the averaged weights at the end; infinite where training broke down."""
    folder, trial = job
    torch.set_num_threads(1)
    loss = stored(folder, trial)  # another command may have made it meanwhile
    if loss is None:
        training, held_out = split_digits()
        torch.manual_seed(trial.seed)
        points = train(
            DiT(trial.config), training, held_out, trial.seed, 0, trial.steps, trial.steps, lr=2.0**trial.loglr
        )
        loss, seconds = points[-1].losses.mean().item(), points[-1].seconds
        loss = loss if math.isfinite(loss) else math.inf
        record = {"trial": asdict(trial), "model": trial.config.to_dict(), "batch": BATCH}
        replace_json(folder / trial.name, record | {"loss": loss, "seconds": seconds})
    return trial, loss


def stored(folder: Path, trial: Trial) -> float | None:
    """The loss of a run of the very same settings, if there is one."""
    try:
        found = json.loads((folder / trial.name).read_text())
        same = found["trial"] == asdict(trial) and found["batch"] == BATCH
        # A version that knows more options gives a model of before their defaults.
        return found["loss"] if same and DiTConfig.from_dict(found["model"]) == trial.config else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


# -------------------------------------------------------------------------------------------------------------- reports


def summary(values: np.ndarray, widths: list[int], loglrs: list[float]) -> dict:
    """Of the losses (W, R, S): their means, the best learning rate of each width, what the narrow one's costs."""
    mean = values.mean(axis=2)  # (W, R)
    best = mean.argmin(axis=1)
    notches = (best - best[0]).tolist()
    cost = [mean[w, best[0]] - mean[w, best[w]] for w in range(len(widths))]
    return {
        "loss": [[loss if math.isfinite(loss) else None for loss in row] for row in mean.tolist()],
        "best_loglr": [loglrs[index] for index in best],
        "shift_in_notches": notches,
        "cost_of_the_narrow_ones": [loss if math.isfinite(loss) else None for loss in map(float, cost)],
    }


def table(sweep: dict, widths: list[int], loglrs: list[float]) -> str:
    """Markdown, the best loss of each width in bold."""
    lines = ["| width |" + "".join(f" 2^{loglr:g} |" for loglr in loglrs) + " shift | narrow one's rate costs |"]
    lines.append("|---" * (len(loglrs) + 3) + "|")
    rows = zip(widths, sweep["loss"], sweep["best_loglr"], sweep["shift_in_notches"], strict=True)
    for (width, losses, best, shift), cost in zip(rows, sweep["cost_of_the_narrow_ones"], strict=True):
        shown = ["diverged" if loss is None else f"{loss:.4f}" for loss in losses]
        shown = [f"**{text}**" if loglr == best else text for text, loglr in zip(shown, loglrs, strict=True)]
        lines.append(f"| {width} | {' | '.join(shown)} | {shift:+d} | {'-' if cost is None else f'{cost:.4f}'} |")
    return "\n".join(lines)


def draw(sweeps: dict[tuple[str, str], np.ndarray], widths: list[int], loglrs: list[float]) -> Figure:
    """A panel for each sweep: loss over learning rate, a line for each width, its optimum marked."""
    kinds, ways = (list(dict.fromkeys(key[axis] for key in sweeps)) for axis in (0, 1))
    figure = Figure(figsize=(0.6 + 4.2 * len(ways), 0.8 + 3.0 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(ways), sharex=True, sharey="row", squeeze=False)
    shades = [(0.15 + 0.6 * (1 - rank / max(1, len(widths) - 1)),) * 2 + (0.75,) for rank in range(len(widths))]
    for (kind, how), values in sweeps.items():
        axes, mean = panels[kinds.index(kind)][ways.index(how)], values.mean(axis=2)
        for width, losses, seeds, colour in zip(widths, mean, values, shades, strict=True):
            shown = np.where(np.isfinite(losses), losses, np.nan)
            axes.plot(loglrs, shown, "o-", color=colour, markersize=3, linewidth=1.3, label=f"width {width}")
            low, high = (np.where(np.isfinite(edge), edge, np.nan) for edge in (seeds.min(1), seeds.max(1)))
            axes.fill_between(loglrs, low, high, color=colour, alpha=0.15, linewidth=0)
            best = int(losses.argmin())
            axes.plot(loglrs[best], losses[best], "D", color=colour, markersize=7, markeredgecolor="black")
        axes.set_title(f"{kind}, {how}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92", linewidth=0.6)
    for row, kind in zip(panels, kinds, strict=True):
        finite = np.concatenate([sweeps[kind, how].mean(axis=2).ravel() for how in ways])
        finite = finite[np.isfinite(finite)]
        if len(finite):  # what hardly trained is above the picture
            row[0].set_ylim(finite.min() * 0.97, min(finite.max(), 2.2 * finite.min()) * 1.03)
        row[0].set_ylabel("held-out loss")
    for axes in panels[-1]:
        axes.set_xlabel("learning rate, as a power of 2")
    panels[0][-1].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    cli.run(main, get_parser())
