"""CLIP: how near an image is to its caption (arXiv 2104.08718), and which of some texts is nearest to an image.

N images or texts · F width of the common space
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import distributed
from captions import read_captions
from cli import UsageError
from data import is_data, load_image
from extractors import full_precision
from files import replacing
from hub import brief, fetch, file_of, load_network, place_of

NAMES = {"ViT-B/32": "openai/clip-vit-base-patch32", "ViT-L/14": "openai/clip-vit-large-patch14"}


class CLIP:
    """A frozen CLIP of transformers, in fp32: a folder, a hub name, or a key of `NAMES`."""

    def __init__(self, path: str, device: torch.device):
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        place = place_of(path, NAMES, "CLIP")
        folder = str(Path(file_of(place, "config.json", "CLIP")).parent)
        fetch(place, "CLIP")
        self.network = load_network(CLIPModel, folder, "CLIP", dtype=torch.float32).to(device)
        try:
            self.processor = CLIPImageProcessor.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot load CLIP's tokenizer in {folder}: {brief(error)}") from None
        self.device, self.place = device, place
        self.length = self.network.config.text_config.max_position_embeddings

    @torch.no_grad()
    def of_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, F) of length 1; resized and cut out as CLIP's own preprocessing does."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        with full_precision(self.device):
            pooled = self.network.vision_model(pixel_values=pixels).pooler_output
            return _of_length_1(self.network.visual_projection(pooled))

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, F) of length 1; what is longer than CLIP reads is cut off."""
        options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **options).to(self.device)
        with full_precision(self.device):
            pooled = self.network.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            return _of_length_1(self.network.text_projection(pooled))


def _of_length_1(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def open_pairs(path: Path, names_are_captions: bool = False) -> tuple[Path, list[tuple[str, str]]]:
    """(folder, (name below it, caption) of each image): a data set with captions, or images that are called by theirs.

    Raises:
        UsageError: there are none.
    """
    if not names_are_captions:
        return read_captions(path)
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not path.is_dir():
        raise UsageError(f"{path} is not a folder of images")
    names = sorted(filter(is_data, (file.name for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)))
    if not names:
        raise UsageError(f"no images in {path}")
    return path, [(name, Path(name).stem) for name in names]


def clip_scores(
    clip: CLIP, root: Path, pairs: Sequence[tuple[str, str]], processes: distributed.Processes, batch_size: int
) -> np.ndarray:
    """(N,) 100 times the cosine of each image and its caption; the processes share the images.

    Raises:
        UsageError: an image cannot be read.
    """
    mine = range(processes.rank, len(pairs), processes.world_size)
    scores = []
    for start in range(0, len(mine), batch_size):
        part = [pairs[index] for index in mine[start : start + batch_size]]
        images = clip.of_images([read_image(root / name) for name, _ in part])
        texts = clip.of_texts([text for _, text in part])
        scores += (100 * (images * texts).sum(dim=-1)).tolist()
    result = np.zeros(len(pairs))
    for rank, found in enumerate(processes.gather(scores)):
        result[rank :: processes.world_size] = found
    return result


def read_image(path: Path) -> Image.Image:
    try:
        return load_image(str(path))
    except Exception as error:
        raise UsageError(f"{path} cannot be read: {brief(error)}") from None


def write_scores(path: Path, pairs: Sequence[tuple[str, str]], scores: np.ndarray) -> None:
    """A CSV with the columns filename, clip_score, caption. Raises OSError."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["filename", "clip_score", "caption"])
    writer.writerows((name, f"{score:.4f}", text) for (name, text), score in zip(pairs, scores.tolist(), strict=True))
    with replacing(path) as file:
        file.write(table.getvalue().encode(errors="backslashreplace"))
