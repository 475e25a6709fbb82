"""Images while they are drawn, and which expert worked where: what `demo.py` shows, without a page.

N images · H halves of a guided batch · L MoE layers · S network evaluations · P patches · E experts
"""

import io
import json
import math
import queue
import threading
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import sampling
from analysis.patches import coloured, load_bars
from analysis.routing import Recorder, Tally, evaluation_times
from cli import RunStopped, UsageError, values
from image_files import image_grid, png_bytes

MOST_IMAGES = 64  # of a seed, which are one batch
TURN = 0.2  # seconds between looks at the line


@dataclass(frozen=True)
class Wish:
    """What is to be drawn: as many images of each thing asked for, of each seed."""

    what: tuple[str, ...]  # numbers or names of classes, or prompts
    each: int
    seeds: tuple[int, ...]
    cfg_scale: float
    steps: int | str
    sampler: str
    preview: bool = True

    @property
    def columns(self) -> int:
        """A row for each thing; of one thing, a square."""
        if len(self.what) > 1:
            return self.each if self.each > 1 else min(5, len(self.what))
        return math.ceil(math.sqrt(self.each))


class Progress(NamedTuple):
    """How far a drawing is: some network evaluations of all, of the seed with this place in the wish."""

    done: int
    total: int
    place: int
    images: np.ndarray | None  # (N, size, size, 3) uint8, what the network takes them for; None: no preview


class Waiting(NamedTuple):
    """How many drawings come first."""

    ahead: int


class Place(NamedTuple):
    """Where experts worked."""

    half: int
    layer: int  # of those with experts
    step: int


@dataclass(frozen=True)
class Work:
    """What the experts did for the images of a seed."""

    times: list[float]  # (S,) of the evaluations, 1 is pure noise
    layers: list[int]  # (L,) which blocks have experts
    top_k: int
    experts: np.ndarray  # (N, H, L, S, P, min(K, 2)) 1 + the expert, by falling weight; 0: none
    counts: np.ndarray  # (H, L, S, E) assignments

    def place(self, half: int, layer: int, step: int) -> Place:
        """The nearest that there is: another drawing may have had more of them."""
        wanted, sizes = (half, layer, step), self.counts.shape
        return Place(*(min(index, size - 1) for index, size in zip(wanted, sizes, strict=False)))

    def loads(self, place: Place) -> str:
        """HTML: bars of the share of all tokens that each expert had."""
        tokens = len(self.experts) * self.experts.shape[4]
        return load_bars(self.counts[place].tolist(), tokens, self.top_k)


@dataclass(frozen=True)
class Sheet:
    """The images of one seed."""

    settings: sampling.Settings
    columns: int
    images: np.ndarray  # (N, size, size, 3) uint8
    evaluations: int  # S
    work: Work | None  # None: a dense model

    @property
    def seed(self) -> int:
        return self.settings.seed

    @cached_property
    def grid(self) -> np.ndarray:
        """(H, W, 3) one picture of all of them."""
        return image_grid(self.images, self.columns)

    def patches(self, place: Place, rank: int) -> np.ndarray:
        """The same picture, each patch in the colour of its expert: that of the largest weight, or the next one."""
        chosen = self.work.experts[(slice(None), *place)]  # (N, P, min(K, 2))
        experts = chosen[..., min(rank, chosen.shape[-1] - 1)]
        return image_grid(coloured(self.images, experts, self.work.counts.shape[-1]), self.columns)


class Ticket(NamedTuple):
    """Of a drawing that is made, or waits for its turn."""

    owner: str
    stop: threading.Event


class Desk:
    """A network at which one drawing after the other is made, all by one thread; the others wait in line."""

    def __init__(self, loaded: sampling.Loaded, args, precision: str):
        self.loaded, self.args, self.precision = loaded, args, precision
        self.worker, self.line = ThreadPoolExecutor(1, thread_name_prefix="drawing"), []

    def cancel(self, owner: str) -> None:
        """End this owner's drawings, each at its next evaluation: they raise `Stopped`."""
        for ticket in list(self.line):
            if ticket.owner == owner:
                ticket.stop.set()

    def close(self) -> None:
        for ticket in list(self.line):
            ticket.stop.set()
        self.worker.shutdown(cancel_futures=True)

    @property
    def has_experts(self) -> bool:
        return bool(self.loaded.model.config.moe_indices)

    def draw(self, wish: Wish, owner: str = "") -> Iterator[Waiting | Progress | list[Sheet]]:
        """How it goes, then a sheet for each seed. Closing the iterator ends the drawing, as `cancel` does.

        Raises:
            UsageError: there is no such class, sampler, number of steps, ...
            RunStopped: the network gives NaN, or memory is too small.
            Stopped: it was cancelled.
        """
        requests = self.requests(wish)
        settings = [self.settings(wish, seed) for seed in wish.seeds]

        def work(tell: Callable) -> list[Sheet]:
            return [self._sheet(wish, requests, place, each, tell) for place, each in enumerate(settings)]

        ticket = Ticket(owner, threading.Event())
        self.line.append(ticket)
        try:
            yield from told_by(self.worker, work, ticket.stop, lambda: Waiting(self.line.index(ticket)))
        finally:
            self.line.remove(ticket)

    def requests(self, wish: Wish) -> list[int] | list[str]:
        """What each image is to be of."""
        if not wish.what:
            raise UsageError("nothing is asked for: choose a class, or write a prompt")
        if len(wish.what) * wish.each > MOST_IMAGES:
            raise UsageError(f"{len(wish.what)} x {wish.each} images are more than {MOST_IMAGES}: ask for fewer")
        what = wish.what if self.loaded.draws_from_texts else self.loaded.parse(wish.what)
        return [request for request in what for _ in range(wish.each)]

    def settings(self, wish: Wish, seed: int) -> sampling.Settings:
        """The command line's, but for what the wish says."""
        said = {"seed": seed, "cfg_scale": wish.cfg_scale, "num_sampling_steps": wish.steps, "sampler": wish.sampler}
        args = Namespace(**values(self.args) | said, given={})
        config = self.loaded.model.config
        settings = sampling.Settings.from_args(args, self.loaded.objective, config.in_channels)
        settings = replace(settings, guide=None if wish.cfg_scale == 1 else self.loaded.settings.guide)
        sampling.check_settings(config, self.loaded.objective, settings)
        return settings

    def _sheet(self, wish: Wish, requests: list, place: int, settings: sampling.Settings, tell: Callable) -> Sheet:
        loaded = self.loaded
        times = evaluation_times(loaded.model.config, loaded.objective, settings)
        done, total = place * len(times), len(times) * len(wish.seeds)

        def on_evaluation(latents: Tensor) -> None:
            nonlocal done
            done += 1
            tell(lambda: Progress(done, total, place, self._pixels(latents) if wish.preview else None))

        images, everyone = len(requests), range(len(requests))
        network, tally = loaded.network, None
        if self.has_experts:
            guided = settings.cfg_scale != 1 and loaded.guide is None
            device = next(loaded.model.parameters()).device
            tally = Tally(loaded.model.config, [0] * images, times, guided, everyone, device=device)
            network = Recorder(loaded.model, tally, everyone)
        options = loaded.options | {"on_evaluation": on_evaluation}
        try:
            pixels = sampling.draw(network, loaded.objective, loaded.space, requests, settings, everyone, **options)
        except torch.OutOfMemoryError:
            raise RunStopped("out of GPU memory: ask for fewer images") from None
        return Sheet(settings, wish.columns, pixels, len(times), None if tally is None else work_of(tally))

    def _pixels(self, latents: Tensor) -> np.ndarray:
        return sampling.to_pixels(self.loaded.space.decode(latents.float()))

    def archive(self, wish: Wish, sheets: list[Sheet]) -> bytes:
        """A .zip of the sheets: each image in its own size, the grids, and what they were drawn with."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for sheet in sheets:
                folder = f"seed{sheet.seed}"
                for index, image in enumerate(sheet.images):
                    archive.writestr(f"{folder}/{index:06d}.png", png_bytes(image))
                archive.writestr(f"{folder}/grid.png", png_bytes(sheet.grid))
                record = replace(self.loaded, settings=sheet.settings).record(self.precision)
                kind = "prompts" if self.loaded.draws_from_texts else "labels"
                archive.writestr(f"{folder}/settings.json", json.dumps(record | {kind: self.requests(wish)}, indent=1))
        return file.getvalue()


def work_of(tally: Tally) -> Work:
    """What a tally of which every image is an example has found."""
    config, sums = tally.config, tally.sums
    experts = sums["examples"].cpu().numpy()
    return Work(
        times=tally.times,
        layers=list(config.moe_indices),
        top_k=config.num_experts_per_tok,
        experts=experts.astype(np.min_scalar_type(experts.max(initial=0))),
        counts=sums["step_counts"].cpu().numpy(),
    )


class Stopped(Exception):
    """Nobody waits for the result any more."""


def told_by(worker: Executor, work: Callable[[Callable], object], stop: threading.Event, waiting: Callable) -> Iterator:
    """What `work(tell)` tells while a thread does it, then what it returns; until its turn comes, what `waiting` makes.

    `tell(make)` calls `make` only if somebody waits for a word, so that a slow listener slows nobody down. Once `stop`
    is set, as it is when the iterator is closed, the next `tell` raises `Stopped`, and so does the iterator.
    """
    words, listens, begun = queue.SimpleQueue(), threading.Event(), threading.Event()

    def begin() -> object:
        begun.set()
        return work(tell)

    def tell(make: Callable[[], object]) -> None:
        if stop.is_set():
            raise Stopped
        if listens.is_set():
            listens.clear()
            words.put(make())

    listens.set()
    future = worker.submit(begin)
    future.add_done_callback(lambda _: words.put(None))
    try:
        while not begun.wait(TURN):
            if stop.is_set():
                raise Stopped
            yield waiting()
        while (word := words.get()) is not None:
            yield word
            listens.set()
        yield future.result()
    finally:
        stop.set()
        future.cancel()
