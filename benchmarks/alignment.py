"""Does representation alignment (REPA) help? A DiT-MoE on scenes of digits, aligned with small encoders of three kinds.

    python -m benchmarks.alignment              # 3 seeds, some ten minutes of one CPU core

The encoders are DINOv2's architecture, tiny, trained on scenes of the same digits that the diffusion model learns from:
to name the digit of each place (supervised), to fill in hidden patches (self-supervised), or not at all. Runs of a seed
see the same batches, noises and times, and are judged by their averaged weights on scenes of digits that neither they
nor the encoders have seen. Prints the table of benchmarks/RESULTS.md.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cli
from benchmarks.digits_runs import BATCH, FLOW, LR, draw_from, train
from benchmarks.endless import Scenes
from benchmarks.evidence import BASE, SCENES, markdown, sample
from benchmarks.scoring import SceneScorer, interval
from configuration import DiTConfig, build_config
from models import DiT
from representation import Alignment, Encoder
from scripts.digits import split_digits

WIDTH, PATCH, SIDE = 64, 4, 4  # of the encoder; pixels of its patches; places in a row, which are the DiT's
HIDDEN = 256  # width of the projector
DEPTH, WEIGHT = 2, 0.5  # of 4 blocks
SAMPLES, STEPS = 300, 25


@dataclass(frozen=True)
class Setup:
    encoder: str | None = None  # a key of TASKS
    until: float = 0  # share of the steps; 0: all


SETUPS = {
    "not aligned": Setup(),
    "supervised": Setup("supervised"),
    "supervised, until half": Setup("supervised", 0.5),
    "self-supervised": Setup("self-supervised"),
    "untrained encoder": Setup("untrained"),
}


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m benchmarks.alignment", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="runs of everything")
    parser.add_argument("--steps", type=cli.positive_int, default=300, help="of each run")
    parser.add_argument("--encoder-steps", type=cli.positive_int, default=400, help="of each encoder, before")
    parser.add_argument("--eval-every", type=cli.positive_int, default=100, help="steps between points of a curve")
    return parser


def main(args) -> None:
    torch.set_num_threads(1)
    training, held_out = map(Scenes, split_digits())
    encoders = {name: make_encoder(name, training, args.encoder_steps) for name in TASKS}
    for name, encoder in encoders.items():
        print(f"encoder, {name}: {known(encoder, training, held_out):.1%} of held-out places named by a linear probe")
    losses, right, scorer = {name: [] for name in SETUPS}, {name: [] for name in SETUPS}, SceneScorer()
    for seed in range(args.seeds):
        for name, setup in SETUPS.items():
            torch.manual_seed(seed)
            model = DiT(build_config("DiT-Nano/2", **(SCENES | BASE)))
            aligned = aligned_with(encoders, model.config, setup, args)
            points = train(model, training, held_out, seed, 0, args.steps, args.eval_every, draws=1, alignment=aligned)
            losses[name].append(np.stack([point.losses.numpy() for point in points[1:]]))  # (P, N)
            images = sample(model.eval(), FLOW, f"euler {STEPS}", SAMPLES, seed)
            right[name].append(scorer.recognised(images))  # (n,)
            seconds = points[-1].seconds / args.steps
            loss = losses[name][-1][-1].mean()
            print(f"{name}, seed {seed}: loss {loss:.4f}, {1000 * seconds:.0f} ms a step", flush=True)
        stacked = [{name: np.stack(of_seeds) for name, of_seeds in each.items()} for each in (losses, right)]
        print(f"\n{seed + 1} seeds\n\n{table(*stacked, args)}\n", flush=True)


def table(losses: dict[str, np.ndarray], right: dict[str, np.ndarray], args) -> str:
    """Loss at each point less that without alignment, and the share of cells that are recognised."""
    steps = range(args.eval_every, args.steps + 1, args.eval_every)
    header = ["run", *(f"loss at {step}" for step in steps), "cells recognised", "less not aligned"]
    rows = []
    plain = "not aligned"
    for name, values in losses.items():
        if name == plain:
            cells = [f"{point.mean():.4f}" for point in values.swapaxes(0, 1)]
        else:
            cells = [f"{interval(point)}" for point in (values - losses[plain]).swapaxes(0, 1)]
        gain = "" if name == plain else f"{interval(right[name] - right[plain])}"
        rows.append([name, *cells, f"{right[name].mean():.1%}", gain])
    return markdown(header, rows)


def aligned_with(encoders: dict[str, Encoder], config: DiTConfig, setup: Setup, args) -> Alignment | None:
    if setup.encoder is None:
        return None
    encoder = encoders[setup.encoder]
    until = round(setup.until * args.steps)
    return Alignment(encoder, None, encoder.record(), config, DEPTH, WEIGHT, HIDDEN, until, torch.float32)


# ------------------------------------------------------------------------------------------------------------- encoders


def digits_of(labels: Tensor) -> Tensor:
    """(N,) labels of scenes -> (N, 16) the digit in whose cell each place of the encoder lies."""
    a, b = labels // 10, labels % 10
    cells = torch.stack([a, b, b, a], dim=1).unflatten(1, (2, 2))
    return cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


def supervised(network: nn.Module, head: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    tokens = network(pixel_values=images).last_hidden_state[:, 1:]
    return F.cross_entropy(head(tokens)[..., :10].flatten(0, 1), digits_of(labels).flatten())


def filling_in(network: nn.Module, head: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Half of the patches are hidden; the error of what is put there."""
    hidden = torch.rand(len(images), SIDE * SIDE, generator=draw) < 0.5
    tokens = network(pixel_values=images, bool_masked_pos=hidden).last_hidden_state[:, 1:]
    patches = F.unfold(images[:, :1], PATCH, stride=PATCH).mT  # (N, 16, 16)
    return (head(tokens) - patches)[hidden].square().mean()


TASKS = {"supervised": supervised, "self-supervised": filling_in, "untrained": None}


def make_encoder(name: str, training: Scenes, steps: int) -> Encoder:
    """Trained, written as a folder of `transformers` and read as `--repa` would."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2)
    network = Dinov2Model(Dinov2Config(**sizes, image_size=SIDE * PATCH, patch_size=PATCH))
    head, task = nn.Linear(WIDTH, PATCH * PATCH), TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        encoder = Encoder(folder)  # which knows how images are normalised
        if task is not None:
            network.train()
            optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=2e-3)
            for step in range(steps):
                draw = torch.Generator().manual_seed(step)
                images, labels = draw_from(training, draw, BATCH)
                images = ((images + 1) / 2 - encoder.mean) / encoder.deviation
                for group in optimizer.param_groups:
                    group["lr"] = LR / 2 * (1 - step / steps)
                loss = task(network, head, images, labels, draw)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            network.eval().save_pretrained(folder)
            encoder = Encoder(str(Path(folder)))
    return encoder


def known(encoder: Encoder, training: Scenes, held_out: Scenes, count: int = 500) -> float:
    """Of the digits that the encoder's features tell a linear classifier, learned from some training scenes."""
    from sklearn.linear_model import LogisticRegression

    (x, y), (other, truth) = (
        (encoder(images, SIDE).flatten(0, 1).numpy(), digits_of(labels).flatten().numpy())
        for images, labels in (training.tensors(count), held_out.tensors(count))
    )
    return float(LogisticRegression(max_iter=1000).fit(x, y).score(other, truth))


if __name__ == "__main__":
    cli.run(main, get_parser())
