"""The training loop, the engine that it drives, and the flags that all trainers share.

N images of a micro-batch · C latent channels · L MoE layers · E experts

`prepare` turns flags into a `Run`, having checked all that the user gave; `train` is the one loop. What differs
between trainers, where parameters live and how gradients meet, is an `Engine`.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import checkpoint
import distributed
import evaluation
import sampling
from analysis.routing import Recorder, recording
from cli import Parser, RunStopped, UsageError, natural_int, number_in, positive_int
from data import (
    BatchSchedule,
    ImageData,
    SpaceInfo,
    UnreadableImages,
    load_space,
    make_loader,
    require_folder,
    space_info,
)
from diffusion import GaussianDiffusion, NoisedBatch, RectifiedFlow, stratify
from files import write_json
from latents import LatentShards, open_features
from models import (
    DiT,
    DiT_models,
    DiTConfig,
    build_config,
    check_attention,
    count_parameters,
    row_name,
)
from moe import Routing, load_balancing_loss, load_statistics, router_entropy
from optim import SCHEDULES, lr_factor
from profiling import StepProfiler

BAD_STEPS_IN_A_ROW = 5  # updates skipped for a loss that is not finite before the run gives up
FAILED_SAVES_IN_A_ROW = 3


# ---------------------------------------------------------------------------------------------------------------- flags


def add_training_arguments(parser: Parser) -> None:
    """What every trainer takes; the names are those of DiT-MoE and fast-DiT where they have one."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", type=Path, help="folder with one folder of images per class")
    group.add_argument("--feature-path", type=Path, help="extracted latents (or fast-DiT's), in place of --data-path")
    group.add_argument("--vae-path", "--vae", default="mse", help="autoencoder: folder, hub name, mse, ema, or none")
    group.add_argument("--image-size", type=positive_int, default=256, help="side of the images, in pixels")
    group.add_argument("--num-workers", type=natural_int, default=4, help="processes that load data; 0: none")
    parser.add_switch(group, "--flip", True, "mirror half of the images")

    group = parser.add_argument_group("model")
    # None stands for what --init-from says, or else for the default that `DiTConfig` has.
    group.add_argument("--model", help="row of the table of sizes: DiT-{S,B,L,XL}/{2,4,8}, DiT-G/2 (default: DiT-S/2)")
    group.add_argument("--num-classes", type=positive_int, help="the data may have fewer (default: 1000)")
    group.add_argument("--num_experts", type=natural_int, help="routed experts per MoE layer (default: 0, a dense DiT)")
    group.add_argument("--num_experts_per_tok", type=positive_int, help="experts that each token goes to (default: 2)")
    group.add_argument("--num_shared_experts", type=natural_int, help="always-on experts of width D (default: 2)")
    group.add_argument("--expert-ratio", type=number_in(0, 1e3), help="width of a routed expert over D (default: 4)")
    group.add_argument("--moe-layers", help="all, every-N, deep-half, shallow-half, or 0,2,5 (default: all)")
    parser.add_switch(group, "--norm-topk-prob", None, "divide the routing weights of a token by their sum")
    parser.add_switch(group, "--qk-norm", None, "default: on for XL and G with experts, as published")
    group.add_argument("--class-dropout-prob", type=number_in(0, 1), help="labels dropped, for guidance (default: 0.1)")
    group.add_argument("--pretraining_tp", type=int, help="accepted for published commands; has no effect")

    group = parser.add_argument_group("objective")
    parser.add_switch(group, "--rf", False, "rectified flow in place of DDPM")
    group.add_argument("--t-distribution", choices=("lognormal", "uniform"), default="lognormal", help="of flow time")
    group.add_argument(
        "--timestep-shift", type=number_in(0.01, 100), default=1.0, help="of flow time; above 1: to noise"
    )
    group.add_argument("--time-scale", type=number_in(1e-3, 1e6), default=1.0, help="of flow time in the network")
    parser.add_switch(group, "--stratified-t", False, "spread the times of a batch evenly over their distribution")
    group.add_argument("--noise-schedule", choices=("linear", "cosine"), default="linear", help="of DDPM")
    group.add_argument("--prediction", choices=("eps", "x0", "v"), default="eps", help="what a DDPM network predicts")
    group.add_argument(
        "--diffusion-loss", choices=("hybrid", "mse"), default="hybrid", help="mse: variance not learned"
    )

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data")
    group.add_argument("--max-steps", type=positive_int, help="stop after so many steps, if epochs do not end first")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images of one optimizer step")
    group.add_argument("--accum_iter", type=positive_int, default=1, help="micro-batches that a step is cut into")
    group.add_argument("--lr", type=number_in(0, 1e3), default=1e-4, help="learning rate of AdamW")
    group.add_argument(
        "--lr-schedule", choices=SCHEDULES, default="constant", help="after the warmup, until the last step"
    )
    group.add_argument(
        "--warmup-steps", type=natural_int, default=0, help="steps of linear growth of the learning rate"
    )
    group.add_argument(
        "--weight-decay", type=number_in(0, 1e3), default=0.0, help="of matrices; biases, norms and tables do not decay"
    )
    group.add_argument(
        "--grad-clip", type=number_in(0, math.inf), default=0.0, help="largest norm of the gradient; 0: no clipping"
    )
    group.add_argument("--ema-decay", type=number_in(0, 1), default=0.9999, help="of the moving average of the weights")
    group.add_argument(
        "--aux-loss-alpha", type=number_in(0, 1e6), default=0.005, help="factor of the balance loss (paper: 0.005)"
    )
    parser.add_switch(group, "--local-balance", False, "balance each process's own tokens, not those of all processes")
    group.add_argument(
        "--global-seed", type=natural_int, default=0, help="of initial weights, data order and all noise"
    )

    group = sampling.add_machine_arguments(parser)
    parser.add_switch(group, "--activation-checkpointing", False, "recompute blocks in the backward, to save memory")
    parser.add_switch(group, "--deterministic", False, "bit-identical repeat runs on a GPU too, slower")
    group.add_argument(
        "--start-timeout",
        type=number_in(1, 1e6),
        default=1800,
        help="seconds to wait for the other processes until the first step is done, with its compilation",
    )
    group.add_argument(
        "--timeout",
        type=number_in(1, 1e6),
        default=1800,
        help="seconds after which a process that hears nothing from another one gives up, from then on",
    )
    group.add_argument("--local-rank", type=int, help="set by launchers; not used")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--results-dir", type=Path, default=Path("results"), help="run folders NNN-<model>-<E>E<K>A-<objective> go here"
    )
    group.add_argument("--resume", help="auto (newest good checkpoint of the newest run of this name), or a folder")
    group.add_argument("--init-from", help="start from the weights alone of a checkpoint or published file")
    parser.add_switch(group, "--allow-changes", False, "resume although data or flags that shape the curve differ")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    group.add_argument("--keep-last", type=natural_int, default=0, help="checkpoints to keep, at least 2; 0: all")
    group.add_argument("--keep-every", type=natural_int, default=0, help="keep those of every so many steps besides")
    group.add_argument(
        "--sample-every", type=natural_int, default=0, help="draw a grid of images from the EMA; 0: never"
    )
    group.add_argument("--sample-cfg-scale", type=number_in(0, 1e3), default=1.5, help="guidance of those images")
    group.add_argument(
        "--metrics-every", type=natural_int, default=0, help="compare images from the EMA with a reference; 0: never"
    )
    group.add_argument("--metrics-samples", type=positive_int, default=5000, help="how many; --sample-cfg-scale")
    group.add_argument("--metrics-ref", type=Path, help="what `calculate_metrics.py ref` wrote, or ADM's reference")
    group.add_argument("--metrics-weights", type=Path, help="of the network that the reference was made with")
    group.add_argument(
        "--profile", type=natural_int, default=0, help="record so many of the first steps: trace and table of kernels"
    )
    parser.add_switch(group, "--wandb", False, "log to Weights & Biases too (pip install wandb)")


MODEL_FLAGS = (  # each a field of DiTConfig
    *("num_classes", "class_dropout_prob", "num_experts", "num_experts_per_tok", "num_shared_experts"),
    *("expert_ratio", "norm_topk_prob", "moe_layers", "qk_norm"),
)

# Flags that may differ when a run is resumed: they do not shape the loss curve.
RUN_CONTROL = {
    *("data_path", "feature_path", "vae_path", "num_workers", "epochs", "max_steps", "device", "local_rank", "timeout"),
    *("attention", "compile", "activation_checkpointing", "deterministic", "pretraining_tp"),
    *("data_parallel", "expert_parallel", "start_timeout"),
    *("deepspeed", "deepspeed_config", "results_dir", "resume", "init_from", "allow_changes"),
    *("log_every", "ckpt_every", "keep_last", "keep_every", "sample_every", "sample_cfg_scale", "wandb", "profile"),
    *("metrics_every", "metrics_samples", "metrics_ref", "metrics_weights"),
}


# --------------------------------------------------------------------------------------------------------------- engine


class Update(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    applied: bool  # False: skipped, because loss or gradient was not finite


class Engine(Protocol):
    """Where parameters live and how gradients meet; the loop knows no more of a trainer than this."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Routing]]:
        """`DiT.forward(..., return_routing=True)` in the engine's precision."""

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch; gradients need to meet only in the `last` of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which is already divided by the number of micro-batches."""

    def step(self, lr: float, loss_is_finite: bool) -> Update:
        """Clip, update the parameters and the EMA, clear the gradients; skip what is not finite."""

    def averaged(self) -> AbstractContextManager[DiT]:
        """The model with the weights of the EMA, in the engine's precision."""

    def snapshot(self, folder: Path, config: dict, state: dict) -> Callable[[], None]:
        """Copy the state; called by all processes. Returns what writes it (it may raise OSError), on any thread."""

    def load(self, folder: Path) -> None:
        """Take model, EMA and optimizer from a verified checkpoint."""

    def extra_metrics(self) -> dict[str, float]:
        """Numbers of the engine's own for the log."""


# ------------------------------------------------------------------------------------------------------------------ run


@dataclass(kw_only=True)
class Run:
    """One training run, checked and ready: what the loop needs besides the engine."""

    args: argparse.Namespace  # resolved: no flag stands for a choice that is still to be made
    processes: distributed.Processes
    config: DiTConfig
    objective: object
    data: torch.utils.data.Dataset
    schedule: BatchSchedule
    space: object  # None where latents are read from disk and no images are drawn
    total_steps: int
    record: dict  # config.json of its checkpoints
    evaluator: evaluation.Evaluator | None = None  # of --metrics-every
    resume_from: Path | None = None
    folder: Path | None = None  # of a run that is resumed; else `open` makes it
    log: distributed.Logger = field(default_factory=lambda: distributed.Logger(None))

    def open(self, step: int) -> None:
        """Make or claim the run folder, and its log. Called when all is checked: wrong input leaves no folder."""
        self.folder = self.processes.on_main(self._claim_folder)
        if self.processes.is_main:
            wandb = {"name": self.folder.name, "config": flags(self.args)} if self.args.wandb else None
            self.log = distributed.Logger(self.folder, wandb, step)
            write_json(self.folder / "args.json", flags(self.args))
            checkpoint.sweep(self.folder / "checkpoints")
            for later in checkpoint.set_aside(self.folder, step):
                self.log.info(f"this run goes back behind a checkpoint of the one before, which is now {later}")

    def _claim_folder(self) -> Path:
        name = run_name(self.args.model, self.config, self.objective)
        folder = self.folder or distributed.new_run_folder(self.args.results_dir, name)
        self._claim = distributed.claim(folder)
        return folder

    def close(self) -> None:
        self.log.close()
        if self.processes.is_main and self.folder is not None:
            self._claim.close()


def prepare(args, processes: distributed.Processes) -> Run:
    """Check all that the user gave, on all processes; writes nothing.

    Raises:
        UsageError: flags, data or checkpoint are wrong.
    """
    run = processes.together(lambda: _check(args, processes))
    if args.metrics_every:
        run.evaluator = evaluation.evaluator_for_training(
            args.metrics_ref,
            args.metrics_weights,
            args.image_size,
            args.metrics_samples,
            run.schedule.micro_batch_size,
            processes,
        )
    run.resume_from, run.folder = processes.on_main(lambda: find_resume(run))
    return run


def _check(args, processes: distributed.Processes) -> Run:
    args = argparse.Namespace(**vars(args))
    args.precision = choose_precision(args.precision, processes.device)
    if (args.data_path is None) == (args.feature_path is None):
        raise UsageError("give either --data-path (a folder of images per class) or --feature-path (latents)")
    if args.data_path is not None:
        require_folder(args.data_path, "data path")
    if args.keep_last == 1:
        raise UsageError("--keep-last 1 would leave no checkpoint to fall back to; use 2 or more, or 0 for all")
    if args.metrics_every and args.metrics_ref is None:
        raise UsageError("--metrics-every needs --metrics-ref FILE, which `calculate_metrics.py ref` writes")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb needs the package: pip install wandb")
    model = choose_model(args)  # a wrong one is said before the data is looked through
    for name in MODEL_FLAGS:
        setattr(args, name, getattr(model, name))
    args.model = args.model or row_name(model) or "DiT"
    if args.compile and args.precision in ("fp32", "tf32") and torch.__version__ < "2.15" and args.num_experts:
        raise UsageError(f"--compile with --precision {args.precision} needs PyTorch 2.15 or newer; use bf16")
    objective = build_objective(args)
    needs_space = args.feature_path is None or args.sample_every > 0 or args.metrics_every > 0
    space_facts = space_info(args.vae_path) if needs_space else None
    data = open_data(args, space_facts)
    if data.num_classes > args.num_classes:
        raise UsageError(f"the data has {data.num_classes} classes, --num-classes allows {args.num_classes}")
    channels, input_size, width = data.latent_shape
    if width != input_size:
        raise UsageError(f"latents of {input_size}x{width} are not square")
    if needs_space and space_facts.channels != channels:
        raise UsageError(f"--vae-path {args.vae_path} has {space_facts.channels} channels, the latents have {channels}")
    if args.init_from is not None and model.in_channels != channels:
        raise UsageError(f"{args.init_from} is for latents of {model.in_channels} channels, the data has {channels}")
    config = dataclasses.replace(model, input_size=input_size, in_channels=channels)
    dtype = sampling.PRECISIONS[args.precision]
    check_attention(args.attention, processes.device, dtype, config.hidden_size // config.num_heads)
    schedule = BatchSchedule(
        len(data), args.global_batch_size, args.accum_iter, processes.rank, processes.world_size, args.global_seed
    )
    steps = args.epochs * schedule.steps_per_epoch
    record = {
        "format": checkpoint.FORMAT,
        "model_name": args.model,
        "model": config.to_dict(),
        "objective": objective.config(),
        "space": space_facts.config() if needs_space else {"path": args.vae_path},
        "image_size": args.image_size,
        "ema_decay": args.ema_decay,
        "data": {"samples": len(data), "fingerprint": data.fingerprint(), "class_names": data.class_names},
        "versions": {"torch": torch.__version__},
    }
    return Run(
        args=args,
        processes=processes,
        config=config,
        objective=objective,
        data=data,
        schedule=schedule,
        space=load_space(args.vae_path).to(processes.device) if needs_space else None,
        total_steps=min(args.max_steps or steps, steps),
        record=record,
    )


def choose_model(args) -> DiTConfig:
    """What the model flags say, or the file of `--init-from`, which they must not contradict.

    Label dropout may be another one, and so may the image size: neither changes a parameter.
    """
    given = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name) is not None}
    useless = set(given) & {"num_experts_per_tok", "num_shared_experts", "expert_ratio", "moe_layers", "norm_topk_prob"}
    if args.init_from is None and useless and not args.num_experts:
        raise UsageError(
            f"--{min(useless)} without --num_experts: that is a dense DiT; add, for example, --num_experts 8"
        )
    if args.init_from is None:
        # Any size that every patch divides: the true one is not known before the data.
        return build_config(args.model or "DiT-S/2", input_size=64, **given)
    known = {"num_experts_per_tok": given["num_experts_per_tok"]} if "num_experts_per_tok" in given else {}
    config = checkpoint.load_weights(args.init_from, **known).config
    dropout = given.pop("class_dropout_prob", config.class_dropout_prob)
    if args.model is not None:
        given |= {key: getattr(build_config(args.model), key) for key in DiT_models[args.model]}
    for name, value in given.items():
        if value != getattr(config, name):
            flag = args.model if name in DiT_models["DiT-S/2"] else f"--{name} {value}"
            looks = checkpoint.describe(config)
            raise UsageError(f"{flag} contradicts {args.init_from}, which has {name} {getattr(config, name)} ({looks})")
    if (dropout > 0) != (config.null_class is not None):
        has = "a" if config.null_class is not None else "no"
        raise UsageError(f"--class-dropout-prob {dropout} contradicts {args.init_from}, which has {has} null class")
    return dataclasses.replace(config, class_dropout_prob=dropout)


def choose_precision(name: str | None, device: torch.device) -> str:
    """`--precision`, or what `accelerate launch --mixed_precision` left in the environment, or the device's best."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name is None and launched in sampling.PRECISIONS:
        name = launched
    return sampling.choose_precision(name, device)


def build_objective(args):
    """The one place where `--rf` is read."""
    if args.rf:
        return RectifiedFlow(args.t_distribution, args.timestep_shift, args.time_scale)
    return GaussianDiffusion(
        schedule=args.noise_schedule,
        prediction=args.prediction,
        variance="learned_range" if args.diffusion_loss == "hybrid" else "fixed_small",
        loss=args.diffusion_loss,
    )


def open_data(args, space_facts: SpaceInfo | None):
    if args.feature_path is not None:
        data = open_features(args.feature_path, args.image_size, args.global_seed, args.flip)
        if isinstance(data, LatentShards):
            data.compare_with(space_facts)
            if space_facts is None:  # no autoencoder is loaded; checkpoints must name the one that made the latents
                args.vae_path = data.space.path
        return data
    return ImageData(args.data_path, args.image_size, space_facts, args.global_seed, args.flip)


def run_name(model: str, config: DiTConfig, objective) -> str:
    """`DiT-S-2-8E2A-rf`, or `DiT-S-2-ddpm` for the dense model."""
    experts = f"-{config.num_experts}E{config.num_experts_per_tok}A" if config.num_experts else ""
    return f"{model.replace('/', '-')}{experts}-{objective.name}"


def flags(args) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def find_resume(run: Run) -> tuple[Path | None, Path | None]:
    """(checkpoint to resume from, run folder to go on in), or twice None for a new run.

    Raises:
        UsageError: there is none at the path given, it is damaged, or the curve could not go on as it was.
    """
    args, folder = run.args, None
    if args.resume is None:
        return None, None
    if args.resume == "auto":
        name = run_name(args.model, run.config, run.objective)
        newest_run = next(iter(distributed.find_runs(args.results_dir, name)), None)
        newest = checkpoint.newest_good(newest_run) if newest_run else None
        if newest is None:
            print(f"--resume auto: no checkpoint in the newest run of {name} in {args.results_dir}, starting anew")
            return None, None
        found, folder = newest, newest_run
    else:
        path = Path(args.resume).expanduser()
        if path.is_file():
            raise UsageError(f"--resume needs a checkpoint folder; to start from the weights in {path} use --init-from")
        if not path.is_dir():
            raise UsageError(f"--resume {path}: no such folder")
        if checkpoint.is_checkpoint(path):
            checkpoint.verify(path)
            found, folder = path, path.parent.parent if path.parent.name == "checkpoints" else None
        else:
            found, folder = checkpoint.newest_good(path), path
            if found is None:
                raise UsageError(f"--resume {path}: no good checkpoint in this folder")
    if not (found / "state.json").is_file():
        raise UsageError(f"--resume {found}: it holds weights, not the state of a run; use --init-from")
    if not args.allow_changes:
        compare_with_checkpoint(run, found)
    return found, folder


def compare_with_checkpoint(run: Run, folder: Path) -> None:
    """Refuse to resume a run whose curve could not go on as it was."""
    before, state = checkpoint.read_json(folder, "config"), checkpoint.read_json(folder, "state")
    flags_before, flags_now = state["flags"], flags(run.args)
    before["model"] = DiTConfig.from_dict(before["model"]).to_dict()  # with today's defaults for options of today
    pairs = {"data fingerprint": (before["data"]["fingerprint"], run.record["data"]["fingerprint"])}
    for part in ("model", "objective", "space"):
        pairs |= {f"{part} {key}": (before[part].get(key), value) for key, value in run.record[part].items()}
    pairs.pop("space path")  # an autoencoder may have moved
    for key in (flags_before.keys() & flags_now.keys()) - RUN_CONTROL:
        pairs[f"--{key}"] = flags_before[key], flags_now[key]
    if run.args.lr_schedule != "constant":
        pairs["number of steps, which the learning rate follows,"] = state["total_steps"], run.total_steps
    if different := [f"{what} was {old}, is {new}" for what, (old, new) in sorted(pairs.items()) if old != new]:
        raise UsageError(
            f"cannot resume {folder}: {'; '.join(different[:4])}; --allow-changes resumes all the same, without "
            f"--resume a new run begins"
        )


# ----------------------------------------------------------------------------------------------------------------- loop


class Window:
    """Sums since the last log line; saved with a checkpoint, so that a resumed run logs the same averages."""

    def __init__(self, num_layers: int, num_experts: int):
        self.shape = (num_layers, num_experts)
        self.clear()

    def clear(self) -> None:
        self.steps, self.sums, self.counts = 0, {}, torch.zeros(self.shape, dtype=torch.float64)

    def add(self, values: dict[str, float], counts: Tensor) -> None:
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts += counts.view(self.shape)

    def means(self) -> dict[str, float]:
        return {name: total / self.steps for name, total in self.sums.items()}

    def state(self) -> dict:
        return {"steps": self.steps, "sums": dict(self.sums), "counts": self.counts.tolist()}

    def load(self, state: dict) -> None:
        self.steps, self.sums = state["steps"], dict(state["sums"])
        self.counts = torch.tensor(state["counts"], dtype=torch.float64).view(self.shape)


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish that the loop reads at the end of a step."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received = [0.0, 0.0]
        self.before = [signal.signal(number, self._note) for number in self.numbers]

    def _note(self, number, frame) -> None:
        self.received[self.numbers.index(number)] = 1.0
        self.restore()  # a second one ends the process at once

    def restore(self) -> None:
        for number, handler in zip(self.numbers, self.before, strict=True):
            signal.signal(number, handler)

    @staticmethod
    def exit_code(agreed: list[float]) -> int | None:
        """128 + the signal's number, of whichever signal any process got; None if none did."""
        return next((128 + n for n, got in zip(StopSignals.numbers, agreed, strict=True) if got), None)


class Clock:
    """Images per second and the share of time spent waiting for data, since the last log line."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began, self.waited, self.paused, self.images = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def waiting(self):
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def pausing(self):
        """Around what is not training: checkpoints, sample grids, metrics."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def rates(self) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.began - self.paused)
        return {"images_per_second": self.images / elapsed, "data_wait_share": self.waited / elapsed}


@dataclass
class Progress:
    """Where a run stands; with the engine's state, all that resuming needs."""

    window: Window
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    unreadable: set[int] = field(default_factory=set)  # images that could not be read so far

    def state(self) -> dict:
        """A copy: it is written while the next steps go on."""
        return vars(self) | {"window": self.window.state(), "unreadable": sorted(self.unreadable)}

    def load(self, state: dict) -> None:
        self.step, self.skipped, self.bad_in_a_row = state["step"], state["skipped"], state["bad_in_a_row"]
        self.unreadable = set(state["unreadable"])
        self.window.load(state["window"])


def train(run: Run, engine: Engine) -> None:
    """Train until `run.total_steps`, from wherever `run.resume_from` stands.

    Raises:
        RunStopped: the loss is not finite in several steps in a row, or checkpoints cannot be written.
        SystemExit: a signal asked for the end; the state has been saved.
    """
    progress = Progress(window=Window(len(run.config.moe_indices), run.config.num_experts))
    if run.resume_from is not None:
        engine.load(run.resume_from)
        progress.load(checkpoint.read_json(run.resume_from, "state"))
    run.open(progress.step)
    introduce(run, progress.step)
    try:
        _loop(run, engine, progress)
    except RunStopped as reason:
        run.log.info(f"stopped: {reason}")
        raise
    finally:
        run.close()


def _loop(run: Run, engine: Engine, progress: Progress) -> None:
    args, processes, log = run.args, run.processes, run.log
    loader = make_loader(run.data, run.schedule, progress.step, args.num_workers, processes.device.type == "cuda")
    batches = iter(loader)
    unreadable, saver = UnreadableImages(progress.unreadable), Saver(run, engine)
    signals, clock, bar, first_step = StopSignals(), Clock(), progress_bar(run, progress.step), True
    profiler = StepProfiler(args.profile if processes.is_main else 0, run.folder / "profile")
    while progress.step < run.total_steps:
        # Accumulate: forward and backward over the micro-batches of this step.
        totals, seen, bad_images = [], [], []
        for micro in range(args.accum_iter):
            with clock.waiting():
                batch = next(batches)
            bad_images += batch["unreadable"][batch["unreadable"] >= 0].tolist()
            noised, labels = make_batch(run, batch, run.schedule.positions(micro))
            with engine.accumulating(last=micro == args.accum_iter - 1):
                output, routings = engine.forward(noised.x_t, noised.t, labels)
                terms = run.objective.loss(output.float(), noised)  # {name: (N,)}
                loss, values, counts = total_loss(
                    terms, routings, args.aux_loss_alpha, None if args.local_balance else processes.sum
                )
                engine.backward(loss / args.accum_iter)
            totals.append(torch.cat([values / args.accum_iter, counts.flatten()]))
            seen.append((batch["index"], terms["loss"].detach()))
        names = [*terms, "balance_loss"] if routings else list(terms)

        # Agree: one exchange tells every process the loss, the experts' load and who was asked to stop.
        saver.settle(wait=False)
        wishes = [*signals.received, float(saver.gave_up is not None), float(len(bad_images))]
        wishes = torch.tensor(wishes, device=processes.device)
        agreed = processes.sum(torch.cat([wishes, torch.stack(totals).sum(dim=0)])).tolist()
        exit_code = signals.exit_code(agreed[:2])
        if agreed[2]:
            raise RunStopped(saver.gave_up or "another process could not write checkpoints")
        if agreed[3]:
            for name in unreadable.update([i for part in processes.gather(bad_images) for i in part], run.data):
                log.info(f"unreadable image, replaced by its successor: {name}")
        means = {name: value / processes.world_size for name, value in zip(names, agreed[4:], strict=False)}
        counts = torch.tensor(agreed[4 + len(names) :], dtype=torch.float64)

        # Update.
        lr = args.lr * lr_factor(progress.step, args.lr_schedule, args.warmup_steps, run.total_steps)
        finite = all(math.isfinite(value) for value in means.values())
        update = engine.step(lr, finite)
        progress.step += 1
        if first_step:
            processes.set_timeout(args.timeout)
            first_step = False
        clock.images += args.global_batch_size
        bar.update()
        if profiler.step():
            log.info(f"profile of {args.profile} steps: trace.json and kernels.txt in {profiler.folder}")
        if update.applied:
            progress.bad_in_a_row = 0
            progress.window.add(means | {"grad_norm": update.grad_norm}, counts)
        else:
            note_bad_step(run, progress, seen, finite)

        # Report, draw, save.
        step, last = progress.step, progress.step == run.total_steps or exit_code is not None
        if step % args.log_every == 0 or step == run.total_steps:
            report(run, engine, progress, clock, lr, routings)
        with clock.pausing():
            if args.sample_every and (step % args.sample_every == 0 or step == run.total_steps):
                draw_grid(run, engine, step)
            if args.metrics_every and (step % args.metrics_every == 0 or step == run.total_steps):
                report_metrics(run, engine, step)
            if step % args.ckpt_every == 0 or last:
                saver.save(progress)
            if last:
                saver.finish()
        if exit_code is not None:
            log.info(f"stopped by a signal after step {step}; --resume auto goes on from here")
            raise SystemExit(exit_code)
    bar.close()
    signals.restore()
    log.info(f"done: {run.total_steps} steps, {progress.skipped} skipped, in {run.folder}")


def make_batch(run: Run, batch: dict[str, Tensor], positions: Tensor) -> tuple[NoisedBatch, Tensor]:
    """What the network sees, from what the data set drew: latents, noised at each sample's time, and labels (N,)."""
    batch = {name: value.to(run.processes.device, non_blocking=True) for name, value in batch.items()}
    x0 = batch["x"] if run.args.feature_path else run.space.encode(batch["x"], batch.get("vae_noise"))  # (N, C, h, w)
    u = batch["u"]
    if run.args.stratified_t:
        u = stratify(u, positions.to(u.device), run.args.global_batch_size)
    labels = batch["y"]
    if run.config.null_class is not None:
        labels = torch.where(batch["drop_u"] < run.config.class_dropout_prob, run.config.null_class, labels)
    return run.objective.noised(x0, batch["noise"], u), labels


def total_loss(terms: dict[str, Tensor], routings: list[Routing], alpha: float, sum_over_processes):
    """The loss to minimise, and what the log wants of it: the mean of each term (and the balance loss), counts (L, E).

    The balance loss is part of the loss, so scaling, accumulation and sharding treat it as they treat the rest. Its
    load is that of the micro-batch over all processes, so it does not depend on how many there are.
    """
    loss = terms["loss"].mean()
    values = [term.detach().mean() for term in terms.values()]
    if not routings:
        return loss, torch.stack(values), loss.new_zeros(0)
    balance = load_balancing_loss(routings, sum_over_processes)  # (L,)
    counts = torch.stack([routing.tokens_per_expert for routing in routings]).to(loss.dtype)
    return loss + alpha * balance.sum(), torch.stack([*values, balance.detach().mean()]), counts


def note_bad_step(run: Run, progress: Progress, seen: list[tuple[Tensor, Tensor]], finite: bool) -> None:
    """Count a skipped update; give up after several in a row, naming the samples whose loss was not finite.

    In fp16 a finite loss whose scaled gradient overflows is the loss scaler at work, which needs a few tries.
    """
    progress.skipped += 1
    progress.bad_in_a_row += 1
    scaler_at_work = finite and run.args.precision == "fp16"
    limit = BAD_STEPS_IN_A_ROW * (5 if scaler_at_work else 1)
    if not scaler_at_work:
        what = "gradient" if finite else "loss"
        run.log.info(f"step {progress.step}: {what} not finite, update skipped ({progress.skipped} so far)")
    if progress.bad_in_a_row >= limit:
        bad = [index for indices, losses in seen for index in indices[~losses.isfinite().cpu()].tolist()]
        bad = sorted({index for part in run.processes.gather(bad) for index in part})
        names = ", ".join(run.data.name_of(index) for index in bad[:5]) or "no single sample"
        raise RunStopped(
            f"loss or gradient not finite in {limit} steps in a row, the last at step {progress.step}; "
            f"samples of that step with such a loss: {names} ({len(bad)} of {run.args.global_batch_size}). "
            f"Resume from the last checkpoint with --allow-changes and a lower --lr, --grad-clip 1 or --precision bf16"
        )


def report(run: Run, engine: Engine, progress: Progress, clock: Clock, lr: float, routings: list[Routing]) -> None:
    """One line to the log, one record to the metrics: means since the last ones; entropy of the last micro-batch."""
    window = progress.window
    values = window.means() | {"lr": lr}
    if routings and window.steps:
        values |= load_statistics(window.counts)
    if routings:
        values["router_entropy"] = (run.processes.sum(router_entropy(routings)) / run.processes.world_size).tolist()
    values |= clock.rates() | engine.extra_metrics()
    values |= {"peak_memory_gb": peak_memory_gb(run.processes.device), "skipped_steps": progress.skipped}
    run.log.metrics(progress.step, values)

    line = f"step {progress.step}/{run.total_steps}  loss {values.get('loss', math.nan):.4f}"
    if routings:
        load, entropy = max(values.get("load_max_over_mean", [math.nan])), values["router_entropy"]
        line += f"  balance {values.get('balance_loss', math.nan):.3f}  load max {load:.2f}"
        line += f"  entropy {sum(entropy) / len(entropy):.2f}"
    line += f"  grad {values.get('grad_norm', math.nan):.3f}  lr {lr:.2e}  {values['images_per_second']:.1f} img/s"
    line += f"  data {values['data_wait_share']:.0%}  mem {values['peak_memory_gb']:.1f} GB"
    run.log.info(line)
    window.clear()
    clock.start()


def peak_memory_gb(device: torch.device) -> float:
    """In 1e9 bytes: the most that tensors took on the GPU so far; of a CPU process, its peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_grid(run: Run, engine: Engine, step: int) -> None:
    """The same 16 images (noise and labels fixed) from the EMA of this step: `samples/NNNNNNN.png` and TensorBoard."""
    classes = run.config.num_classes
    labels = [i * classes // 16 for i in range(16)] if classes > 16 else [i % classes for i in range(16)]
    settings = sampling_settings(run)
    with engine.averaged() as model:  # all processes draw: where parameters are sharded, each is needed
        network = recording(model, run.objective, labels, settings)
        images = np.concatenate(list(sampling.generate(network, run.objective, run.space, labels, settings)))
    if run.processes.is_main:
        grid = sampling.image_grid(images, columns=8)
        (run.folder / "samples").mkdir(exist_ok=True)
        sampling.save_png(run.folder / "samples" / f"{step:07d}.png", grid)
        run.log.image(step, "samples", grid)
        if isinstance(network, Recorder):
            draw_routing(run, step, network)


def draw_routing(run: Run, step: int, network: Recorder) -> None:
    """What the experts did for those images, in TensorBoard under `routing/`."""
    from analysis import plots  # matplotlib takes a second to import, and nothing else of training needs it

    labels = [str(label) for label in network.tally.classes]
    data = network.tally.result(model=f"{run.folder.name}, step {step}", class_names=labels)
    for by in plots.MAPS:
        run.log.image(step, f"routing/{by}", plots.pixels(plots.draw(by, data)))


def report_metrics(run: Run, engine: Engine, step: int) -> None:
    """Images of all classes in turn, drawn by all processes from the EMA of this step, against the reference."""
    count, size = run.args.metrics_samples, run.args.image_size
    labels = sampling.balanced_labels(count, run.data.num_classes, run.args.global_seed)
    record = {"source": f"{run.folder} at step {step}"}
    with engine.averaged() as model:
        images = evaluation.DrawnImages(model, run.objective, run.space, labels, sampling_settings(run), size, record)
        samples = evaluation.measure(
            images, run.evaluator.extractor, run.processes, run.schedule.micro_batch_size, title="metrics"
        )
    values = run.processes.on_main(lambda: run.evaluator.compare(samples))
    run.log.metrics(step, {f"metrics/{name}": value for name, value in values.items()})
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    run.log.info(f"step {step}: {numbers}  ({count} images)")
    for warning in run.evaluator.warnings(samples):
        run.log.info(f"WARNING: {warning}")


def sampling_settings(run: Run) -> sampling.Settings:
    """How images are drawn while training."""
    scale = run.args.sample_cfg_scale if run.config.null_class is not None else 1.0
    objective = run.objective
    return sampling.Settings(50, objective.samplers[0], scale, objective.guided_channels, seed=run.args.global_seed)


class Saver:
    """Writes checkpoints from a copy, in the background; training waits only where one is not done when the next comes.

    A full disk costs a warning, until it has failed several times in a row: then `gave_up` holds the reason. It is set
    on the process that writes; the loop tells the others.
    """

    def __init__(self, run: Run, engine: Engine):
        self.run, self.engine = run, engine
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: tuple[Path, Future] | None = None
        self.failures, self.gave_up = 0, None

    def save(self, progress: Progress) -> None:
        """Begin to write the state of now."""
        self.settle()
        folder = self.run.folder / "checkpoints" / f"{progress.step:07d}"
        state = progress.state() | {"flags": flags(self.run.args), "total_steps": self.run.total_steps}
        write = self.engine.snapshot(folder, self.run.record | {"step": progress.step}, state)
        self.pending = folder, self.thread.submit(self._write, write, folder)

    def _write(self, write: Callable[[], None], folder: Path) -> None:
        write()
        if self.run.processes.is_main and self.run.args.keep_last:
            checkpoint.prune(folder.parent, self.run.args.keep_last, self.run.args.keep_every)

    def settle(self, wait: bool = True) -> None:
        """Note how the write in progress ended, if it has (or when it will)."""
        if self.pending is None or not (wait or self.pending[1].done()):
            return
        (folder, future), self.pending = self.pending, None
        try:
            future.result()
        except OSError as error:
            self.failures += 1
            self.run.log.info(f"WARNING: checkpoint {folder} not written ({error}); the one before it is untouched")
            if self.failures == FAILED_SAVES_IN_A_ROW:
                self.gave_up = f"could not write {folder}: {error}; free some space and resume"
        else:
            self.failures = 0
            self.run.log.info(f"saved {folder}")

    def finish(self) -> None:
        """Wait for the last checkpoint, on all processes.

        Raises:
            RunStopped: it could not be written.
        """
        self.settle()
        if any(self.run.processes.gather(self.failures)):
            raise RunStopped(self.gave_up or "the last checkpoint could not be written; free some space and resume")


def progress_bar(run: Run, step: int):
    """On rank 0's terminal; absent where the output is a file."""
    from tqdm import tqdm

    disable = None if run.processes.is_main else True
    return tqdm(total=run.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=disable)


def introduce(run: Run, step: int) -> None:
    """The first lines of the log: what is trained, on what, how."""
    args, processes, log = run.args, run.processes, run.log
    with torch.device("meta"):
        total, activated = count_parameters(DiT(run.config))
    experts = f"{run.config.num_experts} experts, {run.config.num_experts_per_tok} per token"
    kind = experts if run.config.num_experts else "dense; --num_experts 8 makes it a DiT-MoE"
    log.info(f"{args.model} ({kind}): {total:,} parameters, {activated:,} activated")
    log.info(f"{len(run.data):,} samples of {run.data.num_classes} classes, latents {run.data.latent_shape}")
    log.info(
        f"{run.objective.name}, batch {args.global_batch_size} = {processes.world_size} processes x {args.accum_iter} "
        f"micro-batches, {run.args.precision} on {processes.device.type}, {run.total_steps} steps "
        f"({run.schedule.steps_per_epoch} an epoch) in {run.folder}"
    )
    if step:
        log.info(f"resumed from {run.resume_from} at step {step}")
    if step >= run.total_steps:
        log.info(f"nothing to do: step {step} of {run.total_steps}; --max-steps and --epochs say how far to go")
