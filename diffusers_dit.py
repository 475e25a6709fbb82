"""The DiT of `diffusers`, and pipelines of ours: the names in their files, what their folders tell.

`DiTTransformer2DModel` has the parts of the dense DiT, each block with embeddings of time and class of its own, which
are the same in all of them where the weights are DiT's. Its time embedding has the frequencies 10000^(-k/127), DiT's
10000^(-k/128), and nothing in its config.json changes that: converted weights compute something else there.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict

from cli import UsageError, warn_once
from names import NameMap, rule
from records import read_record

ROWS: dict[str, dict] = {}
MARK = re.compile(r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.weight")
EMBEDDINGS = re.compile(r"transformer_blocks\.([1-9]\d*)\.(norm1\.emb\..*)")  # of the blocks behind the first

FIRST = "transformer_blocks.0.norm1.emb"
NAMES = NameMap(
    rule("x_embedder.proj.{w}", "pos_embed.proj.{w}"),
    rule("t_embedder.mlp.0.{w}", f"{FIRST}.timestep_embedder.linear_1.{{w}}"),
    rule("t_embedder.mlp.2.{w}", f"{FIRST}.timestep_embedder.linear_2.{{w}}"),
    rule("y_embedder.embedding_table.{w}", f"{FIRST}.class_embedder.embedding_table.{{w}}"),
    rule("blocks.{b}.adaLN_modulation.1.{w}", "transformer_blocks.{b}.norm1.linear.{w}"),
    rule("blocks.{b}.attn.qkv.{w}", *(f"transformer_blocks.{{b}}.attn1.to_{part}.{{w}}" for part in "qkv")),
    rule("blocks.{b}.attn.proj.{w}", "transformer_blocks.{b}.attn1.to_out.0.{w}"),
    rule("blocks.{b}.mlp.fc1.{w}", "transformer_blocks.{b}.ff.net.0.proj.{w}"),
    rule("blocks.{b}.mlp.fc2.{w}", "transformer_blocks.{b}.ff.net.2.{w}"),
    rule("final_layer.adaLN_modulation.1.{w}", "proj_out_1.{w}"),
    rule("final_layer.linear.{w}", "proj_out_2.{w}"),
)

OURS = "SparseDiT"  # the class of a transformer in a pipeline of ours
THEIRS = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in files of before it had a name of its own
INDEX = "model_index.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def spells(config) -> bool:
    """Files of these names are written where they are asked for, as a pipeline, and never otherwise."""
    return False


class Config(TypedDict):
    """config.json of a transformer, as far as it is read here."""

    _class_name: NotRequired[Any]
    num_attention_heads: NotRequired[int]
    sample_size: NotRequired[int]
    description: NotRequired[dict]  # of ours


def find_folder(path: Path) -> Path | None:
    """The folder of a transformer that this is, or that is in this pipeline."""
    for folder in (path, path / "transformer"):
        found = _json(folder / "config.json")
        ours, theirs = (found.get("_class_name") == OURS, found.get("_class_name") in THEIRS)
        if ours or (theirs and found.get("norm_type", FIXED["norm_type"]) == FIXED["norm_type"]):
            return folder
    return None


def read_folder(folder: Path, which: str, load: Callable[..., Any]) -> tuple[Mapping[str, Tensor], dict, Path]:
    """The tensors of a transformer; what its config.json tells, and those beside it; the file.

    Raises:
        UsageError: there is no one file of weights; it is a model that DiT is not.
    """
    config = read_record(folder / "config.json", Config)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(f"{folder} has no {WEIGHTS[0]} (weights in several parts are not read)")
    tensors, told = load(path), {"folder": folder, "config": config}
    if config["_class_name"] == OURS:
        if "description" not in config:
            raise UsageError(f"{folder / 'config.json'} has no description: export the weights again")
        return _named(tensors, {name.removeprefix("network."): name for name in tensors}), told, path
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UsageError(f"{folder / 'config.json'} has {name} {config[name]}, a DiT {value}")
    _check_embeddings(tensors, path)
    warn_once(
        f"{folder} is read as the DiT it was made of: DiTTransformer2DModel computes with other frequencies of time "
        f"(10000^(-k/127), here 10000^(-k/128)), and so what was trained in diffusers draws other images here"
    )
    return _named(tensors, {name: name for name in tensors if not EMBEDDINGS.fullmatch(name)}), told, path


def known(told: dict) -> dict:
    """The fields of `DiTConfig` that config.json tells."""
    config = told["config"]
    if "description" in config:
        return dict(config["description"].get("model", {}))
    return {"num_heads": config.get("num_attention_heads", 16), "input_size": config.get("sample_size", 32)}


def description(told: dict) -> dict:
    """What is told besides: of `checkpoint.Description`."""
    folder, config = told["folder"].absolute(), told["config"]
    beside = folder.parent / "vae"
    space = {"space": {"path": str(beside)}} if (beside / "config.json").is_file() else {}
    if "description" in config:
        found = config["description"]
        return found | ({"space": found.get("space", {}) | space["space"]} if space else {})
    scheduler, index = _json(folder.parent / "scheduler" / "scheduler_config.json"), _json(folder.parent / INDEX)
    objective = {"name": "ddpm"}
    for setting, names, field in (
        ("schedule", SCHEDULES, "beta_schedule"),
        ("prediction", PREDICTIONS, "prediction_type"),
    ):
        of_theirs = {theirs: ours for ours, theirs in names.items()}
        if scheduler.get(field) in of_theirs:
            objective[setting] = of_theirs[scheduler[field]]
    if config.get("out_channels", 8) == config.get("in_channels", 4):
        objective |= {"loss": "mse", "variance": "fixed_small"}
    names = index.get("id2label") or {}
    names = [names.get(str(label)) for label in range(len(names))]
    return {"objective": objective, "data": {"class_names": names if all(names) else []}} | space


def _named(tensors: Mapping[str, Tensor], names: dict[str, str]) -> Mapping[str, Tensor]:
    """Some of the tensors of a file, by other names."""
    if isinstance(tensors, dict):
        return {name: tensors[theirs] for name, theirs in names.items()}
    return tensors.named(names)


def _json(path: Path) -> dict:
    """What a file of JSON says; nothing where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_embeddings(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UsageError for blocks whose embeddings of time or class differ, as training in diffusers makes them."""
    for name in tensors:
        match = EMBEDDINGS.fullmatch(name)
        first = match and f"transformer_blocks.0.{match[2]}"
        if match and (first not in tensors or not torch.equal(tensors[name], tensors[first])):
            raise UsageError(f"{path}: {name} is not as in block 0: trained in diffusers, it is no DiT any more")


# ------------------------------------------------------------------------------------------------------------- writing


def with_embeddings(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors under their names, with the embeddings in all blocks, and without the table of positions."""
    named = NAMES.to_theirs({name: tensor for name, tensor in tensors.items() if name != "pos_embed"})
    shared = {name.removeprefix(FIRST): tensor for name, tensor in named.items() if name.startswith(FIRST)}
    for block in range(1, depth):
        prefix = f"transformer_blocks.{block}.norm1.emb"
        named |= {prefix + name: tensor.clone() for name, tensor in shared.items()}
    return named


def config_of(config) -> dict:
    """config.json of a `DiTConfig`."""
    return {
        "_class_name": THEIRS[0],
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": 1e-6,
        **FIXED,
    }


def scheduler_of(objective) -> dict:
    """scheduler_config.json of a `GaussianDiffusion`."""
    settings = objective.config()
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": 1e-4,
        "beta_end": 2e-2,
        "beta_schedule": SCHEDULES[settings["schedule"]],
        "prediction_type": PREDICTIONS[settings["prediction"]],
        "num_train_timesteps": settings["num_timesteps"],
        "clip_sample": False,
    }
