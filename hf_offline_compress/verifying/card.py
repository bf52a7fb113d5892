"""Does the model card parse, as far as that can be said without the Hub?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import CompressionError
from ..foundation.parsing import read_yaml
from .checks import Check

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_check(folder: Path) -> Check:
    """Return whether README.md is a card that the Hub would take: metadata that parse, of the types that it asks for."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    file = folder / "README.md"
    if not file.is_file():
        return Check("card", "skipped", "There is no README.md; `hf-offline-compress card` writes one.")
    try:
        text = file.read_text("utf-8-sig")
        block = REGEX_YAML_BLOCK.search(text)
        if block is None:
            sentence = "README.md has no metadata: it must begin with a YAML block between two lines of ---."
            return Check("card", "failed", sentence)
        data = read_yaml(block[2], "its metadata block") or {}
        problem = _metadata_problem(data) if isinstance(data, dict) else "the metadata must be names and values"
        if problem:
            return Check("card", "failed", f"In README.md {problem}.")
        ModelCard(str(ModelCard(text)))  # also as it would be written back
    except (OSError, ValueError, TypeError, KeyError, AttributeError, CompressionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        return Check("card", "failed", f"README.md cannot be read as a model card: {reason}.")
    return Check("card", "passed", "README.md parses, and its metadata has the types that the Hub expects.")


def _metadata_problem(data: dict[str, Any]) -> str | None:
    """Return what the Hub would refuse in a card's metadata, or None."""
    for key in ("license", "library_name", "pipeline_tag", "license_name"):
        if not isinstance(data.get(key, ""), str):
            return f"'{key}' must be a string"
    for key in ("tags", "datasets", "language", "base_model", "metrics"):
        value = data.get(key) or []
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            return f"'{key}' must be a string or a list of strings"
        if key == "base_model" and not all(_REPOSITORY.fullmatch(entry) for entry in entries):
            return f"'base_model' must be a Hub id, not '{entries[0]}'"
    return None
