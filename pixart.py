"""PixArt-alpha and PixArt-alpha-muP, from texts: their sizes, and the names in their files."""

import re

from names import NameMap, rule

COMMON = {"depth": 28, "patch_size": 2, "caption_width": 4096, "caption_length": 120, "modulation": "single"}
ROWS = {
    "PixArt-XL/2": dict(hidden_size=1152, num_heads=16, **COMMON),
    "PixArt-XL/2-1024-MS": dict(hidden_size=1152, num_heads=16, **COMMON, size_condition=True, position_scaling=2.0),
    **{
        f"PixArt-muP-{heads}h/2": dict(
            hidden_size=72 * heads, num_heads=heads, **COMMON, parametrization="mup-pixart", base_width=288
        )
        for heads in (2, 4, 8, 16)
    },
}
TRAINING = {  # flags of train.py whose defaults are others
    **{"weight_decay": 0.03, "decay_all": True, "adam_eps": 1e-10, "grad_clip": 0.01, "warmup_steps": 1000},
}
TEXTS = {"modulation": "single"}
MARK = re.compile(r"blocks\.0\.scale_shift_table")

NAMES = NameMap(
    rule("blocks.{b}.adaLN_modulation.table", "blocks.{b}.scale_shift_table"),
    rule("final_layer.adaLN_modulation.table", "final_layer.scale_shift_table"),
)


def spells(config) -> bool:
    """Whether a model has nothing that these names have no word for."""
    return config.modulation == "single" and not config.num_experts
