"""Texts as a network reads them: encoders, each by its library, behind one small interface.

N texts · L tokens · C width of a token's features

An encoder is called with texts and gives features (N, L, C) fp32 and a mask (N, L) bool of the tokens that there are,
padded to the longest text of the batch; `width` is C, `length` the most tokens of a text, `record()` what checkpoints
say of it. The same text always gives the same features, whatever else is in the batch, to rounding.
"""

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import text_networks
from cli import UsageError, positive_int, unknown_name


class TextEncoder(Protocol):
    """What makes features of texts."""

    width: int
    length: int

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, L, C), (N, L)"""

    def record(self) -> dict: ...

    def to(self, device: torch.device) -> "TextEncoder":
        """The encoder, from now on on a device."""


class Words:
    """No weights: each word is a sum of fixed random vectors, one for itself and one for each neighbour at its place.

    So a token says what stands where around it, which a network of images has no other way to know. Case and
    punctuation are nothing; a text has a token for its end, so that the empty one has a token too.
    """

    name = "words"
    reach = 3  # how far a neighbour may stand

    def __init__(self, width: int = 128, length: int = 0):
        self.width, self.length = width, length or 40
        self._known = functools.lru_cache(maxsize=20_000)(self._features)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return padded([self._known(text) for text in texts])

    def record(self) -> dict:
        return {"name": self.name, "width": self.width, "length": self.length}

    def to(self, device: torch.device) -> "Words":
        return self

    def _features(self, text: str) -> Tensor:
        """(L, C)"""
        words = [*re.findall(r"\w+", text.lower())[: self.length - 1], "</s>"]
        features = np.zeros((len(words), self.width), dtype=np.float32)
        for offset in range(-self.reach, self.reach + 1):  # token i gets what stands at i + offset
            there = words[max(0, offset) : len(words) + min(0, offset)]
            rows = slice(max(0, -offset), max(0, -offset) + len(there))
            if there:
                features[rows] += np.stack([vector(word, offset, self.width) for word in there])
        return torch.from_numpy(features / (2 * self.reach + 1) ** 0.5)


@functools.lru_cache(maxsize=100_000)
def vector(word: str, offset: int, width: int) -> np.ndarray:
    """(C,) standard normal, of a word at a place beside another one."""
    seed = hashlib.sha256(f"{offset} {word}".encode(errors="backslashreplace")).digest()
    return np.random.default_rng(np.frombuffer(seed, dtype=np.uint32)).standard_normal(width, dtype=np.float32)


ENCODERS = (Words.name, *text_networks.NAMES)


def open_encoder(name: str, length: int = 0, **recorded) -> TextEncoder:
    """What `--text-encoder` names, or the `record()` of one says, on the CPU.

    Args:
        length: the most tokens of a text; 0: as many as is usual for it.
        recorded: what else a record has; a network must be the same one.

    Raises:
        UsageError: there is no such encoder, or it is another one.
    """
    if name == Words.name:
        return Words(length=length, **recorded)
    if "/" not in name and name not in ENCODERS and not os.path.exists(name):
        raise unknown_name("text encoder", name, ENCODERS)
    encoder = text_networks.open_network(name, length)
    if recorded and recorded != (now := {key: encoder.record()[key] for key in recorded}):
        was = next(key for key in recorded if recorded[key] != now[key])
        raise UsageError(f"the text encoder {name} has {was} {now[was]}, that of the training {recorded[was]}")
    return encoder


def add_encoder_arguments(group, help: str) -> None:
    group.add_argument(
        *("--text-encoder", "--lm"), metavar="NAME", help=f"{help}: {', '.join(ENCODERS)}, a folder or a hub name"
    )
    group.add_argument(
        *("--max-text-tokens", "--model-max-length"),
        type=positive_int,
        metavar="N",
        help="tokens of a text at most (t5 120, clip 77, llama 128, words 40)",
    )
    group.add_argument("--tokenizer-path", metavar="NAME", help="the same as --lm, as in published commands")


def encoder_of(args) -> TextEncoder:
    """That of the flags above, whose `--text-encoder` is given.

    Raises:
        UsageError: there is no such encoder, or its tokenizer is to be another one.
    """
    check_tokenizer(args)
    return open_encoder(args.text_encoder, args.max_text_tokens or 0)


def check_tokenizer(args) -> None:
    """Raises UsageError where `--tokenizer-path` names another place than the encoder's."""
    if args.tokenizer_path not in (None, args.text_encoder):
        raise UsageError(f"--tokenizer-path {args.tokenizer_path}: the tokenizer is that beside --lm; put it there")


def padded(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (L_n, C) of several lengths in one batch, and its mask."""
    mask = torch.zeros(len(features), max(map(len, features)), dtype=torch.bool)
    batch = features[0].new_zeros(*mask.shape, features[0].shape[1])
    for row, each in enumerate(features):
        batch[row, : len(each)] = each
        mask[row, : len(each)] = True
    return batch, mask
