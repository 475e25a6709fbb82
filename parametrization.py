"""How a parameter is drawn and how fast it learns, by the role that its layer declares: a table of rules.

I what an output of a matrix adds up over · m I over what it is at the base width · D hidden width

"standard" is what DiT was published with: the same learning rate for all, chosen anew for every width. Under "mup", the
maximal update parametrization (arXiv 2203.03466, of diffusion transformers 2505.15270), every layer's output and its
change in a step keep their size as the width grows, so that a learning rate found on a narrow model is right for a wide
one. Adam's form of the rules; heads keep their size, so attention keeps its 1/sqrt(d).

    role         drawn with deviation    multiplier         learning rate
    input        I^-1/2                  1                  1
    table        1                       1                  1
    hidden       I^-1/2                  1                  1/m              modulations too: they do not begin at zero
    output       0                       output_mult / m    1
    router       1/I                     1                  1/m              reads the width, as the output does
    expert       I^-1/2                  1                  1/m              its share of tokens is that of any width
    vector       0, norms 1              1                  1

For experts of a width proportional to D (arXiv 2508.09752) that leaves each expert, shared ones too, a hidden matrix,
and the router an output whose multiplier moved into deviation and learning rate, which for Adam is the same function.
"mup-pixart" draws as PixArt-alpha does, whose modulations are tables N(0, 0.02), and learns by the same rules.
Weight decay is decoupled: learning rate times decay is the same for all that decays.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layers import (
    AdaptiveRMSNorm,
    CaptionEmbedder,
    CaptionSummary,
    CrossAttention,
    GatedReading,
    LabelEmbedder,
    PatchEmbed,
    QKNorm,
    RowEnds,
    SharedModulation,
    TableModulation,
    TimestepEmbedder,
    roles_of,
)
from moe import MoE
from routers import Router


class Rule(NamedTuple):
    """Of one role."""

    deviation: Callable[[int], float]  # of I
    learning_rate: Callable[[float], float]  # of m: the factor


RULES = {
    "input": Rule(lambda fan_in: fan_in**-0.5, lambda m: 1.0),
    "table": Rule(lambda fan_in: 1.0, lambda m: 1.0),
    "hidden": Rule(lambda fan_in: fan_in**-0.5, lambda m: 1 / m),
    "modulation": Rule(lambda fan_in: fan_in**-0.5, lambda m: 1 / m),
    "output": Rule(lambda fan_in: 0.0, lambda m: 1.0),
    "router": Rule(lambda fan_in: 1 / fan_in, lambda m: 1 / m),
    "expert": Rule(lambda fan_in: fan_in**-0.5, lambda m: 1 / m),
    "vector": Rule(lambda fan_in: 0.0, lambda m: 1.0),
}


class Parametrization(NamedTuple):
    """A way to draw and to train."""

    draw: Callable[[list[nn.Module], object], None]  # every parameter of a unit, on the CPU, for a configuration
    table_deviation: float  # of a label's embedding
    rules: dict[str, Rule] | None = None  # None: all learn alike, whatever their width
    lr: float = 1e-4  # where no flag says so


def is_mup(config) -> bool:
    """Whether widths are compared with a base."""
    return PARAMETRIZATIONS[config.parametrization].rules is not None


def readout_multiplier(config) -> float:
    """What the final projection's product is multiplied by."""
    if not is_mup(config):
        return 1.0
    return config.output_mult * config.base_width / config.hidden_size


def lr_factors(model: nn.Module) -> dict[str, float]:
    """What the learning rate of each parameter of a DiT is multiplied by, by name."""
    config, roles = model.config, roles_of(model)
    rules = PARAMETRIZATIONS[config.parametrization].rules
    if rules is None:
        return dict.fromkeys(roles, 1.0)
    with torch.device("meta"):
        base = dict(type(model)(config.at_width(config.base_width)).named_parameters())
    return {
        name: rules[roles[name]].learning_rate(fan_in(parameter, roles[name]) / fan_in(base[name], roles[name]))
        for name, parameter in model.named_parameters()
    }


def fan_in(parameter: Tensor, role: str) -> int:
    """I: the size of a row, of which a convolution's has three dimensions, and a matrix of stacked experts one."""
    return parameter.shape[-1] if role == "expert" or parameter.ndim < 2 else parameter[0].numel()


# ------------------------------------------------------------------------------------------------------ initial weights


def draw_published(unit: list[nn.Module], config) -> None:
    """Xavier-uniform linears; embeddings of labels, times, texts N(0, 0.02); modulations and the final linear zero."""
    modules = [module for part in unit for module in part.modules()]
    for module in modules:
        if isinstance(module, nn.Linear):
            for projection in module.weight.split(getattr(module, "drawn_apart", len(module.weight))):
                nn.init.xavier_uniform_(projection)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, DRAW_THEMSELVES):
            module.reset_parameters()
        elif isinstance(module, TableModulation):
            nn.init.normal_(module.table, std=TABLE_STD)
    for module in modules:
        if isinstance(module, CaptionEmbedder):
            nn.init.normal_(module.y_proj.fc1.weight, std=TABLE_STD)
            nn.init.normal_(module.y_proj.fc2.weight, std=TABLE_STD)
        elif isinstance(module, SharedModulation):
            nn.init.normal_(module[1].weight, std=TABLE_STD)
        elif isinstance(module, CaptionSummary):
            module.reset_parameters()
        elif isinstance(module, CrossAttention):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=TABLE_STD)
        elif isinstance(module, TimestepEmbedder):
            nn.init.normal_(module.mlp[0].weight, std=TABLE_STD)
            nn.init.normal_(module.mlp[2].weight, std=TABLE_STD)
        elif isinstance(module, MoE):
            module.init_weights()
        elif getattr(module, "roles", {}).get("weight") in ("modulation", "output"):
            nn.init.zeros_(module.weight)


def draw_pixart(unit: list[nn.Module], config) -> None:
    """As published for PixArt-alpha, and scaled as its muP does: what `draw_published` draws at the base width."""
    draw_published(unit, config)
    widths = (config.hidden_size / config.base_width) ** 0.5
    for module in (module for part in unit for module in part.modules()):
        if isinstance(module, PatchEmbed):
            weight = module.proj.weight
            bound = (6 / (weight[0].numel() + weight[0, 0].numel() * config.base_width)) ** 0.5
            nn.init.uniform_(weight, -bound, bound)
        elif isinstance(module, TimestepEmbedder):
            module.mlp[2].weight.div_(widths)
        elif isinstance(module, CaptionEmbedder):
            module.y_proj.fc2.weight.div_(widths)
        elif isinstance(module, SharedModulation):
            module[1].weight.div_(widths)


def draw_by_role(unit: list[nn.Module], config) -> None:
    """Normal, with the deviation of each role."""
    for part in unit:
        roles = roles_of(part)
        for name, parameter in part.named_parameters():
            deviation = RULES[roles[name]].deviation(fan_in(parameter, roles[name]))
            nn.init.normal_(parameter, std=deviation) if deviation else nn.init.zeros_(parameter)
        for module in part.modules():
            if isinstance(module, DRAW_THEMSELVES):
                module.reset_parameters()
            if isinstance(module, Router):
                module.reset_buffers()


DRAW_THEMSELVES = (QKNorm, AdaptiveRMSNorm, CaptionEmbedder, CaptionSummary, GatedReading, RowEnds)
TABLE_STD = 0.02  # as published
PARAMETRIZATIONS = {
    "standard": Parametrization(draw_published, TABLE_STD),
    "mup": Parametrization(draw_by_role, 1.0, RULES, lr=2.0**-10),
    "mup-pixart": Parametrization(draw_pixart, TABLE_STD, RULES, lr=2.0**-10),
}
