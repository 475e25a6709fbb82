"""Sample many images with all processes: PNG files, and the `.npz` that the ADM evaluation suite reads.

torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/000-DiT-S-2-8E2A-rf --num-fid-samples 50000
torchrun --nproc_per_node=8 sample_ddp.py --model DiT-XL/2 --ckpt dit_moe_xl_8E2A.pt --vae-path sd-vae-ft-mse

An image depends on its index, the seed and the checkpoint alone, so any number of processes draws the same set. The
same command again goes on after a kill, with as many processes and as large batches as it then has; to the bit, images
are those of an unbroken run for one `--per-proc-batch-size`: matrix products round otherwise in another batch.
"""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import distributed
import image_files
import machine
import sampling
from cli import Parser, RunStopped, UsageError, positive_int, run
from files import UNFINISHED, replace_json, replace_lines
from records import read_record

TOOL = "sample_ddp.py"
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
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="flat",
        help="of PNG files of prompts: 000000.png, or as GenEval has them",
    )
    parser.add_switch(group, "--tf32", None, "the published name of --precision tf32")
    group.add_argument(
        "--no-tf32", dest="tf32", action="store_false", default=None, help="fp32, unless --precision says otherwise"
    )
    return parser


def main(args) -> None:
    wanted = requested_precision(args)
    processes = distributed.start(args.device)
    try:
        precision = machine.choose_precision(wanted, processes.device)
        dtype = machine.set_precision(precision)
        loaded = processes.together(lambda: sampling.load_for_sampling(args, processes.device, dtype))
        settings = loaded.settings

        images = processes.together(lambda: plan(args, loaded, settings, precision))
        try:
            todo = open_together(images, processes)
            drawn, seconds = draw(loaded, settings, images, todo, processes)
            if processes.is_main:
                images.finish()
                report(images, settings, precision, drawn, seconds)
        except OSError as error:
            raise RunStopped(f"{error}: finished images are kept, the same command goes on") from None
        except torch.OutOfMemoryError:
            raise RunStopped("out of GPU memory: use a smaller --per-proc-batch-size") from None
        finally:
            images.release()
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
    asked = sampling.choose_images(args, loaded)
    if args.layout != "flat" and (asked.prompts is None or not args.png):
        raise UsageError(f"--layout {args.layout} is of PNG files of prompts: give --prompts, and leave --png")
    of = args.labels if asked.prompts is None else args.prompts.stem
    name = loaded.name + ("" if args.use_ema else "-no-ema")
    folder = f"{name}-{loaded.image_size}px-{settings}-{of}-{precision}-{len(asked)}"
    record = {"tool": TOOL} | loaded.record(precision) | asked.record(args) | {"num-fid-samples": len(asked)}
    return ImageSet(
        folder=args.sample_dir / folder,
        record=json.loads(json.dumps(record | LAYOUTS[args.layout].record)),  # as it will be read back
        asked=asked,
        image_size=loaded.image_size,
        batch_size=args.per_proc_batch_size,
        png=args.png,
        layout=LAYOUTS[args.layout],
    )


class Flat:
    """`000000.png`, one beside the other; of prompts also `captions.jsonl`, which makes a data set of the folder."""

    record: ClassVar[dict] = {}

    @staticmethod
    def path(index: int, asked: sampling.Asked) -> str:
        return f"{index:06d}.png"

    @classmethod
    def finish(cls, folder: Path, asked: sampling.Asked) -> None:
        if asked.prompts is not None:
            pairs = zip(range(len(asked)), asked.of(range(len(asked))), strict=True)
            rows = [{"path": cls.path(index, asked), "caption": text} for index, text in pairs]
            replace_lines(folder / "captions.jsonl", rows)


class GenEval:
    """`00000/samples/00000.png`, a folder for each prompt with what its list says of it: GenEval's layout."""

    record: ClassVar[dict] = {"layout": "geneval"}

    @staticmethod
    def path(index: int, asked: sampling.Asked) -> str:
        return f"{index // asked.each:05d}/samples/{index % asked.each:05d}.png"

    @staticmethod
    def finish(folder: Path, asked: sampling.Asked) -> None:
        for number in sorted(set(asked.numbers)):
            prompt = asked.prompts[number]
            replace_lines(folder / f"{number:05d}" / "metadata.jsonl", [prompt.about or {"prompt": prompt.text}])


LAYOUTS = {"flat": Flat, "geneval": GenEval}


@dataclass
class ImageSet:
    """N images in a folder of their own, drawn in batches: ranges of indices that never cross a multiple of the batch
    size, so that a set which goes on with the same size goes on with the same batches.

    A batch is finished when its part, a small `.npz` whose name tells the range, is there; its PNG files come first.
    The parts become one file in the end. `settings.json` tells what they were drawn with.
    """

    folder: Path
    record: dict  # all that the images depend on
    asked: sampling.Asked  # N
    image_size: int
    batch_size: int
    png: bool
    layout: type = Flat
    claim: Any = None  # of the folder, on rank 0
    found: list[range] = field(default_factory=list)  # whose images are in a file: the parts of an earlier call, or all

    def __post_init__(self):
        self.labels = np.array(self.asked.numbers)  # (N,), or numbers of prompts

    @property
    def all(self) -> range:
        return range(len(self.labels))

    @property
    def npz(self) -> Path:
        return self.folder / "samples.npz"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    def part(self, batch: range) -> Path:
        return self.parts / f"{batch.start:06d}-{batch.stop:06d}.npz"

    def labels_of(self, batch: range) -> np.ndarray:
        return self.labels[batch.start : batch.stop]

    def open(self) -> tuple[list[range], list[range]]:
        """Make the folder, or see what it holds, and hold it; returns the batches that are not finished, and `found`.

        Raises:
            UsageError: another command draws into the folder, it cannot be written, or holds something else, or images
                drawn with other settings.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.claim = distributed.claim(self.folder, f"another command draws into {self.folder}: wait for its end")
            for leftover in self.folder.rglob(f"{UNFINISHED}*"):
                leftover.unlink()
            self._compare_settings()
            replace_json(self.settings, self.record)
            self.parts.mkdir(exist_ok=True)
        except OSError as error:
            place = self.folder.parent
            raise UsageError(f"--sample-dir {place} cannot be written: {error.strerror or error}") from None
        if self._stored(self.npz, self.all, verify=True) is not None:
            found = [self.all]
        else:
            self.npz.unlink(missing_ok=True)
            found = self._good_parts()
        todo = self._batches(found)
        if self.png:  # of what is drawn, some PNG files may be missing
            names = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*.png")}
            drawn = [part for batch in found for part in self._cut(batch)]
            todo += [batch for batch in drawn if any(self.name_of(index) not in names for index in batch)]
        return sorted(todo, key=lambda batch: batch.start), found

    def name_of(self, index: int) -> str:
        """Of a PNG file, below the folder."""
        return self.layout.path(index, self.asked)

    def _batches(self, found: list[range]) -> list[range]:
        """What `found` leaves, in batches."""
        edges = [0, *(edge for batch in found for edge in (batch.start, batch.stop)), len(self.labels)]
        gaps = [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        return [batch for gap in gaps for batch in self._cut(gap)]

    def _cut(self, indices: range) -> list[range]:
        """A range at the multiples of the batch size."""
        size = self.batch_size
        starts = [indices.start, *range((indices.start // size + 1) * size, indices.stop, size)] if indices else []
        return [range(start, min((start // size + 1) * size, indices.stop)) for start in starts]

    def _good_parts(self) -> list[range]:
        """The finished parts, ascending; what is not as it should be, or is there twice, is removed."""
        found, end = [], 0
        for path in sorted(self.parts.iterdir()):
            match = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
            part = range(int(match[1]), int(match[2])) if match else range(0)
            fits = part and end <= part.start and part.stop <= len(self.labels)
            if fits and self._stored(path, part, verify=True) is not None:
                found.append(part)
                end = part.stop
            else:
                path.unlink()
        return found

    def _compare_settings(self) -> None:
        """Images that are there already must have been drawn as the others are to be."""
        found = sorted({path.name for path in self.folder.iterdir()} - {self.settings.name, ".lock"})
        if not self.settings.exists() and found:
            raise UsageError(f"{self.folder} holds {found[0]} but no {self.settings.name}: remove it, or {ELSEWHERE}")
        if found == [] or (found == ["parts"] and not any(self.parts.iterdir())):
            return  # nothing was finished
        before = read_record(self.settings, dict[str, Any], f"remove {self.folder}, or {ELSEWHERE}")
        before = {"tool": TOOL} | {key: value for key, value in before.items() if key != "per-proc-batch-size"}
        for key in sorted(before.keys() | self.record.keys()):
            if before.get(key) != self.record.get(key):
                raise UsageError(
                    f"{self.folder} holds images drawn with {key} {before.get(key)}, now it is {self.record.get(key)}: "
                    f"remove it, or {ELSEWHERE}"
                )

    def _stored(self, path: Path, batch: range, verify: bool = False) -> np.ndarray | None:
        """The images of a file, memory-mapped, if it is whole and of the right size and labels."""
        try:
            images, found = image_files.open_npz(path, verify)
        except UsageError:
            return None
        fits = images.shape == (len(batch), self.image_size, self.image_size, 3)
        return images if fits and np.array_equal(found, self.labels_of(batch)) else None

    def read(self, batch: range) -> np.ndarray | None:
        """The images of a batch that is drawn, whose PNG files may be missing; else None."""
        for part in self.found:
            if part.start <= batch.start and batch.stop <= part.stop:
                images = self._stored(self.npz if part == self.all else self.part(part), part)
                return images if images is None else images[batch.start - part.start : batch.stop - part.start]
        return None

    def write(self, batch: range, images: np.ndarray, new: bool) -> None:
        if self.png:
            for index, image in zip(batch, images, strict=True):
                path = self.folder / self.name_of(index)
                path.parent.mkdir(parents=True, exist_ok=True)
                image_files.save_png(path, image)
        if new:
            image_files.save_npz(self.part(batch), [images], self.labels_of(batch))

    def finish(self) -> None:
        """Join the parts, one at a time, and remove them."""
        if not self.npz.exists():
            parts = self._good_parts()
            if self._batches(parts):
                raise RunStopped(f"parts in {self.parts} have gone or are damaged; the same command draws them again")
            image_files.save_npz(self.npz, (self._stored(self.part(part), part) for part in parts), self.labels)
        if self.png:
            self.layout.finish(self.folder, self.asked)
        shutil.rmtree(self.parts)

    def release(self) -> None:
        """Let another command draw into the folder."""
        if self.claim is not None:
            distributed.release(self.claim)


def open_together(images: ImageSet, processes: distributed.Processes) -> list[range]:
    """The batches that are not finished; rank 0 looks, so that all agree.

    Raises:
        UsageError: as `ImageSet.open`; or a process does not see what rank 0 wrote.
    """
    todo, images.found = processes.on_main(images.open)
    if not all(processes.gather(images.settings.is_file())):
        raise UsageError(f"{images.folder} is not the same for all processes; --sample-dir must be on a shared disk")
    return todo


# -------------------------------------------------------------------------------------------------------------- drawing


def draw(
    loaded: sampling.Loaded,
    settings: sampling.Settings,
    images: ImageSet,
    todo: list[range],
    processes: distributed.Processes,
) -> tuple[int, float]:
    """Draw the batches `todo`, dealt in turn to the processes; one is written while the next is drawn.

    Returns:
        How many images all processes drew, and the seconds it took.
    """
    mine = todo[processes.rank :: processes.world_size]
    rounds = -(-len(todo) // processes.world_size)
    count = len(images.labels)
    there = count - sum(map(len, todo))
    bar = distributed.progress_bar(processes, total=count, initial=there, unit="image")
    total, start = 0, time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing = writer.submit(lambda: None)
        for turn in range(rounds):
            count = drawn = 0
            broken = None
            if turn < len(mine):
                batch = mine[turn]
                pixels = images.read(batch)
                new = pixels is None
                try:
                    pixels = draw_batch(loaded, settings, batch, images.asked.of(batch)) if new else pixels
                except sampling.BrokenNetwork as reason:
                    broken = reason
                else:
                    writing.result()
                    writing = writer.submit(images.write, batch, pixels, new)
                    count, drawn = len(pixels), len(pixels) if new else 0
            # Once a round, so that no process waits for another longer than a batch takes.
            sums = torch.tensor([count, drawn, float(broken is not None)], device=processes.device)
            count, drawn, stop = map(int, processes.sum(sums).tolist())
            bar.update(count)
            total += drawn
            if stop:
                writing.result()  # what is good is kept
                reason = next(each for each in processes.gather(broken) if each is not None)
                reason.everywhere = True
                raise reason
        writing.result()
    processes.barrier()
    bar.close()
    return total, time.perf_counter() - start


def draw_batch(loaded: sampling.Loaded, settings: sampling.Settings, batch: range, asked: list) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    return sampling.draw(loaded.network, loaded.objective, loaded.space, asked, settings, batch, **loaded.options)


def report(images: ImageSet, settings: sampling.Settings, precision: str, drawn: int, seconds: float) -> None:
    count, size = len(images.labels), images.image_size
    print(f"{count} images of {size}x{size} ({settings}, {precision}) in {images.folder}")
    if drawn:
        print(f"{drawn} drawn now, {drawn / seconds:.1f} images/s")
    else:
        print("all were there already")


if __name__ == "__main__":
    run(main, get_parser())
