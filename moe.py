"""Sparse mixture of experts: route, sort, compute, combine; no host access, no capacity, no dropped token.

T tokens · D hidden width · E experts · K experts per token · F expert width · L MoE layers · P = T*K assignments

`MoE.forward` is the composition  router -> dispatch -> experts -> combine (+ shared expert).  The T*K assignments are
sorted by expert on the device, so that each expert's tokens are one contiguous segment and all experts are one grouped
matrix product. What the router decided is returned as a `Routing`: the balance loss, the log and the analysis read it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (
    Combine,
    Dispatch,
    FP32Linear,
    SwiGLU,
    compute_dtype,
    grouped_mm,
    inverse_permutation,
    segments_mm,
    sort_by_expert,
)


class Routing(NamedTuple):
    """What a router decided for T tokens, and the order in which the experts will see them."""

    probs: Tensor  # (T, E) fp32, softmax over all experts, differentiable
    expert_ids: Tensor  # (T, K) int64, the chosen experts
    weights: Tensor  # (T, K) fp32, what each chosen expert's output is multiplied by, differentiable
    order: Tensor  # (P,) int64, assignment t*K+k at each place of the order sorted by expert
    offsets: Tensor  # (E,) int32, where each expert's segment of that order ends

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int32, how many of the P assignments each expert got."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1))


class Router(nn.Module):
    """Softmax top-k gate without bias, in fp32 whatever autocast says (arXiv 2407.11633, eq. 1).

    The weights of the chosen experts are their probabilities over all E experts; with `normalize` they are divided by
    their sum over the K chosen ones; then all are multiplied by `scaling_factor`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, normalize: bool = False, scaling_factor: float = 1.0
    ):
        super().__init__()
        self.top_k, self.normalize, self.scaling_factor = top_k, normalize, scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.roles = {"weight": "router"}

    def forward(self, x: Tensor) -> Routing:  # (T, D)
        probs = FP32Linear.apply(x, self.weight).softmax(dim=-1)  # (T, E)
        weights, expert_ids = probs.topk(self.top_k, dim=-1, sorted=False)  # (T, K)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.scaling_factor != 1:
            weights = weights * self.scaling_factor
        order, offsets = sort_by_expert(expert_ids, num_experts=self.weight.shape[0])
        return Routing(probs, expert_ids, weights, order, offsets)


class Experts(nn.Module):
    """E experts of one kind with stacked parameters, so that each projection of all experts is one product.

    `backend` names how the products run. "grouped_mm" is the fast one (all experts in one kernel, no host access);
    "loop" goes over the segments one by one: the oracle of the tests, and the way for float64.
    """

    backends = ("grouped_mm", "loop")

    def __init__(self):
        super().__init__()
        self.backend = "grouped_mm"

    def product(self, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """(P, I) in expert order x (E, O, I), + (E, O) -> (P, O), in the precision of x."""
        product = {"grouped_mm": grouped_mm, "loop": segments_mm}[self.backend]
        weight, bias = (p.to_local() if hasattr(p, "to_local") else p for p in (weight, bias))  # experts dealt out
        return product(x, weight.to(x.dtype), offsets, None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # (P, D) in expert order, (E,) -> (P, D)
        raise NotImplementedError

    def hidden_units(self) -> dict[str, Tensor]:
        """Views (E, F, I) of the parameters, in which row f is what hidden unit f has of each."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Every projection xavier-uniform on its own, biases zero."""
        raise NotImplementedError


class SwiGLUExperts(Experts):
    """down(silu(gate x) * up x) without biases, as published; gates and ups are one product."""

    def __init__(self, hidden_size: int, width: int, num_experts: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))  # (E, 2F, D)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))  # (E, D, F)
        self.roles = {"gate_up_proj": "expert", "down_proj": "expert"}

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        hidden = SwiGLU.apply(self.product(x, self.gate_up_proj, offsets))  # (P, F)
        return self.product(hidden, self.down_proj, offsets)

    def hidden_units(self) -> dict[str, Tensor]:
        gate, up = self.gate_up_proj.detach().chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": self.down_proj.detach().transpose(1, 2)}

    def init_weights(self) -> None:
        gates_and_ups = self.gate_up_proj.unflatten(1, (2, -1)).flatten(0, 1)  # (2E, F, D)
        for projection in (*gates_and_ups, *self.down_proj):
            nn.init.xavier_uniform_(projection)


class GELUExperts(Experts):
    """fc2(gelu(fc1 x)) with biases and tanh-GELU: the MLP of the dense DiT, for experts that are made from it."""

    def __init__(self, hidden_size: int, width: int, num_experts: int):
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, width, hidden_size))  # (E, F, D)
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, width))  # (E, F)
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, hidden_size, width))  # (E, D, F)
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, hidden_size))  # (E, D)
        self.roles = {"fc1_weight": "expert", "fc2_weight": "expert", "fc1_bias": "vector", "fc2_bias": "vector"}

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        hidden = F.gelu(self.product(x, self.fc1_weight, offsets, self.fc1_bias), approximate="tanh")  # (P, F)
        return self.product(hidden, self.fc2_weight, offsets, self.fc2_bias)

    def hidden_units(self) -> dict[str, Tensor]:
        fc1, bias, fc2 = (p.detach() for p in (self.fc1_weight, self.fc1_bias, self.fc2_weight))
        return {"fc1": fc1, "fc1_bias": bias.unsqueeze(2), "fc2": fc2.transpose(1, 2)}

    def init_weights(self) -> None:
        for projection in (*self.fc1_weight, *self.fc2_weight):
            nn.init.xavier_uniform_(projection)
        nn.init.zeros_(self.fc1_bias)
        nn.init.zeros_(self.fc2_bias)


EXPERTS = {"swiglu": SwiGLUExperts, "gelu": GELUExperts}


class LinearOnto(nn.Linear):
    """onto + x W^T, added in the product's own kernel."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        return torch.addmm(onto, x, self.weight.T)


class SharedExperts(nn.Module):
    """The always-on experts: n of them are one SwiGLU of n times the width, added to what the others gave."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.gate_up_proj.drawn_apart = [width, width]
        self.down_proj = LinearOnto(width, hidden_size)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:  # (T, D) each
        return self.down_proj(SwiGLU.apply(self.gate_up_proj(x)), out)


class ExpertsConfig(NamedTuple):
    """What a mixture of experts is made of."""

    width: int  # F, of each routed expert
    count: int  # E
    top_k: int  # K
    shared_width: int = 0  # of the shared expert; 0: none
    normalize: bool = False  # divide a token's K weights by their sum
    kind: str = "swiglu"  # of the routed experts, a key of `EXPERTS`
    scaling_factor: float = 1.0  # then multiply them by this


class MoE(nn.Module):
    """Mixture of experts in place of a transformer's MLP: out = sum_k weight_k * expert_k(x) + shared(x)."""

    def __init__(self, hidden_size: int, config: ExpertsConfig):
        super().__init__()
        self.gate = Router(hidden_size, config.count, config.top_k, config.normalize, config.scaling_factor)
        self.experts = EXPERTS[config.kind](hidden_size, config.width, config.count)
        self.shared_experts = SharedExperts(hidden_size, config.shared_width) if config.shared_width else None
        self.parallel = None  # an `ExpertParallel`, where `experts` holds a part of them only

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:  # (..., D) -> (..., D)
        tokens = x.flatten(0, -2).to(compute_dtype(next(self.experts.parameters())))  # (T, D)
        routing = self.gate(tokens)

        inverse = inverse_permutation(routing.order)  # assignment -> its place
        y = Dispatch.apply(tokens, inverse, self.gate.top_k)  # (P, D)
        if self.parallel is None:
            y = self.experts(y, routing.offsets)
        else:
            y = self.parallel(self.experts, y, routing.tokens_per_expert)
        out = Combine.apply(y, routing.weights, routing.order, inverse)  # (T, D)

        if self.shared_experts is not None:
            out = self.shared_experts(tokens, out)
        return out.view(x.shape), routing

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every projection xavier-uniform on its own, the gate kaiming-uniform with a = sqrt(5)."""
        self.experts.init_weights()
        nn.init.kaiming_uniform_(self.gate.weight, a=5**0.5)


def load_balancing_loss(routings: Sequence[Routing], sum_over_processes: Callable[[Tensor], Tensor] | None = None):
    """The balance loss of each MoE layer, before its factor alpha (arXiv 2407.11633, eq. 3; Switch, 2101.03961).

    sum_e f_e * P_e with f_e = E * (share of the P assignments that e got) and P_e = mean probability of e: 1 where
    routing is uniform, up to E where one expert takes all. The gradient flows through P_e alone.

    Args:
        routings: one per MoE layer, all with the same E.
        sum_over_processes: sums a tensor over all data-parallel processes; with it f_e is that of the global batch,
            and the mean over processes of this loss is the loss of the global batch.

    Returns:
        (L,) fp32.
    """
    counts = torch.stack([routing.tokens_per_expert for routing in routings]).float()  # (L, E)
    if sum_over_processes is not None:
        counts = sum_over_processes(counts)
    load = counts * counts.shape[1] / counts.sum(dim=1, keepdim=True)  # f
    importance = torch.stack([routing.probs.mean(dim=0) for routing in routings])  # P
    return (load * importance).sum(dim=1)


def load_statistics(tokens_per_expert: Tensor) -> dict[str, list[float]]:
    """How even (L, E) counts are, per layer: maximum over mean (1 to E) and coefficient of variation (0 if even)."""
    counts = tokens_per_expert.double()
    mean = counts.mean(dim=1)
    return {
        "load_max_over_mean": (counts.amax(dim=1) / mean).tolist(),
        "load_cv": (counts.std(dim=1, correction=0) / mean).tolist(),
    }


@torch.no_grad()
def router_entropy(routings: Sequence[Routing]) -> Tensor:
    """(L,) mean over tokens of the entropy of the router's probabilities, over log E: 1 undecided, 0 certain."""
    entropy = [torch.special.entr(routing.probs).sum(dim=-1).mean() for routing in routings]
    return torch.stack(entropy) / math.log(max(2, routings[0].probs.shape[1]))
