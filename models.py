"""Diffusion transformers, dense (DiT, arXiv 2212.09748) and sparse (DiT-MoE, arXiv 2407.11633).

N images · C latent channels · H, W latent size · p patch · T = H*W/p^2 tokens · D hidden width · h heads · d = D/h

`DiT_models` is the table of sizes; `build_model(name, **options)` makes one. Parameters keep the names of the published
checkpoints, except that experts are stacked; `load_state_dict` takes both spellings, and `to_published` writes the
published one.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cli import UsageError, unknown_name
from compiling import Compiling
from conditions import Prompts
from configuration import DiTConfig, build_config
from families import from_published
from kernels import AdaptiveLayerNorm, compute_dtype
from layers import (
    ATTENTION_BACKENDS,
    MLPS,
    NORMS,
    POSITIONS,
    Attention,
    CaptionEmbedder,
    CaptionSummary,
    CrossAttention,
    LabelEmbedder,
    Modulation,
    PatchEmbed,
    Readout,
    RowEnds,
    SharedModulation,
    TableModulation,
    TimestepEmbedder,
    position_embedding,
)
from moe import MoE
from parametrization import PARAMETRIZATIONS, readout_multiplier
from routers import Routing


def build_model(name: str, **options) -> "DiT":
    """A freshly initialised model: `build_model("DiT-S/2", num_experts=8)`."""
    return DiT(build_config(name, **options))


# --------------------------------------------------------------------------------------------------------------- model


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


def modulation(config: DiTConfig, count: int) -> nn.Module:
    """What makes the `count` shifts, scales and gates of a block."""
    if config.modulation == "single":
        return TableModulation(config.hidden_size, count)
    return Modulation(config.modulation_width, config.hidden_size, count)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-zero conditioning; its MLP is dense or a mixture of experts."""

    def __init__(self, config: DiTConfig, is_moe: bool):
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = (NORMS[config.norm](width) for _ in range(2))
        gated = config.caption_width if config.reading == "gated" else 0
        self.attn = Attention(width, config.num_heads, config.kv_heads, config.qk_norm, config.attention_bias, gated)
        self.attn.pairs_halves = config.positions == "rope2d-half"
        if is_moe:
            self.moe = MoE(width, config.experts)
        else:
            self.mlp = MLPS[config.mlp](width, config.mlp_width)
        self.is_moe = is_moe
        self.reads = config.caption_width > 0 and config.reading == "cross"
        if self.reads:
            self.cross_attn = CrossAttention(width, config.num_heads)
        self.adaLN_modulation = modulation(config, 6)
        self.is_modulated = False  # what comes for a condition is what `adaLN_modulation` would make of it
        self.checkpointing = "none"  # a key of CHECKPOINTING

    def forward(self, x: Tensor, c: Tensor, *more: Tensor | None) -> tuple[Tensor, Routing | None]:
        """`compute`, and in the backward again as much of it as `checkpointing` says."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, c, *more)
        return checkpoint(self.compute, x, c, *more, use_reentrant=False, **CHECKPOINTING[self.checkpointing])

    def compute(
        self,
        x: Tensor,
        c: Tensor,
        rotation: Tensor | None = None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        null: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """(N, T, D) tokens, (N, c) condition, (T, d/2, 2) rotary positions, a text (N, L, D), its mask (N, L).

        null (N,) says which images are of nothing, for a router that asks.
        """
        modulation = c if self.is_modulated else self.adaLN_modulation(c)  # (N, 6D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        dtype = compute_dtype(self.attn.qkv.weight)
        x = x + gate_a.unsqueeze(1) * self.attn(self.norm1(x, shift_a, scale_a, dtype), rotation, text, mask)
        if self.reads:
            x = x + self.cross_attn(x, text, mask)
        tokens = self.norm2(x, shift_m, scale_m, dtype)
        out, routing = self.moe(tokens, null) if self.is_moe else (self.mlp(tokens), None)
        return x + gate_m.unsqueeze(1) * out, routing


class FinalLayer(nn.Module):
    """Norm, modulation and projection to patches: (N, T, D) -> (N, T, p*p*out_channels)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.linear = Readout(width, config.patch_size**2 * config.out_channels, readout_multiplier(config))
        self.adaLN_modulation = modulation(config, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(AdaptiveLayerNorm.apply(x, shift, scale, compute_dtype(self.linear.weight)))


class DiT(nn.Module):
    """Predicts noise, velocity or data, and (learn_sigma) a variance, from a noised latent, a time and a label."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.modulation_width)
        if config.reading == "gated" and config.caption_width:
            self.y_embedder = CaptionSummary(config.caption_width, config.modulation_width)
        elif config.caption_width:
            self.y_embedder = CaptionEmbedder(config.caption_width, config.caption_length, config.hidden_size)
        else:
            self.y_embedder = LabelEmbedder(config.condition.rows, config.modulation_width)
        if config.size_condition:
            self.csize_embedder, self.ar_embedder = (TimestepEmbedder(config.modulation_width // 3) for _ in range(2))
        if config.modulation == "single":
            self.t_block = SharedModulation(config.modulation_width, config.hidden_size)
        if config.row_ends:
            self.row_ends = RowEnds(config.hidden_size)
        self.register_buffer("pos_embed", self._position_table())
        self.blocks = nn.ModuleList(DiTBlock(config, is_moe=i in config.moe_indices) for i in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.stacked = None  # of `stack_modulations`
        self.residual_dtype: torch.dtype | None = None  # of the tokens between blocks; None: that of the weights
        self.init_weights()
        self.register_load_state_dict_pre_hook(_accept_published_names)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | tuple,
        return_routing: bool = False,
        return_tokens: int = 0,
    ):
        """One evaluation of the network.

        Args:
            x: (N, C, H, W) noised latents; with `row_ends` also a list of N images (C, H, W) of several sizes.
            t: (N,) network time, in the units the network was trained with (DDPM: 0..999; rectified flow: 0..1).
            condition: what each image is of, a batch of `config.condition`: labels (N,) int64, its null among them, or
                `Prompts` (features (N, L, C), mask (N, L), null (N,) bool or left out).
            return_routing: also return the `Routing` of every MoE layer.
            return_tokens: also return the tokens behind so many blocks, of images of one size; 0: none.

        Returns:
            (N, out_channels, H, W), or a list of such images; or a tuple of that, a list of L `Routing` and tokens
            (N, T, D) of the patches, as far as these are asked for.
        """
        x, sizes = self._embed(x)  # (N, T, D)
        # From here on fp32 under autocast, if nothing else was asked for.
        x = x.to(self.x_embedder.proj.weight.dtype) if self.pos_embed is None else x + self.pos_embed
        x = x if self.residual_dtype is None else x.to(self.residual_dtype)
        c, rotation, reading, null = self.t_embedder(t), self._rotation(x.device), (None, None), None  # (N, c)
        if self.config.caption_width:
            features, mask, null = Prompts(*condition)
            mask = mask.bool()
            summary, text = self.y_embedder(features, mask, null)
            c, reading = c if summary is None else c + summary, (text, mask)
            c = c + self._sizes(c) if self.config.size_condition else c
        else:
            c = c + self.y_embedder(condition)
            null = None if self.config.null_class is None else condition == self.config.null_class
        if self.config.expert_count == self.config.num_experts:  # no router asks
            null = None
        routings, tokens = [], None
        for depth, (block, modulation) in enumerate(zip(self.blocks, self._modulations(c), strict=True), start=1):
            x, routing = block(x, modulation, rotation, *reading, null)
            if routing is not None:
                routings.append(routing)
            if depth == return_tokens:
                tokens = x if sizes is None else RowEnds.without(x, *sizes[0])
        x = self._images(self.final_layer(x, c), sizes)
        more = [*([routings] if return_routing else ()), *([tokens] if return_tokens else ())]
        return (x, *more) if more else x

    def _modulations(self, c: Tensor) -> Sequence[Tensor]:
        """What each block is told of the condition (N, c)."""
        if self.stacked is not None:
            return F.linear(F.silu(c), *self.stacked).chunk(len(self.blocks), dim=1)
        return [self.t_block(c) if self.config.modulation == "single" else c] * len(self.blocks)

    def stack_modulations(self) -> None:
        """For sampling: one product makes the modulations of all blocks; their weights are laid side by side in memory.

        After the model is on its device, in its dtype; without effect where blocks share a modulation.
        """
        if self.config.modulation == "single":
            return
        projections = [block.adaLN_modulation[1] for block in self.blocks]
        self.stacked = []
        for name in ("weight", "bias"):
            parameters = [getattr(projection, name) for projection in projections]
            together = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, together.chunk(len(parameters)), strict=True):
                parameter.data = part
            self.stacked.append(together)
        for block in self.blocks:
            block.is_modulated = True

    def _embed(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]] | None]:
        """The tokens (N, T, D), and the rows and columns of each image of a list, or of all of a tensor, if it tells.

        Raises:
            UsageError: images of several sizes for a network whose rows have no ends.
        """
        patch, dtype = self.config.patch_size, self.x_embedder.proj.weight.dtype
        if not self.config.row_ends:
            if not isinstance(x, Tensor):
                raise UsageError("a list of images of several sizes needs a network with row_ends, as Large-DiT-T2I")
            return self.x_embedder(x.to(dtype)), None
        images = [x] if isinstance(x, Tensor) else [image[None] for image in x]
        sizes = [(image.shape[2] // patch, image.shape[3] // patch) for image in images]
        grids = [self.x_embedder(i.to(dtype)).unflatten(1, size) for i, size in zip(images, sizes, strict=True)]
        tokens = self.row_ends(grids, self.config.tokens)
        return tokens, sizes if not isinstance(x, Tensor) else sizes * len(x)

    def _images(self, x: Tensor, sizes: list[tuple[int, int]] | None) -> Tensor | list[Tensor]:
        """(N, T, p*p*C) -> (N, C, H, W), or one by one where sizes differ."""
        if sizes is None:
            return self.unpatchify(x, self.config.side)
        if len(set(sizes)) == 1:
            return self.unpatchify(RowEnds.without(x, *sizes[0]), sizes[0][0])
        parts = zip(x.split(1), sizes, strict=True)
        return [self.unpatchify(RowEnds.without(part, *size), size[0])[0] for part, size in parts]

    def _sizes(self, c: Tensor) -> Tensor:
        """(N, c): what the condition knows of the height, width and ratio of images, all of them square."""
        side, one = c.new_full((len(c),), 8.0 * self.config.input_size), c.new_ones(len(c))
        return torch.cat([self.csize_embedder(side), self.csize_embedder(side), self.ar_embedder(one)], dim=1)

    def _position_table(self) -> Tensor | None:
        config = self.config
        if config.positions != "sincos":
            return None
        return position_embedding(config.hidden_size, config.side, config.position_scaling)

    def _rotation(self, device: torch.device) -> Tensor | None:
        table, config = POSITIONS[self.config.positions], self.config
        if table is None:
            return None
        head = config.hidden_size // config.num_heads
        return table(config.side, head, device, config.position_scaling, config.row_ends)

    def unpatchify(self, x: Tensor, rows: int) -> Tensor:
        """(N, T, p*p*C) -> (N, C, H, W)."""
        p = self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (rows, -1))  # (N, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def units(self) -> list[list[nn.Module]]:
        """The parts that are initialised, and may be sharded, one after another: the model's ends, then each block."""
        ends = [self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer]
        ends += [self.t_block] if self.config.modulation == "single" else []
        ends += [self.row_ends] if self.config.row_ends else []
        ends += [self.csize_embedder, self.ar_embedder] if self.config.size_condition else []
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
        table = self._position_table()
        self.pos_embed = None if table is None else table.to(device)

    def init_weights(self) -> None:
        """Draw all parameters, unit by unit."""
        for unit in self.units():
            self.init_unit(unit)

    @torch.no_grad()
    def init_unit(self, unit: list[nn.Module]) -> None:
        """Draw the parameters of a unit as `DiTConfig.parametrization` says.

        Every one is written: what a model on the meta device gets before is memory as it was left.
        """
        PARAMETRIZATIONS[self.config.parametrization].draw(unit, self.config)

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

    def compile_blocks(self, fullgraph: bool = True, **options) -> None:
        """torch.compile each block in place: one compilation serves all, and parameter names stay.

        Last of all: a copy that is made afterwards would compute with this model's weights. `fullgraph` False: parts of
        a block escape compilation. Options as `Compiling` has them.
        """
        compiling = Compiling(**options)
        for block in self.blocks:
            if block.checkpointing == "selective":  # the compiler has to see what is kept
                block.forward = compiling(block.forward, fullgraph)
            else:  # what computes a second time is the same code, which rounds alike
                block.compute = compiling(block.compute, fullgraph)


def count_parameters(model: DiT) -> tuple[int, int]:
    """(total, activated): activated leaves out the experts that a token does not use. Counts the fixed `pos_embed`."""
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    config = model.config
    unused = 0
    for index in config.moe_indices:
        stacked = sum(parameter.numel() for parameter in model.blocks[index].moe.experts.parameters())
        unused += stacked // config.expert_count * (config.expert_count - config.num_experts_per_tok)
    return total, total - unused


def _accept_published_names(model: DiT, state_dict: dict, prefix: str, *_) -> None:
    """Load hook: published names become ours in place, and a missing `pos_embed`, which is fixed, is filled in."""
    if prefix:  # the model is part of a larger module: its names are not the published ones
        return
    renamed = from_published(state_dict)
    if "pos_embed" not in renamed and (table := model._position_table()) is not None:
        renamed["pos_embed"] = table
    state_dict.clear()
    state_dict.update(renamed)
