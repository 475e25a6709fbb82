"""DiT, DiT-MoE and DiT-muP: their sizes, and the names in their files."""

import re

from names import NameMap, rule

SIZES = {  # depth, hidden size, heads
    "Nano": (3, 64, 4),  # for the quick start and tests; not a published size
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "G": (40, 1408, 16),
}
PATCHES = {"Nano": (1, 2), "G": (2,)}  # where not all; 1 is for deep latents, a 16th of an image's side or less


def size_of(name: str) -> dict:
    """The fields of `DiTConfig` that `SIZES` are of."""
    return dict(zip(("depth", "hidden_size", "num_heads"), SIZES[name], strict=True))


ROWS = {
    f"DiT-{size}/{patch}": size_of(size) | {"patch_size": patch}
    for size in SIZES
    for patch in PATCHES.get(size, (1, 2, 4, 8))
}
ROWS |= {  # DiT-muP (arXiv 2505.15270): heads of 72, trained under muP
    f"DiT-muP-{heads}h/2": dict(
        depth=28, hidden_size=72 * heads, patch_size=2, num_heads=heads, parametrization="mup", base_width=288
    )
    for heads in (2, 4, 8, 16)
}
MARK = re.compile(r"blocks\.0\.attn\.(qkv|Wqkv)\.weight")

EXPERTS = (
    rule(
        "blocks.{b}.moe.experts.gate_up_proj",
        *(f"blocks.{{b}}.moe.experts.{{e}}.{kind}_proj.weight" for kind in ("gate", "up")),
    ),
    rule("blocks.{b}.moe.experts.down_proj", "blocks.{b}.moe.experts.{e}.down_proj.weight"),
    rule(
        "blocks.{b}.moe.shared_experts.gate_up_proj.weight",
        *(f"blocks.{{b}}.moe.shared_experts.{kind}_proj.weight" for kind in ("gate", "up")),
    ),
)
FLASH_ATTENTION = (  # in the files of XL and G with experts
    rule("blocks.{b}.attn.qkv.{w}", "blocks.{b}.attn.Wqkv.{w}"),
    rule("blocks.{b}.attn.proj.{w}", "blocks.{b}.attn.out_proj.{w}"),
)
NAMES_WRITTEN = NameMap(*EXPERTS)
NAMES = FLASH_NAMES = NameMap(*EXPERTS, *FLASH_ATTENTION)  # in reading, both spellings are known


def tells(args: dict) -> bool:
    """Whether the flags of a training, which are in its `.pt` files, say more than shapes do: those of DiT-muP."""
    return "mup" in args


def known(args: dict) -> dict:
    """The fields of `DiTConfig` that they tell and shapes do not; of the base, what is usual."""
    if not args["mup"]:
        return {"num_heads": args["num_heads"], "parametrization": "standard"}
    return {
        "num_heads": args["num_heads"],
        "parametrization": "mup",
        "output_mult": 2.0 ** args.get("logstd", 0),
    }


def description(args: dict) -> dict:
    """What they tell besides: of `checkpoint.Description`."""
    found = {name: args[name] for name in ("image_size",) if isinstance(args.get(name), int)}
    space = {"space": {"path": args["vae"]}} if args.get("vae") in ("ema", "mse") else {}
    return {"objective": {"name": "ddpm"}} | space | found


def spells(config) -> bool:
    """These names are this project's own: they say everything."""
    return True
