"""How samples of small images are judged, and how sure one may be of a difference."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.endless import Patterns, Scenes
from metrics import Judge, Moments, frechet_distance, pixel_features
from scripts.digits import Digits, split_digits


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(values: np.ndarray) -> Interval:
    """The mean and its 95 % percentile bootstrap interval.

    `values` are (S, N), what each of S seeds got on each of N images, or (S, 1), where a seed has one number. Seeds and
    images are both drawn with replacement. Of few seeds such an interval is too narrow.
    """
    seeds, images = (resampled(count, axis) for axis, count in enumerate(values.shape))
    means = ((seeds @ values.astype(float)) * images).sum(axis=1)
    return Interval(values.mean(), *np.quantile(means, [0.025, 0.975]))


@functools.cache
def resampled(count: int, seed: int, draws: int = 2000) -> np.ndarray:
    """(draws, count) the weight of each of `count` things in each draw of as many with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws) / count


class Scorer:
    """Judges samples of the labels 0, 1, ..., 9, 0, ... by the digits that no network has learned from."""

    def __init__(self):
        training, held_out = split_digits()
        images = as_rgb(held_out)
        self.judge, self.reference = Judge(images, held_out.labels), moments(images)
        self.real = as_rgb(training)  # what a perfect network would draw like

    def recognised(self, images: np.ndarray) -> np.ndarray:
        """(N,) bool"""
        return self.judge.recognises(images, np.arange(len(images)) % 10)

    def distance(self, images: np.ndarray) -> float:
        """Frechet distance of pixels in 0..1 to the held-out digits'."""
        return between(moments(images), self.reference)


class SceneScorer(Scorer):
    """The same of scenes: a cell is right if the judge takes it for the digit that the label asks for."""

    def __init__(self):
        super().__init__()
        training, held_out = split_digits()
        self.reference = moments(as_pixels(Scenes(held_out).tensors(2000)[0]))
        self.real = as_pixels(Scenes(training).tensors(2000)[0])

    def recognised(self, images: np.ndarray) -> np.ndarray:
        """(N,) share of the four cells."""
        labels = np.arange(len(images)) % 100
        a, b = labels // 10, labels % 10
        cells = images.reshape(len(images), 2, 8, 2, 8, 3).swapaxes(2, 3).reshape(-1, 8, 8, 3)
        wanted = np.stack([a, b, b, a], axis=1).flatten()
        return self.judge.recognises(cells, wanted).reshape(-1, 4).mean(axis=1)


class PatternScorer(Scorer):
    """The same of scenes of patterns: a cell is right if it is one of its label's, within a tenth of the range."""

    def __init__(self, count: int):
        data = Patterns(count)
        self.patterns = as_pixels(data.patterns.flatten(0, 1)).reshape(10, -1, 48).astype(np.float32)
        labels = torch.arange(2000) % 10
        self.real = as_pixels(data.filled(labels, torch.Generator().manual_seed(0)))
        others = as_pixels(data.filled(labels, torch.Generator().manual_seed(1)))
        self.references = [moments(each) for each in self.cells_by_label(others)]

    def recognised(self, images: np.ndarray) -> np.ndarray:
        """(N,) share of the sixteen cells."""
        found = np.empty((len(images), 16))
        for label, (cells, patterns) in enumerate(zip(self.cells_by_label(images), self.patterns, strict=True)):
            mine = cells.reshape(-1, 48).astype(np.float32)
            nearest = np.abs(mine[:, None] - patterns).mean(axis=2).min(axis=1)
            found[label::10] = (nearest < 0.1 * 255).reshape(-1, 16)
        return found.mean(axis=1)

    def distance(self, images: np.ndarray) -> float:
        """The mean over labels of the Frechet distance of cells' pixels."""
        cells = self.cells_by_label(images)
        return float(np.mean([between(moments(each), real) for each, real in zip(cells, self.references, strict=True)]))

    def cells_by_label(self, images: np.ndarray) -> list[np.ndarray]:
        """(n, 4, 4, 3) of each label."""
        cells = images.reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, 16, 4, 4, 3)
        return [cells[label::10].reshape(-1, 4, 4, 3) for label in range(10)]


def as_pixels(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in -1..1 -> (N, H, W, 3) uint8"""
    return (images * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def as_rgb(digits: Digits) -> np.ndarray:
    """(N, 8, 8, 3) uint8"""
    return np.repeat(digits.images[..., None], 3, axis=3)


def between(some: Moments, others: Moments) -> float:
    return frechet_distance(some.mean, some.covariance, others.mean, others.covariance)


def moments(images: np.ndarray) -> Moments:
    found = Moments()
    found.update(pixel_features(images))
    return found
