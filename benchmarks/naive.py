"""What the MoE layer is measured against: the published expert loop, padded products, and a dense MLP as the floor.

T tokens · D hidden width · E experts · K experts per token · F expert width · P = T*K assignments

Each but the dense one takes the place of `moe.MoE` in a block, and works on its weights.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import SwiGLU
from models import DiT
from moe import MoE, SwiGLUExperts, weighted


class NaiveRouting(NamedTuple):
    """As much of `moe.Routing` as the balance loss reads."""

    probs: Tensor  # (T, E) fp32
    expert_ids: Tensor  # (T, K) int64
    weights: Tensor  # (T, K) fp32

    @property
    def losses(self) -> dict[str, Tensor]:
        return {}

    @property
    def tokens_per_expert(self) -> Tensor:
        return F.one_hot(self.expert_ids.flatten(), self.probs.shape[1]).sum(dim=0)


class NaiveExpert(nn.Module):
    """down(silu(gate x) * up x) with three matrices of its own."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor):
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(matrix) for matrix in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class NaiveMoE(nn.Module):
    """The layer as the published code has it: expert by expert, the host asking the device where its tokens are.

    When training, every expert picks its rows by a boolean mask (two host accesses each). When sampling, assignments
    are sorted, the counts go to the host (one access), and each expert's output is added to its tokens' rows. The
    router works in fp32, as ours does, so that both choose the same experts.
    """

    def __init__(self, moe: MoE):
        super().__init__()
        self.gate, self.shared_experts = moe.gate, moe.shared_experts
        gates_ups, downs = moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach()
        pairs = zip(gates_ups, downs, strict=True)
        self.experts = nn.ModuleList(NaiveExpert(*gate_up.chunk(2), down) for gate_up, down in pairs)

    def forward(self, x: Tensor, null: Tensor | None = None) -> tuple[Tensor, NaiveRouting]:  # (..., D) -> (..., D)
        tokens = x.flatten(0, -2)  # (T, D)
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)  # (T, E)
        weights, expert_ids = probs.topk(self.gate.top_k, dim=-1, sorted=False)  # (T, K)
        experts = self._masked if torch.is_grad_enabled() else self._in_turn
        out = experts(tokens, expert_ids, weights)
        if self.shared_experts is not None:
            out = self.shared_experts(tokens, out)
        return out.view(x.shape), NaiveRouting(probs, expert_ids, weights)

    def _masked(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        flat = expert_ids.flatten()  # (P,)
        copies = tokens.repeat_interleave(expert_ids.shape[1], dim=0)  # (P, D)
        y = None
        for index, expert in enumerate(self.experts):
            mask = flat == index
            mine = expert(copies[mask])
            if y is None:  # autocast decides its dtype
                y = mine.new_empty(copies.shape)
            y[mask] = mine
        return (y.unflatten(0, expert_ids.shape) * weights.unsqueeze(-1).to(y.dtype)).sum(dim=1, dtype=y.dtype)

    def _in_turn(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        flat = expert_ids.flatten()
        order = flat.argsort()
        ends = flat.bincount(minlength=len(self.experts)).cumsum(dim=0).tolist()
        rows, out = order // expert_ids.shape[1], torch.zeros_like(tokens)
        begin = 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end > begin:
                mine = rows[begin:end]
                y = expert(tokens[mine])
                y.mul_(weights.flatten()[order[begin:end]].unsqueeze(-1))
                index = mine.unsqueeze(-1).repeat(1, y.shape[1])  # (its tokens, D)
                out.scatter_reduce_(0, index, y.to(out.dtype), reduce="sum")
            begin = end
        return out


class PaddedExperts(nn.Module):
    """Routed experts as batched products of equal size: every segment is filled up to the longest (one host access)."""

    def __init__(self, experts: SwiGLUExperts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:  # (P, D), (E,), (P,) -> (P, D)
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        longest = int(counts.max())
        places = torch.arange(len(x), dtype=offsets.dtype, device=x.device)
        expert_of_row = torch.searchsorted(offsets, places, right=True)
        slots = expert_of_row * longest + places - (offsets - counts)[expert_of_row]  # (P,)
        padded = x.new_zeros(len(offsets) * longest, x.shape[1]).index_copy(0, slots, x)
        hidden = SwiGLU.apply(padded.unflatten(0, (len(offsets), longest)) @ self.gate_up_proj.mT)  # (E, longest, F)
        return weighted((hidden @ self.down_proj.mT).flatten(0, 1).index_select(0, slots), weights)


class DenseMLP(nn.Module):
    """A SwiGLU of as many FLOPs a token as a MoE layer's experts, K*F + S wide: no routing, no gathers."""

    def __init__(self, moe: MoE):
        super().__init__()
        hidden, width = moe.experts.down_proj.shape[1:]  # D, F
        width *= moe.gate.top_k
        if moe.shared_experts is not None:
            width += moe.shared_experts.down_proj.weight.shape[1]
        like = moe.experts.down_proj
        self.gate_up = nn.Parameter(hidden**-0.5 * torch.randn(2 * width, hidden).to(like))
        self.down = nn.Parameter(width**-0.5 * torch.randn(hidden, width).to(like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(SwiGLU.apply(F.linear(x, self.gate_up)), self.down)


WAYS = ("naive", "loop", "padded", "grouped_mm", "dense")


def in_another_way(moe: MoE, way: str) -> nn.Module:
    """A layer that computes what `moe` does in one of `WAYS`, on the same weights ("dense": as much, on its own)."""
    if way == "naive":
        return NaiveMoE(moe)
    if way == "dense":
        return DenseMLP(moe)
    other = copy.deepcopy(moe, {id(parameter): parameter for parameter in moe.parameters()})
    if way == "padded":
        other.experts = PaddedExperts(other.experts)
    else:
        other.experts.backend = way
    return other


def naive_model(model: DiT) -> DiT:
    """The same network with every MoE layer in the naive form, and with weights of its own."""
    other = copy.deepcopy(model)
    for block in other.blocks:
        if block.is_moe:
            block.moe = NaiveMoE(block.moe)
    return other
