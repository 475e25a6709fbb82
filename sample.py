"""Sample images from a checkpoint: PNG files, a grid, and one `.npz` with images and labels.

`settings.json` beside them tells what they were drawn with, and which files are of this script: another call for the
same folder replaces those, and nothing else.

python sample.py --ckpt results/000-DiT-S-2-8E2A-rf --cfg-scale 1.5
python sample.py --model DiT-XL/2 --ckpt dit_moe_xl_8E2A.pt --vae-path sd-vae-ft-mse --num_experts 8 --cfg-scale 1.5
"""

import itertools
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

import distributed
import image_files
import machine
import sampling
from cli import Parser, UsageError, natural_int, positive_int, run
from files import replace_json
from prompts import read_prompts
from records import read_record

TOOL, SETTINGS = "sample.py", "settings.json"
IMAGENET_FAVOURITES = [207, 360, 387, 974, 88, 979, 417, 279]  # the classes that DiT shows


class Mark(TypedDict):
    """settings.json"""

    tool: NotRequired[str]  # without one, it is an older sample_ddp.py's
    files: NotRequired[list[str]]


def get_parser() -> Parser:
    parser = Parser(prog="sample.py", description=__doc__.partition("\n")[0])
    sampling.add_sampling_arguments(parser)
    group = parser.add_argument_group("images")
    group.add_argument(
        "--class-labels", nargs="+", metavar="LABEL", help="numbers or names of classes; a few by default"
    )
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw, of a network that reads texts")
    sampling.add_prompt_arguments(group)
    group.add_argument("--images-per-class", type=positive_int, default=1, help="of every label or prompt given")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images drawn at once")
    group.add_argument("--output", type=Path, help="folder (default: samples/, then a name that tells the settings)")
    group.add_argument("--grid", type=natural_int, metavar="COLUMNS", help="images per row of grid.png; 0 for no grid")
    parser.add_switch(group, "--png", True, "write each image as a PNG file")
    group.add_argument("--image-save-path", type=Path, metavar="FILE", help="write a grid there, 4 a row, and no more")
    return parser


def main(args) -> None:
    device = distributed.choose_device(args.device)
    distributed.keep_freed_memory(device)
    precision = machine.choose_precision(args.precision, device)
    loaded = sampling.load_for_sampling(args, device, machine.set_precision(precision))
    settings = loaded.settings
    labels = choose_labels(args, loaded)

    if args.image_save_path is not None:
        save_grid(args.image_save_path, draw(loaded, labels, settings, args.batch_size), args.grid or 4)
        print(f"{len(labels)} images ({settings}, {precision}) in {args.image_save_path}")
        return

    columns = args.images_per_class if args.images_per_class > 1 else min(8, len(labels))
    columns = columns if args.grid is None else args.grid
    names = ["samples.npz"] + (["grid.png"] if columns else [])
    names += [f"{index:06d}.png" for index in range(len(labels))] if args.png else []
    folder = choose_folder(args, loaded)
    before = files_of_before(folder, names)

    images = draw(loaded, labels, settings, args.batch_size)
    for name in before:
        (folder / name).unlink(missing_ok=True)
    record = {"tool": TOOL, "files": names} | loaded.record(precision)
    if loaded.draws_from_texts:
        record, labels = record | {"prompts": labels}, range(len(labels))
    replace_json(folder / SETTINGS, record)
    write(folder, images, labels, columns, args.png)
    print(f"{len(images)} images of {loaded.image_size}x{loaded.image_size} ({settings}, {precision}) in {folder}")


def choose_labels(args, loaded: sampling.Loaded) -> list[int] | list[str]:
    listed = [] if args.prompts is None else read_prompts(args.prompts)
    prompts = [*(args.prompt or ()), *(prompt.text for prompt in listed)]
    if prompts and not loaded.draws_from_texts:
        raise UsageError(f"--prompt: {loaded.source} is of classes; give --class-labels")
    if args.class_labels is not None:
        labels = loaded.parse(args.class_labels)
    elif loaded.draws_from_texts:
        labels = prompts or loaded.condition.spread(8)
    else:
        trained = loaded.condition.trained
        labels = IMAGENET_FAVOURITES if len(trained) == 1000 else trained[:10]
    return [label for label in labels for _ in range(args.images_per_class)]


def choose_folder(args, loaded: sampling.Loaded) -> Path:
    """`--output`, or a new folder whose name tells the settings; made before anything is drawn."""
    folder = args.output or Path("samples") / f"{loaded.name}-{loaded.settings}"
    try:
        if args.output is None:
            again = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
            while folder.exists():  # nothing that an earlier call drew is lost
                folder = next(again)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written: {error.strerror or error}") from None
    return folder


def draw(loaded: sampling.Loaded, labels: list[int], settings: sampling.Settings, batch_size: int) -> np.ndarray:
    """(N, H, W, 3) uint8, with a progress bar over all sampling steps of all batches."""
    from tqdm import tqdm

    bar = tqdm(desc="sampling", unit="step", disable=None)  # absent where the output is a file

    def progress(steps):
        steps = list(steps)
        bar.total = len(steps) * -(-len(labels) // batch_size)
        for step in steps:
            yield step
            bar.update()

    options = loaded.options | {"batch_size": batch_size, "progress": progress}
    batches = sampling.generate(loaded.network, loaded.objective, loaded.space, labels, settings, **options)
    images = np.concatenate(list(batches))
    bar.close()
    return images


def save_grid(path: Path, images: np.ndarray, columns: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image_files.save_png(path, image_files.image_grid(images, columns))
    except OSError as error:
        raise UsageError(f"--image-save-path {path} cannot be written: {error.strerror or error}") from None


def files_of_before(folder: Path, names: list[str]) -> list[str]:
    """What an earlier call left in a folder, to be replaced; checked before anything is drawn.

    Raises:
        UsageError: the folder is another tool's, or holds files of these names that nobody answers for.
    """
    mark = folder / SETTINGS
    if not mark.exists():
        if there := [name for name in names if (folder / name).exists()]:
            raise UsageError(f"{folder} holds {there[0]}, which this script did not make: use another --output")
        return []
    record = read_record(mark, Mark, f"use another --output, or remove {folder}")
    if record.get("tool") != TOOL:
        raise UsageError(f"{folder} holds images of {record.get('tool', 'sample_ddp.py')}: use another --output")
    return [Path(name).name for name in record.get("files", [])]  # never a file elsewhere


def write(folder: Path, images: np.ndarray, labels: list[int], columns: int, png: bool) -> None:
    image_files.save_npz(folder / "samples.npz", [images], labels)
    if columns:
        image_files.save_png(folder / "grid.png", image_files.image_grid(images, columns))
    for index, image in enumerate(images if png else ()):
        image_files.save_png(folder / f"{index:06d}.png", image)


if __name__ == "__main__":
    run(main, get_parser())
