"""Look into files of weights, write them under the published names, and average those of a run.

python weights.py inspect dit_moe_s_8E2A.pt                 # what it holds, read off its headers
python weights.py inspect results/000-DiT-S-2-8E2A-rf --norms
python weights.py export results/000-DiT-S-2-8E2A-rf --output dit_moe_s.safetensors --dtype fp16
python weights.py export results/000-DiT-S-2-8E2A-rf --to diffusers pipeline   # a folder that diffusers runs
python weights.py ema results/000-DiT-S-2-8E2A-rf --length 0.1 --output averaged.safetensors
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import checkpoint
import cli
import diffusers_dit
import hub
from autoencoders import SpaceInfo, add_space_arguments, place_of_space, read_statistics, settle_statistics, space_info
from cli import UsageError, number_in, positive_int
from configuration import unseen
from diffusers_folder import Exported, check_theirs, difference, write_ours, write_theirs
from diffusion import objective_from_config
from families import family_for, to_published
from files import replace_json
from models import DiT, count_parameters
from objectives import NEEDS, SETTINGS, add_objective_arguments, check_against, choose_objective, in_words
from post_hoc_ema import LENGTHS, reconstruct

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="weights.py", description=__doc__.partition("\n")[0], usage="%(prog)s COMMAND ...")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    inspect = commands.add_parser("inspect", help="a table of what a file holds, without loading it whole")
    parser.add_switch(inspect, "--norms", False, "the norm of each expert's weights (reads the experts)")
    export = commands.add_parser("export", help="write the published names, as .safetensors or .pt")
    export.add_argument("--output", type=Path, help="a .safetensors or .pt file, or (Large-DiT) a folder")
    export.add_argument(
        "--to",
        nargs=2,
        metavar=("KIND", "FOLDER"),
        help="in place of --output a pipeline: diffusers (draws as sample.py does) or DiTPipeline (their own)",
    )
    export.add_argument("--from", dest="origin", choices=("diffusers",), help="refuse weights of any other origin")
    export.add_argument("--dtype", choices=DTYPES, help="default: as it is")
    parser.add_switch(export, "--flash-names", None, "Wqkv and out_proj; default: where there is QK-norm, as published")
    group = export.add_argument_group("pipelines")
    group.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it there, when it is written")
    parser.add_switch(group, "--private", False, "to a repository that others do not see")
    group.add_argument("--vae-path", "--vae", help="autoencoder, of a file that does not tell it")
    add_space_arguments(group)
    add_objective_arguments(parser, group, training=False)
    average = commands.add_parser("ema", help="the average of any length, of a run with --post-hoc-ema")
    average.add_argument("ckpt", type=Path, help="run folder")
    average.add_argument("--length", type=number_in(*LENGTHS), required=True, help="0.05 is short, 0.2 long")
    average.add_argument("--step", type=positive_int, help="of the average (default: the newest checkpoint's)")
    average.add_argument("--output", type=Path, required=True, help="a .safetensors or .pt file")
    average.set_defaults(num_heads=None, dtype=None, flash_names=None)
    for command in (inspect, export):
        command.add_argument("ckpt", help="checkpoint or run folder, published .pt, .safetensors")
        parser.add_switch(command, "--use-ema", True, "the averaged weights, not those under training")
        command.add_argument("--num-heads", type=positive_int, help="of a file whose width is in no table")
    return parser


def main(args) -> None:
    if args.command == "ema":
        tensors, newest = reconstruct(args.ckpt, args.length, args.step)
        whole = checkpoint.load_weights(newest)
        tensors |= {name: whole.state_dict[name] for name in whole.meta.keys() - tensors.keys()}  # what is not trained
        record = whole.record | {"post_hoc_length": args.length}
        weights = dataclasses.replace(whole, tensors=tensors, meta=tensors, record=record)
        export(weights, args.output, None, None)
        print(f"{args.output}: length {args.length:g} at step {int(newest.name)}")
        return
    if args.command == "export":
        check_export(args)
    known = {"num_heads": args.num_heads} if args.num_heads else {}
    weights = checkpoint.load_weights(args.ckpt, "ema" if args.use_ema else "model", **known)
    if args.command == "inspect":
        print("\n".join(describe(weights, args.norms)))
        return
    output = args.output
    if args.to is not None:
        output = Path(args.to[1])
        export_pipeline(args, weights, output)
    else:
        export(weights, output, args.dtype, args.flash_names, "ema" if args.use_ema else "model")
    written = output.rglob("*") if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in written)
    print(f"{output}: {size / 1e9:.3f} GB, {checkpoint.describe(weights.config)}")
    if args.push_to_hub is not None:
        print(f"{output} is at {hub.push(output, args.push_to_hub, args.private)}")


def describe(weights: checkpoint.Weights, norms: bool) -> list[str]:
    """The lines of `inspect`; only `norms` and the objective of a published file read any tensor."""
    config, record, meta = weights.config, weights.record or {}, weights.meta
    with torch.device("meta"):
        total, activated = count_parameters(DiT(config))
    gigabytes = sum(tensor.numel() * tensor.element_size() for tensor in meta.values()) / 1e9
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in meta.values()})
    origin = "recorded" if record else "from the weights"
    objective = in_words(objective_from_config(weights.objective)) if record else weights.objective.get("name")
    lines = [
        f"file         {weights.source}",
        f"model        {checkpoint.describe(config)}",
        f"parameters   {total:,} in total, {activated:,} activated",
        f"tensors      {len(meta)}, {', '.join(dtypes)}, {gigabytes:.3f} GB",
        f"objective    {objective or 'unknown'} ({origin})",
    ]
    if record:
        lines.append("besides      " + ", ".join(f"{name} {value}" for name, value in unseen(config).items()))
    lines += [f"{key:<12} {record[key]}" for key in ("step", "image_size", "ema_decay", "space") if key in record]
    lines += ["", f"{'part':<26} {'tensors':>7} {'parameters':>15}"]
    parts: dict[str, list[int]] = {}
    for name, tensor in meta.items():
        part = ".".join(["blocks.*", *name.split(".")[2:3]]) if name.startswith("blocks.") else name.split(".")[0]
        parts.setdefault(part, []).append(tensor.numel())
    lines += [f"{part:<26} {len(sizes):>7} {sum(sizes):>15,}" for part, sizes in parts.items()]
    if norms and config.moe_indices:
        lines += ["", "norm of each expert's weights"]
        for index in config.moe_indices:
            prefix = f"blocks.{index}.moe.experts."
            stacked = [tensor for name, tensor in weights.state_dict.items() if name.startswith(prefix)]
            squares = sum(tensor.float().flatten(1).square().sum(dim=1) for tensor in stacked)  # (E,)
            lines.append(f"block {index:<3} " + " ".join(f"{value:8.2f}" for value in squares.sqrt().tolist()))
    return lines


def export(
    weights: checkpoint.Weights, output: Path, dtype: str | None, flash_names: bool | None, which: str = "ema"
) -> None:
    """Write `weights` under the published names; the file, or a family's folder, appears when it is complete.

    What is known of them besides (`checkpoint.Description`) goes into a `.safetensors`, and beside a `.pt` as `.json`.

    Raises:
        UsageError: the suffix is another, a file exists or cannot be written.
    """
    write_folder = getattr(family_for(weights.config), "write_folder", None)
    if output.suffix not in (".safetensors", ".pt") and (output.suffix or write_folder is None):
        raise UsageError(f"--output {output} must end in .safetensors or .pt")
    beside = checkpoint.description_path(output) if output.suffix == ".pt" and weights.record is not None else None
    for path in (output, beside):
        if path is not None and path.exists():
            raise UsageError(f"{path} exists; name another file")
    flash_names = weights.config.qk_norm == "head" if flash_names is None else flash_names
    tensors = {
        name: tensor.to(DTYPES[dtype] if dtype else tensor.dtype).clone(memory_format=torch.contiguous_format)
        for name, tensor in to_published(weights.state_dict, flash_names, weights.config).items()
    }
    metadata = None if weights.record is None else {checkpoint.DESCRIPTION: json.dumps(weights.record)}
    with appearing(output) as unfinished:
        if not output.suffix:
            unfinished.mkdir()
            write_folder(unfinished, which, tensors, weights.config, weights.record or {})
        elif output.suffix == ".pt":
            torch.save({"ema": tensors}, unfinished)
        else:
            save_file(tensors, unfinished, metadata)
        if beside is not None:
            replace_json(beside, weights.record)


@contextlib.contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """Where to write what becomes `output` when it is complete; what fails leaves nothing. Raises UsageError."""
    unfinished = output.with_name(f"{output.name}.unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.rename(output)
    except (OSError, RuntimeError, SafetensorError, UsageError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{output} cannot be written: {error}") from None


# ----------------------------------------------------------------------------------------------------------- pipelines

PIPELINES = {"diffusers": write_ours, "DiTPipeline": write_theirs}
ONLY_PIPELINES = cli.Need(
    ("push_to_hub", "private", "vae_path", "latent_stats", "root", "local_diffusers_model_root", "rf", *SETTINGS),
    lambda args: args.to is not None,
    "--to diffusers FOLDER",
)
ONLY_UPLOADS = cli.Need(("private",), lambda args: args.push_to_hub is not None, "--push-to-hub OWNER/NAME")


def check_export(args) -> None:
    """What can be said before weights are read. Raises UsageError."""
    if (args.output is None) == (args.to is None):
        raise UsageError("export needs one of --output FILE and --to diffusers FOLDER")
    cli.check_needs(args, (ONLY_PIPELINES, ONLY_UPLOADS, *NEEDS))
    if args.to is not None:
        kind, folder = args.to
        if kind not in PIPELINES:
            raise cli.unknown_name("kind of --to", kind, PIPELINES)
        if args.flash_names is not None:
            raise UsageError("--flash-names are of files: drop it, or give --output")
        if Path(folder).exists():
            raise UsageError(f"{folder} exists; name another folder")
    if args.push_to_hub is not None:
        hub.check_push(args.push_to_hub)
    if args.origin is not None:
        path = Path(args.ckpt)
        family, _ = (checkpoint.find_published_folder(path) if path.is_dir() else None) or (None, None)
        if family is not diffusers_dit:
            raise UsageError(f"--from {args.origin}: {path} is no folder of a DiTTransformer2DModel or of its pipeline")


def export_pipeline(args, weights: checkpoint.Weights, folder: Path) -> None:
    """Write a folder that `diffusers` runs, with its model card.

    Raises:
        UsageError: flags contradict the file; the autoencoder is another one, or cannot be found; no such pipeline.
    """
    if weights.record is not None:
        check_against(args, weights.objective, weights.source)
    exported = Exported(weights, choose_objective(args, weights.objective), choose_space(args, weights))
    if weights.config.caption_width and "text" not in exported.record:
        raise UsageError(f"{weights.source} reads texts and does not tell with which encoder: no pipeline of it")
    kind = args.to[0]
    if kind == "DiTPipeline":
        check_theirs(exported)
    import model_card  # which knows the trainers' flags, as nothing else here does

    with appearing(folder) as unfinished:
        unfinished.mkdir()
        PIPELINES[kind](unfinished, exported, DTYPES.get(args.dtype))
        name = args.push_to_hub or folder.name
        model_card.write(unfinished / "README.md", name, exported, ours=kind == "diffusers")
        if kind == "DiTPipeline":
            differs = difference(unfinished, exported)
            print(
                f"DiTPipeline computes with other frequencies of time (10000^(-k/127), trained with 10000^(-k/128)): "
                f"the network's answers differ by {differs:.2%} of their size; --to diffusers writes the same function"
            )


def choose_space(args, weights: checkpoint.Weights) -> SpaceInfo:
    """The autoencoder of a pipeline: as recorded, or `--vae-path`, or the usual one. Raises UsageError."""
    recorded = (weights.record or {}).get("space", {})
    measured = read_statistics(args.latent_stats)
    is_whole = {"path", "channels", "downsample", "scaling_factor"} <= recorded.keys()
    if is_whole and args.vae_path is None and recorded["path"] != "none":
        space = SpaceInfo.recorded(recorded)
    else:
        space = space_info(place_of_space(args, recorded, weights.config.in_channels))
    if space.channels != weights.config.in_channels:
        raise UsageError(f"{space.path} has {space.channels} channels, the network {weights.config.in_channels}")
    settle_statistics(space, measured, recorded, weights.source)
    for name, value in space.record().items():
        if name != "path" and recorded.get(name, value) != value:
            raise UsageError(f"--vae-path {space.path} has {name} {value}, {weights.source} {recorded[name]}")
    return space


if __name__ == "__main__":
    cli.run(main, get_parser())
