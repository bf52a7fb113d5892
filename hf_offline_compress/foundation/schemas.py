"""Schemas: what a JSON file must contain to be read.

A schema is

- a type: integers are numbers too, and truth values are none;
- a tuple: any of these, None among them;
- a list of one schema: a list of such;
- a mapping: of these names, where `?` at the end marks one that may be missing; of `str`, any names.
"""

from __future__ import annotations

from typing import Any

from ..errors import CompressionError

NUMBER = (int, float)

TEXT, COUNT = (str, None), (int, None)

ANYTHING = object

WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    None: "null",
}


def check(content: Any, schema: Any, title: str, advice: str) -> None:
    """Raise CompressionError unless a file's content is as a schema has it.

    Args:
        content: plain JSON.
        schema: see this module.
        title: of the file, e.g. "The config.json of 'small'".
        advice: what to do, for the error.
    """
    if problem := mismatch(content, schema):
        raise CompressionError(f"{title} cannot be used: {problem}. {advice}")


def mismatch(content: Any, schema: Any, place: str = "") -> str | None:
    """Return where and how plain JSON differs from a schema, or None."""
    if isinstance(schema, tuple):
        found = [mismatch(content, each, place) for each in schema]
        # What is of the right kind says more than what is not.
        near = (p for p, each in zip(found, schema, strict=True) if isinstance(content, _kind(each)))
        return None if None in found else next(near, None) or _wrong(content, schema, place)
    if schema is None:
        return None if content is None else _wrong(content, (None,), place)
    if not isinstance(content, _kind(schema)) or (isinstance(content, bool) and schema in (int, float)):
        return _wrong(content, (schema,), place)
    return _within_mismatch(content, schema, place)


def _within_mismatch(content: Any, schema: Any, place: str) -> str | None:
    """Return the first mismatch within a list or mapping, or None."""
    if isinstance(schema, list):
        return _first(mismatch(each, schema[0], f"{place}[{i}]") for i, each in enumerate(content))
    if isinstance(schema, dict):
        if str in schema:
            return _first(mismatch(each, schema[str], _within(place, key)) for key, each in content.items())
        names = {name.removesuffix("?"): each for name, each in schema.items()}
        if missing := [name for name in schema if not name.endswith("?") and name not in content]:
            return f"{_within(place, missing[0])} is missing"
        return _first(mismatch(content[n], each, _within(place, n)) for n, each in names.items() if n in content)
    return None


def _kind(schema: Any) -> type | tuple[type, ...]:
    """Return the type that a schema's content has."""
    if isinstance(schema, dict | list):
        return type(schema)
    if schema is None:
        return type(None)
    return (int, float) if schema is float else schema


def _wrong(content: Any, schemas: tuple[Any, ...], place: str) -> str:
    kinds = [type(each) if isinstance(each, dict | list) else each for each in schemas]
    words = [WORDS[each] for each in dict.fromkeys(kinds) if not (each is int and float in kinds)]
    shown = repr(content)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
    return f"{place or 'it'} must be {' or '.join(words)}, not {shown}"


def _within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem), None)
