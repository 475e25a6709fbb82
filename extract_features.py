"""Encode a folder of images once, so that training needs neither the images nor the autoencoder.

torchrun --nproc_per_node=8 extract_features.py --data-path imagenet/train --features-path features --vae-path mse
torchrun --nproc_per_node=8 extract_features.py --data-path captioned --text-encoder t5 --features-path features
python train.py --feature-path features ...

N images of a batch, n of a shard, C latent channels, h w latent height and width
T places of a feature of width F, with --repa

latents.py says what is written: for every image and its mirror image the mean and standard deviation of the posterior.
A shard is a stretch of the data set, cut into batches of its own, so its bytes do not depend on how many processes
there are. It is written beside and renamed when whole, and then described in a file of its own: what a killed run has
finished is kept. The manifest comes last, when every file has been read back. Features of captions, with
`--text-encoder`, and of images, with `--repa`, are written shard by shard likewise.
"""

import contextlib
import hashlib
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import cli
import distributed
import machine
import text
from autoencoders import LatentVAE, load_space, space_info
from caption_features import DTYPES as DTYPES_OF_CAPTIONS
from caption_features import EMPTY, in_half, write_array, write_captions
from captions import KNOWN, CaptionedSamples, open_captioned
from cli import RunStopped, UsageError, natural_int, positive_int
from data import ImageData, Reading, UnreadableImages, successors, to_unit_range
from files import UNFINISHED, digest, remedy, replace_json, replacing
from latents import (
    FORMAT,
    ITEM_AXES,
    MANIFEST,
    NAMES,
    PLAN,
    REPAIR,
    Settings,
    Shard,
    damage,
    npy_header,
    read_manifest,
    representation_path,
    shard_path,
    statistics_of,
    sums_of,
    write_manifest,
)
from records import BadRecord, read_record
from representation import Encoder

DTYPES = {"fp16": "float16", "fp32": "float32"}
MAX_SHARDS = 512  # training keeps every shard mapped, which takes an open file each
REPORT_EVERY = 10  # seconds
STALLED_AFTER = 1800  # seconds without a byte from any process


# --------------------------------------------------------------------------------------------------------------- script


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="extract_features.py", description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("images")
    group.add_argument("--data-path", type=Path, help="folder with one folder of images per class, or with captions")
    group.add_argument("--image-size", type=positive_int, default=256, help="side of the images, in pixels")
    group.add_argument("--background", default=Reading.background, help="colour under transparency: white, #rrggbb")
    group.add_argument("--num-workers", type=natural_int, default=4, help="processes that load images; 0: none")

    group = parser.add_argument_group("autoencoder")
    group.add_argument("--vae-path", "--vae", default="mse", help="folder, hub name, mse, or ema")
    group.add_argument("--batch-size", type=positive_int, default=32, help="images at once, with their mirror images")
    group.add_argument("--model", help="accepted for fast-DiT's commands; has no effect")

    group = parser.add_argument_group("captions")
    text.add_encoder_arguments(group, "of images with captions")
    group.add_argument("--caption-dtype", choices=DTYPES_OF_CAPTIONS, default="fp16", help="of their features")

    group = parser.add_argument_group("representation alignment (REPA)")
    group.add_argument("--repa", metavar="ENCODER", help="write what training with --repa ENCODER aligns with, too")
    group.add_argument(
        "--repa-patch-size", type=positive_int, default=2, help="of the model: latents of a side in one of its tokens"
    )

    group = parser.add_argument_group("features")
    group.add_argument(
        "--features-path", "--feature-path", type=Path, required=True, help="folder to write, or to go on with"
    )
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="of what is written")
    group.add_argument(
        "--shard-size", type=positive_int, help=f"images of a file (default: 1024, doubled until {MAX_SHARDS} files do)"
    )
    parser.add_switch(group, "--verify", False, "only compare finished features with their manifest, byte by byte")

    group = parser.add_argument_group("machine")
    machine.add_device_argument(group)
    group.add_argument("--precision", choices=machine.PRECISIONS, help="of the autoencoder: fp16 on a GPU, else fp32")
    parser.add_switch(group, "--compile", "auto", "torch.compile the autoencoder; auto: on a GPU in half precision")
    group.add_argument("--local-rank", type=int, help="set by launchers; not used")
    return parser


def main(args) -> None:
    processes = distributed.start(args.device)
    try:
        if args.verify:
            verify(args.features_path, processes)
            return
        job = prepare(args, processes)
        if not job.complete:
            extract(job)
            finish(job)
        describe(job)
    finally:
        distributed.stop()


def verify(folder: Path, processes: distributed.Processes) -> None:
    manifest = processes.on_main(lambda: read_manifest(folder))
    require_undamaged(folder, [*manifest["shards"], manifest["images"]], processes)
    if processes.is_main:
        print(f"{folder}: {len(manifest['shards'])} shards, every byte as the manifest says")


# -------------------------------------------------------------------------------------------------------------- prepare


@dataclass
class Job:
    """An extraction, checked and ready."""

    folder: Path
    processes: distributed.Processes
    data: ImageData
    space: LatentVAE
    settings: dict  # all that shapes the features, as JSON has it
    batch_size: int
    num_workers: int
    finished: dict[int, dict]  # shard -> what the manifest will say of it
    complete: bool  # nothing is left to do
    captions: CaptionedSamples | None = None  # whose images `data` are
    encoder: text.TextEncoder | None = None
    vision: Encoder | None = None

    def __post_init__(self):
        self.shard_size = self.settings["shard_size"]
        self.shape, self.dtype = tuple(self.settings["item_shape"]), np.dtype(self.settings["dtype"])
        self.side = self.settings.get("representation", {}).get("side", 0)  # places in a row
        self.num_shards = -(-len(self.data) // self.shard_size)
        self.todo = [shard for shard in range(self.num_shards) if shard not in self.finished]
        self.mine = self.todo[self.processes.rank :: self.processes.world_size]
        self.progress = Progress(self)

    def batches_of(self, shard: int) -> list[range]:
        """The images of a shard, batch by batch."""
        images = range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.data)))
        return [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]


def prepare(args, processes: distributed.Processes) -> Job:
    """Check all that the user gave, and see what is done already.

    Raises:
        UsageError: flags or images are wrong, or the folder holds something else.
    """
    data, shard_size, space, captions, encoder, vision = processes.together(lambda: open_inputs(args))
    settings = {
        "format": FORMAT,
        "image_size": args.image_size,
        "dtype": DTYPES[args.dtype],
        "item_shape": [2, 2, *data.latent_shape],
        "item_axes": ITEM_AXES,
        "shard_size": shard_size,
        "precision": args.precision or ("fp16" if processes.device.type == "cuda" else "fp32"),
        "autoencoder": space.record(),
        "data": processes.from_main((captions or data).record() if processes.is_main else None),
    }
    if captions is not None:
        settings["captions"] = settings["data"].pop("captions")
        settings["data"]["class_names"] = []
        settings["text"] = {"width": encoder.width, "dtype": DTYPES_OF_CAPTIONS[args.caption_dtype]}
        settings["text_encoder"] = encoder.record()
        encoder.to(processes.device)
    if vision is not None:
        settings["representation"] = vision.record() | {"side": data.latent_shape[1] // args.repa_patch_size}
        vision.to(processes.device)
    finished, complete = processes.on_main(lambda: open_folder(args.features_path, settings))
    if processes.is_main:
        print("".join(f"{note}\n" for note in data.notes), end="")
    space.to(processes.device)
    if processes.device.type == "cuda":
        space.vae.to(memory_format=torch.channels_last)  # the layout of half-precision convolutions
    compiles = args.compile
    if compiles == "auto":
        compiles = processes.device.type == "cuda" and settings["precision"] != "fp32"
    if compiles:
        note = print if processes.is_main else lambda line: None
        space.compile_encoder(note=note, or_plain=args.compile == "auto")
    return Job(
        args.features_path,
        processes,
        data,
        space,
        settings,
        args.batch_size,
        args.num_workers,
        finished,
        complete,
        captions,
        encoder,
        vision,
    )


def open_inputs(args):
    """The images, how many of them make a shard, the autoencoder; their captions, what encodes these and what encodes
    images, if any.
    """
    if args.data_path is None:
        raise UsageError("--data-path is missing: the folder of images to encode")
    facts = space_info(args.vae_path)
    if not facts.samples_posterior:
        raise UsageError("--vae-path none has nothing to extract: train.py reads the images themselves")
    settings = {"seed": 0, "flip": False, "reading": Reading(args.background)}
    cli.check_needs(args, NEEDS)
    vision = None if args.repa is None else Encoder(args.repa)
    captions = encoder = None
    if args.text_encoder is None:
        data = ImageData(args.data_path, args.image_size, facts, **settings)
    else:
        encoder = text.encoder_of(args)
        captions = open_captioned(args.data_path, args.image_size, facts, **settings)
        data = captions.images
    if data.latent_shape[1] % args.repa_patch_size:
        raise UsageError(f"--repa-patch-size {args.repa_patch_size} does not divide latents of {data.latent_shape[1]}")
    at_most = MAX_SHARDS // (1 + (captions is not None) + (vision is not None))
    shard_size = choose_shard_size(args.shard_size, len(data), at_most)
    return data, shard_size, load_space(args.vae_path), captions, encoder, vision


NEEDS = (
    cli.Need(
        ("max_text_tokens", "caption_dtype", "tokenizer_path"),
        lambda args: args.text_encoder is not None,
        "--text-encoder",
    ),
    cli.Need(("repa_patch_size",), lambda args: args.repa is not None, "--repa ENCODER"),
)


def choose_shard_size(asked: int | None, num_images: int, at_most: int = MAX_SHARDS) -> int:
    """What was asked for, or the default, which depends on the number of images alone."""
    if asked is None:
        return next(size for size in (1024 * 2**i for i in itertools.count()) if num_images <= size * at_most)
    if num_images > asked * at_most:
        raise UsageError(
            f"--shard-size {asked} would make {-(-num_images // asked)} files, and training keeps all of them open; "
            f"{-(-num_images // at_most)} or more makes at most {at_most}"
        )
    return asked


def open_folder(folder: Path, settings: dict) -> tuple[dict[int, dict], bool]:
    """The finished shards in `folder`, and whether nothing is left to do. Begins a new extraction where it is empty.

    Raises:
        UsageError: other settings or other images were extracted there, or it holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
        if manifest is not None:
            compare(folder, manifest, settings)
        elif (folder / PLAN).exists():
            compare(folder, read_record(folder / PLAN, Settings, "give another folder", FORMAT), settings)
        elif any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
            raise UsageError(f"--features-path {folder} holds other files; give a new or empty folder")
        else:
            replace_json(folder / PLAN, settings)
        for leftover in folder.glob(f"{UNFINISHED}*"):
            leftover.unlink()
        if manifest is None:
            return finished_shards(folder), False

        shards = enumerate(manifest["shards"])
        good = {shard: record for shard, record in shards if damage(folder, record, read=False) is None}
        complete = len(good) == len(manifest["shards"]) and damage(folder, manifest["images"], read=False) is None
        if not complete:
            reopen(folder, settings, good)
        return good, complete
    except OSError as error:
        raise UsageError(f"--features-path {folder} cannot be written: {error.strerror or error}") from None


def compare(folder: Path, before: dict, now: dict) -> None:
    """Refuse to mix features of different settings, images or autoencoders; where the autoencoder lies is no matter."""

    def flat(settings: dict) -> dict:
        parts = {"": settings, "data ": settings["data"], "autoencoder ": settings["autoencoder"]}
        parts |= {"text ": settings.get("text", {}), "text encoder ": settings.get("text_encoder", {})}
        parts["representation "] = settings.get("representation", {})
        return {f"{part}{key}": value for part, values in parts.items() for key, value in values.items()}

    was, now = flat(before), flat(now)
    ignored = {"data", "autoencoder", "autoencoder path", "text", "text_encoder", "captions"}
    ignored |= {"text encoder name"} if "text encoder sha256" in now else set()
    ignored |= {"representation", "representation name"}
    ignored |= {"data class_names", "data reading"}  # the fingerprint covers both
    keys = [key for key in now if key not in ignored and was.get(key) != now[key]]
    keys += [key for key in was if key.startswith(("text ", "representation ")) and key not in {*now, *ignored}]
    if different := [f"{key} was {str(was.get(key))[:20]}, is {str(now.get(key))[:20]}" for key in keys]:
        raise UsageError(
            f"--features-path {folder} holds features of other settings or images: {'; '.join(different)}. "
            f"They are kept; give another folder"
        )


def record_path(folder: Path, shard: int) -> Path:
    return shard_path(folder, shard).with_suffix(".json")


def finished_shards(folder: Path) -> dict[int, dict]:
    """What a killed run has finished."""
    records = {}
    for path in sorted(folder.glob("shard-*.json")):
        try:
            record = read_record(path, Shard)
        except BadRecord:
            record = None
        if record is not None and damage(folder, record, read=False) is None:
            records[int(path.stem.removeprefix("shard-"))] = record
        else:
            path.unlink()
    return records


def reopen(folder: Path, settings: dict, finished: dict[int, dict]) -> None:
    """From a finished extraction that has lost files to an unfinished one; in an order that a kill cannot harm."""
    for path in folder.glob("shard-*.json"):
        path.unlink()
    for shard, record in finished.items():
        replace_json(record_path(folder, shard), record)
    replace_json(folder / PLAN, settings)
    (folder / MANIFEST).unlink()


# -------------------------------------------------------------------------------------------------------------- extract


class Pixels(Dataset):
    """The images of a data set without what training draws for them."""

    def __init__(self, data: ImageData):
        self.data = data

    def __getitem__(self, index: int) -> dict:
        pixels, found = self.data.pixels(index)
        unreadable = -1 if found == index else index
        return {"pixels": pixels, "label": self.data.labels[found], "index": index, "unreadable": unreadable}


def extract(job: Job) -> None:
    """Write this process's shards.

    Raises:
        RunStopped: a full disk, too many unreadable images, too little memory. Finished shards are kept.
    """
    precision = job.settings["precision"]
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # PyTorch allows it in convolutions if nobody objects
    torch.backends.cudnn.deterministic = True
    dtype = machine.set_precision(precision)

    plan = [batch for shard in job.mine for batch in job.batches_of(shard)]
    pin_memory = job.processes.device.type == "cuda"
    loader = DataLoader(Pixels(job.data), batch_sampler=plan, num_workers=job.num_workers, pin_memory=pin_memory)
    unreadable = UnreadableImages({index for record in job.finished.values() for index in replaced_in(record)})
    batches = iter(loader) if plan else iter(())
    for shard in job.mine:
        try:
            write_shard(job, shard, batches, dtype, unreadable)
        except OSError as error:
            raise RunStopped(
                f"{shard_path(job.folder, shard)} not written ({error}); finished shards are kept: "
                f"{remedy(error)} and run the same command again"
            ) from None
        except torch.OutOfMemoryError:
            raise RunStopped(
                f"--batch-size {job.batch_size} does not fit into the GPU's memory; finished shards are kept: "
                f"run the same command with a smaller one"
            ) from None


def write_shard(job: Job, shard: int, batches: Iterator, dtype: torch.dtype, unreadable: UnreadableImages) -> None:
    """Encode a shard and write it, then what is to be known of it: a shard without a record is not finished."""
    path, plan = shard_path(job.folder, shard), job.batches_of(shard)
    count = sum(map(len, plan))
    labels, replaced, sums = [], [], np.zeros((2, job.shape[2]))
    with contextlib.ExitStack() as stack:
        moments = stack.enter_context(Pieces.of(path, job.dtype, (count, *job.shape)))
        if job.vision is not None:
            shape = (count, 2, job.side**2, job.vision.width)
            features = representation_path(job.folder, shard)
            features = stack.enter_context(Pieces.of(features, np.dtype(np.float16), shape))
        for _ in plan:
            batch = next(batches)
            bad = [index for index in batch["unreadable"].tolist() if index >= 0]
            for name in unreadable.update(bad, job.data):
                print(f"unreadable image, replaced by its successor: {name}", flush=True)
            encoded = encode(job, batch, dtype)
            sums += sums_of(encoded)
            moments.write(encoded)
            if job.vision is not None:
                features.write(represent(job, batch, dtype))
            labels += batch["label"].tolist()
            replaced += bad
            job.progress.report()
    found = labels  # of captioned images, the label is the number of the one that was read
    if job.captions is not None:
        labels = [0] * len(found)
    record = {
        **moments.record(),
        "labels": [[label, len(list(run))] for label, run in itertools.groupby(labels)],  # [label, how many in a row]
        "unreadable": [{"index": index, "name": os.fsdecode(job.data.names[index])} for index in replaced],
        "sums": sums.tolist(),
    }
    if job.captions is not None:
        texts = [job.captions.texts.of_image(image) for image in found]
        record["captions"] = encode_captions(job, shard, texts)
    if job.vision is not None:
        record["representation"] = [features.record()]
    replace_json(record_path(job.folder, shard), record)


class Pieces:
    """An .npy file that grows batch by batch, and its checksum. Pieces fail on a full disk; a map would crash."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.checksum, self.bytes = path, file, hashlib.sha256(), 0

    @classmethod
    @contextlib.contextmanager
    def of(cls, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator["Pieces"]:
        """For an array of this shape; it becomes `path` when the block ends."""
        with replacing(path) as file:
            pieces = cls(path, file)
            pieces._write(npy_header(dtype, shape))
            yield pieces

    def write(self, array: np.ndarray) -> None:
        self._write(array.tobytes())
        self.file.flush()  # its size tells all processes how far this one is

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.checksum.update(content)
        self.bytes += len(content)

    def record(self) -> dict:
        return {"file": self.path.name, "bytes": self.bytes, "sha256": self.checksum.hexdigest()}


def encode_captions(job: Job, shard: int, texts: list[list[str]]) -> list[dict]:
    """Features of the captions of a shard's images. Raises RunStopped where half precision does not hold them."""
    try:
        return write_captions(job.folder, shard, texts, job.encoder, job.settings["text"]["dtype"])
    except ValueError as error:
        raise RunStopped(f"{error}: --caption-dtype bf16, and another folder") from None


def replaced_in(record: dict) -> list[int]:
    return [image["index"] for image in record["unreadable"]]


def encode(job: Job, batch: dict[str, Tensor], dtype: torch.dtype) -> np.ndarray:
    """(N,2,2,C,h,w) moments of a batch and of its mirror images, as they are stored.

    In float16 the activations of some autoencoders overflow: such a batch is encoded again in float32.
    """
    x = to_unit_range(batch["pixels"].to(job.processes.device, non_blocking=True))  # (N,3,H,W)
    x = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)  # (2N,3,H,W)
    mean, std = job.space.moments(x, dtype)  # (2N,C,h,w) each
    if dtype == torch.float16 and not (mean + std).isfinite().all():
        mean, std = job.space.moments(x)
    moments = torch.stack([mean, std], dim=1).unflatten(0, (-1, 2)).to(getattr(torch, job.dtype.name))  # (N,2,2,C,h,w)
    finite = moments.isfinite().flatten(1).all(dim=1).cpu()  # (N,)
    if not finite.all():
        name = job.data.name_of(batch["index"][~finite][0].item())
        raise RunStopped(f"the moments of {name} are not finite in {job.dtype}: --dtype fp32, or another autoencoder")
    return moments.cpu().numpy()


def represent(job: Job, batch: dict[str, Tensor], dtype: torch.dtype) -> np.ndarray:
    """(N,2,T,F) features of a batch and of its mirror images, in float16."""
    x = to_unit_range(batch["pixels"].to(job.processes.device, non_blocking=True))  # (N,3,H,W)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        features = torch.stack([job.vision(each, job.side) for each in (x, x.flip(-1))], dim=1).to(torch.float16)
    if not features.isfinite().all():
        raise RunStopped(f"features of {job.vision.place} are not finite in float16: another --repa ENCODER")
    return features.cpu().numpy()


class Progress:
    """Rank 0's lines of what all processes have done, read off the sizes of their files."""

    def __init__(self, job: Job):
        self.job = job
        self.header = len(npy_header(job.dtype, (job.shard_size, *job.shape)))
        self.image = math.prod(job.shape) * job.dtype.itemsize
        self.began = self.said = time.monotonic()
        self.before = self.images()

    def images(self) -> int:
        """Images on disk, finished shards and begun ones."""
        done = 0
        for entry in os.scandir(self.job.folder):
            if entry.name.removeprefix(UNFINISHED).startswith("shard-") and ".npy" in entry.name:
                with contextlib.suppress(FileNotFoundError):  # renamed since
                    done += max(0, entry.stat().st_size - self.header) // self.image
        return done

    def report(self, last: bool = False) -> None:
        now = time.monotonic()
        if self.job.processes.is_main and (last or now - self.said >= REPORT_EVERY):
            self.said = now
            print(self.line(self.images(), now - self.began), flush=True)

    def line(self, images: int, seconds: float) -> str:
        total, rate = len(self.job.data), (images - self.before) / max(seconds, 1e-9)
        left = f"{timedelta(seconds=int((total - images) / rate))} left" if rate else "none yet"
        return f"{images:,}/{total:,} images ({images / total:.1%})  {rate:.1f} images/s  {left}"


# --------------------------------------------------------------------------------------------------------------- finish


def finish(job: Job) -> None:
    """When all processes are done: read every file back, write the manifest, remove what only resuming needs.

    Raises:
        RunStopped: a file is not what was written, or too many images could not be read.
    """
    wait_for_all(job)
    job.progress.report(last=True)
    job.finished = job.processes.from_main(finished_shards(job.folder) if job.processes.is_main else None)
    records = [job.finished[shard] for shard in range(job.num_shards)]
    require_undamaged(job.folder, records, job.processes)
    if job.processes.is_main:
        UnreadableImages(set()).update([index for record in records for index in replaced_in(record)], job.data)
        try:
            seal(job, records)
        except OSError as error:
            raise RunStopped(f"{job.folder / MANIFEST} not written ({error}); run the same command again") from None


def wait_for_all(job: Job) -> None:
    """Until every shard has its record. Waiting in a collective operation would end with its time limit."""
    written, since, pause = job.progress.images(), time.monotonic(), 0.05
    while len(list(job.folder.glob("shard-*.json"))) < job.num_shards:
        time.sleep(pause)
        pause = min(5, 1.5 * pause)  # a file system shared by many processes should not notice
        job.progress.report()
        if (now_written := job.progress.images()) != written:
            written, since = now_written, time.monotonic()
        if time.monotonic() - since > STALLED_AFTER:
            raise RunStopped(
                f"no process has written anything for {STALLED_AFTER // 60} minutes; finished shards are kept: "
                f"run the same command again"
            )


def require_undamaged(folder: Path, records: list[dict], processes: distributed.Processes) -> None:
    """Read files back and compare them with what is recorded of them; the processes share the reading.

    Raises:
        RunStopped: on rank 0, naming the damaged files.
    """
    mine = records[processes.rank :: processes.world_size]
    problems = [problem for record in mine if (problem := damage(folder, record)) is not None]
    problems = [problem for part in processes.gather(problems) for problem in part]
    if problems and processes.is_main:
        raise RunStopped(f"{'; '.join(problems[:5])} ({len(problems)} of {len(records)} files). {REPAIR}")
    if problems:
        raise SystemExit(1)


def seal(job: Job, records: list[dict]) -> None:
    """Write the names and the manifest; from now on the records of single shards are not needed."""
    facts = {}
    if job.captions is None:
        counts = np.zeros(job.data.num_classes, dtype=int)
        for label, number in (run for record in records for run in record["labels"]):
            counts[label] += number
        facts["class_counts"] = counts.tolist()
    replace_json(job.folder / NAMES, [os.fsdecode(name) for name in job.data.names])
    manifest = job.settings | {
        "data": job.settings["data"] | facts,
        "unreadable": sum(len(record["unreadable"]) for record in records),
        "versions": {"torch": torch.__version__, "diffusers": version("diffusers"), "numpy": np.__version__},
        "images": {"file": NAMES} | digest(job.folder / NAMES),
        "shards": records,
    }
    if all("sums" in record for record in records):  # shards of before have none
        values = 2 * len(job.data) * math.prod(job.shape[3:])  # of each channel
        manifest["statistics"] = statistics_of(np.sum([record["sums"] for record in records], axis=0), values)
    if job.captions is not None:
        features, mask = job.encoder([""])
        empty = in_half(features[mask], job.settings["text"]["dtype"])
        manifest["empty"] = write_array(job.folder / EMPTY, empty)
        manifest["captions"] = first_captions(job, {index for record in records for index in replaced_in(record)})
    write_manifest(job.folder, manifest)
    (job.folder / PLAN).unlink()
    for path in job.folder.glob("shard-*.json"):
        path.unlink()


def first_captions(job: Job, unreadable: set[int]) -> list[str]:
    """Of the images whose features come first, where an unreadable one stands for its successor."""
    count, found = len(job.data), []
    for index in range(min(KNOWN, count)):
        there = next(each for each in (index, *successors(index, count)) if each not in unreadable)
        found += job.captions.texts.of_image(there)
    return found[:KNOWN]


def describe(job: Job) -> None:
    """The last line: what is there now."""
    if job.processes.is_main:
        kept = (each for r in job.finished.values() for each in (r, *r.get("representation", ())))
        size = sum(each["bytes"] for each in kept) / 1e9
        bad = sum(len(record["unreadable"]) for record in job.finished.values())
        of = f"of {job.data.num_classes} classes"
        if job.captions is not None:
            count, kept = len(job.captions.texts), [file for r in job.finished.values() for file in r["captions"]]
            of = f"with {count:,} captions of {sum(file['bytes'] for file in kept) / count:,.0f} bytes each"
        print(
            f"{job.folder}: {len(job.data):,} images ({bad} unreadable, replaced) {of}, "
            f"{job.num_shards} shards, {size:.3g} GB, {'complete already' if job.complete else 'all read back'}"
        )


if __name__ == "__main__":
    cli.run(main, get_parser())
