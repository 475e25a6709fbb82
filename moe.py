"""Sparse mixture of experts: route, sort, compute, combine; no host access, no capacity, no dropped token.

T tokens · D hidden width · E experts · K experts per token · F expert width · L MoE layers · P = T*K assignments

`MoE.forward` is the composition  router -> dispatch -> experts -> combine (+ shared expert).  Assignments are sorted by
expert on the device, so that each expert's tokens are one contiguous segment and all experts are one grouped matrix
product. What the router decided is returned as a `Routing`: losses, the log and the analysis read it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import SwiGLU, SwiGLUDown, Weighted, compute_dtype, grouped_mm, segments_mm
from layers import GELUMLP
from routers import ROUTERS, RouterConfig, Routing, Where


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
        return product(x, as_used(weight, x), offsets, None if bias is None else as_used(bias, x))

    def forward(self, x: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """(P, D) in expert order, (E,) -> (P, D), times (P,) weights where they are given."""
        raise NotImplementedError

    def hidden_units(self) -> dict[str, Tensor]:
        """Views (E, F, I) of the parameters, in which row f is what hidden unit f has of each."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Every projection xavier-uniform on its own, biases zero."""
        raise NotImplementedError


def as_used(parameter: Tensor, x: Tensor) -> Tensor:
    """What a product with x is computed with; of experts that are dealt out, those that are here."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).to(x.dtype)


def weighted(y: Tensor, weights: Tensor | None) -> Tensor:
    return y if weights is None else Weighted.apply(y, weights)


class SwiGLUExperts(Experts):
    """down(silu(gate x) * up x) without biases, as published; gates and ups are one product."""

    def __init__(self, hidden_size: int, width: int, num_experts: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))  # (E, 2F, D)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))  # (E, D, F)
        self.roles = {"gate_up_proj": "expert", "down_proj": "expert"}

    def forward(self, x: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        gate_up = self.product(x, self.gate_up_proj, offsets)  # (P, 2F)
        if self.backend == "grouped_mm":
            return SwiGLUDown.apply(gate_up, weights, as_used(self.down_proj, x), offsets)
        return weighted(self.product(SwiGLU.apply(gate_up), self.down_proj, offsets), weights)

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

    def forward(self, x: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        hidden = F.gelu(self.product(x, self.fc1_weight, offsets, self.fc1_bias), approximate="tanh")  # (P, F)
        return weighted(self.product(hidden, self.fc2_weight, offsets, self.fc2_bias), weights)

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


class SharedGELUExperts(GELUMLP):
    """The same of a tanh-GELU perceptron with biases, as ProMoE has it."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out + super().forward(x)


SHARED_EXPERTS = {"swiglu": SharedExperts, "gelu": SharedGELUExperts}


class ExpertsConfig(NamedTuple):
    """What a mixture of experts is made of."""

    width: int  # F, of each routed expert
    router: RouterConfig
    shared_width: int = 0  # of the shared expert; 0: none
    kind: str = "swiglu"  # of the routed experts, a key of `EXPERTS`
    shared_kind: str = "swiglu"  # a key of `SHARED_EXPERTS`


class MoE(nn.Module):
    """Mixture of experts in place of a transformer's MLP: out = sum_k weight_k * expert_k(x) + shared(x)."""

    def __init__(self, hidden_size: int, config: ExpertsConfig):
        super().__init__()
        self.gate = ROUTERS[config.router.kind](hidden_size, config.router)
        count = config.router.experts + self.gate.extra_experts
        self.experts = EXPERTS[config.kind](hidden_size, config.width, count)
        shared = SHARED_EXPERTS[config.shared_kind]
        self.shared_experts = shared(hidden_size, config.shared_width) if config.shared_width else None
        self.parallel = None  # an `ExpertParallel`, where `experts` holds a part of them only

    def forward(self, x: Tensor, null: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(N, S, D) tokens of N images, and (N,) bool which of these are of nothing -> (N, S, D)."""
        tokens = x.flatten(0, -2).to(compute_dtype(next(self.experts.parameters())))  # (T, D)
        routing = self.gate(tokens, Where(1 if x.ndim < 3 else len(x), null))

        def experts(y: Tensor, weights: Tensor) -> Tensor:  # (P, D), (P,)
            if self.parallel is None:
                return self.experts(y, routing.offsets, weights)
            return self.parallel(self.experts, y, weights, routing.tokens_per_expert)

        out = routing.run(tokens, experts)  # (T, D)
        if self.shared_experts is not None:
            out = self.shared_experts(tokens, out)
        return out.view(x.shape), routing

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every projection xavier-uniform on its own, the router as it says."""
        self.experts.init_weights()
        self.gate.init_weights()
        self.gate.reset_buffers()


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
