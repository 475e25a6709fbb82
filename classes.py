"""The classes of a model: how many it knows, which of them it was trained on, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass

from cli import UsageError, unknown_name


@dataclass(frozen=True)
class Classes:
    """Labels 0 .. count - 1, of which the data named the first ones.

    A published file names none: then all were trained.
    """

    count: int  # without the null class
    names: tuple[str, ...] = ()

    @property
    def trained(self) -> range:
        """The labels that the training data had."""
        return range(min(len(self.names), self.count) or self.count)

    def name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)

    def label(self, text: str) -> int:
        """The label that a number or a name stands for; digits are always a number.

        Raises:
            UsageError: there is none.
        """
        if text.isdecimal():
            if int(text) >= self.count:
                raise UsageError(f"class label {text} is not one of the model's classes 0..{self.count - 1}")
            return int(text)
        if text not in self.names:
            if not self.names:
                raise UsageError(f"class label {text!r}: the file names no classes; give numbers 0..{self.count - 1}")
            raise unknown_name("class", text, self.names)
        return self.names.index(text)

    def untrained(self, labels: Sequence[int]) -> list[int]:
        """Those of `labels` that the training data did not have, each once."""
        return sorted({label for label in labels if label not in self.trained})
