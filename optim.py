"""Parameter groups, learning-rate schedules and the moving average of the weights."""

import contextlib
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from layers import roles_of
from parametrization import lr_factors

SCHEDULES = {  # of the share of the steps behind the warmup that is done, and the share of a cooldown: the factor
    "constant": lambda done, cooldown: 1.0,
    "cosine": lambda done, cooldown: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done, cooldown: 1 - done,
    "wsd": lambda done, cooldown: min(1.0, (1 - done) / cooldown),  # warmup, stable, decay: arXiv 2404.06395
}
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}  # one kernel for all parameters on CUDA, and on a CPU too


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """An optimizer's groups, by the roles that layers declare: biases, norms and embedding tables do not decay.

    `decay_all`: they do.
    Each has an `lr_factor`, its own share of the learning rate (`set_lr`), which leaves learning rate times decay the
    same. Parameters that are sharded over different meshes stand in different groups: one kernel cannot take both.
    """
    groups, roles, factors = {}, roles_of(model), lr_factors(model)
    for name, p in model.named_parameters():
        exempt = roles[name] in ("vector", "table") and not decay_all
        decay = 0.0 if exempt else weight_decay / factors[name]
        groups.setdefault((factors[name], decay, getattr(p, "device_mesh", None)), []).append(p)
    return [
        {"params": params, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay, _), params in groups.items()
    ]


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, eps: float = ADAMW["eps"], decay_all: bool = False
) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, lr, weight_decay, decay_all), **(ADAMW | {"eps": eps}))


def set_lr(groups: list[dict], lr: float) -> None:
    """Give each group its share of the learning rate of this step."""
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


@torch.no_grad()
def state_of(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """All that an optimizer keeps, as `<parameter>.<entry>`; shares memory with it.

    Before its first step, that is made for it to be filled: by a step of zero gradients at the rate zero.
    """
    if not optimizer.state:
        rates = [group["lr"] for group in optimizer.param_groups]
        set_lr(optimizer.param_groups, 0.0)
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return {
        f"{name}.{entry}": value
        for name, parameter in named.items()
        for entry, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }


def lr_factor(step: int, schedule: str, warmup_steps: int, total_steps: int, cooldown: float = 0.2) -> float:
    """What the base learning rate is multiplied by at 0-based `step`: linear warmup, then the schedule to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, total_steps - warmup_steps), cooldown)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter: its shard, or all of it. Shares memory, carries no gradient."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class EMA:
    """Exponential moving average of a model's parameters, in fp32, updated in place; sharded as they are.

    It starts as a copy of the model and takes part from the first step on.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: local(p).float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * parameters, all in a few kernels."""
        current = [local(p) for p in model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - self.decay)

    def as_parameters(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The average under the names, and sharded in the way, of the model's parameters; shares memory with it."""
        return {name: like(p, self.average[name]) for name, p in model.named_parameters()}

    @contextlib.contextmanager
    def swapped_into(self, model: nn.Module):
        """`with ema.swapped_into(model):` runs the model with the averaged weights, without a second copy of it."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            mine, average = local(parameter), self.average[name]
            kept = mine.clone()  # values move, not memory: sharding holds on to the memory of each parameter
            mine.copy_(average)
            average.copy_(kept)


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part`, which is this process's part of something, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
