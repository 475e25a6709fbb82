"""Handwritten digits: data and curves for the quick start. Needs no download.

    python -m scripts.digits write data/digits              # PNG files: train/ and held-out/, one folder per class
    python -m scripts.digits compose data/scenes            # scenes of one to four digits with captions: scenes.py
    python -m scripts.digits curve results/.../metrics.jsonl

The 1,797 digits that scikit-learn ships are split once and for all: one half trains the diffusion model, the other half
is the reference of its metrics and trains their judge. So the judge has seen no image of the model's, and those images
measure how good the judge is.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cli import Parser, UsageError, natural_int, positive_int, run
from files import replacing
from image_files import open_npz

TRAINING_DIGITS = 897  # for the diffusion model; the other 900 are held out


class Digits(NamedTuple):
    images: np.ndarray  # (N, 8, 8) uint8
    labels: np.ndarray  # (N,) int64, 0..9
    indices: np.ndarray  # (N,) the places in scikit-learn's data set


# ----------------------------------------------------------------------------------------------------------------- data


def split_digits() -> tuple[Digits, Digits]:
    """(the diffusion model's digits, those held out): disjoint, the same every time, each class in equal shares."""
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # ink in 17 steps, 0..16
    labels = bunch.target.astype(np.int64)
    halves = train_test_split(np.arange(len(labels)), train_size=TRAINING_DIGITS, stratify=labels, random_state=0)
    training, held_out = (np.sort(half) for half in halves)
    return (
        Digits(images[training], labels[training], training),
        Digits(images[held_out], labels[held_out], held_out),
    )


def write_digits(digits: Digits, target: Path) -> bool:
    """Write digits as `target/<class>/<index>.png`; False if they are all there already.

    The folder appears under its name when it is complete, so an interrupted call is simply repeated.
    """
    names = [f"{label}/{index:04d}.png" for label, index in zip(digits.labels, digits.indices, strict=True)]
    unfinished = target.with_name(f"{target.name}.unfinished")
    if target.exists():
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        if found != set(names):
            raise UsageError(
                f"{target} holds {len(found)} files that are not the {len(names)} digits; "
                f"delete it or name another folder"
            )
        return False
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for image, name in zip(digits.images, names, strict=True):
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        unfinished.rename(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
    return True


# --------------------------------------------------------------------------------------------------------------- curves


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl` that have a loss; a last line cut off by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                continue
            raise UsageError(f"{path}, line {number}: not JSON") from None
        if "loss" in row:
            rows.append(row)
    if not rows:
        raise UsageError(f"{path} holds no training step yet")
    return rows


def summarise(rows: list[dict]) -> str:
    """The course of the loss and the final load of the experts, in three or four lines."""
    losses = [row["loss"] for row in rows]
    tenth = max(1, len(rows) // 10)
    start, end = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    lines = [
        f"loss    {start:.4f} -> {end:.4f}  (means of the first and the last {tenth} of {len(rows)} logged values)",
        f"        {sparkline(losses)}  steps {rows[0]['step']} to {rows[-1]['step']}",
    ]
    if rows[-1].get("load_max_over_mean"):  # a dense model has none
        loads = " ".join(f"{load:.2f}" for load in rows[-1]["load_max_over_mean"])
        lines.append(f"load    {loads}  (busiest expert over the mean, per layer, at the last step; 1 is balanced)")
    return "\n".join(lines)


def sparkline(values: list[float], width: int = 60) -> str:
    """The course of `values` in at most `width` characters, low to high."""
    means = np.array([part.mean() for part in np.array_split(np.array(values, float), min(width, len(values)))])
    if not np.isfinite(means).all():
        return "(some values are not finite)"
    heights = (means - means.min()) / max(np.ptp(means), 1e-12)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * height)] for height in heights)


def draw_curve(rows: list[dict], path: Path) -> None:
    """A PNG with the loss above the load of each MoE layer's busiest expert."""
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(steps, [row["loss"] for row in rows])
    upper.set_ylabel("loss")
    routed = [row for row in rows if row.get("load_max_over_mean")]
    loads = np.array([row["load_max_over_mean"] for row in routed])  # (steps, layers)
    for layer in range(loads.shape[1] if routed else 0):
        lower.plot([row["step"] for row in routed], loads[:, layer], label=f"layer {layer}")
    if routed:
        lower.legend(ncols=4, fontsize="small")
    lower.axhline(1.0, color="gray", linewidth=0.8)
    lower.set_ylabel("busiest expert / mean load")
    lower.set_xlabel("step")
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------- commands


def write(args) -> None:
    for digits, name in zip(split_digits(), ("train", "held-out"), strict=True):
        written = write_digits(digits, args.folder / name)
        print(f"{args.folder / name}: {len(digits.images)} digits {'written' if written else 'are there already'}")


def compose(args) -> None:
    """Scenes to train on, of the training digits; prompts that ask for what no such scene shows, and their layouts."""
    from scripts import scenes

    training, _ = split_digits()
    folder = args.folder
    made = [scenes.scene(training, args.seed, index) for index in range(args.count)]
    names = [f"images/{index:06d}.png" for index in range(args.count)]
    table = _lines({"path": name, "caption": each.caption} for name, each in zip(names, made, strict=True))
    prompts = [scenes.scene(training, args.seed, index, new=True) for index in range(args.prompts)]
    try:
        there = (folder / "captions.jsonl").exists()
        if there and (folder / "captions.jsonl").read_bytes() != table:
            raise UsageError(f"{folder} holds other captions than these {args.count}; delete it or name another folder")
        if not there:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            for name, each in zip(names, made, strict=True):
                Image.fromarray(each.image).save(folder / name)
            with replacing(folder / "captions.jsonl") as file:  # last: an interrupted call is simply repeated
                file.write(table)
        with replacing(folder / "new.jsonl") as file:
            file.write(_lines({"caption": each.caption, "layout": each.layout} for each in prompts))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from None
    print(f"{folder}: {args.count} scenes with captions {'are there already' if there else 'written'}")
    print(f"{folder / 'new.jsonl'}: {args.prompts} prompts for pairs that no scene has")


def _lines(rows) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def judge(args) -> None:
    """How much of what prompts ask for is in the images: read cell by cell by a judge that knows the other digits."""
    from metrics import Judge
    from scripts import scenes

    images, _ = open_npz(args.samples)
    try:
        layouts = [json.loads(line)["layout"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{args.prompts} is no list of prompts with layouts, as compose writes it: {error}") from None
    if len(images) != len(layouts):
        raise UsageError(f"{args.samples} has {len(images)} images, {args.prompts} asks for {len(layouts)}")
    _, held_out = split_digits()
    reader = Judge(np.repeat(held_out.images[..., None], 3, axis=3), held_out.labels)
    digits, blanks = scenes.read_cells(images, layouts, reader.recognises)
    right = digits.sum() + blanks.sum()
    print(f"cells   {right / (len(digits) + len(blanks)):.1%} of {len(digits) + len(blanks)} are as asked for")
    print(f"        {digits.mean():.1%} of {len(digits)} digits, {blanks.mean():.1%} of {len(blanks)} empty ones")


def curve(args) -> None:
    rows = read_metrics(args.metrics)
    path = args.out or args.metrics.with_name("curve.png")
    draw_curve(rows, path)
    print(f"{summarise(rows)}\ncurve   {path}")


def get_parser() -> Parser:
    parser = Parser(prog="python -m scripts.digits", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("write", help="write the digits as PNG files")
    command.add_argument("folder", type=Path, help="gets train/<class>/<index>.png and held-out/...")
    command.set_defaults(command=write)

    command = commands.add_parser("compose", help="write scenes of digits with captions, and prompts for new ones")
    command.add_argument("folder", type=Path, help="gets images/, captions.jsonl and new.jsonl")
    command.add_argument("--count", type=positive_int, default=12_000, help="scenes")
    command.add_argument("--prompts", type=positive_int, default=64, help="that are held out")
    command.add_argument("--seed", type=natural_int, default=0)
    command.set_defaults(command=compose)

    command = commands.add_parser("judge", help="compare images of scenes with what their prompts ask for")
    command.add_argument("samples", type=Path, help="samples.npz of sample.py --prompt-file")
    command.add_argument("prompts", type=Path, help="new.jsonl of compose")
    command.set_defaults(command=judge)

    command = commands.add_parser("curve", help="draw loss and expert load, print a summary")
    command.add_argument("metrics", type=Path, help="metrics.jsonl of a run")
    command.add_argument("--out", type=Path, help="PNG to write (default: curve.png beside the metrics)")
    command.set_defaults(command=curve)
    return parser


if __name__ == "__main__":
    run(lambda args: args.command(args), get_parser())
