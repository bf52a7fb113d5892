"""Numbers and tokens from callers; NumPy scalars are accepted."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from ..errors import CompressionError

LARGEST_SEED = 2**32 - 1


def real(value: object, label: str) -> float:
    """Return a plain number.

    Raises:
        CompressionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CompressionError(f"`{label}` must be a number, not {value!r}.")
    return int(value) if isinstance(value, Integral) else float(value)


def whole(value: object, label: str, least: int, most: int | None = None) -> int:
    """Return a plain integer.

    Raises:
        CompressionError: it is none, or out of bounds.
    """
    bounds = f"of {least:,} or more" if most is None else f"from {least:,} to {most:,}"
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        raise CompressionError(f"`{label}` must be an integer {bounds}, not {value!r}.")
    return number


def seed_of(value: object) -> int:
    """Return a seed that all generators of random numbers take.

    Raises:
        CompressionError: it is not an integer, or out of bounds.
    """
    return whole(value, "seed", 0, LARGEST_SEED)


def token_of(token: Any) -> Any:
    """Return a token for the Hub without the blanks and ends of lines that copying leaves around it; others as they are.

    Raises:
        CompressionError: it is empty, or no request could carry it.
    """
    if not isinstance(token, str):
        return token
    stripped = token.strip()
    if not stripped:
        raise CompressionError("The token for the Hub is empty; pass one, or leave `token` (--token) out.")
    if not (stripped.isascii() and stripped.isprintable()) or " " in stripped:
        raise CompressionError(
            "The token for the Hub contains a space, a line break, or another character that no token has; copy it again from "
            "https://huggingface.co/settings/tokens."
        )
    return stripped
