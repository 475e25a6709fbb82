"""What do a MoE layer and a block launch, compute and move on a GPU? Counted on fake tensors, so on any machine.

    python -m benchmarks.traffic
    python -m benchmarks.traffic --operations        # each operation, with its tensors' bytes

Every operation that reaches the dispatcher below autograd is taken for one kernel, which reads its inputs and writes
its results once, in eager mode; what `fused` has in Triton is counted as it would be launched. The prediction gives
each the longer of its arithmetic and its bytes, at rates measured on such a GPU, with no allowance for launches, for
caches, or for products that run below the rate. It is a lower bound, which tells operations apart, and tells what a
change should gain before it is measured.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cli
import fused
from benchmarks import harness
from benchmarks.moe_block import EXPERTS
from benchmarks.naive import DenseMLP
from benchmarks.report import Bench
from configuration import build_config
from models import DiTBlock
from moe import MoE

NO_KERNEL = ("prim.device", "aten.detach", "aten.empty", "aten.new_empty", "aten._unsafe_view")
WRITTEN_ONLY = ("aten.copy_", "aten.index_put_", "aten.scatter_")  # of what they change in place, nothing is read
GATHERS = ("aten.index_select", "aten.index.")  # read as much as they write
RATES = {"flops": 790.0, "bandwidth": 4.3}  # an H200's: TFLOP/s of large bf16 products, TB/s of large copies


class Operation(NamedTuple):
    """One kernel."""

    name: str
    read: tuple[int, ...]  # bytes of each input
    written: tuple[int, ...]  # bytes of each result
    flops: int  # of a product

    @property
    def bytes(self) -> int:
        return sum(self.read) + sum(self.written)

    def seconds(self, flops: float, bandwidth: float) -> float:
        return max(self.flops / flops, self.bytes / bandwidth)


class Recorder(TorchDispatchMode):
    """Notes every operation that launches a kernel, and what it makes."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.made: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = str(function)
        if not function.is_view and not name.startswith(NO_KERNEL):
            self.operations.append(_operation(name, function, args, kwargs, out))
            self.made.append((name, out[0] if isinstance(out, (tuple, list)) else out))
        return out

    def wide(self, elements: int, matches: Callable[[torch.dtype], bool]) -> list[str]:
        """Operations that make something of at least so many elements, of a dtype that `matches`."""
        return [name for name, made in self.made if made.numel() >= elements and matches(made.dtype)]


def _operation(name: str, function, args, kwargs, out) -> Operation:
    outs = {argument.name for argument in function._schema.arguments if argument.is_out}
    inputs = _tensors((args, [value for key, value in kwargs.items() if key not in outs]))
    written = tuple(_size(tensor) for tensor in _tensors(out))
    if name.startswith(WRITTEN_ONLY):
        inputs = inputs[1:]
        written = (min(written[0], max(_size(tensor) for tensor in inputs)),)
    read = tuple(_size(tensor) for tensor in inputs)
    if name.startswith(GATHERS):
        read = tuple(min(size, sum(written)) for size in read)
    return Operation(name, read, written, _flops(name, args))


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes; an expanded dimension is there once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(side for side, stride in sides if stride)


def _flops(name: str, args) -> int:
    """2 x multiply-adds of a product; the backward of attention computes one of its two products again."""
    if name.startswith(("aten.mm", "aten._grouped_mm")):
        a, b = args[:2]
        return 2 * a.numel() * b.shape[-1]
    if name.startswith("aten.addmm"):
        return 2 * args[1].numel() * args[2].shape[-1]
    if name.startswith("aten._scaled_dot_product"):
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        return (10 if backward else 4) * q.numel() * k.shape[2]
    return 0


class Launched:
    """In the place of a kernel of `fused`: notes what it is launched on."""

    def __init__(self, recorder: Recorder, name: str):
        self.recorder, self.name = recorder, f"fused.{name}"
        self.read, self.written = (names.split() for names in KERNELS[name])
        self.names = dict.fromkeys([*self.read, *self.written])

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options) -> None:
        given = dict(zip(self.names, args, strict=False))
        sizes = []
        for names in (self.read, self.written):  # what is not there is stood in for by another
            once = {id(given[name]): given[name] for name in names}
            sizes.append(tuple(map(_size, once.values())))
        self.recorder.operations.append(Operation(self.name, *sizes, 0))


KERNELS = {  # of `fused`: the tensors that they read, and those that they write, as they take them
    "_swiglu": ("gate_up weights", "out"),
    "_swiglu_backward": ("grad gate_up", "grads"),
    "_swiglu_again": ("grad gate_up weights", "grad grads grad_weights"),
    "_spread": ("x places", "out"),
    "_gather_sum": ("rows places", "out"),
}


def as_on_a_gpu(recorder: Recorder):
    """A context in which `fused` serves, and launches nothing."""
    stands_in = {name: Launched(recorder, name) for name in KERNELS}
    stands_in["triton"] = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )
    stands_in["serves"] = lambda *tensors: all(each is None or each.is_contiguous() for each in tensors)
    return mock.patch.multiple(fused, create=True, **stands_in)


def record(
    module: nn.Module, x: Tensor, *more: Tensor, autocast: bool = False, grad: bool = True, triton: bool = False
):
    """The forward, and the backward to input and weights (empty without `grad`), as a `Recorder` each."""
    inputs = [each for each in (x, *more) if each.requires_grad]
    forward, backward = Recorder(), Recorder()
    kernels = as_on_a_gpu if triton else contextlib.nullcontext
    with (
        torch.set_grad_enabled(grad),
        forward,
        kernels(forward),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = module(x, *more)
        out = out[0] if isinstance(out, tuple) else out
    if grad:
        gradient = torch.empty_like(out)
        with backward, kernels(backward):
            torch.autograd.grad(out, [*inputs, *module.parameters()], gradient)
    return forward, backward


# --------------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Case:
    """A layer (its weights in bf16), or a block under autocast, with 256 tokens an image."""

    what: str  # "layer", "block"
    model: str
    experts: str  # key of `moe_block.EXPERTS`
    tokens: int

    def __str__(self) -> str:
        return f"{self.what}, {self.model}, {self.experts} experts, {self.tokens} tokens"


CASES = (
    Case("layer", "XL", "8", 16384),
    Case("layer", "XL", "64 narrow", 16384),
    Case("layer", "S", "8", 65536),
    Case("block", "XL", "8", 16384),
    Case("block", "S", "8", 65536),
)


@contextlib.contextmanager
def weights_of(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def counted(case: Case) -> dict[str, tuple[Recorder, Recorder]]:
    """Forward and backward of the MoE, and with a dense SwiGLU of equal FLOPs in its place."""
    count, top_k, ratio = EXPERTS[case.experts]
    config = build_config(f"DiT-{case.model}/2", num_experts=count, num_experts_per_tok=top_k, expert_ratio=ratio)
    width, autocast = config.hidden_size, case.what == "block"
    found = {}
    with FakeTensorMode(), weights_of(torch.float32 if autocast else torch.bfloat16):
        moe = MoE(width, config.experts)
        for way, layer in (("MoE", moe), ("dense", DenseMLP(moe))):
            x = torch.empty(case.tokens // 256, 256, width, requires_grad=True)
            if case.what == "layer":
                found[way] = record(layer, x, triton=True)
                continue
            block = DiTBlock(config, is_moe=way == "MoE")
            if way == "dense":
                block.mlp = layer
            c = torch.empty(len(x), width, requires_grad=True)
            found[way] = record(block, x, c, autocast=True, triton=True)
    return found


def case_rows(case: Case, flops: float, bandwidth: float) -> list[dict]:
    """A row for each way and pass; units are activations of one width: tokens x D values of bf16."""
    unit = 2 * case.tokens * build_config(f"DiT-{case.model}/2").hidden_size
    passes = {
        way: {"forward": forward.operations, "forward + backward": forward.operations + backward.operations}
        for way, (forward, backward) in counted(case).items()
    }
    seconds = {
        way: {name: sum(each.seconds(flops, bandwidth) for each in operations) for name, operations in done.items()}
        for way, done in passes.items()
    }
    rows = []
    for way, done in passes.items():
        for name, operations in done.items():
            between = [each for each in operations if not each.flops]
            rows.append(
                {
                    "over dense": seconds[way][name] / seconds["dense"][name],
                    "products' share": sum(each.flops for each in operations) / flops / seconds[way][name],
                    "what": f"{case.what}, {way}",
                    "pass": name,
                    "model": case.model,
                    "experts": case.experts,
                    "tokens": case.tokens,
                    "kernels": len(operations),
                    "widths moved outside products": sum(each.bytes for each in between) / unit,
                    "predicted ms": seconds[way][name] * 1e3,
                }
            )
    return rows


def operations_table(case: Case, flops: float, bandwidth: float) -> list[dict]:
    """Every kernel of the MoE, dearest first."""
    return sorted(
        (
            {
                "us": operation.seconds(flops, bandwidth) * 1e6,
                "operation": operation.name,
                "pass": name,
                "GFLOP": operation.flops / 1e9,
                "MB read": " ".join(f"{size / 1e6:.1f}" for size in operation.read),
                "MB written": " ".join(f"{size / 1e6:.1f}" for size in operation.written),
            }
            for name, recorder in zip(("forward", "backward"), counted(case)["MoE"], strict=True)
            for operation in recorder.operations
        ),
        key=lambda row: -row["us"],
    )


# -------------------------------------------------------------------------------------------------------------- script


def get_parser() -> cli.Parser:
    parser = harness.get_parser("traffic", __doc__, budget=600)
    positive = cli.number_in(1e-3, 1e6)
    parser.add_argument("--flops", type=positive, default=RATES["flops"], help="of bf16 products, TFLOP/s")
    parser.add_argument("--bandwidth", type=positive, default=RATES["bandwidth"], help="of a copy, TB/s, both ways")
    parser.add_switch(parser, "--operations", False, "list the kernels of the first layer and of the first block")
    return parser


def main(args) -> None:
    flops, bandwidth = args.flops * 1e12, args.bandwidth * 1e12
    cases = CASES[:1] if args.quick else CASES
    listed = {case.what: case for case in reversed(cases)}.values() if args.operations else ()

    def tables(case: Case) -> Iterator[tuple[str, list[dict]]]:
        yield "counted, and predicted", case_rows(case, flops, bandwidth)
        if case in listed:
            yield f"operations of {case}", operations_table(case, flops, bandwidth)

    Bench(args).run({str(case): partial(tables, case) for case in cases})


if __name__ == "__main__":
    cli.run(main, get_parser())
