"""Families of diffusion transformers: each is a module with its sizes, its names and what it spells.

What a family's module has:

    ROWS             name of --model -> fields of `DiTConfig`
    NAMES            the names in its files (`names.NameMap`); MARK, a pattern of one that no other family has
    NAMES_WRITTEN    those of new ones, where files of several spellings are read
    spells(config)   whether its names can say all that a model has
    find_folder, read_folder, known, description    where its checkpoints are folders, and what these tell
    write_folder                                    and how such a folder is written

And where it is not as in `USUAL`, which `fact` knows:

    QK_NORM          which one its published models have, where they have one
    EXPERTS_ARE_MLPS whether an expert is as wide as the feed-forward, where no flag says how wide
    TRAINING         flags of train.py whose defaults are others
    OBJECTIVE        what its files were trained with, where they do not tell
    KNOWN            fields of `DiTConfig` that its files have and shapes do not tell, or what makes them of names
    TEXTS            fields of `DiTConfig` that its rows have when they read texts

The first family that recognises a file takes it; DiT takes what no other one does.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

import diffmoe
import diffusers_dit
import dit
import dsmoe
import large_dit
import pixart
import promoe
from names import without_wrappers

USUAL = {"QK_NORM": "head", "EXPERTS_ARE_MLPS": False, "TRAINING": {}, "OBJECTIVE": {}, "KNOWN": {}, "TEXTS": {}}
FAMILIES = (large_dit, pixart, promoe, diffmoe, dsmoe, diffusers_dit, dit)
DiT_models: dict[str, dict] = {name: row for family in reversed(FAMILIES) for name, row in family.ROWS.items()}


def fact(family, name: str):
    """What a family's module says of itself, or what is usual: `name` is one of `USUAL`."""
    return getattr(family, name, USUAL[name])


def family_of(names: Iterable[str]):
    """Of the tensors of a file."""
    plain = [without_wrappers(name) for name in names]
    return next(family for family in FAMILIES if any(family.MARK.fullmatch(name) for name in plain) or family is dit)


def known_of(names: Iterable[str]) -> dict:
    """What the names of a file say of its model, beside what shapes do: `KNOWN` of its family."""
    names = list(names)
    facts = fact(family_of(names), "KNOWN")
    return facts(names) if callable(facts) else facts


def family_for(config):
    """The first whose names can say all of a model."""
    return next(family for family in FAMILIES if family.spells(config))


def family_of_row(name: str):
    return next(family for family in FAMILIES if name in family.ROWS)


def from_published(
    state_dict: Mapping[str, Tensor], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Rename a published state dict to this project's names; one that has them already passes unchanged."""
    return family_of(state_dict).NAMES.to_ours(state_dict, device, dtype)


def to_published(state_dict: Mapping[str, Tensor], flash_names: bool = False, config=None) -> dict[str, Tensor]:
    """The inverse of `from_published`, in the names of the family that has words for all of `config` (None: DiT's).

    `flash_names` writes `Wqkv`/`out_proj`, as the published XL and G files of DiT-MoE have.
    """
    family = dit if config is None else family_for(config)
    names = dit.FLASH_NAMES if family is dit and flash_names else getattr(family, "NAMES_WRITTEN", family.NAMES)
    return names.to_theirs(state_dict, config)
