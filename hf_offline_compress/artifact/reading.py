"""A finished folder: written whole or not at all, and read back without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.families import FAMILIES
from ..base.checkpoint import COMPANIONS
from ..errors import CompressionError
from ..foundation.files import read_json
from ..foundation.schemas import check
from ..foundation.tensor_files import check_weights
from ..runtime.architectures_compressed import CLASS_PREFIX, MODEL_TYPES, TYPE_PREFIX
from .record import RECORD_FILE
from .schemas import CONFIG, EVALUATION, REPORT
from .sizes import file_sizes

REPORT_FILE = "compression_report.json"
CARD_FILE, EVALUATION_FILE = "README.md", "evaluation.json"
EVALUATION_FORMAT = 1
ADVICE = "Download the folder again, or compress the base again."
# What is written beside companions, and so is replaced with the folder.
EXPORT_FILE = "export.json"  # the record of an export
ONNX_FOLDER = "onnx"  # of a compressed folder, where ONNX files may lie beside its own weights
WRITTEN = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\w+_compressed\.py|"
    rf"(.*/)?__pycache__/.*|{REPORT_FILE}|{RECORD_FILE}|{CARD_FILE}|{EVALUATION_FILE}|"
    rf"{ONNX_FOLDER}/(model(_quantized)?\.onnx|config\.json|export\.json)"
)
FITTED = "Layers were coded in order: their errors are relative to what they were fitted to, not to the base's weights."
MODULE_FILE = re.compile(r"\d+_[\w-]+/[^/]+\.(json|txt|safetensors)")  # of sentence-transformers


@dataclass(frozen=True)
class FolderContents:
    """What is in a compressed folder.

    Attributes:
        name: last component of its path.
        config: the contents of config.json.
        report: the contents of the compression report; None where the model was saved anew after it was compressed, as
            Trainer does.
        files: file name → bytes on disk, of every file that would be published.
    """

    name: str
    config: dict[str, Any]
    report: dict[str, Any] | None
    files: dict[str, int]

    def __repr__(self) -> str:
        """Return one line."""
        return f"<FolderContents: {self.name}, {self.weight_bytes / 1e6:.2f} MB of weights>"

    @property
    def weights(self) -> dict[str, int]:
        """File name → bytes of every safetensors file."""
        return {name: size for name, size in self.files.items() if name.endswith(".safetensors")}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(self.weights.values())

    @property
    def folder_bytes(self) -> int:
        """Bytes of all files: weights, tokenizer, code, report, card and whatever else is there."""
        return sum(self.files.values())

    @property
    def architecture(self) -> str:
        """Stock class of the base."""
        return str(self.report["architecture"]) if self.report else stock_name(self.config)


def inspect_folder(folder: str | Path) -> FolderContents:
    """Return what is in a compressed folder; neither torch nor weights are loaded.

    Raises:
        CompressionError: it is no folder that this package has written.
    """
    path = Path(folder)
    config = compressed_config(path)
    report = _report(path)
    check_weights(path, ADVICE)
    return FolderContents(path.resolve().name, config, report, file_sizes(path))


def compressed_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a compressed folder.

    Raises:
        CompressionError: it is not a compressed folder, or the file is damaged.
    """
    config = read_json(folder / "config.json")
    if config is None or str(config.get("model_type")) not in MODEL_TYPES:
        raise CompressionError(
            f"'{folder}' is not a compressed folder: it needs a config.json of a compressed model. "
            "`hf-offline-compress compress` writes such folders."
        )
    title = f"The config.json of '{folder.name}'"
    check(config, CONFIG, title, ADVICE)
    family = FAMILIES[config["model_type"].removeprefix(TYPE_PREFIX)]
    named = config["architectures"][0] if config["architectures"] else ""
    if not named.startswith(CLASS_PREFIX) or not family.owns(named.removeprefix(CLASS_PREFIX)):
        found = config["architectures"][0] if config["architectures"] else "none"
        raise CompressionError(
            f"{title} names '{found}' in architectures, which is not a compressed {family.title}. {ADVICE}"
        )
    return config


def stock_name(config: dict[str, Any]) -> str:
    """Return the stock class of a compressed folder's base, as its config names it."""
    return str(config["architectures"][0]).removeprefix("Compressed")


def _report(folder: Path) -> dict[str, Any] | None:
    title = f"The {REPORT_FILE} of '{folder.name}'"
    if not os.path.lexists(folder / REPORT_FILE):
        return None
    report = read_json(folder / REPORT_FILE)
    if report is None:
        raise CompressionError(f"{title} cannot be read: it is not a JSON object. {ADVICE}")
    check(report, REPORT, title, ADVICE)
    if not any(family.owns(report["architecture"]) for family in FAMILIES.values()):
        raise CompressionError(
            f"{title} names the architecture '{report['architecture']}', which this version does not know. {ADVICE}"
        )
    return report


def note_on_errors(rounds: Sequence[Mapping[str, float | None]] | None) -> str:
    """Return what must be said of errors where the `rounds` of a report have kept layers coded in order; else nothing."""
    return FITTED if _is_kept(rounds, "in_order") else ""


def last_norm_kept(rounds: Sequence[Mapping[str, float | None]] | None) -> bool:
    """Return whether the norm before the head is one that was fitted, by the `rounds` of a report."""
    return _is_kept(rounds, "last_norm")


def _is_kept(rounds: Sequence[Mapping[str, float | None]] | None, step: str) -> bool:
    """Return whether a step of a round was kept, as it was decided then: if less was measured than at any step before it."""
    steps = ("measured", "in_order", "last_norm")
    for told in rounds or ():
        # None is NaN, which narrow dtypes may give and any number is better than, or a step that was not taken.
        before = [value for name in steps[: steps.index(step)] if (value := told.get(name)) is not None]
        after = told.get(step)
        if after is not None and all(after < value for value in before):
            return True
    return False


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the contents of a folder's evaluation.json; None if there is none.

    Raises:
        CompressionError: it is not of the form that `evaluate` writes.
    """
    file, title = folder / EVALUATION_FILE, f"The {EVALUATION_FILE} of '{folder.name}'"
    advice = "Delete it, and evaluate again."
    if not os.path.lexists(file):
        return None
    content = read_json(file)
    if content is None:
        raise CompressionError(f"{title} cannot be read: it is not a JSON object. {advice}")
    if content.get("format_version") != EVALUATION_FORMAT:
        raise CompressionError(
            f"{title} has format {content.get('format_version')!r}, and this version reads format {EVALUATION_FORMAT}. {advice}"
        )
    check(content, EVALUATION, title, advice)
    return content


def is_part(name: str) -> bool:
    """Return whether a file, by its name relative to a compressed folder, belongs to the model there."""
    return bool(name in COMPANIONS or WRITTEN.fullmatch(name) or MODULE_FILE.fullmatch(name))


def is_compressed(folder: Path) -> bool:
    """Return whether a folder is that of a compressed model, as its config.json says."""
    config = read_json(folder / "config.json")
    return config is not None and str(config.get("model_type")) in MODEL_TYPES
