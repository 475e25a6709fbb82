"""One page, complete in itself, of what the experts do: maps, numbers per layer, and who took which patch.

    python -m analysis.report results/routing/000-....npz

Reads what `analysis.expert_data` wrote and writes one HTML file. It needs a browser, but no network.
"""

import base64
import html
import json
import re
from pathlib import Path

import numpy as np

from analysis import plots
from analysis.patches import expert_colours
from analysis.routing import RoutingData
from cli import Parser, UsageError, natural_int, positive_int, run
from files import replacing
from image_files import data_uri, png_bytes

TEMPLATE = Path(__file__).with_name("report.html")


def get_parser() -> Parser:
    parser = Parser(prog="python -m analysis.report", description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help=".npz of python -m analysis.expert_data")
    parser.add_argument("--output", type=Path, help=".html (default: beside the data)")
    parser.add_argument("--examples", type=natural_int, default=4, help="images shown patch by patch, at most")
    parser.add_argument("--steps", type=positive_int, default=50, help="evaluations of each that are kept, at most")
    parser.add_argument("--dpi", type=positive_int, default=110, help="of the maps")
    return parser


def main(args) -> None:
    data = RoutingData.load(args.data)
    path = args.output or args.data.with_suffix(".html")
    page = make_page(data, args.examples, args.steps, args.dpi).encode(errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(page)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror or error}") from None
    print(f"{path}, {len(page) / 1e6:.1f} MB")


def make_page(data: RoutingData, examples: int = 4, steps: int = 50, dpi: int = 110) -> str:
    """The template with the data in it."""
    title = f"Experts of {data.about['checkpoint']}"
    record = json.dumps(contents(data, examples, steps, dpi), allow_nan=False)
    parts = {"TITLE": html.escape(title), "DATA": record.replace("<", r"\u003c")}
    # In one pass: a name may look like a place.
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def contents(data: RoutingData, examples: int, steps: int, dpi: int) -> dict:
    """What the page's script reads."""
    about, count = data.about, len(data.about["times"])
    kept = np.unique(np.linspace(0, count - 1, min(steps, count)).round().astype(int))
    facts = {
        "network": about["model"],
        "experts": f"{about['num_experts']}, {about['top_k']} per token, in {len(about['layers'])} layers",
        "drawn": f"{about['images']} images of {len(about['classes'])} "
        f"{'prompts' if data.of_texts else 'classes'}, {about['settings']}, "
        f"{about['precision']}, {count} network evaluations each",
    }
    shown = data["examples"][:examples, :, :, kept]  # (X, H, L, S', P, min(K, 2))
    return {
        "facts": facts,
        "halves": data.halves,
        "layers": about["layers"],
        "experts": about["num_experts"],
        "colours": expert_colours(about["num_experts"]),
        "chance": about["top_k"] / about["num_experts"],
        "side": data.side,
        "steps": kept.tolist(),
        "evaluations": count,
        "times": [about["times"][step] for step in kept],
        "numbers": {name: numbers(data, half) for half, name in enumerate(data.halves)},
        "bytes": shown.dtype.itemsize,
        "ranks": shown.shape[-1],
        "examples": [example(data, index, choices) for index, choices in enumerate(shown)],
        "maps": {
            by: {half: picture(plots.pixels(plots.draw(by, data, half), dpi)) for half in data.halves}
            for by in plots.maps_of(data)
        },
    }


def numbers(data: RoutingData, half: int) -> dict[str, list]:
    """Per layer; None where there is none."""
    rows = data.layer_numbers(half)
    return {name: [None if np.isnan(v) else round(float(v), 5) for v in row] for name, row in rows.items()}


def example(data: RoutingData, index: int, choices: np.ndarray) -> dict:
    label = data.about["example_labels"][index]
    name = data.about["class_names"][data.about["classes"].index(label)]
    return {
        "title": f"image {data.about['examples'][index]}: {plots.name_of_classes(data)} {label}"
        + ("" if name == str(label) else f", {name}"),
        "image": picture(data["example_images"][index]),
        "choices": base64.b64encode(choices.astype(choices.dtype.newbyteorder("<")).tobytes()).decode(),
    }


def picture(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a PNG as a data URI."""
    return data_uri(png_bytes(pixels, optimize=True))


if __name__ == "__main__":
    run(main, get_parser())
