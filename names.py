"""Names of parameters in published files and in this project: a map is a list of rules, read in both directions.

A rule says where the tensor of one name of ours comes from: a tensor of theirs, several whose rows follow one another,
or, with `{e}`, as many as there are experts, one behind the other in a new first dimension. Names without a rule are
the same in both.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cli import UsageError

FIELDS = {"b": r"\d+", "e": r"\d+", "w": "weight|bias"}  # block, expert, kind of parameter


@dataclass(frozen=True)
class Rule:
    """`ours` is made of `theirs`; both are patterns with the fields of `FIELDS`, of which ours lacks `{e}`."""

    ours: str
    theirs: tuple[str, ...]
    rows: Callable | None = None  # (configuration) -> how many rows each of `theirs` has; None: as many each
    shape: tuple[Callable, Callable] | None = None  # theirs -> ours and back, of the tensor's shape

    @property
    def is_stacked(self) -> bool:
        return "{e}" in self.theirs[0]


def rule(ours: str, *theirs: str, **options) -> Rule:
    return Rule(ours, theirs, **options)


class NameMap:
    """The names of one kind of files."""

    def __init__(self, *rules: Rule):
        self.rules = rules
        self._theirs = [(_pattern(name), each, part) for each in rules for part, name in enumerate(each.theirs)]
        self._ours = [(_pattern(each.ours), each) for each in rules]

    def to_ours(self, tensors: Mapping[str, Tensor], device=None, dtype: torch.dtype | None = None) -> dict:
        """Tensors under our names.

        They are read, moved and converted one at a time, so that a lazy mapping of a file needs one copy in memory.

        Raises:
            UsageError: the file lacks a part of a tensor, or parts differ in shape.
        """
        made, sources = {}, {}  # (our name, its rule) -> {(expert, part): their name}
        for name in tensors:
            plain = without_wrappers(name)
            found = self._find(plain)
            if found is None:
                made[plain] = tensors[name].to(device=device, dtype=dtype)
            else:
                each, part, fields = found
                ours = each.ours.format(**fields)
                sources.setdefault((ours, each, fields.get("b"), fields.get("w")), {})[
                    int(fields.get("e", 0)), part
                ] = name
        for (ours, each, b, w), places in sources.items():
            count = 1 + max(expert for expert, _ in places)
            wanted = [(expert, part) for expert in range(count) for part in range(len(each.theirs))]
            if absent := [each.theirs[p].format(b=b, e=e, w=w) for e, p in wanted if (e, p) not in places]:
                raise UsageError(f"the file lacks {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}")
            names = [[places[expert, part] for part in range(len(each.theirs))] for expert in range(count)]
            join = _stacked if each.is_stacked else _joined
            made[ours] = join(each, names if each.is_stacked else names[0], tensors, device, dtype)
        return made

    def to_theirs(self, tensors: Mapping[str, Tensor], config=None) -> dict[str, Tensor]:
        """The inverse; `config` is what `Rule.rows` asks."""
        made = {}
        for name, tensor in tensors.items():
            each, fields = next(
                ((each, match.groupdict()) for pattern, each in self._ours if (match := pattern.fullmatch(name))),
                (None, {}),
            )
            if each is None:
                made[name] = tensor
                continue
            for expert, matrix in enumerate(tensor.unbind(0) if each.is_stacked else [tensor]):
                rows = each.rows(config) if each.rows else [len(matrix) // len(each.theirs)] * len(each.theirs)
                for theirs, piece in zip(each.theirs, matrix.split(rows), strict=True):
                    piece = piece.reshape(each.shape[1](piece.shape)) if each.shape else piece
                    made[theirs.format(e=expert, **fields)] = piece
        return made

    def _find(self, name: str) -> tuple[Rule, int, dict] | None:
        for pattern, each, part in self._theirs:
            if match := pattern.fullmatch(name):
                return each, part, match.groupdict()
        return None


def without_wrappers(name: str) -> str:
    """A parameter's name without what `torch.compile` and data parallelism put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _pattern(name: str) -> re.Pattern:
    literal = re.escape(name)
    for field, pattern in FIELDS.items():
        literal = literal.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{pattern})")
    return re.compile(literal)


def _joined(each: Rule, names: list[str], tensors: Mapping[str, Tensor], device, dtype) -> Tensor:
    parts = [tensors[name].to(device=device, dtype=dtype) for name in names]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.reshape(each.shape[0](whole.shape)) if each.shape else whole


def _stacked(each: Rule, names: list[list[str]], tensors: Mapping[str, Tensor], device, dtype) -> Tensor:
    """(E, rows of all parts, columns)."""
    first = [tensors[name] for name in names[0]]
    ends = [0]
    for part in first:
        ends.append(ends[-1] + len(part))
    whole = first[0].new_empty(len(names), ends[-1], *first[0].shape[1:], device=device, dtype=dtype)
    for expert, parts in enumerate(names):
        for name, expected, start, end in zip(parts, first, ends, ends[1:], strict=False):
            tensor = tensors[name]
            if tensor.shape != expected.shape:
                raise UsageError(f"{name} is {tuple(tensor.shape)}, in the first expert {tuple(expected.shape)}")
            whole[expert, start:end].copy_(tensor.detach())
    return whole
