"""Which matrices a recipe or a rule is for: kinds, shorthands, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..architectures.families import KINDS, SHORTHANDS
from ..architectures.layout import Matrix
from ..errors import CompressionError, listing
from ..foundation.parsing import check_pattern


def matches(matrix: Matrix, selectors: tuple[str, ...]) -> bool:
    """Return whether kinds, shorthands or regular expressions name the matrix."""
    for selector in selectors:
        if selector in SHORTHANDS or selector in KINDS:
            if matrix.kind in SHORTHANDS.get(selector, (selector,)):
                return True
        elif re.fullmatch(selector, matrix.name):
            return True
    return False


def split_selectors(text: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the selectors of a text with commas between them; commas inside brackets belong to an expression."""
    if text is None or not isinstance(text, str):
        return None if text is None else tuple(text)
    return tuple(part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text))


def names_of(content: object, label: str) -> tuple[str, ...]:
    """Return a tuple of names from a list, or from one text (`modules` may have commas in it)."""
    names = content
    if isinstance(names, str):
        names = split_selectors(names) if label == "modules" else [names]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CompressionError(f"`{label}` must be a name or a list of names, not {content!r}.")
    return tuple(name.strip() for name in names if name.strip())


def check_selectors(selectors: tuple[str, ...]) -> None:
    """Raise unless every selector is a kind, a shorthand, or plausibly a regular expression."""
    if not selectors:
        raise CompressionError("`modules` is empty; name at least one kind.")
    for selector in selectors:
        if selector in KINDS or selector in SHORTHANDS:
            continue
        if re.fullmatch(r"\w+", selector):
            raise CompressionError(
                f"The kind of modules '{selector}' is unknown; known are {listing((*KINDS, *SHORTHANDS))}, "
                r"or a regular expression that matches whole module names, e.g. 'encoder\.layer\.[0-5]\..*'."
            )
        check_pattern(selector)
