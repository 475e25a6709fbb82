"""How fast is a guided sampling step: against the naive expert loop, and against the machine's limit?

    python -m benchmarks.sample_step

One Euler step of rectified flow with guidance: the network on twice the batch, weights in the precision of products.
The limit is arithmetic (see benchmarks.train_step). "CUDA graph" is `sampling.captured`.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import cli
import sampling
from benchmarks import harness
from benchmarks.naive import naive_model
from benchmarks.report import Bench, Goal, Tables, column
from configuration import build_config
from diffusion import classifier_free_guidance
from models import DiT

STEPS = 50  # of an image, for images/s
SCALE = 1.5
TITLE = "guided sampling step"
PROFILED = ("ours, compiled, CUDA graph", "ours, CUDA graph", "ours")


@dataclass(frozen=True)
class Case:
    """A model and how many images are drawn at once; the network sees twice as many."""

    model: str
    experts: int
    images: int
    naive: bool = True

    def __str__(self) -> str:
        return f"{self.model}, {self.experts} experts, {self.images} images"


GPU_CASES = (  # the most important first
    Case("XL", 8, 32),
    Case("S", 8, 128),
    Case("B", 8, 64),
    Case("G", 8, 16, naive=False),
    Case("XL", 8, 4),
    Case("S", 8, 4),
    Case("XL", 16, 32, naive=False),
    Case("G", 16, 16, naive=False),
)
CPU_CASES = (Case("S", 8, 2), Case("S", 8, 1))
QUICK_CASES = (Case("Nano", 8, 1),)


def get_parser() -> cli.Parser:
    parser = harness.get_parser("sample_step", __doc__, budget=120)
    harness.add_network_arguments(parser)
    parser.add_switch(parser, "--cuda-graph", True, "measure CUDA graphs, on a GPU")
    return parser


@torch.no_grad()
def main(args) -> None:
    bench = Bench(args, goals, network=True)
    cases = QUICK_CASES if args.quick else GPU_CASES if bench.cuda else CPU_CASES
    bench.run({str(case): partial(case_rows, bench, case) for case in cases})


def case_rows(bench: Bench, case: Case) -> Iterator[tuple[str, list[dict]]]:
    """Check the ways of a case, then time them: first eager ones, which a compiler that fails does not take along."""
    graphs = bench.cuda and bench.args.cuda_graph
    model = harness.random_model(build_config(f"DiT-{case.model}/2", num_experts=case.experts), bench.device)
    model = model.to(bench.dtype).eval()
    x, _, labels = harness.random_inputs(model.config, case.images, bench.device)

    def step(network: Callable) -> Callable[[], Tensor]:
        return euler_step(network, model.config, x, labels)

    with harness.experts_by(model, "loop"):
        expected = step(model)()
    steps = {"naive": step(naive_model(model))} if case.naive else {}
    steps["ours"] = step(model)
    if graphs:
        steps["ours, CUDA graph"] = step(sampling.captured(model))
    yield from way_rows(bench, case, model, steps, expected, list(steps))
    if bench.compiles():
        before, compiled = list(steps), shared_copy(model)
        compiled.compile_blocks()
        steps["ours, compiled"] = step(compiled)
        if graphs:
            steps["ours, compiled, CUDA graph"] = step(sampling.captured(compiled))
        yield from way_rows(bench, case, model, steps, expected, [way for way in steps if way not in before])


def way_rows(bench: Bench, case: Case, model: DiT, steps: dict, expected: Tensor, told: list[str]):
    """A row for each way that is to be `told` of, all of them taking turns."""
    found = {way: {"x": steps[way]()} for way in told}
    harness.check({"x": expected}, found, harness.tolerance(bench.dtype, whole_model=True))
    times = bench.measure(steps)
    least = 2 * case.images * harness.forward_limit(model.config, bench.dtype, bench.rates)
    labels = {"model": case.model, "experts": case.experts, "images": case.images}
    rows = [
        {
            "over naive": times.ratio(way, "naive") if case.naive else None,
            "share of limit": least / times.median(way),
            "way": way,
            **labels,
            f"images/s, {STEPS} steps": case.images / times.median(way) / STEPS,
            "limit, images/s": case.images / least / STEPS,
            "ms": times.median(way) * 1e3,
            "rounds": times.rounds,
        }
        for way in told
    ]
    yield TITLE, rows
    yield from bench.kernels({way: steps[way] for way in PROFILED if way in told}, **labels)


def shared_copy(model: DiT) -> DiT:
    """A model of its own on the same weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def euler_step(network: Callable, config, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """From time 0.7 to 0.6; the velocity is the first half of the channels."""
    denoise = classifier_free_guidance(network, labels, config.null_class, SCALE)
    return lambda: x - 0.1 * denoise(x, 0.7)[:, : x.shape[1]].float()


def goals(tables: Tables, cuda: bool) -> list[Goal]:
    """Rows 4 and 6 of the table."""
    rows = tables.get(TITLE, ())
    if not cuda:
        over = column(rows, "over naive", model="S", way="ours")
        return [
            Goal("4", "S, B, XL, G, 8 experts, CUDA graph: share of the limit", ">= 0.65"),
            Goal("6", "CPU, S with 8 experts: guided step over naive", "<= 0.93", max(over, default=None), "missing"),
        ]
    found = []
    for name in ("S", "B", "XL", "G"):
        ways = ("ours, CUDA graph", "ours, compiled, CUDA graph")
        shares = [share for way in ways for share in column(rows, "share of limit", model=name, experts=8, way=way)]
        what = f"{name}, 8 experts, CUDA graph: share of the limit"
        found.append(Goal("4", what, ">= 0.65", max(shares, default=None), "missing"))
    return found


if __name__ == "__main__":
    cli.run(main, get_parser())
