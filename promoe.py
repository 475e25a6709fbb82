"""ProMoE: prototypes with an expert for unconditional images; its sizes, and the names in its files.

Every other block is a mixture of 12 experts of twice the width and a shared one. The files do not say whether tokens or
centres choose (`--router prototypes-expert-choice`).
"""

import re

import dit
from names import NameMap, rule

COMMON = {
    **{"patch_size": 2, "num_experts": 12, "num_experts_per_tok": 1, "expert_ratio": 2.0, "num_shared_experts": 1},
    **{"shared_expert_ratio": 2.0, "expert_mlp": "gelu", "shared_mlp": "gelu", "moe_layers": "every-2"},
    "router": "prototypes",
}
ROWS = {f"ProMoE-{size}/2": dit.size_of(size) | COMMON for size in ("S", "B", "L", "XL")}
TRAINING = {"rf": True, "time_scale": 1000.0}  # flags of train.py whose defaults are others
OBJECTIVE = {"name": "rf", "time_scale": 1000.0}
# Of its files, where flags say nothing else.
KNOWN = {"router": "prototypes", "num_experts_per_tok": 1, "num_shared_experts": 1}
MARK = re.compile(r"blocks\.\d+\.mlp\.cluster_centers")

NAMES = NameMap(
    rule("blocks.{b}.moe.gate.weight", "blocks.{b}.mlp.cluster_centers"),
    rule("blocks.{b}.moe.experts.fc1_{w}", "blocks.{b}.mlp.experts.{e}.up_proj.{w}"),
    rule("blocks.{b}.moe.experts.fc2_{w}", "blocks.{b}.mlp.experts.{e}.down_proj.{w}"),
    rule("blocks.{b}.moe.shared_experts.fc1.{w}", "blocks.{b}.mlp.shared_expert.up_proj.{w}"),
    rule("blocks.{b}.moe.shared_experts.fc2.{w}", "blocks.{b}.mlp.shared_expert.down_proj.{w}"),
)


def spells(config) -> bool:
    """Whether a model has nothing that these names have no word for."""
    parts = (config.expert_mlp, config.mlp, config.positions, config.norm)
    return (
        config.num_experts > 0
        and config.router.startswith("prototypes")
        and parts == ("gelu", "gelu", "sincos", "layer")
        and not config.caption_width
        and (config.shared_mlp == "gelu" or not config.num_shared_experts)
    )
