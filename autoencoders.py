"""Autoencoders, which turn images into latents and back; pixels as they are are one of them.

N batch, C latent channels, H W image height and width, h w latent height and width.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from checkpoint import load_pickle
from cli import UsageError
from compiling import Compiling
from hub import brief, file_of, place_of
from records import check_record, read_record

VAE_NAMES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Kind(NamedTuple):
    """A class of `diffusers`: where its config.json tells its latents, and what it is without a word there."""

    blocks: str  # the field with a width for each level of its encoder
    levels: int
    channels: int
    scaling_factor: float
    encoded: str  # what its encoder answers with: a posterior, or the latents themselves


KINDS = {
    "AutoencoderKL": Kind("block_out_channels", 1, 4, 0.18215, "latent_dist"),
    "AutoencoderDC": Kind("encoder_block_out_channels", 6, 32, 1.0, "latent"),  # DC-AE, arXiv 2410.10733
    "AutoencoderTiny": Kind("encoder_block_out_channels", 4, 4, 1.0, "latents"),
}


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel of latents, as VA-VAE (arXiv 2501.01423) has them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, record: Mapping) -> "Statistics | None":
        """Those of a config.json or of a `SpaceInfo.record`, if it has some."""
        mean, std = record.get("latents_mean"), record.get("latents_std")
        return None if mean is None or std is None else cls(tuple(mean), tuple(std))

    def record(self) -> dict:
        return {"latents_mean": list(self.mean), "latents_std": list(self.std)}


@dataclass
class SpaceInfo:
    """What must be known about the space in which the diffusion runs before an autoencoder is loaded.

    latents = (autoencoder's latents - shift) * scale: of all channels, or where there are statistics of each one, when
    the shift is its mean and the scale `scaling_factor` over its deviation.
    """

    path: str  # a folder, a hub name, or none
    channels: int
    downsample: int  # image side / latent side
    scaling_factor: float
    shift_factor: float
    samples_posterior: bool  # does `encode` use its noise?
    statistics: Statistics | None = None
    kind: str = "AutoencoderKL"  # a key of `KINDS`

    @classmethod
    def recorded(cls, record: Mapping) -> "SpaceInfo":
        """That of a `record`, which need not have all of it."""
        return cls(
            record["path"],
            *(record[key] for key in ("channels", "downsample", "scaling_factor")),
            record.get("shift_factor", 0.0),
            samples_posterior=True,
            statistics=Statistics.of(record),
            kind=record.get("kind", "AutoencoderKL"),
        )

    def config(self) -> dict:
        """For a checkpoint: enough to decode its samples."""
        return {
            "path": self.path,
            "scaling_factor": self.scaling_factor,
            "downsample": self.downsample,
            "channels": self.channels,
            **({} if self.statistics is None else self.statistics.record()),
            **({} if self.kind == "AutoencoderKL" else {"kind": self.kind}),
        }

    def record(self) -> dict:
        """For a checkpoint of a run: what its latents depend on."""
        return self.config() | {"shift_factor": self.shift_factor}

    def standardised(self, statistics: Statistics) -> None:
        """Have latents with mean 0 and deviation 1 in each channel, by what was measured of them.

        Raises:
            UsageError: they are of another number of channels.
        """
        if not len(statistics.mean) == len(statistics.std) == self.channels:
            raise UsageError(f"latent statistics of {len(statistics.mean)} channels, {self.path} has {self.channels}")
        self.statistics, self.scaling_factor, self.shift_factor = statistics, 1.0, 0.0

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """What the diffusion sees: a sample of the posterior, by standard normal noise, shifted and scaled."""
        shift, scale = self._affine(mean)
        return (mean + std * noise - shift) * scale

    def _affine(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Shift and scale, of each channel (C,1,1) where there are statistics."""
        if self.statistics is None:
            return self.shift_factor, self.scaling_factor
        mean, std = (like.new_tensor(values)[:, None, None] for values in self.statistics)
        return mean, self.scaling_factor / std


class PixelSpace(SpaceInfo):
    """No autoencoder: the latents are the image."""

    def __init__(self):
        super().__init__("none", 3, 1, 1.0, 0.0, samples_posterior=False)

    def to(self, device) -> "PixelSpace":
        return self

    def standardised(self, statistics: Statistics) -> None:
        raise UsageError("--latent-stats are of an autoencoder's latents; --vae-path none has pixels")

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


class LatentVAE(SpaceInfo):
    """A frozen autoencoder of `diffusers` in float32; `facts` are those that `space_info` finds, or a record's."""

    def __init__(self, facts: SpaceInfo, vae: torch.nn.Module):
        super().__init__(**vars(facts))
        self.vae = vae.float().eval().requires_grad_(False)

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

    def compile_encoder(self, **options) -> None:
        """torch.compile its encoder in place; options as `Compiling` has them."""
        encoder = self.vae.encoder
        encoder.forward = Compiling("convolutions", **options)(encoder.forward, fullgraph=False)

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        """Images (N,3,H,W) in [-1,1] and standard normal noise (N,C,h,w) to scaled latents (N,C,h,w)."""
        return self.latents(*self.moments(x), noise)

    @torch.no_grad()
    def moments(self, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (N,3,H,W) in [-1,1], each (N,C,h,w) float32.

        Products are computed in `dtype`. The deviation lies in [e^-15, e^10], as AutoencoderKL limits its logarithm;
        it is 0 of an autoencoder that encodes an image to one latent.
        """
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            encoded = getattr(self.vae.encode(x.float()), KINDS[self.kind].encoded)
        if isinstance(encoded, Tensor):
            return encoded.float(), torch.zeros_like(encoded, dtype=torch.float32)
        return encoded.mean.float(), (0.5 * encoded.logvar.float()).exp()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N,C,h,w) to images (N,3,H,W) in [-1,1]."""
        latents = latents.float()
        shift, scale = self._affine(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents / scale + shift).sample.clamp(-1, 1)


def load_vae(place: str, kind: str) -> torch.nn.Module:
    """The network of an autoencoder, one of `KINDS`, from a folder or the hub (`space_info` says which paths).

    Raises:
        UsageError: there are no weights, they are damaged, or lack a tensor.
    """
    folder = vae_folder(place)

    import diffusers
    from safetensors import SafetensorError

    try:
        vae, info = getattr(diffusers, kind).from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot load the autoencoder weights in {folder}: {brief(error)}") from error
    if missing := info["missing_keys"]:  # diffusers would leave these at random values
        raise UsageError(f"the autoencoder weights in {folder} lack {len(missing)} tensors, e.g. {min(missing)}")
    return vae


def add_space_arguments(group) -> None:
    """What changes an autoencoder's scale, and flags for those who keep copies of the hub's where Large-DiT and DiT-muP
    look for them."""
    group.add_argument(
        "--latent-stats",
        metavar="PATH",
        help="mean and deviation of latents' channels, in place of the autoencoder's scale: features that "
        "extract_features.py wrote, or a .json or .pt file",
    )
    group.add_argument("--local-diffusers-model-root", metavar="DIR", help="mse and ema are below this folder")
    group.add_argument("--root", metavar="DIR", help="mse and ema are in DIR/vaes, as DiT-muP keeps them")


def vae_below(args: argparse.Namespace, vae_path: str) -> str:
    """Where `mse` and `ema` are: below one of those folders, if one is given; else they are names of the hub."""
    if vae_path in VAE_NAMES and args.root is not None:
        return os.path.join(args.root, "vaes", os.path.basename(VAE_NAMES[vae_path]))
    if vae_path in VAE_NAMES and args.local_diffusers_model_root is not None:
        return os.path.join(args.local_diffusers_model_root, VAE_NAMES[vae_path])
    return vae_path


def place_of_space(args: argparse.Namespace, recorded: Mapping, channels: int) -> str:
    """The `--vae-path` of a network: as said, or as its training recorded, or the usual one for so many channels."""
    # Three channels are the colours of pixel space; the published networks work on Stable Diffusion's four.
    return vae_below(args, args.vae_path or recorded.get("path") or ("none" if channels == 3 else "mse"))


def read_statistics(path: str | Path | None) -> Statistics | None:
    """What `--latent-stats` names; None where it names nothing.

    Raises:
        UsageError: it is none of what the flag takes, damaged, or has no statistics.
    """
    if path is None:
        return None
    path = Path(path)
    source = path / "manifest.json" if path.is_dir() else path
    if source.suffix == ".json":
        record = read_record(source, StatisticsRecord, "--latent-stats takes features, .json, .pt")
        record = record.get("statistics", record)
        if "latents_mean" not in record or "latents_std" not in record:
            before = ": features of before they were measured, extract them anew" if path.is_dir() else ""
            raise UsageError(f"--latent-stats {path} has no latents_mean and latents_std{before}")
    elif source.is_file():
        loaded = load_pickle(source)
        if not all(isinstance(loaded.get(name), Tensor) for name in ("mean", "std")):
            raise UsageError(f"--latent-stats {path} holds {', '.join(map(str, loaded))}: expected mean and std")
        record = {f"latents_{name}": loaded[name].double().flatten().tolist() for name in ("mean", "std")}
        check_record(record, StatisticsRecord, path)
    else:
        raise UsageError(f"--latent-stats {path} does not exist")
    return Statistics.of(record)


def settle_statistics(space: SpaceInfo, measured: Statistics | None, recorded: Mapping, source: object) -> None:
    """Give an autoencoder the statistics of `--latent-stats`, or those that a network was trained with.

    Args:
        recorded: `SpaceInfo.record` of the training, or as much of it as `source` tells.

    Raises:
        UsageError: two of flag, record and autoencoder contradict each other, or the number of channels does.
    """
    was = Statistics.of(recorded)
    if "scaling_factor" in recorded and measured not in (None, was):
        other = "other ones" if was else f"scaling_factor {recorded['scaling_factor']}"
        raise UsageError(f"--latent-stats contradict {source}, which was trained with {other}; drop the flag")
    if "scaling_factor" in recorded and space.statistics not in (None, was):
        raise UsageError(
            f"--vae-path {space.path} has other statistics of its channels than {source} was trained with: give the "
            f"autoencoder of its training"
        )
    if (measured := measured or was) not in (None, space.statistics):
        space.standardised(measured)


def load_space(vae_path: str, statistics: Statistics | None = None) -> PixelSpace | LatentVAE:
    """The autoencoder of `--vae-path`, on the CPU; `statistics` as in `space_info`."""
    facts = space_info(vae_path, statistics)
    return facts if isinstance(facts, PixelSpace) else LatentVAE(facts, load_vae(facts.path, facts.kind))


def recorded_space(record: Mapping, vae: torch.nn.Module | None = None) -> PixelSpace | LatentVAE:
    """The autoencoder of a `SpaceInfo.record`; `vae` None: from where it says."""
    if record["path"] == "none":
        return PixelSpace()
    facts = SpaceInfo.recorded(record)
    return LatentVAE(facts, load_vae(facts.path, facts.kind) if vae is None else vae)


Level = Annotated[list[int], Field(min_length=1, max_length=16)]
Numbers = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
Deviations = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]


class Measured(TypedDict):
    """Mean and deviation of channels."""

    latents_mean: NotRequired[Numbers | None]
    latents_std: NotRequired[Deviations | None]


class StatisticsRecord(Measured):
    """A file of `--latent-stats`, or a manifest.json of features."""

    statistics: NotRequired[Measured]


class AutoencoderConfig(Measured):
    """config.json of an autoencoder, as far as it is read here."""

    _class_name: NotRequired[str]
    model_type: NotRequired[str]
    latent_channels: NotRequired[Annotated[int, Field(ge=1, le=1024)]]
    block_out_channels: NotRequired[Level]
    encoder_block_out_channels: NotRequired[Level]
    scaling_factor: NotRequired[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    shift_factor: NotRequired[Annotated[float, Field(allow_inf_nan=False)] | None]


def space_info(vae_path: str, statistics: Statistics | None = None) -> SpaceInfo:
    """The facts of an autoencoder's config.json; loads no weights.

    Args:
        vae_path: none, the folder of one of `KINDS` or of a pipeline with one in vae/, a hub name owner/name, mse, ema.
        statistics: of its latents, in place of the scale that it has (`--latent-stats`).

    Raises:
        UsageError: `vae_path` is anything else, or a hub name that is neither cached nor reachable.
    """
    if vae_path == "none":
        space = PixelSpace()
        if statistics is not None:
            space.standardised(statistics)
        return space
    name = place_of(vae_path, VAE_NAMES, "autoencoder")
    config_file = _vae_file(name, "config.json")
    config = read_record(Path(config_file), AutoencoderConfig)
    kind = config.get("_class_name") or config.get("model_type") or "model of unknown kind"
    if kind not in KINDS:
        raise UsageError(f"autoencoder path {vae_path} holds a {kind}; expected an {', '.join(KINDS)}")
    usual, own = KINDS[kind], Statistics.of(config)
    levels = len(config[usual.blocks]) if usual.blocks in config else usual.levels
    info = SpaceInfo(
        path=name,
        channels=config.get("latent_channels", usual.channels),
        downsample=2 ** (levels - 1),
        scaling_factor=config.get("scaling_factor", usual.scaling_factor),
        shift_factor=0.0 if own else config.get("shift_factor") or 0.0,
        samples_posterior=True,
        kind=kind,
    )
    if own is not None and not len(own.mean) == len(own.std) == info.channels:
        raise UsageError(f"{config_file} has statistics of {len(own.mean)} channels, and {info.channels} channels")
    info = replace(info, statistics=own)
    if statistics is not None:
        info.standardised(statistics)
    return info


def vae_folder(place: str) -> Path:
    """Where config.json and the weights of an autoencoder are; what the hub has is downloaded.

    Raises:
        UsageError: one of them is not there.
    """
    folder = Path(_vae_file(place, "config.json")).parent
    if not os.path.isabs(place):
        _vae_file(place, VAE_WEIGHTS)
    elif not any(folder.glob("diffusion_pytorch_model.*")):
        raise UsageError(f"no autoencoder weights in {folder}: expected {VAE_WEIGHTS}")
    return folder


def _vae_file(name: str, filename: str) -> str:
    """Path of one of an autoencoder's files, of which `name` is the place."""
    return file_of(name, filename, "autoencoder", below=["vae"])
