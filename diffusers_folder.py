"""Pipelines that `diffusers` runs: folders of a network, its objective, its autoencoder and a model card.

    pipeline.py          how images are drawn, and beside it model_index.json, which names the parts
    transformer/         the weights; config.json carries what their checkpoint said of them
    scheduler/           the objective; modules/ holds the project's modules that all of this computes with
    vae/                 the autoencoder, where it lies on this machine; one of the hub stays a name
    README.md            the model card

Or, of a dense DiT, the parts of diffusers' own `DiTPipeline`.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
import diffusers_dit
from autoencoders import SpaceInfo, vae_folder
from cli import UsageError
from configuration import DiTConfig
from exported_code import ROOT, write_package
from files import write_json
from models import DiT

PIPELINE = ROOT / "pipeline"
OF_EXPERTS = ("expert", "rout", "moe", "topk", "shared")  # what names of fields of mixtures have in them
NULL = 1000  # the label that DiTPipeline takes for no class, whatever the network


@dataclass
class Exported:
    """A model with all that a pipeline needs to know."""

    weights: checkpoint.Weights
    objective: object
    space: SpaceInfo

    @cached_property
    def model(self) -> DiT:
        return self.weights.build()

    @property
    def config(self) -> DiTConfig:
        return self.weights.config

    @property
    def record(self) -> Mapping:
        """`checkpoint.Description`, or as much of it as is known."""
        return self.weights.record or {}

    @property
    def description(self) -> dict:
        """For config.json of the transformer: what draws images, and what tells of the run."""
        kept = {name: self.record[name] for name in ("step", "text", "ema_decay") if name in self.record}
        data = {name: self.record.get("data", {}).get(name) for name in ("class_names", "captions", "samples")}
        space = self.space.record()
        if os.path.isabs(space["path"]):
            space["path"] = "vae"  # as it is here
        return {
            "format": checkpoint.FORMAT,
            "model": self.config.to_dict(),
            "objective": self.objective.config(),
            "space": space,
            "image_size": self.config.input_size * self.space.downsample,
            "data": {name: value for name, value in data.items() if value is not None},
            **kept,
        }


def write_ours(folder: Path, exported: Exported, dtype: torch.dtype | None) -> None:
    """Write a pipeline of ours, of whatever model there is, into an empty folder. Raises OSError."""
    index = {
        "_class_name": ["pipeline", "SparseDiTPipeline"],
        "transformer": ["components", diffusers_dit.OURS],
        "scheduler": ["components", "SparseDiTObjective"],
        "vae": [None, None],
    }
    if os.path.isabs(exported.space.path):
        copy_vae(exported.space.path, folder / "vae")
        index["vae"] = ["diffusers", exported.space.kind]
    write_index(folder, index)
    tensors = {f"network.{name}": tensor for name, tensor in exported.model.state_dict().items()}
    config = {"_class_name": diffusers_dit.OURS, "description": exported.description}
    write_transformer(folder / "transformer", config, tensors, dtype)
    scheduler = {"_class_name": "SparseDiTObjective", "objective": exported.objective.config()}
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_package(folder / "scheduler" / "modules", "sampling")
    shutil.copyfile(PIPELINE / "pipeline.py", folder / "pipeline.py")
    for part in ("transformer", "scheduler"):
        shutil.copyfile(PIPELINE / "components.py", folder / part / "components.py")


def write_theirs(folder: Path, exported: Exported, dtype: torch.dtype | None) -> None:
    """Write a `DiTPipeline` into an empty folder.

    Raises:
        UsageError: it would not compute what this model does; an autoencoder that cannot be fetched.
    """
    config, names = exported.config, exported.record.get("data", {}).get("class_names", ())
    copy_vae(exported.space.path, folder / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", diffusers_dit.THEIRS[0]],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if names:
        index["id2label"] = {str(label): name for label, name in enumerate(names)}
    write_index(folder, index)
    tensors = diffusers_dit.with_embeddings(exported.model.state_dict(), config.depth)
    write_transformer(folder / "transformer", diffusers_dit.config_of(config), tensors, dtype)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers_dit.scheduler_of(exported.objective))


def check_theirs(exported: Exported) -> None:
    """Raises UsageError for a model that `DiTPipeline` would not compute, with the first reason."""
    config, space, settings = exported.config, exported.space, exported.objective.config()
    plain = DiTConfig(config.depth, config.hidden_size, config.patch_size, config.num_heads)
    told = ("input_size", "in_channels", "num_classes", "learn_sigma", "class_dropout_prob")
    plain = replace(plain, **{name: getattr(config, name) for name in told})
    odd = [field.name for field in fields(config) if getattr(config, field.name) != getattr(plain, field.name)]
    odd = [name for name in odd if name == "num_experts" or not any(word in name for word in OF_EXPERTS)]
    reasons = {
        **{f"{name} {getattr(config, name)}": True for name in odd},
        f"objective {settings['name']}": settings["name"] != "ddpm",
        "no null class": config.null_class is None,
        f"{config.num_classes} classes (its null class is {NULL})": config.num_classes != NULL,
        f"autoencoder {space.path}": space.kind != "AutoencoderKL" or space.path == "none",
        f"shift_factor {space.shift_factor}": space.shift_factor != 0,
        "statistics of its latents": space.statistics is not None,
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        raise UsageError(f"diffusers' DiTPipeline has no word for {reason}: --to diffusers writes a pipeline that has")


@torch.no_grad()
def difference(folder: Path, exported: Exported) -> float:
    """How far a written `DiTTransformer2DModel` is from the model: RMS of what differs over RMS of the outputs.

    Of one noised latent and label at five times of 0..999.
    """
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    config, generator = exported.config, torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_channels, config.input_size, config.input_size, generator=generator)
    y, ours, found = torch.zeros(1, dtype=torch.int64), [], []
    for t in (0, 250, 500, 750, 999):
        ours.append(exported.model(x, torch.tensor([float(t)]), y))
        found.append(theirs(x, timestep=torch.tensor([t]), class_labels=y).sample)
    ours, found = torch.cat(ours), torch.cat(found)
    return ((found - ours).square().mean() / ours.square().mean()).sqrt().item()


def write_index(folder: Path, index: dict) -> None:
    write_json(folder / diffusers_dit.INDEX, index | {"_diffusers_version": version("diffusers")})


def write_transformer(folder: Path, config: dict, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config | {"_diffusers_version": version("diffusers")})
    kept = {
        name: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(kept, folder / diffusers_dit.WEIGHTS[0], {"format": "pt"})


def copy_vae(place: str, folder: Path) -> None:
    """The files of an autoencoder, with which `diffusers` opens it. Raises UsageError where it cannot be fetched."""
    folder.mkdir()
    found = vae_folder(place)
    names = ["config.json", *(path.name for path in found.glob("diffusion_pytorch_model.*"))]
    for name in names:
        shutil.copyfile(found / name, folder / name)
