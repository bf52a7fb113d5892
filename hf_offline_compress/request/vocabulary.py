"""Which tokens of the vocabulary stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CompressionError
from ..foundation.arguments import real, whole


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that stay: those of a text, all of them or the most frequent.

    Attributes:
        text: "bundled", texts, a file with one text a line, or a data set's name.
        size: how many tokens stay; what the text lacks is filled up with the most probable tokens of its writing systems.
        coverage: share of the text's tokens that stay, the most frequent first; all where there is no size either.
    """

    text: str | tuple[str, ...]
    size: int | None = None
    coverage: float | None = None

    def __post_init__(self) -> None:
        """Reject two measures, and those that nothing or everything fits."""
        if self.size is not None and self.coverage is not None:
            raise CompressionError("A vocabulary has either a size or a coverage; give one of them.")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise CompressionError(
                f"The vocabulary's coverage is {self.coverage}; it is a share of the text's tokens, above 0 and at most 1."
            )

    @property
    def source(self) -> str:
        """How reports call the text; of a file its name alone."""
        if not isinstance(self.text, str):
            return "caller"
        return Path(self.text).name if Path(self.text).is_file() else self.text

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for as plain JSON, without the texts themselves."""
        asked = {"text": self.source, "size": self.size, "coverage": self.coverage}
        return {key: value for key, value in asked.items() if value is not None}


def vocabulary_of(text: object = None, size: object = None, coverage: object = None) -> Vocabulary:
    """Return a vocabulary from what users write.

    Raises:
        CompressionError: there is no text, or a number is none.
    """
    if text is None:
        raise CompressionError(
            "A vocabulary's size or coverage needs the text whose tokens stay; pass vocabulary (--vocabulary), a file with "
            "one text a line."
        )
    if text == "none":
        raise CompressionError("The vocabulary's text is 'none'; leave vocabulary out to keep all tokens.")
    if isinstance(text, Path):
        text = str(text)
    if not isinstance(text, str):
        lines = tuple(text) if isinstance(text, Iterable) else (text,)
        if not all(isinstance(line, str) for line in lines):
            raise CompressionError(
                "The vocabulary must be texts, a file with one text per line, or a dataset name, not "
                f"{type(text).__name__} with what is no text in it."
            )
        text = lines
    return Vocabulary(
        text,
        None if size is None else whole(size, "vocabulary_size", 1),
        None if coverage is None else float(real(coverage, "vocabulary_coverage")),
    )
