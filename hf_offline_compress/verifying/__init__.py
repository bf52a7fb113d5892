"""Verification of a finished folder: does it load in a clean environment, and is it free of what must not be published?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifact.record import read_record, weight_files, write_record
from ..artifact.sizes import folder_files, outside_links, trainer_files
from ..errors import CompressionError, shortened
from ..foundation.progress import stage
from .card import card_check
from .checks import Check, Verification, outcome
from .code import code_check
from .content import content_checks
from .loading import load_checks
from .onnx_files import onnx_checks

__all__ = ["Check", "Verification", "check_files", "folder_files", "trainer_files", "verify_folder", "write_record"]


def verify_folder(folder: str | Path, *, trust_remote_code: bool = False, token: str | None = None) -> Verification:
    """Return whether a compressed folder can be published: its files, its code, its card, and loading it.

    It is loaded in two fresh processes, one with this package and one without. The second runs the code in the
    folder, but only if that is ours byte by byte.

    Args:
        folder: written by `compress`, or by `save_pretrained` of a compressed model.
        trust_remote_code: run the folder's code even if it is not ours.
        token: for the Hub; no file may hold it, nor the one that you are logged in with.

    Raises:
        CompressionError: it is no folder of a compressed model.
    """
    path = Path(folder)
    with stage("checking the files"):
        checks, record = _file_checks(path, token)
    code = next(check for check in checks if check.name == "code")
    if code.status == "failed" and trust_remote_code:
        noted = Check(
            "code", "passed", f"It is run at your request, although it is not this package's: {code.sentence}"
        )
        checks = [noted if check is code else check for check in checks]
    if any(check.name == "formats" and check.status == "failed" for check in checks):
        loading = [Check("loading", "skipped", "It was not loaded, because some files may run code.")]
    else:
        with stage("loading in fresh processes, with the package and without it"):
            loading = load_checks(path, record, run_code=code.status == "passed" or trust_remote_code)
    return Verification(path.resolve().name, (*checks, *loading))


def check_files(folder: str | Path) -> Verification:
    """Return the checks of `verify_folder` that need no loading: nothing of the folder is run, and no torch is imported.

    Raises:
        CompressionError: it is no folder of a compressed model.
    """
    path = Path(folder)
    return Verification(path.resolve().name, tuple(_file_checks(path)[0]))


def _file_checks(folder: Path, token: str | None = None) -> tuple[list[Check], dict[str, Any] | None]:
    """Return the checks of the files, and the folder's record if it has a readable one."""
    from ..artifact.reading import compressed_config, is_compressed, is_part

    if not is_compressed(folder):
        raise CompressionError(
            f"'{folder}' is not a compressed folder: it needs a config.json of a compressed model. "
            "`hf-offline-compress compress` writes such folders."
        )
    try:
        compressed_config(folder)
        config = Check("config", "passed", "config.json is that of a compressed model.")
    except CompressionError as error:
        config = Check("config", "failed", str(error))
    links = [f"{name} is a link to somewhere outside the folder" for name in outside_links(folder)]
    left, unknown = trainer_files(folder), [name for name in folder_files(folder) if not is_part(name)]
    more = f" Trainer's files, including pickles, are left out of a push: {shortened(left)}." if left else ""
    more += f" Not part of the model, so left out unless included: {shortened(unknown)}." if unknown else ""
    checks = [
        outcome("files", links, f"{len(folder_files(folder))} files, all in the folder itself.{more}"),
        config,
        *content_checks(folder, token),
        code_check(folder),
        card_check(folder),
    ]
    try:
        record = read_record(folder)
    except ValueError as error:
        return [*checks, Check("record", "failed", f"verification.json cannot be used: {error}.")], None
    if record is None:
        sentence = (
            "There is no verification.json: it was not saved by compress, so the rest is checked as far as possible."
        )
        checks.append(Check("record", "skipped", sentence))
    return [*checks, _weights_check(folder, record), *onnx_checks(folder)], record


def _weights_check(folder: Path, record: dict[str, Any] | None) -> Check:
    found = weight_files(folder)
    size = (
        f"{len(found)} weight file{'s' if len(found) != 1 else ''}, {sum(f['bytes'] for f in found.values()):,} bytes"
    )
    if not found:
        return Check("weights", "failed", "There are no weights: no safetensors file is in the folder.")
    if record is None:
        return Check("weights", "skipped", f"{size}; their original contents are not recorded.")
    recorded = record["weights"]
    problems = [f"{name} is missing" for name in recorded if name not in found]
    problems += [f"{name} is not among the recorded files" for name in found if name not in recorded]
    for name in sorted(found.keys() & recorded.keys()):
        if found[name]["bytes"] != recorded[name]["bytes"]:
            problems.append(
                f"{name} has {found[name]['bytes']:,} bytes, and {recorded[name]['bytes']:,} when it was saved"
            )
        elif found[name] != recorded[name]:
            problems.append(f"{name} has the recorded size, but not the recorded content")
    if problems:
        problems.append("if you changed them yourself, delete verification.json")
    return outcome("weights", problems, f"{size}, exactly as they were saved.")
