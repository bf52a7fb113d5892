"""The code in a folder: is it ours, and so safe to run?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..artifact.sizes import folder_files
from ..version import __version__
from .checks import Check, outcome

RUNTIME = Path(__file__).resolve().parents[1] / "runtime"
_STEP = re.compile(r"checkpoint-\d+/[^/]+$")
_MODULE = re.compile(r"sentence_transformers\.[\w.]+")
# A name without a dot imports nothing: so transformers' own configs call their activations.
_ACTIVATION = re.compile(r"torch\.nn\.[\w.]+|\w+")
_OURS = re.compile(r"(configuration|modeling)_compressed\.Compressed\w+")


def code_check(folder: Path) -> Check:
    """Return whether a folder holds the code of this version of the package, whole, unchanged, and no other.

    Files are compared byte by byte with the package's own. What config files tell the auto classes to run must be in
    them, too.
    """
    ours = {file.name: file.read_bytes() for file in RUNTIME.glob("*_compressed.py")}
    # Hidden files are not published, but they could be imported.
    there = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.py"))]
    # Trainer saves the code with every step, too.
    there = [name for name in there if not (_STEP.match(name) and _is_one_of(folder / name, ours))]
    changed = [name for name in there if name in ours and (folder / name).read_bytes() != ours[name]]
    foreign = [name for name in there if name not in ours]
    missing = sorted(ours.keys() - set(there))
    problems = [f"{name} is not the code of hf-offline-compress {__version__}" for name in changed]
    problems += [f"{name} is not part of hf-offline-compress" for name in foreign]
    problems += [f"{name} is missing" for name in missing]
    problems += _foreign_references(folder)
    return outcome("code", problems, f"The code is that of hf-offline-compress {__version__}, byte by byte.")


def _is_one_of(file: Path, known: dict[str, bytes]) -> bool:
    return file.is_file() and file.read_bytes() == known.get(file.name)


def _foreign_references(folder: Path) -> list[str]:
    """Return a phrase for each `auto_map` that is missing or leads to other code than ours."""
    problems = []
    for name in folder_files(folder):
        if not name.endswith(".json") or name.endswith(("tokenizer.json", "vocab.json")):
            continue
        try:
            content = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        problems += [f"{name} refers to other code, '{target[:60]}'" for target in _pipeline_code(name, content)]
        targets = list(_targets(content.get("auto_map"))) if isinstance(content, dict) else []
        if name == "config.json" and not targets:
            problems.append("config.json has no auto_map, so it cannot be loaded without the package")
        foreign = [target for target in targets if not _OURS.fullmatch(target)]
        if foreign:
            problems.append(f"{name} refers to other code, '{foreign[0][:60]}'")
    return problems


def _pipeline_code(name: str, content: Any) -> list[str]:
    """Return the classes outside of sentence-transformers and PyTorch that its config files, and pipelines, import."""
    if name == "modules.json":
        entries = content if isinstance(content, list) else [content]
        types = [str(entry.get("type", "")) if isinstance(entry, dict) else str(entry) for entry in entries]
        return [module for module in types if not _MODULE.fullmatch(module)]
    if not isinstance(content, dict):
        return []
    activation = content.get("activation_function") if "/" in name else None  # of a Dense module
    pipelines = content.get("custom_pipelines") or ()
    classes = [] if activation is None or _ACTIVATION.fullmatch(str(activation)) else [str(activation)]
    return classes + ([str(pipelines)] if pipelines else [])


def _targets(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if isinstance(content, dict):
        content = list(content.values())
    return [target for item in content for target in _targets(item)] if isinstance(content, list) else []
