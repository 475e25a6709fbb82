"""Turn a trained dense DiT into a DiT-MoE that computes the same function, to go on training from there.

python upcycle.py --ckpt DiT-XL-2-256x256.pt --num_experts 8 --num_experts_per_tok 2 --output checkpoints/xl-8E2A
python train.py --init-from checkpoints/xl-8E2A ...

D hidden width · F hidden units of the MLP · E experts · K experts per token · G slices · R = E/G replicas of the MLP

Sparse upcycling (arXiv 2212.05055): each expert starts as a copy of its block's MLP, kind and biases included, so any K
of them compute the MLP as long as their weights sum to one. Two routings see to that:

    normalize   random router, weights divided by their sum over the K chosen. Tokens spread over the experts from the
                first step on. For K = 1 the weight is always 1, and only the balance loss trains the router.
    scale       zero router, so that each probability is 1/E, weights times E/K. The router gets a gradient for K = 1
                too. All probabilities are equal at first: every token goes to the same K experts until training has
                moved the router.

Copies stay alike as long as they see alike tokens; noise on the weights, or hidden units drawn anew for each expert
(drop-upcycling, arXiv 2502.19261), breaks that symmetry at the price of the exact function.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import cli
from cli import UsageError, natural_int, number_in, positive_int
from conditions import Prompts
from configuration import DiTConfig
from diffusion import objective_from_config
from layers import SwiGLUMLP
from models import DiT, DiTBlock, count_parameters
from moe import Experts, GELUExperts, SwiGLUExperts
from parametrization import RULES, is_mup

ROUTER_STD = 0.02  # as in sparse upcycling
ROUTINGS = ("normalize", "scale")


@dataclass(frozen=True)
class Recipe:
    """What to make of a dense model; the flags of the same names, and what is recorded beside the weights."""

    num_experts: int
    num_experts_per_tok: int = 2
    moe_layers: str | None = None  # None: all blocks of a dense source
    routing: str = "normalize"
    router_init_std: float | None = None  # None: ROUTER_STD, or 0 with scale
    split: int = 1  # G
    shared_expert: bool = False
    expert_noise: float = 0.0
    drop_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.routing not in ROUTINGS:
            raise cli.unknown_name("routing", self.routing, ROUTINGS)
        if self.routing == "scale" and self.router_init_std:
            raise UsageError(
                f"--router-init-std {self.router_init_std:g} with --routing scale: weights sum to one only while the "
                f"router is zero; drop the flag, or use --routing normalize"
            )
        for name in ("num_experts", "num_experts_per_tok"):
            if getattr(self, name) % self.split:
                raise UsageError(f"--{name} {getattr(self, name)} is not a multiple of --split {self.split}")
        if self.split > 1 and self.num_experts_per_tok < self.num_experts and not self.router_std:
            raise UsageError(
                f"--split {self.split} needs a router that tells replicas apart, or a token could get one slice twice: "
                f"--routing normalize with a --router-init-std above 0"
            )

    @property
    def router_std(self) -> float:
        if self.router_init_std is not None:
            return self.router_init_std
        return ROUTER_STD if self.routing == "normalize" else 0.0


# --------------------------------------------------------------------------------------------------------------- script


def get_parser() -> cli.Parser:
    parser = cli.Parser(prog="upcycle.py", description=__doc__.partition("\n")[0])
    group = parser.add_argument_group("source")
    group.add_argument(
        "--ckpt", required=True, help="dense DiT, or DiT-MoE with one expert: checkpoint, run, .pt, .safetensors"
    )
    parser.add_switch(group, "--use-ema", True, "the averaged weights, not those under training")
    group.add_argument("--num-heads", type=positive_int, help="of a file whose width is in no table")
    parser.add_switch(group, "--rf", None, "trained with rectified flow, not DDPM; where the file does not tell")

    group = parser.add_argument_group("mixture of experts")
    group.add_argument("--num_experts", type=positive_int, required=True, help="routed experts per MoE layer")
    group.add_argument(
        "--num_experts_per_tok", type=positive_int, default=Recipe.num_experts_per_tok, help="experts of each token"
    )
    group.add_argument("--moe-layers", help="all (default), every-N, deep-half, shallow-half, or 0,2,5")
    group.add_argument(
        "--routing", choices=ROUTINGS, default=Recipe.routing, help="why weights sum to one: divided, or a zero router"
    )
    group.add_argument(
        "--router-init-std",
        type=number_in(0, 1e3),
        help=f"of normal weights (default: {ROUTER_STD}, of muP 1/D; scale: 0)",
    )
    group.add_argument(
        "--split", type=positive_int, default=Recipe.split, metavar="G", help="narrower experts: G slices of the MLP"
    )
    parser.add_switch(group, "--shared-expert", False, "add one of width 2D whose output starts at zero")

    group = parser.add_argument_group("breaking the symmetry (changes the function)")
    group.add_argument(
        "--expert-noise", type=number_in(0, 1e3), default=0.0, metavar="STD", help="relative to that of each matrix"
    )
    group.add_argument(
        "--drop-ratio", type=number_in(0, 1), default=0.0, metavar="R", help="share of hidden units drawn anew; 0.5"
    )
    group.add_argument("--seed", type=natural_int, default=Recipe.seed, help="of router, noise and dropped units")

    group = parser.add_argument_group("result")
    group.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    return parser


def main(args) -> None:
    # What is wanted: everything wrong is found before anything is computed or written.
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    check_output(args.output)
    known = {"num_heads": args.num_heads} if args.num_heads else {}
    weights = checkpoint.load_weights(args.ckpt, "ema" if args.use_ema else "model", **known)
    upcycled_config(weights.config, recipe)
    objective = objective_from_config(objective_of(weights, args.rf))

    # The same function as a mixture of experts, in one copy of the new weights.
    source = load_source(weights)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = upcycle(source, recipe, generator)
    expected = random_outputs(source, objective.time_scale)
    unbroken = random_outputs(model, objective.time_scale)

    # Another function, if asked for.
    break_symmetry(model, source, recipe, generator)
    outputs = random_outputs(model, objective.time_scale)

    write(args.output, model, weights, recipe, objective)
    report(args.output, source, model, recipe, [(out - expected).abs().max().item() for out in (unbroken, outputs)])


def check_output(path: Path) -> None:
    """UsageError where a checkpoint folder cannot appear at `path`."""
    if path.suffix in (".pt", ".safetensors"):
        raise UsageError(
            f"--output {path}: a folder is written, since a bare file cannot say how experts are chosen and weighted; "
            f"use --output {path.with_suffix('')}"
        )
    if path.exists():
        raise UsageError(f"--output {path} exists; name another folder")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--output {path} cannot be written: {parent} is no writable folder")


def objective_of(weights: checkpoint.Weights, said_rf: bool | None) -> dict:
    """The config of the objective: as recorded, else as the weights betray it, else as `--rf` says."""
    found = weights.objective
    if not found and said_rf is None:
        raise UsageError(f"{weights.source} does not tell its objective: say --rf or --rf False")
    if weights.record is not None and said_rf not in (None, found["name"] == "rf"):
        raise UsageError(f"--rf {said_rf} contradicts {weights.source}, which says {found['name']}; drop the flag")
    return found if said_rf is None else {"name": "rf" if said_rf else "ddpm"} | (found if weights.record else {})


def load_source(weights: checkpoint.Weights) -> DiT:
    """The source in fp32 on the CPU; an fp32 file stays memory-mapped."""
    return weights.build().eval().requires_grad_(False)


@torch.no_grad()
def random_outputs(model: DiT, time_scale: float, batch: int = 4) -> Tensor:
    """What the model says of fixed random inputs, at times from near data to near noise."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    condition = torch.arange(batch) % config.num_classes
    if config.caption_width:
        features = torch.randn(batch, config.caption_length, config.caption_width, generator=generator)
        condition = Prompts(features, torch.ones(features.shape[:2], dtype=torch.bool))
    return model(x, torch.linspace(0.05, 0.95, batch) * time_scale, condition)


def write(folder: Path, model: DiT, weights: checkpoint.Weights, recipe: Recipe, objective) -> None:
    """A checkpoint of step 0, which `sample.py --ckpt` and `train.py --init-from` read.

    Keeps what the source's own record says of image size, latent space and data.
    """
    record = (weights.record or {}) | {
        "format": checkpoint.FORMAT,
        "model": model.config.to_dict(),
        "objective": objective.config(),
        "step": 0,
        "upcycled": {"source": weights.source.name} | asdict(recipe),
        "versions": {"torch": torch.__version__},
    }
    state_dict = model.state_dict()
    try:
        checkpoint.save(folder, {"model": state_dict, "ema": state_dict}, {"config": record})
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written: {error.strerror or error}") from None


def report(folder: Path, source: DiT, model: DiT, recipe: Recipe, differences: list[float]) -> None:
    """What was made, and how far it is from the source: before and after the symmetry was broken."""
    config, (total, activated) = model.config, count_parameters(model)
    blocks = f"{len(config.moe_indices)} of {config.depth} blocks, {config.num_experts_per_tok} experts per token"
    experts = f"{config.expert_mlp} experts of width {config.expert_width}"
    weighting = f"{recipe.routing} routing, routed weights times {config.routed_scaling_factor:g}"
    print(f"source    {checkpoint.describe(source.config)}: {count_parameters(source)[0]:,} parameters")
    print(f"upcycled  {checkpoint.describe(config)}: {total:,} parameters, {activated:,} activated")
    print(f"          {blocks}, {experts}, {weighting}")
    print(f"function  outputs on random inputs differ from the source's by at most {differences[0]:.1e}", end="")
    if recipe.expert_noise or recipe.drop_ratio:
        what = f"noise {recipe.expert_noise:g} and drop ratio {recipe.drop_ratio:g}"
        print(f"; with {what} by {differences[1]:.1e}", end="")
    print(f"\nwritten   {folder}")
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        print("note      the weight of a token's one expert is always 1: only the balance loss trains the router")


# ----------------------------------------------------------------------------------------------------------- mechanisms


def upcycled_config(source: DiTConfig, recipe: Recipe) -> DiTConfig:
    """The architecture that `recipe` makes of `source`.

    Raises:
        UsageError: the source has several experts, or the numbers do not fit together.
    """
    if source.num_experts > 1:
        raise UsageError(f"the source has {source.num_experts} experts already; give a dense DiT, or one of one expert")
    if source.num_experts == 0:
        width, kind, layers = source.mlp_width, source.mlp, recipe.moe_layers or "all"
        shared, shared_ratio = (2 if recipe.shared_expert else 0), 1.0
    else:
        width, kind, layers = source.expert_width, source.expert_mlp, source.moe_layers
        shared, shared_ratio = source.num_shared_experts, source.shared_expert_ratio
        if recipe.shared_expert and source.shared_width:
            raise UsageError("--shared-expert: the source has a shared expert already, and keeps it")
        if recipe.shared_expert:
            shared, shared_ratio = 2, 1.0
        if replace(source, moe_layers=recipe.moe_layers or layers).moe_indices != source.moe_indices:
            raise UsageError(f"--moe-layers {recipe.moe_layers}: the source's experts are in {layers}, and stay there")
    if width % recipe.split:
        raise UsageError(f"--split {recipe.split} does not divide the {width} hidden units of the MLP")
    return replace(
        source,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        expert_mlp=kind,
        expert_ratio=width / recipe.split / source.hidden_size,
        num_shared_experts=shared,
        shared_expert_ratio=shared_ratio,
        norm_topk_prob=recipe.routing == "normalize",
        routed_scaling_factor=_scaling_factor(source, recipe),
        moe_layers=layers,
    )


def _scaling_factor(source: DiTConfig, recipe: Recipe) -> float:
    """G / (sum of the K routing weights): the K/G replicas that a token gets are cut into G experts each.

    A one-expert source weighs its expert by its own factor, since a softmax over one is 1.
    """
    weights_sum = 1.0 if recipe.routing == "normalize" else recipe.num_experts_per_tok / recipe.num_experts
    return recipe.split / weights_sum * (source.routed_scaling_factor if source.num_experts else 1.0)


@torch.no_grad()
def upcycle(source: DiT, recipe: Recipe, generator: torch.Generator) -> DiT:
    """The mixture of experts that computes what `source` computes, up to rounding.

    Expert r*G + g of a block is slice g of replica r: F/G of the MLP's hidden units, and 1/G of its output bias.

    Whole replicas are chosen, since the G router rows of a replica are equal (the virtual groups of arXiv 2410.07524)
    and K is a multiple of G: its slices tie with each other and with none else, so the K highest are the K/G highest
    replicas. Only where two replicas tie to the last bit at the edge of the K highest, which one token in some hundred
    thousand does, may a token get slices of both.

    Returns:
        a model that shares with `source` all tensors but those of the MoE layers.
    """
    config = upcycled_config(source.config, recipe)
    with torch.device("meta"):
        model = DiT(config)
    for index in config.moe_indices:
        moe = model.blocks[index].moe.to_empty(device="cpu")
        # The router of a one-expert source is drawn anew too: it never had a gradient.
        rows = torch.zeros(recipe.num_experts // recipe.split, config.hidden_size)  # (R, D)
        if std := router_deviation(recipe, config):
            rows.normal_(std=std, generator=generator)
        moe.gate.weight.copy_(rows.repeat_interleave(recipe.split, dim=0))
        replicate(mlp_of(source.blocks[index]), moe.experts)
        if recipe.shared_expert:
            for projection in moe.shared_experts.gate_up_proj.weight.chunk(2):
                nn.init.xavier_uniform_(projection, generator=generator)
            nn.init.zeros_(moe.shared_experts.down_proj.weight)

    wanted = {name for name in model.state_dict() if ".moe.gate." not in name and ".moe.experts." not in name}
    kept = {name: tensor for name, tensor in source.state_dict().items() if name in wanted}
    model.load_state_dict(kept, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    return model.eval().requires_grad_(False)


def router_deviation(recipe: Recipe, config: DiTConfig) -> float:
    """Of the fresh router's weights: where no flag says so, muP's own rule, since the router has to learn by it."""
    if not is_mup(config) or recipe.router_init_std is not None or not recipe.router_std:
        return recipe.router_std
    return RULES["router"].deviation(config.hidden_size)


def mlp_of(block: DiTBlock) -> Experts:
    """The MLP of a dense block, or the one expert of a sparse one, as stacked experts with E = 1; shares its memory."""
    if block.is_moe:
        return block.moe.experts
    mlp = block.mlp
    with torch.device("meta"):
        if isinstance(mlp, SwiGLUMLP):
            experts = SwiGLUExperts(mlp.down_proj.out_features, mlp.down_proj.in_features, num_experts=1)
            names = {"gate_up_proj": "gate_up_proj.weight", "down_proj": "down_proj.weight"}
        else:
            experts = GELUExperts(mlp.fc1.in_features, mlp.fc1.out_features, num_experts=1)
            names = {name: name.replace("_", ".") for name, _ in experts.named_parameters()}
    tensors = mlp.state_dict()
    experts.load_state_dict({name: tensors[theirs].detach()[None] for name, theirs in names.items()}, assign=True)
    return experts


@torch.no_grad()
def replicate(original: Experts, experts: Experts) -> None:
    """Fill `experts` (E, narrower by G) with the hidden units of `original` (1): expert r*G + g gets slice g."""
    wide, narrow = original.hidden_units(), experts.hidden_units()
    for name, units in narrow.items():  # (E, F/G, I)
        split = wide[name].shape[1] // units.shape[1]
        slices = wide[name].unflatten(1, (split, -1))  # (1, G, F/G, I)
        units.unflatten(0, (-1, split)).copy_(slices)  # (R, G, F/G, I)
    if isinstance(experts, GELUExperts):
        experts.fc2_bias.copy_(original.fc2_bias / split)  # no hidden unit's own: each slice of a replica adds a share


@torch.no_grad()
def break_symmetry(model: DiT, source: DiT, recipe: Recipe, generator: torch.Generator) -> None:
    """Make the experts differ, in place.

    Drop-upcycling (arXiv 2502.19261): a random share of each expert's hidden units, with all their weights in and out
    (here also the bias), is drawn from normal distributions of the mean and standard deviation that the original
    matrices have. Noise: every weight gets `expert_noise` times the standard deviation of its original matrix.
    """
    for index in model.config.moe_indices:
        original = mlp_of(source.blocks[index]).hidden_units()
        std = {name: units.std() for name, units in original.items()}
        mean = {name: units.mean() for name, units in original.items()}
        experts = model.blocks[index].moe.experts.hidden_units()  # {name: (E, F/G, I)}
        width = model.config.expert_width
        for expert in range(recipe.num_experts):
            dropped = torch.randperm(width, generator=generator)[: round(recipe.drop_ratio * width)]
            for name, units in experts.items():
                fresh = torch.randn(len(dropped), units.shape[2], generator=generator)
                units[expert, dropped] = mean[name] + std[name] * fresh
                if recipe.expert_noise and not name.endswith("bias"):
                    noise = torch.randn(units.shape[1:], generator=generator)
                    units[expert] += recipe.expert_noise * std[name] * noise


if __name__ == "__main__":
    cli.run(main, get_parser())
