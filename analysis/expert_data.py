"""Record what every expert does while images are drawn: which classes, patches and steps it takes.

    python -m analysis.expert_data --ckpt results/000-DiT-S-2-8E2A-rf --images-per-class 8
    torchrun --nproc_per_node=8 -m analysis.expert_data --ckpt dit_moe_xl_8E2A.pt --class-labels 207 360 974

Writes one `.npz` (without pickle) that `analysis.heatmaps` and `analysis.report` read; what is in it stands in
`analysis/routing.py`. Image i is the one that `sample.py` draws for the same flags. The numbers do not depend on how
many processes draw; the same command again goes on after a kill.
"""

import functools
import json
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
import machine
import sampling
from analysis.routing import Recorder, RoutingData, Tally, evaluation_times
from cli import Parser, RunStopped, UsageError, natural_int, number_in, positive_int, run
from files import UNFINISHED, replace_json, replacing
from prompts import read_prompts

ELSEWHERE = "remove it, or use another --output"


def get_parser() -> Parser:
    parser = Parser(prog="python -m analysis.expert_data", description=__doc__.partition("\n")[0])
    sampling.add_sampling_arguments(parser)
    parser.set_defaults(cfg_scale=1.5)
    group = parser.add_argument_group("images")
    group.add_argument("--class-labels", nargs="+", metavar="LABEL", help="numbers or names of classes; all by default")
    sampling.add_prompt_arguments(group)
    group.add_argument("--images-per-class", type=positive_int, default=4, help="of every label or prompt given")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images a process draws at once")
    group.add_argument("--examples", type=natural_int, default=4, help="images of which every single choice is kept")
    group.add_argument("--output", type=Path, help=".npz (default: in results/routing/, its name tells the settings)")
    group.add_argument(
        "--save-every",
        type=number_in(0, 1e6),
        default=60,
        metavar="SECONDS",
        help="between writes: what a kill may cost, besides the batch in progress",
    )
    return parser


def main(args) -> None:
    processes = distributed.start(args.device)
    try:
        precision = machine.choose_precision(args.precision, processes.device)
        dtype = machine.set_precision(precision)
        loaded = processes.together(lambda: sampling.load_for_sampling(args, processes.device, dtype))

        job = processes.together(lambda: plan(args, loaded, precision))
        todo, first_part = processes.on_main(job.open)
        if not all(processes.gather(job.path.parent.is_dir())):
            raise UsageError(f"{job.path.parent} is not the same for all processes; --output must be on a shared disk")
        if processes.is_main and todo:
            print(
                f"{len(job.labels)} images, up to {job.tally().file_bytes / 1e6:.1f} MB before compression: {job.path}"
            )
        try:
            record(loaded, job, todo, job.part(first_part + processes.rank), processes, args.save_every)
            if processes.is_main:
                job.finish()
                report(job)
        except OSError as error:
            raise RunStopped(f"{error}: what was saved is kept, the same command goes on") from None
        except torch.OutOfMemoryError:
            raise RunStopped("out of GPU memory: use a smaller --batch-size") from None
        processes.barrier()
    finally:
        distributed.stop()


# -------------------------------------------------------------------------------------------------------------- the job


def plan(args, loaded: sampling.Loaded, precision: str) -> "Job":
    """What the command asks for, and where it goes. Writes nothing.

    Raises:
        UsageError: labels that the model does not know, or a model without experts.
    """
    config, settings = loaded.model.config, loaded.settings
    if loaded.guide is not None:
        raise UsageError("--guide: what experts do is counted of one network and its two halves; drop it")
    if not config.moe_indices:
        raise UsageError(f"{loaded.source} is a dense model: it has no experts to look at")
    classes, names = choose_classes(args, loaded)
    name = f"{loaded.name}-{settings}-{len(set(classes))}x{args.images_per_class}.npz"
    about = loaded.record(precision) | {
        "checkpoint": loaded.name + ("" if args.use_ema else "-no-ema"),
        "image_size": loaded.image_size,
        "settings": str(settings),
        "batch_size": args.batch_size,
        "class_labels": classes,
        "images_per_class": args.images_per_class,
        "class_names": names,
        "examples": spread(len(classes) * args.images_per_class, args.examples),
    }
    return Job(
        path=args.output or Path("results/routing") / name,
        about=json.loads(json.dumps(about)),  # as it will be read back
        config=config,
        times=evaluation_times(config, loaded.objective, settings),
        image_size=loaded.image_size,
        batch_size=args.batch_size,
    )


def choose_classes(args, loaded: sampling.Loaded) -> tuple[list[int], list[str]]:
    """The labels to draw and the names of those that there are; of a network of texts each prompt is a class.

    Raises:
        UsageError: texts for a network of classes, or the reverse; unknown classes.
    """
    if loaded.draws_from_texts and args.prompts is None:
        raise UsageError(f"{loaded.source} draws from texts: --prompts FILE says which")
    if args.prompts is not None and not loaded.draws_from_texts:
        raise UsageError(f"--prompts: {loaded.source} draws from classes")
    if loaded.draws_from_texts:
        texts = [prompt.text for prompt in read_prompts(args.prompts)]
        return list(range(len(texts))), texts
    classes = loaded.parse(args.class_labels) if args.class_labels else list(loaded.condition.trained)
    return classes, [loaded.condition.name(label) for label in sorted(set(classes))]


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of 0 .. count - 1, from end to end."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


@dataclass
class Job:
    """Images in batches; batch b holds images bB .. bB + B - 1, whichever process draws it.

    Each process keeps its sums in a part, a file that it replaces as it goes on; `done` in it marks the batches that
    they hold. The parts are added up in the end.
    """

    path: Path
    about: dict  # all that the numbers depend on
    config: object
    times: list[float]
    image_size: int
    batch_size: int

    @functools.cached_property
    def labels(self) -> list[int]:
        """Of each image."""
        return [label for label in self.about["class_labels"] for _ in range(self.about["images_per_class"])]

    @property
    def folder(self) -> Path:
        """Of the parts."""
        return self.path.with_name(f"{self.path.name}.parts")

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    def part(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def indices(self, batch: int) -> range:
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.labels)))

    def tally(self, device: torch.device | str = "meta") -> Tally:
        guided = self.about["cfg_scale"] != 1
        return Tally(
            self.config, self.labels, self.times, guided, self.about["examples"], self.image_size, device=device
        )

    def no_batch(self) -> np.ndarray:
        return np.zeros(-(-len(self.labels) // self.batch_size), dtype=np.int64)

    def open(self) -> tuple[list[int], int]:
        """Make the folder, or see what it holds: the batches that are not done, and a number for a new part.

        Raises:
            UsageError: it cannot be written, or holds something else.
        """
        if self.path.exists():
            self._compare(self.path, RoutingData.load(self.path).about["recorded_with"])
            return [], 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.parent.glob(f"{UNFINISHED}{self.path.name}*"):
                leftover.unlink()
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
                leftover.unlink()
            parts = self._parts()
            if parts:
                self._compare(self.folder, self._settings_before())
            replace_json(self.settings, self.about)
        except OSError as error:
            raise UsageError(f"--output {self.path} cannot be written: {error.strerror or error}") from None
        done = self.no_batch()
        for path in parts:
            try:
                done += read_part(path)["done"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                path.unlink()  # damaged: its batches are drawn again
        return np.flatnonzero(done == 0).tolist(), 1 + max((int(path.stem) for path in parts), default=-1)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.npz"))

    def _settings_before(self) -> dict:
        try:
            return dict(json.loads(self.settings.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.settings} is missing or damaged ({error}): remove {self.folder}") from None

    def _compare(self, place: Path, before: dict) -> None:
        """Raises UsageError where what is there was recorded otherwise."""
        for key in sorted(before.keys() | self.about.keys()):
            if (old := before.get(key)) != (new := self.about.get(key)):
                what = f"{key} {old}, now it is {new}" if len(f"{old}{new}") < 80 else f"other {key}"
                raise UsageError(f"{place} was recorded with {what}: {ELSEWHERE}")

    def finish(self) -> None:
        """Add the parts up, and remove them."""
        if not self.path.exists():
            tally, done = self.tally("cpu"), self.no_batch()
            for path in self._parts():
                sums = read_part(path)
                done += sums["done"]
                tally.add_sums(sums)
            assert (done == 1).all(), f"batches counted {sorted(set(done.tolist()))} times"
            tally.result(**self._facts()).save(self.path)
        for path in [*self._parts(), self.settings]:
            path.unlink(missing_ok=True)
        if self.folder.exists():
            self.folder.rmdir()

    def _facts(self) -> dict:
        """What readers of the file want to know, and what this command compares when it is given again."""
        wanted = ("checkpoint", "model", "settings", "cfg_scale", "sampler", "precision", "class_names")
        return {name: self.about[name] for name in wanted} | {"recorded_with": self.about}


def read_part(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def write_part(path: Path, tally: Tally, done: np.ndarray) -> None:
    """The sums so far, each in as few bytes as its largest number needs; whole or not at all. Raises OSError."""
    sums = {name: total.cpu().numpy() for name, total in tally.sums.items()} | {"done": done}
    with replacing(path) as file:
        np.savez(file, **{name: a.astype(np.min_scalar_type(a.max(initial=0))) for name, a in sums.items()})


# ------------------------------------------------------------------------------------------------------------ recording


def record(
    loaded: sampling.Loaded,
    job: Job,
    todo: list[int],
    part: Path,
    processes: distributed.Processes,
    save_every: float,
) -> None:
    """Draw the batches `todo`, dealt in turn to the processes, and leave this one's sums in `part`."""
    if not todo:
        return
    mine, done = todo[processes.rank :: processes.world_size], job.no_batch()
    tally, saved = job.tally(processes.device), time.monotonic()
    bar = progress_bar(len(mine) * len(job.times), processes)
    for turn in range(-(-len(todo) // processes.world_size)):
        if turn < len(mine):
            draw_batch(loaded, job, mine[turn], tally, bar)
            done[mine[turn]] = 1
            if time.monotonic() - saved >= save_every or turn == len(mine) - 1:
                write_part(part, tally, done)
                saved = time.monotonic()
        processes.barrier()  # once a round, so that no process waits for another longer than a batch takes
    bar.close()


def draw_batch(loaded: sampling.Loaded, job: Job, batch: int, tally: Tally, bar) -> None:
    indices = job.indices(batch)
    labels = job.labels[indices.start : indices.stop]
    if loaded.draws_from_texts:
        labels = [job.about["class_names"][label] for label in labels]

    def progress(steps):
        for step in steps:
            yield step
            bar.update(len(job.times) / len(steps))  # Heun evaluates twice a step

    network = Recorder(loaded.model, tally, indices)
    options = {"progress": progress, "kind": loaded.condition}
    pixels = sampling.draw(network, loaded.objective, loaded.space, labels, loaded.settings, indices, **options)
    for index, image in zip(indices, pixels, strict=True):
        if index in tally.examples:
            tally.keep_image(index, image)


def progress_bar(total: int, processes: distributed.Processes):
    """Rank 0's, over its own network evaluations."""
    layout = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    return distributed.progress_bar(processes, total=total, unit="evaluation", bar_format=layout)


def report(job: Job) -> None:
    data = RoutingData.load(job.path)
    layers, steps = data["entropy"].shape[1:]
    print(
        f"{layers} layers x {job.config.num_experts} experts over {steps} evaluations of {len(job.labels)} images "
        f"({job.about['settings']}): {job.path}, {job.path.stat().st_size / 1e6:.2f} MB\n"
        f"look at it: python -m analysis.heatmaps {job.path}; python -m analysis.report {job.path}"
    )


if __name__ == "__main__":
    run(main, get_parser())
