"""A finished folder: written whole or not at all, and read back without torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import clamp_length, copy_companions
from .errors import CompressionError
from .registration import MODEL_TYPES
from .verifying.record import write_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .report import Report

REPORT_FILE = "compression_report.json"


@dataclass(frozen=True)
class FolderContents:
    """What is in a compressed folder.

    Attributes:
        name: last component of its path.
        config: the contents of config.json.
        report: the contents of the compression report.
        weights: file name → bytes on disk, of every safetensors file.
    """

    name: str
    config: dict[str, Any]
    report: dict[str, Any]
    weights: dict[str, int]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(self.weights.values())


def inspect_folder(folder: str | Path) -> FolderContents:
    """Return what is in a compressed folder; neither torch nor weights are loaded.

    Raises:
        CompressionError: it is no folder that this package has written.
    """
    path = Path(folder)
    config = _read(path / "config.json")
    report = _read(path / REPORT_FILE)
    if not is_compressed(path) or config is None or report is None:
        raise CompressionError(
            f"'{folder}' is no compressed folder: it needs a config.json of a compressed model and a {REPORT_FILE}. "
            "`hf-offline-compress compress` writes such folders."
        )
    weights = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*.safetensors"))}
    return FolderContents(path.resolve().name, config, report, weights)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CompressionError unless a folder can be written there."""
    if folder.is_file():
        raise CompressionError(f"'{folder}' is a file; pass a folder that is not there yet.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CompressionError(
            f"The output folder '{folder}' is not empty; pass another, or --overwrite (overwrite=True) to replace it."
        )
    if not is_compressed(folder):
        raise CompressionError(
            f"The output folder '{folder}' was not written by this package, and so is not overwritten; pass another."
        )


def save_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: Report,
    source: Path | None,
    overwrite: bool,
    max_shard_size: str | int,
) -> Path:
    """Write weights, config, code, tokenizer, report and companions beside the target, then rename; return its path.

    Raises:
        CompressionError: see `check_target`.
    """
    from .card import write_card_if_possible  # which reads folders by this module

    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            clamp_length(tokenizer, model.config).save_pretrained(partial)
            _forget_paths(partial / "tokenizer_config.json")
        if source is not None:
            copy_companions(source, partial)
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (partial / REPORT_FILE).write_text(text + "\n", "utf-8")
        write_record(partial, model)
        write_card_if_possible(partial, name=folder.name, base=source)
        _settle(partial)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _replace(partial: Path, folder: Path) -> None:
    """Put the finished folder into its place; a folder that was there is gone only once the new one stands."""
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give the temporary folder and its files the permissions that ordinary ones have."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def _forget_paths(file: Path) -> None:
    """Drop the place on disk that a tokenizer was loaded from."""
    values = _read(file)
    if values and any(values.pop(key, None) for key in ("name_or_path", "_name_or_path")):
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def is_compressed(folder: Path) -> bool:
    """Return whether a folder is that of a compressed model, as its config.json says."""
    config = _read(folder / "config.json")
    return config is not None and config.get("model_type") in MODEL_TYPES


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None
