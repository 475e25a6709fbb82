"""Heat maps and curves of what the experts do, as matplotlib figures.

L MoE layers · E experts · A classes, patches, steps

Colour is an expert's share of the load over an even share, on a logarithmic scale: white is even, red is more, and the
deepest red at most what an expert can have, E/K.
"""

import math
import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from analysis.routing import RoutingData

COLOURS = "RdBu_r"
# Of lines: told apart by all eyes.
LINE_COLOURS = ("black", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "0.5")
MOST_WORDS = 40
STYLE = {
    **{"font.size": 9, "axes.titlesize": 9, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6},
    **{"xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "legend.fontsize": 8, "pdf.fonttype": 42},
}
QUANTITIES = {"load": "load / even share", "probability": "probability / even share"}
LINES = {"conditional": dict(color="#0072b2"), "unconditional": dict(color="#d55e00", linestyle="--")}


def draw(by: str, data: RoutingData, half: str = "conditional", of: str = "load") -> Figure:
    """The figure of `MAPS[by]`, with its title."""
    with rc_context(STYLE):
        figure = (MAPS | MAPS_OF_TEXTS)[by](data, half, of)
        what = {"load": "Expert load", "probability": "Router probability"}[of]
        shown = "both halves" if by == "layer" else f"{half} half"
        axis = name_of_classes(data) if by == "class" else by
        title = f"{what} by {axis}  ·  {plain(data.about['model'])}  ·  {shown}"
        figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=11)
        return figure


def pixels(figure: Figure, dpi: int = 100) -> np.ndarray:
    """(H, W, 3) uint8."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ----------------------------------------------------------------------------------------------------------------- maps


def by_class(data: RoutingData, half: str, of: str) -> Figure:
    """A panel for each layer: class down, expert across."""
    load = relative(data, "class", half, of)  # (L, C, E)
    figure, panels = layer_panels(data, height=0.12 * load.shape[1])
    for axes, layer in zip(panels, load, strict=True):
        image = heat_map(axes, layer, load, data, of)
        integer_ticks(axes.xaxis, layer.shape[1])
        class_ticks(axes.yaxis, data)
    finish_panels(figure, panels, image, "expert", name_of_classes(data), of)
    return figure


def by_word(data: RoutingData, half: str, of: str) -> Figure:
    """A panel for each layer: word down, expert across; a row is of all prompts that have the word."""
    load = relative(data, "word", half, of)[:, :MOST_WORDS]  # (L, W, E)
    words = list(data.words)[:MOST_WORDS]
    figure, panels = layer_panels(data, height=0.16 * len(words))
    for axes, layer in zip(panels, load, strict=True):
        image = heat_map(axes, layer, load, data, of)
        integer_ticks(axes.xaxis, layer.shape[1])
        axes.yaxis.set_ticks(range(len(words)), [plain(shortened(word)) for word in words])
    finish_panels(figure, panels, image, "expert", "prompts with the word", of)
    return figure


def by_step(data: RoutingData, half: str, of: str) -> Figure:
    """A panel for each layer: expert down, network evaluation across."""
    load = relative(data, "step", half, of).swapaxes(1, 2)  # (L, E, S)
    figure, panels = layer_panels(data, height=min(2.6, 0.1 * load.shape[1]))
    for axes, layer in zip(panels, load, strict=True):
        image = heat_map(axes, layer, load, data, of)
        integer_ticks(axes.xaxis, layer.shape[1])
        integer_ticks(axes.yaxis, layer.shape[0])
    finish_panels(figure, panels, image, "network evaluation, from noise to image", "expert", of)
    return figure


def by_patch(data: RoutingData, half: str, of: str) -> Figure:
    """A panel for each layer with a small map of the image for each expert, in reading order."""
    load = relative(data, "patch", half, of)  # (L, P, E)
    columns = math.ceil(math.sqrt(load.shape[2]))
    figure, panels = layer_panels(data, aspect=math.ceil(load.shape[2] / columns) / columns)
    for axes, layer in zip(panels, load, strict=True):
        picture, corners, size = mosaic(layer, columns, data.side)
        image = heat_map(axes, picture, load, data, of, aspect="equal")
        frames = [Rectangle((left - 0.5, top - 0.5), size, size) for top, left in corners]
        axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor="0.6", linewidth=0.4))
        middle = (size - 1) / 2
        axes.set_xticks([left + middle for _, left in corners[:columns]], [f"+{i}" for i in range(columns)])
        first = range(0, len(corners), columns)  # of each row
        axes.set_yticks([corners[expert][0] + middle for expert in first], [str(expert) for expert in first])
        axes.tick_params(length=0)
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
    finish_panels(figure, panels, image, "expert: number of its row + column", "", of)
    return figure


def by_layer(data: RoutingData, half: str, of: str) -> Figure:
    """Layer against expert for each half, above curves over the layers."""
    layers, experts = data.about["layers"], data.about["num_experts"]
    height = min(5.0, max(1.8, 0.13 * len(layers) + 0.6))
    figure = Figure(figsize=(9.2, height + 3.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 2.7])
    maps = upper.subplots(1, len(data.halves), squeeze=False)[0]
    loads = np.stack([relative(data, "layer", name, of)[:, 0] for name in data.halves])  # (H, L, E)
    for axes, load, name in zip(maps, loads, data.halves, strict=True):
        image = heat_map(axes, load, loads, data, of)
        axes.set(title=f"{name} half", xlabel="expert", ylabel="layer")
        integer_ticks(axes.xaxis, experts)
        layer_ticks(axes.yaxis, layers)
    colour_bar(upper, maps, image, of, height)
    curves(lower, data)
    return figure


MAPS: dict[str, Callable] = {"class": by_class, "patch": by_patch, "step": by_step, "layer": by_layer}
MAPS_OF_TEXTS: dict[str, Callable] = {"word": by_word}


def maps_of(data: RoutingData) -> list[str]:
    """The maps that there are of some data."""
    return [*MAPS, *(MAPS_OF_TEXTS if data.of_texts and data.words else ())]


def curves(figure, data: RoutingData) -> None:
    """Over the layers: load and certainty of both halves, what the expert tells, and how alike the halves are."""
    spread, certainty, tells, alike = figure.subplots(1, 4)
    layers = np.arange(len(data.about["layers"]))
    numbers = {name: data.layer_numbers(index) for index, name in enumerate(data.halves)}
    for name, values in numbers.items():
        spread.plot(layers, values["load_cv"], label=name, **LINES[name])
        certainty.plot(layers, values["entropy"], label=name, **LINES[name])
    first = numbers[data.halves[0]]
    for name, colour in (("position", "#009e73"), ("class", "#cc79a7"), ("time", "#e69f00")):
        tells.plot(layers, first[f"{name}_bits"], label=name, color=colour)
    tells.plot(layers, first["class_floor"], label="class, floor", color="#cc79a7", linestyle=":")
    alike.plot(layers, first["overlap"], color="0.25", label="measured")
    alike.axhline(data.about["top_k"] / data.about["num_experts"], color="0.25", linestyle=":", label="by chance")
    spread.set(title="load: std / mean", ylim=(0, None))
    certainty.set(title="router entropy / maximum", ylim=(0, 1.02))
    tells.set(title="information on ... (bits)", ylim=(0, None))
    alike.set(title="same experts in both halves", ylim=(0, 1.02))
    for axes in (spread, certainty, tells, alike):
        axes.set_xlabel("layer")
        layer_ticks(axes.xaxis, data.about["layers"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        for line in axes.lines:
            line.set(
                linewidth=1.3, marker="o" if len(layers) < 16 and line.get_linestyle() != ":" else "", markersize=3
            )
    for axes in (spread, tells, alike):
        axes.legend(frameon=False, handlelength=1.6)
    if len(data.halves) == 1:
        alike.text(0.5, 0.5, "one half only", transform=alike.transAxes, ha="center", color="0.5")


# ---------------------------------------------------------------------------------------------------------------- parts


def relative(data: RoutingData, by: str, half: str, of: str) -> np.ndarray:
    """(L, A, E) over an even share: 1 where even."""
    return data.shares(by, data.half(half), of) * data.about["num_experts"]


def layer_panels(data: RoutingData, height: float = 0, aspect: float | None = None):
    """A figure and a panel for each layer, in rows as full as they can be.

    height   of a panel in inches, within bounds
    aspect   of a panel, in place of its height
    """
    layers = data.about["layers"]
    columns = min(range(4, 9), key=lambda c: (-len(layers) % c, -c)) if len(layers) > 4 else len(layers)
    rows = math.ceil(len(layers) / columns)
    width = max(1.55, 6.0 / max(columns, 3))
    height = aspect * width if aspect else min(max(1.4, height), max(1.8, 11 / rows), 5.0)
    size = (columns * width + 1.6, rows * (height + (0.22 if aspect else 0.3)) + 0.9)
    figure = Figure(figsize=size, layout="compressed" if aspect else "constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.08 if aspect else 0.02, hspace=0.02)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()  # sharing axes costs the square of their number
    for axes, layer in zip(panels, layers, strict=False):
        axes.set_title(f"layer {layer}", pad=3)
        axes.label_outer()
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    return figure, panels[: len(layers)]


def heat_map(axes, values: np.ndarray, scale: np.ndarray, data: RoutingData, of: str, aspect: str = "auto"):
    """(rows, columns) of load over an even share, in colours that are wide enough for `scale`; grey where no token."""
    limit = np.clip(np.ceil(np.log2(spread(scale))), 1, 3)
    most = data.about["num_experts"] / (data.about["top_k"] if of == "load" else 1)
    norm = TwoSlopeNorm(0, -limit, min(limit, max(1.0, math.log2(most))))
    axes.set_facecolor("0.85")
    with np.errstate(divide="ignore"):
        exponents = np.log2(values).clip(norm.vmin, norm.vmax)
    return axes.imshow(exponents, cmap=COLOURS, norm=norm, aspect=aspect, interpolation="nearest")


def spread(values: np.ndarray) -> float:
    """By which factor all but a hundredth of the values are within of 1."""
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.quantile(np.abs(np.log(values)), 0.99))) if len(values) else 1.0


def colour_bar(figure, panels, image, of: str, height: float) -> None:
    """Beside panels that are `height` inches together."""
    powers = np.arange(math.ceil(image.norm.vmin), math.floor(image.norm.vmax) + 1)
    shrink = min(0.9, 2.6 / height)
    bar = figure.colorbar(
        image, ax=list(panels), label=QUANTITIES[of], extend="both", shrink=shrink, aspect=18, pad=0.02
    )
    bar.ax.yaxis.set_major_locator(FixedLocator(powers))
    bar.ax.set_yticklabels([f"{2**p}x" if p >= 0 else f"1/{2**-p}x" for p in powers.tolist()])
    bar.ax.minorticks_off()


def finish_panels(figure: Figure, panels, image, xlabel: str, ylabel: str, of: str) -> None:
    colour_bar(figure, panels, image, of, figure.get_figheight())
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)


def integer_ticks(axis, count: int) -> None:
    """Few enough to read, at whole numbers from 0 to count - 1."""
    if count <= 8:
        axis.set_major_locator(FixedLocator(range(count)))
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 4, 5, 8, 10]))


def name_of_classes(data: RoutingData) -> str:
    return "prompt" if data.of_texts else "class"


def class_ticks(axis, data: RoutingData) -> None:
    """Every class by its name if they are few, else some by their labels."""
    classes = data.about["classes"]
    if len(classes) <= 20:
        most = 40 if data.of_texts else 16  # prompts often begin alike
        axis.set_ticks(range(len(classes)), [plain(shortened(name, most)) for name in data.about["class_names"]])
    else:
        places = [round(place) for place in MaxNLocator(10, integer=True).tick_values(0, len(classes) - 1)]
        places = [place for place in places if 0 <= place < len(classes)]
        axis.set_ticks(places, [str(classes[place]) for place in places])


def layer_ticks(axis, layers: list[int]) -> None:
    """At most a dozen of the layers, by their number in the network."""
    places = range(0, len(layers), math.ceil(len(layers) / 10))
    axis.set_ticks(list(places), [str(layers[place]) for place in places])


def plain(text: str) -> str:
    """Text as it stands: to matplotlib, what is between two dollar signs is a formula; names may not be UTF-8."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def shortened(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def mosaic(values: np.ndarray, columns: int, side: int) -> tuple[np.ndarray, list[tuple[int, int]], int]:
    """(P, E) -> one picture with a map for each expert, row by row, nan between them; their corners; their size."""
    size = side * max(1, 8 // side)  # small maps are enlarged, so that a gap of 1 is small beside them
    gap, rows = max(1, size // 8), math.ceil(values.shape[1] / columns)
    pitch = size + gap
    corners = [(e // columns * pitch, e % columns * pitch) for e in range(values.shape[1])]
    picture = np.full((rows * pitch - gap, columns * pitch - gap), np.nan)
    for (top, left), expert in zip(corners, values.T, strict=True):
        picture[top : top + size, left : left + size] = np.kron(expert.reshape(side, side), np.ones([size // side] * 2))
    return picture, corners, size
