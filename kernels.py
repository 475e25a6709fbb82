"""Autograd functions and grouped products: what runs on the device, eager and compiled. No configuration, no modules.

T tokens · D hidden width · E experts · K experts per token · P = T*K assignments

They work in place where they run eagerly, and not where they are compiled: Inductor does that by itself, and PyTorch
2.11 would lose the gradient of a function that returns what it has changed in place. Eager on a GPU, `fused` does some.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fused

NORM_EPS = 1e-6  # of every LayerNorm, as published
RMS_EPS = 1e-5  # of every RMSNorm, and of the QK-norm over whole vectors, as published


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with `weight` runs: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


# -------------------------------------------------------------------------------------------------- tokens and experts


class FP32Linear(torch.autograd.Function):
    """x W^T in fp32, whatever autocast says: (T, D), (E, D) -> (T, E).

    Saves x as it came, which others save too, and not its fp32 copy, which is made again in the backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return (grad @ weight.float()).to(x.dtype), (grad.T @ x.float()).to(weight.dtype)


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`order` (P,) and `offsets` (E,) of `Routing`: a stable sort of the assignments by expert.

    Narrow keys make the device's radix sort cheap. The ends are the row pointers of the sorted keys as a sparse matrix
    has them: one kernel, and no histogram, since `bincount` copies its result's length to the host.
    """
    key_dtype = torch.uint8 if num_experts <= 256 else torch.int16
    keys, order = expert_ids.flatten().to(key_dtype).sort(stable=True)
    return order, torch._convert_indices_from_coo_to_csr(keys, num_experts, out_int32=True)[1:]


def inverse_permutation(order: Tensor) -> Tensor:
    """The permutation (P,) that undoes `order` (P,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def gather_sum(rows: Tensor, places: Tensor) -> Tensor:
    """(P, D) rows, (T, K) places -> (T, D): the sum of the K rows of each token.

    One kernel that adds up in fp32 and makes no (P, D) copy. `torch.compile` makes one, too, of the plain formula and
    what surrounds it.
    """
    if torch.compiler.is_compiling():
        chosen = rows.index_select(0, places.flatten()).unflatten(0, places.shape)  # (T, K, D)
        return chosen.sum(dim=1, dtype=rows.dtype)  # autocast would widen it
    if fused.serves(rows, places):
        return fused.gather_sum(rows, places)
    return F.embedding_bag(places, rows.detach(), mode="sum")


def spread(x: Tensor, places: Tensor) -> Tensor:
    """(T, D) rows, (T, K) places -> (P, D): each row K times."""
    if fused.serves(x, places):
        return fused.spread(x, places)
    rows = x.new_empty(places.numel(), x.shape[1])
    put = rows.index_put if torch.compiler.is_compiling() else rows.index_put_
    return put((places,), x.unsqueeze(1))


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, D) into expert order (P, D).

    The backward is the inverse gather and a sum over K, not `index_add`: no float atomics, so repeat runs are
    bit-identical.
    """

    @staticmethod
    def forward(ctx, x: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        places = inverse.unflatten(0, (-1, top_k))  # (T, K)
        ctx.save_for_backward(places)
        return spread(x, places)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (P, D)
        (places,) = ctx.saved_tensors
        return gather_sum(grad, places), None, None


class Combine(torch.autograd.Function):
    """The sum over its K experts for each token: (P, D) in expert order, weighted already -> (T, D).

    `Dispatch` the other way round, in both directions: it saves none of the rows.
    """

    @staticmethod
    def forward(ctx, y: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        places = inverse.unflatten(0, (-1, top_k))  # (T, K)
        ctx.save_for_backward(places)
        return gather_sum(y, places)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (T, D)
        (places,) = ctx.saved_tensors
        return spread(grad, places), None, None


class Permute(torch.autograd.Function):
    """x[order], whose backward is a gather by the `inverse`, too: (P,) -> (P,)."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class Weighted(torch.autograd.Function):
    """Rows (P, D) times (P,) weights, whose gradient is summed in fp32."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights)
        return y * weights.to(y.dtype).unsqueeze(-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, weights = ctx.saved_tensors
        grad_weights = (grad * y).sum(dim=-1, dtype=torch.float32).to(weights.dtype)
        return grad * weights.to(grad.dtype).unsqueeze(-1), grad_weights


def sort_by_token(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places (P,) of assignments by token, and where each token's begin (T,), of tokens (P,) at each place."""
    sorted_tokens, places = tokens.sort(stable=True)
    return places, torch._convert_indices_from_coo_to_csr(sorted_tokens, count)[:-1]


def bag_sum(rows: Tensor, places: Tensor, starts: Tensor) -> Tensor:
    """`gather_sum` where tokens have several numbers of rows: (P, D), (P,) places by token, (T,) starts -> (T, D)."""
    return F.embedding_bag(places, rows.detach(), starts, mode="sum")


class DispatchBags(torch.autograd.Function):
    """`Dispatch` where tokens have several numbers of experts: tokens (P,) at each place, and their `sort_by_token`."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, places: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(places, starts)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (P, D)
        places, starts = ctx.saved_tensors
        return bag_sum(grad.contiguous(), places, starts), None, None, None


class CombineBags(torch.autograd.Function):
    """`Combine` where tokens have several numbers of experts: (P, D), weighted already -> (T, D)."""

    @staticmethod
    def forward(ctx, y: Tensor, tokens: Tensor, places: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return bag_sum(y, places, starts)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (T, D)
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None, None


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """(P, I) x (E, O, I) -> (P, O). `grouped_mm` is not on autocast's list: x and weight come in one dtype."""
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return y if bias is None else AddBias.apply(y, bias, offsets)  # its own bias argument is not implemented yet


def segments_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """The same, one expert after another. `unbind` and not `weight[e]`, whose backward fills a (E, O, I) per expert."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    biases = [None] * len(counts) if bias is None else bias.unbind(0)
    experts = zip(x.split(counts), weight.unbind(0), biases, strict=True)
    return torch.cat([F.linear(part, w, b) for part, w, b in experts])


class AddBias(torch.autograd.Function):
    """Add to each row the bias of its expert: (P, O) in expert order and (E, O) -> (P, O).

    The bias's gradient is the sum of each segment, taken as a grouped product with ones: the very kernel that makes the
    weight's gradient. The backward of plain indexing would add P rows into E by float atomics.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        places = torch.arange(len(y), dtype=offsets.dtype, device=y.device)
        expert_of_row = torch.searchsorted(offsets, places, right=True, out_int32=True)  # (P,)
        return y + bias.index_select(0, expert_of_row)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (P, O)
        (offsets,) = ctx.saved_tensors
        ones = grad.new_ones(len(grad), 8)  # equal columns: `grouped_mm` wants rows of at least 16 bytes
        return grad, F.grouped_mm(ones.T, grad, offs=offsets)[:, 0], None


# ---------------------------------------------------------------------------------------------- activations and norms


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of the two halves of the last dimension (arXiv 2002.05202).

    Saves its input alone: silu(gate), as wide as its result, is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # (..., 2F) -> (..., F)
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        return _swiglu_backward(grad, gate_up)


def _swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, of rows times their weights, where there are some."""
    if fused.serves(gate_up, weights):
        return fused.swiglu(gate_up, weights)
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up if torch.compiler.is_compiling() else F.silu(gate).mul_(up)
    return _scaled_in_place(hidden, weights)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    if fused.serves(grad, gate_up):
        return fused.swiglu_backward(grad, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # one kernel of the plain formula
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
    grads = torch.empty_like(gate_up)
    of_gate, of_up = grads.chunk(2, dim=-1)  # written in place
    torch.mul(grad, up, out=of_gate)
    torch.ops.aten.silu_backward(of_gate, gate, grad_input=of_gate)
    torch.ops.aten.silu(gate, out=of_up).mul_(grad)
    return grads


class SwiGLUDown(torch.autograd.Function):
    """The second half of SwiGLU experts: down(silu(gate) * up * weight), in expert order, weighted where weights are.

    Weighted before the product and not after it, an expert's result need not be saved for the weight's gradient; and
    what the product is of, which is wider still, is computed again in the backward: saves its input alone.
    """

    @staticmethod
    def forward(ctx, gate_up: Tensor, weights: Tensor | None, down: Tensor, offsets: Tensor) -> Tensor:
        """(P, 2F), (P,), (E, D, F), (E,) -> (P, D)"""
        ctx.save_for_backward(gate_up, weights, down, offsets)
        return F.grouped_mm(_swiglu(gate_up, weights), down.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (P, D)
        gate_up, weights, down, offsets = ctx.saved_tensors
        grad = grad.contiguous()

        def of_down(hidden: Tensor) -> Tensor | None:  # (P, F) -> (E, D, F)
            return F.grouped_mm(grad.T, hidden, offs=offsets) if ctx.needs_input_grad[2] else None

        grad_hidden, grad_weights = F.grouped_mm(grad, down, offs=offsets), None  # (P, F)
        if fused.serves(grad_hidden, gate_up, weights):
            grads, hidden, grad_weights = fused.swiglu_again(grad_hidden, gate_up, weights)
            return grads, grad_weights, of_down(hidden), None
        hidden = _swiglu(gate_up)
        if weights is not None:
            grad_weights = (grad_hidden * hidden).sum(dim=-1, dtype=torch.float32).to(weights.dtype)
        grad_down = of_down(_scaled_in_place(hidden, weights))
        del hidden  # before what is twice as wide is made: here a step has its peak of memory
        return _swiglu_backward(_scaled_in_place(grad_hidden, weights), gate_up), grad_weights, grad_down, None


def _scaled_in_place(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows (P, F) times (P,) weights, where there are some."""
    if weights is None:
        return rows
    weights = weights.to(rows.dtype).unsqueeze(-1)
    return rows * weights if torch.compiler.is_compiling() else rows.mul_(weights)


class AdaptiveLayerNorm(torch.autograd.Function):
    """norm(x) * (1 + scale) + shift: (N, T, D) with (N, D) shift and scale -> (N, T, D) of `dtype`.

    Computed in the dtype of x. Saves x and scale alone: the norm is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, scale)
        with torch.autocast(x.device.type, enabled=False):
            shift, factor = shift.to(x.dtype).unsqueeze(1), 1 + scale.to(x.dtype).unsqueeze(1)  # (N, 1, D)
            out = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), factor)
        return out if out.dtype == dtype else out.to(dtype)  # compiled by PyTorch 2.11, an idle `to` loses the gradient

    @staticmethod
    def backward(ctx, grad: Tensor):  # (N, T, D)
        x, scale = ctx.saved_tensors
        width = x.shape[-1:]
        normed, mean, rstd = torch.native_layer_norm(x, width, None, None, NORM_EPS)
        grad_shift = grad.sum(dim=1, dtype=x.dtype)
        grad_scale = (grad * normed).sum(dim=1)
        grad_normed = grad * (1 + scale.to(x.dtype).unsqueeze(1))
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, width, mean, rstd, None, None, [True, False, False]
        )
        return grad_x, grad_shift.to(scale.dtype), grad_scale.to(scale.dtype), None


class AdaptiveRMSNorm(torch.autograd.Function):
    """RMSNorm with a weight (D,), then * (1 + scale) + shift, as `AdaptiveLayerNorm`; in fp32, whatever x is in.

    Saves x, scale and weight alone.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        with torch.autocast(x.device.type, enabled=False):
            normed = _rms_normed(x)[0] * weight.float()
            return torch.addcmul(shift.float().unsqueeze(1), normed, 1 + scale.float().unsqueeze(1)).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # (N, T, D)
        x, weight, scale = ctx.saved_tensors
        grad, (normed, inverse_rms) = grad.float(), _rms_normed(x)
        grad_scale = (grad * normed).sum(dim=1) * weight.float()
        grad_shift = grad.sum(dim=1)
        grad = grad * (1 + scale.float().unsqueeze(1))
        grad_weight = (grad * normed).sum(dim=(0, 1))
        grad = grad * weight.float()
        grad_x = inverse_rms * (grad - normed * (grad * normed).mean(dim=-1, keepdim=True))
        grads = (grad_x, x), (grad_weight, weight), (grad_shift, scale), (grad_scale, scale)
        return *(value.to(like.dtype) for value, like in grads), None


def _rms_normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its root mean square (N, T, D), and one over that (N, T, 1), in fp32."""
    x = x.float()
    inverse_rms = (x.square().mean(dim=-1, keepdim=True) + RMS_EPS).rsqrt()
    return x * inverse_rms, inverse_rms
