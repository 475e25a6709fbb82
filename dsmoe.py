"""DSMoE: DeepSeek's router (sigmoid scores, groups, a bias that follows the load), a shared expert; sizes, names."""

import re

from names import NameMap, rule

SIZES = {  # depth, hidden size, heads, width of an expert over that
    "S": (10, 384, 6, 2.0),
    "B": (10, 768, 12, 2.0),
    "L": (20, 1024, 16, 2.0),
    "3B": (30, 1152, 16, 2.5),
}
COMMON = {
    "num_experts": 16,
    **{"patch_size": 2, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_layers": "every-2", "mlp": "silu"},
    **{"router": "sigmoid", "router_bias": True, "router_groups": 2, "router_kept_groups": 2, "norm_topk_prob": True},
    **{"routed_scaling_factor": 2.0, "positions": "rope2d-half"},
}
TRAINING = {"rf": True, "time_scale": 1000.0}  # flags of train.py whose defaults are others
OBJECTIVE = {"name": "rf", "time_scale": 1000.0}
FACTS = ("router", "router_groups", "router_kept_groups", "norm_topk_prob", "routed_scaling_factor", "positions", "mlp")
# Of its files, where flags say nothing else.
KNOWN = {name: COMMON[name] for name in (*FACTS, "num_experts_per_tok", "num_shared_experts")}
MARK = re.compile(r"blocks\.\d+\.mlp\.gate\.e_score_correction_bias")

NAMES = NameMap(
    rule("blocks.{b}.moe.gate.weight", "blocks.{b}.mlp.gate.weight"),
    rule("blocks.{b}.moe.gate.bias", "blocks.{b}.mlp.gate.e_score_correction_bias"),
    rule(
        "blocks.{b}.moe.experts.gate_up_proj",
        *(f"blocks.{{b}}.mlp.experts.blocks.{{e}}.{kind}_proj.weight" for kind in ("gate", "up")),
    ),
    rule("blocks.{b}.moe.experts.down_proj", "blocks.{b}.mlp.experts.blocks.{e}.down_proj.weight"),
    rule(
        "blocks.{b}.moe.shared_experts.gate_up_proj.weight",
        *(f"blocks.{{b}}.mlp.shared_experts.{kind}_proj.weight" for kind in ("gate", "up")),
    ),
    rule("blocks.{b}.moe.shared_experts.down_proj.weight", "blocks.{b}.mlp.shared_experts.down_proj.weight"),
)
ROWS = {
    f"DSMoE-{size}/2": COMMON
    | {"depth": depth, "hidden_size": width, "num_heads": heads, "expert_ratio": ratio, "shared_expert_ratio": ratio}
    for size, (depth, width, heads, ratio) in SIZES.items()
}


def spells(config) -> bool:
    """Whether a model has nothing that these names have no word for."""
    parts = (config.expert_mlp, config.mlp, config.positions, config.norm, config.shared_mlp, config.router_bias)
    return (
        config.num_experts > 0
        and config.router == "sigmoid"
        and parts == ("swiglu", "silu", "rope2d-half", "layer", "swiglu", True)
        and not config.caption_width
    )
