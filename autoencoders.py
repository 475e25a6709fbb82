"""Autoencoders, which turn images into latents and back; pixels as they are are one of them.

N batch, C latent channels, H W image height and width, h w latent height and width.
"""

import argparse
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NotRequired

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from cli import UsageError
from hub import brief, file_of, place_of
from records import read_record

VAE_NAMES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class SpaceInfo:
    """What must be known about the space in which the diffusion runs before an autoencoder is loaded."""

    path: str  # a folder, a hub name, or none
    channels: int
    downsample: int  # image side / latent side
    scaling_factor: float  # latents = (autoencoder's latents - shift_factor) * scaling_factor
    shift_factor: float
    samples_posterior: bool  # does `encode` use its noise?

    def config(self) -> dict:
        """For a checkpoint: enough to decode its samples."""
        return {
            "path": self.path,
            "scaling_factor": self.scaling_factor,
            "downsample": self.downsample,
            "channels": self.channels,
        }

    def record(self) -> dict:
        """For a checkpoint of a run: what its latents depend on."""
        return self.config() | {"shift_factor": self.shift_factor}

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """What the diffusion sees: a sample of the posterior, by standard normal noise, shifted and scaled."""
        return (mean + std * noise - self.shift_factor) * self.scaling_factor


class PixelSpace(SpaceInfo):
    """No autoencoder: the latents are the image."""

    def __init__(self):
        super().__init__("none", 3, 1, 1.0, 0.0, samples_posterior=False)

    def to(self, device) -> "PixelSpace":
        return self

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


class LatentVAE(SpaceInfo):
    """A frozen AutoencoderKL in float32, from a folder or the hub (`space_info` says which paths)."""

    def __init__(self, path: str):
        super().__init__(**vars(space_info(path)))
        folder = os.path.dirname(_vae_file(self.path, "config.json"))
        if not os.path.isabs(self.path):
            _vae_file(self.path, VAE_WEIGHTS)
        elif not any(name.startswith("diffusion_pytorch_model.") for name in os.listdir(folder)):
            raise UsageError(f"no autoencoder weights in {folder}: expected {VAE_WEIGHTS}")

        from diffusers import AutoencoderKL
        from safetensors import SafetensorError

        try:
            self.vae, info = AutoencoderKL.from_pretrained(
                folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"cannot load the autoencoder weights in {folder}: {brief(error)}") from error
        if missing := info["missing_keys"]:  # diffusers would leave these at random values
            raise UsageError(f"the autoencoder weights in {folder} lack {len(missing)} tensors, e.g. {min(missing)}")
        self.vae.float().eval().requires_grad_(False)

    def to(self, device) -> "LatentVAE":
        self.vae.to(device)
        return self

    def record(self) -> dict:
        return super().record() | {"sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """Over names and values of its weights: the same from another folder or file format."""
        checksum = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            checksum.update(name.encode())
            checksum.update(tensor.cpu().contiguous().numpy().tobytes())
        return checksum.hexdigest()

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        """Images (N,3,H,W) in [-1,1] and standard normal noise (N,C,h,w) to scaled latents (N,C,h,w)."""
        return self.latents(*self.moments(x), noise)

    @torch.no_grad()
    def moments(self, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (N,3,H,W) in [-1,1], each (N,C,h,w) float32.

        Products are computed in `dtype`. The deviation lies in [e^-15, e^10]: AutoencoderKL limits its logarithm.
        """
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            posterior = self.vae.encode(x.float()).latent_dist
        return posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N,C,h,w) to images (N,3,H,W) in [-1,1]."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float() / self.scaling_factor + self.shift_factor).sample.clamp(-1, 1)


def add_root_arguments(group) -> None:
    """For those who keep copies of the hub's autoencoders, where Large-DiT and DiT-muP look for them."""
    group.add_argument("--local-diffusers-model-root", metavar="DIR", help="mse and ema are below this folder")
    group.add_argument("--root", metavar="DIR", help="mse and ema are in DIR/vaes, as DiT-muP keeps them")


def vae_below(args: argparse.Namespace, vae_path: str) -> str:
    """Where `mse` and `ema` are: below one of those folders, if one is given; else they are names of the hub."""
    if vae_path in VAE_NAMES and args.root is not None:
        return os.path.join(args.root, "vaes", os.path.basename(VAE_NAMES[vae_path]))
    if vae_path in VAE_NAMES and args.local_diffusers_model_root is not None:
        return os.path.join(args.local_diffusers_model_root, VAE_NAMES[vae_path])
    return vae_path


def load_space(vae_path: str) -> PixelSpace | LatentVAE:
    """The autoencoder of `--vae-path`, on the CPU."""
    return PixelSpace() if vae_path == "none" else LatentVAE(vae_path)


class AutoencoderConfig(TypedDict):
    """config.json of an AutoencoderKL, as far as it is read here."""

    _class_name: NotRequired[str]
    model_type: NotRequired[str]
    latent_channels: NotRequired[Annotated[int, Field(ge=1, le=1024)]]
    block_out_channels: NotRequired[Annotated[list[int], Field(min_length=1, max_length=16)]]
    scaling_factor: NotRequired[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    shift_factor: NotRequired[Annotated[float, Field(allow_inf_nan=False)] | None]


def space_info(vae_path: str) -> SpaceInfo:
    """The facts of an autoencoder's config.json; loads no weights.

    `vae_path`: none, the folder of an AutoencoderKL or of a pipeline with one in vae/, a hub name owner/name, mse, ema.
    Raises UsageError for everything else, and for a hub name that is neither cached nor reachable.
    """
    if vae_path == "none":
        return PixelSpace()
    name = place_of(vae_path, VAE_NAMES, "autoencoder")
    config_file = _vae_file(name, "config.json")
    config = read_record(Path(config_file), AutoencoderConfig)
    kind = config.get("_class_name") or config.get("model_type") or "model of unknown kind"
    if kind != "AutoencoderKL":
        raise UsageError(f"autoencoder path {vae_path} holds a {kind}; expected an AutoencoderKL")
    return SpaceInfo(
        path=name,
        channels=config.get("latent_channels", 4),  # here and below, the default is that of AutoencoderKL
        downsample=2 ** (len(config.get("block_out_channels", [64])) - 1),
        scaling_factor=config.get("scaling_factor", 0.18215),
        shift_factor=config.get("shift_factor") or 0.0,
        samples_posterior=True,
    )


def _vae_file(name: str, filename: str) -> str:
    """Path of one of an autoencoder's files, of which `name` is the place."""
    return file_of(name, filename, "autoencoder", below=["vae"])
