"""Who took which patch, as colours: one for each expert, over an image, and as bars of their load.

N images · P patches · E experts
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np

FEW = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f"]
NOBODY = "#eceff2"  # a patch that no expert took


def expert_colours(count: int) -> list[str]:
    """As `#rrggbb`; the golden angle keeps those of neighbours apart."""
    if count <= len(FEW):
        return FEW[:count]
    places = ((expert * 137.508 % 360 / 360, (0.48, 0.64, 0.36)[expert % 3]) for expert in range(count))
    return ["#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in colorsys.hls_to_rgb(*p, 0.68))) for p in places]


def coloured(images: np.ndarray, experts: np.ndarray, count: int) -> np.ndarray:
    """Images in grey, under the colour of each patch's expert.

    Args:
        images: (N, H, W, 3) uint8.
        experts: (N, P) 1 + the expert of each patch, row by row; 0: none.
        count: E, which decides about the colours.

    Returns:
        (N, H, W, 3) uint8
    """
    palette = np.array([_rgb(colour) for colour in (NOBODY, *expert_colours(count))])  # (1+E, 3)
    side, (height, width) = math.isqrt(experts.shape[1]), images.shape[1:3]
    places = experts.reshape(-1, side, side)
    colours = palette[places].repeat(height // side, axis=1).repeat(width // side, axis=2)  # (N, H, W, 3)
    grey = 255 - 0.7 * (255 - images @ np.array([0.299, 0.587, 0.114]))
    return (0.7 * colours + 0.3 * grey[..., None]).round().astype(np.uint8)


def _rgb(colour: str) -> list[int]:
    return list(bytes.fromhex(colour[1:]))


def load_bars(counts: Sequence[int], tokens: int, top_k: int) -> str:
    """HTML: a bar for each expert, as long as its share of the tokens; the line in it is an even share, K/E.

    Args:
        counts: (E,) assignments.
        tokens: how many tokens were there.
    """
    even, shares = top_k / len(counts), [count / max(tokens, 1) for count in counts]
    longest = max(*shares, 2 * even)
    rows = [
        f'<div class="load" title="expert {expert}: {count} of {tokens} tokens"><span>{expert}</span>'
        f'<div><i style="width:{100 * share / longest:.1f}%;background:{colour}"></i>'
        f'<b style="left:{100 * even / longest:.1f}%"></b></div><span>{100 * share:.0f} %</span></div>'
        for expert, (count, share, colour) in enumerate(zip(counts, shares, expert_colours(len(counts)), strict=True))
    ]
    return f'<div class="loads">{"".join(rows)}</div>'
