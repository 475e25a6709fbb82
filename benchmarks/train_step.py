"""How fast is a training step, with AdamW and EMA: against the naive expert loop, and against the machine's limit?

    python -m benchmarks.train_step

Forward, loss with its balance part, backward, gradient norm, fused AdamW and EMA, on random latents, as train.py does
them. The limit is arithmetic: the model's FLOPs at the measured matrix rate, and the traffic of its elementwise
operations, perfectly fused, at the measured copy bandwidth; the optimizer is not part of it. Two more tables: the
memory of activations, as the planner computes it and as a GPU has it, and on a GPU fast-DiT's for the dense DiT-XL/2.
"""

import contextlib
import copy
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import cli
import machine
from analysis.plan import flops, plan
from benchmarks import harness
from benchmarks.harness import Goal, Rates
from benchmarks.naive import naive_model
from configuration import DiTConfig, build_config
from diffusion import RectifiedFlow
from models import CHECKPOINTING, DiT
from optim import EMA, build_optimizer
from training import Balance, total_loss

OBJECTIVE = RectifiedFlow()
ALPHA = 0.005
MEMORY = "peak memory of {}, 8 experts, bf16"


@dataclass(frozen=True)
class Case:
    """A model, how many images it gets at once, and the ways to measure."""

    model: str
    images: int
    ways: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model}, {self.images} images"


GPU_CASES = (  # goal 3 speaks of the compiled step
    Case("S", 256, ("naive", "ours", "ours, compiled")),
    Case("XL", 48, ("ours, compiled",)),  # two of its states do not fit
    Case("B", 128, ("naive", "ours", "ours, compiled")),
    Case("XL", 32, ("ours, compiled",)),
)
CPU_CASES = (Case("S", 4, ("naive", "ours")),)
QUICK_CASES = (Case("Nano", 2, ("naive", "ours")),)

FAST_DIT = {  # steps/s and GB on one A100, of fast-DiT's README: DiT-XL/2, batch 128
    "checkpointing": (0.43, 44.0),
    "checkpointing, mixed precision": (0.56, 40.5),
    "checkpointing, mixed precision, features": (0.84, 27.5),
    "mixed precision, features, compiled": None,
}
A100 = 312e12


def get_parser() -> cli.Parser:
    parser = harness.get_parser("train_step", __doc__)
    parser.set_defaults(rounds=5)
    harness.add_network_arguments(parser, seconds=240)
    return parser


def main(args) -> None:
    device, dtype, rates, limit = harness.start_network(args)
    cuda = device.type == "cuda"
    compiles = cuda if args.compile is None else args.compile

    tables = {"steps": [], "fast-DiT's table": []}
    with fresh_compiler_cache():
        for case in QUICK_CASES if args.quick else GPU_CASES if cuda else CPU_CASES:
            if limit.allows(str(case)):
                try:
                    tables["steps"] += step_rows(case, device, dtype, rates, args.rounds, compiles)
                except torch.OutOfMemoryError:
                    limit.left_out.append(f"{case}: out of memory")
        name = "Nano" if args.quick else "XL"
        if limit.allows("memory"):
            tables[MEMORY.format(name)] = memory_rows(device, name)
        for setting in FAST_DIT if cuda else ():
            if limit.allows(f"fast-DiT's table: {setting}"):
                tables["fast-DiT's table"].append(fast_dit_row(setting, device, rates, args.quick))
    found = goals(tables, device)
    harness.report(args, device, tables, found, rates=vars(rates), left_out=limit.left_out)


@contextlib.contextmanager
def fresh_compiler_cache():
    """What was compiled before does not count: the first step is a cold start."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


# ----------------------------------------------------------------------------------------------------------------- step


class Batch(NamedTuple):
    """What a data loader gives."""

    x0: Tensor  # (N, C, H, W)
    noise: Tensor
    u: Tensor  # (N,)
    labels: Tensor


class Trainer:
    """A model with its optimizer and average; `step` is the loop of training.py without its log."""

    def __init__(self, model: DiT, dtype: torch.dtype):
        self.model, self.dtype, self.device = model.train(), dtype, model.pos_embed.device
        self.optimizer, self.ema = build_optimizer(model, lr=1e-4, weight_decay=0.0), EMA(model, decay=0.9999)

    def loss(self, batch: Batch) -> Tensor:
        noised = OBJECTIVE.noised(batch.x0, batch.noise, batch.u)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out, routings = self.model(noised.x_t, noised.t, batch.labels, return_routing=True)
        return total_loss(OBJECTIVE.loss(out.float(), noised), routings, Balance(aux=ALPHA), None)[0]

    def step(self, batch: Batch) -> None:
        self.loss(batch).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if math.isfinite(norm.item()):  # the host access that train.py has in each step
            self.optimizer.step()
            self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """The loss, and its gradient by some parameters."""
        loss = self.loss(batch)
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad(loss, [parameters[name] for name in names])
        return {"loss": loss.detach(), **dict(zip(names, found, strict=True))}


def random_batch(config: DiTConfig, images: int, device: torch.device) -> Batch:
    x0, u, labels = harness.random_inputs(config, images, device)
    return Batch(x0, torch.randn_like(x0), u, labels)


def config_of(name: str, **options) -> DiTConfig:
    return build_config(f"DiT-{name}/2", **({"num_experts": 8} | options))


def step_rows(case: Case, device, dtype: torch.dtype, rates: Rates, rounds: int, compiles: bool) -> list[dict]:
    """Check the ways of a case, then time them."""
    config = config_of(case.model)
    batch = random_batch(config, case.images, device)
    model = harness.random_model(config, device)
    ways = [way for way in case.ways if compiles or "compiled" not in way]
    trainers = {}
    for way in ways:
        mine = naive_model(model) if way == "naive" else model if way == ways[-1] else copy.deepcopy(model)
        trainers[way] = Trainer(mine, dtype)
    check_trainers(trainers, Batch(*(part[:2] for part in batch)))

    starts = {}
    for way, trainer in trainers.items():
        if "compiled" in way:
            torch.compiler.reset()
            trainer.model.compile_blocks()
            starts[way] = seconds_of(partial(trainer.step, batch), device)
    steps = {way: partial(trainer.step, batch) for way, trainer in trainers.items()}
    times = harness.measure(steps, device, rounds)

    least = case.images * harness.training_limit(config, dtype, rates)
    return [
        {
            "over naive": times.ratio(way, "naive") if "naive" in trainers else None,
            "share of limit": least / times.median(way),
            "way": way,
            "model": case.model,
            "images": case.images,
            "images/s": case.images / times.median(way),
            "limit, images/s": case.images / least,
            "ms": times.median(way) * 1e3,
            "first step, s": starts.get(way),
        }
        for way in trainers
    ]


def check_trainers(trainers: dict[str, Trainer], batch: Batch) -> None:
    """All have the loss and gradients, near the network's two ends, of one of ours with a loop over segments."""
    names = ("x_embedder.proj.weight", "blocks.0.moe.gate.weight", "final_layer.linear.weight")
    ours = next(trainer for way, trainer in trainers.items() if way != "naive")
    with harness.experts_by(ours.model, "loop"):
        expected = ours.gradients(batch, names)
    found = {way: trainer.gradients(batch, names) for way, trainer in trainers.items()}
    harness.check(expected, found, harness.tolerance(ours.dtype, whole_model=True))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


# --------------------------------------------------------------------------------------------------------------- memory


def memory_rows(device: torch.device, name: str) -> list[dict]:
    """Peak memory per image under autocast to bf16: as the planner has it, and on a GPU as measured.

    Measured is the slope between two batches of what forward and backward take; gradients are there before.
    """
    planned = plan(f"DiT-{name}/2", batch_size=1, num_experts=8)
    computed = {kind: getattr(planned, kind).memory.activations / 1e6 for kind in CHECKPOINTING}
    rows = [memory_row("computed", kind, computed[kind], computed[kind]) for kind in CHECKPOINTING]
    for kind, compiled in itertools.product(CHECKPOINTING, (False, True)) if device.type == "cuda" else ():
        model = harness.random_model(config_of(name), device)
        model.set_checkpointing(kind)
        if compiled:
            model.compile_blocks()
        few, many = (32, 64) if kind == "full" else (8, 16)
        peaks = {}
        for images in (few, few, many):  # the first makes gradients and, if asked, compiles
            inputs = harness.random_inputs(model.config, images, device)
            torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast("cuda", torch.bfloat16):
                out, _ = model(*inputs, return_routing=True)
            out.float().square().mean().backward()
            peaks[images] = torch.cuda.max_memory_allocated(device)
        measured = (peaks[many] - peaks[few]) / (many - few) / 1e6
        rows.append(memory_row("compiled" if compiled else "eager", kind, measured, computed[kind]))
        del model, out
        torch.cuda.empty_cache()
    return rows


def memory_row(way: str, checkpointing: str, found: float, computed: float) -> dict:
    return {"over computed": found / computed, "MB/image": found, "way": way, "checkpointing": checkpointing}


# ------------------------------------------------------------------------------------------------------------- fast-DiT


def fast_dit_row(setting: str, device: torch.device, rates: Rates, quick: bool) -> dict:
    """One line of fast-DiT's table on this machine; its first two encode the images of each batch."""
    row = {"setting": setting}
    mixed, features = "mixed precision" in setting, "features" in setting
    dtype = machine.set_precision("bf16" if mixed else "tf32")
    images = 4 if quick else 128
    config = build_config("DiT-Nano/2" if quick else "DiT-XL/2")
    try:
        encode = None if features else random_encoder(images, device)
    except ImportError:
        return row | {"left out": "needs the package diffusers"}
    model = harness.random_model(config, device)
    model.set_checkpointing("full" if "checkpointing" in setting else "none")
    if "compiled" in setting:
        model.compile_blocks()
    trainer, batch = Trainer(model, dtype), random_batch(config, images, device)

    def step() -> None:
        trainer.step(batch if encode is None else batch._replace(x0=encode()))

    torch.cuda.reset_peak_memory_stats(device)
    rate = 1 / harness.measure({setting: step}, device, rounds=3).median(setting)
    work, published = images * flops(config).training, FAST_DIT[setting]
    return row | {
        "steps/s over fast-DiT's": rate / published[0] if published else None,
        "share of peak": share(work * rate, harness.peak_flops(device, dtype)),
        "share of peak, fast-DiT": work * published[0] / A100 if published else None,
        "share of matrix rate": work * rate / rates.flops,
        "steps/s": rate,
        "peak, GB": torch.cuda.max_memory_allocated(device) / 1e9,
    }


def share(part: float, whole: float | None) -> float | None:
    return None if whole is None else part / whole


def random_encoder(images: int, device: torch.device) -> Callable[[], Tensor]:
    """256-pixel images to latents, by an autoencoder of Stable Diffusion's shape with random weights."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae = vae.to(device).eval().requires_grad_(False)
    x = torch.rand(images, 3, 256, 256, device=device) * 2 - 1

    @torch.no_grad()
    def encode() -> Tensor:
        return vae.encode(x).latent_dist.sample() * 0.18215

    return encode


# ---------------------------------------------------------------------------------------------------------------- goals


def goals(tables: dict[str, list[dict]], device: torch.device) -> list[Goal]:
    """Rows 3, 6, 9, 10 and 11 of the table."""

    def best(title: str, column: str, **wanted) -> float | None:
        rows = (row for row in tables.get(title, ()) if all(row[key] == value for key, value in wanted.items()))
        return max((row[column] for row in rows if row[column] is not None), default=None)

    cuda = device.type == "cuda"
    absent = "left out" if cuda else "needs a GPU"
    found = []
    for name in ("S", "B", "XL") if cuda else ():
        value = best("steps", "share of limit", model=name, way="ours, compiled")
        found.append(Goal("3", f"{name}, 8 experts, compiled: share of the limit", ">= 0.65", value, absent))
    if not cuda:
        found.append(Goal("3", "S, B, XL, 8 experts, compiled: share of the limit", ">= 0.65"))
        value = best("steps", "over naive", model="S", way="ours")
        found.append(Goal("6", "CPU, S with 8 experts: step over naive", "<= 1.0", value, "left out"))
    for kind, bound in (("none", 727), ("full", 16.5)):
        for way in ("eager", "compiled") if cuda else ("computed",):
            value = best(MEMORY.format("XL"), "MB/image", checkpointing=kind, way=way)
            value = None if value is None else value / bound
            found.append(
                Goal("9", f"XL, checkpointing {kind}, {way}: over {bound} MB/image", "<= 1.2", value, "left out")
            )
    theirs = flops(build_config("DiT-XL/2")).training * 128 * 0.84 / A100
    value = best("fast-DiT's table", "share of peak", setting="mixed precision, features, compiled")
    found.append(Goal("10", "dense XL, batch 128: share of the card's peak", f">= {theirs:.2f}", value, absent))
    value = best("steps", "first step, s")
    found.append(Goal("11", "compiled cold start: seconds to the first step", "reported", value, absent))
    return found


if __name__ == "__main__":
    cli.run(main, get_parser())
