"""From images to the features in which sets of images are compared.

n images of a batch · H, W image size · F features of an image

    inception   the network of 2015-12-05 that FID, sFID and Inception Score are defined by, as torch-fidelity ported it
    dinov2      the class token of DINOv2 ViT-L/14, as FD-DINOv2 (arXiv 2306.04675) has it
    pixels      small images as they are

Networks run in fp32, whatever the precision around them. Their weights are files of others, which are looked for where
the flag says, then in PyTorch's cache, then on the network.
"""

import contextlib
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from cli import UsageError
from distributed import Processes
from files import digest
from hub import HUB_TIMEOUT, brief
from metrics import pixel_features

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINOV2_MODEL = "vit_large_patch14_dinov2"  # timm's name of it
SPATIAL_CHANNELS = 7  # of the 17x17 map, for sFID: 2023 numbers, about as many as the pool has
PIXELS_LIMIT = 4096  # features, as many as images of 36x36 have


class Extractor(Protocol):
    """What turns images into features."""

    def describe(self) -> dict:
        """What features must have in common to be compared: `name`, and the SHA-256 of the weights if there are any."""

    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        """(n, H, W, 3) uint8 -> `features` (n, F) fp32, on the extractor's device; Inception has `spatial` besides."""


class Inception:
    """`features`: the pool, F = 2048. `spatial`: 7 channels of the map 17x17 in ADM's order, F = 2023."""

    name = "inception"

    def __init__(self, weights: Path, device: torch.device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        checkpoint.load_pickle(weights)  # refuses a file that would run code: the library's own reader does not
        try:
            self.network = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=str(weights))
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"{weights} does not hold the weights of Inception ({brief(error)})") from None
        self.network.to(device)
        self.device, self.weights = device, digest(weights)["sha256"]
        # TensorFlow's mixed_6/conv, after its ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output: Tensor) -> None:
        self._map = output  # (n, 192, 17, 17)

    def describe(self) -> dict:
        return {"name": self.name, "weights": self.weights, "torch-fidelity": version("torch-fidelity")}

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        x = torch.tensor(images, device=self.device).permute(0, 3, 1, 2)
        with full_precision(self.device):
            (pool,) = self.network(x)  # resizes to 299x299 as TensorFlow 1 did
        return {"features": pool, "spatial": self._map[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)}

    def logits(self, features: Tensor) -> Tensor:
        """(N, 2048) -> (N, 1008), without the bias: what ADM's Inception Score is computed from."""
        return features @ self.network.fc.weight.to(features.device).T


class DINOv2:
    """`features`: the class token behind the last norm, F = 1024."""

    name = "dinov2"

    def __init__(self, weights: Path, device: torch.device):
        import timm

        state = checkpoint.load_pickle(weights)
        self.network = timm.create_model(DINOV2_MODEL, img_size=224, num_classes=0)
        try:
            state["pos_embed"] = _positions(state["pos_embed"], side=16)
            self.network.load_state_dict({name: value for name, value in state.items() if name != "mask_token"})
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{weights} does not hold the weights of DINOv2 ViT-L/14 ({brief(error)})") from None
        self.network.to(device).eval().requires_grad_(False)
        self.device, self.weights = device, digest(weights)["sha256"]

    def describe(self) -> dict:
        return {"name": self.name, "weights": self.weights, "timm": version("timm")}

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        x = torch.tensor(images, device=self.device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True).round().clamp(0, 255)  # as PIL leaves it
        mean, std = (x.new_tensor(self.network.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        with full_precision(self.device):
            return {"features": self.network((x / 255 - mean) / std)}


def _positions(table: Tensor, side: int) -> Tensor:
    """The published position table (1, 1 + 37*37, D) for `side` x `side` patches, as DINOv2's own code shrinks it."""
    old = round((table.shape[1] - 1) ** 0.5)
    token, grid = table[:, :1], table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


class Pixels:
    """`features`: the pixels in 0..1, F = 3HW."""

    name = "pixels"

    def __init__(self, device: torch.device):
        self.device = device

    def describe(self) -> dict:
        return {"name": self.name}

    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        features = pixel_features(images)
        if features.shape[1] > PIXELS_LIMIT:
            size = images.shape[1]
            raise UsageError(
                f"--features pixels is for images of at most 36x36, got {size}x{size}; use inception or dinov2"
            )
        return {"features": torch.from_numpy(features).to(self.device)}


EXTRACTORS = (Inception.name, DINOv2.name, Pixels.name)


def load_extractor(name: str, weights: Path | None, flag: str, processes: Processes) -> Extractor:
    """The extractor of a name in EXTRACTORS, on every process.

    Args:
        weights: what the user gave with `flag`, or None.

    Raises:
        UsageError: the weights are not there and cannot be fetched, or are something else.
    """
    if name == Pixels.name:
        return Pixels(processes.device)
    found = processes.on_main(lambda: find_weights(name, weights, flag))  # alone, as it may have to download them
    network = Inception if name == Inception.name else DINOv2
    return processes.together(lambda: network(found, processes.device))


def find_weights(name: str, given: Path | None, flag: str) -> Path:
    """The file given, or that of the published name in PyTorch's cache, into which it is downloaded if need be.

    Raises:
        UsageError: it is nowhere; says which file that is and where it was looked for.
    """
    url = _url(name)
    file = url.rpartition("/")[2]
    if given is not None:
        if not given.is_file():
            raise UsageError(f"{flag} {given} does not exist; expected the file {file}")
        return given
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if cached.is_file():
        return cached
    try:
        # Asked first, with a limit, which the download itself does not have.
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT).close()
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached))
    except (OSError, HTTPException) as error:
        raise UsageError(
            f"no weights for {name} features: {file} is not in {cached.parent} and cannot be fetched from {url} "
            f"({brief(error)}); download it where there is a network, and give it with {flag} PATH"
        ) from None
    return cached


def _url(name: str) -> str:
    if name == DINOv2.name:
        return DINOV2_URL
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 products, inside a caller's autocast or tf32 as well."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
