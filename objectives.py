"""Which objective a network is for: what flags and files say of it, for trainers and samplers alike.

One table maps each flag to the setting that it stands for. A flag that was not given stands for what the file says, or
else for the objective's own default.
"""

import argparse

from cli import Need, Parser, UsageError, number_in
from diffusion import GaussianDiffusion, RectifiedFlow, objective_from_config

SETTINGS = {  # flag: the objective it belongs to, and its setting there
    "noise_schedule": ("ddpm", "schedule"),
    "prediction": ("ddpm", "prediction"),
    "diffusion_loss": ("ddpm", "loss"),
    "t_distribution": ("rf", "t_distribution"),
    "timestep_shift": ("rf", "shift"),
    "time_scale": ("rf", "time_scale"),
}
NEEDS = (
    Need(tuple(flag for flag, (name, _) in SETTINGS.items() if name == "rf"), lambda args: args.rf, "--rf"),
    Need(tuple(flag for flag, (name, _) in SETTINGS.items() if name == "ddpm"), lambda args: not args.rf, "--rf False"),
)


def add_objective_arguments(parser: Parser, group, training: bool) -> None:
    """The flags; their default is None, for what `choose_objective` finds in their place."""
    parser.add_switch(group, "--rf", None, "rectified flow in place of DDPM")
    if training:  # sampling does not depend on it
        group.add_argument(
            "--t-distribution", choices=("lognormal", "uniform"), help="of flow time (default: lognormal)"
        )
    group.add_argument(
        "--timestep-shift", type=number_in(0.01, 100), help="of flow time; above 1: to noise (default: 1)"
    )
    group.add_argument("--time-scale", type=number_in(1e-3, 1e6), help="of flow time in the network (default: 1)")
    group.add_argument("--noise-schedule", choices=("linear", "cosine"), help="of DDPM (default: linear)")
    group.add_argument("--prediction", choices=("eps", "x0", "v"), help="what a DDPM network predicts (default: eps)")
    group.add_argument(
        "--diffusion-loss", choices=("hybrid", "mse"), help="mse: variance not learned (default: hybrid)"
    )


def choose_objective(args: argparse.Namespace, found: dict) -> GaussianDiffusion | RectifiedFlow:
    """The objective of flags, and where they say nothing that of `found`, the `config()` of one or {}."""
    name = {None: found.get("name", "ddpm"), True: "rf", False: "ddpm"}[args.rf]
    settings = dict(found) if found.get("name") == name else {"name": name}
    for flag, (owner, setting) in SETTINGS.items():
        if owner == name and getattr(args, flag, None) is not None:
            settings[setting] = getattr(args, flag)
    if name == "ddpm" and args.diffusion_loss is not None:
        settings["variance"] = "learned_range" if args.diffusion_loss == "hybrid" else "fixed_small"
    return objective_from_config(settings)


def spell_out(args: argparse.Namespace, objective) -> None:
    """Set each flag to what `objective` has, so that no flag stands for a choice that is still to be made."""
    args.rf = objective.name == "rf"
    settings = objective.config()
    for flag, (owner, setting) in SETTINGS.items():
        default = objective_from_config({"name": owner}).config()[setting]
        setattr(args, flag, settings[setting] if owner == objective.name else default)


def check_against(args: argparse.Namespace, recorded: dict, source: object) -> None:
    """Raises UsageError for a flag that contradicts `recorded`, the objective that `source` was trained with."""
    if args.rf is not None and args.rf != (recorded["name"] == "rf"):
        raise UsageError(f"--rf {args.rf} contradicts {source}, which was trained with {recorded['name']}")
    for flag, (owner, setting) in SETTINGS.items():
        said = getattr(args, flag, None)
        if said is not None and (owner != recorded["name"] or said != recorded.get(setting, said)):
            says = f"{setting} {recorded[setting]}" if owner == recorded["name"] else recorded["name"]
            raise UsageError(f"{args.given[flag]} {said} contradicts {source}, which was trained with {says}")


def in_words(objective) -> str:
    """`rf (t_distribution lognormal, shift 1.0, time_scale 1.0)`."""
    settings = ", ".join(f"{key} {value}" for key, value in objective.config().items() if key != "name")
    return f"{objective.name} ({settings})"
