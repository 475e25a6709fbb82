"""Representation alignment (REPA, arXiv 2410.06940): tokens of a block learn to tell what a frozen encoder sees there.

N images of a batch · H, W their size · s places in a row and a column of the DiT, T = s*s · D its width
F width of the encoder's features

The hidden tokens of a noised image, behind block `depth`, go through a small MLP, the projector; the cosine between
what comes out and the encoder's feature of the clean image in the same place is to grow. Projector and encoder are of
training alone: what samples is the network without them. The encoder sees the images of a batch, or its features lie
beside latents (latents.py), where extract_features.py has put them.

Deviation: the projector is drawn N(0, 1/I) of I inputs, which suits any width, for muP too; published is Xavier.
"""

import argparse
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NotRequired

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import TypedDict

from cli import Need, UsageError, natural_int, number_in, positive_int
from configuration import DiTConfig
from hub import fetch, file_of, fingerprint, load_network, place_of
from latents import LatentShards
from machine import PRECISIONS
from parametrization import is_mup
from records import read_record

NAMES = {  # as REPA calls them
    "dinov2-vit-s": "facebook/dinov2-small",
    "dinov2-vit-b": "facebook/dinov2-base",
    "dinov2-vit-l": "facebook/dinov2-large",
    "dinov2-vit-g": "facebook/dinov2-giant",
}
WHAT = "encoder of images"
KINDS = ("dinov2", "dinov2_with_registers")  # as config.json has it


def add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("representation alignment (REPA)")
    group.add_argument(
        "--repa",
        metavar="ENCODER",
        help=f"align tokens with those of a DINOv2: folder, hub name, {', '.join(NAMES)}; off without it",
    )
    group.add_argument("--repa-depth", type=positive_int, default=8, help="blocks before the tokens that are aligned")
    group.add_argument("--repa-weight", type=number_in(0, 1e6), default=0.5, help="factor of minus the mean cosine")
    group.add_argument("--repa-until", type=natural_int, default=0, help="steps after which it is off; 0: never")
    group.add_argument("--repa-width", type=positive_int, default=2048, help="of the projector's hidden layers")


NEEDS = Need(
    ("repa_depth", "repa_weight", "repa_until", "repa_width"),
    lambda args: args.repa is not None,
    "--repa ENCODER",
)

# -------------------------------------------------------------------------------------------------------------- encoder


class Config(TypedDict):
    """config.json of a network, as far as it is read here."""

    model_type: NotRequired[str]


class Encoder:
    """A frozen DINOv2 of `transformers`; the features are its patch tokens behind the last norm.

    Args:
        name: a folder, a hub name, or a key of `NAMES`.

    Raises:
        UsageError: there is none, it cannot be fetched, or it is of another kind.
    """

    def __init__(self, name: str):
        from transformers import AutoModel
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        self.place = place_of(name, NAMES, WHAT)
        path = Path(file_of(self.place, "config.json", WHAT))
        if (kind := read_record(path, Config).get("model_type", "model of unknown kind")) not in KINDS:
            raise UsageError(f"{path}: a {kind} aligns nothing here; expected {' or '.join(KINDS)}")
        fetch(self.place, WHAT)
        self.network = load_network(AutoModel, str(path.parent), WHAT, dtype=torch.float32)
        self.width, self.patch = self.network.config.hidden_size, self.network.config.patch_size
        self.others = 1 + getattr(self.network.config, "num_register_tokens", 0)  # tokens that are of no place
        self.mean, self.deviation = (
            torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    def to(self, device: torch.device) -> "Encoder":
        self.network.to(device)
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, side: int) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the encoder's device -> (N, s*s, F), for s = `side` places in a row.

        Images are made as large as s patches, as published: of 256 pixels and 16 places, 224.
        """
        x = ((images.float() + 1) / 2 - self.mean) / self.deviation
        x = F.interpolate(x, size=(side * self.patch, side * self.patch), mode="bicubic")
        return self.network(pixel_values=x).last_hidden_state[:, self.others :]

    def record(self) -> dict:
        return {"name": self.place, "width": self.width, "sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.network)


# ------------------------------------------------------------------------------------------------------------- training


class Projector(nn.Sequential):
    """Tokens (N, T, D) -> (N, T, F), to be compared with features."""

    def __init__(self, width: int, hidden: int, features: int):
        sizes = (width, hidden, hidden, features)
        layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.SiLU())]
        super().__init__(*layers[:-1])

    @property
    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def draw(self) -> None:
        for layer in self.linears:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)


def cosines(projected: Tensor, features: Tensor) -> Tensor:
    """(N, T, F) both -> (N,): the mean cosine over the places of an image."""
    return F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(dim=1)


@dataclass
class Alignment:
    """What a run aligns with what."""

    encoder: Encoder | None  # None: features come with the batch
    latents: LatentShards | None  # whose features these are
    record: dict  # of the encoder: `Encoder.record`
    config: DiTConfig
    depth: int
    weight: float
    hidden: int  # width of the projector's hidden layers
    until: int  # steps; 0: always
    dtype: torch.dtype  # that the encoder computes in

    def is_on(self, step: int) -> bool:
        """In the step with 0-based number `step`."""
        return self.until == 0 or step < self.until

    def begin(self, step: int) -> None:
        """Have batches from `step` on bring features, or spare the disk; before a loader is made."""
        if self.latents is not None:
            self.latents.reads_representation = self.is_on(step)

    def features(self, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        """(N, T, F) of the clean images of a batch."""
        if self.encoder is None:
            return batch["features"].to(device, non_blocking=True)
        images = batch["x"].to(device, non_blocking=True)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.encoder(images, self.config.side)

    def loss(self, projected: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to the loss, and the mean cosine for the log."""
        cosine = cosines(projected, features).mean()
        return -self.weight * cosine, cosine.detach()

    def projector(self) -> Projector:
        """A fresh one, on the CPU; drawn by PyTorch's generator as it stands."""
        projector = self._projector()
        projector.draw()
        return projector

    def _projector(self) -> Projector:
        return Projector(self.config.hidden_size, self.hidden, self.record["width"])

    def groups(self, projector: Projector, lr: float, weight_decay: float) -> list[dict]:
        """Of an optimizer: as `optim.parameter_groups`. Under muP what reads the network's width learns by it."""
        narrow = self.config.base_width / self.config.hidden_size if is_mup(self.config) else 1.0
        reading, *rest = (layer.weight for layer in projector.linears)
        biases = [layer.bias for layer in projector.linears]
        return [
            {"params": params, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay / factor}
            for params, factor, decay in (([reading], narrow, weight_decay), (rest, 1, weight_decay), (biases, 1, 0))
        ]

    def in_words(self) -> str:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in self._projector().parameters())
        end = f" until step {self.until}" if self.until else ""
        return (
            f"tokens behind block {self.depth} of {self.config.depth} are aligned with {self.record['name']}{end}: "
            f"a projector of {size:,} parameters besides"
        )


def brief(record: dict | None) -> str:
    """What tells one encoder, or none, from others."""
    return "off" if record is None else f"an encoder of SHA-256 {record['sha256'][:12]}"


def check_depth(args: argparse.Namespace, config: DiTConfig) -> None:
    """Raises UsageError for a block that the model does not have."""
    if args.repa is not None and args.repa_depth > config.depth:
        raise UsageError(f"--repa-depth {args.repa_depth}: the model has {config.depth} blocks; 1 to {config.depth}")


def open_encoder(args: argparse.Namespace) -> Encoder | None:
    """Of `--repa`, where images are read; before these are looked through. Raises UsageError."""
    return None if args.repa is None or args.feature_path is not None else Encoder(args.repa)


def open_alignment(args: argparse.Namespace, config: DiTConfig, encoder: Encoder | None, data) -> Alignment | None:
    """Of `--repa`, for a model and its data.

    Raises:
        UsageError: latents without features, or with those of another encoder or of other places.
    """
    if args.repa is None:
        return None
    settings = (args.repa_depth, args.repa_weight, args.repa_width, args.repa_until, PRECISIONS[args.precision])
    if encoder is not None:
        return Alignment(encoder, None, encoder.record(), config, *settings)
    latents = getattr(data, "images", data)  # of captioned samples
    stored = latents.manifest.get("representation") if isinstance(latents, LatentShards) else None
    if stored is None:
        raise UsageError(
            f"--feature-path {args.feature_path} has latents alone, no features for --repa {args.repa}: extract them "
            f"with extract_features.py --repa {args.repa}, or give --data-path"
        )
    if stored["name"] not in (args.repa, NAMES.get(args.repa)) and stored["name"] != place_of(args.repa, NAMES, WHAT):
        raise UsageError(f"--repa {args.repa}: the features in {args.feature_path} are of {stored['name']}; name that")
    if stored["side"] != config.side:
        sides = f"{stored['side']}x{stored['side']} places, the model has {config.side}x{config.side}"
        raise UsageError(f"the features in {args.feature_path} are of {sides}: extract them with --repa-patch-size")
    record = {name: stored[name] for name in ("name", "width", "sha256")}
    return Alignment(None, latents, record, config, *settings)
