"""Files of base shapes (`.bsh`): which dimensions of each parameter grow with the width, and their sizes at the base.

YAML: for each name a list with `null` for a dimension that stays and a number for one that grows, as DiT-muP's training
takes them (`--load_base_shapes`). Classes and image size do not matter, since their dimensions stay; depth does.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import yaml

import dit
from cli import UsageError, first_line
from configuration import UNSEEN, DiTConfig
from families import family_for, to_published
from models import DiT
from parametrization import is_mup
from records import BadRecord, check_record

Shapes = dict[str, list[int | None]]
COMMENT = "# base shapes: null is a dimension that stays, a number one that grows with the width, at the base width\n"
WIDTH = ("x_embedder.proj.bias", "x_embedder.bias")  # have no dimension but the width


def base_shapes(config: DiTConfig, width: int) -> Shapes:
    """Of a model whose base has this hidden size, by name.

    Raises:
        UsageError: the width is no multiple of the head.
    """
    base, wider = (_shapes(config.at_width(factor * width)) for factor in (1, 2))
    return {
        name: [size if size != larger else None for size, larger in zip(shape, wider[name], strict=True)]
        for name, shape in sorted(base.items())
    }


def read_base_width(path: Path, config: DiTConfig) -> int:
    """The width at which a file's shapes are those of a model's base.

    Raises:
        UsageError: it is no such file, or of another model; names the first parameter that differs.
    """
    shapes = _read(path)
    width = _width_in(shapes, path)
    expected = base_shapes(config, width)
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            found, wanted = (_in_words(each.get(name)) for each in (shapes, expected))
            raise UsageError(f"{path} does not fit the model: {name} {found} in the file, {wanted} in the model")
    return width


def known(args: argparse.Namespace) -> dict:
    """The fields of `configuration.UNSEEN` that flags say of a file of weights, `--load_base_shapes` among them."""
    said = {name: getattr(args, name) for name in UNSEEN if getattr(args, name, None) is not None}
    path = args.load_base_shapes
    return said if path is None else {"base_width": _width_in(_read(path), path)} | said


def fitted(config: DiTConfig, args: argparse.Namespace, source: Path | None = None) -> DiTConfig:
    """`config` with the base width of `--load_base_shapes`, where that is given.

    Args:
        source: the file that `config` is of, which has a base width of its own.

    Raises:
        UsageError: as `read_base_width`; or flag or source say another width.
    """
    path = args.load_base_shapes
    if path is None:
        return config
    if not is_mup(config):
        raise UsageError(f"--load_base_shapes {path} does nothing without --mup: drop it, or add that")
    width = read_base_width(path, config)
    if args.base_width not in (None, width):
        raise UsageError(f"--base-width {args.base_width} contradicts {path}, which is of width {width}")
    if source is not None and width != config.base_width:
        raise UsageError(f"{path} is of width {width}, {source} was trained with the base width {config.base_width}")
    return replace(config, base_width=width)


def write_base_shapes(path: Path, config: DiTConfig, width: int) -> None:
    """Raises UsageError: the width does not fit, or the file cannot be written."""
    text = COMMENT + yaml.safe_dump(base_shapes(config, width), sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


def _read(path: Path) -> Shapes:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"base shapes {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or first_line(error)
        raise UsageError(f"{path} is not a file of base shapes: {reason}") from None
    try:
        return check_record(content, Shapes, path)
    except BadRecord as error:
        raise UsageError(f"{error}; a file of base shapes has a list for each name") from None


def _width_in(shapes: Shapes, path: Path) -> int:
    width = next((shapes[name][0] for name in WIDTH if shapes.get(name)), None)
    if width is None:
        raise UsageError(f"{path} does not fit the model: no width for {WIDTH[0]}")
    return width


def _shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Under the published names; the table of positions is a parameter of DiT-muP, a buffer of others."""
    with torch.device("meta"):
        model = DiT(config)
    tensors = dict(model.named_parameters())
    if family_for(config) is dit and model.pos_embed is not None:
        tensors["pos_embed"] = model.pos_embed
    return {name: tuple(tensor.shape) for name, tensor in to_published(tensors, config=config).items()}


def _in_words(shape: list | None) -> str:
    return "is absent" if shape is None else f"is {str(shape).replace('None', 'null')}"
