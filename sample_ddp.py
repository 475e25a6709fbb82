"""Sample many images with all processes: PNG files, and the `.npz` that the ADM evaluation suite reads.

torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/000-DiT-S-2-8E2A-rf --num-fid-samples 50000
torchrun --nproc_per_node=8 sample_ddp.py --model DiT-XL/2 --ckpt dit_moe_xl_8E2A.pt --vae-path sd-vae-ft-mse

An image depends on its index, the seed and the checkpoint alone, so any number of processes draws the same set. The
same command again goes on after a kill, with as many processes as there are then.
"""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
import sampling
from cli import Parser, RunStopped, UsageError, positive_int, run
from files import UNFINISHED, replace_json

ELSEWHERE = "use another --sample-dir"


def get_parser() -> Parser:
    parser = Parser(prog="sample_ddp.py", description=__doc__.partition("\n")[0])
    sampling.add_sampling_arguments(parser)
    group = sampling.add_set_arguments(parser)
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images a process draws at once")
    group.add_argument(
        "--sample-dir", type=Path, default=Path("samples"), help="gets a folder whose name tells the settings"
    )
    parser.add_switch(group, "--png", True, "write each image as a PNG file too")
    parser.add_switch(group, "--tf32", None, "the published name of --precision tf32")
    group.add_argument(
        "--no-tf32", dest="tf32", action="store_false", default=None, help="fp32, unless --precision says otherwise"
    )
    return parser


def main(args) -> None:
    wanted = requested_precision(args)
    processes = distributed.start(args.device)
    try:
        precision = sampling.choose_precision(wanted, processes.device)
        dtype = sampling.set_precision(precision)
        loaded = processes.together(lambda: sampling.load_for_sampling(args, processes.device, dtype))
        settings = loaded.settings

        images = processes.together(lambda: plan(args, loaded, settings, precision))
        todo = open_together(images, processes)
        try:
            drawn, seconds = draw(loaded, settings, images, todo, processes)
            if processes.is_main:
                images.finish()
                report(images, settings, precision, drawn, seconds)
        except OSError as error:
            raise RunStopped(f"{error}: finished images are kept, the same command goes on") from None
        except torch.OutOfMemoryError:
            raise RunStopped("out of GPU memory: use a smaller --per-proc-batch-size") from None
    finally:
        distributed.stop()


def requested_precision(args) -> str | None:
    """`--precision`, or what the published `--tf32` and `--no-tf32` stand for, or None."""
    if args.tf32 and args.precision not in (None, "tf32"):
        raise UsageError(f"--tf32 contradicts --precision {args.precision}; drop one of them")
    if args.tf32 is False and args.precision == "tf32":
        raise UsageError("--no-tf32 contradicts --precision tf32; drop one of them")
    if args.tf32 is not None and args.precision is None:
        return "tf32" if args.tf32 else "fp32"
    return args.precision


# --------------------------------------------------------------------------------------------------- the set of images


def plan(args, loaded: sampling.Loaded, settings: sampling.Settings, precision: str) -> "ImageSet":
    """The set that the command asks for, and where it goes. Writes nothing."""
    name = loaded.name + ("" if args.use_ema else "-no-ema")
    folder = f"{name}-{loaded.image_size}px-{settings}-{args.labels}-{precision}-{args.num_samples}"
    record = loaded.record(precision) | {
        "labels": args.labels,
        "num-fid-samples": args.num_samples,
        "per-proc-batch-size": args.per_proc_batch_size,
    }
    return ImageSet(
        folder=args.sample_dir / folder,
        record=json.loads(json.dumps(record)),  # as it will be read back
        labels=np.array(sampling.LABELS[args.labels](args.num_samples, loaded.classes, settings.seed)),
        image_size=loaded.image_size,
        batch_size=args.per_proc_batch_size,
        png=args.png,
    )


@dataclass
class ImageSet:
    """N images in a folder of their own. Batch b holds images bB .. bB + B - 1, whichever process draws it.

    A batch is finished when its part, a small `.npz`, is there; its PNG files come first. The parts become one file in
    the end. `settings.json` tells what they were drawn with.
    """

    folder: Path
    record: dict  # all that the images depend on
    labels: np.ndarray  # (N,)
    image_size: int
    batch_size: int
    png: bool

    @property
    def npz(self) -> Path:
        return self.folder / "samples.npz"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def num_batches(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def part(self, batch: int) -> Path:
        return self.folder / "parts" / f"{batch:06d}.npz"

    def indices(self, batch: int) -> range:
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.labels)))

    def labels_of(self, batch: int) -> np.ndarray:
        indices = self.indices(batch)
        return self.labels[indices.start : indices.stop]

    def open(self) -> list[int]:
        """Make the folder, or see what it holds; returns the batches that are not finished.

        Raises:
            UsageError: the folder cannot be written, or holds something else, or images drawn with other settings.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.rglob(f"{UNFINISHED}*"):
                leftover.unlink()
            self._compare_settings()
            replace_json(self.settings, self.record)
            self.part(0).parent.mkdir(exist_ok=True)
        except OSError as error:
            place = self.folder.parent
            raise UsageError(f"--sample-dir {place} cannot be written: {error.strerror or error}") from None
        names = {path.name for path in self.folder.iterdir()}
        whole = self._stored(self.npz, self.labels) is not None
        return [batch for batch in range(self.num_batches) if not self._finished(batch, whole, names)]

    def _compare_settings(self) -> None:
        """Images that are there already must have been drawn as the others are to be."""
        found = sorted({path.name for path in self.folder.iterdir()} - {self.settings.name})
        if not self.settings.exists() and found:
            raise UsageError(f"{self.folder} holds {found[0]} but no {self.settings.name}: remove it, or {ELSEWHERE}")
        if found == [] or (found == ["parts"] and not any(self.part(0).parent.iterdir())):
            return  # nothing was finished, so another batch size is welcome
        try:
            before = dict(json.loads(self.settings.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.settings} is damaged ({error}): remove {self.folder}, or {ELSEWHERE}") from None
        for key in sorted(before.keys() | self.record.keys()):
            if before.get(key) != self.record.get(key):
                raise UsageError(
                    f"{self.folder} holds images drawn with {key} {before.get(key)}, now it is {self.record.get(key)}: "
                    f"remove it, or {ELSEWHERE}"
                )

    def _finished(self, batch: int, whole: bool, names: set[str]) -> bool:
        """`names`: of the files in the folder. A part that is not as it should be is removed."""
        if not whole and self._stored(self.part(batch), self.labels_of(batch), verify=True) is None:
            self.part(batch).unlink(missing_ok=True)
            return False
        return not (self.png and any(png_name(index) not in names for index in self.indices(batch)))

    def _stored(self, path: Path, labels: np.ndarray, verify: bool = False) -> np.ndarray | None:
        """The images of a file, memory-mapped, if it is whole and of the right size and labels."""
        try:
            images, found = sampling.open_npz(path, verify)
        except UsageError:
            return None
        fits = images.shape == (len(labels), self.image_size, self.image_size, 3) and np.array_equal(found, labels)
        return images if fits else None

    def read(self, batch: int) -> np.ndarray | None:
        """The images of a batch that is drawn, whose PNG files may be missing; else None."""
        if (images := self._stored(self.npz, self.labels)) is not None:
            indices = self.indices(batch)
            return images[indices.start : indices.stop]
        return self._stored(self.part(batch), self.labels_of(batch))

    def write(self, batch: int, images: np.ndarray, new: bool) -> None:
        if self.png:
            for index, image in zip(self.indices(batch), images, strict=True):
                sampling.save_png(self.folder / png_name(index), image)
        if new:
            sampling.save_npz(self.part(batch), [images], self.labels_of(batch))

    def finish(self) -> None:
        """Join the parts, one at a time, and remove them."""
        if self._stored(self.npz, self.labels) is None:
            sampling.save_npz(self.npz, map(self._part_again, range(self.num_batches)), self.labels)
        shutil.rmtree(self.part(0).parent)

    def _part_again(self, batch: int) -> np.ndarray:
        images = self._stored(self.part(batch), self.labels_of(batch))
        if images is None:
            raise RunStopped(f"{self.part(batch)} has gone or is damaged; the same command draws it again")
        return images


def png_name(index: int) -> str:
    return f"{index:06d}.png"


def open_together(images: ImageSet, processes: distributed.Processes) -> list[int]:
    """The batches that are not finished; rank 0 looks, so that all agree.

    Raises:
        UsageError: as `ImageSet.open`; or a process does not see what rank 0 wrote.
    """
    todo = processes.on_main(images.open)
    if not all(processes.gather(images.settings.is_file())):
        raise UsageError(f"{images.folder} is not the same for all processes; --sample-dir must be on a shared disk")
    return todo


# -------------------------------------------------------------------------------------------------------------- drawing


def draw(
    loaded: sampling.Loaded,
    settings: sampling.Settings,
    images: ImageSet,
    todo: list[int],
    processes: distributed.Processes,
) -> tuple[int, float]:
    """Draw the batches `todo`, dealt in turn to the processes; one is written while the next is drawn.

    Returns:
        How many images all processes drew, and the seconds it took.
    """
    mine = todo[processes.rank :: processes.world_size]
    rounds = -(-len(todo) // processes.world_size)
    count = len(images.labels)
    there = count - sum(len(images.indices(batch)) for batch in todo)
    bar = distributed.progress_bar(processes, total=count, initial=there, unit="image")
    total, start = 0, time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing = writer.submit(lambda: None)
        for turn in range(rounds):
            count = drawn = 0
            if turn < len(mine):
                batch = mine[turn]
                pixels = images.read(batch)
                if new := pixels is None:
                    pixels = draw_batch(loaded, settings, images, batch)
                writing.result()
                writing = writer.submit(images.write, batch, pixels, new)
                count, drawn = len(pixels), len(pixels) if new else 0
            # Once a round, so that no process waits for another longer than a batch takes.
            count, drawn = processes.sum(torch.tensor([count, drawn], device=processes.device)).tolist()
            bar.update(count)
            total += drawn
        writing.result()
    processes.barrier()
    bar.close()
    return total, time.perf_counter() - start


def draw_batch(loaded: sampling.Loaded, settings: sampling.Settings, images: ImageSet, batch: int) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    indices, labels = images.indices(batch), images.labels_of(batch).tolist()
    return sampling.draw(loaded.network, loaded.objective, loaded.space, labels, settings, indices)


def report(images: ImageSet, settings: sampling.Settings, precision: str, drawn: int, seconds: float) -> None:
    count, size = len(images.labels), images.image_size
    print(f"{count} images of {size}x{size} ({settings}, {precision}) in {images.folder}")
    if drawn:
        print(f"{drawn} drawn now, {drawn / seconds:.1f} images/s")
    else:
        print("all were there already")


if __name__ == "__main__":
    run(main, get_parser())
