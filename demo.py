"""A page to play with: draw from a checkpoint, watch it, and see which expert worked where.

    pip install -r requirements-demo.txt
    python demo.py --ckpt results/000-DiT-S-2-8E2A-rf

For whoever sits at this machine: it listens to 127.0.0.1 alone, unless `--host` says otherwise. It needs no internet.
"""

import html
import importlib.util
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import distributed
import machine
import sampling
from analysis import live
from checkpoint import describe
from cli import Parser, RunStopped, UsageError, natural_int, run
from image_files import data_uri, image_grid, png_bytes

FEW = "a few of all"
EACH, MOST_EACH, MOST_STEPS, MOST_GUIDANCE = 4, 16, 250, 10.0
RANKS = ["first", "second"]


def get_parser() -> Parser:
    parser = Parser(prog="demo.py", description=__doc__.partition("\n")[0])
    sampling.add_sampling_arguments(parser)
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen to; 0.0.0.0: all of this machine's")
    group.add_argument("--port", type=natural_int, default=7860, help="0: any that is free")
    return parser


def main(args) -> None:
    check_gradio()
    port = free_port(args.host, args.port)

    device = distributed.choose_device(args.device)
    distributed.keep_freed_memory(device)
    precision = machine.choose_precision(args.precision, device)
    loaded = sampling.load_for_sampling(args, device, machine.set_precision(precision))

    desk = live.Desk(loaded, args, precision)
    page = make_page(desk)
    try:
        serve(page, args.host, port)
        print(f"{loaded.source} on http://{args.host}:{port}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    finally:
        desk.close()
        page.close(verbose=False)


def check_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("gradio is not installed, which the page needs: pip install -r requirements-demo.txt")


def free_port(host: str, port: int) -> int:
    """`port`, or for 0 one that is free. Raises UsageError: it is taken, or no port of this machine."""
    try:
        with socket.create_server((host, port)) as probe:
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason, _, _ = str(getattr(error, "strerror", None) or error).partition(" (")
        where = f"--host {host} --port {port}"
        raise UsageError(f"{where}: cannot listen there ({reason}); --port 0 finds a free one") from None


def serve(page, host: str, port: int) -> None:
    """Begins to listen, and comes back."""
    import gradio as gr

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # of the machine, from no network
    quiet = {"quiet": True, "share": False, "ssr_mode": False, "footer_links": [], "prevent_thread_lock": True}
    page.queue().launch(server_name=host, server_port=port, theme=theme, css=STYLE, **quiet)


# ----------------------------------------------------------------------------------------------------------- the layout


class Asked(NamedTuple):
    """The controls of what is drawn, from top to bottom; or their values."""

    what: object
    seed: object
    second: object
    beside: object
    each: object
    cfg_scale: object
    steps: object
    sampler: object
    preview: object


class View(NamedTuple):
    """Where experts are looked at, likewise."""

    evaluation: object  # from 1
    layer: object  # from 1, of those with experts
    half: object
    rank: object


def make_page(desk: live.Desk):
    """A `gradio.Blocks`: what is asked for on the left, what comes of it on the right."""
    import gradio as gr

    with gr.Blocks(title=f"{desk.loaded.name}: a page to play with", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading(desk))
        sheets = gr.State(None, time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                asked = controls_of_what(desk)
                start = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Row():
                    again = gr.Button("New seed", min_width=80, elem_id="again")
                    cancel = gr.Button("Cancel", min_width=80, elem_id="cancel")
            with gr.Column(scale=4):
                status = gr.HTML(said("Choose, then press Draw."), elem_id="status")
                with gr.Row(visible=desk.has_experts):
                    view = controls_of_experts(desk)
                stage = gr.HTML(elem_id="stage")

        def update(request: gr.Request, *values):
            for *shown, slider in draw(desk, request.session_hash, *values):
                shown = [gr.skip() if value is None else value for value in shown]
                yield *shown, gr.skip() if slider is None else gr.update(**slider)

        def end(request: gr.Request):
            desk.cancel(request.session_hash)

        silent = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_limit": None,
        }  # the desk has a line
        drawn = update, [*asked, *view], [status, stage, sheets, view.evaluation]
        gr.on([start.click, asked.seed.submit, asked.second.submit], *drawn, **silent)
        again.click(lambda: random.randrange(2**31), None, asked.seed, **silent).then(*drawn, **silent)
        cancel.click(end, **silent)
        moved = [control.input for control in view]
        gr.on(moved, show, [sheets, *view], stage, trigger_mode="always_last", **silent)
    return page


def controls_of_what(desk: live.Desk) -> Asked:
    import gradio as gr

    loaded, settings = desk.loaded, desk.loaded.settings
    if loaded.draws_from_texts:
        what = gr.Textbox("".join(loaded.condition.known[:1]), label="prompt; one a line", lines=2, elem_id="what")
    else:
        names = [(class_name(loaded, label), str(label)) for label in loaded.condition.trained]
        what = gr.Dropdown([*names, FEW], value=names[0][1], label="class", allow_custom_value=True, elem_id="what")
    with gr.Group():
        with gr.Row():
            whole = {"precision": 0, "minimum": 0, "min_width": 80}
            seed = gr.Number(settings.seed, label="seed", elem_id="seed", **whole)
            second = gr.Number(settings.seed + 1, label="second seed", elem_id="second", **whole)
        beside = gr.Checkbox(False, label="both, side by side", elem_id="beside")
    each = gr.Slider(1, MOST_EACH, EACH, step=1, label="images of each", elem_id="each")
    guided = loaded.condition.null is not None or loaded.guide is not None
    scale = {"label": "guidance; 1 is none", "step": 0.1, "interactive": guided, "elem_id": "guidance"}
    cfg_scale = gr.Slider(0, max(MOST_GUIDANCE, settings.cfg_scale), settings.cfg_scale, **scale)
    count = int(settings.steps) if str(settings.steps).isdecimal() else loaded.objective.default_steps
    steps = gr.Slider(1, max(MOST_STEPS, count), count, step=1, label="steps", elem_id="steps")
    samplers = list(loaded.objective.samplers)
    sampler = gr.Dropdown(samplers, value=settings.sampler, label="sampler", elem_id="sampler")
    preview = gr.Checkbox(True, label="live preview", elem_id="preview")
    return Asked(what, seed, second, beside, each, cfg_scale, steps, sampler, preview)


def controls_of_experts(desk: live.Desk) -> View:
    import gradio as gr

    layers = len(desk.loaded.model.config.moe_indices)
    halves = ["prompt" if desk.loaded.draws_from_texts else "class", "none"]
    return View(
        gr.Slider(1, 2, 1, step=1, label="from noise to image", scale=4, elem_id="evaluation"),
        gr.Slider(1, max(2, layers), 1, step=1, label="layer", scale=2, elem_id="layer"),
        gr.Radio(halves, value=halves[0], type="index", label="half of the guided batch", scale=3, elem_id="half"),
        gr.Radio(RANKS, value=RANKS[0], type="index", label="expert of each patch", scale=3, elem_id="rank"),
    )


# --------------------------------------------------------------------------------------------- what happens on the page


def draw(desk: live.Desk, owner: str, *values) -> Iterator[tuple]:
    """The status, stage and sheets, and settings of the slider of evaluations; None: as before. Errors are statuses."""
    asked, view, started = Asked(*values[: len(Asked._fields)]), View(*values[len(Asked._fields) :]), time.monotonic()
    try:
        wish = wish_of(desk, asked)
        seen = [None] * len(wish.seeds)
        for word in desk.draw(wish, owner):
            if isinstance(word, live.Waiting):
                yield said(f"waiting: {word.ahead} before this one"), None, None, None
            elif isinstance(word, live.Progress):
                seen[word.place] = None if word.images is None else image_grid(word.images, wish.columns)
                yield progress(word), previews(desk, wish, seen) if wish.preview else None, None, None
        sheets, last = word, word[0].evaluations
        view = view._replace(evaluation=min(view.evaluation, last))
        slider = {"maximum": max(2, last), "value": view.evaluation}
        yield finished(desk, wish, sheets, time.monotonic() - started), show(sheets, *view), sheets, slider
    except live.Stopped:
        yield said("cancelled"), None, None, None
    except (UsageError, RunStopped) as error:
        yield wrong(error), None, None, None


def wish_of(desk: live.Desk, asked: Asked) -> live.Wish:
    """Raises UsageError for a field that was left empty."""
    if None in (asked.seed, asked.second):
        raise UsageError("a seed is a whole number: its field is empty")
    seeds = tuple(dict.fromkeys([asked.seed, asked.second] if asked.beside else [asked.seed]))
    drawn = asked.cfg_scale, int(asked.steps), asked.sampler, asked.preview
    return live.Wish(requests(desk, asked.what), int(asked.each), seeds, *drawn)


def requests(desk: live.Desk, what: str | None) -> tuple[str, ...]:
    """Prompts, one a line; or a class, by name or number; or some of all classes."""
    if desk.loaded.draws_from_texts:
        return tuple(line.strip() for line in what.splitlines() if line.strip())
    if what == FEW:
        return tuple(map(str, desk.loaded.condition.spread(min(10, len(desk.loaded.condition.trained)))))
    return (what,) if what else ()


def previews(desk: live.Desk, wish: live.Wish, seen: list[np.ndarray | None]) -> str:
    """What `show` will show, as far as it has got."""
    rest = [picture(None, "experts")] if desk.has_experts else []
    return staged([[picture(grid, f"seed {seed}"), *rest] for grid, seed in zip(seen, wish.seeds, strict=True)])


def show(sheets: list[live.Sheet] | None, evaluation: int, layer: int, half: int, rank: int) -> str:
    """A column for each seed: its images; who took which patch of them; how much each expert had to do."""
    columns = []
    for sheet in sheets or ():
        column = [picture(sheet.grid, f"seed {sheet.seed}")]
        if work := sheet.work:
            place = work.place(half, layer - 1, evaluation - 1)
            caption = f"block {work.layers[place.layer]} at time {work.times[place.step]:.2f}; 1 is noise"
            column += [picture(sheet.patches(place, rank), caption), work.loads(place)]
        columns.append(column)
    return staged(columns)


# ------------------------------------------------------------------------------------------------------------ fragments


def heading(desk: live.Desk) -> str:
    loaded, config = desk.loaded, desk.loaded.model.config
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    experts = f"{config.num_experts_per_tok} per token" if desk.has_experts else "dense"
    facts = (
        f"{describe(config)} · {experts} · {parameters:,} parameters · {loaded.image_size}x{loaded.image_size} pixels"
    )
    return f"<h1>{html.escape(loaded.name)}</h1><p>{html.escape(facts)} · {desk.precision}</p>"


def class_name(loaded: sampling.Loaded, label: int) -> str:
    name = loaded.condition.name(label)
    return name if name == str(label) else f"{label} · {name}"


def staged(columns: list[list[str]]) -> str:
    """A section for each seed, side by side."""
    sections = "".join(f"<section>{''.join(column)}</section>" for column in columns)
    return f'<div class="stage of{len(columns)}">{sections}</div>'


def picture(pixels: np.ndarray | None, caption: str) -> str:
    """None: a place for one."""
    image = "<div></div>" if pixels is None else f'<img src="{data_uri(png_bytes(pixels))}" alt="">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def said(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def wrong(error: Exception) -> str:
    return f'<p class="error" role="alert">{html.escape(str(error))}</p>'


def progress(word: live.Progress) -> str:
    return f'<p><progress value="{word.done}" max="{word.total}"></progress> {word.done} of {word.total}</p>'


def finished(desk: live.Desk, wish: live.Wish, sheets: list[live.Sheet], seconds: float) -> str:
    name = html.escape(f"{desk.loaded.name}-{sheets[0].settings}.zip", quote=True)
    content = data_uri(desk.archive(wish, sheets), "application/zip")
    count = sum(len(sheet.images) for sheet in sheets)
    link = f'<a id="download" download="{name}" href="{content}">download</a>'
    images = "image" if count == 1 else "images"
    return f"<p>{count} {images} in {seconds:.1f} s · {html.escape(str(sheets[0].settings))}, {link}</p>"


STYLE = """
#stage { min-height: 24rem; }
.stage, .stage section { display: flex; gap: 1.2rem; flex-wrap: wrap; align-content: flex-start; }
.stage section { flex: 1 1 0; min-width: 16rem; }
.stage figure { margin: 0; flex: 1 1 12rem; max-width: 23rem; }
.stage .loads { flex: 1 1 13rem; min-width: 0; max-width: 24rem; align-content: start; }
.stage.of2 .loads { flex-basis: 100%; max-width: 100%; }
.stage img, .stage figure > div { width: 100%; aspect-ratio: auto; image-rendering: pixelated; display: block; }
.stage figure > div { aspect-ratio: 1; border: 1px dashed var(--border-color-primary); }
.stage figcaption { margin-top: .3rem; font-size: .9rem; opacity: .75; }
.loads { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .3rem 1.2rem; }
.load { display: grid; grid-template-columns: 1.6rem 1fr 3rem; gap: .5rem; align-items: center; }
.load span { font-variant-numeric: tabular-nums; font-size: .85rem; } .load span:last-child { text-align: right; }
.load div { position: relative; height: 1rem; background: var(--background-fill-secondary); border-radius: 3px; }
.load i { display: block; height: 100%; border-radius: 3px; }
.load b { position: absolute; top: -2px; bottom: -2px; width: 2px; background: var(--body-text-color); opacity: .6; }
#status p { margin: 0; min-height: 1.6rem; } #status .error { color: #c0392b; font-weight: 600; }
#status progress { width: 16rem; vertical-align: middle; height: .5rem; }
#status progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 4px; }
#status progress::-webkit-progress-value { background: #0072b2; border-radius: 4px; }
#status progress { appearance: none; border: none; } #status a { font-weight: 600; }
"""


if __name__ == "__main__":
    run(main, get_parser())
