"""What a diffusion transformer is made of, as one record: stored in every checkpoint, said by flags, read off files.

D hidden width · h heads · d = D/h
"""

import argparse
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import NotRequired, get_type_hints

from typing_extensions import TypedDict

from cli import Parser, UsageError, boolean, natural_int, number_in, positive_int, power_of_two, unknown_name
from conditions import Captions, Classes
from families import DiT_models, fact, family_of_row
from layers import MLPS, MODULATIONS, MOST_POSITIONS, NORMS, POSITIONS, QK_NORMS, READINGS, sequence_length
from moe import EXPERTS, SHARED_EXPERTS, ExpertsConfig
from parametrization import PARAMETRIZATIONS, is_mup
from records import check_record
from routers import ROUTERS, RouterConfig, TokenChoice

# ------------------------------------------------------------------------------------------------------- configuration

LIMITS = {  # what a configuration may ask for, so that a broken file builds no model of a million blocks
    "depth": (1, 1000),
    "hidden_size": (8, 2**16),
    "patch_size": (1, 1024),
    "num_heads": (1, 1024),
    "input_size": (1, 2**14),
    "in_channels": (1, 1024),
    "num_classes": (1, 10**7),
    "mlp_ratio": (0.001, 1000),
    "num_experts": (0, 2**15 - 1),  # 0: dense
    "num_experts_per_tok": (1, 2**15 - 1),
    "expert_ratio": (0.001, 1000),
    "num_shared_experts": (0, 1024),
    "shared_expert_ratio": (0.001, 1000),
    "router_groups": (1, 2**15 - 1),
    "router_kept_groups": (1, 2**15 - 1),
    "num_kv_heads": (0, 1024),  # 0: as many as heads
    "condition_width": (0, 2**16),  # 0: the hidden size
    "mlp_multiple": (1, 2**16),
    "base_width": (0, 2**16),
    "caption_width": (0, 2**16),
    "caption_length": (0, 2**14),
    "output_mult": (2.0**-30, 2.0**30),
    "position_scaling": (1e-3, 1e3),
}
CHOICES = {
    **{"norm": NORMS, "positions": POSITIONS, "mlp": MLPS, "qk_norm": QK_NORMS, "expert_mlp": EXPERTS},
    "parametrization": PARAMETRIZATIONS,
    "modulation": MODULATIONS,
    "reading": READINGS,
    "router": ROUTERS,
    "shared_mlp": SHARED_EXPERTS,
}


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides a model's function and parameters; stored in every checkpoint."""

    depth: int
    hidden_size: int
    patch_size: int
    num_heads: int
    input_size: int = 32  # side of the latent: image size / 8 with the usual autoencoder
    in_channels: int = 4
    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # share of labels replaced by the null class; 0: the model has no null class
    condition_width: int = 0  # of time and class, which modulate the blocks; 0: D
    caption_width: int = 0  # of the features of a text's tokens; 0: the network is conditioned on classes
    caption_length: int = 0  # tokens of a text, at most
    reading: str = "cross"  # how blocks read texts: one of layers.READINGS; "gated": the condition has them too
    size_condition: bool = False  # the condition has the image's height, width and ratio, of 8 pixels for a latent's
    modulation: str = "block"  # how time and class modulate the blocks: one of layers.MODULATIONS
    norm: str = "layer"  # before attention and MLP: a key of layers.NORMS
    positions: str = "sincos"  # a key of layers.POSITIONS
    position_scaling: float = 1.0  # what positions are divided by
    row_ends: bool = False  # a token behind each row of patches, and room for images of other proportions
    num_kv_heads: int = 0  # heads of keys and values; 0: as many as of queries
    attention_bias: bool = True
    qk_norm: str = (
        "none"  # LayerNorm of query and key: one of layers.QK_NORMS. True stands for "head", False for "none"
    )
    mlp: str = "gelu"  # a key of layers.MLPS
    mlp_ratio: float = 4.0  # width of the dense MLP over D; of SwiGLU two thirds of that, rounded up
    mlp_multiple: int = 256  # to a multiple of this
    learn_sigma: bool = True  # 2C output channels: the second half is the variance of DDPM
    num_experts: int = 0  # 0: the dense DiT
    num_experts_per_tok: int = 2
    expert_mlp: str = "swiglu"  # kind of the routed experts; "gelu": that of the dense MLP, with biases
    expert_ratio: float = 4.0  # width of a routed expert over D
    num_shared_experts: int = 2
    shared_expert_ratio: float = 1.0  # width of one shared expert over D
    shared_mlp: str = "swiglu"  # kind of the shared expert, a key of moe.SHARED_EXPERTS
    router: str = "softmax"  # a key of routers.ROUTERS; where experts choose, K is how many each token gets on average
    router_groups: int = 1  # of experts, of which a token sees the best
    router_kept_groups: int = 1  # so many of them
    router_bias: bool = False  # the choice has a bias for each expert, which follows the load
    norm_topk_prob: bool = False  # divide the K routing weights by their sum
    routed_scaling_factor: float = 1.0  # then multiply them by this
    moe_layers: str = "all"  # which blocks are MoE: all, odd, every-N, deep-half, shallow-half, or a list such as 0,2,5
    parametrization: str = "standard"  # a key of parametrization.PARAMETRIZATIONS
    base_width: int = 0  # of muP: D of the model whose learning rate is tuned; 0: the usual one
    output_mult: float = 1.0  # of muP: what the readout is multiplied by there

    def __post_init__(self):
        object.__setattr__(self, "qk_norm", {True: "head", False: "none"}.get(self.qk_norm, self.qk_norm))
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} must lie between {low} and {high}, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.hidden_size % 8:
            raise UsageError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 8"
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        if self.num_heads % self.kv_heads:
            raise UsageError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        head = self.hidden_size // self.num_heads
        if (self.positions, head % 2) == ("rope", 1) or (self.positions.startswith("rope2d") and head % 4):
            raise UsageError(f"{self.positions} turns pairs of numbers: heads of {head} cannot be cut into pairs")
        if self.input_size % self.patch_size:
            raise UsageError(
                f"input of {self.input_size}x{self.input_size} cannot be cut into patches of {self.patch_size}; "
                f"choose a model with another patch size or another image size"
            )
        if self.row_ends and self.positions != "rope":
            raise UsageError(f"row_ends need positions rope, which count them, not {self.positions}")
        too_many = self.positions == "rope" and not self.row_ends and self.side**2 > MOST_POSITIONS
        if too_many:
            raise UsageError(
                f"rope has {MOST_POSITIONS} positions, an input of {self.input_size}x{self.input_size} in patches of "
                f"{self.patch_size} has {(self.input_size // self.patch_size) ** 2}; use smaller images, or rope2d"
            )
        if (self.caption_width > 0) != (self.caption_length > 0):
            raise UsageError(f"caption_width {self.caption_width} and caption_length {self.caption_length} go together")
        if self.modulation == "single" and not self.caption_width:
            raise UsageError("modulation single shares what depends on time alone: a network of classes needs block")
        if self.size_condition and (self.modulation_width % 3 or not self.caption_width):
            raise UsageError(
                f"size_condition is of networks of texts whose condition has a third for each number, not of "
                f"{self.modulation_width}"
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise UsageError(f"class_dropout_prob must lie in [0, 1), got {self.class_dropout_prob}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UsageError(
                f"num_experts_per_tok must lie between 1 and num_experts {self.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        self._check_router()
        if self.num_experts and (self.expert_width < 8 or self.expert_width % 8):
            raise UsageError(
                f"expert width {self.expert_ratio} x {self.hidden_size} = {self.expert_width} must be a multiple of 8"
            )
        if not is_mup(self) and (self.base_width, self.output_mult) != (0, 1.0):
            said = next(
                name for name, usual in (("base_width", 0), ("output_mult", 1.0)) if getattr(self, name) != usual
            )
            raise UsageError(f"{said} {getattr(self, said)} does nothing under the standard parametrization; use mup")
        if is_mup(self):
            if not self.base_width:
                object.__setattr__(self, "base_width", usual_base_width(self))
            if self.base_width != self.hidden_size:
                _ = self.at_width(self.base_width)  # complains about a wrong one
        if not 0 < self.routed_scaling_factor < math.inf:
            raise UsageError(f"routed_scaling_factor must be positive, got {self.routed_scaling_factor}")
        _ = self.moe_indices  # complains about a wrong moe_layers

    def _check_router(self) -> None:
        scored = issubclass(ROUTERS[self.router], TokenChoice)
        usual = {"router_groups": 1, "router_bias": False}
        if not scored and (said := [name for name, value in usual.items() if getattr(self, name) != value]):
            raise UsageError(f"{said[0]} {getattr(self, said[0])} is of routers softmax and sigmoid, not {self.router}")
        if not scored and (self.norm_topk_prob or self.routed_scaling_factor != 1):
            raise UsageError(f"router {self.router} weighs experts as they are: no norm_topk_prob or scaling factor")
        groups, kept = self.router_groups, self.router_kept_groups
        if self.num_experts and groups > 1 and (self.num_experts % groups or kept > groups):
            raise UsageError(
                f"router_groups {groups} must divide num_experts {self.num_experts}, and be router_kept_groups {kept} "
                f"or more"
            )
        if self.num_experts and self.num_experts_per_tok > self.num_experts // groups * kept:
            seen = self.num_experts // groups * kept
            raise UsageError(
                f"num_experts_per_tok {self.num_experts_per_tok}: of {kept} groups a token sees {seen} experts"
            )

    @property
    def expert_count(self) -> int:
        """Routed experts of a layer, with what a router has besides those that tokens compete for."""
        return self.num_experts + (ROUTERS[self.router].extra_experts if self.num_experts else 0)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def condition(self) -> Classes | Captions:
        """What images are of."""
        if self.caption_width:
            nothing = "" if self.reading == "gated" else None
            return Captions(self.caption_width, self.caption_length, self.class_dropout_prob, nothing)
        return Classes(self.num_classes, dropout=self.class_dropout_prob)

    @property
    def null_class(self) -> int | bool | None:
        """The label that means "no class", True for texts, or None for a model trained without dropping them."""
        return self.condition.null

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def side(self) -> int:
        """Tokens in a row of the image."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Of an image, ends of rows included."""
        return sequence_length(self.side) if self.row_ends else self.side**2

    @property
    def modulation_width(self) -> int:
        return self.condition_width or self.hidden_size

    @property
    def mlp_width(self) -> int:
        width = _width(self.mlp_ratio, self.hidden_size)
        if self.mlp == "swiglu":  # three matrices in place of two
            width = -(-(2 * width // 3) // self.mlp_multiple) * self.mlp_multiple
        return width

    @property
    def expert_width(self) -> int:
        return _width(self.expert_ratio, self.hidden_size)

    @property
    def shared_width(self) -> int:
        return _width(self.num_shared_experts * self.shared_expert_ratio, self.hidden_size)

    @property
    def experts(self) -> ExpertsConfig:
        """Of each mixture."""
        router = RouterConfig(
            self.num_experts,
            self.num_experts_per_tok,
            self.router,
            self.norm_topk_prob,
            self.routed_scaling_factor,
            self.router_groups,
            self.router_kept_groups,
            self.router_bias,
        )
        return ExpertsConfig(self.expert_width, router, self.shared_width, self.expert_mlp, self.shared_mlp)

    @property
    def pools_batch(self) -> bool:
        """Whether experts choose from a whole batch in training, and the host asks how many tokens in sampling."""
        return self.num_experts > 0 and self.router == "batch-pool"

    def has(self, name: str, value) -> bool:
        """Whether a field has a value, or one of another spelling that says the same."""
        if name == "moe_layers":
            return replace(self, moe_layers=value).moe_indices == self.moe_indices
        return getattr(self, name) == value

    @property
    def moe_indices(self) -> tuple[int, ...]:
        """The blocks whose MLP is a mixture of experts, ascending."""
        spec, depth = self.moe_layers, self.depth
        if not self.num_experts:
            return ()
        if spec == "all":
            return tuple(range(depth))
        if spec == "odd":
            return tuple(range(1, depth, 2))
        if spec == "deep-half":
            return tuple(range(depth // 2, depth))
        if spec == "shallow-half":
            return tuple(range(depth // 2))
        if (every := re.fullmatch(r"every-([1-9]\d*)", spec)) and int(every[1]) <= depth:
            return tuple(range(int(every[1]) - 1, depth, int(every[1])))
        if re.fullmatch(r"\d+(,\d+)*", spec):
            chosen = tuple(sorted({int(index) for index in spec.split(",")}))
            if chosen[-1] < depth:
                return chosen
        raise UsageError(
            f"moe_layers {spec!r} is none of all, odd, every-N (N up to {depth}), deep-half, shallow-half, "
            f"or a list of blocks from 0 to {depth - 1} such as 0,2,5"
        )

    def at_width(self, width: int) -> "DiTConfig":
        """The same model with another hidden size: heads keep their size, all other widths their proportion.

        Raises:
            UsageError: it is no multiple of a head, or of as many heads as share keys and values.
        """
        sharing = self.num_heads // self.kv_heads
        head = self.hidden_size // self.num_heads
        if not width or width % (head * sharing):
            several = f"{sharing} heads" if sharing > 1 else "a head"
            raise UsageError(f"width {width} is no multiple of {head * sharing}, the size of {several}")
        kv_heads = self.num_kv_heads and width // head // sharing
        return replace(self, hidden_size=width, num_heads=width // head, num_kv_heads=kv_heads)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "DiTConfig":
        """Raises UsageError for options that this version does not know, or values that none has."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UsageError(f"unknown model options {', '.join(unknown)}: written by a newer version?")
        if isinstance(values.get("qk_norm"), bool):  # of before there were two kinds
            values = values | {"qk_norm": "head" if values["qk_norm"] else "none"}
        return cls(**check_record(values, _config_record(), "model options"))


@functools.cache
def _config_record() -> type:
    """The fields of a `DiTConfig` as JSON holds them; those with a default may be absent."""
    hints = get_type_hints(DiTConfig)
    return TypedDict(
        "Model",
        {f.name: hints[f.name] if f.default is MISSING else NotRequired[hints[f.name]] for f in fields(DiTConfig)},
    )


def _width(ratio: float, hidden_size: int) -> int:
    """Rounded down, but a ratio that came from a width over D gives that width, whatever the division rounded."""
    return int(ratio * hidden_size + 1e-6)


def usual_base_width(config: DiTConfig) -> int:
    """Of muP: that of the published rows of the same size of heads, the smallest of these rows, or else four heads."""
    head = config.hidden_size // config.num_heads
    rows = [row for row in DiT_models.values() if row["hidden_size"] == head * row["num_heads"]]
    published = [row["base_width"] for row in rows if "base_width" in row]
    return min(published or [row["hidden_size"] for row in rows] or [4 * head])


def build_config(name: str, **options) -> DiTConfig:
    """The configuration of a row of `DiT_models`; `options` are fields of `DiTConfig` and win over the row.

    As published, XL and G with experts have QK-norm unless `qk_norm` says otherwise; True is the kind of the family.
    """
    if name not in DiT_models:
        raise unknown_name("model", name, DiT_models)
    options.setdefault("qk_norm", options.get("num_experts", 0) > 0 and name.startswith(("DiT-XL/", "DiT-G/")))
    if options["qk_norm"] is True:
        options["qk_norm"] = fact(family_of_row(name), "QK_NORM")
    row = DiT_models[name]
    if options.get("parametrization") == "mup" and row.get("parametrization", "").startswith("mup"):
        options["parametrization"] = row["parametrization"]  # the row's own kind of muP
    values = row | options
    if values.get("parametrization", "standard") == "standard" and "base_width" not in options:
        values.pop("base_width", None)
    config = DiTConfig(**values)
    if fact(family_of_row(name), "EXPERTS_ARE_MLPS") and "expert_ratio" not in options:
        config = replace(config, expert_ratio=config.mlp_width / config.hidden_size)
    return config


def is_row(config: DiTConfig, name: str) -> bool:
    """Whether a configuration has all that a row of `DiT_models` says."""
    row = DiT_models[name]
    return config.depth == row["depth"] and all(config.has(key, value) for key, value in row.items())


def row_name(config: DiTConfig) -> str | None:
    """The row of `DiT_models` that a configuration has, that which says most of it, or None."""
    rows = [name for name in DiT_models if is_row(config, name)]
    return max(rows, key=lambda name: len(DiT_models[name]), default=None)


def name_of(config: DiTConfig, row: str | None = None) -> str:
    """What to call a model: `row`, if it is one, or else the row that it is, or its size."""
    if row is not None and is_row(config, row):
        return row
    return row_name(config) or f"DiT-{config.depth}L-{config.num_heads}h/{config.patch_size}"


def qk_norm(text: str) -> str | bool:
    """One of `QK_NORMS`, or as for a switch: True for the kind of the family."""
    if text in QK_NORMS:
        return text
    try:
        return boolean(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(QK_NORMS)}, True or False, got {text!r}") from None


def mup_or_not(text: str) -> str:
    return "mup" if boolean(text) else "standard"


MODEL_FLAGS = {  # field of DiTConfig: options of its flag, which has its name
    "num_classes": dict(type=positive_int, help="labels; the data may have fewer (train.py: as many as it has)"),
    "class_dropout_prob": dict(type=number_in(0, 1), help="labels dropped, for guidance (default: 0.1)"),
    "num_experts": dict(type=natural_int, help="routed experts per MoE layer (default: 0, a dense model)"),
    "num_experts_per_tok": dict(type=positive_int, help="experts that each token goes to (default: 2)"),
    "num_shared_experts": dict(type=natural_int, help="always-on experts of width D (default: 2)"),
    "expert_ratio": dict(type=number_in(0, 1e3), help="width of a routed expert over D (default: 4)"),
    "router": dict(choices=ROUTERS, help="who chooses, and by what (default: softmax)"),
    "router_groups": dict(type=positive_int, help="groups of experts (default: 1)"),
    "router_kept_groups": dict(type=positive_int, help="that a token chooses from (default: 1)"),
    "routed_scaling_factor": dict(type=number_in(1e-6, 1e6), help="factor of routing weights (default: 1)"),
    "shared_mlp": dict(choices=SHARED_EXPERTS, help="kind of the shared expert (default: swiglu)"),
    "expert_mlp": dict(choices=EXPERTS, help="kind of the routed experts (default: swiglu)"),
    "moe_layers": dict(help="all, odd, every-N, deep-half, shallow-half, or 0,2,5 (default: all)"),
    "norm_topk_prob": dict(type=boolean, nargs="?", const=True, help="divide a token's routing weights by their sum"),
    "norm": dict(choices=NORMS, help="before attention and feed-forward (default: layer; Large-DiT: rms)"),
    "positions": dict(choices=POSITIONS, help="a table, or rotations of query and key (sincos; Large-DiT: rope)"),
    "mlp": dict(choices=MLPS, help="of blocks without experts (default: gelu; Large-DiT: swiglu)"),
    "depth": dict(type=positive_int, help="blocks (default: the row's)"),
    "patch_size": dict(type=positive_int, help="side of a patch (default: the row's)"),
    "num_heads": dict(
        type=positive_int, help="heads of the size that the row's have, which makes the width; without --model 72 each"
    ),
    "num_kv_heads": dict(type=positive_int, help="heads of keys and values (default: as many as of queries)"),
    "qk_norm": dict(
        type=qk_norm,
        nargs="?",
        const=True,
        metavar="KIND",
        help="none, head, full, or True for the family's (default: none; XL and G with experts: head, as published)",
    ),
    "reading": dict(choices=READINGS, help="how blocks read texts (default: cross; Large-DiT: gated)"),
    "position_scaling": dict(
        type=number_in(*LIMITS["position_scaling"]), help="positions are divided by it (default: 1)"
    ),
    "parametrization": dict(
        choices=PARAMETRIZATIONS, help="mup: learning rates found on a narrow model suit a wide one (default: standard)"
    ),
    "base_width": dict(
        type=positive_int, help="of muP: hidden size at which --lr holds (default: of the smallest row with such heads)"
    ),
    "output_mult": dict(type=number_in(*LIMITS["output_mult"]), help="of muP: factor of the readout (default: 1)"),
}
MUP_FIELDS = ("parametrization", "base_width", "output_mult")
DIT_MUP = ("depth", "patch_size", "num_heads", *MUP_FIELDS)  # what its flags say


def add_model_arguments(parser: Parser):
    """`--model`, and `MODEL_FLAGS`, whose default is None: not said. Returns the group, for more."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="row of the table of sizes: DiT-{S,B,L,XL}/{2,4,8}, DiT-G/2, DiT-muP-{2,4,8,16}h/2, "
        "Large-DiT-{600M,3B,7B}/2 (DiT-S/2)",
    )
    for name in MODEL_FLAGS:
        _add_flag(group, name)
    _add_published_flags(group)
    scaling = {"dest": "position_scaling", "type": number_in(*LIMITS["position_scaling"])}
    group.add_argument("--rope-scaling-factor", help="--position-scaling", **scaling)
    group.add_argument(
        "--caption-dropout-prob", dest="class_dropout_prob", type=number_in(0, 1), help="--class-dropout-prob"
    )
    return group


def add_mup_arguments(group) -> None:
    """What samplers take of them, for files that do not describe themselves: the flags of DiT-muP."""
    for name in DIT_MUP:
        _add_flag(group, name)
    _add_published_flags(group)


def add_router_arguments(group) -> None:
    """What samplers take of them, for files that do not say how their routers choose."""
    for name in ("router", "router_groups", "router_kept_groups"):
        _add_flag(group, name)


def _add_flag(group, name: str) -> None:
    group.add_argument(f"--{name}" if name.startswith("num_") else f"--{name.replace('_', '-')}", **MODEL_FLAGS[name])


def _add_published_flags(group) -> None:
    """Those of DiT-muP that say the same in other words."""
    options = {"type": mup_or_not, "nargs": "?", "const": "True", "metavar": "BOOL"}
    group.add_argument("--mup", dest="parametrization", help="--parametrization mup", **options)
    group.add_argument("--dim_heads", type=positive_int, help="size of a head (default: the row's)")
    group.add_argument("--logstd", dest="output_mult", type=power_of_two, help="--output-mult 2^N")
    group.add_argument(
        "--load_base_shapes", type=Path, metavar="FILE", help=".bsh that the model has to fit: --base-width"
    )


def fields_said(args: argparse.Namespace, like: DiTConfig) -> dict:
    """The fields of a configuration that model flags say; `like` has what they leave open of heads and their size."""
    fields = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name, None) is not None}
    if "num_heads" in fields or args.dim_heads is not None:
        fields.setdefault("num_heads", like.num_heads)
        fields["hidden_size"] = fields["num_heads"] * (args.dim_heads or like.hidden_size // like.num_heads)
    return fields


def row_said(args: argparse.Namespace, usual: str = "DiT-S/2") -> str:
    """`--model`, or what stands for it: DiT-muP's sizes where its flags speak of heads."""
    if args.model is not None:
        return args.model
    dit_mup = (args.num_heads, args.dim_heads, args.load_base_shapes)
    return usual if all(flag is None for flag in dit_mup) else "DiT-muP-16h/2"


def config_said(args: argparse.Namespace, usual: str = "DiT-S/2") -> DiTConfig:
    """The model that the flags of `add_model_arguments` say, for some images that its patches divide.

    Raises:
        UsageError: they do not fit together.
    """
    name = row_said(args, usual)
    row = build_config(name)
    fields = fields_said(args, row)
    if args.model is None:
        fields.setdefault("parametrization", "standard")
    return build_config(name, input_size=64 * fields.get("patch_size", row.patch_size), **fields)


# ---------------------------------------------------------------------------------------------------------- from files

ROUTER_FIELDS = {  # of a router, and what they are where nothing is said
    **{"router": "softmax", "router_groups": 1, "router_kept_groups": 1, "router_bias": False},
    **{"norm_topk_prob": False, "routed_scaling_factor": 1.0},
}
ROUTING_FIELDS = (
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
    *("router", "router_groups", "router_kept_groups"),
)
# Fields of DiTConfig that change the function and no shape: of a file that does not describe itself, a flag must tell.
UNSEEN = (*ROUTING_FIELDS, *MUP_FIELDS)


def unseen(config: DiTConfig) -> dict:
    """Those of `UNSEEN` that matter to a model, and what it has of them."""
    of_experts = ROUTING_FIELDS if config.num_experts else ()
    return {name: getattr(config, name) for name in (*of_experts, *(MUP_FIELDS if is_mup(config) else MUP_FIELDS[:1]))}


OF_TEXTS = {"cross": "y_embedder.y_embedding", "gated": "y_embedder.norm.weight"}  # a parameter of each way to read


def usual_heads(width: int) -> list[int]:
    """How many heads the rows of this hidden size have."""
    return sorted({row["num_heads"] for row in DiT_models.values() if row["hidden_size"] == width})


def infer_config(shapes: Mapping[str, tuple[int, ...]], **known) -> DiTConfig:
    """The architecture of a state dict from its names and shapes alone.

    What shapes cannot tell comes from the table of sizes (heads), from the published models (label dropout, two shared
    experts, two experts per token, their plain weights), or from `known`, which wins: `num_heads`,
    `num_experts_per_tok`, `input_size` of a file without `pos_embed`.

    Raises:
        UsageError: these are not the names of a DiT, or the heads are in no table.
    """
    reading = next((kind for kind, name in OF_TEXTS.items() if name in shapes), None)
    expected = ["x_embedder.proj.weight", "t_embedder.mlp.0.weight"]
    expected += ["y_embedder.embedding_table.weight" if reading is None else OF_TEXTS[reading]]
    expected += ["blocks.0.attn.qkv.weight", "final_layer.linear.weight"]
    if absent := [name for name in expected if name not in shapes]:
        raise UsageError(f"these are not the weights of a DiT: no {absent[0]} among {len(shapes)} names")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    config = {
        "depth": depth,
        "hidden_size": width,
        "patch_size": patch,
        "in_channels": channels,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch**2,
        "norm": "rms" if "blocks.0.norm1.weight" in shapes else "layer",
        "attention_bias": "blocks.0.attn.qkv.bias" in shapes,
    }
    if reading == "cross":
        config["caption_length"], config["caption_width"] = shapes["y_embedder.y_embedding"]
    elif reading == "gated":  # the null caption is the empty one, whose length tells nothing
        config |= {"reading": reading, "caption_width": shapes["y_embedder.norm.weight"][0], "caption_length": 128}
    else:
        config["num_classes"] = shapes["y_embedder.embedding_table.weight"][0] - 1
    if "t_block.1.weight" in shapes:
        config["modulation"] = "single"
    if "csize_embedder.mlp.0.weight" in shapes:  # as published
        config |= {"size_condition": True, "position_scaling": 2.0}
    if "row_ends.eol_token" in shapes:
        config["row_ends"] = True
    if config["norm"] == "rms" and "pos_embed" not in shapes:  # that is Large-DiT
        config["positions"] = "rope"
    if (conditioning := shapes["t_embedder.mlp.0.weight"][0]) != width:
        config["condition_width"] = conditioning
    if "pos_embed" in shapes:
        config["input_size"] = math.isqrt(shapes["pos_embed"][1]) * patch
    normed = shapes.get("blocks.0.attn.q_norm.weight", (0,))[0]
    config["qk_norm"] = {0: "none", width: "full"}.get(normed, "head")
    if config["qk_norm"] == "head":
        config["num_heads"] = width // normed
    elif heads := usual_heads(width):
        config["num_heads"] = heads[0]
    elif "num_heads" not in known:
        raise UsageError(f"hidden size {width} is in no row of the table of sizes, so the number of heads is unknown")
    head = width // (known.get("num_heads") or config["num_heads"])
    kv_heads = (shapes["blocks.0.attn.qkv.weight"][0] - width) // (2 * head)
    if kv_heads * head != width:
        config["num_kv_heads"] = kv_heads

    moe_blocks = [i for i in range(depth) if f"blocks.{i}.moe.gate.weight" in shapes]
    if moe_blocks:
        prefix = f"blocks.{moe_blocks[0]}.moe"
        shared = shapes.get(f"{prefix}.shared_experts.down_proj.weight", (0, 0))[1]
        if f"{prefix}.shared_experts.fc2.weight" in shapes:
            shared, config["shared_mlp"] = shapes[f"{prefix}.shared_experts.fc2.weight"][1], "gelu"
        config["num_experts"] = shapes[f"{prefix}.gate.weight"][0]
        if f"{prefix}.gate.capacity_predictor.0.weight" in shapes:
            config["router"] = "batch-pool"
        config["router_bias"] = f"{prefix}.gate.bias" in shapes
        config["num_experts_per_tok"] = min(2, config["num_experts"])
        config["expert_mlp"] = "gelu" if f"{prefix}.experts.fc1_weight" in shapes else "swiglu"
        down = "fc2_weight" if config["expert_mlp"] == "gelu" else "down_proj"
        config["expert_ratio"] = shapes[f"{prefix}.experts.{down}"][2] / width
        count = known.get("num_shared_experts", 2)  # one of several times the width computes the same
        config["num_shared_experts"] = count if shared else 0
        config["shared_expert_ratio"] = shared / (count * width) if shared else 1.0
        known = {name: value for name, value in known.items() if name != "num_shared_experts"}
        config["moe_layers"] = "all" if len(moe_blocks) == depth else ",".join(map(str, moe_blocks))
    dense_blocks = [i for i in range(depth) if f"blocks.{i}.mlp.fc1.weight" in shapes]
    if dense_blocks:
        config["mlp_ratio"] = shapes[f"blocks.{dense_blocks[0]}.mlp.fc1.weight"][0] / width
    gated_blocks = [i for i in range(depth) if f"blocks.{i}.mlp.down_proj.weight" in shapes]
    if gated_blocks:
        config |= {"mlp": "swiglu"} | _swiglu_width(shapes[f"blocks.{gated_blocks[0]}.mlp.down_proj.weight"][1], width)
    elif config["norm"] == "rms" and not dense_blocks:
        config["mlp"] = "swiglu"
    if "pos_embed" in shapes:
        known.pop("input_size", None)
    return DiTConfig(**(config | known))


def _swiglu_width(width: int, hidden_size: int) -> dict:
    """The fields that give a SwiGLU this width: the published rule if it does, else the width itself."""
    rule = {"mlp_ratio": 4.0, "mlp_multiple": 256}
    if -(-(2 * 4 * hidden_size // 3) // 256) * 256 == width:
        return rule
    return {"mlp_ratio": 1.5 * width / hidden_size, "mlp_multiple": 1}
