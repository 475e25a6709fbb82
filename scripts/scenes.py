"""Scenes of handwritten digits with captions: an endless real data set for networks that draw from texts.

A scene is a canvas of 16x16 pixels with four cells, of which one to four hold a digit. Its caption says which digit is
in which cell, in one of many phrasings. Some pairs of (digit, cell) never stand together in a training scene: prompts
that ask for them ask for something new.
"""

import itertools
from typing import NamedTuple

import numpy as np

from scripts.digits import Digits

CELLS = ("top left", "top right", "bottom left", "bottom right")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8  # of a digit
Layout = tuple[int | None, ...]  # the digit of each cell

ONE = (
    "{digit} at the {cell}",
    "in the {cell} corner there is {digit}",
    "the {cell} cell holds {digit}",
    "{cell}: {digit}",
)
BESIDE = (
    "{a} left of {b} at the {row}",
    "{b} to the right of {a}, both at the {row}",
    "at the {row}, {a} and then {b}",
)
ABOVE = ("{a} above {b} on the {column}", "{b} below {a}, both on the {column}", "on the {column}, {b} under {a}")


class Scene(NamedTuple):
    image: np.ndarray  # (16, 16) uint8
    caption: str
    layout: Layout


def is_new(layout: Layout) -> bool:
    """Whether a layout has two digits that no training scene has in these cells: one pair in ten."""
    there = [(cell, digit) for cell, digit in enumerate(layout) if digit is not None]
    return any(
        (17 * a + 5 * x + 31 * b + 3 * y + 7 * x * y) % 10 == 0 for (a, x), (b, y) in itertools.combinations(there, 2)
    )


def random_layout(rng: np.random.Generator, new: bool = False) -> Layout:
    """Of one to four digits, or, `new`, of two that no training scene has there."""
    while True:
        count = 2 if new else rng.choice(4, p=(0.2, 0.4, 0.2, 0.2)) + 1
        cells = rng.permutation(4)[:count]
        layout = tuple(int(rng.integers(10)) if cell in cells else None for cell in range(4))
        if is_new(layout) == new:
            return layout


def caption(layout: Layout, rng: np.random.Generator) -> str:
    """What a layout is, in words; cells in any order, two digits of a row or column perhaps as a pair."""

    def digit(cell: int) -> str:
        value = layout[cell]
        return f"{'an' if value == 8 else 'a'} {NAMES[value]}"

    def of(phrases: tuple[str, ...], **parts) -> str:
        return phrases[rng.integers(len(phrases))].format(**parts)

    there = [cell for cell in range(4) if layout[cell] is not None]
    if len(there) == 2 and rng.random() < 0.5:
        a, b = there
        if b - a == 1 and a % 2 == 0:
            return of(BESIDE, a=digit(a), b=digit(b), row=("top", "bottom")[a // 2])
        if b - a == 2:
            return of(ABOVE, a=digit(a), b=digit(b), column=("left", "right")[a % 2])
    rng.shuffle(there)
    joint = (", ", " and ", "; ")[rng.integers(3)]
    return joint.join(of(ONE, digit=digit(cell), cell=CELLS[cell]) for cell in there)


def compose(digits: Digits, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """(16, 16) uint8 with some digit of each kind in its cell."""
    canvas = np.zeros((2 * SIDE, 2 * SIDE), dtype=np.uint8)
    for cell, value in enumerate(layout):
        if value is not None:
            top, left = SIDE * (cell // 2), SIDE * (cell % 2)
            canvas[top : top + SIDE, left : left + SIDE] = rng.choice(digits.images[digits.labels == value])
    return canvas


def scene(digits: Digits, seed: int, index: int, new: bool = False) -> Scene:
    """Number `index` of the endless scenes of a seed."""
    rng = np.random.default_rng([seed, index, int(new)])
    layout = random_layout(rng, new)
    return Scene(compose(digits, layout, rng), caption(layout, rng), layout)


INK = 10  # mean value of a cell from which on it is not empty


def read_cells(images: np.ndarray, layouts: list[Layout], recognises) -> tuple[np.ndarray, np.ndarray]:
    """Whether each cell of images (N, 16, 16, 3) that should hold a digit holds that one, and each other one nothing.

    Args:
        recognises: of (M, 8, 8, 3) and labels (M,), as `metrics.Judge`.
    """
    cells = images.reshape(-1, 2, SIDE, 2, SIDE, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, 3)
    wanted = np.array([-1 if value is None else value for layout in layouts for value in layout])
    inked, asked = cells.mean(axis=(1, 2, 3)) >= INK, wanted >= 0
    return inked[asked] & recognises(cells[asked], wanted[asked]), ~inked[~asked]
