"""How fast is a training step, with AdamW and EMA: against the naive expert loop, and against the machine's limit?

    python -m benchmarks.train_step
    python -m benchmarks.train_step --parts memory

Forward, loss with its balance part, backward, gradient norm, fused AdamW and EMA, on random latents, as train.py does
them. The limit is arithmetic: the model's FLOPs at the measured matrix rate, and the traffic of its elementwise
operations, perfectly fused, at the measured copy bandwidth; the optimizer is not part of it. Three more parts: the
memory of activations, as the planner computes it and as a GPU has it; and on a GPU fast-DiT's table for the dense
DiT-XL/2, and how long a compiled step takes to begin.
"""

import contextlib
import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import cli
import machine
from analysis.plan import flops, plan
from benchmarks import harness
from benchmarks.naive import naive_model
from benchmarks.report import Bench, Goal, Tables, column
from configuration import DiTConfig, build_config
from diffusion import RectifiedFlow
from models import CHECKPOINTING, DiT
from optim import EMA, build_optimizer
from training import Balance, total_loss

OBJECTIVE = RectifiedFlow()
ALPHA = 0.005
STEPS, TABLE, START = "steps", "fast-DiT's table", "cold start"
MEMORY = "peak memory, 8 experts, bf16"
PROFILED = ("ours, compiled", "ours")


@dataclass(frozen=True)
class Case:
    """A model, how many images it gets at once, and the ways to measure."""

    model: str
    images: int
    ways: tuple[str, ...]
    depth: int | None = None  # blocks, where not all of the model's

    @property
    def network(self) -> str:
        return self.model if self.depth is None else f"{self.model} of {self.depth} blocks"

    def __str__(self) -> str:
        return f"{self.network}, {self.images} images"


GPU_CASES = (  # the most important first; goal 3 speaks of the compiled step
    Case("S", 256, ("naive", "ours", "ours, compiled")),
    Case("B", 128, ("naive", "ours", "ours, compiled")),
    Case("XL", 48, ("ours, compiled",)),  # two of its states do not fit
    Case("XL", 48, ("ours", "ours, compiled"), depth=8),  # on 80 GB one does not, and here there is an eager one beside
    Case("XL", 32, ("ours, compiled",)),
)
CPU_CASES = (Case("S", 4, ("naive", "ours", "ours, compiled")),)
QUICK_CASES = (Case("Nano", 2, ("naive", "ours", "ours, compiled")),)

FAST_DIT = {  # steps/s and GB on one A100, of fast-DiT's README: DiT-XL/2, batch 128; the goal's setting is ours
    "mixed precision, features, compiled": None,
    "checkpointing, mixed precision, features": (0.84, 27.5),
    "checkpointing, mixed precision": (0.56, 40.5),
    "checkpointing": (0.43, 44.0),
}
A100 = 312e12


def get_parser() -> cli.Parser:
    parser = harness.get_parser("train_step", __doc__, budget=300)
    parser.set_defaults(rounds=5)
    harness.add_network_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    return parser


def main(args) -> None:
    bench = Bench(args, goals, network=True)
    bench.run({name: case for part in args.parts for name, case in PARTS[part](bench).items()})


def step_cases(bench: Bench) -> dict[str, Callable]:
    cases = QUICK_CASES if bench.args.quick else GPU_CASES if bench.cuda else CPU_CASES
    return {str(case): partial(step_rows, bench, case) for case in cases}


def memory_cases(bench: Bench) -> dict[str, Callable]:
    name = "Nano" if bench.args.quick else "XL"
    ways = ("eager", "compiled") if bench.cuda else ()
    return {f"memory of {name}, computed": partial(computed_memory, name)} | {
        f"memory of {name}, {way}, checkpointing {kind}": partial(measured_memory, bench, name, way, kind)
        for way in ways
        for kind in CHECKPOINTING
    }


def table_cases(bench: Bench) -> dict[str, Callable]:
    return {f"{TABLE}: {setting}": partial(fast_dit_row, bench, setting) for setting in FAST_DIT if bench.cuda}


def start_cases(bench: Bench) -> dict[str, Callable]:
    return {START: partial(start_rows, bench)} if bench.compiles() else {}


PARTS = {"steps": step_cases, "memory": memory_cases, "table": table_cases, "cold-start": start_cases}


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


def config_of_case(case: Case) -> DiTConfig:
    return config_of(case.model, **({} if case.depth is None else {"depth": case.depth}))


def step_rows(bench: Bench, case: Case) -> Iterator[tuple[str, list[dict]]]:
    """Check the ways of a case, then time them."""
    device, config = bench.device, config_of_case(case)
    batch = random_batch(config, case.images, device)
    model = harness.random_model(config, device)
    ways = [way for way in case.ways if "compiled" not in way or bench.compiles()]
    trainers = {}
    for way in ways:
        mine = naive_model(model) if way == "naive" else model if way == ways[-1] else copy.deepcopy(model)
        trainers[way] = Trainer(mine, bench.dtype)
    few = Batch(*(part[:2] for part in batch))
    check_trainers(trainers, few)

    for trainer in trainers.values():
        trainer.step(few)  # whether optimizer and average fit shows before anything is compiled
    eager = {way: trainer for way, trainer in trainers.items() if "compiled" not in way}
    if eager:  # first, so that a compiler that fails does not take them along
        yield from way_rows(bench, case, config, eager, batch)
    for way in (way for way in trainers if way not in eager):
        trainers[way].model.compile_blocks()
        first = seconds_of(partial(trainers[way].step, batch), device)
        yield from way_rows(bench, case, config, trainers, batch, first)


def way_rows(bench: Bench, case: Case, config: DiTConfig, trainers: dict, batch: Batch, first: float | None = None):
    """A row for each way; if there is a `first` step of a compiled one, for that alone."""
    steps = {way: partial(trainer.step, batch) for way, trainer in trainers.items()}
    times = bench.measure(steps)
    least = case.images * harness.training_limit(config, bench.dtype, bench.rates)
    labels = {"model": case.network, "images": case.images}
    told = [way for way in trainers if first is None or "compiled" in way]
    rows = [
        {
            "over naive": times.ratio(way, "naive") if "naive" in trainers else None,
            "share of limit": least / times.median(way),
            "way": way,
            **labels,
            "images/s": case.images / times.median(way),
            "limit, images/s": case.images / least,
            "ms": times.median(way) * 1e3,
            "first step, s": first,
            "rounds": times.rounds,
        }
        for way in told
    ]
    yield STEPS, rows
    yield from bench.kernels({way: steps[way] for way in PROFILED if way in told}, **labels)


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


def computed_memory(name: str) -> Iterator[tuple[str, list[dict]]]:
    """Peak memory per image under autocast to bf16, as the planner has it."""
    yield MEMORY, [memory_row(name, "computed", kind, found, found) for kind, found in computed(name).items()]


def computed(name: str) -> dict[str, float]:
    """MB an image, for the ways that the planner knows."""
    planned = plan(f"DiT-{name}/2", batch_size=1, num_experts=8)
    outlooks = {kind: getattr(planned, kind, None) for kind in CHECKPOINTING}
    return {kind: outlook.memory.activations / 1e6 for kind, outlook in outlooks.items() if outlook is not None}


def measured_memory(bench: Bench, name: str, way: str, kind: str) -> Iterator[tuple[str, list[dict]]]:
    """The slope between two batches of what forward and backward take; gradients are there before."""
    device = bench.device
    model = harness.random_model(config_of(name), device)
    model.set_checkpointing(kind)
    if way == "compiled":
        model.compile_blocks()
    few, many = (8, 16) if kind in ("none", "selective") else (32, 64)
    peaks = {}
    for images in (few, many):
        torch.compiler.reset()  # else the second batch would be compiled for batches of any size
        for _ in range(2):  # the first makes gradients and, if asked, compiles
            inputs = harness.random_inputs(model.config, images, device)
            torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast("cuda", torch.bfloat16):
                out, _ = model(*inputs, return_routing=True)
            out.float().square().mean().backward()
            peaks[images] = torch.cuda.max_memory_allocated(device)
            del out, _
    found = (peaks[many] - peaks[few]) / (many - few) / 1e6
    yield MEMORY, [memory_row(name, way, kind, found, computed(name).get(kind))]


def memory_row(name: str, way: str, checkpointing: str, found: float, computed: float | None) -> dict:
    over = None if computed is None else found / computed
    return {"over computed": over, "MB/image": found, "way": way, "model": name, "checkpointing": checkpointing}


# ------------------------------------------------------------------------------------------------------------- fast-DiT


def fast_dit_row(bench: Bench, setting: str) -> Iterator[tuple[str, list[dict]]]:
    """One line of fast-DiT's table on this machine; its first two encode the images of each batch."""
    device = bench.device
    mixed, features = "mixed precision" in setting, "features" in setting
    dtype = machine.set_precision("bf16" if mixed else "tf32")
    images = 4 if bench.args.quick else 128
    config = build_config("DiT-Nano/2" if bench.args.quick else "DiT-XL/2")
    encode = None if features else random_encoder(images, device)
    model = harness.random_model(config, device)
    model.set_checkpointing("full" if "checkpointing" in setting else "none")
    if "compiled" in setting:
        model.compile_blocks()
    trainer, batch = Trainer(model, dtype), random_batch(config, images, device)

    def step() -> None:
        trainer.step(batch if encode is None else batch._replace(x0=encode()))

    torch.cuda.reset_peak_memory_stats(device)
    rate = 1 / bench.measure({setting: step}, rounds=3).median(setting)
    work, published = images * flops(config).training, FAST_DIT[setting]
    row = {
        "steps/s over fast-DiT's": rate / published[0] if published else None,
        "share of peak": share(work * rate, harness.peak_flops(device, dtype)),
        "share of peak, fast-DiT": work * published[0] / A100 if published else None,
        "share of matrix rate": work * rate / bench.rates.flops,
        "setting": setting,
        "steps/s": rate,
        "peak, GB": torch.cuda.max_memory_allocated(device) / 1e9,
    }
    yield TABLE, [row]


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


# ----------------------------------------------------------------------------------------------------------- cold start


def start_rows(bench: Bench) -> Iterator[tuple[str, list[dict]]]:
    """Seconds from the first call to the end of the first step: nothing compiled before, then all of it on disk.

    One compilation serves all blocks, so a few of them are enough.
    """
    case = Case("Nano", 2, ()) if bench.args.quick else Case("XL", 48, (), depth=8)
    seconds = {}
    with fresh_compiler_cache():
        for cache in ("empty", "filled"):
            torch.compiler.reset()
            model = harness.random_model(config_of_case(case), bench.device)
            model.compile_blocks()
            trainer, batch = Trainer(model, bench.dtype), random_batch(model.config, case.images, bench.device)
            seconds[cache] = seconds_of(partial(trainer.step, batch), bench.device)
            del model, trainer
            over = seconds[cache] / seconds["empty"]
            row = {"over the empty cache": over, "cache": cache, "first step, s": seconds[cache], "model": case.network}
            yield START, [row]


@contextlib.contextmanager
def fresh_compiler_cache():
    """What was compiled before does not count."""
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


# ---------------------------------------------------------------------------------------------------------------- goals


def goals(tables: Tables, cuda: bool) -> list[Goal]:
    """Rows 3, 6, 9, 10 and 11 of the table."""

    def most(title: str, name: str, **wanted) -> float | None:
        return max(column(tables.get(title, ()), name, **wanted), default=None)

    absent = "missing" if cuda else "needs a GPU"
    found = []
    for name in ("S", "B", "XL") if cuda else ():
        value = most(STEPS, "share of limit", model=name, way="ours, compiled")
        found.append(Goal("3", f"{name}, 8 experts, compiled: share of the limit", ">= 0.65", value, absent))
    if not cuda:
        found.append(Goal("3", "S, B, XL, 8 experts, compiled: share of the limit", ">= 0.65"))
        value = most(STEPS, "over naive", model="S", way="ours")
        found.append(Goal("6", "CPU, S with 8 experts: step over naive", "<= 1.0", value, "missing"))
    for kind, bound in (("none", 727), ("full", 16.5)):
        for way in ("eager", "compiled") if cuda else ("computed",):
            value = most(MEMORY, "MB/image", model="XL", checkpointing=kind, way=way)
            value = None if value is None else value / bound
            what = f"XL, checkpointing {kind}, {way}: over {bound} MB/image"
            found.append(Goal("9", what, "<= 1.2", value, "missing"))
    theirs = flops(build_config("DiT-XL/2")).training * 128 * 0.84 / A100
    value = most(TABLE, "share of peak", setting="mixed precision, features, compiled")
    found.append(Goal("10", "dense XL, batch 128: share of the card's peak", f">= {theirs:.2f}", value, absent))
    value = most(START, "first step, s", cache="empty")
    found.append(Goal("11", "compiled cold start: seconds to the first step", "reported", value, absent))
    return found


if __name__ == "__main__":
    cli.run(main, get_parser())
