"""The parts of diffusion transformers: norms, attention, positions, feed-forwards, embedders. They take plain numbers.

N images · C latent channels · H, W latent size · p patch · T = H*W/p^2 tokens · D hidden width · h heads · d = D/h
c width of the conditioning

Each kind of part that a model may choose is a row of a table: `NORMS`, `QK_NORMS`, `POSITIONS`, `MLPS`.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from cli import UsageError
from kernels import NORM_EPS, RMS_EPS, SwiGLU

# --------------------------------------------------------------------------------------------------------------- roles

ROLES = ("input", "hidden", "modulation", "output", "vector", "table", "router", "expert")


def roles_of(model: nn.Module) -> dict[str, str]:
    """The role of each parameter, by name: what decides how it is drawn and updated (`parametrization.RULES`).

    A module declares those of its own parameters in a dictionary `roles`. Otherwise a matrix is hidden, from width to
    width, and what has one dimension a vector: a bias, or a norm's weight.
    """
    roles = {}
    for prefix, module in model.named_modules():
        declared = getattr(module, "roles", {})
        for name, parameter in module.named_parameters(recurse=False):
            role = declared.get(name, "hidden" if parameter.ndim > 1 else "vector")
            assert role in ROLES, f"{prefix}.{name} declares {role!r}"
            roles[f"{prefix}.{name}" if prefix else name] = role
    return roles


# --------------------------------------------------------------------------------------------------------------- norms


class AdaptiveNorm(nn.Module):
    """LayerNorm without parameters, then scale and shift: (N, T, D) with (N, D) each -> (N, T, D) of `dtype`."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.AdaptiveLayerNorm.apply(x, shift, scale, dtype)


class AdaptiveRMSNorm(nn.Module):
    """The same of RMSNorm with a weight (arXiv 1910.07467), in fp32 whatever autocast says."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.AdaptiveRMSNorm.apply(x, self.weight, shift, scale, dtype)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


NORMS = {"layer": AdaptiveNorm, "rms": AdaptiveRMSNorm}

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
    """(N, h, T, d), keys and values perhaps of fewer heads -> (N, h, T, d), by a value of `ATTENTION_BACKENDS`."""
    if callable(backend):
        return backend(q, k, v)
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


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


class QKNorm(nn.LayerNorm):
    """LayerNorm that leaves its input in bf16, where autocast would make fp32 copies; the kernel adds up in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


QK_NORMS = ("none", "head", "full")  # of each head's query and key, or of all heads' at once


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, D) without mask.

    Args:
        num_kv_heads: fewer keys and values than queries, each for as many heads (arXiv 2305.13245).
        qk_norm: one of `QK_NORMS`.
        caption_width: of the features of a text that the same queries read besides; 0: they read none.
        bias: of both projections. Without, query, key and value are projections that are drawn one by one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_norm: str = "none",
        bias: bool = True,
        caption_width: int = 0,
    ):
        super().__init__()
        head, kv_heads = hidden_size // num_heads, num_kv_heads or num_heads
        self.heads = (num_heads, kv_heads, kv_heads)
        self.rows = [head * heads for heads in self.heads]
        self.backend = None  # a value of ATTENTION_BACKENDS
        self.qkv = nn.Linear(hidden_size, sum(self.rows), bias=bias)  # rows: [q; k; v] x heads x d
        if not bias:
            self.qkv.drawn_apart = self.rows
        self.norms_heads = qk_norm == "head"
        widths, eps = ((head, head), NORM_EPS) if qk_norm == "head" else (self.rows[:2], RMS_EPS)
        self.q_norm = nn.Identity() if qk_norm == "none" else QKNorm(widths[0], eps)
        self.k_norm = nn.Identity() if qk_norm == "none" else QKNorm(widths[1], eps)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        if caption_width:
            self.text = GatedReading(caption_width, head, self.heads, qk_norm)
        self.reads = caption_width > 0
        self.pairs_halves = False  # of positions rope2d-half

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, text: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x).split(self.rows, dim=-1)  # (N, T, heads * d)
        if not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.unflatten(-1, (heads, -1)) for each, heads in zip((q, k, v), self.heads, strict=True))
        # Normed before heads and tokens change places: kernels lay their output out as q, so that it needs no copy.
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.pairs_halves:
            q, k = neighbours_of_halves(q), neighbours_of_halves(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = attend(q, k, v, self.backend)  # (N, h, T, d)
        if self.reads:
            out = out + self.text(q, text, mask).to(out.dtype)
        return self.proj(out.transpose(1, 2).flatten(2))  # (N, T, D)


class GatedReading(nn.Module):
    """What the queries of a self-attention read in a text's features (N, L, C), times tanh of a gate for each head.

    As Large-DiT-T2I has it: the text's keys are not turned, and the result joins that of the self-attention.
    """

    def __init__(self, caption_width: int, head: int, heads: tuple[int, int, int], qk_norm: str):
        super().__init__()
        self.heads = heads
        width, self.norms_heads = head * heads[1], qk_norm == "head"
        self.norm = nn.RMSNorm(caption_width, RMS_EPS)
        self.kv = nn.Linear(caption_width, 2 * width, bias=False)  # rows: [k; v] x heads x d
        self.kv.drawn_apart, self.kv.roles = [width, width], {"weight": "input"}
        normed, eps = (head, NORM_EPS) if self.norms_heads else (width, RMS_EPS)
        self.k_norm = nn.Identity() if qk_norm == "none" else QKNorm(normed, eps)
        self.gate = nn.Parameter(torch.zeros(heads[0]))

    def forward(self, q: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(N, h, T, d) queries, (N, L, C) features, (N, L) which there are -> (N, h, T, d)."""
        text = F.rms_norm(text.float(), self.norm.normalized_shape, self.norm.weight.float(), self.norm.eps)
        k, v = self.kv(text.to(self.kv.weight.dtype)).chunk(2, dim=-1)  # (N, L, heads * d)
        if not self.norms_heads:
            k = self.k_norm(k)
        k, v = (each.unflatten(-1, (heads, -1)) for each, heads in zip((k, v), self.heads[1:], strict=True))
        if self.norms_heads:
            k = self.k_norm(k)
        k, v = (each.transpose(1, 2).to(q.dtype) for each in (k, v))
        shared = self.heads[0] != self.heads[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], enable_gqa=shared)
        return self.gate.tanh().view(-1, 1, 1) * out

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)
        nn.init.ones_(self.norm.weight)


class CrossAttention(nn.Module):
    """What the tokens (N, T, D) read in a text (N, L, D), of which `mask` (N, L) says what there is."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)  # rows: [k; v] x heads x d
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.num_heads, -1)) for each in (self.q_linear(x), *self.kv_linear(text).chunk(2, -1))
        )
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (N, h, T or L, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.proj(out.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------------------------------- positions


THETA = 1e4  # of rotary positions, as published
MOST_POSITIONS = 4096  # of 1-D rotary ones, as published


def rotary_1d(side: int, head: int, device: torch.device, scaling: float = 1.0, ends: bool = False) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of side*side tokens in raster order: (T, d/2, 2) fp32, cosine and sine.

    Args:
        scaling: what positions are divided by.
        ends: the sequence is that of `RowEnds`.
    """
    count = sequence_length(side) if ends else side * side
    return _rotations(torch.arange(count, device=device) / scaling, head)


def rotary_2d(side: int, head: int, device: torch.device, scaling: float = 1.0, ends: bool = False) -> Tensor:
    """The same with the first half of each head turned by the row, the second by the column; there are no ends."""
    place = torch.arange(side * side, device=device)
    row, column = place // side / scaling, place % side / scaling
    return torch.cat([_rotations(row, head // 2), _rotations(column, head // 2)], dim=1)


def _rotations(positions: Tensor, width: int) -> Tensor:
    """(T,) -> (T, width/2, 2)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions.float()[:, None] * (1.0 / THETA**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbours of (N, T, h, d) by its token's angles; in fp32, whatever autocast says."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (N, T, h, d/2)
    cos, sin = rotation.unsqueeze(1).unbind(-1)  # (T, 1, d/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


POSITIONS = {  # how a token knows its place: a table, or rotations
    **{"sincos": None, "rope": rotary_1d, "rope2d": rotary_2d},
    "rope2d-half": rotary_2d,  # whose pairs are of both halves of what is turned by a row or a column
}


def neighbours_of_halves(x: Tensor) -> Tensor:
    """(N, T, h, d) whose pairs are (i, i + d/4) of each half -> the same with pairs side by side.

    Of query and key alike: what attention sees of them does not depend on the order.
    """
    return x.unflatten(-1, (2, 2, -1)).transpose(-1, -2).flatten(-3)


# --------------------------------------------------------------------------------------------------------- feed-forward


class GELUMLP(nn.Module):
    """The dense DiT's two-layer perceptron with tanh-GELU."""

    def __init__(self, hidden_size: int, width: int, out_features: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, out_features or hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLUMLP(nn.Module):
    """down(silu(gate x) * up x) without biases (arXiv 2002.05202); gate and up are one product."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.gate_up_proj.drawn_apart = [width, width]
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_up_proj(x)))


class SiLUMLP(GELUMLP):
    """The same with SiLU, as DSMoE has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


MLPS = {"gelu": GELUMLP, "swiglu": SwiGLUMLP, "silu": SiLUMLP}

# ---------------------------------------------------------------------------------------------------------- embeddings


class PatchEmbed(nn.Module):
    """Cut a latent into p x p patches and project each: (N, C, H, W) -> (N, T, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.proj.roles = {"weight": "input"}

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


def sequence_length(side: int) -> int:
    """Of `RowEnds`: room for any image of side*side patches that has at most 2*side rows."""
    return side * (side + 2)


class RowEnds(nn.Module):
    """Patches of images of several sizes as sequences of one length: a learned token ends each row, others fill it up.

    As Large-DiT-T2I has it; nothing masks these tokens, whose outputs are left out.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.eol_token = nn.Parameter(torch.empty(hidden_size))
        self.pad_token = nn.Parameter(torch.empty(hidden_size))
        self.roles = {"eol_token": "table", "pad_token": "table"}

    def forward(self, grids: Sequence[Tensor], length: int) -> Tensor:
        """Patches (N, rows, columns, D), or of each image (1, rows, columns, D) -> (N, length, D).

        Raises:
            UsageError: an image has more.
        """
        rows = []
        for grid in grids:
            end = self.eol_token.to(grid.dtype).expand(*grid.shape[:2], 1, -1)
            row = torch.cat([grid, end], dim=2).flatten(1, 2)
            if row.shape[1] > length:
                size = f"{grid.shape[1]} rows of {grid.shape[2]} patches"
                raise UsageError(f"an image of {size} does not fit into a sequence of {length} tokens")
            pad = self.pad_token.to(grid.dtype).expand(len(row), length - row.shape[1], -1)
            rows.append(torch.cat([row, pad], dim=1))
        return torch.cat(rows)

    @staticmethod
    def without(x: Tensor, rows: int, columns: int) -> Tensor:
        """(N, length, ...) -> (N, rows * columns, ...): the patches alone."""
        return x[:, : rows * (columns + 1)].unflatten(1, (rows, columns + 1))[:, :, :columns].flatten(1, 2)

    def reset_parameters(self) -> None:
        for token in (self.eol_token, self.pad_token):
            nn.init.normal_(token, std=0.02)


class TimestepEmbedder(nn.Module):
    """Network time (N,) -> (N, c)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.mlp[0].roles = {"weight": "input"}

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) -> (N, c); the last row is the null class where the model has one.

    Dropping labels is the training loop's business, so that a forward pass has no randomness of its own.
    """

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)
        self.embedding_table.roles = {"weight": "table"}

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Modulation(nn.Sequential):
    """A condition (N, c) -> (N, count * D): shifts, scales and gates."""

    def __init__(self, width: int, hidden_size: int, count: int):
        super().__init__(nn.SiLU(), nn.Linear(width, count * hidden_size))
        self[1].roles = {"weight": "modulation"}


class CaptionEmbedder(nn.Module):
    """Features of a text's tokens (N, L, C) -> (N, L, D); where `null` (N,) says so, those of a fixed text of noise."""

    def __init__(self, width: int, length: int, hidden_size: int):
        super().__init__()
        self.y_proj = GELUMLP(width, hidden_size, hidden_size)
        self.y_proj.fc1.roles = {"weight": "input"}
        self.register_buffer("y_embedding", torch.empty(length, width))  # never trained

    def forward(self, features: Tensor, mask: Tensor, null: Tensor | None) -> tuple[None, Tensor]:
        """What joins the condition: nothing; and what blocks read."""
        features = features.to(self.y_proj.fc1.weight.dtype)
        if null is not None:
            nothing = self.y_embedding[: features.shape[1]].to(features.dtype)
            features = torch.where(null[:, None, None], nothing, features)
        return None, self.y_proj(features)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.y_embedding, std=self.y_embedding.shape[1] ** -0.5)


class CaptionSummary(nn.Module):
    """The mean of a text's features (N, L, C), normed and projected to the condition (N, c); blocks read them as is."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, RMS_EPS)
        self.proj = nn.Linear(width, condition_width)
        self.proj.roles = {"weight": "input"}

    def forward(self, features: Tensor, mask: Tensor, null: Tensor | None) -> tuple[Tensor, Tensor]:
        """What joins the condition, and what blocks read. A text of nothing is the empty one, not `null`."""
        there = mask.unsqueeze(-1).float()
        mean = (features.float() * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return self.proj(self.norm(mean.to(self.norm.weight.dtype))), features

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.zeros_(self.proj.weight)


class SharedModulation(nn.Sequential):
    """A condition (N, c) -> (N, 6 * D), once for all blocks, which add tables (adaLN-single, arXiv 2310.00426)."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__(nn.SiLU(), nn.Linear(width, 6 * hidden_size))


class TableModulation(nn.Module):
    """What a block adds to a modulation that all share: (N, count * D), or (N, D) for each -> (N, count * D)."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(count, hidden_size))
        self.roles = {"table": "table"}

    def forward(self, c: Tensor) -> Tensor:
        return (self.table + c.unflatten(1, (-1, self.table.shape[1]))).flatten(1)


READINGS = ("cross", "gated")  # of texts: `CrossAttention` behind the self-attention, or `GatedReading` within it
MODULATIONS = ("block", "single")  # each block's own, or one for all and a table for each


class Readout(nn.Linear):
    """multiplier * (x W^T) + b: the last projection, whose product a parametrization may scale."""

    def __init__(self, in_features: int, out_features: int, multiplier: float = 1.0):
        super().__init__(in_features, out_features)
        self.multiplier = multiplier
        self.roles = {"weight": "output"}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.multiplier == 1 else self.weight * self.multiplier
        return F.linear(x, weight, self.bias)


def position_embedding(hidden_size: int, side: int, scaling: float = 1.0) -> Tensor:
    """(1, side*side, D) fixed sine-cosine: the first half of D from the column, the second from the row.

    Positions are divided by `scaling`.
    """
    frequencies = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] / scaling * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None].float()
