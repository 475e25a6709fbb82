"""Train a DiT or DiT-MoE with DeepSpeed ZeRO: optimizer (1), gradients (2) and parameters (3) sharded over processes.

deepspeed train_deepspeed.py --deepspeed_config config/zero2.json --model DiT-XL/2 --num_experts 8 --data-path ...
torchrun --nnodes=1 --nproc_per_node=8 train_deepspeed.py --deepspeed_config config/zero3.json ...
python -m torch.distributed.launch --nnodes=1 --nproc_per_node=8 train_deepspeed.py --train_batch_size 32 ...
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import cli
import distributed
import machine
import runs
import training
from cli import UsageError
from files import UNFINISHED
from models import DiT
from optim import ADAMW, parameter_groups, set_lr

STATE = "deepspeed"  # folder of a checkpoint that holds DeepSpeed's own state, and the tag within it
CONVERSION = 86_400  # seconds that the others wait while rank 0 converts a state: longer than for any step


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="train_deepspeed.py", description=__doc__.partition("\n")[0])
    runs.add_training_arguments(parser)
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument(
        "--deepspeed_config",
        type=Path,
        default=Path(__file__).parent / "config" / "zero2.json",
        help="how to shard; batch, learning rate, clipping and precision come from the flags",
    )
    group.add_argument(
        "--train_batch_size", type=cli.positive_int, help="images of a step on one GPU, in place of --global-batch-size"
    )
    parser.add_switch(group, "--deepspeed", True, "accepted for published commands; has no effect")
    parser.set_defaults(precision="bf16")
    return parser


def main(args) -> None:
    file = read_config(args.deepspeed_config)
    import_deepspeed(args.device)
    processes = distributed.start(args.device, args.start_timeout)
    try:
        set_global_batch_size(args, processes.world_size)
        run = runs.prepare(args, processes)
        config = processes.together(lambda: complete_config(file, run))
        processes.agree({f"in {args.deepspeed_config} {entry}": value for entry, value in entries(config)})
        with distributed.noticing_lost_processes():
            training.train(run, ZeroEngine(run, config))
    finally:
        distributed.stop()


# -------------------------------------------------------------------------------------------------------------- config


def read_config(path: Path) -> dict:
    """The file as strict JSON, checked for what DeepSpeed would pass over in silence.

    Raises:
        UsageError: no such file, not strict JSON, no ZeRO stage, or a value that DeepSpeed does not resolve.
    """

    def unique(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is given twice")
        return dict(pairs)

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a JSON number")

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except OSError as error:
        raise UsageError(f"--deepspeed_config {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"--deepspeed_config {path} is not strict JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3) or isinstance(zero["stage"], bool):
        raise UsageError(f"{path} must have a zero_optimization.stage of 1, 2 or 3; without sharding use train.py")
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise UsageError(
                f"{path}: {part}.device nvme is not supported, as the EMA reads all weights each step; use cpu"
            )
    if "scheduler" in config:
        raise UsageError(f"{path} has a scheduler; delete it, --lr-schedule and --warmup-steps are its flags")
    return config


def set_global_batch_size(args, world_size: int) -> None:
    """`--train_batch_size` is the batch of one GPU, as in the published commands.

    Raises:
        UsageError: `--global-batch-size` is given too and says something else.
    """
    per_process = vars(args).pop("train_batch_size")  # one of the two names is enough in a checkpoint's flags
    if per_process is None:
        return
    if "global_batch_size" in args.given and args.global_batch_size != per_process * world_size:
        raise UsageError(
            f"--train_batch_size {per_process} on each of {world_size} processes is a batch of "
            f"{per_process * world_size}, --global-batch-size says {args.global_batch_size}; give one of them"
        )
    args.global_batch_size = per_process * world_size


def complete_config(config: dict, run: runs.Run) -> dict:
    """The file with what the flags decide.

    Raises:
        UsageError: the file says otherwise, or leaves a value to a program that is not here ("auto").
    """
    args = run.args
    per_process = args.global_batch_size // run.processes.world_size
    decided = {  # entry of the file: its flag, its value
        "train_batch_size": ("--global-batch-size", args.global_batch_size),
        "train_micro_batch_size_per_gpu": ("batch per process and micro-batch", per_process // args.accum_iter),
        "gradient_accumulation_steps": ("--accum_iter", args.accum_iter),
        "gradient_clipping": ("--grad-clip", args.grad_clip),
        "bf16.enabled": (f"--precision {args.precision}, that is,", args.precision == "bf16"),
        "fp16.enabled": (f"--precision {args.precision}, that is,", args.precision == "fp16"),
        "optimizer.params.lr": ("--lr", args.lr),
        "optimizer.params.weight_decay": ("--weight-decay", args.weight_decay),
        "optimizer.params.betas": ("the optimizer", list(ADAMW["betas"])),
        "optimizer.params.eps": ("--adam-eps", args.adam_eps),
    }
    for entry, value in entries(config):
        flag, ours = decided.get(entry, (None, None))
        if flag is not None and value not in ("auto", ours):
            raise UsageError(
                f"{args.deepspeed_config} has {entry} {json.dumps(value)}, {flag} says {json.dumps(ours)}; "
                f"change one, or delete the line"
            )
        if flag is None and value == "auto":
            # DeepSpeed itself resolves no "auto"; it fails on it much later, or takes it for a true value.
            raise UsageError(
                f'{args.deepspeed_config} has {entry} "auto", which only the Hugging Face Trainer resolves; '
                f"give a value, or delete the line for DeepSpeed's default"
            )
        if entry == "optimizer.type" and value not in ("Adam", "AdamW"):
            raise UsageError(f"{args.deepspeed_config} has optimizer.type {value}; this project trains with AdamW")
    stage, before = config["zero_optimization"]["stage"], run.resume_from
    universal = before is not None and needs_resharding(before, stage, args.precision, run.processes.world_size)
    ours = {
        "train_batch_size": args.global_batch_size,
        "train_micro_batch_size_per_gpu": per_process // args.accum_iter,
        "gradient_accumulation_steps": args.accum_iter,
        # Trap: left out, it is 1.0, not "no clipping".
        "gradient_clipping": args.grad_clip,
        "bf16": config.get("bf16", {}) | {"enabled": args.precision == "bf16"},
        "fp16": config.get("fp16", {}) | {"enabled": args.precision == "fp16"},
        # Micro-batches add up in fp32: in bf16 small gradients are lost in the sum.
        "data_types": {"grad_accum_dtype": "fp32"} | config.get("data_types", {}),
        # Trap: DeepSpeed's own Adam is compiled at the first start, for minutes and with a compiler that a machine may
        # not have; PyTorch's fused AdamW is the same on GPU and CPU. DeepSpeed wants to be told that this is meant.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": config.get("checkpoint", {}) | {"load_universal": universal},
    }
    return {name: value for name, value in config.items() if name != "optimizer"} | ours


def entries(config: dict, prefix: str = ""):
    """(dotted name, value) of all that is no section."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def needs_resharding(folder: Path, stage: int, precision: str, world_size: int) -> bool:
    """Whether DeepSpeed's state in a checkpoint is that of another number of processes.

    Raises:
        UsageError: there is none in it, or it is of another ZeRO stage or precision, which DeepSpeed cannot read.
    """
    state = checkpoint.read_state(folder)
    before, precision_before = state.get(STATE), state["flags"].get("precision")
    if before is None:
        raise UsageError(f"{folder} was not written by train_deepspeed.py; to start from its weights use --init-from")
    if before["stage"] != stage:
        raise UsageError(
            f"{folder} is of ZeRO stage {before['stage']}, --deepspeed_config has stage {stage}; resume with a file of "
            f"the same stage, or start from the weights with --init-from"
        )
    if precision_before not in (None, precision):
        raise UsageError(
            f"{folder} holds DeepSpeed's state in {precision_before}, --precision is {precision}; resume in "
            f"{precision_before}, or start from the weights with --init-from"
        )
    return before["processes"] != world_size


# -------------------------------------------------------------------------------------------------------------- engine


def import_deepspeed(device: str):
    """The package, quiet, and on a CPU kept from compiling.

    Raises:
        UsageError: it is not installed.
    """
    on_cpu = distributed.choose_device(device).type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(f"train_deepspeed.py needs DeepSpeed ({error}): pip install -r requirements.txt") from None
    deepspeed.utils.logger.setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    if on_cpu:
        # Trap: on a CPU it compiles a shared-memory all-reduce for minutes before the first step; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Fragment(NamedTuple):
    """Where this process's part of a parameter lies."""

    group: int  # index of the flat fp32 tensor
    start: int  # of the part in it
    offset: int  # of the part in the flattened parameter
    numel: int


class ZeroEngine:
    """DeepSpeed ZeRO (arXiv 1910.02054): each process owns a part of the fp32 weights, their moments and their EMA.

    Under bf16 and fp16 the module holds rounded copies of the fp32 weights, the routers' too (their arithmetic stays
    fp32), and autocast decides what each operation runs in, as in train.py.
    """

    all_write = True

    def __init__(self, run: runs.Run, config: dict):
        args = run.args
        self.args, self.device, self.processes = args, run.processes.device, run.processes
        self.stage, self.world_size = config["zero_optimization"]["stage"], run.processes.world_size
        for flag, given in (
            ("--compile", args.compile and "compile" in args.given),
            ("--activation-checkpointing selective", args.activation_checkpointing == "selective"),
        ):
            if given and self.stage == 3:
                raise UsageError(
                    f"{flag} does not go with ZeRO-3, which gathers weights inside each block; use zero2.json"
                )
        if args.optimizer == "muon":
            raise UsageError("--optimizer muon is of train.py: ZeRO's shards are no matrices")
        if run.alignment is not None:
            raise UsageError("--repa is of train.py, whose --data-parallel sdp and fsdp shard the projector as well")
        if args.post_hoc_ema:
            raise UsageError("--post-hoc-ema is of train.py, whose --data-parallel fsdp shards it")
        self.dtype = machine.set_precision(args.precision)
        self.deepspeed = import_deepspeed(args.device)
        self._check_precision(args.precision)
        self._join()

        self.module = runs.new_network(run, whole_blocks=self.stage < 3)
        # DeepSpeed switches an autocast around its forward off: it has to be inside.
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.module.forward = autocast(self.module.forward)
        # By shape, which sharding will take away.
        groups = parameter_groups(self.module, args.lr, args.weight_decay, args.decay_all)
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        self.module.materialize(self.device, then=self._shard(config) if self.stage == 3 else None)
        parameters = dict(self.module.named_parameters())
        groups = [group | {"params": [parameters[names[p]] for p in group["params"]]} for group in groups]
        optimizer = torch.optim.AdamW(groups, **(ADAMW | {"eps": args.adam_eps}))
        self.engine = self.deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)[0]
        self.zero = self.engine.optimizer
        self.fragments = {name: self._fragment(parameter) for name, parameter in parameters.items()}
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        self.module.train()

        if run.start is not None:
            with torch.device("meta"):
                model = DiT(run.config)  # the module's own parameters may be cut
            weights = run.start.state_dict(model, args.global_seed)
            self._fill(self.masters, weights)
            self._publish()
            for name, buffer in self.module.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        self.ema = [flat.detach().clone() for flat in self.masters]
        self.cpu_group = dist.new_group(backend="gloo")  # for checkpoints, which are written while training goes on
        self.held: list[tuple[Path, io.BytesIO]] = []
        self.engine.checkpoint_engine.save = self._hold
        self.engine._copy_recovery_script = lambda folder: None  # programs have no place in a checkpoint

    def _check_precision(self, precision: str) -> None:
        accelerator = self.deepspeed.accelerator.get_accelerator()
        supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
        if precision in supported and not supported[precision]():
            raise UsageError(f"--precision {precision}: DeepSpeed does not support it on this device; use fp32")

    def _join(self) -> None:
        """DeepSpeed needs a process group, even of one process, and the ranks in the environment."""
        os.environ |= {"RANK": str(self.processes.rank), "LOCAL_RANK": str(self.processes.local_rank)}
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.deepspeed.init_distributed(auto_mpi_discovery=False)

    def _shard(self, config: dict) -> Callable:
        """Cut each unit of the model before the next one exists: a large model never exists whole."""

        def shard(unit: list) -> None:
            for part in unit:
                for parameter in part.parameters():
                    parameter.data = parameter.data.to(self.dtype)
                self.deepspeed.zero.Init(module=part, config_dict_or_path=config)

        return shard

    # ---------------------------------------------------------------------------------------------------- fp32 weights

    @property
    def masters(self) -> list[Tensor]:
        """This process's part of the fp32 weights, one flat tensor per group; each class has its own name for it."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return next(getattr(self.zero, name) for name in names if hasattr(self.zero, name))

    def _fragment(self, parameter) -> Fragment | None:
        """None where this process has no part of it."""
        if self.stage == 3:
            group, start, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
            offset = self.processes.rank * numel
            numel = min(numel, parameter.ds_numel - offset)  # the last parts are padded
            return Fragment(group, start, offset, numel) if numel > 0 else None
        if (mapping := parameter._hp_mapping) is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(mapping.param_group_index, here.start, there.start, there.numel)

    @torch.no_grad()
    def _fill(self, flats: list[Tensor], whole: Mapping[str, Tensor]) -> None:
        """Copy this process's part of each tensor of `whole` to where it belongs."""
        for name, part in self.fragments.items():
            if part is not None and name in whole:
                source = whole[name].flatten()[part.offset : part.offset + part.numel]
                flats[part.group][part.start : part.start + part.numel].copy_(source)

    @torch.no_grad()
    def _gather(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """The whole tensors on rank 0's CPU, gathered one at a time; all processes take part."""
        gathered = {}
        for name, part in self.fragments.items():
            whole = torch.zeros(self.shapes[name], device=self.device)
            if part is not None:
                mine = flats[part.group][part.start : part.start + part.numel]
                whole.view(-1)[part.offset : part.offset + part.numel].copy_(mine)
            if self.world_size > 1:
                dist.reduce(whole, dst=0)
            if self.processes.is_main:
                gathered[name] = whole.cpu()
        return gathered | checkpoint.copied(dict(self.module.named_buffers()))

    @torch.no_grad()
    def _publish(self) -> None:
        """Give the module the values of the fp32 weights, as DeepSpeed does after an update."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.masters)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()

    # -------------------------------------------------------------------------------------------------------- one step

    def forward(self, x, t, condition, aligned: bool = False):
        return self.engine(x, t, condition, return_routing=True)

    @contextlib.contextmanager
    def accumulating(self, last: bool):
        yield
        if not last:
            self.engine.step()  # only counts micro-batches

    def backward(self, loss) -> None:
        # DeepSpeed skips an update whose gradient is not finite, on all processes; see that such a loss has no other.
        loss = torch.where(loss.detach().isfinite(), 1.0, torch.nan) * loss
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, loss_is_finite: bool) -> training.Update:
        set_lr(self.zero.param_groups, lr)
        self.engine.step()
        applied = self.engine.was_step_applied()
        if applied:
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.masters, 1 - self.args.ema_decay)
        return training.Update(float(self.engine.get_global_grad_norm()), applied)

    @contextlib.contextmanager
    def averaged(self):
        self.module.eval()
        self._swap()
        try:
            yield self.module
        finally:
            self._swap()
            self.module.train()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the values of weights and averages: DeepSpeed holds on to the memory of its own."""
        for average, master in zip(self.ema, self.masters, strict=True):
            kept = master.detach().clone()
            master.copy_(average)
            average.copy_(kept)
        self._publish()

    def extra_metrics(self) -> dict[str, float]:
        return {"loss_scale": float(self.zero.loss_scale)} if self.dtype == torch.float16 else {}

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _hold(self, state_dict: dict, path: str) -> None:
        """In place of DeepSpeed's writing: a copy, for the thread that writes it later."""
        copy = io.BytesIO()
        torch.save(state_dict, copy)
        self.held.append((Path(path), copy))

    def _begin(self, folder: Path) -> Path:
        """`checkpoint.begin`, with the folders that each process would make for itself, or fail to."""
        beside = checkpoint.begin(folder)
        (beside / STATE / STATE).mkdir(parents=True)
        return beside

    def snapshot(self, folder: Path, config: dict, state: dict) -> Callable[[], None]:
        """DeepSpeed's own state, private to the run, and beside it weights and EMA, whole, for `sample.py`."""
        beside = self.processes.on_main(lambda: self._begin(folder))
        self.engine.save_checkpoint(str(beside / STATE), tag=STATE, save_latest=False)
        files, self.held = self.held, []
        tensors = {"model": self._gather(self.masters), "ema": self._gather(self.ema)}
        records = {"config": config, "state": state | {STATE: {"stage": self.stage, "processes": self.world_size}}}

        def write() -> None:
            error = None
            try:
                for path, copy in files:
                    path.write_bytes(copy.getbuffer())
            except OSError as reason:
                error = reason
            ends = [None] * self.world_size
            mine = error, [path.relative_to(beside).as_posix() for path, _ in files]
            dist.all_gather_object(ends, mine, group=self.cpu_group)  # all have written, or one could not
            if reasons := [reason for reason, _ in ends if reason]:
                raise reasons[0]
            if self.processes.is_main:
                checkpoint.commit(beside, folder, tensors, records, [part for _, parts in ends for part in parts])

        return write

    def load(self, folder: Path) -> None:
        """DeepSpeed's state holds pickles: resume from checkpoints of your own only."""
        universal = self.engine.load_universal_checkpoint()
        source = folder
        if universal:
            self.processes.set_timeout(CONVERSION)
            source = self.processes.on_main(lambda: self._reshard(folder))
            self.processes.set_timeout(self.args.start_timeout)
        own = [{name: group[name] for name in ("weight_decay", "lr_factor")} for group in self.zero.param_groups]
        self.engine.load_checkpoint(str(source / STATE), tag=STATE, load_lr_scheduler_states=False)
        # From a universal checkpoint ZeRO-3 gives all groups what the first has, and one step counter that each group's
        # update would advance.
        for group, values in zip(self.zero.param_groups, own, strict=True):
            group.update(values)
        for flat, entry in self.zero.optimizer.state.items():
            if "step" in entry:
                entry["step"] = torch.as_tensor(entry["step"]).to(flat.device, copy=True)
        if universal:
            self.processes.gather(None)
            if self.processes.is_main:
                shutil.rmtree(source)
        self._publish()
        self._fill(self.ema, checkpoint.read_tensors(folder, "ema"))

    def _reshard(self, folder: Path) -> Path:
        """Write the state as DeepSpeed's universal checkpoint, which any number of processes can read."""
        target = folder.with_name(f"{UNFINISHED}{folder.name}-universal")
        print(f"{folder} is of another number of processes: converting DeepSpeed's state")
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--num_extract_workers=1", "--num_merge_workers=1"]
        command += [f"--input_folder={folder / STATE / STATE}", f"--output_folder={target / STATE / STATE}"]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
        if result.returncode:
            shutil.rmtree(target, ignore_errors=True)
            raise cli.RunStopped(f"could not convert {folder}: {' '.join(result.stderr.splitlines()[-1:])}")
        return target


if __name__ == "__main__":
    cli.run(main, get_parser())
