"""Languages and prompts of a base's texts, as its files name them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import CompressionError
from ..foundation.files import read_json
from ..foundation.parsing import read_yaml

PROMPTS_FILE = "config_sentence_transformers.json"
# A longer prompt would leave little of a text.
PROMPT_CHARACTERS = 400
_FRONT = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s", re.DOTALL)


def languages_of(folder: Path) -> tuple[str, ...]:
    """Return the languages that a base's own card, its README.md, names, in small letters; empty where it names none."""
    try:
        front = _FRONT.match((folder / "README.md").read_text("utf-8-sig"))
        found = read_yaml(front[1], "The base's card") if front else None
    except (OSError, UnicodeDecodeError, CompressionError):  # a card that cannot be read says nothing
        return ()
    named = found.get("language") if isinstance(found, dict) else None
    listed = named if isinstance(named, list) else [named]
    listed = ["no" if each is False else each for each in listed]  # YAML takes Norwegian for a truth value
    return tuple(each.lower() for each in listed if isinstance(each, str) and each.lower() != "code")


def read_prompts(folder: Path) -> tuple[dict[str, Any], Any]:
    """Return the prompts of a sentence-transformers base as its file has them, by name, and the name of the default one."""
    found = read_json(folder / PROMPTS_FILE) or {}
    prompts = found.get("prompts")
    return prompts if isinstance(prompts, dict) else {}, found.get("default_prompt_name")


def prompts_of(folder: Path) -> tuple[str, ...]:
    """Return the prompts that a sentence-transformers base puts before texts, each once, in order; empty if it has none.

    An empty prompt counts where there are others: texts of that kind are read as they are.
    """
    named, _ = read_prompts(folder)
    found = dict.fromkeys(each for each in named.values() if isinstance(each, str) and len(each) <= PROMPT_CHARACTERS)
    return tuple(found) if any(found) else ()
