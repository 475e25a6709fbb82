"""Coordinate check: do the outputs of all layers, and their changes in training, keep their size as the width grows?

    python -m analysis.coordinates                      # DiT-Nano/2 at 1, 2, 4 and 8 times its width, standard and muP
    python -m analysis.coordinates --num_experts 8      # router logits, each expert's output, their sum
    python -m analysis.coordinates --model DiT-muP-4h/2 --depth 4 --widths 288 576 1152 --device cuda
    python -m analysis.coordinates --model DiT-muP-4h/2 --write-bsh width288_d28.bsh

Trains each width for a few steps on one batch per seed and looks at that batch: the mean absolute coordinate of every
layer's output, and of what a layer's output changed since the initial weights. Under muP both are of the same order at
all widths: over the width, on logarithmic axes, slopes are at most --tolerance from step 1 on, or the exit code is 1.
Writes coordinates.png and coordinates.json. N images · T tokens · D hidden width · E experts
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import default_collate

import base_shapes
import cli
import distributed
from autoencoders import add_space_arguments, load_space, read_statistics, vae_below
from configuration import DiTConfig, add_model_arguments, config_said
from data import ImageData, require_folder
from diffusion import NoisedBatch
from files import replace_json, replacing
from layers import roles_of
from models import DiT, DiTBlock
from moe import MoE
from objectives import add_objective_arguments, choose_objective
from optim import build_optimizer
from training import Balance, total_loss

FACTORS = (1, 2, 4, 8)  # of the base width
SYNTHETIC = 2  # side of synthetic latents, in patches of the model: with few tokens, small widths are wide enough


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m analysis.coordinates", description=__doc__.partition("\n")[0])
    group = add_model_arguments(parser)
    group.add_argument("--widths", nargs="+", type=cli.positive_int, help="default: 1, 2, 4 and 8 times the base width")
    group.add_argument("--aux-loss-alpha", type=cli.number_in(0, 1e6), default=0.0, help="of the balance loss")
    add_objective_arguments(parser, parser.add_argument_group("objective"), training=True)

    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=("synthetic",), default="synthetic", help="noise, unless --data-path is given")
    group.add_argument("--data-path", type=Path, help="folder with one folder of images per class")
    group.add_argument("--vae-path", "--vae", default="mse", help="autoencoder: folder, hub name, mse, ema, or none")
    add_space_arguments(group)
    group.add_argument("--image-size", type=cli.positive_int, default=256, help="side of the images, in pixels")
    group.add_argument("--batch-size", type=cli.positive_int, default=4, help="images of each seed")

    group = parser.add_argument_group("check")
    group.add_argument("--lr", type=cli.number_in(0, 1e3), default=2.0**-7, help="learning rate at the base width")
    group.add_argument("--loglr", dest="lr", type=cli.power_of_two, default=argparse.SUPPRESS, help="--lr 2^N")
    group.add_argument("--steps", "--coord_check_nsteps", type=cli.positive_int, default=4, help="of AdamW")
    group.add_argument("--seeds", "--coord_check_nseeds", type=cli.positive_int, default=8, help="of weights and data")
    group.add_argument("--seed", type=cli.natural_int, default=1, help="the first one")
    group.add_argument("--tolerance", type=cli.number_in(0, 10), default=0.15, help="largest slope")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    group.add_argument("--output", "--work_dir", type=Path, default=Path("results/coordinates"), help="folder to write")
    group.add_argument(
        *("--write-bsh", "--save_base_shapes"), type=Path, metavar="FILE", help="write the base shapes, and no more"
    )
    return parser


def main(args) -> None:
    args.parametrization = "mup"  # the standard one stands beside it
    config = base_shapes.fitted(config_said(args, "DiT-Nano/2"), args)
    if args.write_bsh is not None:
        base_shapes.write_base_shapes(args.write_bsh, config, config.base_width)
        print(f"{args.write_bsh}: base width {config.base_width}, for any width of {config.depth} blocks")
        return
    device = distributed.choose_device(args.device)
    make_batch, config = open_data(args, config, device)
    widths = sorted(set(args.widths or [factor * config.base_width for factor in FACTORS]))
    if len(widths) < 2:
        raise cli.UsageError(f"--widths {widths[0]}: a slope needs two widths or more")
    configs = {how: [parametrized(config, how).at_width(width) for width in widths] for how in ("standard", "mup")}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UsageError(f"--output {args.output} cannot be written: {error.strerror or error}") from None

    checks = {how: check(of_width, make_batch, args, device) for how, of_width in configs.items()}
    verdicts = checks["mup"].verdicts(args.tolerance)
    record = {"widths": widths, "steps": args.steps, "seeds": args.seeds, "lr": args.lr, "tolerance": args.tolerance}
    record |= {"model": config.to_dict(), "roles": checks["mup"].roles}
    record |= {how: found.record() for how, found in checks.items()} | {"verdicts": verdicts}
    replace_json(args.output / "coordinates.json", record)
    with replacing(args.output / "coordinates.png") as file:
        draw(checks).savefig(file, format="png", dpi=130)
    report(checks, verdicts, args)
    if failed := [name for name, verdict in verdicts.items() if not verdict["good"]]:
        raise cli.RunStopped(f"{len(failed)} of {len(verdicts)} layers do not keep their size: {', '.join(failed[:5])}")


def parametrized(config: DiTConfig, how: str) -> DiTConfig:
    """The same model under another parametrization."""
    options = {} if how == "mup" else {"base_width": 0, "output_mult": 1.0}
    return replace(config, parametrization=how, **options)


# ----------------------------------------------------------------------------------------------------------------- data


MakeBatch = Callable[[int], tuple[NoisedBatch, Tensor]]  # of a seed: what the network sees, and labels


def open_data(args, config: DiTConfig, device: torch.device) -> tuple[MakeBatch, DiTConfig]:
    """The batch of each seed, and the model for such data."""
    objective, count = choose_objective(args, {}), args.batch_size
    args.objective = objective
    if args.data_path is None:
        config = replace(config, input_size=SYNTHETIC * config.patch_size)

        def drawn(seed: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            y = torch.randint(config.num_classes, (count,), generator=generator)
            coarse = torch.randn(count, config.in_channels, config.side, config.side, generator=generator)
            x0 = nn.functional.interpolate(coarse, scale_factor=config.patch_size)
            return x0, y
    else:
        require_folder(args.data_path, "data path")
        vae_path = vae_below(args, args.vae_path)
        space = load_space(vae_path, read_statistics(args.latent_stats)).to(device)
        data = ImageData(args.data_path, args.image_size, space, args.seed, flip=False)
        channels, side, _ = data.latent_shape
        config = replace(config, input_size=side, in_channels=channels, num_classes=data.num_classes)

        def drawn(seed: int) -> tuple[Tensor, Tensor]:
            chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
            batch = default_collate([data[0, index] for index in chosen.tolist()])
            batch = {name: value.to(device) for name, value in batch.items()}
            return space.encode(batch["x"], batch.get("vae_noise")), batch["y"]

    def make_batch(seed: int) -> tuple[NoisedBatch, Tensor]:
        x0, y = (part.to(device) for part in drawn(seed))
        generator = torch.Generator().manual_seed(1000 + seed)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        u = (torch.randperm(len(x0), generator=generator) + 0.5) / len(x0)
        return objective.noised(x0, noise, u.to(device)), y

    return make_batch, config


# ---------------------------------------------------------------------------------------------------------------- check


@dataclass
class Check:
    """What one parametrization did: for each layer (S, W, R), of S steps, W widths and R seeds."""

    widths: list[int]
    roles: dict[str, str] = field(default_factory=dict)
    size: dict[str, np.ndarray] = field(default_factory=dict)  # mean absolute coordinate, step 0 being the initial one
    change: dict[str, np.ndarray] = field(default_factory=dict)  # of what is different since then

    def record(self) -> dict:
        parts = {"size": self.size, "change": self.change}
        return {part: {name: values.tolist() for name, values in found.items()} for part, found in parts.items()}

    def verdicts(self, tolerance: float) -> dict[str, dict]:
        """For each layer its steepest slopes from step 1 on, and whether they are small enough.

        A router is looked at after the last step: its logits begin small, the smaller the wider it is, and learn only
        when the experts have.
        """
        found = {}
        for name in self.size:
            first = -1 if self.roles[name] == "router" else 1
            size, change = (steepest(values[name][first:], self.widths) for values in (self.size, self.change))
            good = all(slope is None or abs(slope) <= tolerance for slope in (size, change))
            found[name] = {"role": self.roles[name], "size_slope": size, "change_slope": change, "good": good}
        return found


def steepest(values: np.ndarray, widths: list[int]) -> float | None:
    """The slope over the widths, on logarithmic axes, of a step (S, W, R) that has the largest one.

    Steps at which nothing was there yet, as before the readout has learned anything, have none; None: there never was.
    Infinite where values are not finite.
    """
    if not np.isfinite(values).all():
        return math.inf
    means = [mean for mean in values.mean(axis=2) if (mean > 1e-12).all()]
    slopes = [float(np.polyfit(np.log(widths), np.log(mean), 1)[0]) for mean in means]
    return max(slopes, key=abs, default=None)


def check(configs: list[DiTConfig], make_batch: MakeBatch, args, device: torch.device) -> Check:
    """Train every width with every seed."""
    found = Check([config.hidden_size for config in configs])
    for w, config in enumerate(configs):
        for r in range(args.seeds):
            torch.manual_seed(args.seed + r)
            model = DiT(config).to(device)
            found.roles = roles_of_layers(model)
            start: dict[str, Tensor] = {}
            for s, outputs in enumerate(trajectory(model, *make_batch(args.seed + r), args)):
                start = start or outputs
                for name, output in outputs.items():
                    for kind, value in ((found.size, output), (found.change, output - start[name])):
                        table = kind.setdefault(name, np.zeros((args.steps + 1, len(configs), args.seeds)))
                        table[s, w, r] = value.abs().mean().item()
    return found


def trajectory(model: DiT, batch: NoisedBatch, y: Tensor, args):
    """The outputs of all layers for a batch: of the initial weights, and after each step of training on it."""
    optimizer = build_optimizer(model, args.lr, weight_decay=0.0)
    yield outputs_of_layers(model, batch.x_t, batch.t, y)
    for _ in range(args.steps):
        output, routings = model(batch.x_t, batch.t, y, return_routing=True)
        loss, _, _ = total_loss(args.objective.loss(output, batch), routings, Balance(aux=args.aux_loss_alpha), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield outputs_of_layers(model, batch.x_t, batch.t, y)


@torch.no_grad()
def outputs_of_layers(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By name: what every layer says, the residual stream behind every block, a mixture's parts, the network itself."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output
        if isinstance(module, MoE):
            tokens = inputs[0].flatten(0, -2)
            outputs[f"{name}.gate"] = tokens.float() @ module.gate.weight.T
            count = len(module.gate.weight)
            ends = torch.arange(1, count + 1, device=tokens.device, dtype=torch.int32) * len(tokens)
            each = module.experts(tokens.repeat(count, 1), ends)  # every expert of every token, whoever was chosen
            outputs.update({f"{name}.experts.{e}": part for e, part in enumerate(each.chunk(count))})

    looked_at = roles_of_layers(model)
    named = ((name, module) for name, module in model.named_modules() if name in looked_at)
    hooks = [module.register_forward_hook(functools.partial(keep, name)) for name, module in named]
    outputs["output"] = model(x, t, y)
    for hook in hooks:
        hook.remove()
    return outputs


def roles_of_layers(model: DiT) -> dict[str, str]:
    """The layers whose outputs are looked at, and the role of what makes them."""
    found = {}
    roles = roles_of(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            found[name] = roles[f"{name}.weight"]
        elif isinstance(module, MoE):
            found |= {f"{name}.gate": "router", name: "mixture"}
            found |= {f"{name}.experts.{e}": "expert" for e in range(len(module.gate.weight))}
        elif isinstance(module, DiTBlock):
            found[name] = "stream"
    return found | {"output": "output"}


# --------------------------------------------------------------------------------------------------------------- report


def report(checks: dict[str, Check], verdicts: dict[str, dict], args) -> None:
    """A line for each role: the steepest slopes of its layers."""
    print(f"slopes over widths {checks['mup'].widths}, steps 1 to {args.steps}, {args.seeds} seeds; the steepest layer")
    print(f"{'role':<12}{'layers':>7}{'muP size':>11}{'change':>9}{'standard size':>16}{'change':>9}")
    standard = checks["standard"].verdicts(args.tolerance)
    for role in dict.fromkeys(checks["mup"].roles.values()):
        names = [name for name in verdicts if verdicts[name]["role"] == role]
        slopes = [
            max((each[name][kind] for name in names if each[name][kind] is not None), key=abs, default=float("nan"))
            for each in (verdicts, standard)
            for kind in ("size_slope", "change_slope")
        ]
        mark = "" if all(verdicts[name]["good"] for name in names) else f"   more than {args.tolerance:g}"
        print(f"{role:<12}{len(names):>7}{slopes[0]:>11.2f}{slopes[1]:>9.2f}{slopes[2]:>16.2f}{slopes[3]:>9.2f}{mark}")
    print(f"{args.output / 'coordinates.png'}, coordinates.json")


COLOURS = {  # of roles
    **{"input": "#0072b2", "table": "#56b4e9", "hidden": "#009e73", "modulation": "#e69f00", "output": "black"},
    **{"router": "#d55e00", "expert": "#cc79a7", "mixture": "#882255", "stream": "0.6"},
}


def draw(checks: dict[str, Check]) -> Figure:
    """A row for each parametrization, a panel for each step: size of each layer's output over the width."""
    steps = len(next(iter(checks["mup"].size.values())))
    figure = Figure(figsize=(2.0 * steps + 1.6, 2.3 * len(checks) + 0.7), layout="constrained")
    panels = figure.subplots(len(checks), steps, sharex=True, sharey=True, squeeze=False)
    for row, (how, found) in zip(panels, checks.items(), strict=True):
        for s, axes in enumerate(row):
            for name, values in found.size.items():
                mean = values[s].mean(axis=1)
                if (mean > 0).all() and np.isfinite(mean).all():
                    axes.plot(found.widths, mean, "o-", color=COLOURS[found.roles[name]], markersize=2, linewidth=0.9)
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"{how}, step {s}", fontsize=9)
            axes.set_xticks(found.widths, labels=map(str, found.widths), fontsize=7)
            axes.minorticks_off()
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", linewidth=0.6)
        row[0].set_ylabel("mean |coordinate|", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("width", fontsize=8)
    roles = dict.fromkeys(checks["mup"].roles.values())
    lines = [panels[0][0].plot([], [], color=COLOURS[role], label=role)[0] for role in roles]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    cli.run(main, get_parser())
