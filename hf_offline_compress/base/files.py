"""The files of a base: what is damaged is found, and named, before anything is loaded."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CompressionError, listing
from ..foundation.tensor_files import INDEX_FILE, check_weights, damage, stand_in

SAFETENSORS = ("model.safetensors", INDEX_FILE)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADVICE = "Download it again, or save the model again with save_pretrained."


def check_base_weights(folder: Path, name: str) -> None:
    """Raise CompressionError unless a base has weights, and all its weight files are whole.

    Args:
        folder: of the checkpoint.
        name: how the base is called.
    """
    if not (present := [file for file in (*SAFETENSORS, *PICKLES) if (folder / file).is_file()]):
        raise CompressionError(
            f"'{name}' has no weights: none of {listing((*SAFETENSORS, *PICKLES))} is there. "
            "Save a model with save_pretrained, or pass another base."
        )
    if present[0] == PICKLES[1]:
        shards = read_base_json(folder / PICKLES[1], name).get("weight_map")
        files = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not files:
            raise CompressionError(f"The {PICKLES[1]} of '{name}' lists no weight files. {ADVICE}")
    else:
        files = [PICKLES[0]] if present[0] == PICKLES[0] else []
    for file in files:
        if problem := _pickle_damage(folder / file):
            raise CompressionError(f"The {file} of '{name}' {problem}. {ADVICE}")
    if not files:
        check_weights(folder, ADVICE, name)


def check_base_texts(folder: Path, name: str, files: Iterable[str]) -> None:
    """Raise CompressionError unless files that travel along are what their names say.

    Args:
        folder: of the checkpoint.
        name: how the base is called.
        files: their names in the folder; JSON must be JSON, vocabularies must be UTF-8. What is not there is passed over.
    """
    for file in files:
        path = folder / file
        if not path.is_file():
            continue
        if file.endswith(".json"):
            read_base_json(path, name, dict, list)
        elif file.endswith(("vocab.txt", "merges.txt", ".jinja")):
            _text(path, name)
        elif what := _stand_in_of(path):
            raise CompressionError(f"The {file} of '{name}' is {what}: the download went wrong. {ADVICE}")


def check_module_weights(folder: Path, name: str) -> None:
    """Raise CompressionError if weights of a module of sentence-transformers, which travel along, are damaged.

    Args:
        folder: of the module.
        name: how the base is called.
    """
    for file, problem_of in ((SAFETENSORS[0], damage), (PICKLES[0], _pickle_damage)):
        if not (folder / file).is_file():
            continue
        if problem := problem_of(folder / file):
            raise CompressionError(f"The {folder.name}/{file} of '{name}' {problem}. {ADVICE}")
        return  # pickles are read only where there are no safetensors


def read_base_json(file: Path, name: str, *wanted: type) -> Any:
    """Return the contents of a JSON file of a base.

    Args:
        file: must be there.
        name: how the base is called.
        *wanted: types, of one of which it must be; a mapping by default.

    Raises:
        CompressionError: it cannot be read, or is of another type.
    """
    try:
        content = json.loads(_text(file, name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CompressionError):
            raise
        raise CompressionError(f"The {file.name} of '{name}' cannot be read as JSON: {error}. {ADVICE}") from error
    if not isinstance(content, wanted or dict):
        kinds = "list" if wanted == (list,) else "mapping or list" if wanted else "mapping"
        raise CompressionError(f"The {file.name} of '{name}' is not a JSON {kinds}. {ADVICE}")
    return content


def _text(file: Path, name: str) -> str:
    try:
        content = file.read_bytes()
        if what := stand_in(content[:64]):
            raise CompressionError(f"The {file.name} of '{name}' is {what}: the download went wrong. {ADVICE}")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CompressionError(
            f"The {file.name} of '{name}' is not UTF-8 text (byte {error.start:,}); convert it, or download it again."
        ) from error
    except OSError as error:
        raise CompressionError(f"The {file.name} of '{name}' cannot be read: {error.strerror}. {ADVICE}") from error


def _stand_in_of(file: Path) -> str | None:
    with file.open("rb") as stream:
        return stand_in(stream.read(64))


def _pickle_damage(file: Path) -> str | None:
    """Return what is wrong with a file of pickled weights, as the rest of a sentence; None if it seems whole."""
    if not file.is_file():
        return "is missing"
    with file.open("rb") as stream:
        start = stream.read(64)
    if what := stand_in(start):
        return f"is {what}, not weights: the download went wrong"
    # torch's format of today is a zip archive, the one before a pickle; what is cut off has lost its directory.
    if start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return f"is cut off: it has {file.stat().st_size:,} bytes"
    if not re.match(rb"PK|\x80[\x02-\x05]", start):
        return f"is not a torch.save file, or is cut off: it has {file.stat().st_size:,} bytes"
    return None
