"""Which experts a token goes to: the routers of the field, one class each, behind one interface.

T tokens · N images · S = T/N tokens of each · D hidden width · E experts · K experts per token, or on average
P assignments of a token to an expert

A router is called with tokens (T, D) and `Where` they stand, and returns a `Routing`. Where each token has K experts,
assignments are a table (T, K); where experts choose, a token may have from 0 to E of them. Both travel alike: sorted by
expert on the device, no padding, no dropped token, no float atomics. Losses that belong to a router come with its
`Routing`; `after_step` is told what all processes saw.

    softmax                   each token takes K experts by probability (DiT-MoE, arXiv 2407.11633)
    sigmoid                   each token takes K by score, perhaps of some groups (DSMoE; DeepSeek-V3, 2412.19437)
    expert-choice             each expert takes S*K/E tokens of each image by probability (EC-DiT, 2410.02098)
    batch-pool                each expert takes T*K/E tokens of the batch; a predictor stands in for the batch when
                              sampling (DiffMoE, 2503.14487)
    prototypes                each token takes the K nearest of E centres; unconditional images have an expert more
    prototypes-expert-choice  each centre takes the S*K/E nearest tokens of each image; likewise (both ProMoE)

All but one decide for an image by itself. batch-pool is trained on the competition of a batch's tokens, and sampled by
its predictor alone, unless `published_pool` asks for the published rule, under which an image depends on the others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UsageError
from kernels import (
    Combine,
    CombineBags,
    Dispatch,
    DispatchBags,
    FP32Linear,
    Permute,
    inverse_permutation,
    sort_by_expert,
    sort_by_token,
)


class Where(NamedTuple):
    """Of a batch of tokens: how many images they are of, and which of these are of nothing."""

    images: int
    null: Tensor | None = None  # (N,) bool


class Routing(NamedTuple):
    """What a router decided for T tokens, and the order in which the experts will see them.

    Of a table (T, K) `order` is the assignment t*K+k at each place; else `tokens` is the token at each place.
    """

    probs: Tensor  # (T, E) fp32, each token's distribution over the experts, differentiable
    weights: Tensor  # (T, K), or (P,) by place: what each chosen expert's output is multiplied by, differentiable
    offsets: Tensor  # (E,) int32, where each expert's segment of the places ends
    expert_ids: Tensor | None = None  # (T, K) int64
    order: Tensor | None = None  # (P,) int64
    tokens: Tensor | None = None  # (P,) int64
    logits: Tensor | None = None  # (T, E) fp32 before softmax or sigmoid, where the router keeps them
    losses: dict[str, Tensor] = {}  # noqa: RUF012  of the router's own, scalars
    observed: Tensor | None = None  # (E,) what `after_step` wants the mean of, besides counts

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int32, how many of the P assignments each expert got."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1))

    def run(self, x: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(T, D) -> (T, D): the weighted sum of what each token's experts make of it.

        Args:
            experts: (P, D) and (P,) weights, in expert order -> (P, D), what they make of it times these.
        """
        if self.tokens is None:
            inverse, top_k = inverse_permutation(self.order), self.weights.shape[1]  # assignment -> its place
            weights = Permute.apply(self.weights.flatten(), self.order, inverse)
            return Combine.apply(experts(Dispatch.apply(x, inverse, top_k), weights), inverse, top_k)
        places, starts = sort_by_token(self.tokens, len(x))
        y = experts(DispatchBags.apply(x, self.tokens, places, starts), self.weights)
        return CombineBags.apply(y, self.tokens, places, starts)

    @property
    def dense_weights(self) -> Tensor:
        """(T, E) what each expert's output is multiplied by, 0 where it was not chosen."""
        table = torch.zeros_like(self.probs)
        if self.tokens is None:
            return table.scatter_add(1, self.expert_ids, self.weights)
        return table.index_put((self.tokens, self.expert_of_place), self.weights, accumulate=True)

    @property
    def chosen(self) -> Tensor:
        """(T, E) int64, 1 where an expert was chosen."""
        table = torch.zeros_like(self.probs, dtype=torch.int64)
        if self.tokens is None:
            return table.scatter(1, self.expert_ids, 1)
        return table.index_put((self.tokens, self.expert_of_place), table.new_ones(()))

    @property
    def expert_of_place(self) -> Tensor:
        """(P,) int64."""
        places = torch.arange(len(self.weights), dtype=self.offsets.dtype, device=self.offsets.device)
        return torch.searchsorted(self.offsets, places, right=True)


class RouterConfig(NamedTuple):
    """What a router is made of, besides the width of tokens."""

    experts: int  # E
    top_k: int  # K
    kind: str = "softmax"  # a key of `ROUTERS`
    normalize: bool = False  # divide a token's K weights by their sum
    scaling_factor: float = 1.0  # then multiply them by this
    groups: int = 1  # of experts, of which a token sees the `kept_groups` best
    kept_groups: int = 1
    bias: bool = False  # added to the scores for the choice alone; moved after each step towards an even load


class Router(nn.Module):
    """What all of them share: E rows of weights, in fp32 whatever autocast says."""

    extra_experts = 0  # besides the E that tokens compete for
    has_logits = True  # before softmax or sigmoid
    keeps_logits = False

    def __init__(self, hidden_size: int, config: RouterConfig):
        super().__init__()
        self.config, self.top_k = config, config.top_k
        self.weight = nn.Parameter(torch.empty(config.experts, hidden_size))
        self.roles = {"weight": "router"}

    def forward(self, x: Tensor, where: Where) -> Routing:
        raise NotImplementedError

    def after_step(self, counts: Tensor, observed: Tensor | None) -> None:
        """Told once a step what all processes saw: tokens of each expert (E,), and the mean of `observed`."""

    def _apply(self, fn, recurse: bool = True) -> "Router":
        """Buffers stay in fp32 when a model is cast: their steps are finer than half precision."""
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        return self

    def init_weights(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def reset_buffers(self) -> None:
        """What training moves, as it begins: a model that was made without memory has none of it."""

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) fp32."""
        return FP32Linear.apply(x, self.weight)

    def kept(self, logits: Tensor) -> Tensor | None:
        return logits if self.keeps_logits else None


# ---------------------------------------------------------------------------------------------------- tokens choose

BIAS_STEP = 1e-3  # how far a bias moves in a step, as DeepSeek-V3 has it


class TokenChoice(Router):
    """Each token takes the K experts of the largest score, with `weights` that are these scores."""

    def __init__(self, hidden_size: int, config: RouterConfig):
        super().__init__(hidden_size, config)
        if config.bias:
            self.register_buffer("bias", torch.zeros(config.experts))

    def forward(self, x: Tensor, where: Where) -> Routing:
        config, logits = self.config, self.scores(x)
        scores = self.activate(logits)  # (T, E)
        if config.bias or config.groups > 1:
            expert_ids = self.preferences(scores.detach()).topk(self.top_k, dim=-1, sorted=False).indices
            weights = scores.gather(1, expert_ids)
        else:
            weights, expert_ids = scores.topk(self.top_k, dim=-1, sorted=False)  # (T, K)
        if config.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if config.scaling_factor != 1:
            weights = weights * config.scaling_factor
        order, offsets = sort_by_expert(expert_ids, num_experts=config.experts)
        return Routing(self.distribution(scores), weights, offsets, expert_ids, order, logits=self.kept(logits))

    def preferences(self, scores: Tensor) -> Tensor:
        """(T, E) what the choice goes by: with the bias, and 0 outside the best groups."""
        if self.config.bias:
            scores = scores + self.bias
        if self.config.groups == 1:
            return scores
        grouped = scores.unflatten(1, (self.config.groups, -1))  # (T, G, E/G)
        best = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(dim=-1)  # (T, G)
        kept = torch.zeros_like(best).scatter(1, best.topk(self.config.kept_groups, dim=-1).indices, 1.0)
        return grouped.masked_fill(kept.unsqueeze(-1) == 0, 0.0).flatten(1)

    @torch.no_grad()
    def after_step(self, counts: Tensor, observed: Tensor | None) -> None:
        if self.config.bias:
            counts = counts.to(self.bias.device, torch.float32)
            self.bias.add_(BIAS_STEP * (counts.mean() - counts).sign())

    def reset_buffers(self) -> None:
        if self.config.bias:
            self.bias.zero_()

    def activate(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def distribution(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


class SoftmaxRouter(TokenChoice):
    """Scores are probabilities over all E experts (arXiv 2407.11633, eq. 1)."""

    def activate(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def distribution(self, scores: Tensor) -> Tensor:
        return scores


class SigmoidRouter(TokenChoice):
    """Each score by itself; the distribution is their share of the sum."""

    def activate(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def distribution(self, scores: Tensor) -> Tensor:
        return scores / scores.sum(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------- experts choose


def chosen_by_experts(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert takes the tokens that it scores highest, in every pool by itself.

    Args:
        scores: (B, R, E), of B pools of R tokens.

    Returns:
        (P,) scores and (P,) tokens, of 0 .. B*R - 1, at each place, and (E,) int32 offsets; P = E * B * capacity.
    """
    pools, size, experts = scores.shape
    values, rows = scores.permute(2, 0, 1).topk(capacity, dim=-1, sorted=False)  # (E, B, capacity)
    first = torch.arange(pools, device=scores.device).view(1, -1, 1) * size
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=scores.device) * (pools * capacity)
    return values.flatten(), (rows + first).flatten(), ends


class ExpertChoice(Router):
    """Each expert takes the S*K/E tokens of an image that give it the largest probability, its weight."""

    def forward(self, x: Tensor, where: Where) -> Routing:
        logits = self.scores(x)
        probs = logits.softmax(dim=-1)
        pools = probs.unflatten(0, (where.images, -1))  # (N, S, E)
        weights, tokens, offsets = chosen_by_experts(pools, capacity_of(self.config, pools.shape[1]))
        return Routing(probs, weights, offsets, tokens=tokens, logits=self.kept(logits))


def capacity_of(config: RouterConfig, tokens: int) -> int:
    """How many of a pool's tokens each expert takes. Raises UsageError where that is none."""
    capacity = tokens * config.top_k // config.experts
    if capacity < 1:
        raise UsageError(f"router {config.kind}: {tokens} tokens are too few for {config.experts} experts")
    return capacity


class BatchPool(Router):
    """In training each expert takes tokens of the whole batch, and a predictor learns which: sampling asks it alone.

    An expert's threshold follows the score of the last token that it took.
    """

    def __init__(self, hidden_size: int, config: RouterConfig):
        super().__init__(hidden_size, config)
        self.capacity_predictor = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, config.experts)
        )
        self.capacity_predictor[2].roles = {"weight": "router"}
        self.register_buffer("expert_threshold", torch.zeros(config.experts))
        self.register_buffer("ema_decay", torch.tensor([0.95]))
        self.published_pool = False  # sampling: of the batch's tokens as many as pass, but the likeliest ones

    def forward(self, x: Tensor, where: Where) -> Routing:
        logits = self.scores(x)
        probs = logits.softmax(dim=-1)
        kept = self.kept(logits)
        predicted = self.predicted(x.detach())
        if not self.training:
            return self._by_predictor(probs, predicted)._replace(logits=kept)
        capacity = capacity_of(self.config, len(x))
        weights, tokens, offsets = chosen_by_experts(probs.unsqueeze(0), capacity)
        routing = Routing(probs, weights, offsets, tokens=tokens, logits=kept)
        loss = F.binary_cross_entropy_with_logits(predicted, routing.chosen.to(predicted.dtype))
        with torch.no_grad():
            last = predicted.sigmoid().topk(capacity, dim=0).values[-1]  # (E,)
        return routing._replace(losses={"capacity": loss}, observed=last)

    def predicted(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) logits of being taken, in fp32."""
        first, _, last = self.capacity_predictor
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.silu(F.linear(x.float(), first.weight.float(), first.bias.float()))
            return F.linear(hidden, last.weight.float(), last.bias.float())

    def _by_predictor(self, probs: Tensor, predicted: Tensor) -> Routing:
        """How many tokens there are, the host has to know."""
        passes = predicted.sigmoid() > self.expert_threshold  # (T, E)
        if self.published_pool:
            rank = probs.argsort(dim=0, descending=True, stable=True).argsort(dim=0, stable=True)
            passes = rank < passes.sum(dim=0)
        experts, tokens = passes.T.nonzero(as_tuple=True)  # by expert
        offsets = passes.sum(dim=0).cumsum(dim=0).to(torch.int32)
        return Routing(probs, probs[tokens, experts], offsets, tokens=tokens)

    @torch.no_grad()
    def after_step(self, counts: Tensor, observed: Tensor | None) -> None:
        if observed is not None:
            self.expert_threshold.lerp_(observed.to(self.expert_threshold), 1 - self.ema_decay)

    def init_weights(self) -> None:
        super().init_weights()
        for linear in (self.capacity_predictor[0], self.capacity_predictor[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def reset_buffers(self) -> None:
        self.expert_threshold.zero_()
        self.ema_decay.fill_(0.95)


# ---------------------------------------------------------------------------------------------------- prototypes

TEMPERATURE = 0.07  # of the contrastive loss, as published


class Prototypes(Router):
    """Each token takes the K nearest of E centres, with the cosines as weights; tokens of images that are of nothing
    go to an expert of their own, with weight 1, and to no other.

    The contrastive loss draws each centre to the mean of the tokens that took it, and from the means of others.
    """

    extra_experts = 1
    has_logits = False

    def __init__(self, hidden_size: int, config: RouterConfig):
        super().__init__(hidden_size, config)
        self.roles = {"weight": "table"}

    def forward(self, x: Tensor, where: Where) -> Routing:
        cosines, null = self.cosines(x), self.null_tokens(x, where)  # (T, E), (T, 1)
        weights, expert_ids = cosines.topk(self.top_k, dim=-1, sorted=False)
        alone = F.one_hot(torch.zeros_like(expert_ids[:, 0]), self.top_k).to(weights.dtype)  # the first of K counts
        weights = torch.where(null, alone, weights)
        ids = torch.where(null, self.config.experts, expert_ids)
        order, offsets = sort_by_expert(ids, num_experts=self.config.experts + 1)
        chosen = torch.zeros_like(cosines).scatter(1, expert_ids, 1.0) * ~null
        losses = {"contrastive": self.contrastive(x.unsqueeze(0), chosen.unsqueeze(0))[0]} if self.training else {}
        return Routing(self.distribution(cosines, null), weights, offsets, ids, order, losses=losses)

    def cosines(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(x.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T

    def null_tokens(self, x: Tensor, where: Where) -> Tensor:
        """(T, 1) bool."""
        if where.null is None:
            return torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        return where.null.repeat_interleave(len(x) // where.images, output_size=len(x)).unsqueeze(1)

    def distribution(self, cosines: Tensor, null: Tensor) -> Tensor:
        """(T, E + 1): a softmax of the cosines, for logs and analysis."""
        probs = F.pad(cosines.softmax(dim=-1), (0, 1))
        nothing = F.one_hot(torch.full_like(null[:, 0], self.config.experts, dtype=torch.int64), probs.shape[1])
        return torch.where(null, nothing.to(probs.dtype), probs)

    def contrastive(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Of B pools of tokens (B, R, D) and which centres took them (B, R, E): (B,), 0 where fewer than two centres
        have any.
        """
        with torch.autocast(x.device.type, enabled=False):
            counts = chosen.sum(dim=1)  # (B, E)
            means = chosen.mT @ x.float() / counts.clamp(min=1).unsqueeze(2)  # (B, E, D)
            cosines = F.normalize(self.weight.float(), dim=-1) @ F.normalize(means, dim=-1).mT / TEMPERATURE
            there = counts > 0
            logits = cosines.masked_fill(~there.unsqueeze(1), -torch.inf)  # of means that there are
            losses = logits.logsumexp(dim=2) - cosines.diagonal(dim1=1, dim2=2)
            among = there.sum(dim=1)
            total = torch.where(there, losses, 0.0).sum(dim=1) / among.clamp(min=1)
            return torch.where(among > 1, total, 0.0)

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class PrototypesExpertChoice(Prototypes):
    """Each centre takes the S*K/E tokens of an image that are nearest to it; the contrastive loss is of each image."""

    def forward(self, x: Tensor, where: Where) -> Routing:
        cosines, null = self.cosines(x), self.null_tokens(x, where)
        pools, experts = cosines.unflatten(0, (where.images, -1)), self.config.experts  # (N, S, E)
        size = pools.shape[1]
        weights, rows = pools.transpose(1, 2).topk(capacity_of(self.config, size), dim=-1, sorted=False)
        chosen = torch.zeros_like(pools).transpose(1, 2).scatter(2, rows, 1.0).transpose(1, 2)
        ids = torch.arange(experts, device=x.device).view(1, -1, 1).expand_as(rows)

        # In an image of nothing the last expert takes every token once. Places that are left over weigh nothing.
        length = max(rows[0].numel(), size)
        spare = length - rows[0].numel()
        place = torch.arange(length, device=x.device)
        of_nothing = null.view(where.images, size)[:, :1]  # (N, 1)
        ids = torch.where(of_nothing, experts, F.pad(ids.flatten(1), (0, spare), value=experts))
        rows = torch.where(of_nothing, place % size, F.pad(rows.flatten(1), (0, spare)))
        weights = torch.where(of_nothing, (place < size).to(weights.dtype), F.pad(weights.flatten(1), (0, spare)))
        tokens = (rows + size * torch.arange(where.images, device=x.device).unsqueeze(1)).flatten()
        order, offsets = sort_by_expert(ids.flatten(), num_experts=experts + 1)
        losses = {}
        if self.training:
            each = self.contrastive(x.unflatten(0, (-1, size)), chosen)
            conditional = (~of_nothing[:, 0]).to(each.dtype)
            losses = {"contrastive": (each * conditional).sum() / conditional.sum().clamp(min=1)}
        distribution = self.distribution(cosines, null)
        return Routing(distribution, weights.flatten()[order], offsets, tokens=tokens[order], losses=losses)


ROUTERS = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "expert-choice": ExpertChoice,
    "batch-pool": BatchPool,
    "prototypes": Prototypes,
    "prototypes-expert-choice": PrototypesExpertChoice,
}


# ---------------------------------------------------------------------------------------------------- balance


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


def sequence_balancing_loss(routings: Sequence[Routing], images: int) -> Tensor:
    """The same of each image by itself (DeepSeek-V3, arXiv 2412.19437, eq. 17), mean over images: (L,) fp32."""
    losses = []
    for routing in routings:
        chosen = routing.chosen.float().unflatten(0, (images, -1)).sum(dim=1)  # (N, E)
        load = chosen * chosen.shape[1] / chosen.sum(dim=1, keepdim=True).clamp(min=1)
        losses.append((load * routing.probs.unflatten(0, (images, -1)).mean(dim=1)).sum(dim=1).mean())
    return torch.stack(losses)


def z_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean square of the logarithm of the partition function (ST-MoE, arXiv 2202.08906, eq. 5): (L,) fp32."""
    return torch.stack([routing.logits.logsumexp(dim=-1).square().mean() for routing in routings])
