"""What the experiments on handwritten digits share: settings, paired training, loss on digits that nothing learns from.

A step's batch, noises, times and dropped labels are functions of (seed, step), so runs of a seed differ in nothing but
what an experiment changes.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion import RectifiedFlow
from models import DiT
from optim import EMA, build_optimizer, lr_factor, set_lr
from scripts.digits import Digits
from training import Balance, total_loss

MODEL = dict(input_size=8, in_channels=3, num_classes=10)
FLOW = RectifiedFlow(shift=2.0)
BATCH, LR, WARMUP, EMA_DECAY, ALPHA = 64, 4e-3, 20, 0.99, 0.005


class Point(NamedTuple):
    """The averaged weights after `step` steps."""

    step: int
    seconds: float  # CPU time that training took so far: that of an idle core, whatever else runs
    losses: Tensor  # (N,) of each held-out image
    load: Tensor  # (L, E) int32, what each expert got of the tokens of those images


def train(
    model: DiT,
    digits: Digits,
    held_out: Digits,
    seed: int,
    first: int,
    last: int,
    eval_every: int,
    *,
    objective=FLOW,
    lr: float = LR,
    alpha: float = ALPHA,
    loss_scale: float | None = None,
    accumulation: int = 1,
    draws: int = 2,
) -> list[Point]:
    """Train in place from step `first` to `last`; leaves the averaged weights in the model. Returns the curve.

    Args:
        alpha: factor of the balance loss.
        loss_scale: what the loss is multiplied by before the backward, as fp16 training does it; None: nothing.
        accumulation: micro-batches that a batch is cut into.
        draws: see `evaluate`.
    """
    images, labels = tensors(digits)
    optimizer, ema = build_optimizer(model, lr, weight_decay=0.0), EMA(model, EMA_DECAY)
    scaler = torch.amp.GradScaler("cpu", loss_scale or 1.0, growth_interval=last + 1, enabled=loss_scale is not None)
    seconds, curve = 0.0, [Point(first, 0.0, *evaluate(model, objective, held_out, draws))]
    for step in range(first, last):
        began = time.process_time()
        draw = torch.Generator().manual_seed(1_000_000 * seed + step)
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *images.shape[1:], generator=draw)
        u, drop = torch.rand(2, BATCH, generator=draw)
        y = torch.where(drop < model.config.class_dropout_prob, model.config.null_class, labels[chosen])

        for parts in zip(*(whole.chunk(accumulation) for whole in (images[chosen], noise, u, y)), strict=True):
            batch = objective.noised(*parts[:3])
            output, routings = model(batch.x_t, batch.t, parts[3], return_routing=True)
            loss, _, _ = total_loss(objective.loss(output, batch), routings, Balance(aux=alpha), None)
            scaler.scale(loss / accumulation).backward()
        set_lr(optimizer.param_groups, lr * lr_factor(step - first, "constant", WARMUP, last - first))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        seconds += time.process_time() - began
        if (step + 1 - first) % eval_every == 0 or step + 1 == last:
            with ema.swapped_into(model):
                curve.append(Point(step + 1, seconds, *evaluate(model, objective, held_out, draws)))
    model.load_state_dict(ema.average, strict=False)  # all but the fixed position embedding
    return curve


@torch.no_grad()
def evaluate(model: DiT, objective, digits: Digits, draws: int) -> tuple[Tensor, Tensor]:
    """`losses` and `load` of `Point`: every image `draws` times, at fixed noises and evenly spread times."""
    images, labels = (part.repeat(draws, *[1] * (part.ndim - 1)) for part in tensors(digits))
    generator = torch.Generator().manual_seed(0)
    u = (torch.randperm(len(images), generator=generator) + 0.5) / len(images)
    batch = objective.noised(images, torch.randn(images.shape, generator=generator), u)
    output, routings = model(batch.x_t, batch.t, labels, return_routing=True)
    losses = objective.loss(output, batch)["loss"]
    load = [routing.tokens_per_expert for routing in routings]
    return losses, torch.stack(load) if load else torch.zeros(0, 0, dtype=torch.int32)


def tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    """(N, 3, 8, 8) in -1..1, as the pixels of `--vae-path none`, and labels (N,)."""
    images = torch.from_numpy(digits.images).float() / 127.5 - 1
    return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(digits.labels)
