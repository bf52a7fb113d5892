"""Writing systems: which a text uses, and what is written in them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

LEAST_SHARE = 1e-3  # of a text's letters: a foreign name or two do not make it a text in that script


def script_of(character: str) -> str | None:
    """Return the writing system of a letter, mark or digit, as the first word of its Unicode name; None for all else."""
    if character.isascii() and not character.isalpha():
        return None
    if unicodedata.category(character)[0] not in "LMN":
        return None
    return unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]


def scripts_of(texts: Iterable[str]) -> set[str]:
    """Return the writing systems that texts use, each for at least `LEAST_SHARE` of all letters."""
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    found: Counter[str] = Counter()
    for character, count in characters.items():
        if script := script_of(character):
            found[script] += count
    return {script for script, count in found.items() if count >= LEAST_SHARE * found.total()}


def is_written_in(text: str, scripts: set[str]) -> bool:
    """Return whether all letters of a text, one at least, are of these writing systems."""
    used = {script for character in text if (script := script_of(character))}
    return bool(used) and used <= scripts


def is_common(character: str) -> bool:
    """Return whether a character belongs to no writing system and may occur in any text."""
    kind = unicodedata.category(character)
    return script_of(character) is None and (kind[0] == "P" or kind == "Sc" or ord(character) < 0x100)
