"""How fast is each way to compute attention, at the shapes of these models? For `--attention`.

    python -m benchmarks.attention

Queries, keys and values as a block has them (views of one product), checked against the plain formula in fp32. The
ratio is to the fastest; "auto" is what PyTorch chooses. Ways that have no kernel for a shape are left out with a word.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import cli
from benchmarks import harness
from benchmarks.report import Bench
from cli import UsageError
from configuration import build_config
from layers import ATTENTION_BACKENDS, attend, check_attention


@dataclass(frozen=True)
class Case:
    """A model's heads, the images' side in pixels, and how many images."""

    model: str
    side: int
    images: int

    def __str__(self) -> str:
        return f"{self.model}, {self.side} px, {self.images} images"


GPU_CASES = (
    *(Case(model, 256, 64) for model in ("XL", "S", "B", "G")),
    *(Case(model, 512, 16) for model in ("XL", "S")),
)
CPU_CASES = (Case("S", 256, 2), Case("XL", 256, 2))
QUICK_CASES = (Case("Nano", 64, 2),)


def get_parser() -> cli.Parser:
    parser = harness.get_parser("attention", __doc__, budget=60)
    harness.add_network_arguments(parser, compile=False)
    return parser


def main(args) -> None:
    bench = Bench(args, network=True)
    bench.record["left_out"] = absent(bench.device, bench.dtype)
    cases = QUICK_CASES if args.quick else GPU_CASES if bench.cuda else CPU_CASES
    bench.run({str(case): partial(case_rows, bench, case) for case in cases})


def case_rows(bench: Bench, case: Case) -> Iterator[tuple[str, list[dict]]]:
    """Check the ways of a case, then time them; a row for each way and pass."""
    device, dtype = bench.device, bench.dtype
    config = build_config(f"DiT-{case.model}/2", input_size=case.side // 8)
    heads, width, tokens = config.num_heads, config.hidden_size // config.num_heads, (case.side // 16) ** 2
    qkv = torch.randn(case.images, tokens, 3, heads, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(case.images, heads, tokens, width, device=device).to(dtype)
    ways = [way for way in ATTENTION_BACKENDS if usable(way, device, dtype, width)]

    exact = qkv.detach().float().requires_grad_()
    expected = results("math", exact, grad.float())
    harness.check(expected, {way: results(way, qkv, grad) for way in ways}, harness.tolerance(dtype))

    for name, call, factor in (("forward", forward, 4), ("forward + backward", results, 14)):
        times = bench.measure({way: partial(call, way, qkv, grad) for way in ways})
        fastest = min(ways, key=times.median)
        work = factor * case.images * heads * tokens**2 * width
        rows = [
            {
                "over fastest": times.ratio(way, fastest),
                "share of matrix rate": work / times.median(way) / bench.rates.flops,
                "way": way,
                "pass": name,
                "model": case.model,
                "head": width,
                "tokens": tokens,
                "images": case.images,
                "ms": times.median(way) * 1e3,
                "rounds": times.rounds,
            }
            for way in sorted(ways, key=times.median)
        ]
        yield "attention", rows


def forward(way: str, qkv: Tensor, _) -> Tensor:
    with torch.no_grad():
        return attend(*qkv.transpose(1, 3).unbind(2), ATTENTION_BACKENDS[way])


def results(way: str, qkv: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """(N, h, T, d), and the gradient of what it is computed from."""
    out = attend(*qkv.transpose(1, 3).unbind(2), ATTENTION_BACKENDS[way])
    return {"output": out, "qkv": torch.autograd.grad(out, qkv, grad)[0]}


def usable(way: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Implementations that replace PyTorch's flash kernels for the whole process are not tried beside them."""
    if way in ("fa3", "fa4"):
        return False
    try:
        check_attention(way, device, dtype, head_dim)
    except UsageError:
        return False
    return True


def absent(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [f"{way} (not here)" for way in ATTENTION_BACKENDS if not usable(way, device, dtype, 64)]


if __name__ == "__main__":
    cli.run(main, get_parser())
