"""YAML and regular expressions from users, read within bounds of time and memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from numbers import Integral
from re import _parser  # type: ignore[attr-defined]  # the standard library has no public way to see a pattern's parts
from typing import Any

from ..errors import CompressionError

MOST_YAML_BYTES, MOST_YAML_VALUES = 2**20, 10**5
MOST_DEPTH = 50
MOST_PATTERN, MOST_REPEATS = 500, 4


def read_yaml(text: str, label: str) -> Any:
    """Return what a YAML text holds: plain values, of a size that its own bounds.

    Args:
        text: YAML. A few lines of aliases can stand for gigabytes, so they count as what they stand for.
        label: names the file in errors.

    Raises:
        CompressionError: it is no YAML, nested too deep, or larger than a recipe or a card's metadata can be.
    """
    import yaml

    if len(text) > MOST_YAML_BYTES:
        raise CompressionError(f"{label} is larger than 1 MB, the maximum.")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # step by step: deep nesting is slow to read whole
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise CompressionError(f"{label} is nested too deeply.")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _values(root, {}) > MOST_YAML_VALUES:
            raise CompressionError(f"{label} has aliases that stand for too many values; write out what is meant.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise CompressionError(f"{label} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise CompressionError(f"{label} holds a value within itself.") from error


def _values(node: Any, known: dict[int, int]) -> int:
    """Return how many values a YAML node stands for, aliases written out."""
    if id(node) not in known:
        children = node.value if isinstance(node.value, list) else []
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in flat)
    return known[id(node)]


def check_pattern(pattern: str) -> None:
    """Raise unless a text is a regular expression that takes little time on any name.

    Python's `re` tries all ways of a match; repeats within repeats make that exponential, and each further repeat
    multiplies it by the length of the name.

    Raises:
        CompressionError: it is no valid expression, too long, or has repeats within repeats, backward references, or more
            repeats than `MOST_REPEATS`.
    """
    if len(pattern) > MOST_PATTERN:
        raise CompressionError(
            f"The regular expression '{pattern[:40]}…' has {len(pattern)} characters; at most {MOST_PATTERN} are allowed. "
            "Pass several shorter ones."
        )
    try:
        re.compile(pattern)
        repeats, nested = _repeats(_parser.parse(pattern), inside=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise CompressionError(f"'{pattern}' is not a valid regular expression: {error}.") from error
    if nested or repeats > MOST_REPEATS:
        raise CompressionError(
            f"The regular expression '{pattern}' may take forever: it must have no nested repeats, no "
            rf"backreferences, and at most {MOST_REPEATS} repeats (*, +, {{m,n}}), e.g. 'encoder\.layer\.\d+\..*'."
        )


def _repeats(parts: Iterable[Any], *, inside: bool) -> tuple[int, bool]:
    """Return how many repeats a parsed pattern has, and whether any lies in another, or refers back."""
    count, nested = 0, False
    for operation, argument in parts:
        name = str(operation)
        repeat = name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and argument[1] > 1
        count += repeat
        nested |= (repeat and inside) or name.startswith("GROUPREF")
        for child in _children(name, argument):
            # Alternatives that are repeated may begin alike, which is as bad.
            more, deeper = _repeats(child, inside=inside or repeat)
            count, nested = count + more, nested or deeper or (repeat and _has_branch(child))
    return count, nested


def _children(name: str, argument: Any) -> list[Any]:
    if name == "BRANCH":
        return list(argument[1])
    if isinstance(argument, tuple | list):
        return [part for part in argument if isinstance(part, _parser.SubPattern)]
    return [argument] if isinstance(argument, _parser.SubPattern) else []


def _has_branch(parts: Iterable[Any]) -> bool:
    return any(
        str(operation) == "BRANCH" or any(map(_has_branch, _children(str(operation), argument)))
        for operation, argument in parts
    )


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(value: object) -> int:
    """Return bytes, from an integer or a text such as "6MB" (of 10⁶ bytes) or "500 kB".

    Raises:
        CompressionError: it is neither.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kKmMgGtT]?[bB]?)\s*", str(value))
    if not match or match[2].lower() not in UNITS:
        raise CompressionError(
            f"The size {value!r} is unknown; give bytes, or a number with kB, MB, GB or TB, e.g. 6MB."
        )
    return int(float(match[1]) * UNITS[match[2].lower()])
