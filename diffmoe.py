"""DiffMoE, whose experts choose from a batch, and EC-DiT, whose experts choose from an image: sizes, names in files."""

import re

import dit
from names import NameMap, rule

COMMON = {
    **{"patch_size": 2, "num_experts_per_tok": 1, "num_shared_experts": 0, "expert_mlp": "gelu"},
    **{"moe_layers": "every-2", "expert_ratio": 4.0},
}
EXPERTS = {"S": 16, "B": 8, "L": 8, "XL": 8}  # as published
ROWS = {
    f"DiffMoE-{name}/2": dit.size_of(name) | COMMON | {"router": "batch-pool", "num_experts": experts}
    for name, experts in EXPERTS.items()
}
ROWS |= {"EC-DiT-L/2": dit.size_of("L") | COMMON | {"router": "expert-choice", "num_experts": 8}}
TRAINING = {"rf": True, "time_scale": 1000.0}  # flags of train.py whose defaults are others
OBJECTIVE = {"name": "rf", "time_scale": 1000.0}


def KNOWN(names: list[str]) -> dict:
    """Files without a predictor are EC-DiT's."""
    pooled = any(".capacity_predictor." in name for name in names)
    return {"router": "batch-pool" if pooled else "expert-choice", "num_experts_per_tok": 1}


MARK = re.compile(r"blocks\.\d+\.mlp\.gate_weight")

NAMES = NameMap(
    rule("blocks.{b}.moe.gate.weight", "blocks.{b}.mlp.gate_weight"),
    rule("blocks.{b}.moe.gate.capacity_predictor.0.{w}", "blocks.{b}.mlp.capacity_predictor.0.{w}"),
    rule("blocks.{b}.moe.gate.capacity_predictor.2.{w}", "blocks.{b}.mlp.capacity_predictor.2.{w}"),
    rule("blocks.{b}.moe.gate.expert_threshold", "blocks.{b}.mlp.expert_threshold"),
    rule("blocks.{b}.moe.gate.ema_decay", "blocks.{b}.mlp.ema_decay"),
    rule("blocks.{b}.moe.experts.fc1_{w}", "blocks.{b}.mlp.experts.{e}.fc1.{w}"),
    rule("blocks.{b}.moe.experts.fc2_{w}", "blocks.{b}.mlp.experts.{e}.fc2.{w}"),
)


def spells(config) -> bool:
    """Whether a model has nothing that these names have no word for."""
    parts = (config.expert_mlp, config.mlp, config.positions, config.norm, config.num_shared_experts)
    return (
        config.num_experts > 0
        and config.router in ("batch-pool", "expert-choice")
        and parts == ("gelu", "gelu", "sincos", "layer", 0)
        and not config.caption_width
    )
