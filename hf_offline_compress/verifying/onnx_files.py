"""Are the ONNX files in a compressed folder those that were made, and made from the weights beside them?"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ..artifact.reading import EXPORT_FILE, ONNX_FOLDER, is_part
from ..artifact.record import fingerprint, weight_files
from ..artifact.sizes import folder_files
from ..foundation.files import read_json
from .checks import Check, outcome


def onnx_checks(folder: Path) -> list[Check]:
    """Return the check of what an export has put into a compressed folder; none where it has none. Nothing is loaded."""
    there = [PurePosixPath(name) for name in folder_files(folder) if name.startswith(f"{ONNX_FOLDER}/")]
    there = [name for name in there if is_part(str(name)) or name.suffix == ".onnx"]
    if not there:
        return []
    record = read_json(folder / ONNX_FOLDER / EXPORT_FILE) or {}
    own = [name for name in there if str(name) != f"{ONNX_FOLDER}/{EXPORT_FILE}"]
    found = {name.relative_to(ONNX_FOLDER).as_posix(): fingerprint(folder / name) for name in own}
    files, problems = record.get("files"), []
    if not isinstance(files, dict):
        problems.append(f"{ONNX_FOLDER}/{EXPORT_FILE} is missing or damaged")
    else:
        problems += [
            f"{ONNX_FOLDER}/{name} is not what was exported" for name in found if found[name] != files.get(name)
        ]
        problems += [f"{ONNX_FOLDER}/{name} is missing" for name in files if name not in found]
        if record.get("weights") != weight_files(folder):
            problems.append("they were exported from other weights than the folder's")
    if problems:
        problems.append("export them again with --into-folder --overwrite, or delete the folder onnx/")
    sizes = [file["bytes"] for name, file in found.items() if name.endswith(".onnx")]
    sentence = (
        f"{len(sizes)} ONNX file{'s' if len(sizes) != 1 else ''}, {sum(sizes):,} bytes, made from the folder's weights."
    )
    return [outcome("onnx", problems, sentence)]
