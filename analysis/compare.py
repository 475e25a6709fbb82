"""Curves of several runs in one picture and one table.

    python -m analysis.compare results/000-... results/001-...
    python -m analysis.compare results/0* --of loss grad_norm metrics/fid --average 20 --output curves.png

A run is its folder, or a file: metrics.jsonl, or a log.txt of ours, DiT or fast-DiT. The table compares runs at the
last step that all of them have, each value a mean over the last `--average` lines before it; the picture has a panel
for each quantity, drawn as such means.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import cli
from analysis.plots import LINE_COLOURS, STYLE, plain
from files import replacing

USUAL = ("loss", "balance_loss", "alignment", "grad_norm", "images_per_second")  # of those that are there
LINES = ("-", "--", ":", "-.")
Curve = tuple[np.ndarray, np.ndarray]  # steps and values (P,)


class Run(NamedTuple):
    name: str
    curves: dict[str, Curve]


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m analysis.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, metrics.jsonl or log.txt")
    parser.add_argument("--of", nargs="+", metavar="NAME", help=f"of metrics.jsonl (default: {', '.join(USUAL)})")
    parser.add_argument("--average", type=cli.positive_int, default=10, help="lines that a value is the mean of")
    parser.add_argument("--output", type=Path, default=Path("results/compare.png"), help=".png, .pdf or .svg")
    return parser


def main(args) -> None:
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise cli.UsageError(f"--output {args.output}: expected a name that ends with .png, .pdf or .svg")
    runs = named([read(path) for path in args.runs])
    there = list(dict.fromkeys(name for run in runs for name in run.curves))
    if args.of and (unknown := [name for name in args.of if name not in there]):
        raise cli.unknown_name("quantity", unknown[0], there)
    names = args.of or [name for name in USUAL if name in there]
    names += [] if args.of else [name for name in there if name.startswith("metrics/")]
    print(table(runs, names, args.average))
    if args.average > 1 and not all(name.startswith("metrics/") for name in names):
        print(f"(what is logged in training: the mean of the last {args.average} lines; --average 1: the line itself)")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.output) as file, rc_context(STYLE):
            draw(runs, names, args.average).savefig(file, format=args.output.suffix[1:], dpi=150)
    except OSError as error:
        raise cli.UsageError(f"--output {args.output} cannot be written: {error.strerror or error}") from None
    print(f"\n{args.output}")


# -------------------------------------------------------------------------------------------------------------- reading


def ours(line: str) -> dict | None:
    """`step 800/800  loss 0.2641  balance 1.005  grad 0.254 ...` of a log."""
    if not (match := re.search(r"step (\d+)/\d+((?:  \S.*?)+)$", line)):
        return None
    pairs = dict(re.findall(r"  (loss|balance|aligned|grad|lr) ([-\d.e+]+)", match[2]))
    spelled = {"balance": "balance_loss", "aligned": "alignment", "grad": "grad_norm"}
    values = {spelled.get(name, name): float(value) for name, value in pairs.items()}
    if rate := re.search(r"  ([\d.]+) img/s", match[2]):
        values["images_per_second"] = float(rate[1])
    return {"step": int(match[1])} | values


def of_dit(line: str) -> dict | None:
    """`(step=0000100) Train Loss: 0.1700, Train Steps/Sec: 1.23`, as DiT and fast-DiT log."""
    match = re.search(r"\(step=(\d+)\) Train Loss: ([-\d.e+]+)", line)
    return {"step": int(match[1]), "loss": float(match[2])} if match else None


def of_json(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:  # cut by a kill
        return None


def read(path: Path) -> Run:
    """A run by its folder or one of its files.

    Raises:
        UsageError: it is not there, or has no line of a step.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in ("metrics.jsonl", "log.txt") if (path / name).is_file()]
        if not found:
            raise cli.UsageError(f"{path} is no run: it has neither metrics.jsonl nor log.txt")
        file = found[0]
    readers: tuple[Callable, ...] = (of_json,) if file.suffix == ".jsonl" else (ours, of_dit)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise cli.UsageError(f"{file} cannot be read: {error.strerror or error}") from None
    rows = [row for line in lines for read_line in readers if (row := read_line(line))]
    if not rows:
        raise cli.UsageError(f"{file} has no line of a training step")
    return Run(path.name if path.is_dir() else path.parent.name or path.name, curves_of(rows))


def curves_of(rows: list[dict]) -> dict[str, Curve]:
    """Of what has a number in some lines; a list of layers by its mean. Of a step done again the last counts."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None:
                points.setdefault(name, {})[row["step"]] = float(np.mean(value))
    ordered = {name: sorted(found.items()) for name, found in points.items()}
    return {name: tuple(np.array(column) for column in zip(*pairs, strict=True)) for name, pairs in ordered.items()}


def named(runs: list[Run]) -> list[Run]:
    """With numbers behind names that several have."""
    names = [run.name for run in runs]
    return [
        run._replace(name=f"{run.name} ({names[: i + 1].count(run.name)})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]


# ---------------------------------------------------------------------------------------------------------------- table


def averaged(values: np.ndarray, count: int) -> np.ndarray:
    """(P,) -> (P,): each the mean of the last `count` up to it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - count)
    return (sums[ends] - sums[begins]) / (ends - begins)


def value_at(curve: Curve, step: int, count: int) -> float:
    """The mean of the last `count` values up to a step; NaN where there are none."""
    steps, values = curve
    before = values[steps <= step][-count:]
    return float(before.mean()) if len(before) else float("nan")


def table(runs: list[Run], names: list[str], count: int) -> str:
    last = [int(max(steps[-1] for steps, _ in run.curves.values())) for run in runs]
    step = min(last)
    heads = ["run", "last step", *(f"{name} at {step}" for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run, end in zip(runs, last, strict=True):
        # Metrics are of single steps: their last one is meant.
        cells = [
            f"{value_at(run.curves[name], step, 1 if name.startswith('metrics/') else count):.5g}"
            if name in run.curves
            else ""
            for name in names
        ]
        lines.append(f"| {run.name} | {end} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: list[Run], names: list[str], count: int) -> Figure:
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows + 0.2 * len(runs)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(plain(name))
        axes.set_xlabel("step")
        for i, run in enumerate(runs):
            turn, colour = divmod(i, len(LINE_COLOURS))
            style = dict(color=LINE_COLOURS[colour], linestyle=LINES[turn % len(LINES)], linewidth=1)
            steps, values = run.curves.get(name, (np.empty(0), np.empty(0)))
            marker = "o" if len(steps) < 2 else None
            smooth = values if name.startswith("metrics/") else averaged(values, count)
            axes.plot(steps, smooth, label=plain(run.name), marker=marker, **style)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False)
    return figure


if __name__ == "__main__":
    cli.run(main, get_parser())
