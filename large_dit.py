"""Large-DiT, the diffusion transformer with LLaMA's parts: its sizes, the names in its files, its checkpoint folders.

A folder holds `consolidated[_ema].MM-of-NN.pth`, one file for each of the NN processes over which the tensors were
split, and `model_args.pth`, the flags of its training. Facts of the public code, LLaMA2-Accessory's Large-DiT-ImageNet
and Large-DiT-T2I: the latter reads texts, and images of several proportions.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cli import UsageError
from names import NameMap, rule

SIZES = {  # depth, hidden size, heads
    "Nano": (3, 64, 4),  # for tests and toys; not a published size
    "600M": (16, 1536, 32),
    "3B": (32, 3072, 32),
    "7B": (32, 4096, 32),
}
COMMON = {
    **{"patch_size": 2, "norm": "rms", "positions": "rope", "mlp": "swiglu"},
    **{"attention_bias": False, "mlp_multiple": 256},
}
TEXTS = {"reading": "gated", "row_ends": True}  # of a row that reads texts
OF_LLAMA = {"caption_width": 4096, "caption_length": 128}


def _row(depth: int, width: int, heads: int) -> dict:
    condition_width = 1024 if width > 1024 else 0
    return {"depth": depth, "hidden_size": width, "num_heads": heads, "condition_width": condition_width, **COMMON}


ROWS = {
    name: _row(*size) | more
    for size_name, size in SIZES.items()
    for name, more in {
        f"Large-DiT-{size_name}/2": {},
        f"DiT_Llama_{size_name}_patch2": {},  # as published; with a text encoder it is the next one
        f"Large-DiT-T2I-{size_name}/2": TEXTS | OF_LLAMA,
    }.items()
}
QK_NORM = "full"
EXPERTS_ARE_MLPS = True
TRAINING = {"grad_clip": 2.0}  # flags of train.py whose defaults are others

MARK = re.compile(r"layers\.0\.attention\.wq\.weight")  # one of the names that no other family has


def _qkv_rows(config) -> list[int]:
    head = config.hidden_size // config.num_heads
    return [head * heads for heads in (config.num_heads, config.kv_heads, config.kv_heads)]


NAMES = NameMap(
    # An embedding of patches cut out in the order (C, p, p) is the convolution with that kernel.
    rule(
        "x_embedder.proj.weight",
        "x_embedder.weight",
        shape=(lambda s: (s[0], -1, 2, 2), lambda s: (s[0], s[1] * s[2] * s[3])),
    ),
    rule("x_embedder.proj.bias", "x_embedder.bias"),
    rule("blocks.{b}.attn.qkv.weight", *(f"layers.{{b}}.attention.w{part}.weight" for part in "qkv"), rows=_qkv_rows),
    rule("blocks.{b}.attn.proj.weight", "layers.{b}.attention.wo.weight"),
    rule("blocks.{b}.attn.q_norm.{w}", "layers.{b}.attention.q_norm.{w}"),
    rule("blocks.{b}.attn.k_norm.{w}", "layers.{b}.attention.k_norm.{w}"),
    rule("blocks.{b}.norm1.weight", "layers.{b}.attention_norm.weight"),
    rule("blocks.{b}.norm2.weight", "layers.{b}.ffn_norm.weight"),
    rule("blocks.{b}.mlp.gate_up_proj.weight", *(f"layers.{{b}}.feed_forward.w{part}.weight" for part in "13")),
    rule("blocks.{b}.mlp.down_proj.weight", "layers.{b}.feed_forward.w2.weight"),
    rule("blocks.{b}.adaLN_modulation.1.{w}", "layers.{b}.adaLN_modulation.1.{w}"),
    rule("row_ends.eol_token", "eol_token"),
    rule("row_ends.pad_token", "pad_token"),
    rule("y_embedder.norm.{w}", "cap_embedder.0.{w}"),
    rule("y_embedder.proj.{w}", "cap_embedder.1.{w}"),
    rule("blocks.{b}.attn.text.norm.weight", "layers.{b}.attention_y_norm.weight"),
    rule("blocks.{b}.attn.text.kv.weight", *(f"layers.{{b}}.attention.w{part}_y.weight" for part in "kv")),
    rule("blocks.{b}.attn.text.k_norm.{w}", "layers.{b}.attention.ky_norm.{w}"),
    rule("blocks.{b}.attn.text.gate", "layers.{b}.attention.gate"),
    # Mixtures are this project's own; their names follow those of the feed-forward.
    rule("blocks.{b}.moe.gate.weight", "layers.{b}.feed_forward.gate.weight"),
    rule(
        "blocks.{b}.moe.experts.gate_up_proj",
        *(f"layers.{{b}}.feed_forward.experts.{{e}}.w{part}.weight" for part in "13"),
    ),
    rule("blocks.{b}.moe.experts.down_proj", "layers.{b}.feed_forward.experts.{e}.w2.weight"),
    rule(
        "blocks.{b}.moe.shared_experts.gate_up_proj.weight",
        *(f"layers.{{b}}.feed_forward.shared_experts.w{part}.weight" for part in "13"),
    ),
    rule("blocks.{b}.moe.shared_experts.down_proj.weight", "layers.{b}.feed_forward.shared_experts.w2.weight"),
)


def spells(config) -> bool:
    """Whether a model has nothing that these names have no word for."""
    alike = all(getattr(config, name) == COMMON[name] for name in ("norm", "positions", "mlp", "attention_bias"))
    texts = all(getattr(config, name) == value for name, value in TEXTS.items()) or not config.caption_width
    return (
        alike
        and texts
        and config.modulation == "block"
        and (config.patch_size == 2 and config.qk_norm in ("none", "full") and config.expert_mlp == "swiglu")
    )


# ------------------------------------------------------------------------------------------------------------- folders

PART = re.compile(r"consolidated(?P<ema>_ema)?\.(?P<part>\d+)-of-(?P<count>\d+)\.pth")
ARGS = "model_args.pth"
BY_COLUMNS = re.compile(r".*\.(wo|w2)\.weight|t_embedder\.mlp\.2\.weight|y_embedder\.embedding_table\.weight")
BY_ROWS = re.compile(
    r"(x_embedder|t_embedder\.mlp\.0|.*adaLN_modulation\.1|final_layer\.linear|cap_embedder\.1)\.(weight|bias)"
    r"|.*\.(w[qkv13]|w[kv]_y)\.weight|.*\.attention\.gate"
)
OF_A_PROCESS = re.compile(r".*\.(q|k|ky)_norm\.(weight|bias)")  # of the heads that it has


def find_folder(path: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest whole one of a run of the public code; None if it is neither."""
    if (path / ARGS).is_file() or any(PART.fullmatch(file.name) for file in path.iterdir()):
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    numbered = sorted(
        (p for p in checkpoints.iterdir() if p.name.isdecimal() and p.is_dir()), key=lambda p: int(p.name)
    )
    whole = (folder for folder in reversed(numbered) if (folder / ARGS).is_file() and is_whole(folder))
    return next(whole, None)


def is_whole(folder: Path) -> bool:
    """Whether no part of some weights is missing, which a killed process leaves so."""
    found = [match for file in folder.iterdir() if (match := PART.fullmatch(file.name))]
    kinds = {(match["ema"], int(match["count"])) for match in found}
    present = {(match["ema"], int(match["count"]), int(match["part"])) for match in found}
    return any(all((ema, count, part) in present for part in range(count)) for ema, count in kinds)


def read_folder(folder: Path, which: str, load: Callable[..., Any]) -> tuple[Mapping[str, Tensor], dict, Path]:
    """The tensors of a checkpoint folder, joined; the flags of its training; the first of its files.

    Args:
        which: "ema" or "model"; where a folder has only one of them, that one.
        load: what unpickles a file (and checks the type of what it holds), without running anything of it.

    Raises:
        UsageError: a part is missing, parts do not fit together or cannot be joined.
    """
    found = [match for file in sorted(folder.iterdir()) if (match := PART.fullmatch(file.name))]
    if not found:
        raise UsageError(f"{folder} has a {ARGS} but no consolidated.00-of-01.pth: download the weights too")
    wanted = [match for match in found if (match["ema"] is not None) == (which == "ema")] or found
    count = int(wanted[0]["count"])
    paths = [folder / match.string for match in wanted if int(match["count"]) == count]
    stem = wanted[0].string.partition(".")[0]
    if absent := [f"{stem}.{p:02d}-of-{count:02d}.pth" for p in range(count) if p not in _numbers(paths)]:
        raise UsageError(f"{folder} lacks {absent[0]}: {len(paths)} of {count} parts are there")
    args = vars(load(folder / ARGS, argparse.Namespace)) if (folder / ARGS).is_file() else {}
    parts = [load(path) for path in paths]
    return _join(parts, paths) if count > 1 else parts[0], args, paths[0]


def write_folder(folder: Path, which: str, tensors: Mapping[str, Tensor], config, record: Mapping) -> None:
    """What the public code samples from: the weights in one part, and the flags of its training that it asks for.

    Args:
        which: "ema" or "model".
        record: `checkpoint.Description`, or as much of it as is known.

    Raises:
        UsageError: the public code has no such model, or would sample it in another way.
    """
    rows = {name: (row["depth"], row["hidden_size"]) for name, row in ROWS.items() if name.startswith("DiT_")}
    model = next((name for name, size in rows.items() if size == (config.depth, config.hidden_size)), None)
    unknown = {
        "model of this size": model is None,
        "experts": config.num_experts > 0,
        "rectified flow": record.get("objective", {}).get("name") == "rf",
        "latents but those of Stable Diffusion": config.in_channels != 4,
    }
    if what := next((what for what, is_so in unknown.items() if is_so), None):
        raise UsageError(f"the public code's folders know no {what}; write a .safetensors or .pt file")
    vae = record.get("space", {}).get("path")
    args = {
        "model": model,
        "image_size": record.get("image_size", 8 * config.input_size),
        "qk_norm": config.qk_norm == "full",
        "vae": vae if vae in ("ema", "mse") else "ema",
        "model_parallel_size": 1,
    }
    if config.caption_width:
        encoder = record.get("text", {}).get("name", "meta-llama/Llama-2-7b-hf")
        args |= {"lm": encoder, "tokenizer_path": encoder, "max_text_tokens": config.caption_length}
        args["rope_scaling_factor"] = config.position_scaling
    else:
        args["num_classes"] = config.num_classes
    stem = "consolidated_ema" if which == "ema" else "consolidated"
    torch.save(dict(tensors), folder / f"{stem}.00-of-01.pth")
    torch.save(argparse.Namespace(**args), folder / ARGS)


def known(args: dict) -> dict:
    """The fields of `DiTConfig` that flags tell of a model and shapes do not."""
    found = {"num_heads": ROWS[args["model"]]["num_heads"]} if args.get("model") in ROWS else {}
    if isinstance(args.get("image_size"), int):
        found["input_size"] = args["image_size"] // 8
    if isinstance(args.get("lm"), str):
        found["caption_length"] = args.get("max_text_tokens", OF_LLAMA["caption_length"])
        found["position_scaling"] = args.get("rope_scaling_factor", 1.0)
    return found


def description(args: dict) -> dict:
    """What flags tell besides: of `checkpoint.Description`."""
    found = {"objective": {"name": "ddpm"}}
    if args.get("vae") in ("ema", "mse"):
        found["space"] = {"path": args["vae"]}
    if isinstance(args.get("lm"), str):
        found["text"] = {"name": args["lm"], "length": args.get("max_text_tokens", OF_LLAMA["caption_length"])}
    return found | ({"image_size": args["image_size"]} if isinstance(args.get("image_size"), int) else {})


def _numbers(paths: list[Path]) -> set[int]:
    return {int(PART.fullmatch(path.name)["part"]) for path in paths}


def _join(parts: list[Mapping[str, Tensor]], paths: list[Path]) -> dict[str, Tensor]:
    """Tensors that fairscale split over processes: by rows, by columns, or not at all."""
    joined = {}
    for name, first in parts[0].items():
        if OF_A_PROCESS.fullmatch(name):
            raise UsageError(
                f"{paths[0].parent} is split over {len(parts)} processes and has QK-norm ({name}), which there is of "
                "the heads of each process: no whole model computes the same; give a folder of one part"
            )
        if absent := [path for part, path in zip(parts, paths, strict=True) if name not in part]:
            raise UsageError(f"{absent[0]} lacks {name}, which {paths[0].name} has")
        tensors = [part[name] for part in parts]
        if wrong := [i for i, tensor in enumerate(tensors) if tensor.shape != first.shape]:
            found, expected = tuple(tensors[wrong[0]].shape), tuple(first.shape)
            raise UsageError(f"{paths[wrong[0]]}: {name} is {found}, in {paths[0].name} {expected}")
        if BY_COLUMNS.fullmatch(name):
            joined[name] = torch.cat(tensors, dim=1)
        elif BY_ROWS.fullmatch(name):
            joined[name] = torch.cat(tensors)
        else:
            joined[name] = first
    return joined
