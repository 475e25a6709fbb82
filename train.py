"""Train a DiT or DiT-MoE: one process, or many with replicated (DDP) or sharded (FSDP2) state or experts.

python train.py --model DiT-S/2 --num_experts 8 --data-path imagenet/train --vae-path sd-vae-ft-mse
torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-S/2 --num_experts 8 --data-path ... --vae-path ...
torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --num_experts 8 --data-parallel fsdp ...
torchrun --nnodes=4 ... train.py --model DiT-G/2 --num_experts 16 --data-parallel fsdp --expert-parallel 8 ...
"""

import contextlib
import errno
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import distributed
import machine
import runs
import training
from expert_parallel import check_expert_parallel, deal_experts
from muon import OPTIMIZERS
from optim import EMA, local, set_lr, state_of
from post_hoc_ema import PowerEMA

SHARDED = "sharded"  # folder of a checkpoint that holds the state of FSDPEngine
PROJECTOR = "projector"  # part of a checkpoint: what --repa trains besides the module


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py", description=__doc__.partition("\n")[0])
    runs.add_training_arguments(parser)
    group = parser.add_argument_group("data parallelism")
    group.add_argument(
        "--data-parallel",
        choices=("ddp", "sdp", "fsdp"),
        default="ddp",
        help="what is sharded over the processes: nothing; gradients, optimizer and EMA; the parameters too",
    )
    group.add_argument(
        "--expert-parallel",
        type=cli.positive_int,
        default=1,
        help="processes over which each layer's experts are dealt out; tokens travel to them (with sdp or fsdp)",
    )
    return parser


def main(args) -> None:
    processes = distributed.start(args.device, args.start_timeout)
    try:
        run = runs.prepare(args, processes)
        engine = processes.together(lambda: build_engine(run))
        with distributed.noticing_lost_processes():
            training.train(run, engine)
    finally:
        distributed.stop()


def build_engine(run: runs.Run) -> "DDPEngine":
    """The engine that the flags name; one process has nothing to share."""
    args, world_size = run.args, run.processes.world_size
    check_expert_parallel(args.expert_parallel, world_size, args.data_parallel, run.config)
    if args.expert_parallel > 1 and args.precision == "fp16":
        raise cli.UsageError("--expert-parallel does not go with --precision fp16, use bf16")
    return FSDPEngine(run) if args.data_parallel != "ddp" and world_size > 1 else DDPEngine(run)


class DDPEngine:
    """Whole model, EMA and optimizer on every process; gradients are averaged in the last backward of a step."""

    blocks_are_whole = True  # nothing within a block escapes compilation
    all_write = False

    def __init__(self, run: runs.Run):
        args = run.args
        self.args, self.device, self.processes = args, run.processes.device, run.processes
        if args.activation_checkpointing == "selective" and not self.blocks_are_whole:
            raise cli.UsageError(
                f"--activation-checkpointing selective does not go with --data-parallel {args.data_parallel}, "
                "which gathers weights inside each block; use full, or --data-parallel ddp"
            )
        self.dtype = machine.set_precision(run.args.precision)
        self.module = runs.new_network(run, self.blocks_are_whole)
        self.model = self._place()
        self.alignment = run.alignment
        self.projector = None if run.alignment is None else run.alignment.projector()  # drawn behind the module
        self.project = self._place_projector()
        if run.start is not None:
            weights, ours = run.start.state_dict(self.module, args.global_seed), self._tensors()
            fill({name: ours[name] for name in weights}, weights)
        self.module.train()
        self.ema = EMA(self.module, args.ema_decay)
        self.post_hoc = [PowerEMA(self.module, length) for length in args.post_hoc_ema]
        settings = args.lr, args.weight_decay, args.adam_eps, args.decay_all
        self.optimizer = OPTIMIZERS[args.optimizer](self.module, *settings)
        if self.projector is not None:
            for group in run.alignment.groups(self.projector, args.lr, args.weight_decay):
                self.optimizer.add_param_group(group)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.args.precision == "fp16")

    def _place(self) -> nn.Module:
        """Draw the parameters; returns what `forward` calls."""
        self.module.materialize(self.device)
        return self._sharing(self.module)

    def _place_projector(self) -> nn.Module | None:
        """What `forward` calls of --repa: apart from the module, which goes on alone when that ends."""
        return None if self.projector is None else self._sharing(self.projector.to(self.device))

    def _sharing(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are averaged over the processes."""
        if self.processes.world_size == 1:
            return module
        with warnings.catch_warnings():  # PyTorch 2.15 renames broadcast_buffers, 2.11 does not know the new name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    # ------------------------------------------------------------------------------------------------------- one step

    def forward(self, x, t, condition, aligned: bool = False):
        with self._autocast():
            if not aligned:
                return self.model(x, t, condition, return_routing=True)
            output, routings, tokens = self.model(
                x, t, condition, return_routing=True, return_tokens=self.alignment.depth
            )
            return output, routings, self.project(tokens)

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def accumulating(self, last: bool):
        stack = contextlib.ExitStack()
        for part in () if last else (self.model, self.project):
            if isinstance(part, DistributedDataParallel):
                stack.enter_context(part.no_sync())
        return stack

    def backward(self, loss) -> None:
        self.scaler.scale(loss).backward()

    def step(self, lr: float, loss_is_finite: bool) -> training.Update:
        set_lr(self.optimizer.param_groups, lr)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip().item()
        applied = loss_is_finite and math.isfinite(norm)
        if applied:
            self.scaler.step(self.optimizer)
            for average in (self.ema, *self.post_hoc):
                average.update(self.module)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return training.Update(norm, applied)

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, after scaling it to at most `--grad-clip`."""
        gradients = [local(p.grad) for p in self._trained().values() if p.grad is not None]
        norm = self._norm_of_all(torch.nn.utils.get_total_norm(gradients))
        if self.args.grad_clip:
            torch._foreach_mul_(gradients, (self.args.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _norm_of_all(self, norm: Tensor) -> Tensor:
        """The norm of the whole gradient from that of the part which this process has: all of it."""
        return norm

    @contextlib.contextmanager
    def averaged(self):
        self.module.eval()
        try:
            with self.ema.swapped_into(self.module), self._autocast():
                yield self.module
        finally:
            self.module.train()

    def extra_metrics(self) -> dict[str, float]:
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _trained(self) -> dict[str, nn.Parameter]:
        """All parameters, by name."""
        return dict(self.module.named_parameters()) | self._projected()

    def _projected(self) -> dict[str, nn.Parameter]:
        parameters = () if self.projector is None else self.projector.named_parameters()
        return {f"{PROJECTOR}.{name}": parameter for name, parameter in parameters}

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, by name."""
        return dict(self.module.named_parameters()) | dict(self.module.named_buffers())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that a resumed run needs, by part and name; they share memory with the engine's own."""
        buffers = dict(self.module.named_buffers())
        return {
            "model": self._tensors(),
            "ema": self.ema.as_parameters(self.module) | buffers,
            "optimizer": state_of(self.optimizer, self._trained()),
            **({PROJECTOR: self._projected()} if self.projector is not None else {}),
            **{average.part: average.state(self.module) for average in self.post_hoc},
        }

    def snapshot(self, folder: Path, config: dict, state: dict) -> Callable[[], None]:
        if not self.processes.is_main:
            return lambda: None
        tensors = {part: checkpoint.copied(named) for part, named in self.state().items()}
        records = {"config": config, "state": state | {"scaler": self.scaler.state_dict()}}
        return lambda: checkpoint.save(folder, tensors, records)

    def load(self, folder: Path) -> None:
        """From a checkpoint of either engine, of any number of processes."""
        record = checkpoint.read_state(folder)
        if "scaler" not in record:
            raise cli.UsageError(
                f"{folder} was written by another trainer; resume it there, or use --init-from {folder}"
            )
        state = self.state()
        if absent := [each.length for each in self.post_hoc if not (folder / f"{each.part}.safetensors").is_file()]:
            raise cli.UsageError(f"{folder} has no average of length {absent[0]:g}: --post-hoc-ema is of whole runs")
        if self.projector is not None and "alignment" not in checkpoint.read_config(folder):
            raise cli.UsageError(f"{folder} has no projector: --repa is of whole runs, such as of --init-from it")
        if (folder / SHARDED).is_dir():
            dcp.load(state, checkpoint_id=folder / SHARDED, no_dist=not dist.is_initialized())
        else:
            for part, named in state.items():
                fill(named, checkpoint.read_tensors(folder, part))
        if record["scaler"]:  # empty where the run was in another precision
            self.scaler.load_state_dict(record["scaler"])


class FSDPEngine(DDPEngine):
    """Parameters, gradients, optimizer and EMA sharded over all processes, block by block (FSDP2, arXiv 2304.11277).

    `fsdp` gathers a block's parameters for its forward and again for its backward; `sdp` keeps them in between.
    Under bf16 and fp16 they are gathered in that dtype, but for the routers, whose decisions are made in fp32.

    With `--expert-parallel N` the processes form a grid of W/N groups of N. Within a group each process has E/N experts
    of every layer, which are never gathered there; they are sharded over the groups, along the width of the experts.
    """

    blocks_are_whole = False  # routers and experts that are sharded apart, tokens that travel
    all_write = True

    def _place(self) -> nn.Module:
        # It warns of views that something might change in place; nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        world, dealt_over = self.processes.world_size, self.args.expert_parallel
        mesh = init_device_mesh(self.device.type, (world,))
        # Inputs stay as they are: autocast decides what each operation runs in, as it does without sharding.
        fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        half = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options = {"reshard_after_forward": self.args.data_parallel == "fsdp", "mp_policy": half}
        if dealt_over > 1:
            grid = init_device_mesh(
                self.device.type, (world // dealt_over, dealt_over), mesh_dim_names=("data", "expert")
            )

        def shard(unit: list[nn.Module]) -> None:
            for part in unit:
                is_moe = getattr(part, "is_moe", False)
                if is_moe and dealt_over > 1:
                    deal_experts(part.moe, grid, **options)
                if is_moe and self.dtype != torch.float32:
                    fully_shard(part.moe.gate, mesh=mesh, **(options | {"mp_policy": fp32}))
                fully_shard(part, mesh=mesh, **options)

        self.module.materialize(self.device, then=shard)
        self.cpu_group = dist.new_group(backend="gloo")  # for checkpoints, which are written while training goes on
        self.options = {"mesh": mesh, **options}
        return self._sharing(self.module)

    def _sharing(self, module: nn.Module) -> nn.Module:
        return fully_shard(module, **self.options)

    def accumulating(self, last: bool):
        # `fsdp` reduces the gradients of every micro-batch: kept until the last they would be whole on every process.
        for part in (self.model, self.project):
            if part is not None:
                part.set_requires_gradient_sync(last or self.args.data_parallel == "fsdp")
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def averaged(self):
        with super().averaged() as model:
            try:
                yield model
            finally:  # `sdp` leaves that to the backward, and there is none
                for part in self.module.modules():
                    if isinstance(part, FSDPModule):
                        part.reshard()

    def _norm_of_all(self, norm: Tensor) -> Tensor:
        return self.processes.sum(norm.double().square()).sqrt().float()

    def snapshot(self, folder: Path, config: dict, state: dict) -> Callable[[], None]:
        """The state as a distributed checkpoint, beside it the averaged weights, gathered for `sample.py`."""
        beside, tensors = self.processes.on_main(lambda: checkpoint.begin(folder)), self.state()
        records = {"config": config, "state": state | {"scaler": self.scaler.state_dict()}}
        parts = ["ema", *(average.part for average in self.post_hoc)]
        gathered = {part: {n: self._gathered(value) for n, value in tensors[part].items()} for part in parts}
        writing = dcp.async_save(tensors, checkpoint_id=beside / SHARDED, process_group=self.cpu_group)

        def write() -> None:
            try:
                writing.result()  # rank 0's ends when all have written
            except CheckpointException as failure:  # of any process, on all
                error = next(error for error, _ in failure.failures.values())
                raise error if isinstance(error, OSError) else OSError(errno.EIO, str(error)) from None
            if self.processes.is_main:
                parts = dcp.FileSystemReader(beside / SHARDED).read_metadata().storage_data.values()
                parts = {f"{SHARDED}/{part.relative_path}" for part in parts}
                checkpoint.commit(beside, folder, gathered, records, parts)

        return write

    def _gathered(self, value: Tensor) -> Tensor | None:
        """The whole tensor on rank 0's CPU, one at a time; all processes take part."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().to("cpu", copy=True) if self.processes.is_main else None


def fill(targets: dict[str, Tensor], sources) -> None:
    """Copy each whole tensor of `sources` into the target of its name, or this process's part of it."""
    with torch.no_grad():
        for name, target in targets.items():
            if name not in sources:
                raise cli.UsageError(f"the checkpoint has no {name}: it is of another version; use --init-from")
            source = sources[name]
            if isinstance(target, DTensor):
                source = source.to(device=target.device, dtype=target.dtype)
                source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(source)


if __name__ == "__main__":
    cli.run(main, get_parser())
