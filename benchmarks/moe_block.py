"""How fast is a MoE layer: grouped products against the naive loop, segments, padding, and a dense MLP of equal FLOPs?

    python -m benchmarks.moe_block

One layer of each size on random tokens, its weights in the precision of its products; forward without gradients, and
forward with backward to input and weights. "naive" is the published expert loop, "dense" has the FLOPs of the activated
experts and no routing: the floor. The ratio is to that floor.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import cli
from benchmarks import harness
from benchmarks.harness import Goal
from benchmarks.naive import WAYS, in_another_way
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
    Case("XL", "8", 2048, compiled=True),
    Case("XL", "64 narrow", 16384, compiled=True),
    Case("XL", "64", 16384),
    Case("XL", "8", 65536),
    Case("XL", "8", 8192),
    Case("XL", "8", 512),
    Case("XL", "8", 16384, "skewed"),
    Case("XL", "16", 16384),
    *(Case(model, "8", tokens, compiled=tokens == 16384) for model in ("S", "B", "G") for tokens in (16384, 2048)),
    *(Case(model, "16", 16384) for model in ("S", "B", "G")),
    Case("S", "64 narrow", 16384),
    Case("S", "8", 65536),
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
    parser = harness.get_parser("moe_block", __doc__)
    harness.add_network_arguments(parser, seconds=200)
    return parser


def main(args) -> None:
    device, dtype, rates, limit = harness.start_network(args)

    cases = QUICK_CASES if args.quick else GPU_CASES if device.type == "cuda" else CPU_CASES
    rows = []
    for case in cases:
        if limit.allows(str(case)):
            compiled = case.compiled and device.type == "cuda" if args.compile is None else args.compile
            rows += case_rows(case, device, dtype, rates, args.rounds, compiled)
    grown = scaling(args, device, dtype)
    tables = {"one MoE layer": rows}
    harness.report(args, device, tables, goals(rows, grown), rates=vars(rates), left_out=limit.left_out)


def case_rows(case: Case, device, dtype: torch.dtype, rates: harness.Rates, rounds: int, compiled: bool) -> list[dict]:
    """Check all ways of a case, then time them; a row for each way and pass."""
    moe, x = make_layer(case, device, dtype)
    layers = {way: in_another_way(moe, way) for way in WAYS}
    grad = torch.randn_like(x)
    if compiled:
        torch.compiler.reset()
        for way in COMPILED:
            layers[f"{way}, compiled"] = torch.compile(in_another_way(moe, way), fullgraph=True, dynamic=False)
        layers["dense, compiled"].load_state_dict(layers["dense"].state_dict())
    check_layers(moe, layers, x, grad, dtype)
    load = load_statistics(moe(x)[1].tokens_per_expert[None])["load_max_over_mean"][0]

    rows = []
    for name, call in (("forward", forward), ("forward + backward", forward_backward)):
        ways = {way: partial(call, layer, x, grad) for way, layer in layers.items()}
        times = harness.measure(ways, device, rounds)
        limit = products(case, x.shape[1]) * (1 if name == "forward" else 3) / rates.flops
        for way in layers:
            floor = "dense, compiled" if way.endswith("compiled") else "dense"
            rows.append(
                {
                    "over dense": times.ratio(way, floor),
                    "over naive": times.ratio(way, "naive"),
                    "share of matrix rate": limit / times.median(way),
                    "way": way,
                    "pass": name,
                    "model": case.model,
                    "experts": case.experts,
                    "tokens": case.tokens,
                    "routing": case.routing,
                    "load max": load,
                    "ms": times.median(way) * 1e3,
                }
            )
    return rows


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


def scaling(args, device: torch.device, dtype: torch.dtype) -> harness.Times:
    """Our layer, forward with backward, with more experts and with more tokens."""
    model, tokens = ("Nano", 64) if args.quick else ("XL", 16384) if device.type == "cuda" else ("S", 512)
    cases = {experts: Case(model, experts, tokens) for experts in ("8", "64", "64 narrow")}
    cases["4 x tokens"] = Case(model, "8", 4 * tokens)
    ways = {}
    for name, case in cases.items():
        moe, x = make_layer(case, device, dtype)
        ways[name] = partial(forward_backward, moe, x, torch.randn_like(x))
    return harness.measure(ways, device, args.rounds)


def goals(rows: list[dict], grown: harness.Times) -> list[Goal]:
    """Rows 1, 2 and 7 of the table; the last one is the same on any machine."""

    def find(column: str, **wanted) -> float | None:
        found = (row[column] for row in rows if all(row[key] == value for key, value in wanted.items()))
        return next(found, None)

    case = {"model": "XL", "experts": "8", "routing": "uniform", "pass": "forward + backward"}
    found = []
    for way in ("grouped_mm", "grouped_mm, compiled"):
        what = f"XL, 8 experts, forward + backward, {way}"
        found.append(
            Goal("1", f"{what}: over dense, 16k", "<= 1.15", find("over dense", way=way, tokens=16384, **case))
        )
        for tokens, bound in ((2048, 0.33), (16384, 0.6)):
            value = find("over naive", way=way, tokens=tokens, **case)
            found.append(Goal("2", f"{what}: over naive, {tokens // 1024}k", f"<= {bound}", value))
    for name, bound in (("64", 1.15), ("64 narrow", 1.15), ("4 x tokens", 4.1)):
        found.append(Goal("7", f"{name}, over 8 experts", f"<= {bound}", grown.ratio(name, "8")))
    return found


if __name__ == "__main__":
    cli.run(main, get_parser())
