"""How fast is a MoE layer: grouped products against the naive loop, segments, padding, and a dense MLP of equal FLOPs?

    python -m benchmarks.moe_block

One layer of each size on random tokens, its weights in the precision of its products; forward without gradients, and
forward with backward to input and weights. "naive" is the published expert loop, "dense" has the FLOPs of the activated
experts and no routing: the floor. The ratio is to that floor, of compiled ways to the compiled one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import cli
from benchmarks import harness
from benchmarks.naive import WAYS, in_another_way
from benchmarks.report import Bench, Goal, Tables, column
from configuration import build_config
from moe import ExpertsConfig, MoE, load_statistics
from routers import RouterConfig

EXPERTS = {  # name: experts, experts per token, width of one over D; each with 8 D activated, beside the shared 2 D
    "8": (8, 2, 4.0),
    "16": (16, 2, 4.0),
    "64": (64, 2, 4.0),
    "64 narrow": (64, 16, 0.5),
}
COMPILED = ("grouped_mm", "dense")  # the others ask the host, where a graph breaks
PROFILED = ("grouped_mm, compiled", "grouped_mm", "dense, compiled")  # forward + backward
DENSE = ("dense", "dense, compiled")
LAYER, GROWTH = "one MoE layer", "our layer, forward + backward, as it grows"


@dataclass(frozen=True)
class Case:
    """One layer and its tokens."""

    model: str  # S, B, XL, G
    experts: str  # key of EXPERTS
    tokens: int
    routing: str = "uniform"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model}, {self.experts} experts, {self.tokens} tokens, {self.routing}"


GPU_CASES = (  # the most important first
    Case("XL", "8", 16384, compiled=True),
    Case("S", "8", 65536, compiled=True),
    Case("S", "8", 16384, compiled=True),
    Case("XL", "8", 2048, compiled=True),
    Case("XL", "64 narrow", 16384, compiled=True),
    Case("XL", "64", 16384),
    Case("XL", "8", 65536),
    Case("XL", "8", 8192),
    Case("XL", "8", 512),
    Case("XL", "8", 16384, "skewed"),
    Case("XL", "16", 16384),
    *(Case(model, "8", 16384, compiled=True) for model in ("B", "G")),
    *(Case(model, "8", 2048) for model in ("S", "B", "G")),
    *(Case(model, "16", 16384) for model in ("S", "B", "G")),
    Case("S", "64 narrow", 16384),
    Case("G", "8", 65536),
    Case("XL", "64 narrow", 16384, "skewed"),
)
CPU_CASES = (
    Case("S", "8", 512),
    Case("S", "8", 2048),
    Case("S", "8", 512, "skewed"),
    Case("S", "16", 512),
    Case("S", "64", 512),
    Case("S", "64 narrow", 512),
)
QUICK_CASES = (Case("Nano", "8", 64), Case("Nano", "64 narrow", 64, "skewed"), Case("Nano", "8", 256))


def get_parser() -> cli.Parser:
    parser = harness.get_parser("moe_block", __doc__, budget=240)
    harness.add_network_arguments(parser)
    return parser


def main(args) -> None:
    bench = Bench(args, goals, network=True)
    cases = QUICK_CASES if args.quick else GPU_CASES if bench.cuda else CPU_CASES
    first, *rest = ((str(case), partial(case_rows, bench, case)) for case in cases)
    bench.run(dict([first, ("growth", partial(growth_rows, bench)), *rest]))


def case_rows(bench: Bench, case: Case) -> Iterator[tuple[str, list[dict]]]:
    """Check all ways of a case, then time them: first eager ones, which a compiler that fails does not take along."""
    moe, x = make_layer(case, bench.device, bench.dtype)
    layers, grad = {way: in_another_way(moe, way) for way in WAYS}, torch.randn_like(x)
    check_layers(moe, layers, x, grad, bench.dtype)
    yield from way_rows(bench, case, moe, layers, x, grad)
    if bench.compiles(case.compiled):
        layers = {way: layers[way] for way in ("naive", *COMPILED)}
        for way in COMPILED:
            layers[f"{way}, compiled"] = torch.compile(layers[way], fullgraph=True, dynamic=False)
        check_layers(moe, layers, x, grad, bench.dtype)
        yield from way_rows(bench, case, moe, layers, x, grad, kind=", compiled")


def way_rows(bench: Bench, case: Case, moe: MoE, layers: dict, x: Tensor, grad: Tensor, kind: str = ""):
    """A row for each pass and for each way whose name ends so."""
    load = load_statistics(moe(x)[1].tokens_per_expert[None])["load_max_over_mean"][0]
    labels = {"model": case.model, "experts": case.experts, "tokens": case.tokens, "routing": case.routing}
    for name, call in (("forward + backward", forward_backward), ("forward", forward)):
        ways = {way: partial(call, layer, x, grad) for way, layer in layers.items()}
        times = bench.measure(ways)
        least = products(case, x.shape[1]) * (1 if name == "forward" else 3) / bench.rates.flops
        dense = {f"{way}, ms": times.median(way) * 1e3 if way in layers else None for way in DENSE}
        rows = [
            {
                "over dense": times.ratio(way, f"dense{kind}"),
                "over naive": times.ratio(way, "naive"),
                "share of matrix rate": least / times.median(way),
                "way": way,
                "pass": name,
                **labels,
                "load max": load,
                "ms": times.median(way) * 1e3,
                **dense,
                "rounds": times.rounds,
            }
            for way in layers
            if way.endswith(kind)
        ]
        yield LAYER, rows
    profiled = {way: partial(forward_backward, layers[way], x, grad) for way in PROFILED if way in layers}
    yield from bench.kernels({way: work for way, work in profiled.items() if way.endswith(kind)}, **labels)


def make_layer(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[MoE, Tensor]:
    """The layer, and its tokens (T, D). Skewed: the first of E experts is liked best, the last one least."""
    width = build_config(f"DiT-{case.model}/2").hidden_size
    count, top_k, ratio = EXPERTS[case.experts]
    with torch.device(device):
        moe = MoE(width, ExpertsConfig(int(ratio * width), RouterConfig(count, top_k), shared_width=2 * width))
        for linear in (module for module in moe.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
        moe.init_weights()
        x = torch.randn(case.tokens, width)
    if case.routing == "skewed":
        with torch.no_grad():
            x[:, 0] += 1
            moe.gate.weight[:, 0] = torch.linspace(1.5, -1.5, count, device=device)
    return moe.to(dtype), x.to(dtype).requires_grad_()


def products(case: Case, width: int) -> int:
    """FLOPs of the forward."""
    _, top_k, ratio = EXPERTS[case.experts]
    return 2 * 3 * case.tokens * width * int(top_k * ratio * width + 2 * width)


def forward(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    with torch.no_grad():
        return output(layer, x)


def forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of input and weights."""
    return torch.autograd.grad(output(layer, x), (x, *layer.parameters()), grad)


def output(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def check_layers(moe: MoE, layers: dict[str, nn.Module], x: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
    """All ways but the dense one compute what the loop over segments computes in fp32."""
    exact = in_another_way(moe, "loop").float() if dtype != torch.float32 else in_another_way(moe, "loop")
    wide = x.detach().float().requires_grad_()
    expected = results(exact, wide, grad.float())
    found = {way: results(layer, x, grad) for way, layer in layers.items() if not way.startswith("dense")}
    harness.check(expected, found, harness.tolerance(dtype))


def results(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Outputs with and without gradients (the naive way has a path for each), and the gradients all ways have."""
    out = output(layer, x)
    x_grad, gate_grad = torch.autograd.grad(out, (x, layer.gate.weight), grad)
    return {"output": out, "output without gradients": forward(layer, x, grad), "x": x_grad, "gate": gate_grad}


def growth_rows(bench: Bench) -> Iterator[tuple[str, list[dict]]]:
    """With more experts and with more tokens; eager."""
    model, tokens = ("Nano", 64) if bench.args.quick else ("XL", 16384) if bench.cuda else ("S", 512)
    cases = {experts: Case(model, experts, tokens) for experts in ("8", "64", "64 narrow")}
    cases["4 x tokens"] = Case(model, "8", 4 * tokens)
    ways = {}
    for name, case in cases.items():
        moe, x = make_layer(case, bench.device, bench.dtype)
        ways[name] = partial(forward_backward, moe, x, torch.randn_like(x))
    times = bench.measure(ways)
    yield (
        GROWTH,
        [
            {
                "over 8 experts": times.ratio(name, "8"),
                "what": name,
                "model": model,
                "tokens": case.tokens,
                "ms": times.median(name) * 1e3,
                "rounds": times.rounds,
            }
            for name, case in cases.items()
        ],
    )


def goals(tables: Tables, cuda: bool) -> list[Goal]:
    """Rows 1, 2 and 7 of the table; the last one is the same on any machine."""

    def find(title: str, name: str, **wanted) -> float | None:
        return next(iter(column(tables.get(title, ()), name, **wanted)), None)

    absent = "missing" if cuda else "needs a GPU"
    case = {"model": "XL", "experts": "8", "routing": "uniform", "pass": "forward + backward"}
    found = []
    for way in ("grouped_mm", "grouped_mm, compiled"):
        what = f"XL, 8 experts, forward + backward, {way}"
        over = find(LAYER, "over dense", way=way, tokens=16384, **case)
        found.append(Goal("1", f"{what}: over dense, 16k", "<= 1.15", over, absent))
        for tokens, bound in ((2048, 0.33), (16384, 0.6)):
            over = find(LAYER, "over naive", way=way, tokens=tokens, **case)
            found.append(Goal("2", f"{what}: over naive, {tokens // 1024}k", f"<= {bound}", over, absent))
    for name, bound in (("64", 1.15), ("64 narrow", 1.15), ("4 x tokens", 4.1)):
        over = find(GROWTH, "over 8 experts", what=name)
        found.append(Goal("7", f"{name}, over 8 experts", f"<= {bound}", over, "missing"))
    return found


if __name__ == "__main__":
    cli.run(main, get_parser())
