"""Encoders of texts that are networks of others, by transformers: T5, CLIP's, and causal language models.

N texts · L tokens · C width of a token's features

A folder holds config.json, weights and a tokenizer, or these in text_encoder/ and tokenizer/, as pipelines have them;
or it is a name of the hub. Weights are bf16 on a GPU and fp32 on a CPU; features are fp32.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict

from cleaning import clean_caption
from cli import UsageError
from hub import brief, fetch, file_of, fingerprint, load_network, place_of
from records import read_record

NAMES = {
    "t5": "DeepFloyd/t5-v1_1-xxl",
    "clip": "openai/clip-vit-large-patch14",
    "llama": "meta-llama/Llama-2-7b-hf",
}
BATCH = 64  # texts that go through the network at once


class Config(TypedDict):
    """config.json of a network, as far as it is read here."""

    model_type: NotRequired[str]


class TextNetwork:
    """A frozen network that `transformers` knows; the features are its last hidden state.

    Args:
        path: a folder, a hub name, or a key of `NAMES`.
        length: the most tokens of a text, ends included; 0: as published.
    """

    kind: str
    length: int
    cleans = False  # captions, as PixArt does

    def __init__(self, place: str, length: int):
        self.place, self.length = place, length or self.length
        fetch(place, "text encoder")
        try:
            self.tokenizer, self.network = self._tokenizer(), self._network()
        except UsageError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise UsageError(f"cannot load the text encoder {place}: {brief(error)}") from None
        self.width = self.network.config.get_text_config().hidden_size
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "TextNetwork":
        self.device = torch.device(device)
        self.network.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, L, C), (N, L); on the network's device."""
        texts = [clean_caption(text) for text in texts] if self.cleans else list(texts)
        tokens = [self.tokens(text)[: self.length] for text in texts]
        mask = torch.arange(max(map(len, tokens))) < torch.tensor([[len(ids)] for ids in tokens])
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([number for row in tokens for number in row])
        ids, mask = ids.to(self.device), mask.to(self.device)
        parts = zip(ids.split(BATCH), mask.split(BATCH), strict=True)
        hidden = [self.network(input_ids=i, attention_mask=self._seen(m)).last_hidden_state.float() for i, m in parts]
        return torch.where(mask[..., None], torch.cat(hidden), 0.0), mask

    def record(self) -> dict:
        return {"name": self.place, "kind": self.kind, "length": self.length, "sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        return fingerprint(self.network)

    def tokens(self, text: str) -> list[int]:
        """Of a text, with its ends, not more than `length` but where `__call__` cuts them."""
        return self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]

    def _seen(self, mask: Tensor) -> Tensor | None:
        return mask.long()

    def _tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder("tokenizer", "tokenizer_config.json"))

    def _folder(self, name: str, filename: str) -> str:
        return os.path.dirname(file_of(self.place, filename, "text encoder", below=[name]))

    def _network(self):
        import transformers

        folder = self._folder("text_encoder", "config.json")
        return load_network(self._class(transformers), folder, "text encoder", dtype=torch.float32)


class T5(TextNetwork):
    """T5's encoder as PixArt has it: 120 tokens, captions cleaned."""

    kind, length, cleans = "t5", 120, True

    @staticmethod
    def _class(transformers):
        return transformers.T5EncoderModel


class CLIPText(TextNetwork):
    """CLIP's network of texts."""

    kind, length = "clip", 77

    @staticmethod
    def _class(transformers):
        return transformers.CLIPTextModel


class Causal(TextNetwork):
    """A language model behind its last norm, as Large-DiT-T2I has it: no token sees those behind it.

    Both ends are marked; a text that is too long loses its end, with the mark.
    """

    kind, length = "causal", 128

    def tokens(self, text: str) -> list[int]:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*([] if begin is None else [begin]), *ids, *([] if end is None else [end])]

    def _seen(self, mask: Tensor) -> None:
        return None

    @staticmethod
    def _class(transformers):
        return transformers.AutoModel


KINDS = {T5.kind: T5, CLIPText.kind: CLIPText, Causal.kind: Causal}


def open_network(name: str, length: int = 0) -> TextNetwork:
    """The encoder in a folder, or of a hub name.

    Raises:
        UsageError: there is none, it cannot be fetched, or it is of a kind that encodes no texts.
    """
    place = place_of(name, NAMES, "text encoder")
    path = Path(file_of(place, "config.json", "text encoder", below=["text_encoder"]))
    kind = read_record(path, Config).get("model_type", "model of unknown kind")
    return KINDS[kind_of(kind, path)](place, length)


def kind_of(model_type: str, path: Path) -> str:
    """A key of `KINDS`. Raises UsageError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    if model_type in ("t5", "clip", "clip_text_model"):
        return model_type.partition("_")[0]
    if model_type in causal:
        return Causal.kind
    raise UsageError(f"{path}: a {model_type} encodes no texts here; expected T5, CLIP or a causal language model")
