"""Small images without end, for experiments in which no epoch repeats."""

import torch
from torch import Tensor

from scripts.digits import Digits


class Endless:
    """A data set of which nothing comes twice."""

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """(count, 3, 16, 16) in -1..1, (count,)"""
        raise NotImplementedError

    def tensors(self, count: int = 900) -> tuple[Tensor, Tensor]:
        """Some of it, always the same."""
        return self.draw(torch.Generator().manual_seed(0), count)


class Scenes(Endless):
    """Four digits on a canvas of 16x16, a b above b a, each written by whoever; label 10 a + b."""

    def __init__(self, digits: Digits):
        self.images = torch.from_numpy(digits.images).float() / 127.5 - 1  # (N, 8, 8)
        order = torch.from_numpy(digits.labels).argsort(stable=True)
        self.counts = torch.bincount(torch.from_numpy(digits.labels), minlength=10)
        self.first, self.order = self.counts.cumsum(0) - self.counts, order  # of each digit

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(100, (count,), generator=generator)
        a, b = labels // 10, labels % 10
        cells = torch.stack([a, b, b, a], dim=1)  # (count, 4)
        place = (torch.rand(cells.shape, generator=generator) * self.counts[cells]).long()
        digits = self.images[self.order[self.first[cells] + place]].unflatten(1, (2, 2))  # (count, 2, 2, 8, 8)
        return digits.transpose(2, 3).reshape(count, 1, 16, 16).expand(-1, 3, -1, -1), labels


class Patterns(Endless):
    """What has to be learned by heart: each of 16 cells of 4x4 pixels is one of the patterns of the label, of 10.

    A pattern is 48 values of -1 or 1 by chance, always the same ones: 47 of them say nothing of the last.
    """

    def __init__(self, count: int):
        """`count` patterns in all, a multiple of 10."""
        if count % 10:
            raise ValueError(f"{count} patterns cannot be dealt out to 10 labels: a multiple of 10")
        values = torch.randint(2, (10, count // 10, 3, 4, 4), generator=torch.Generator().manual_seed(0))
        self.patterns = values.float() * 2 - 1  # (labels, patterns of a label, 3, 4, 4)

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        return self.filled(labels, generator), labels

    def filled(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Scenes of these labels."""
        chosen = torch.randint(self.patterns.shape[1], (len(labels), 4, 4), generator=generator)
        cells = self.patterns[labels[:, None, None], chosen]  # (N, rows, columns, 3, 4, 4)
        return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 16, 16)
