"""What the speed benchmarks share: flags, interleaved timing, checks before it, the machine's own limits, models.

A benchmark is a table of *ways* to do the same work. `check` compares what they compute with a reference, and raises
before anything is timed; `measure` lets them take turns, so that whatever else the machine does hits all alike; what is
reported are medians, and ratios are medians of the ratios within a round. On a GPU, CUDA events time the work. On a CPU
with one thread the clock is the process's own time, which leaves out what other processes do to it, except for caches
and memory; with more threads it is wall time, and the machine should be quiet.
"""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import cli
import distributed
from analysis.plan import GPUS, Precision, elementwise_bytes, flops
from configuration import DiTConfig
from machine import PRECISIONS, add_device_argument
from models import DiT

RESULTS = Path("results/benchmarks")
SHORTEST = 5e-3  # seconds: shorter work is repeated for one reading of the clock
FEWEST = 3  # rounds, however long they take
TOP_KERNELS, LONGEST_NAME = 15, 100  # of a profile

# --------------------------------------------------------------------------------------------------------------- flags


def get_parser(name: str, description: str, budget: float) -> cli.Parser:
    """The flags that every benchmark has, which has some `budget` of seconds by default."""
    parser = cli.Parser(prog=f"python -m benchmarks.{name}", description=description.partition("\n")[0])
    add_common_arguments(parser, budget)
    parser.add_argument("--rounds", type=cli.positive_int, default=11, help="that the medians are over, at most")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write")
    return parser


def add_common_arguments(parser: cli.Parser, budget: float | None) -> None:
    add_device_argument(parser)
    parser.add_argument(
        "--threads", type=cli.positive_int, default=1, help="of a CPU; with 1, other work disturbs least"
    )
    parser.add_argument("--budget", type=cli.number_in(0, 1e6), default=budget, help="begin no case after so many s")
    parser.add_switch(parser, "--resume", False, "keep what the file has of the same settings, versions and GPU")
    parser.add_switch(parser, "--quick", False, "tiny sizes, to see that it runs; the numbers mean nothing")


def start(args) -> torch.device:
    """The device of a benchmark. Random numbers are the same every time."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = distributed.choose_device(args.device)
    distributed.keep_freed_memory(device)
    return device


def add_network_arguments(parser: cli.Parser, compile: bool = True) -> None:
    """The flags of benchmarks that run networks."""
    parser.add_argument("--precision", choices=PRECISIONS, help="bf16 on a GPU, else fp32")
    if compile:
        parser.add_switch(parser, "--compile", None, "measure compiled ones too (default: on a GPU)")
        parser.add_switch(parser, "--profile", False, "then list the kernels that take the most time")


# ------------------------------------------------------------------------------------------------------------- checking


class WrongResult(AssertionError):
    """A way computes something else than the reference: its speed would mean nothing."""


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, in fp32; nan where either is not finite."""
    value, expected = value.detach().float(), expected.detach().float()
    return ((value - expected).norm() / expected.norm()).item()


def check(expected: Mapping[str, Tensor], results: Mapping[str, Mapping[str, Tensor]], tolerance: float) -> None:
    """Compare each way's tensors with the expected ones of the same names.

    Raises:
        WrongResult: one differs by more than `tolerance` (relative norm), is not finite, or is absent.
    """
    for way, tensors in results.items():
        for name, reference in expected.items():
            error = relative_error(tensors[name], reference) if name in tensors else float("nan")
            if not error <= tolerance:
                raise WrongResult(
                    f"{way}: {name} differs from the reference by {error:.2e}, allowed are {tolerance:.0e}"
                )


def tolerance(dtype: torch.dtype, whole_model: bool = False) -> float:
    """For results of `dtype` products against fp32. In a deep model rounding sends some tokens to other experts."""
    if dtype == torch.float32:
        return 1e-3
    return 0.15 if whole_model else 3e-2


# --------------------------------------------------------------------------------------------------------------- timing


@dataclass
class Times:
    """Seconds of each way, one per round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def ratio(self, way: str, other: str) -> float:
        """How many times as long as `other`: the median over rounds, in each of which both had their turn."""
        pairs = zip(self.seconds[way], self.seconds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def measure(
    ways: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    seconds: float | None = None,
) -> Times:
    """Time each way `rounds` times, in turns, after `warmup` calls of each that do not count.

    After so many `seconds` no other round begins, once there are `FEWEST`.
    """
    repeats = {}
    for name, way in ways.items():
        for _ in range(warmup):
            once = _seconds(way, device, 1)
        repeats[name] = max(1, min(100, round(SHORTEST / max(once, 1e-9))))
    times, began = Times({name: [] for name in ways}), time.monotonic()
    for done in range(rounds):
        if seconds is not None and done >= FEWEST and time.monotonic() - began > seconds:
            break
        for name, way in ways.items():
            times.seconds[name].append(_seconds(way, device, repeats[name]))
    return times


def _seconds(way: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The mean of `repeats` calls."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        for _ in range(repeats):
            way()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / repeats
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(repeats):
        way()
    return (clock() - began) / repeats


def kernels(work: Callable[[], object], device: torch.device) -> list[dict]:
    """What one call spends its time in, the most first: kernels on a GPU, operators on a CPU, under a row for all.

    "over the call" is a kernel's share of the time that the call takes; of all, less than 1 where the GPU waits.
    """
    cuda = device.type == "cuda"
    work()  # what only a first call does
    seconds = _seconds(work, device, 1)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    where = DeviceType.CUDA if cuda else DeviceType.CPU
    found = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == where and not event.is_user_annotation
    ]
    busy, count = sum(each[0] for each in found), sum(each[1] for each in found)
    return [
        {"over the call": us / 1e6 / seconds, "ms": us / 1e3, "count": calls, "kernel": name[:LONGEST_NAME]}
        for us, calls, name in [(busy, count, "all"), *sorted(found, reverse=True)[:TOP_KERNELS]]
    ]


# ------------------------------------------------------------------------------------------------------ the machine


@dataclass(frozen=True)
class Rates:
    """What the machine sustains, measured."""

    flops: float  # of one large matrix product, per second
    bandwidth: float  # of a large copy, bytes per second, read and written ones together


def measured_rates(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Rates:
    """Random data: products of zeros run faster than products of numbers do."""
    cuda = device.type == "cuda"
    side, size = (8192, 2**30) if cuda else (1024, 2**26)  # of the matrices; of the copied tensor, in elements
    if quick:
        side, size = 128, 2**16
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    times = measure({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=7, warmup=3)
    return Rates(2 * side**3 / times.median("product"), 2 * 4 * size / times.median("copy"))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The datasheet's, of a GPU in the planner's table; None of others."""
    name, precision = torch.cuda.get_device_name(device).lower(), str(dtype).removeprefix("torch.")
    known = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32"}[precision]
    return next((gpu.tflops[known] * 1e12 for key, gpu in GPUS.items() if key in name), None)


def machine(device: torch.device) -> dict:
    record = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    record["load"] = [round(load, 2) for load in os.getloadavg()]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
    return record


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def versions() -> dict:
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


# --------------------------------------------------------------------------------------------------------- the limits


def forward_limit(config: DiTConfig, dtype: torch.dtype, rates: Rates) -> float:
    """Seconds that one image's forward takes at least: products, then what lies between them, perfectly fused.

    All activations are taken to be of `dtype`, the residual stream too.
    """
    size = dtype.itemsize
    return flops(config).forward / rates.flops + elementwise_bytes(config, Precision(size, size)) / rates.bandwidth


def training_limit(config: DiTConfig, dtype: torch.dtype, rates: Rates) -> float:
    """The same for forward and backward, in which every elementwise pass has two others; without the optimizer."""
    size = dtype.itemsize
    between = 3 * elementwise_bytes(config, Precision(size, size))
    return flops(config).training / rates.flops + between / rates.bandwidth


# --------------------------------------------------------------------------------------------------------------- models


def random_model(config: DiTConfig, device: torch.device) -> DiT:
    """A DiT, drawn on the device, in which no weight is zero: fresh ones multiply every block's output by zero."""
    with torch.device(device):
        model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return model


@contextlib.contextmanager
def experts_by(model: DiT, backend: str):
    """Within it, the experts of a model run by another backend of `moe.Experts`."""
    experts = [block.moe.experts for block in model.blocks if block.is_moe]
    before = [each.backend for each in experts]
    for each in experts:
        each.backend = backend
    yield
    for each, name in zip(experts, before, strict=True):
        each.backend = name


def random_inputs(config: DiTConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, C, H, W), times (N,) in 0..1, labels (N,)."""
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    return x, torch.rand(batch, device=device), torch.randint(config.num_classes, (batch,), device=device)
