"""New ids in a config: of special tokens, and of lists of tokens in a generation config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Lists of tokens, or of sequences of tokens, that are never generated, or always.
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
SINGLE = "_token_id"


def named_ids(values: Mapping[str, Any]) -> set[int]:
    """Return the tokens that a config names, such as that for padding."""
    found: set[int] = set()
    for key, value in values.items():
        if key.endswith(SINGLE):
            found.update(item for item in (value if isinstance(value, list) else [value]) if _is_id(item))
    return found


def renumbered(values: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """Return the changes of a config; pruned tokens are removed from lists, with the sequences that contain them.

    Args:
        values: of a config, or of a generation config.
        numbers: id → new id; what a config names outside of these is not a token of the model, and stays as it is.
    """
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if key.endswith(SINGLE) and _is_id(value):
            changed[key] = numbers.get(value, value)
        elif key.endswith(SINGLE) and isinstance(value, list):
            changed[key] = [numbers.get(item, item) for item in value]
        elif key in LISTS and isinstance(value, list):
            changed[key] = _listed(value, numbers) or None
    return {key: value for key, value in changed.items() if value != values[key]}


def _listed(items: list[Any], numbers: Mapping[int, int]) -> list[Any]:
    kept = []
    for item in items:
        if isinstance(item, list):
            if all(number in numbers for number in item):
                kept.append([numbers[number] for number in item])
        elif item in numbers or item < 0:
            kept.append(numbers.get(item, item))
    return kept


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
