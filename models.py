"""Diffusion transformers, dense (DiT, arXiv 2212.09748) and sparse (DiT-MoE, arXiv 2407.11633).

N images · C latent channels · H, W latent size · p patch · T = H*W/p^2 tokens · D hidden width · h heads · d = D/h

`DiT_models` is the table of sizes; `build_model(name, **options)` makes one. Parameters keep the names of the published
checkpoints, except that experts are stacked; `load_state_dict` takes both spellings, and `to_published` writes the
published one.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import NotRequired, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from typing_extensions import TypedDict

from cli import UsageError, unknown_name
from moe import EXPERTS, MoE, Routing, compute_dtype
from records import check_record

# ------------------------------------------------------------------------------------------------------- configuration

SIZES = {  # depth, hidden size, heads
    "Nano": (3, 64, 4),  # for the quick start and tests; not a published size
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "G": (40, 1408, 16),
}
DiT_models: dict[str, dict] = {
    f"DiT-{size}/{patch}": dict(depth=depth, hidden_size=hidden, patch_size=patch, num_heads=heads)
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in ((2,) if size in ("Nano", "G") else (2, 4, 8))
}


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
    mlp_ratio: float = 4.0  # width of the dense MLP over D
    learn_sigma: bool = True  # 2C output channels: the second half is the variance of DDPM
    qk_norm: bool = False  # LayerNorm over each head's query and key
    num_experts: int = 0  # 0: the dense DiT
    num_experts_per_tok: int = 2
    expert_mlp: str = "swiglu"  # kind of the routed experts; "gelu": that of the dense MLP, with biases
    expert_ratio: float = 4.0  # width of a routed expert over D
    num_shared_experts: int = 2
    shared_expert_ratio: float = 1.0  # width of one shared expert over D
    norm_topk_prob: bool = False  # divide the K routing weights by their sum
    routed_scaling_factor: float = 1.0  # then multiply them by this
    moe_layers: str = "all"  # which blocks are MoE: all, every-N, deep-half, shallow-half, or a list such as 0,2,5

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} must lie between {low} and {high}, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.hidden_size % 8:
            raise UsageError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 8"
            )
        if self.input_size % self.patch_size:
            raise UsageError(
                f"input of {self.input_size}x{self.input_size} cannot be cut into patches of {self.patch_size}; "
                f"choose a model with another patch size or another image size"
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise UsageError(f"class_dropout_prob must lie in [0, 1), got {self.class_dropout_prob}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UsageError(
                f"num_experts_per_tok must lie between 1 and num_experts {self.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        if self.num_experts and (self.expert_width < 8 or self.expert_width % 8):
            raise UsageError(
                f"expert width {self.expert_ratio} x {self.hidden_size} = {self.expert_width} must be a multiple of 8"
            )
        if self.expert_mlp not in EXPERTS:
            raise unknown_name("expert_mlp", self.expert_mlp, EXPERTS)
        if not 0 < self.routed_scaling_factor < math.inf:
            raise UsageError(f"routed_scaling_factor must be positive, got {self.routed_scaling_factor}")
        _ = self.moe_indices  # complains about a wrong moe_layers

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", or None for a model trained without label dropout."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def mlp_width(self) -> int:
        return _width(self.mlp_ratio, self.hidden_size)

    @property
    def expert_width(self) -> int:
        return _width(self.expert_ratio, self.hidden_size)

    @property
    def shared_width(self) -> int:
        return _width(self.num_shared_experts * self.shared_expert_ratio, self.hidden_size)

    @property
    def moe_indices(self) -> tuple[int, ...]:
        """The blocks whose MLP is a mixture of experts, ascending."""
        spec, depth = self.moe_layers, self.depth
        if not self.num_experts:
            return ()
        if spec == "all":
            return tuple(range(depth))
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
            f"moe_layers {spec!r} is none of all, every-N (N up to {depth}), deep-half, shallow-half, "
            f"or a list of blocks from 0 to {depth - 1} such as 0,2,5"
        )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "DiTConfig":
        """Raises UsageError for options that this version does not know, or values that none has."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UsageError(f"unknown model options {', '.join(unknown)}: written by a newer version?")
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


def build_config(name: str, **options) -> DiTConfig:
    """The configuration of a row of `DiT_models`; `options` are fields of `DiTConfig` and win over the row.

    As published, XL and G with experts have QK-norm unless `qk_norm` says otherwise.
    """
    if name not in DiT_models:
        raise unknown_name("model", name, DiT_models)
    options.setdefault("qk_norm", options.get("num_experts", 0) > 0 and name.startswith(("DiT-XL/", "DiT-G/")))
    return DiTConfig(**(DiT_models[name] | options))


def row_name(config: DiTConfig) -> str | None:
    """The row of `DiT_models` that a configuration has, or None."""
    rows = (name for name, row in DiT_models.items() if all(getattr(config, key) == row[key] for key in row))
    return next(rows, None)


def build_model(name: str, **options) -> "DiT":
    """A freshly initialised model: `build_model("DiT-S/2", num_experts=8)`."""
    return DiT(build_config(name, **options))


NORM_EPS = 1e-6  # of every LayerNorm, as published

# ----------------------------------------------------------------------------------------------------------- attention


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package (optional), which wants (N, T, h, d)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


ATTENTION_BACKENDS = {  # None: PyTorch chooses
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "flash-attn": flash_attn_2,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}


def attend(q: Tensor, k: Tensor, v: Tensor, backend) -> Tensor:
    """(N, h, T, d) each -> (N, h, T, d), by a value of `ATTENTION_BACKENDS`."""
    if callable(backend):
        return backend(q, k, v)
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def check_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Try a backend on a few tokens.

    Raises:
        UsageError: it has no kernel for this device, precision or head size.
    """
    if name in ("auto", "math"):
        return
    q, k, v = (torch.randn(1, 1, 16, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        attend(q, k, v, ATTENTION_BACKENDS[name]).sum().backward()
    except ImportError:
        raise UsageError(f"--attention {name} needs the package: pip install {name}") from None
    except RuntimeError:
        what = f"{device.type}, {str(dtype).removeprefix('torch.')} and heads of {head_dim}"
        raise UsageError(f"--attention {name} has no kernel for {what}; use auto") from None


class HeadNorm(nn.LayerNorm):
    """LayerNorm that leaves its input in bf16, where autocast would make fp32 copies; the kernel adds up in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D) without mask."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.backend = None  # a value of ATTENTION_BACKENDS
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)  # rows: [q; k; v] x heads x d
        self.q_norm = HeadNorm(hidden_size // num_heads, NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(hidden_size // num_heads, NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (N, T, h, d)
        # Normed before heads and tokens change places: kernels lay their output out as q, so that it needs no copy.
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend(*(each.transpose(1, 2) for each in (q, k, v)), self.backend)  # (N, h, T, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (N, T, D)


# ---------------------------------------------------------------------------------------------------------- embeddings


class PatchEmbed(nn.Module):
    """Cut a latent into p x p patches and project each: (N, C, H, W) -> (N, T, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: sums take after their first operand, so all blocks would work on a transposed residual stream.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """(N,) -> (N, dim) fp32, [cos | sin] of t * 10000^(-k / (dim/2)) (arXiv 1706.03762, with cosines first)."""
    half = dim // 2
    # Rounded in this order as the published weights saw it: near t = 1000 another order moves the angles by 5e-5.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Network time (N,) -> (N, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) -> (N, D); the last row is the null class where the model has one.

    Dropping labels is the training loop's business, so that a forward pass has no randomness of its own.
    """

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def position_embedding(hidden_size: int, side: int) -> Tensor:
    """(1, side*side, D) fixed sine-cosine: the first half of D from the column, the second from the row."""
    frequencies = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None].float()


# --------------------------------------------------------------------------------------------------------------- model


class AdaptiveLayerNorm(torch.autograd.Function):
    """norm(x) * (1 + scale) + shift: (N, T, D) with (N, D) shift and scale -> (N, T, D) of `dtype`.

    Computed in the dtype of x. Saves x and scale alone: the norm is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, scale)
        with torch.autocast(x.device.type, enabled=False):
            shift, factor = shift.to(x.dtype).unsqueeze(1), 1 + scale.to(x.dtype).unsqueeze(1)  # (N, 1, D)
            out = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), factor)
        return out if out.dtype == dtype else out.to(dtype)  # compiled by PyTorch 2.11, an idle `to` loses the gradient

    @staticmethod
    def backward(ctx, grad: Tensor):  # (N, T, D)
        x, scale = ctx.saved_tensors
        width = x.shape[-1:]
        normed, mean, rstd = torch.native_layer_norm(x, width, None, None, NORM_EPS)
        grad_shift = grad.sum(dim=1, dtype=x.dtype)
        grad_scale = (grad * normed).sum(dim=1)
        grad_normed = grad * (1 + scale.to(x.dtype).unsqueeze(1))
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, width, mean, rstd, None, None, [True, False, False]
        )
        return grad_x, grad_shift.to(scale.dtype), grad_scale.to(scale.dtype), None


class MLP(nn.Module):
    """The dense DiT's two-layer perceptron with tanh-GELU."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


PRODUCTS = {  # operations whose results are dear: matrix products, attention, and the choice of experts
    getattr(torch.ops.aten, name).default
    for name in (
        *("mm", "addmm", "bmm", "_grouped_mm", "topk"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    )
}


def _keep_products(_, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTING = {  # what the backward computes again of a block, as options of `checkpoint`
    "none": None,
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_products)},
    "full": {},
}


class DiTBlock(nn.Module):
    """Transformer block with adaLN-zero conditioning; its MLP is dense or a mixture of experts."""

    def __init__(self, config: DiTConfig, is_moe: bool):
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(width, config.num_heads, config.qk_norm)
        if is_moe:
            self.moe = MoE(
                width,
                config.expert_width,
                config.num_experts,
                config.num_experts_per_tok,
                config.shared_width,
                config.norm_topk_prob,
                config.expert_mlp,
                config.routed_scaling_factor,
            )
        else:
            self.mlp = MLP(width, config.mlp_width)
        self.is_moe = is_moe
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.checkpointing = "none"  # a key of CHECKPOINTING

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Routing | None]:  # (N, T, D), (N, D)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, c)
        return checkpoint(self.compute, x, c, use_reentrant=False, **CHECKPOINTING[self.checkpointing])

    def compute(self, x: Tensor, c: Tensor) -> tuple[Tensor, Routing | None]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        dtype = compute_dtype(self.attn.qkv.weight)
        x = x + gate_a.unsqueeze(1) * self.attn(AdaptiveLayerNorm.apply(x, shift_a, scale_a, dtype))
        tokens = AdaptiveLayerNorm.apply(x, shift_m, scale_m, dtype)
        out, routing = self.moe(tokens) if self.is_moe else (self.mlp(tokens), None)
        return x + gate_m.unsqueeze(1) * out, routing


class FinalLayer(nn.Module):
    """Norm, modulation and projection to patches: (N, T, D) -> (N, T, p*p*out_channels)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(AdaptiveLayerNorm.apply(x, shift, scale, compute_dtype(self.linear.weight)))


class DiT(nn.Module):
    """Predicts noise, velocity or data, and (learn_sigma) a variance, from a noised latent, a time and a label."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes + (config.null_class is not None), config.hidden_size)
        self.register_buffer(
            "pos_embed", position_embedding(config.hidden_size, config.input_size // config.patch_size)
        )
        self.blocks = nn.ModuleList(DiTBlock(config, is_moe=i in config.moe_indices) for i in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.init_weights()
        self.register_load_state_dict_pre_hook(_accept_published_names)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_routing: bool = False):
        """One evaluation of the network.

        Args:
            x: (N, C, H, W) noised latents.
            t: (N,) network time, in the units the network was trained with (DDPM: 0..999; rectified flow: 0..1).
            y: (N,) int64 labels; `config.null_class` means none.
            return_routing: also return the `Routing` of every MoE layer.

        Returns:
            (N, out_channels, H, W), or that and a list of L `Routing`.
        """
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # (N, T, D), fp32 under autocast
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        routings = []
        for block in self.blocks:
            x, routing = block(x, c)
            if routing is not None:
                routings.append(routing)
        x = self.unpatchify(self.final_layer(x, c))
        return (x, routings) if return_routing else x

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p*p*C) -> (N, C, H, W)."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (N, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def units(self) -> list[list[nn.Module]]:
        """The parts that are initialised, and may be sharded, one after another: the model's ends, then each block."""
        ends = [self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer]
        return [ends, *([block] for block in self.blocks)]

    def materialize(self, device: torch.device, then: Callable[[list[nn.Module]], None] | None = None) -> None:
        """Give a model that was built on the meta device fresh parameters, drawn on the CPU one unit after another.

        `then(unit)` may shard each unit before the next one exists, so that a large model never exists whole; the
        values are the same with and without it.
        """
        for unit in self.units():
            for part in unit:
                part.to_empty(device="cpu")
            self.init_unit(unit)
            for part in unit:
                part.to(device)
            if then is not None:
                then(unit)
        side = self.config.input_size // self.config.patch_size
        self.pos_embed = position_embedding(self.config.hidden_size, side).to(device)

    def init_weights(self) -> None:
        """Draw all parameters, unit by unit."""
        for unit in self.units():
            self.init_unit(unit)

    @torch.no_grad()
    def init_unit(self, unit: list[nn.Module]) -> None:
        """Xavier-uniform linears; label table and timestep MLP N(0, 0.02); modulations and the final linear zero.

        Every parameter is written: what a model on the meta device gets before is memory as it was left.
        """
        for module in (module for part in unit for module in part.modules()):
            if isinstance(module, nn.Linear):
                for projection in module.weight.chunk(getattr(module, "stacked", 1)):
                    nn.init.xavier_uniform_(projection)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.flatten(1))
                nn.init.zeros_(module.proj.bias)
            elif isinstance(module, HeadNorm):
                module.reset_parameters()
        for part in unit:
            if isinstance(part, LabelEmbedder):
                nn.init.normal_(part.embedding_table.weight, std=0.02)
            elif isinstance(part, TimestepEmbedder):
                nn.init.normal_(part.mlp[0].weight, std=0.02)
                nn.init.normal_(part.mlp[2].weight, std=0.02)
            elif isinstance(part, DiTBlock) and part.is_moe:
                part.moe.init_weights()
            zero = [part.linear] if isinstance(part, FinalLayer) else []
            zero += [part.adaLN_modulation[1]] if isinstance(part, (FinalLayer, DiTBlock)) else []
            for linear in zero:
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def set_attention(self, name: str) -> None:
        """Choose how attention is computed, a key of `ATTENTION_BACKENDS`; the result is the same within rounding."""
        if name not in ATTENTION_BACKENDS:
            raise unknown_name("attention backend", name, ATTENTION_BACKENDS)
        if name == "flash-attn":
            try:
                import flash_attn  # noqa: F401
            except ImportError:
                raise UsageError("--attention flash-attn needs the package: pip install flash-attn") from None
        if name in ("fa3", "fa4"):
            try:
                from torch.nn.attention import activate_flash_attention_impl

                activate_flash_attention_impl(name.upper())
            except (ImportError, RuntimeError, ValueError) as error:
                raise UsageError(f"--attention {name} is not installed here ({error}); use auto") from None
        for block in self.blocks:
            block.attn.backend = ATTENTION_BACKENDS[name]

    def set_checkpointing(self, name: str) -> None:
        """Choose what the backward computes again to save memory, a key of `CHECKPOINTING`; before `compile_blocks`.

        "selective": of each block all but products, attention and choices of experts, which costs little time where
        blocks are compiled, and several times a small block's own where they are not (operations are sorted by the
        host); "full": all of it.
        """
        if name not in CHECKPOINTING:
            raise unknown_name("activation checkpointing", name, CHECKPOINTING)
        for block in self.blocks:
            block.checkpointing = name

    def compile_blocks(self, fullgraph: bool = True) -> None:
        """torch.compile each block in place: one compilation serves all, and parameter names stay.

        Last of all: a copy that is made afterwards would compute with this model's weights. `fullgraph` False: parts of
        a block escape compilation.
        """
        for block in self.blocks:
            if block.checkpointing == "selective":  # the compiler has to see what is kept
                block.compile(fullgraph=fullgraph)
            else:  # what computes a second time is the same code, which rounds alike
                block.compute = torch.compile(block.compute, fullgraph=fullgraph)


def count_parameters(model: DiT) -> tuple[int, int]:
    """(total, activated): activated leaves out the experts that a token does not use. Counts the fixed `pos_embed`."""
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    config = model.config
    unused = 0
    for index in config.moe_indices:
        stacked = sum(parameter.numel() for parameter in model.blocks[index].moe.experts.parameters())
        unused += stacked // config.num_experts * (config.num_experts - config.num_experts_per_tok)
    return total, total - unused


# ----------------------------------------------------------------------------------------------------- published names

_RENAMED = {".attn.Wqkv.": ".attn.qkv.", ".attn.out_proj.": ".attn.proj."}
_EXPERT = re.compile(r"(blocks\.\d+\.moe\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_SHARED = re.compile(r"(blocks\.\d+\.moe\.shared_experts)\.(gate_proj|up_proj)\.weight")


def from_published(
    state_dict: Mapping[str, Tensor], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Rename a published state dict to this model's names; one that has them already passes unchanged.

    Strips `module.` and `_orig_mod.` prefixes, maps `Wqkv`/`out_proj` to `qkv`/`proj`, stacks `experts.j.*`, and
    gate and up of the shared expert. Tensors are read, moved and converted one at a time, so that a lazy mapping of a
    file needs one copy in memory, not two.
    """
    names, experts, shared = {}, {}, {}
    for source in state_dict:
        name = source.replace("_orig_mod.", "").removeprefix("module.")
        for published, ours in _RENAMED.items():
            name = name.replace(published, ours)
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = source
        elif match := _SHARED.fullmatch(name):
            shared.setdefault(match[1], {})[match[2]] = source
        else:
            names[name] = source
    renamed = {name: state_dict[source].to(device=device, dtype=dtype) for name, source in names.items()}
    for prefix, sources in experts.items():
        renamed |= _stack_experts(prefix, sources, state_dict, device, dtype)
    for prefix, sources in shared.items():
        if absent := {"gate_proj", "up_proj"} - set(sources):
            raise UsageError(f"the file lacks {prefix}.{absent.pop()}.weight")
        parts = [state_dict[sources[kind]].to(device=device, dtype=dtype) for kind in ("gate_proj", "up_proj")]
        renamed[f"{prefix}.gate_up_proj.weight"] = torch.cat(parts)  # (2S, D)
    return renamed


def _stack_experts(
    prefix: str, sources: dict[tuple[int, str], str], state_dict: Mapping[str, Tensor], device, dtype
) -> dict[str, Tensor]:
    """One layer's `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F); `sources`: (expert, projection) -> name."""
    count = 1 + max(index for index, _ in sources)
    wanted = [(index, kind) for index in range(count) for kind in ("gate_proj", "up_proj", "down_proj")]
    if absent := [f"{prefix}.{index}.{kind}.weight" for index, kind in wanted if (index, kind) not in sources]:
        raise UsageError(f"the file lacks {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}")
    first = state_dict[sources[0, "gate_proj"]]
    width, hidden = first.shape
    gate_up = first.new_empty(count, 2 * width, hidden, device=device, dtype=dtype)
    down = first.new_empty(count, hidden, width, device=device, dtype=dtype)
    places = {"gate_proj": gate_up[:, :width], "up_proj": gate_up[:, width:], "down_proj": down}
    for index, kind in wanted:
        tensor = state_dict[sources[index, kind]]
        if tensor.shape != places[kind][index].shape:
            expected = tuple(places[kind][index].shape)
            raise UsageError(f"{sources[index, kind]} is {tuple(tensor.shape)}, in the first expert {expected}")
        places[kind][index].copy_(tensor.detach())
    return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}


def to_published(state_dict: Mapping[str, Tensor], flash_names: bool = False) -> dict[str, Tensor]:
    """The inverse of `from_published`; `flash_names` writes `Wqkv`/`out_proj`, as the published XL and G files have."""
    published = {}
    for name, tensor in state_dict.items():
        if name.endswith(".moe.experts.gate_up_proj"):
            for index, matrix in enumerate(tensor.unbind(0)):
                gate, up = matrix.chunk(2)
                prefix = name.replace("gate_up_proj", str(index))
                published[f"{prefix}.gate_proj.weight"], published[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith(".moe.experts.down_proj"):
            for index, matrix in enumerate(tensor.unbind(0)):
                published[name.replace("down_proj", f"{index}.down_proj.weight")] = matrix
        elif name.endswith(".moe.shared_experts.gate_up_proj.weight"):
            for kind, matrix in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                published[name.replace("gate_up_proj", kind)] = matrix
        else:
            for theirs, ours in _RENAMED.items() if flash_names else ():
                name = name.replace(ours, theirs)
            published[name] = tensor
    return published


def _accept_published_names(model: DiT, state_dict: dict, prefix: str, *_) -> None:
    """Load hook: published names become ours in place, and a missing `pos_embed`, which is fixed, is filled in."""
    if prefix:  # the model is part of a larger module: its names are not the published ones
        return
    renamed = from_published(state_dict)
    if "pos_embed" not in renamed:
        side = model.config.input_size // model.config.patch_size
        renamed["pos_embed"] = position_embedding(model.config.hidden_size, side)
    state_dict.clear()
    state_dict.update(renamed)


# Fields of DiTConfig that change the function and no shape: of a file that does not describe itself, a flag must tell.
UNSEEN = ("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor")


def infer_config(shapes: Mapping[str, tuple[int, ...]], **known) -> DiTConfig:
    """The architecture of a state dict from its names and shapes alone.

    What shapes cannot tell comes from the table of sizes (heads), from the published models (label dropout, two shared
    experts, two experts per token, their plain weights), or from `known`, which wins: `num_heads`,
    `num_experts_per_tok`, `input_size` of a file without `pos_embed`.

    Raises:
        UsageError: these are not the names of a DiT, or the heads are in no table.
    """
    expected = ["x_embedder.proj.weight", "y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight"]
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
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
    }
    if "pos_embed" in shapes:
        config["input_size"] = math.isqrt(shapes["pos_embed"][1]) * patch
    if config["qk_norm"]:
        config["num_heads"] = width // shapes["blocks.0.attn.q_norm.weight"][0]
    elif heads := {row["num_heads"] for row in DiT_models.values() if row["hidden_size"] == width}:
        config["num_heads"] = heads.pop()
    elif "num_heads" not in known:
        raise UsageError(f"hidden size {width} is in no row of the table of sizes, so the number of heads is unknown")

    moe_blocks = [i for i in range(depth) if f"blocks.{i}.moe.gate.weight" in shapes]
    if moe_blocks:
        prefix = f"blocks.{moe_blocks[0]}.moe"
        shared = shapes.get(f"{prefix}.shared_experts.down_proj.weight", (0, 0))[1]
        config["num_experts"] = shapes[f"{prefix}.gate.weight"][0]
        config["num_experts_per_tok"] = min(2, config["num_experts"])
        config["expert_mlp"] = "gelu" if f"{prefix}.experts.fc1_weight" in shapes else "swiglu"
        down = "fc2_weight" if config["expert_mlp"] == "gelu" else "down_proj"
        config["expert_ratio"] = shapes[f"{prefix}.experts.{down}"][2] / width
        config["num_shared_experts"] = 2 if shared else 0
        config["shared_expert_ratio"] = shared / (2 * width) if shared else 1.0
        config["moe_layers"] = "all" if len(moe_blocks) == depth else ",".join(map(str, moe_blocks))
    dense_blocks = [i for i in range(depth) if f"blocks.{i}.mlp.fc1.weight" in shapes]
    if dense_blocks:
        config["mlp_ratio"] = shapes[f"blocks.{dense_blocks[0]}.mlp.fc1.weight"][0] / width
    if "pos_embed" in shapes:
        known.pop("input_size", None)
    return DiTConfig(**(config | known))
