"""Kernels in Triton for what PyTorch runs slowly where nothing is compiled, on a GPU; `kernels.py` has the formulas.

T tokens · D hidden width · K experts per token · F expert width · P = T*K assignments

Compiled, Inductor makes the like of them by itself; these are for the eager path: DeepSpeed, debugging, short runs.
All read and write whole vectors of 16 bytes where a row has as many, compute in fp32, and add up in a fixed order:
repeat runs are bit-identical. Tensors are contiguous.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import first_line, warn_once

triton = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import triton
        import triton.language as tl
    except ImportError:  # some builds of PyTorch come without
        pass

AVAILABLE = triton is not None and torch.cuda.is_available()


def serves(*tensors: Tensor | None) -> bool:
    """Whether these kernels run on such tensors, those that there are, now."""
    if not AVAILABLE or torch.compiler.is_compiling():
        return False
    there = [each for each in tensors if each is not None]
    return all(type(each) is Tensor and each.is_cuda and each.is_contiguous() for each in there) and _works()


@functools.cache
def _works() -> bool:
    """Decided once, by a try: Triton needs a compiler, and a GPU that it knows."""
    gate_up = torch.randn(4, 64, device="cuda")
    try:
        error = (swiglu(gate_up) - F.silu(gate_up[:, :32]) * gate_up[:, 32:]).abs().max().item()
        reason = f"its results are wrong by {error:.1e}" if error > 1e-5 else None
    except Exception as failure:  # whatever a compiler comes up with
        reason = f"{type(failure).__name__}: {first_line(failure)}"
    if reason is not None:
        warn_once(f"Triton does not work here ({reason}): eager products of experts are slower without its kernels")
    return reason is None


if triton is not None:

    @triton.jit
    def _silu(x):
        return x / (1 + tl.exp(-x))

    @triton.jit
    def _swiglu(gate_up, weights, out, rows, width, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        there = (row < rows) & (column < width)
        at = gate_up + row * 2 * width + column
        gate = tl.load(at, there).to(tl.float32)
        up = tl.load(at + width, there).to(tl.float32)
        made = _silu(gate) * up
        if WEIGHTED:
            made *= tl.load(weights + row, row < rows).to(tl.float32)
        tl.store(out + row * width + column, made, there)

    @triton.jit
    def _swiglu_backward(grad, gate_up, grads, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        there = (row < rows) & (column < width)
        place = row * 2 * width + column
        gate = tl.load(gate_up + place, there).to(tl.float32)
        up = tl.load(gate_up + place + width, there).to(tl.float32)
        given = tl.load(grad + row * width + column, there).to(tl.float32)
        share = 1 / (1 + tl.exp(-gate))
        tl.store(grads + place, given * up * share * (1 + gate * (1 - share)), there)
        tl.store(grads + place + width, given * gate * share, there)

    @triton.jit
    def _swiglu_again(
        grad, gate_up, weights, grads, grad_weights, width, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights + row).to(tl.float32)
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = column < width
            place = row * 2 * width + column
            gate = tl.load(gate_up + place, there, other=0.0).to(tl.float32)
            up = tl.load(gate_up + place + width, there, other=0.0).to(tl.float32)
            given = tl.load(grad + row * width + column, there, other=0.0).to(tl.float32)
            share, silu = 1 / (1 + tl.exp(-gate)), _silu(gate)
            total += given * silu * up
            tl.store(grad + row * width + column, silu * up * weight, there)
            given *= weight
            tl.store(grads + place, given * up * share * (1 + gate * (1 - share)), there)
            tl.store(grads + place + width, given * silu, there)
        if WEIGHTED:
            tl.store(grad_weights + row, tl.sum(total))

    @triton.jit
    def _spread(x, places, out, width, K: tl.constexpr, COLUMNS: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there = column < width
        row = tl.load(x + token * width + column, there)
        for k in tl.static_range(K):
            place = tl.load(places + token * K + k)
            tl.store(out + place * width + column, row, there)

    @triton.jit
    def _gather_sum(rows, places, out, width, K: tl.constexpr, COLUMNS: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there = column < width
        total = tl.zeros([COLUMNS], tl.float32)
        for k in tl.static_range(K):
            place = tl.load(places + token * K + k)
            total += tl.load(rows + place * width + column, there).to(tl.float32)
        tl.store(out + token * width + column, total, there)


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 16 values for a thread, few of them beyond the width."""
    columns = next(size for size in (1024, 512, 256) if width % size == 0 or size == 256)
    return 2048 // columns, columns, 4


def _columns(width: int) -> int:
    """Of a row, how many values a program has at a time: all, where they are few."""
    return min(1024, triton.next_power_of_2(width))


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up: (..., 2F) -> (..., F); of rows (P, 2F) times (P,) weights, where there are some."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    rows, (height, columns, warps) = out.numel() // max(width, 1), _tile(width)
    if out.numel():
        grid = triton.cdiv(rows, height), triton.cdiv(width, columns)
        given = gate_up if weights is None else weights
        _swiglu[grid](gate_up, given, out, rows, width, weights is not None, height, columns, num_warps=warps)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient (..., 2F) of `swiglu`'s input, of that of its result (..., F)."""
    grads, width = torch.empty_like(gate_up), grad.shape[-1]
    rows, (height, columns, warps) = grad.numel() // max(width, 1), _tile(width)
    if grad.numel():
        grid = triton.cdiv(rows, height), triton.cdiv(width, columns)
        _swiglu_backward[grid](grad, gate_up, grads, rows, width, height, columns, num_warps=warps)
    return grads


def swiglu_again(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """By the gradient (P, F) of a weighted `swiglu`: those of its input and weights, between them its result again.

    The result takes the memory of `grad`.
    """
    grads = torch.empty_like(gate_up)
    grad_weights = None if weights is None else torch.empty_like(weights)
    if grad.numel():
        given, found = (gate_up, grads) if weights is None else (weights, grad_weights)
        width, is_weighted = grad.shape[1], weights is not None
        _, columns, _ = _tile(width)
        warps = columns // 256  # no more threads than columns: each value is one thread's, which reads it, then writes
        _swiglu_again[(len(grad),)](grad, gate_up, given, grads, found, width, is_weighted, columns, num_warps=warps)
    return grads, grad, grad_weights


def spread(x: Tensor, places: Tensor) -> Tensor:
    """Tokens (T, D) to the places (T, K) of their assignments: (P, D)."""
    (tokens, width), top_k = x.shape, places.shape[1]
    out, columns = x.new_empty(tokens * top_k, width), _columns(width)
    if out.numel():
        _spread[tokens, triton.cdiv(width, columns)](x, places, out, width, top_k, columns)
    return out


def gather_sum(rows: Tensor, places: Tensor) -> Tensor:
    """The sum of the rows (P, D) at places (T, K): (T, D)."""
    (tokens, top_k), width = places.shape, rows.shape[1]
    out, columns = rows.new_empty(tokens, width), _columns(width)
    if out.numel():
        grid = tokens, triton.cdiv(width, columns)
        _gather_sum[grid](rows, places, out, width, top_k, columns)
    return out
