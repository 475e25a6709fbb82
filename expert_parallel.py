"""Expert parallelism: each process of a group holds some experts of every layer, and tokens travel to them.

N processes of the group · E experts, E/N on each · P assignments of this process's tokens · R that arrive here

Tokens come sorted by expert, so what goes to one process is one contiguous piece; what arrives is sorted anew, since it
comes from N processes. Two exchanges of tokens a layer and direction, one of their weights, so that experts save as
little as on one process, and one of counts, whose result the host must know: the only host access of the whole model.
No token is dropped, however uneven the routing.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from cli import UsageError
from configuration import DiTConfig
from kernels import Dispatch, Permute, inverse_permutation, sort_by_expert
from moe import MoE


class AllToAll(torch.autograd.Function):
    """Rows (sum of `sent`, D) to the processes of a group, in their order -> rows (sum of `received`, D) from them."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None


class ExpertParallel:
    """Runs a layer's experts, E/N of them on each process of `group`, for the tokens of all of them."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    @torch.compiler.disable  # compiled code cannot know how many tokens will arrive
    def __call__(self, experts: nn.Module, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """(P, D) and (P,) in expert order, counts (E,) -> (P, D); equal to `experts` with all E on one process."""
        size = self.group.size()
        counts_here = torch.empty_like(counts)  # (E,): what each process sends to each of my experts
        dist.all_to_all_single(counts_here, counts.contiguous(), group=self.group)
        sent, received = torch.stack([counts, counts_here]).view(2, size, -1).sum(dim=2).tolist()

        arrived = AllToAll.apply(x, sent, received, self.group)  # (R, D) by process, then by expert
        weights = AllToAll.apply(weights.unsqueeze(1), sent, received, self.group).squeeze(1)  # (R,)
        expert_ids = torch.arange(len(counts) // size, device=x.device).repeat(size)
        expert_ids = expert_ids.repeat_interleave(counts_here, output_size=sum(received))  # (R,)
        if nothing := not sum(received):  # products with no row at all have no backward
            arrived, weights, expert_ids = F.pad(arrived, (0, 0, 0, 1)), F.pad(weights, (0, 1)), expert_ids.new_zeros(1)
        order, offsets = sort_by_expert(expert_ids, len(counts) // size)
        inverse = inverse_permutation(order)
        y = experts(Dispatch.apply(arrived, inverse, 1), offsets, Permute.apply(weights, order, inverse))
        y = Dispatch.apply(y, order, 1)
        return AllToAll.apply(y[:0] if nothing else y, received, sent, self.group)


def deal_experts(moe: MoE, grid: DeviceMesh, **options) -> None:
    """Leave this process its experts of `moe`, sharded over the processes that have the same ones (FSDP2).

    The gradient is the mean over all processes, as that of parameters which are not dealt out.

    Args:
        grid: of "data" x "expert" processes: tokens travel along the second dimension.
        options: of `fully_shard`.
    """
    for name, parameter in list(moe.experts.named_parameters()):
        mine = distribute_tensor(parameter.detach(), grid["expert"], [Shard(0)], src_data_rank=None)
        setattr(moe.experts, name, nn.Parameter(mine))
    # Along the width, not expert by expert: there may be fewer experts here than processes that share them.
    fully_shard(moe.experts, mesh=grid["data"], shard_placement_fn=lambda _: Shard(1), **options)
    moe.experts.set_gradient_divide_factor(grid.size())  # each expert has seen the tokens of its whole group
    if grid["data"].size() > 1:  # gloo cannot divide on the way; where nothing travels, this would divide twice
        moe.experts.set_force_sum_reduction_for_comms(True)
    moe.parallel = ExpertParallel(grid["expert"].get_group())


def check_expert_parallel(over: int, processes: int, data_parallel: str, config: DiTConfig) -> None:
    """Can experts be dealt over so many processes, and each share be sharded over the groups that these make?

    Raises:
        UsageError: the numbers do not divide each other, or the engine shards nothing.
    """
    if over == 1:
        return
    if data_parallel not in ("sdp", "fsdp"):
        raise UsageError(f"--expert-parallel {over} goes with --data-parallel fsdp or sdp, not with {data_parallel}")
    if not config.num_experts or config.expert_count % over:
        raise UsageError(f"--expert-parallel {over} must divide the number of experts, {config.expert_count}")
    if processes % over:
        raise UsageError(f"--expert-parallel {over} must divide the number of processes, {processes}")
    groups, width = processes // over, config.expert_width
    if config.hidden_size % groups or width % groups:
        raise UsageError(
            f"--expert-parallel {over} makes {groups} groups of processes, whose number must divide the hidden size "
            f"{config.hidden_size} and the experts' width {width}; use a larger --expert-parallel"
        )
