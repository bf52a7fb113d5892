"""Are the ONNX files in a compressed folder those that were made, and made from the weights beside them?"""

from __future__ import annotations

from pathlib import Path

from ..artifact.reading import ONNX_FOLDER
from ..artifact.record import fingerprint, weight_files
from ..foundation.files import read_json
from .checks import Check, outcome

EXPORT_FILE = "export.json"


def onnx_checks(folder: Path) -> list[Check]:
    """Return the check of the ONNX files in a compressed folder; none where it has none. Nothing is loaded."""
    found = {file.name: fingerprint(file) for file in sorted((folder / ONNX_FOLDER).glob("*.onnx"))}
    if not found:
        return []
    record = read_json(folder / ONNX_FOLDER / EXPORT_FILE) or {}
    again = "export them again with --into-folder --overwrite, or delete the folder onnx/"
    files, problems = record.get("files"), []
    if not isinstance(files, dict) or read_json(folder / ONNX_FOLDER / "config.json") is None:
        problems.append(f"{ONNX_FOLDER}/{EXPORT_FILE} or {ONNX_FOLDER}/config.json is missing or damaged")
    else:
        problems += [
            f"{ONNX_FOLDER}/{name} is not what was exported" for name in found if found[name] != files.get(name)
        ]
        problems += [f"{ONNX_FOLDER}/{name} is missing" for name in files if name not in found]
        if record.get("weights") != weight_files(folder):
            problems.append("they were exported from other weights than the folder's")
    if problems:
        problems.append(again)
    size = sum(file["bytes"] for file in found.values())
    sentence = (
        f"{len(found)} ONNX file{'s' if len(found) != 1 else ''}, {size:,} bytes, made from the folder's weights."
    )
    return [outcome("onnx", problems, sentence)]
