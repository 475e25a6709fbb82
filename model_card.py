"""What a model's card says: facts of its weights and of the run that they come from, its metrics, its command."""

import contextlib
import json
import shlex
from argparse import Namespace
from pathlib import Path

import cli
import objectives
import runs
from autoencoders import VAE_NAMES
from checkpoint import describe
from configuration import MODEL_FLAGS, build_config
from diffusers_folder import Exported
from families import DiT_models
from models import count_parameters
from objectives import in_words

LEFT_TO_USERS = {"num_workers", "local_rank", "results_dir", "device", "compile"}  # what suited another machine


def write(path: Path, name: str, exported: Exported, ours: bool) -> None:
    """README.md of a pipeline: facts, a row each, how to draw images, and how it was trained.

    Args:
        name: of the repository or folder.
        exported: where its weights are a checkpoint's, the run tells its metrics and its command.
        ours: whether the pipeline is of ours, and not `DiTPipeline`.
    """
    run, texts = run_of(exported.weights.source), exported.config.caption_width > 0
    kind = "text-to-image" if texts else "unconditional-image-generation"
    head = {"library_name": "diffusers", "pipeline_tag": kind, "tags": ["diffusion-transformer"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    facts = facts_of(exported) | ({} if run is None else metrics_of(run, exported.record["step"]))
    lines += [f"# {name.rpartition('/')[2]}", "", "| | |", "|---|---|"]
    lines += [*(f"| {key} | {value} |" for key, value in facts.items()), ""]
    more = ", custom_pipeline=FOLDER, trust_remote_code=True" if ours else ""
    asked = 'prompt="a photograph"' if texts else "class_labels=[0]"
    lines += ["## Draw images", "", "```python", "from diffusers import DiffusionPipeline", "", f'FOLDER = "{name}"']
    lines += [f"pipeline = DiffusionPipeline.from_pretrained(FOLDER{more})"]
    lines += [f"image = pipeline({asked}).images[0]", "```", ""]
    if run is not None:
        lines += ["## Training", "", "```bash", command_of(run), "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def facts_of(exported: Exported) -> dict[str, object]:
    """Of the network, and of what trained it."""
    config, record, space = exported.config, exported.record, exported.space
    total, activated = count_parameters(exported.model)
    facts = {
        "model": describe(config),
        "parameters": f"{total:,} in total, {activated:,} activated",
        "objective": in_words(exported.objective),
        "images": f"{config.input_size * space.downsample} pixels",
        "autoencoder": f"{exported.description['space']['path']} ({space.kind})"
        if space.path != "none"
        else "none: pixels",
    }
    facts |= {"text encoder": Path(record["text"]["name"]).name} if "text" in record else {}
    facts |= {name: record[name] for name in ("step", "ema_decay") if name in record}
    samples = record.get("data", {}).get("samples")
    return facts | ({} if samples is None else {"training images": f"{samples:,}"})


def run_of(source: Path) -> Path | None:
    """The folder of the run that a checkpoint is of, if it is one's."""
    run = source.absolute().parent.parent
    return run if source.name.isdecimal() and (run / "args.json").is_file() else None


def metrics_of(run: Path, step: int) -> dict[str, float]:
    """What `--metrics-every` last measured of a run, up to a step, and at which: FID and so on."""
    found = {}
    with contextlib.suppress(OSError), open(run / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # the last line of a killed run
                values = json.loads(line)
                measured = {name: value for name, value in values.items() if name.startswith("metrics/")}
                if measured and values["step"] <= step:
                    found = {
                        f"{name.removeprefix('metrics/')} at step {values['step']}": measured[name] for name in measured
                    }
    return found


def command_of(run: Path) -> str:
    """The flags of a run that are not as usual, and do something; of what lies on a machine, their names alone."""
    parser = cli.Parser()
    runs.add_training_arguments(parser)
    usual = cli.values(parser.parse_known_args([])[0])
    said = json.loads((run / "args.json").read_text(encoding="utf-8"))
    row = build_config(said["model"]).to_dict() if said.get("model") in DiT_models else {}
    usual |= {name: row[name] for name in MODEL_FLAGS if name in row}
    without = LEFT_TO_USERS | cli.idle(Namespace(**(usual | said)), (*objectives.NEEDS, *runs.NEEDS))
    words = ["train.py"]
    for name, value in said.items():
        if value is None or name not in usual or name in without or (value == usual[name] and name != "model"):
            continue
        is_place = name in runs.OF_A_MACHINE and value not in ("none", *VAE_NAMES)
        values = [name.upper()] if is_place else map(str, value if isinstance(value, list) else [value])
        words += [f"--{name.replace('_', '-')}", *values]
    return shlex.join(["python", *words])
