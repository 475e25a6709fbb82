"""What the experiments on small images share: settings, paired training, loss on what nothing learns from.

A step's batch, noises, times and dropped labels are functions of (seed, step), so runs of a seed differ in nothing but
what an experiment changes.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.endless import Endless
from diffusion import RectifiedFlow
from models import DiT
from muon import OPTIMIZERS
from optim import ADAMW, EMA, lr_factor, set_lr
from representation import Alignment
from scripts.digits import Digits
from training import Balance, tell_routers, total_loss

MODEL = dict(input_size=8, in_channels=3, num_classes=10)
FLOW = RectifiedFlow(shift=2.0)
BATCH, LR, WARMUP, EMA_DECAY, ALPHA = 64, 4e-3, 20, 0.99, 0.005


class Point(NamedTuple):
    """The averaged weights after `step` steps."""

    step: int
    seconds: float  # CPU time that training took so far: that of an idle core, whatever else runs
    losses: Tensor  # (N,) of each held-out image
    load: Tensor  # (L, E) int32, what each expert got of the tokens of those images
    averages: Sequence[dict[str, Tensor]] = ()  # copies of the further ones


class Learner:
    """A network, what trains it, and one step of that."""

    def __init__(
        self,
        model: DiT,
        digits: Digits | Endless,
        seed: int,
        *,
        objective=FLOW,
        optimizer: str = "adamw",
        lr: float = LR,
        alpha: float = ALPHA,
        loss_scale: float | None = None,
        accumulation: int = 1,
        balance: tuple[str, ...] = ("aux",),
        alignment: Alignment | None = None,
    ):
        """
        Args:
            optimizer: of `muon.OPTIMIZERS`.
            alpha: factor of the balance loss.
            loss_scale: what the loss is multiplied by before the backward, as fp16 training does it; None: nothing.
            accumulation: micro-batches that a batch is cut into.
            balance: what evens out the load, of `runs.BALANCE`.
            alignment: what tokens are aligned with; its projector is drawn here.
        """
        self.model, self.digits, self.seed, self.objective = model, digits, seed, objective
        self.lr, self.accumulation, self.balance = lr, accumulation, Balance(balance, aux=alpha)
        self.optimizer = OPTIMIZERS[optimizer](model, lr, 0.0, ADAMW["eps"], False)
        self.alignment, self.projector = alignment, None
        if alignment is not None:
            self.projector = alignment.projector()
            for group in alignment.groups(self.projector, lr, weight_decay=0.0):
                self.optimizer.add_param_group(group)
        self.ema = EMA(model, EMA_DECAY)
        scale = dict(init_scale=loss_scale or 1.0, growth_interval=10**9, enabled=loss_scale is not None)
        self.scaler = torch.amp.GradScaler("cpu", **scale)

    def step(self, step: int, factor: float = 1.0) -> None:
        """Learn from the batch of a step, at `factor` times the learning rate."""
        model, draw = self.model, torch.Generator().manual_seed(1_000_000 * self.seed + step)
        images, labels = draw_from(self.digits, draw, BATCH)
        noise = torch.randn(BATCH, *images.shape[1:], generator=draw)
        u, drop = torch.rand(2, BATCH, generator=draw)
        y = torch.where(drop < model.config.class_dropout_prob, model.config.null_class, labels)

        counts, observed, alignment = 0, [], self.alignment
        depth = alignment.depth if alignment is not None and alignment.is_on(step) else 0
        for parts in zip(*(whole.chunk(self.accumulation) for whole in (images, noise, u, y)), strict=True):
            batch = self.objective.noised(*parts[:3])
            output, routings, *tokens = model(batch.x_t, batch.t, parts[3], return_routing=True, return_tokens=depth)
            loss, _, seen = total_loss(self.objective.loss(output, batch), routings, self.balance, None)
            if depth:
                features = alignment.features({"x": parts[0]}, loss.device)
                loss = loss + alignment.loss(self.projector(*tokens), features)[0]
            self.scaler.scale(loss / self.accumulation).backward()
            counts, observed = counts + seen, [routing.observed for routing in routings]
        set_lr(self.optimizer.param_groups, self.lr * factor)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(model)
        tell_routers(model, counts, observed)


def train(
    model: DiT,
    digits: Digits | Endless,
    held_out: Digits | Endless,
    seed: int,
    first: int,
    last: int,
    eval_every: int,
    *,
    draws: int = 2,
    schedule: str = "constant",
    averages: Sequence[EMA] = (),
    **options,
) -> list[Point]:
    """Train in place from step `first` to `last`; leaves the averaged weights in the model. Returns the curve.

    Args:
        draws: see `evaluate`.
        schedule: of the learning rate, of `optim.SCHEDULES`.
        averages: further ones of the model, to keep along.
        options: of `Learner`.
    """
    learner = Learner(model, digits, seed, **options)
    ema, objective = learner.ema, learner.objective
    seconds, curve = 0.0, [Point(first, 0.0, *evaluate(model, objective, held_out, draws))]
    for step in range(first, last):
        began = time.process_time()
        learner.step(step, lr_factor(step - first, schedule, WARMUP, last - first))
        seconds += time.process_time() - began
        for each in averages:
            each.update(model)
        if (step + 1 - first) % eval_every == 0 or step + 1 == last:
            copies = [{name: tensor.clone() for name, tensor in each.average.items()} for each in averages]
            with ema.swapped_into(model):
                curve.append(Point(step + 1, seconds, *evaluate(model, objective, held_out, draws), copies))
    model.load_state_dict(ema.average, strict=False)  # all but the fixed position embedding
    return curve


@torch.no_grad()
def evaluate(model: DiT, objective, digits: Digits | Endless, draws: int) -> tuple[Tensor, Tensor]:
    """`losses` and `load` of `Point`: every image `draws` times, at fixed noises and evenly spread times."""
    whole = digits.tensors() if isinstance(digits, Endless) else tensors(digits)
    images, labels = (part.repeat(draws, *[1] * (part.ndim - 1)) for part in whole)
    generator = torch.Generator().manual_seed(0)
    u = (torch.randperm(len(images), generator=generator) + 0.5) / len(images)
    batch = objective.noised(images, torch.randn(images.shape, generator=generator), u)
    output, routings = model.eval()(batch.x_t, batch.t, labels, return_routing=True)
    model.train()
    losses = objective.loss(output, batch)["loss"]
    load = [routing.tokens_per_expert for routing in routings]
    return losses, torch.stack(load) if load else torch.zeros(0, 0, dtype=torch.int32)


def draw_from(digits: Digits | Endless, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch."""
    if isinstance(digits, Endless):
        return digits.draw(generator, count)
    images, labels = tensors(digits)
    chosen = torch.randint(len(images), (count,), generator=generator)
    return images[chosen], labels[chosen]


def tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    """(N, 3, 8, 8) in -1..1, as the pixels of `--vae-path none`, and labels (N,)."""
    images = torch.from_numpy(digits.images).float() / 127.5 - 1
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(digits.labels)
