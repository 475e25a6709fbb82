"""What an image is of: the condition of a network, its null, and how both are dropped, batched, asked for and named.

N images

A *kind* of condition (`Classes`, `Captions`) knows what may be asked for; a *request* is what one image is asked to be
of, as files and flags hold it (a label, a text); a *batch* of conditions is what the network takes: a tensor, or a
NamedTuple of tensors whose first dimension is N, so that engines, compilers and CUDA graphs pass it on unchanged. The
loop, samplers and evaluations call the verbs of a kind, and know no more of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cli import UsageError, unknown_name, warn_once
from diffusion.guidance import of_one_size


@dataclass(frozen=True)
class Classes:
    """Labels 0 .. count - 1, of which the data named the first ones; a batch is (N,) int64.

    A published file names none: then all were trained.
    """

    count: int  # without the null class
    names: tuple[str, ...] = ()
    dropout: float = 0.0  # share of labels that training replaces by the null class; 0: there is none

    # ------------------------------------------------------------------------------------------------- of the network

    @property
    def null(self) -> int | None:
        """The label that means "no class"."""
        return self.count if self.dropout > 0 else None

    @property
    def rows(self) -> int:
        """Of the table of embeddings."""
        return self.count + (self.null is not None)

    def drop(self, batch: Tensor, u: Tensor) -> Tensor:
        """The batch with its null where the samples' random numbers u (N,), uniform in [0, 1), say so."""
        return batch if self.null is None else torch.where(u < self.dropout, self.null, batch)

    def batch(self, requests: Sequence[int], device: torch.device) -> Tensor:
        return torch.tensor(requests, device=device)

    def of_samples(self, batch: dict[str, Tensor], data) -> Tensor:
        """What a batch of samples of a data set, on the device, is of."""
        return batch["y"]

    def blank(self, device: torch.device | str) -> Tensor:
        """A batch of one that no image is of."""
        return torch.zeros(1, dtype=torch.int64, device=device)

    def null_of(self, batch: Tensor) -> Tensor | None:
        """As many nulls as a batch has conditions; None where the network has none."""
        return None if self.null is None else torch.full_like(batch, self.null)

    # ------------------------------------------------------------------------------------------------------ of requests

    @cached_property
    def trained(self) -> range:
        """The labels that the training data had."""
        return range(min(len(self.names), self.count) or self.count)

    def check(self, requests: Sequence[int]) -> None:
        """Raises UsageError for a label that the model does not know."""
        if wrong := [label for label in requests if not 0 <= label < self.count]:
            raise UsageError(f"class label {wrong[0]} is not one of the model's classes 0..{self.count - 1}")

    def requests(self, count: int, seed: int, how: str = "random") -> list[int]:
        """As many, chosen as a key of `CHOICES` says."""
        return CHOICES[how](self, count, seed)

    def spread(self, count: int) -> list[int]:
        """A few for a grid: all that were trained, or some far from each other."""
        known = len(self.trained)
        return [i * known // count if known > count else i % known for i in range(count)]

    def parse(self, texts: Sequence[str], say: Callable[[str], None] = warn_once) -> list[int]:
        """The labels that numbers or names stand for; says which of them the training data did not have.

        Raises:
            UsageError: the model does not know one.
        """
        labels = [self.label(text) for text in texts]
        if untrained := self.untrained(labels):
            known = f"0..{self.trained[-1]}"
            say(f"class {untrained[0]} was not in the training data, which had classes {known}: expect noise")
        return labels

    def name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)

    def label(self, text: str) -> int:
        """The label that a number or a name stands for; digits are always a number.

        Raises:
            UsageError: there is none.
        """
        if text.isdecimal():
            if int(text) >= self.count:
                raise UsageError(f"class label {text} is not one of the model's classes 0..{self.count - 1}")
            return int(text)
        if text not in self.names:
            if not self.names:
                raise UsageError(f"class label {text!r}: the file names no classes; give numbers 0..{self.count - 1}")
            raise unknown_name("class", text, self.names)
        return self.names.index(text)

    def untrained(self, labels: Sequence[int]) -> list[int]:
        """Those of `labels` that the training data did not have, each once."""
        return sorted({label for label in labels if label not in self.trained})


class Prompts(NamedTuple):
    """A batch of captions as the network takes it; (features, mask) alone will do."""

    features: Tensor  # (N, L, C) of the tokens of each text
    mask: Tensor  # (N, L) bool, which there are
    null: Tensor | None = None  # (N,) bool, whose features the network replaces by those of its null caption


@dataclass(frozen=True)
class Captions:
    """Texts; `encode` makes features of them, and a batch is a `Prompts`.

    What stands for no text is `nothing`, itself a text, such as the empty one; or the network's own null caption, which
    is, as published, as long as the caption whose place it takes.
    """

    width: int  # C
    length: int  # tokens of a text, at most
    dropout: float = 0.0
    nothing: str | None = None  # None: the network's null caption
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None = None  # -> (N, L, C), (N, L) bool
    known: tuple[str, ...] = ()  # some texts of the training data, for what draws without being asked

    # ------------------------------------------------------------------------------------------------- of the network

    @property
    def null(self) -> bool | None:
        """Whether there is a null caption: True, or None."""
        return True if self.dropout > 0 else None

    def drop(self, batch: Prompts, u: Tensor) -> Prompts:
        if self.null is None:
            return batch
        dropped = u < self.dropout
        if self.nothing is None:
            return batch._replace(null=dropped)
        pairs = (of_one_size(*pair) for pair in zip(batch, self.null_of(batch), strict=True))
        return Prompts(*(torch.where(_beside(dropped, there), nothing, there) for there, nothing in pairs))

    def batch(self, requests: Sequence[str], device: torch.device) -> Prompts:
        if self.encode is None:
            raise UsageError("this model is of texts, and no text encoder is given: --text-encoder")
        features, mask = self.encode(requests)
        return Prompts(features.to(device), mask.to(device), torch.zeros(len(mask), dtype=torch.bool, device=device))

    def of_samples(self, batch: dict[str, Tensor], data) -> Prompts:
        if "text" in batch:
            return Prompts(batch["text"], batch["text_mask"], torch.zeros_like(batch["text_mask"][:, 0]))
        return self.batch([data.caption(number) for number in batch["y"].tolist()], batch["y"].device)

    def blank(self, device: torch.device | str) -> Prompts:
        features = torch.zeros(1, 1, self.width, device=device)
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        return Prompts(features, mask, torch.zeros(1, dtype=torch.bool, device=device))

    def null_of(self, batch: Prompts) -> Prompts | None:
        if self.null is None:
            return None
        if self.nothing is None:
            return batch._replace(null=torch.ones_like(batch.null))
        count, device = len(batch.mask), batch.mask.device
        return Prompts(*(each.to(device).expand(count, *each.shape[1:]) for each in self._of_nothing))

    @cached_property
    def _of_nothing(self) -> Prompts:
        return self.batch([self.nothing], torch.device("cpu"))

    # ------------------------------------------------------------------------------------------------------ of requests

    def check(self, requests: Sequence[str]) -> None:
        """Raises UsageError for what is no text."""
        if wrong := [request for request in requests if not isinstance(request, str)]:
            raise UsageError(f"this model is of texts, not of classes: a prompt is expected, got {wrong[0]!r}")

    def requests(self, count: int, seed: int, how: str = "random") -> list[str]:
        """As many of the texts that are known, in turn."""
        if not self.known:
            raise UsageError("this model is of texts: give prompts")
        return [self.known[index % len(self.known)] for index in range(count)]

    def spread(self, count: int) -> list[str]:
        return self.requests(count, 0)

    def name(self, request: str) -> str:
        return request


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...), for `torch.where` over values (N, ...)."""
    return flags.view(-1, *[1] * (values.ndim - 1))


def random_labels(classes: Classes, count: int, seed: int) -> list[int]:
    """Uniform over the trained classes; that of image i depends on (seed, i) alone.

    The 2 sets its generator apart from the noise's.
    """
    draws = (np.random.default_rng([seed, index, 0, 2]).integers(len(classes.trained)) for index in range(count))
    return [classes.trained[int(draw)] for draw in draws]


def balanced_labels(classes: Classes, count: int, seed: int) -> list[int]:
    """The trained classes in turn."""
    return [classes.trained[index % len(classes.trained)] for index in range(count)]


CHOICES = {"random": random_labels, "balanced": balanced_labels}  # of requests
