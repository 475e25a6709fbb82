"""A training run before its first step: the flags that all trainers share, checked, and what it resumes.

`prepare` turns flags into a `Run`, having looked at all that the user gave; nothing is written before that.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

import base_shapes
import checkpoint
import distributed
import evaluation
import finetune
import machine
import objectives
import profiling
import representation
import text
from autoencoders import Measured, add_space_arguments, load_space, read_statistics, space_info, vae_below
from caption_features import StoredTexts
from captions import open_captioned, open_captioned_features, stored_texts
from cli import (
    Need,
    Parser,
    UsageError,
    boolean,
    check_needs,
    natural_int,
    number_in,
    only,
    positive_int,
    power_of_two,
    said,
    values,
)
from compiling import choose_compile
from conditions import Captions, Classes
from configuration import (
    MODEL_FLAGS,
    MUP_FIELDS,
    ROUTER_FIELDS,
    DiTConfig,
    add_model_arguments,
    build_config,
    config_said,
    fields_said,
    name_of,
    row_said,
)
from data import AS_BEFORE, BatchSchedule, ImageData, Reading, require_folder
from families import DiT_models, fact, family_of_row
from files import digest, write_json
from latents import LatentShards, open_features
from layers import check_attention
from models import CHECKPOINTING, DiT
from muon import OPTIMIZERS
from objectives import add_objective_arguments, choose_objective, spell_out
from optim import ADAMW, SCHEDULES
from parametrization import PARAMETRIZATIONS, is_mup
from post_hoc_ema import LENGTHS, USUAL
from routers import ROUTERS, TokenChoice

# ---------------------------------------------------------------------------------------------------------------- flags


def checkpointing(text: str) -> str:
    """A key of `CHECKPOINTING`, or, as for a switch, True (full) or False (none)."""
    if text in CHECKPOINTING:
        return text
    try:
        return "full" if boolean(text) else "none"
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(CHECKPOINTING)}, True or False, got {text!r}") from None


def add_training_arguments(parser: Parser) -> None:
    """What every trainer takes; the names are those of DiT-MoE and fast-DiT where they have one."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", type=Path, help="folder with one folder of images per class")
    group.add_argument("--feature-path", type=Path, help="extracted latents (or fast-DiT's), in place of --data-path")
    group.add_argument("--vae-path", "--vae", default="mse", help="autoencoder: folder, hub name, mse, ema, or none")
    add_space_arguments(group)
    group.add_argument("--image-size", type=positive_int, default=256, help="side of the images, in pixels")
    group.add_argument("--background", default=Reading.background, help="colour under transparency: white, #rrggbb")
    group.add_argument("--num-workers", type=natural_int, default=4, help="processes that load data; 0: none")
    parser.add_switch(group, "--flip", True, "mirror half of the images")

    text.add_encoder_arguments(group, "train on images with captions, read so")

    group = add_model_arguments(parser)  # None stands for what --init-from says, or else for the default

    group = parser.add_argument_group("objective")
    add_objective_arguments(parser, group, training=True)
    parser.add_switch(group, "--stratified-t", False, "spread the times of a batch evenly over their distribution")
    representation.add_alignment_arguments(parser)

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data")
    group.add_argument("--max-steps", type=positive_int, help="stop after so many steps, if epochs do not end first")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images of one optimizer step")
    group.add_argument("--accum_iter", type=positive_int, default=1, help="micro-batches that a step is cut into")
    group.add_argument(
        "--micro-batch-size", type=positive_int, help="images of one on one GPU, in place of --accum_iter"
    )
    group.add_argument(
        "--lr", type=number_in(0, 1e3), default=1e-4, help="learning rate of AdamW (of muP: 2^-10, as published)"
    )
    group.add_argument("--loglr", dest="lr", type=power_of_two, default=argparse.SUPPRESS, help="--lr 2^N")
    group.add_argument(
        "--lr-schedule", choices=SCHEDULES, default="constant", help="after the warmup, until the last step"
    )
    group.add_argument(
        "--cooldown", type=number_in(0.001, 1), default=0.2, help="of schedule wsd: share of the steps, at the end"
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="muon: of matrices; AdamW of the rest")
    group.add_argument(
        "--warmup-steps", type=natural_int, default=0, help="steps of linear growth of the learning rate"
    )
    group.add_argument(
        *("--weight-decay", "--wd"),
        type=number_in(0, 1e3),
        default=0.0,
        help="of matrices; biases, norms and tables do not decay. Under muP lr x decay is the same for all",
    )
    parser.add_switch(group, "--decay-all", False, "they decay too (of PixArt, as published)")
    group.add_argument(
        "--adam-eps",
        type=number_in(0, 1),
        default=ADAMW["eps"],
        help="epsilon of AdamW (of PixArt: 1e-10, as published)",
    )
    group.add_argument(
        "--grad-clip",
        type=number_in(0, math.inf),
        default=0.0,
        help="largest norm of the gradient; 0: no clipping (of Large-DiT: 2, as published)",
    )
    group.add_argument("--ema-decay", type=number_in(0, 1), default=0.9999, help="of the moving average of the weights")
    group.add_argument(
        "--post-hoc-ema",
        type=number_in(*LENGTHS),
        nargs="*",
        default=[],
        metavar="LENGTH",
        help="keep averages of which weights.py ema makes one of any length: 0.05 0.1, as published, without a LENGTH",
    )
    group.add_argument(
        "--aux-loss-alpha", type=number_in(0, 1e6), default=0.005, help="factor of the balance loss (paper: 0.005)"
    )
    group.add_argument(
        "--balance",
        nargs="+",
        choices=BALANCE,
        default=None,
        help="aux: the balance loss over the batch; sequence: of each image; z: small logits; bias: the choice moves "
        "(aux; of rows with another router as published)",
    )
    group.add_argument("--z-loss-alpha", type=number_in(0, 1e6), default=1e-3, help="factor of z")
    group.add_argument(
        "--router-loss-alpha", type=number_in(0, 1e6), default=1.0, help="factor of losses that a router brings along"
    )
    group.add_argument(
        "--dead-after", type=positive_int, default=1000, help="steps without a token until an expert is reported"
    )
    parser.add_switch(group, "--local-balance", False, "balance each process's own tokens, not those of all processes")
    group.add_argument(
        "--global-seed", type=natural_int, default=0, help="of initial weights, data order and all noise"
    )

    group = machine.add_machine_arguments(parser)
    group.add_argument(
        "--residual-dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of what passes between blocks; bf16, with --precision bf16, halves it and rounds each block's result",
    )
    group.add_argument(
        "--activation-checkpointing",
        type=checkpointing,
        metavar="KIND",
        nargs="?",
        const="full",
        default="none",
        help="what the backward computes again, to save memory: none, all of a block (full; so without a KIND), or all "
        "but its products (selective, for --compile with ddp)",
    )
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

    group = parser.add_argument_group("accepted for published commands")
    group.add_argument("--pretraining_tp", type=int, help="has no effect")
    group.add_argument("--master-port", type=int, help="has no effect: launchers have one")
    parser.add_switch(group, "--no-auto-resume", False, "has no effect: without --resume a new run begins")
    group.add_argument("--model-parallel-size", type=only("1", "use --data-parallel fsdp"), help="1")
    group.add_argument("--grad-precision", type=only("fp32", "gradients meet in fp32 whatever else"), help="fp32")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--results-dir", type=Path, default=Path("results"), help="run folders NNN-<model>-<E>E<K>A-<objective> go here"
    )
    group.add_argument("--resume", help="auto (newest good checkpoint of the newest run of this name), or a folder")
    group.add_argument("--init-from", help="start from the weights alone of a checkpoint or published file")
    parser.add_switch(group, "--fresh-parts", False, "begin anew what does not fit of --init-from: channels, patches")
    parser.add_switch(group, "--allow-changes", False, "resume although data or flags that shape the curve differ")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    group.add_argument("--keep-last", type=natural_int, default=0, help="checkpoints to keep, at least 2; 0: all")
    group.add_argument("--keep-every", type=natural_int, default=0, help="keep those of every so many steps besides")
    group.add_argument(
        "--sample-every", type=natural_int, default=0, help="draw a grid of images from the EMA; 0: never"
    )
    group.add_argument("--sample-cfg-scale", type=number_in(0, 1e3), default=1.5, help="guidance of images of a run")
    group.add_argument(
        "--metrics-every", type=natural_int, default=0, help="compare images from the EMA with a reference; 0: never"
    )
    group.add_argument("--metrics-samples", type=positive_int, default=5000, help="how many, all classes in turn")
    group.add_argument("--metrics-ref", type=Path, help="what `calculate_metrics.py ref` wrote, or ADM's reference")
    group.add_argument("--metrics-weights", type=Path, help="of the network that the reference was made with")
    group.add_argument(
        "--profile", type=natural_int, default=0, help="record so many of the first steps: trace and table of kernels"
    )
    parser.add_switch(group, "--wandb", False, "log to Weights & Biases too (pip install wandb)")


BALANCE = ("aux", "sequence", "z", "bias", "none")
WIDE_BASE = "muP with a base width of {}, more than the model's {}: matrices learn faster than --lr says"
NEEDS = (  # besides those of objectives.py
    Need(
        (
            *("num_experts_per_tok", "num_shared_experts", "expert_ratio", "moe_layers", "norm_topk_prob"),
            *("aux_loss_alpha", "local_balance", "balance", "z_loss_alpha", "router_loss_alpha", "dead_after"),
            *("router", "router_groups", "router_kept_groups", "routed_scaling_factor", "shared_mlp", "expert_mlp"),
        ),
        lambda args: args.num_experts > 0,
        "--num_experts N (a dense DiT has no experts)",
    ),
    Need(
        ("base_width", "output_mult", "load_base_shapes"),
        lambda args: args.parametrization != "standard",
        "--mup (the standard parametrization has no base)",
    ),
    Need(
        ("residual_dtype",), lambda args: args.residual_dtype == "fp32" or args.precision == "bf16", "--precision bf16"
    ),
    Need(("z_loss_alpha",), lambda args: "z" in args.balance, "--balance z"),
    Need(("cooldown",), lambda args: args.lr_schedule == "wsd", "--lr-schedule wsd"),
    Need(("keep_every",), lambda args: args.keep_last > 0, "--keep-last K (all checkpoints are kept)"),
    Need(
        ("metrics_samples", "metrics_ref", "metrics_weights"), lambda args: args.metrics_every > 0, "--metrics-every N"
    ),
    Need(
        ("sample_cfg_scale",),
        lambda args: _draws_images(args),
        "--sample-every N or --metrics-every N",
    ),
    Need(("allow_changes",), lambda args: args.resume is not None, "--resume"),
    Need(("background",), lambda args: args.data_path is not None, "--data-path (features are made already)"),
    Need(
        ("max_text_tokens", "tokenizer_path", "reading"),
        lambda args: args.text_encoder is not None,
        "--text-encoder NAME (a network of classes reads no texts)",
    ),
    Need(("fresh_parts",), lambda args: args.init_from is not None, "--init-from FILE"),
    representation.NEEDS,
)

# Flags that may differ when a run is resumed: they do not shape the loss curve.
RUN_CONTROL = {
    *("image_size", "background"),  # the model's input size and the data's fingerprint tell
    *("data_path", "feature_path", "vae_path", "latent_stats", "num_workers", "epochs", "max_steps"),
    *("device", "local_rank", "timeout"),
    *("dim_heads", "load_base_shapes", "root"),  # the model says the first two
    "dead_after",
    *("tokenizer_path", "text_encoder", "max_text_tokens", "repa"),  # the records of the encoders tell
    *("local_diffusers_model_root", "micro_batch_size", "master_port", "no_auto_resume", "model_parallel_size"),
    *("grad_precision", "attention", "compile", "activation_checkpointing", "deterministic", "pretraining_tp"),
    *("data_parallel", "expert_parallel", "start_timeout"),
    *("deepspeed", "deepspeed_config", "results_dir", "resume", "init_from", "fresh_parts", "allow_changes"),
    *("log_every", "ckpt_every", "keep_last", "keep_every", "sample_every", "sample_cfg_scale", "wandb", "profile"),
    *("metrics_every", "metrics_samples", "metrics_ref", "metrics_weights"),
}

# Flags that may differ among the processes: each machine may have its own copy of the data.
OF_A_MACHINE = {
    *("data_path", "feature_path", "vae_path", "latent_stats", "root", "num_workers", "local_rank", "results_dir")
}

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
    condition: Classes | Captions  # what its images are of
    start: finetune.Start | None = None  # of --init-from
    alignment: representation.Alignment | None = None  # of --repa
    notes: list[str] = field(default_factory=list)  # what was chosen that no flag says
    evaluator: evaluation.Evaluator | None = None  # of --metrics-every
    resume_from: Path | None = None
    folder: Path | None = None  # of a run that is resumed; else `open` makes it
    log: distributed.Logger = field(default_factory=lambda: distributed.Logger(None))

    def open(self, step: int, shared: bool) -> None:
        """Make or claim the run folder, and its log. Called when all is checked: wrong input leaves no folder.

        Args:
            shared: all processes will write there.
        """
        self.folder = self.processes.on_main(self._claim_folder)
        if shared:
            self.processes.share_folder(self.folder)
        self.processes.on_main(lambda: self._open_log(step))

    def _claim_folder(self) -> Path:
        name = run_name(self.args.model, self.config, self.objective)
        folder = self.folder or distributed.new_run_folder(self.args.results_dir, name)
        busy = f"another process trains in {folder}; wait for it, or drop --resume for a new run"
        self._claim = distributed.claim(folder, busy)
        return folder

    def _open_log(self, step: int) -> None:
        wandb = {"name": self.folder.name, "config": flags(self.args)} if self.args.wandb else None
        try:
            self.log = distributed.Logger(self.folder, wandb, step)
            write_json(self.folder / "args.json", flags(self.args))
            checkpoint.sweep(self.folder / "checkpoints")
            aside = checkpoint.set_aside(self.folder, step)
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written: {error}") from None
        for later in aside:
            self.log.info(f"this run goes back behind a checkpoint of the one before, which is now {later}")
        for note in self.notes:
            self.log.info(note)

    def close(self) -> None:
        self.log.close()
        if self.processes.is_main and self.folder is not None:
            self._claim.close()


def prepare(args, processes: distributed.Processes) -> Run:
    """Check all that the user gave, on all processes; writes nothing.

    Raises:
        UsageError: flags, data or checkpoint are wrong.
    """
    processes.agree(
        {f"--{name.replace('_', '-')}": value for name, value in flags(args).items() if name not in OF_A_MACHINE}
        | {f"the version of {name}": version for name, version in versions().items()}
    )
    kept = processes.on_main(lambda: _kept_parametrization(args))
    choices = processes.together(lambda: _choose(argparse.Namespace(**vars(args) | kept), processes))
    resumed = processes.on_main(lambda: find_resume(choices))
    run = processes.together(lambda: _look_at_data(choices, resumed, processes))
    processes.agree(_facts(run, resumed))
    if resumed is not None:
        run.resume_from, run.folder = resumed.checkpoint, resumed.run
        processes.on_main(lambda: compare_with_checkpoint(run, resumed))
    args = run.args
    if args.metrics_every:
        run.evaluator = evaluation.evaluator_for_training(
            args.metrics_ref,
            args.metrics_weights,
            args.image_size,
            args.metrics_samples,
            run.schedule.micro_batch_size,
            processes,
        )
    return run


def new_network(run: Run, whole_blocks: bool = True) -> DiT:
    """The model of a run, set up as its flags say, without memory: what `DiT.materialize` draws is the same everywhere.

    Args:
        whole_blocks: nothing within a block escapes compilation.
    """
    args = run.args
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with torch.device("meta"):
        network = DiT(run.config)
    network.set_checkpointing(args.activation_checkpointing)
    network.set_attention(args.attention)
    network.residual_dtype = torch.bfloat16 if args.residual_dtype == "bf16" else None
    for block in network.blocks:
        if block.is_moe:
            block.moe.gate.keeps_logits = "z" in args.balance
    said = "compile" in args.given
    if args.compile and (said or whole_blocks):
        network.compile_blocks(whole_blocks, note=lambda line: run.log.info(line), or_plain=not said)
    torch.manual_seed(args.global_seed)
    return network


def versions() -> dict[str, str]:
    """Of the packages that the numbers of a run may depend on."""
    found = {}
    for name in ("torch", "torchvision", "deepspeed", "diffusers", "numpy", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _facts(run: Run, resumed: "Resumed | None") -> dict:
    """What has to be the same on every process, besides flags."""
    space = {name: value for name, value in run.record["space"].items() if name != "path"}
    parts = {name: run.record[name] for name in ("data", "model", "objective")} | {"space": space}
    facts = {f"{part} {name}": value for part, record in parts.items() for name, value in record.items()}
    if resumed is not None:
        manifest = resumed.checkpoint / "manifest.json"
        facts[f"in {manifest} the SHA-256"] = digest(manifest)["sha256"] if manifest.is_file() else "(no such file)"
    return facts


def _kept_parametrization(args) -> dict:
    """Of a checkpoint that `--resume` names, where no flag says another one."""
    if args.resume in (None, "auto") or any(name in args.given for name in (*MUP_FIELDS, "load_base_shapes")):
        return {}
    found, _ = _checkpoint_at(Path(args.resume))
    recorded = checkpoint.read_config(found)["model"] if (found / "config.json").is_file() else {}
    return {name: recorded[name] for name in MUP_FIELDS if recorded.get("base_width")}


@dataclass
class Choices:
    """What flags, and the file of `--init-from`, say before the data is looked at."""

    args: argparse.Namespace
    model: DiTConfig  # but for what follows from the data: its input size and number of classes
    objective: object
    weights: checkpoint.Weights | None  # of --init-from
    encoder: text.TextEncoder | None = None  # of --text-encoder
    vision: representation.Encoder | None = None  # of --repa

    @property
    def run_name(self) -> str:
        return run_name(self.args.model, self.model, self.objective)


def _choose(args, processes: distributed.Processes) -> Choices:
    args.precision = choose_precision(args.precision, processes.device)
    if (args.data_path is None) == (args.feature_path is None):
        raise UsageError("give either --data-path (a folder of images per class) or --feature-path (latents)")
    if args.text_encoder is None or args.data_path is None:  # captions may be a file
        require_folder(args.data_path or args.feature_path, "data path" if args.data_path else "feature path")
    args.accum_iter = choose_accumulation(args, processes.world_size)
    if "post_hoc_ema" in args.given:
        args.post_hoc_ema = sorted(set(args.post_hoc_ema or USUAL))
    args.vae_path = vae_below(args, args.vae_path)
    if args.model in DiT_models:
        for name, value in fact(family_of_row(args.model), "TRAINING").items():
            if name not in args.given:
                setattr(args, name, value)
    if args.keep_last == 1:
        raise UsageError("--keep-last 1 would leave no checkpoint to fall back to; use 2 or more, or 0 for all")
    if args.metrics_every and args.metrics_ref is None:
        raise UsageError("--metrics-every needs --metrics-ref FILE, which `calculate_metrics.py ref` writes")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb needs the package: pip install wandb")
    weights, found = None, {}
    if args.init_from is not None:
        weights = checkpoint.load_weights(args.init_from, **base_shapes.known(args))
        found = weights.objective
        if "vae_path" not in args.given and weights.record is not None:
            args.vae_path = weights.record.get("space", {}).get("path") or args.vae_path
    # A wrong model is said before the data is looked through.
    model = base_shapes.fitted(choose_model(args, weights), args, None if weights is None else weights.source)
    encoder = open_encoder(args)
    model = of_texts(model, encoder, args, weights)
    model = balanced(model, args)
    for name in MODEL_FLAGS.keys() - {"num_classes"}:
        setattr(args, name, getattr(model, name))
    args.model = name_of(model, args.model)
    if "lr" not in args.given:
        args.lr = PARAMETRIZATIONS[model.parametrization].lr
    args.compile = choose_compile(args.compile, model, processes.device, machine.PRECISIONS[args.precision])
    objective = choose_objective(args, found)
    spell_out(args, objective)
    check_needs(args, (*objectives.NEEDS, *NEEDS))
    if model.condition.null is None and "sample_cfg_scale" in args.given and args.sample_cfg_scale != 1:
        raise UsageError("--sample-cfg-scale needs a null class, which --class-dropout-prob 0 leaves out; use scale 1")
    representation.check_depth(args, model)
    vision = representation.open_encoder(args)
    encoders = (None if each is None else each.to(processes.device) for each in (encoder, vision))
    return Choices(args, model, objective, weights, *encoders)


def choose_accumulation(args, world_size: int) -> int:
    """`--accum_iter`, or what `--micro-batch-size` comes to."""
    if args.micro_batch_size is None:
        return args.accum_iter
    at_once = args.micro_batch_size * world_size
    if args.global_batch_size % at_once or args.accum_iter not in (1, args.global_batch_size // at_once):
        raise UsageError(
            f"--micro-batch-size {args.micro_batch_size} on {world_size} processes does not make a batch of "
            f"{args.global_batch_size}" + (f" in {args.accum_iter} micro-batches" if args.accum_iter > 1 else "")
        )
    return args.global_batch_size // at_once


def _look_at_data(choices: Choices, resumed: "Resumed | None", processes: distributed.Processes) -> Run:
    args, model, objective = choices.args, choices.model, choices.objective
    data, space, space_record = open_data(args, resumed, choices.encoder)
    if isinstance(choices.encoder, StoredTexts):
        choices.encoder.data = data
    if args.num_classes is None:  # a resumed run keeps its own
        kept = None if resumed is None else resumed.config["model"].get("num_classes", 1000)
        args.num_classes = kept or data.num_classes or 1  # images with captions are of none
    if data.num_classes > args.num_classes:
        raise UsageError(f"the data has {data.num_classes} classes, --num-classes allows {args.num_classes}")
    if choices.encoder is None:
        condition = Classes(args.num_classes, tuple(data.class_names), args.class_dropout_prob)
    else:
        condition = dataclasses.replace(model.condition, encode=choices.encoder, known=tuple(data.known()))
    channels, input_size, width = data.latent_shape
    if width != input_size:
        raise UsageError(f"latents of {input_size}x{width} are not square")
    if space is not None and space.channels != channels:
        raise UsageError(f"--vae-path {args.vae_path} has {space.channels} channels, the latents have {channels}")
    config = dataclasses.replace(model, input_size=input_size, in_channels=channels, num_classes=args.num_classes)
    start = None if choices.weights is None else finetune.fit(choices.weights, config, condition, args.fresh_parts)
    alignment = representation.open_alignment(args, config, choices.vision, data)
    dtype = machine.PRECISIONS[args.precision]
    check_attention(args.attention, processes.device, dtype, config.hidden_size // config.num_heads)
    schedule = BatchSchedule(
        len(data), args.global_batch_size, args.accum_iter, processes.rank, processes.world_size, args.global_seed
    )
    if config.pools_batch and schedule.micro_batch_size == 1:
        raise UsageError("router batch-pool competes over the images of a process and micro-batch: more than 1, please")
    steps = args.epochs * schedule.steps_per_epoch
    total_steps = min(args.max_steps or steps, steps)
    if args.profile and total_steps < args.profile + profiling.BEFORE:
        raise UsageError(f"--profile {args.profile} needs a run of at least {args.profile + profiling.BEFORE} steps")
    if args.warmup_steps > total_steps:
        raise UsageError(f"--warmup-steps {args.warmup_steps}: the run has only {total_steps} steps")
    record = {
        "format": checkpoint.FORMAT,
        "model_name": args.model,
        "model": config.to_dict(),
        "objective": objective.config(),
        "space": space_record,
        "image_size": args.image_size,
        "ema_decay": args.ema_decay,
        "data": data.record(),
        "versions": {"torch": torch.__version__},
    }
    if choices.encoder is not None:
        record["text"] = choices.encoder.record()
    if alignment is not None:
        record["alignment"] = alignment.record
    return Run(
        args=args,
        processes=processes,
        config=config,
        objective=objective,
        data=data,
        schedule=schedule,
        space=None if space is None else space.to(processes.device),
        total_steps=total_steps,
        record=record,
        condition=condition,
        start=start,
        alignment=alignment,
        notes=[
            *data.notes,
            *([] if alignment is None else [alignment.in_words()]),
            *([] if start is None else [*start.in_words(), *differences(choices.weights, record)]),
            *(
                [WIDE_BASE.format(config.base_width, config.hidden_size)]
                if config.base_width > config.hidden_size
                else []
            ),
        ],
    )


def choose_model(args, weights: checkpoint.Weights | None) -> DiTConfig:
    """What the model flags say, or the file of `--init-from`, which they must not contradict.

    The number of classes, label dropout and image size may be others, and with `--fresh-parts` the patches.
    """
    if weights is None:
        return config_said(args)
    config = weights.config
    given = fields_said(args, like=config)
    free = {"num_classes": given.pop("num_classes", config.num_classes)}
    free["class_dropout_prob"] = given.pop("class_dropout_prob", config.class_dropout_prob)
    if args.model is not None:
        row = build_config(args.model)
        given = {key: getattr(row, key) for key in DiT_models[args.model]} | given
    if args.fresh_parts:
        free["patch_size"] = given.pop("patch_size", config.patch_size)
    if "router" in given:  # another one begins with the parameters that both have
        free |= {name: given.pop(name, usual) for name, usual in ROUTER_FIELDS.items()}
    for name, value in given.items():
        if isinstance(value, bool) and name == "qk_norm":  # of whichever kind
            same = value == (config.qk_norm != "none")
        else:
            same = config.has(name, value)
        if not same:
            flag = said(args, name, value) if name in args.given else args.model
            looks = checkpoint.describe(config)
            raise UsageError(f"{flag} contradicts {args.init_from}, which has {name} {getattr(config, name)} ({looks})")
    dropout = free["class_dropout_prob"]
    if (dropout > 0) != (config.null_class is not None):
        has = "a" if config.null_class is not None else "no"
        raise UsageError(f"--class-dropout-prob {dropout} contradicts {args.init_from}, which has {has} null class")
    return dataclasses.replace(config, input_size=64 * free.get("patch_size", config.patch_size), **free)


def of_texts(model: DiTConfig, encoder: text.TextEncoder | None, args, weights) -> DiTConfig:
    """The model for texts that `--text-encoder` reads, or for classes where it is not given.

    Raises:
        UsageError: the model, or the file that it begins from, is of the other kind.
    """
    if encoder is None:
        if model.caption_width:
            raise UsageError(f"{args.model or args.init_from} draws from texts: give --text-encoder, and captions")
        return model
    if "num_classes" in args.given:
        raise UsageError(f"{args.given['num_classes']} does nothing: the images have captions, not classes")
    if args.metrics_every:
        raise UsageError("--metrics-every compares images of classes: drop it, or --text-encoder")
    if weights is not None and weights.config.caption_width != encoder.width:
        was = f"texts of {weights.config.caption_width} features" if weights.config.caption_width else "classes"
        raise UsageError(f"--text-encoder {args.text_encoder} contradicts {args.init_from}, which is of {was}")
    fields = {"caption_width": encoder.width, "caption_length": encoder.length}
    if weights is None and not model.caption_width:
        usual = fact(family_of_row(row_said(args)), "TEXTS")
        fields |= {name: value for name, value in usual.items() if name not in args.given}
    return dataclasses.replace(model, **fields)


def balanced(model: DiTConfig, args) -> DiTConfig:
    """The model with the bias of `--balance bias`, and `--balance` as it is meant.

    Raises:
        UsageError: the router has no such thing, or the choices contradict each other.
    """
    biased = model.num_experts > 0 and model.router_bias
    if args.balance is None:
        tokens_choose = issubclass(ROUTERS[model.router], TokenChoice)
        args.balance = ["bias"] if biased else ["aux"] if tokens_choose else ["none"]
    if "none" in args.balance and len(args.balance) > 1:
        raise UsageError(f"--balance {' '.join(args.balance)}: none and another one contradict each other")
    if "bias" in args.balance and model.num_experts:
        return dataclasses.replace(model, router_bias=True)
    if biased:
        raise UsageError(f"--balance {' '.join(args.balance)}: {args.model or args.init_from} has a bias: add bias")
    if "z" in args.balance and not ROUTERS[model.router].has_logits:
        raise UsageError(f"--balance z is of routers with logits, not of {model.router}")
    return model


def open_encoder(args) -> text.TextEncoder | None:
    """Of `--text-encoder`, or what is on disk in its place.

    Raises:
        UsageError: there is no such encoder, or the features are of another one.
    """
    stored = stored_texts(args.data_path or args.feature_path)
    if args.text_encoder is None:
        return stored
    encoder = text.encoder_of(args)
    if stored is not None and args.feature_path is not None:
        was, now = ({k: v for k, v in each.record().items() if k != "name"} for each in (stored, encoder))
        if different := [key for key in was if was[key] != now.get(key)]:
            key = different[0]
            was = f"the features in {args.feature_path} were made with {was[key]}"
            raise UsageError(f"--text-encoder {args.text_encoder} has {key} {now.get(key)}, {was}: drop the flag")
    return encoder


def differences(weights: checkpoint.Weights, record: dict) -> list[str]:
    """What a run does otherwise than the one that its weights come from, a line each."""
    before = weights.record or {"objective": weights.objective}
    pairs = [
        (f"{part} {key}", before.get(part, {}).get(key), value)
        for part in ("objective", "space")
        for key, value in record[part].items()
    ]
    return [
        f"--init-from {weights.source} was trained with {what} {old}, this run trains with {new}"
        for what, old, new in pairs
        if old not in (None, new)
    ]


def choose_precision(name: str | None, device: torch.device) -> str:
    """`--precision`, or what `accelerate launch --mixed_precision` left in the environment, or the device's best."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name is None and launched in machine.PRECISIONS:
        name = launched
    return machine.choose_precision(name, device)


def open_data(args, resumed: "Resumed | None", encoder: text.TextEncoder | None):
    """The samples, what turns latents into images (None where none are drawn), and what checkpoints say of that.

    Sets the flags that features answer: `image_size`, and `vae_path` where shards of moments name their own.
    """
    statistics = read_statistics(args.latent_stats)
    if args.feature_path is None:
        recorded = resumed is None or "background" in args.given or "reading" in resumed.config.get("data", {})
        reading = Reading(args.background) if recorded else AS_BEFORE
        facts = space_info(args.vae_path, statistics)
        settings = (args.image_size, facts, args.global_seed, args.flip, reading)
        if encoder is None:
            data = ImageData(args.data_path, *settings)
        else:
            data = open_captioned(args.data_path, *settings, encoded=args.text_encoder is not None)
        if not recorded:
            data.notes.append("transparency and EXIF rotation are ignored, as when this run began")
        space = load_space(args.vae_path, statistics)
        return data, space, space.record()

    size, draws = args.image_size if "image_size" in args.given else None, _draws_images(args)
    if encoder is None:
        images = data = open_features(args.feature_path, size, args.global_seed, args.flip)
    else:
        settings = (size, args.vae_path, args.global_seed, args.flip, statistics)
        data = open_captioned_features(args.feature_path, *settings, encoded=args.text_encoder is not None)
        images = data.images
    args.image_size = data.image_size
    if not isinstance(images, LatentShards):
        space = load_space(args.vae_path, statistics) if draws else None
        return data, space, {"path": args.vae_path} if space is None else space.record()
    if not (draws and "vae_path" in args.given):
        args.vae_path = images.space.path
    if statistics is not None:
        images.space.standardised(statistics)
    space = load_space(args.vae_path, statistics) if draws else None
    if space is not None:
        images.compare_with(space)
    return data, space, images.space_record()


def _draws_images(args) -> bool:
    return args.sample_every > 0 or args.metrics_every > 0


def run_name(model: str, config: DiTConfig, objective) -> str:
    """`DiT-S-2-8E2A-rf`, `DiT-S-2-ddpm` for the dense model, `DiT-S-2-8E2A-sigmoid-mup-ddpm` by parts of its own."""
    experts = f"-{config.num_experts}E{config.num_experts_per_tok}A" if config.num_experts else ""
    mup = "-mup" if is_mup(config) and "muP" not in model else ""
    usual = DiT_models.get(model, {}).get("router", "softmax")
    router = f"-{config.router}" if config.num_experts and config.router != usual else ""
    return f"{model.replace('/', '-')}{experts}{router}{mup}-{objective.name}"


def flags(args) -> dict:
    """As JSON holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in values(args).items()}


@dataclass
class Resumed:
    """Where a run goes on."""

    checkpoint: Path
    run: Path | None  # its folder; None: a new one
    config: checkpoint.Description
    state: checkpoint.State


def find_resume(choices: Choices) -> Resumed | None:
    """What `--resume` names, or None for a new run.

    Raises:
        UsageError: there is none at the path given, or it is damaged.
    """
    args = choices.args
    if args.resume is None:
        return None
    if args.resume == "auto":
        newest_run = next(iter(distributed.find_runs(args.results_dir, choices.run_name)), None)
        found = checkpoint.newest_good(newest_run) if newest_run else None
        if found is None:
            name = choices.run_name
            print(f"--resume auto: no checkpoint in the newest run of {name} in {args.results_dir}, starting anew")
            return None
        folder = newest_run
    else:
        found, folder = _checkpoint_at(Path(args.resume))
    if not (found / "state.json").is_file():
        raise UsageError(f"--resume {found}: it holds weights, not the state of a run; use --init-from")
    return Resumed(found, folder, checkpoint.read_config(found), checkpoint.read_state(found))


def _checkpoint_at(path: Path) -> tuple[Path, Path | None]:
    """(checkpoint, run folder or None) of a checkpoint, a run, or a run's folder of checkpoints."""
    if path.is_file():
        raise UsageError(f"--resume needs a checkpoint folder; to start from the weights in {path} use --init-from")
    if not path.is_dir():
        raise UsageError(f"--resume {path}: no such folder")
    path = path.absolute()
    if checkpoint.is_checkpoint(path):
        checkpoint.verify(path)
        return path, path.parent.parent if path.parent.name == "checkpoints" else None
    found = checkpoint.newest_good(path)
    if found is None and checkpoint.find_published_folder(path):
        raise UsageError(f"--resume {path}: it holds published weights; --init-from {path} starts from them")
    if found is None:
        raise UsageError(f"--resume {path}: no good checkpoint in this folder")
    return found, path.parent if path.name == "checkpoints" else path


def compare_with_checkpoint(run: Run, resumed: Resumed) -> None:
    """Refuse to resume a run whose curve could not go on as it was, or, with `--allow-changes`, could not go on at all.

    Raises:
        UsageError: it names the first few differences.
    """
    before, state, found = resumed.config, resumed.state, resumed.checkpoint
    flags_before, flags_now = state["flags"], flags(run.args)
    model = DiTConfig.from_dict(before["model"])  # with today's defaults for options of today
    pairs = {"data fingerprint": (before.get("data", {}).get("fingerprint"), run.record["data"]["fingerprint"])}
    recorded = {"model": model.to_dict(), "objective": before["objective"]}
    recorded |= {"space": before.get("space", {}), "text": before.get("text", {})}
    for part, was in recorded.items():
        # Of networks what was recorded is compared; they may have moved.
        now = run.record.get(part, {})
        keys = set(now)
        if part in ("space", "text"):
            keys = set(was) - {"path", *(("name",) if "sha256" in was else ())}
            keys |= Measured.__annotations__.keys() & now.keys()
        pairs |= {f"{part} {key}": (was.get(key), now.get(key)) for key in keys}
    pairs["--repa"] = tuple(representation.brief(record.get("alignment")) for record in (before, run.record))
    for key in (flags_before.keys() & flags_now.keys()) - RUN_CONTROL - MODEL_FLAGS.keys():  # the model says those
        pairs[f"--{key}"] = flags_before[key], flags_now[key]
    if run.args.lr_schedule != "constant":
        pairs["number of steps, which the learning rate follows,"] = state["total_steps"], run.total_steps
    different = [f"{what} was {old}, is {new}" for what, (old, new) in sorted(pairs.items()) if old != new]
    if not different:
        return
    cannot = f"cannot resume {found}: {'; '.join(different[:4])}"
    if shapes_of(model) != shapes_of(run.config) or before["objective"]["name"] != run.objective.name:
        raise UsageError(f"{cannot}; that is another network: --init-from {found} starts a new run from its weights")
    if not run.args.allow_changes:
        raise UsageError(f"{cannot}; --allow-changes resumes all the same, without --resume a new run begins")


def shapes_of(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Of a model's parameters and its table of positions."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
