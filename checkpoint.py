"""Checkpoints: written so that nothing is lost, read so that nothing runs.

A checkpoint is a folder. Weights and optimizer state are safetensors, the rest is JSON; nothing in it needs pickle (but
for a sharded state, which engines write beside it in formats of their own):

    config.json             model, objective, latent space, image size, classes, step, data, versions
    model.safetensors       the weights under training
    ema.safetensors         their moving average, fp32
    optimizer.safetensors   `<parameter>.exp_avg` and so on
    projector.safetensors   of runs with --repa: what only their training needs
    state.json              step, data position, averages of the log, the flags that shape the loss curve
    manifest.json           SHA-256 and size of every file above, and its own

Published `.pt` files load too, by PyTorch's restricted unpickler with `argparse.Namespace` as its only addition.
"""

import argparse
import contextlib
import copy
import errno
import itertools
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from cli import UsageError
from conditions import Captions, Classes
from configuration import DiTConfig, infer_config, row_name, usual_heads
from families import FAMILIES, fact, family_of, from_published, known_of
from files import UNFINISHED, digest, digest_of, flush_to_disk, write_json
from models import DiT
from records import BadRecord, Name, OtherVersion, check_record, parse_record, read_record

FORMAT = 1
REPLACED = "-replaced"  # how the name ends of what stood where a new checkpoint goes
DESCRIPTION = "description"  # the metadata of an exported safetensors file that says what shapes cannot tell

Natural = Annotated[int, Field(ge=0)]


class File(TypedDict):
    sha256: str
    bytes: Natural


class Manifest(TypedDict):
    """manifest.json"""

    format: int
    files: dict[str, File]
    sha256: str


class Objective(TypedDict):
    name: str  # its settings stand beside it


class Data(TypedDict):
    class_names: NotRequired[list[Name]]
    fingerprint: NotRequired[str]
    captions: NotRequired[list[Name]]  # some of them
    reading: NotRequired[dict[str, Any]]  # `data.Reading`; runs of before there was a choice have none


class Description(TypedDict):
    """What is to be known of weights besides the tensors: config.json, and what an exported file carries."""

    format: int
    model: dict[str, Any]  # of DiTConfig, which checks it
    objective: Objective
    space: NotRequired[dict[str, Any]]
    image_size: NotRequired[Annotated[int, Field(ge=1)]]
    step: NotRequired[Natural]
    data: NotRequired[Data]
    text: NotRequired[dict[str, Any]]  # the encoder of prompts, by `name` and its settings
    alignment: NotRequired[dict[str, Any]]  # the encoder of images that it was trained with


class Index(TypedDict):
    """`*.index.json` of a sharded export"""

    weight_map: dict[str, str]


class Window(TypedDict):
    steps: Natural
    sums: dict[str, float]
    times: NotRequired[dict[str, Natural]]  # steps that each sum is of; left out: all
    counts: list[list[float]]


class State(TypedDict):
    """state.json"""

    step: Natural
    skipped: Natural
    bad_in_a_row: Natural
    unreadable: list[Natural]
    window: Window
    total_steps: Natural
    flags: dict[str, Any]


class DamagedCheckpoint(UsageError):
    """A checkpoint folder whose files are not those that its manifest names."""


# -------------------------------------------------------------------------------------------------------------- writing


def save(folder: Path, tensors: dict[str, dict[str, Tensor]], records: dict[str, dict]) -> None:
    """Write a checkpoint so that `folder` appears whole or not at all, whenever the process or machine dies.

    Args:
        tensors: file stem -> named tensors, written as safetensors.
        records: file stem -> what JSON can hold.

    Raises:
        OSError: the disk is full or not writable; whatever stood at `folder` before is as it was.
    """
    beside = begin(folder)
    try:
        commit(beside, folder, tensors, records)
    except BaseException:
        discard(folder)
        raise


def begin(folder: Path) -> Path:
    """An empty folder beside `folder`, for what is to be committed there."""
    discard(folder)
    beside = _beside(folder)
    beside.mkdir(parents=True)
    return beside


def discard(folder: Path) -> None:
    """Remove what was begun for `folder` and not committed, if there is any."""
    shutil.rmtree(_beside(folder), ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{UNFINISHED}{folder.name}")


def commit(
    beside: Path,
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    records: dict[str, dict],
    parts: Iterable[str] = (),
) -> None:
    """Write the rest into `beside`, flush all of it to disk and give it its name.

    Args:
        parts: what other processes have written there.

    Raises:
        OSError: also where one of those is not to be seen.
    """
    if missing := [part for part in sorted(parts) if not (beside / part).is_file()]:
        reason = "another process wrote it, and it is not here: do all machines share this disk?"
        raise FileNotFoundError(errno.ENOENT, reason, str(beside / missing[0]))
    for stem, named in tensors.items():
        _save_tensors(beside / f"{stem}.safetensors", named)
    for stem, record in records.items():
        write_json(beside / f"{stem}.json", record)
    paths = sorted(path for path in beside.rglob("*") if path.is_file())
    files = {path.relative_to(beside).as_posix(): digest(path) for path in paths}
    manifest = {"format": FORMAT, "files": files}
    write_json(beside / "manifest.json", manifest | {"sha256": digest_of(manifest)})
    for path in (*paths, beside / "manifest.json", *(path for path in beside.rglob("*") if path.is_dir()), beside):
        flush_to_disk(path)
    if folder.exists():
        replaced = folder.with_name(f"{UNFINISHED}{folder.name}{REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        try:
            beside.rename(folder)
        except OSError:
            replaced.rename(folder)
            raise
        shutil.rmtree(replaced)
    else:
        beside.rename(folder)
    flush_to_disk(folder.parent)


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints of a folder and those of every `keep_every`-th step (0: none).

    To be called when a new checkpoint has been committed, so that there are always `keep_last` whole ones.
    """
    for old in checkpoints_of(folder)[keep_last:]:
        if not keep_every or int(old.name) % keep_every:
            doomed = old.with_name(f"{UNFINISHED}{old.name}-pruned")  # a kill now leaves no half checkpoint
            old.rename(doomed)
            shutil.rmtree(doomed)


def set_aside(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a run beyond `step` to `abandoned-NNNNNNN`: it goes on from `step`, on another way.

    Returns:
        Where they are now; one that was set aside before stays.
    """
    aside = []
    for path in checkpoints_of(run):
        if int(path.name) > step:
            suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
            names = (path.with_name(f"abandoned-{path.name}{suffix}") for suffix in suffixes)
            aside.append(path.rename(next(name for name in names if not name.exists())))
    return aside


def sweep(folder: Path) -> None:
    """Remove what killed runs left unfinished in a folder of checkpoints, but for one that had no successor yet."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        original = folder / leftover.name.removeprefix(UNFINISHED).removesuffix(REPLACED)
        if leftover.name.endswith(REPLACED) and not original.exists():
            leftover.rename(original)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def copied(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU, which training may not change while a thread writes it."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}


def _save_tensors(path: Path, named: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


# -------------------------------------------------------------------------------------------------------------- reading


def verify(folder: Path, files: tuple[str, ...] | None = None) -> None:
    """Compare files (all that the manifest names) with the manifest.

    Raises:
        DamagedCheckpoint: names the first file that is missing or different.
        UsageError: a newer version wrote it.
    """
    try:
        content = read_record(folder / "manifest.json", Manifest, version=FORMAT)
    except OtherVersion:
        raise
    except BadRecord as error:
        raise DamagedCheckpoint(f"{folder} has no good manifest.json ({error})") from None
    manifest = content["files"]
    if content.pop("sha256") != digest_of(content):
        raise DamagedCheckpoint(f"{folder} has no good manifest.json (it does not match its own SHA-256)")
    for name in files or manifest:
        if name not in manifest or not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder} lacks {name}")
        if digest(folder / name) != manifest[name]:
            raise DamagedCheckpoint(f"{folder / name} is damaged: its SHA-256 is not the one in the manifest")


def is_checkpoint(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run folder (or of its `checkpoints` folder), newest first."""
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    numbered = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint of a run that is as its manifest says; says so on stderr when it skips a damaged one."""
    for folder in checkpoints_of(run):
        try:
            verify(folder)
            return folder
        except DamagedCheckpoint as error:
            print(f"WARNING: skipping a damaged checkpoint: {error}", file=sys.stderr)
    return None


def read_config(folder: Path) -> Description:
    """What config.json says. Raises UsageError."""
    return read_record(folder / "config.json", Description, version=FORMAT)


def read_state(folder: Path) -> State:
    """What state.json says, which has to be of the step that config.json names. Raises UsageError."""
    state, config = read_record(folder / "state.json", State), read_config(folder)
    if state["step"] != config.get("step"):
        raise UsageError(f"{folder}: state.json is of step {state['step']}, config.json of {config.get('step')}")
    return state


def read_tensors(folder: Path, stem: str) -> "LazyTensors":
    """The tensors of one file of a checkpoint, each read when it is asked for."""
    return LazyTensors(folder / f"{stem}.safetensors")


# -------------------------------------------------------------------------------------------------------------- weights


class LazyTensors(Mapping):
    """The tensors of one or more safetensors files, memory-mapped: each is read when it is asked for.

    Raises:
        UsageError: a file is not, or not wholly, a safetensors file.
    """

    def __init__(self, *paths: Path):
        self._files, self.metadata = {}, {}  # name -> the file, and the tensor's name there
        for path in paths:
            refuse_pointer(path)
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{path} is not a readable safetensors file ({_first_line(error)})") from None
            self._files |= {name: (file, name) for name in file.keys()}  # noqa: SIM118
            self.metadata |= file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        file, there = self._files[name]
        return file.get_tensor(there)

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def named(self, names: Mapping[str, str]) -> "LazyTensors":
        """Some of them, by other names: new -> present."""
        some = copy.copy(self)
        some._files = {name: self._files[present] for name, present in names.items()}
        return some

    def on_meta(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes from the headers alone."""
        slices = {name: file.get_slice(there) for name, (file, there) in self._files.items()}
        return {
            name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype()), device="meta")
            for name, part in slices.items()
        }


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass
class Weights:
    """A model as some file holds it. Names and shapes are known; the tensors are read when `state_dict` is."""

    tensors: Mapping[str, Tensor]  # as in the file
    meta: dict[str, Tensor]  # under this project's names, on the meta device
    config: DiTConfig
    record: Description | None  # of a checkpoint or exported file of ours; None where the file does not describe itself
    source: Path

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under this project's names."""
        return from_published(self.tensors)

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DiT:
        """The model with these weights, read straight to the device in `dtype`; `model(x, t, y)` runs it.

        Raises:
            UsageError: names or shapes are not those of the configuration.
        """
        with torch.device("meta"):
            model = DiT(self.config)
        load_into(model, self, device, dtype)
        return model

    @property
    def condition(self) -> Classes | Captions:
        data = {} if self.record is None else self.record.get("data", {})
        if self.config.caption_width:
            return replace(self.config.condition, known=tuple(data.get("captions", ())))
        return replace(self.config.condition, names=tuple(data.get("class_names", ())))

    @property
    def objective(self) -> dict:
        """`config()` of the objective: as recorded, or else the name alone, as the weights betray it, or {}.

        Rectified flow never trains the variance channels, whose rows of the final linear start at zero: all zero there
        and not elsewhere means rectified flow, or a DDPM whose variance was not learned.
        """
        if self.record is not None:
            return self.record["objective"]
        name = self._betrayed_objective()
        usual = fact(family_of(self.tensors), "OBJECTIVE")
        return usual if name in (None, usual.get("name")) else {"name": name}

    def _betrayed_objective(self) -> str | None:
        if not self.config.learn_sigma:
            return None
        name = next(name for name in self.tensors if name.endswith("final_layer.linear.weight"))
        prediction, variance = self.tensors[name].unflatten(0, (-1, 2, self.config.in_channels)).unbind(1)
        if not prediction.any():
            return None  # never trained
        return "ddpm" if variance.any() else "rf"


def load_weights(path: str | Path, which: str = "ema", **known) -> Weights:
    """Find the weights of a checkpoint or run folder of ours, a published `.pt`, or `.safetensors` files.

    Args:
        which: `ema` or `model`; a file that holds only one set of weights gives that.
        known: fields of `DiTConfig` for what the shapes of a published file cannot tell; ignored for our own.

    Raises:
        UsageError: no such file, damaged, not a DiT, or it would run code to load.
    """
    path = Path(path).expanduser()
    record, told = None, {}
    if path.is_dir() and not is_checkpoint(path) and (found := find_published_folder(path)):
        family, folder = found
        tensors, told, path = family.read_folder(folder, which, load_file)
        known = family.known(told) | known
    elif path.is_dir() and (parts := sharded_files(path)):
        tensors = LazyTensors(*parts) if parts[0].suffix == ".safetensors" else _load_parts(parts)
    elif path.is_dir():
        folder = path
        path = folder if is_checkpoint(folder) else newest_good(folder)
        if path is None:
            raise UsageError(f"{folder} holds no checkpoint; give a folder such as {folder}/checkpoints/0050000")
        verify(path, (f"{which}.safetensors", "config.json"))
        record = read_config(path)
        tensors = LazyTensors(path / f"{which}.safetensors")
    elif not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist")
    elif path.suffix == ".safetensors" and is_checkpoint(path.parent):  # config.json beside it says more than shapes
        return load_weights(path.parent, path.stem, **known)
    elif path.suffix == ".safetensors":
        tensors = LazyTensors(path)
        record = _carried_description(path, tensors.metadata.get(DESCRIPTION))
    else:
        loaded = load_pickle(path)
        tensors, args = _state_dict_in(loaded, which), loaded.get("args")
        record, family = _description_beside(path), family_of(tensors)
        if record is None and isinstance(args, argparse.Namespace) and getattr(family, "tells", bool)(vars(args)):
            told = vars(args)
            known |= family.known(told)  # a flag that says otherwise is refused later
    on_meta = tensors.on_meta() if isinstance(tensors, LazyTensors) else {n: t.to("meta") for n, t in tensors.items()}
    meta = from_published(on_meta)
    if record is not None:
        config = DiTConfig.from_dict(record["model"])
    else:
        known = known_of(tensors) | known
        config = infer_config({name: tuple(tensor.shape) for name, tensor in meta.items()}, **known)
    if told:
        record = {"format": FORMAT} | family.description(told) | {"model": config.to_dict()}
        check_record(record, Description, path, version=FORMAT)
    return Weights(tensors, meta, config, record, path)


def find_published_folder(path: Path) -> tuple[ModuleType, Path] | None:
    """The family whose checkpoints are such folders, and the one to take of it."""
    for family in FAMILIES:
        if hasattr(family, "find_folder") and (folder := family.find_folder(path)):
            return family, folder
    return None


def description_path(path: Path) -> Path:
    """Where the description of an exported `.pt` stands."""
    return path.with_suffix(".json")


def _carried_description(path: Path, text: str | None) -> Description | None:
    if text is None:
        return None
    return parse_record(text, Description, f"the {DESCRIPTION} in {path}", "export the weights again", FORMAT)


def _description_beside(path: Path) -> Description | None:
    """Of a `.json` beside a `.pt`, if it is one: people keep other things there."""
    beside, content = description_path(path), None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(beside.read_text(encoding="utf-8"))
    if not (isinstance(content, dict) and {"format", "model", "objective"} <= content.keys()):
        return None
    return check_record(content, Description, beside, "export the weights again", FORMAT)


def sharded_files(folder: Path) -> list[Path]:
    """The files that an index of a sharded export (`*.index.json`, as DeepSpeed's consolidation writes it) names."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(read_record(index, Index)["weight_map"].values())
        except BadRecord as error:
            raise UsageError(f"{index} is not the index of a sharded export: {error}") from None
        return [folder / Path(name).name for name in sorted(names)]  # never a file elsewhere
    return []


def _load_parts(paths: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for path in paths for name, tensor in _state_dict_in(load_pickle(path), "ema").items()}


def _state_dict_in(loaded: dict, which: str) -> dict[str, Tensor]:
    """The weights within a checkpoint of a training: of DiT, PixArt, ProMoE, DeepSpeed (`module`), or all it holds."""
    names = {
        "ema": ("ema", "state_dict_ema", "ema_model_state_dict"),
        "model": ("model", "state_dict", "model_state_dict"),
    }
    keys = (*names.get(which, ()), *names["ema"], *names["model"], "module")
    inner = next((loaded[key] for key in keys if isinstance(loaded.get(key), dict)), loaded)
    return {name: value for name, value in inner.items() if isinstance(value, Tensor)}


def load_file(path: Path, kind: type = dict):
    """What a file of weights holds, by its suffix: `LazyTensors`, or as `load_pickle`."""
    return LazyTensors(path) if path.suffix == ".safetensors" else load_pickle(path, kind)


def load_pickle(path: Path, kind: type = dict):
    """`torch.load` that can build tensors, containers and `argparse.Namespace`, and nothing else.

    Args:
        kind: what the file has to hold.

    Raises:
        UsageError: the file is no PyTorch file, or names anything else; it says what.
    """
    refuse_pointer(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not names:
            raise UsageError(f"{path} is not a PyTorch file of weights") from None
        what = f"it wants to run {', '.join(names)}"
        raise UsageError(f"refused to load {path}: {what}; only tensors and argparse.Namespace are allowed") from None
    except KeyError:  # of bytes that happen to be an opcode of pickle
        raise UsageError(f"{path} is not a PyTorch file of weights") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable PyTorch file ({_first_line(error)})") from None
    if not isinstance(loaded, kind):
        expected = "a dictionary of weights" if kind is dict else f"a {kind.__name__}"
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not {expected}")
    return loaded


def refuse_pointer(path: Path) -> None:
    """Raises UsageError for what Git leaves in place of a large file that was not fetched."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UsageError(f"{path} is a Git-LFS pointer, not the file itself: fetch it with `git lfs pull`")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_into(model: DiT, weights: Weights, device=None, dtype: torch.dtype | None = None) -> None:
    """Put `weights` into `model`; one on the meta device takes the very tensors, moved and converted as they are read.

    Raises:
        UsageError: as `check_fit`.
    """
    check_fit(model.state_dict(), weights)
    on_meta = next(model.parameters()).is_meta
    model.load_state_dict(from_published(weights.tensors, device, dtype), assign=on_meta)
    model.to(device, dtype)  # `pos_embed`, where the file has none


def check_fit(model: Mapping[str, Tensor], weights: Weights, any_size: bool = False) -> None:
    """Compare names and shapes with those of a model's state dict, before any tensor is read; `any_size`: the file may
    be for another image size.

    Raises:
        UsageError: they differ; it shows the first few differences and what the file looks like.
    """
    expected = {name: tuple(t.shape) for name, t in model.items()}
    found = {name: tuple(t.shape) for name, t in weights.meta.items()}
    if "pos_embed" in expected and (any_size or "pos_embed" not in found):  # it is fixed, so a file may leave it out
        found["pos_embed"] = expected["pos_embed"]
    problems = [f"no {name}" for name in expected if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        looks = describe(infer_config({name: tuple(t.shape) for name, t in weights.meta.items()}, num_heads=1))
        raise UsageError(
            f"{weights.source} does not fit the model: {'; '.join(problems[:3])}{more}. The file looks like {looks}"
        )


def describe(config: DiTConfig) -> str:
    """A model in words: what to tell someone whose flags do not fit a file, which may not tell its heads."""
    heads = usual_heads(config.hidden_size)
    size = next(filter(None, (row_name(replace(config, num_heads=count)) for count in heads)), None)
    size = size or f"depth {config.depth}, width {config.hidden_size}, patch {config.patch_size}"
    experts = f"{config.num_experts} experts" if config.num_experts else "dense"
    of = f"texts of {config.caption_length} tokens" if config.caption_width else f"{config.num_classes} classes"
    return f"{size}, {experts}, {of}, input {config.input_size}x{config.input_size}"
