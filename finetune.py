"""What a new run takes from a file of weights (`--init-from`), and what it begins anew.

The label table follows the classes of the new data: a class that both know by name keeps its row, and so does the null
class. Where neither file nor data name classes otherwise, a table of the same size is kept as it is.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import checkpoint
from cli import UsageError
from conditions import Classes
from configuration import DiTConfig
from models import DiT
from parametrization import PARAMETRIZATIONS

TABLE = "y_embedder.embedding_table.weight"
ENDS = ("x_embedder", "final_layer")  # the parts whose shapes depend on channels and patches


@dataclass
class Start:
    """The weights of a file, fitted to another model."""

    weights: checkpoint.Weights
    rows: list[int | None] | None  # the file's row for each of ours, None for a fresh one; None: the table as it is
    fresh: tuple[str, ...]  # parts that are not taken

    def state_dict(self, model: DiT, seed: int) -> dict[str, Tensor]:
        """What to put into `model`, by name, buffers too; other parameters stay as they were drawn. Positions are not
        of it, as they belong to the size of the image.

        Raises:
            UsageError: names or shapes differ beyond what is known to.
        """
        expected = {name: t for name, t in model.state_dict().items() if not name.startswith(self.fresh)}
        meta = {name: t for name, t in self.weights.meta.items() if not name.startswith(self.fresh)}
        if self.rows is not None:
            meta[TABLE] = expected[TABLE]
        checkpoint.check_fit(expected, replace(self.weights, meta=meta), any_size=True)
        left = ("pos_embed", *self.fresh)
        tensors = {name: t for name, t in self.weights.state_dict.items() if not name.startswith(left)}
        if self.rows is not None:
            tensors[TABLE] = self._table(tensors[TABLE], seed)
        return tensors

    def _table(self, table: Tensor, seed: int) -> Tensor:
        """The label table with its rows in their new places; fresh ones are the same on every process."""
        generator = torch.Generator().manual_seed(seed)
        deviation = PARAMETRIZATIONS[self.weights.config.parametrization].table_deviation
        made = torch.randn(len(self.rows), table.shape[1], generator=generator) * deviation
        for row, source in enumerate(self.rows):
            if source is not None:
                made[row] = table[source].float()
        return made

    def in_words(self) -> list[str]:
        """A line for each thing that is not as in the file."""
        lines = []
        if self.rows is not None:
            kept = sum(row is not None for row in self.rows)
            lines.append(f"label table: {kept} of {len(self.rows)} rows from {self.weights.source}, the others fresh")
        if self.fresh:
            lines.append(f"fresh, not from {self.weights.source}: {', '.join(self.fresh)}")
        return lines


def fit(weights: checkpoint.Weights, config: DiTConfig, classes: Classes, fresh_parts: bool) -> Start:
    """How the model of `config`, for data of `classes`, starts from `weights`.

    Raises:
        UsageError: channels or patches differ, and `fresh_parts` does not say that new ends are welcome.
    """
    theirs, before = weights.config, weights.condition
    sizes = {"in_channels": "channels", "patch_size": "patches"}
    different = [
        f"{what} {getattr(theirs, name)} there, {getattr(config, name)} here"
        for name, what in sizes.items()
        if getattr(theirs, name) != getattr(config, name)
    ]
    if different and not fresh_parts:
        raise UsageError(
            f"--init-from {weights.source}: {'; '.join(different)}: its {' and '.join(ENDS)} do not fit; "
            f"--fresh-parts begins these anew"
        )
    return Start(
        weights, _rows(theirs, before, config, classes), (*(ENDS if different else ()), *_gates(weights, config))
    )


def _gates(weights: checkpoint.Weights, config: DiTConfig) -> tuple[str, ...]:
    """What routers have of their own, there or here, and not both.

    Raises:
        UsageError: one of them has more experts.
    """
    if weights.config.expert_count != config.expert_count:
        there, here = weights.config, config
        raise UsageError(
            f"--init-from {weights.source}: router {there.router} has {there.expert_count} experts, {here.router} "
            f"{here.expert_count}: experts cannot be taken over"
        )
    with torch.device("meta"):
        ours = {name for name in DiT(config).state_dict() if ".moe.gate." in name}
    return tuple(sorted(ours ^ {name for name in weights.meta if ".moe.gate." in name}))


def _rows(theirs: DiTConfig, before: Classes, config: DiTConfig, classes: Classes) -> list[int | None] | None:
    """The file's row of each label, or None if the table stays."""
    if config.caption_width:  # a text embedder has no rows
        return None
    same_names = not (before.names and classes.names) or before.names == classes.names
    same_null = (theirs.null_class is None) == (config.null_class is None)
    if theirs.num_classes == config.num_classes and same_names and same_null:
        return None
    known = {name: row for row, name in enumerate(before.names)}
    rows = [known.get(classes.names[label]) if label < len(classes.names) else None for label in range(classes.count)]
    return rows + ([theirs.null_class] if config.null_class is not None else [])
