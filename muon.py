"""Muon: matrices move by the orthogonal part of their momentum, all else by AdamW (arXiv 2502.16982).

O, I rows and columns of a matrix

What goes from width to width is a matrix here: attention, feed-forwards, modulations, experts, of which each is one of
its own, as are query, key and value, gate and up, each shift, scale and gate. Embeddings, the readout, routers, biases
and norms are AdamW's. An update has the root mean square of AdamW's, 0.2 of the learning rate, so rates and decays keep
their meaning. Under muP that is so at the base width; elsewhere its spectral norm grows with sqrt(O/I), which is what
makes features move alike at every width, without a factor of the learning rate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from layers import Attention, CrossAttention, Modulation, SharedModulation, roles_of
from moe import SwiGLUExperts
from optim import ADAMW, build_optimizer, parameter_groups
from parametrization import is_mup

MOMENTUM = 0.95
RMS = 0.2  # of an update, over the learning rate, as AdamW's usually is
QUINTIC = (3.4445, -4.7750, 2.0315)  # of an iteration whose fixed interval is about 0.7 to 1.2
ITERATIONS = 5
ROLES = ("hidden", "modulation", "expert")


def orthogonal(matrices: Tensor) -> Tensor:
    """(..., O, I) -> the same with all singular values near 1, by Newton-Schulz iterations; in bf16 on a GPU."""
    a, b, c = QUINTIC
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def pieces(model: nn.Module) -> dict[str, list[int]]:
    """Of parameters that hold several matrices, one below the other: how many rows each has, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            found[f"{name}.qkv.weight"] = module.rows
        if isinstance(module, CrossAttention):
            found[f"{name}.kv_linear.weight"] = [len(module.kv_linear.weight) // 2] * 2
        if isinstance(module, SwiGLUExperts):
            found[f"{name}.gate_up_proj"] = [module.gate_up_proj.shape[1] // 2] * 2
        if isinstance(module, (Modulation, SharedModulation)):
            width = model.config.hidden_size
            found[f"{name}.1.weight"] = [width] * (len(module[1].weight) // width)
        if isinstance(module, nn.Linear) and hasattr(module, "drawn_apart"):
            found.setdefault(f"{name}.weight", list(module.drawn_apart))
    return found


def scale_of(rows: int, columns: int, base: tuple[int, int] | None) -> float:
    """What an orthogonal matrix is multiplied by; `base` are rows and columns at the base width of muP."""
    if base is None:
        return RMS * max(rows, columns) ** 0.5
    base_rows, base_columns = base
    return RMS * max(base) ** 0.5 * (rows / columns) ** 0.5 / (base_rows / base_columns) ** 0.5


class Muon(torch.optim.AdamW):
    """One optimizer of two kinds of groups: those with `pieces` are Muon's, which have a list for each parameter.

    Sharded parameters keep sharded momenta; each matrix is gathered for its iterations, one at a time.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if "pieces" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "pieces" in group:
                for parameter, rows, scales in zip(group["params"], group["pieces"], group["scales"], strict=True):
                    if parameter.grad is not None:
                        self._update(parameter, rows, scales, group["lr"], group["weight_decay"])

    def _update(self, p: Tensor, rows: Sequence[int], scales: Sequence[float], lr: float, decay: float) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
        grad, momentum = p.grad.float(), state["momentum_buffer"]
        momentum.lerp_(grad, 1 - MOMENTUM)
        whole = grad.lerp(momentum, MOMENTUM)  # Nesterov's
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        parts = zip(whole.split(list(rows), dim=-2), scales, strict=True)
        update = torch.cat([scale * orthogonal(part) for part, scale in parts], dim=-2)
        if isinstance(p, DTensor):
            update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(1 - lr * decay).add_(update.to(p.dtype), alpha=-lr)


def build_muon(model: nn.Module, lr: float, weight_decay: float, eps: float, decay_all: bool) -> Muon:
    """For a model whose parameters may be sharded by now."""
    roles, split = roles_of(model), pieces(model)
    named = dict(model.named_parameters())
    matrices = {id(named[name]): name for name, role in roles.items() if role in ROLES and named[name].ndim > 1}
    base = {}
    if is_mup(model.config):
        with torch.device("meta"):
            narrow = type(model)(model.config.at_width(model.config.base_width))
        rows = pieces(narrow)
        base = {name: (p, rows.get(name, [p.shape[-2]])) for name, p in narrow.named_parameters() if p.ndim > 1}
    groups, mine = [], {"params": [], "pieces": [], "scales": [], "lr": lr, "weight_decay": weight_decay}
    for group in parameter_groups(model, lr, weight_decay, decay_all):
        rest = []
        for p in group["params"]:
            if id(p) not in matrices:
                rest.append(p)
                continue
            name = matrices[id(p)]
            rows = split.get(name, [p.shape[-2]])
            shapes = [None] * len(rows)
            if name in base:
                narrow, narrow_rows = base[name]
                shapes = [(row, narrow.shape[-1]) for row in narrow_rows]
            mine["params"].append(p)
            mine["pieces"].append(tuple(rows))
            mine["scales"].append(tuple(scale_of(row, p.shape[-1], of) for row, of in zip(rows, shapes, strict=True)))
        if rest:
            groups.append(group | {"params": rest})
    if mine["params"]:
        groups.append(mine | {"lr_factor": 1.0})
    return Muon(groups, **(ADAMW | {"eps": eps}))


OPTIMIZERS = {"adamw": build_optimizer, "muon": build_muon}
