"""Experts dealt over processes against the same layer on one process: outputs, every gradient, and whole runs."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import script
from test_training import TINY, metrics, refused, tensors
from torch.distributed.device_mesh import init_device_mesh

import cli
from configuration import build_config
from expert_parallel import AllToAll, check_expert_parallel, deal_experts
from moe import ExpertsConfig, MoE
from routers import RouterConfig

WIDTH, EXPERTS = 16, 4


def layer(expert_mlp: str, skewed: bool) -> MoE:
    torch.manual_seed(0)
    moe = MoE(WIDTH, ExpertsConfig(24, RouterConfig(EXPERTS, 2), shared_width=16, kind=expert_mlp))
    moe.init_weights()
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases too
        if skewed:  # everything to the first two experts: the other processes get no token at all
            moe.gate.weight.zero_()[:2] = 1
    return moe


def tokens_of(rank: int, skewed: bool) -> torch.Tensor:
    """Another number of tokens on each process."""
    torch.manual_seed(100 + rank)
    x = torch.randn(5 + 3 * rank, WIDTH)
    return x.abs() if skewed else x


def in_a_group(rank: int, size: int, store: str, function, *arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size))
    try:
        function(rank, size, *arguments)
    finally:
        dist.destroy_process_group()
    cli.end_at_once(0)  # as scripts end: a thread of the group that outlives Python would abort it


def spawn(tmp_path: Path, size: int, function, *arguments) -> None:
    arguments = (size, str(tmp_path / "store"), function, *arguments)
    torch.multiprocessing.start_processes(in_a_group, arguments, nprocs=size, start_method="fork")


def compare_with_one_process(rank: int, size: int, over: int, expert_mlp: str, skewed: bool, dtype) -> None:
    """The loss weighs every output differently, so that a row in the wrong place shows."""
    reference = layer(expert_mlp, skewed)
    dealt = copy.deepcopy(reference)
    deal_experts(dealt, init_device_mesh("cpu", (size // over, over), mesh_dim_names=("data", "expert")))
    parameter = next(dealt.experts.parameters())
    assert parameter.to_local().numel() == parameter.numel() // size
    assert parameter.to_local().shape[0] == EXPERTS // over

    everyone = [tokens_of(r, skewed) for r in range(size)]
    x_all = torch.cat(everyone).requires_grad_()
    x = everyone[rank].clone().requires_grad_()
    mine = slice(sum(map(len, everyone[:rank])), sum(map(len, everyone[: rank + 1])))
    weight = torch.linspace(-1, 1, x_all.numel()).view_as(x_all)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected, _ = reference(x_all)
        out, routing = dealt(x)
    (expected.float() * weight).sum().backward()
    (out.float() * weight[mine]).sum().backward()

    # In bf16 a product's rows may round otherwise where their number differs, and so do sums over processes.
    close = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(out, expected[mine], **close)
    torch.testing.assert_close(x.grad, x_all.grad[mine], **close)
    if skewed:
        assert routing.tokens_per_expert.tolist() == [len(x), len(x), 0, 0]
    for (name, whole), part in zip(reference.experts.named_parameters(), dealt.experts.parameters(), strict=True):
        total = part.grad.full_tensor() * size  # from a mean over processes to the sum
        torch.testing.assert_close(total, whole.grad, msg=lambda m, n=name: f"{n}: {m}", **close)
    for name in ("gate.weight", "shared_experts.gate_up_proj.weight"):
        total = dealt.get_parameter(name).grad.clone()
        dist.all_reduce(total)  # as data parallelism does, without its mean
        torch.testing.assert_close(total, reference.get_parameter(name).grad, **close)


def compare_all(rank: int, size: int, over: int) -> None:
    """All in one set of processes, as their start takes longer than the work."""
    for expert_mlp, skewed, dtype in itertools.product(
        ("swiglu", "gelu"), (False, True), (torch.float32, torch.bfloat16)
    ):
        compare_with_one_process(rank, size, over, expert_mlp, skewed, dtype)


@pytest.mark.parametrize(("size", "over"), [(2, 2), (4, 2)])
def test_equal_to_one_process(tmp_path, size, over):
    """A group of two; two groups of two, which have the same experts."""
    spawn(tmp_path, size, compare_all, over)


def exchange_and_back(rank: int, size: int) -> None:
    sent, received = ([1, 2], [1, 0]) if rank == 0 else ([0, 3], [2, 3])
    x = torch.arange(3.0 * sum(sent), dtype=torch.float64).view(-1, 3) + 100 * rank
    x.requires_grad_()
    out = AllToAll.apply(x, sent, received, dist.group.WORLD)
    assert len(out) == sum(received)
    if rank == 1:
        assert out[:2].tolist() == [[3, 4, 5], [6, 7, 8]]
    torch.testing.assert_close(AllToAll.apply(out, received, sent, dist.group.WORLD), x)
    (out * 7).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 7))


def test_exchange(tmp_path):
    spawn(tmp_path, 2, exchange_and_back)


@pytest.mark.parametrize(
    ("experts", "processes", "hidden", "message"),
    [
        (3, 6, 64, "--expert-parallel 3 must divide the number of experts, 8"),
        (4, 6, 64, "--expert-parallel 4 must divide the number of processes, 6"),
        (2, 6, 64, "makes 3 groups of processes, whose number must divide the hidden size 64"),
    ],
)
def test_numbers_that_do_not_divide_each_other(experts, processes, hidden, message):
    config = build_config("DiT-Nano/2", num_experts=8, input_size=8)
    with pytest.raises(Exception, match=message):
        check_expert_parallel(experts, processes, "fsdp", config)


def test_refusals(images, capsys):
    assert "goes with --data-parallel fsdp" in refused(images, capsys, "--expert-parallel", 2)
    message = refused(images, capsys, "--expert-parallel", 2, "--data-parallel", "fsdp")
    assert "must divide the number of processes, 1" in message


@pytest.mark.slow
@pytest.mark.usefixtures("few_grid_steps")
def test_one_curve_at_any_number(images):
    """Runs of 4 and 2 processes, experts dealt over 4, 2 and 1 of them, resumed from each other: one curve.

    A short one: a token whose second and third expert are tied within rounding may go either way.
    """
    flags = [*TINY, "--data-path", images, "--global-batch-size", 8, "--log-every", 1, "--ckpt-every", 2]
    flags += ["--aux-loss-alpha", "0.1", "--accum_iter", 2, "--grad-clip", 1, "--weight-decay", "0.1"]
    flags += ["--mup", "--base-width", 16]

    def go(results: str, processes: int, steps: int, *more) -> Path:
        results_dir = images.parent / results
        script("train.py", *flags, "--results-dir", results_dir, "--max-steps", steps, *more, processes=processes)
        return max(results_dir.iterdir())

    whole = go("whole", 1, 8)
    dealt = go("dealt", 4, 2, "--data-parallel", "fsdp", "--expert-parallel", 2)
    go("dealt", 4, 4, "--data-parallel", "fsdp", "--expert-parallel", 4, "--resume", "auto")
    go("dealt", 2, 6, "--data-parallel", "fsdp", "--resume", "auto")
    more = ["--data-parallel", "sdp", "--expert-parallel", 2, "--resume", "auto", "--sample-every", 8]
    go("dealt", 2, 8, *more, "--activation-checkpointing")
    for a, b in zip(metrics(whole), metrics(dealt), strict=True):
        for key in ("loss", "balance_loss", "load_cv"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, weight in tensors(whole, "ema", 8).items():
        torch.testing.assert_close(tensors(dealt, "ema", 8)[name], weight, rtol=0, atol=2e-5)
    assert (dealt / "samples" / "0000008.png").is_file()


@pytest.mark.slow
def test_compiled(images):
    """What is sharded apart within a block, and tokens on their way, are left out of its graph."""
    flags = [*TINY, "--data-path", images, "--global-batch-size", 8, "--log-every", 1, "--max-steps", 1]
    flags += ["--results-dir", images.parent / "results", "--precision", "bf16"]
    script("train.py", *flags)
    more = ["--data-parallel", "fsdp", "--expert-parallel", 2, "--compile", "--activation-checkpointing"]
    script("train.py", *flags, *more, processes=2)
    plain, compiled = (metrics(run)[0] for run in sorted((images.parent / "results").iterdir()))
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-2)
