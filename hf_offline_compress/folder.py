"""A finished folder: written whole or not at all, and read back without torch."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .base import COMPANIONS, clamp_length, copy_companions, pipeline_root
from .errors import CompressionError
from .families import FAMILIES
from .files import read_json, whole_folder
from .preflight import check_room, shard_bytes
from .progress import stage
from .runtime.architectures_compressed import CLASS_PREFIX, MODEL_TYPES, TYPE_PREFIX
from .schemas import CONFIG, EVALUATION, REPORT, check
from .tensor_files import check_weights
from .verifying.files import folder_files
from .verifying.record import RECORD_FILE, read_record, write_record
from .verifying.saved import check_saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .report import Report

REPORT_FILE = "compression_report.json"
CARD_FILE, EVALUATION_FILE = "README.md", "evaluation.json"
EVALUATION_FORMAT = 1
ADVICE = "Get the folder again from where it came, or compress the base anew."
# What is written beside companions, and so is replaced with the folder.
WRITTEN = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\w+_compressed\.py|"
    rf"(.*/)?__pycache__/.*|{REPORT_FILE}|{RECORD_FILE}|{CARD_FILE}|{EVALUATION_FILE}"
)
MODULE_FILE = re.compile(r"\d+_[\w-]+/[^/]+\.(json|txt|safetensors)")  # of sentence-transformers
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderContents:
    """What is in a compressed folder.

    Attributes:
        name: last component of its path.
        config: the contents of config.json.
        report: the contents of the compression report; None where the model was saved anew after it was compressed, as
            Trainer does.
        weights: file name → bytes on disk, of every safetensors file.
    """

    name: str
    config: dict[str, Any]
    report: dict[str, Any] | None
    weights: dict[str, int]

    def __repr__(self) -> str:
        """Return one line."""
        return f"<FolderContents: {self.name}, {self.weight_bytes / 1e6:.2f} MB of weights>"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(self.weights.values())

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
    weights = {name: (path / name).stat().st_size for name in folder_files(path) if name.endswith(".safetensors")}
    return FolderContents(path.resolve().name, config, report, weights)


def compressed_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a compressed folder.

    Raises:
        CompressionError: it is no compressed folder, or the file is damaged.
    """
    config = read_json(folder / "config.json")
    if config is None or str(config.get("model_type")) not in MODEL_TYPES:
        raise CompressionError(
            f"'{folder}' is no compressed folder: it needs a config.json of a compressed model. "
            "`hf-offline-compress compress` writes such folders."
        )
    title = f"The config.json of '{folder.name}'"
    check(config, CONFIG, title, ADVICE)
    family = FAMILIES[config["model_type"].removeprefix(TYPE_PREFIX)]
    named = config["architectures"][0] if config["architectures"] else ""
    if not named.startswith(CLASS_PREFIX) or not family.owns(named.removeprefix(CLASS_PREFIX)):
        found = config["architectures"][0] if config["architectures"] else "none"
        raise CompressionError(
            f"{title} names '{found}' in architectures, which is no compressed {family.title}. {ADVICE}"
        )
    return config


def stock_name(config: dict[str, Any]) -> str:
    """Return the stock class of a compressed folder's base, as its config names it."""
    return str(config["architectures"][0]).removeprefix("Compressed")


def check_fit(info: dict[str, Any], what: str, advice: str, body: str = "") -> None:
    """Raise CompressionError where weights have other shapes than config.json says.

    Args:
        info: what transformers says of loading, with `ignore_mismatched_sizes`.
        what: for the error: which folder does not load.
        advice: what to do, for the error.
        body: how names begin that must fit; those of a new head need not.
    """
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        if key.startswith(body):
            raise CompressionError(
                f"{what}: {key} has shape {list(stored)}, and config.json says {list(wanted)}. {advice}"
            )


def _report(folder: Path) -> dict[str, Any] | None:
    title = f"The {REPORT_FILE} of '{folder.name}'"
    if not os.path.lexists(folder / REPORT_FILE):
        return None
    report = read_json(folder / REPORT_FILE)
    if report is None:
        raise CompressionError(f"{title} cannot be read: it is no JSON mapping. {ADVICE}")
    check(report, REPORT, title, ADVICE)
    if not any(family.owns(report["architecture"]) for family in FAMILIES.values()):
        raise CompressionError(
            f"{title} names the architecture '{report['architecture']}', which this version does not know. {ADVICE}"
        )
    return report


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
        raise CompressionError(f"{title} cannot be read: it is no JSON mapping. {advice}")
    if content.get("format_version") != EVALUATION_FORMAT:
        raise CompressionError(
            f"{title} has format {content.get('format_version')!r}, and this version reads format {EVALUATION_FORMAT}. {advice}"
        )
    check(content, EVALUATION, title, advice)
    return content


def check_target(folder: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Raise CompressionError unless a folder can be written there; see `files.check_target`."""
    files.check_target(folder, overwrite, is_compressed, "this package", inputs)


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
        CompressionError: see `check_target`; or what was saved does not say what the model says.
    """
    from .card import write_card_if_possible  # which reads folders by this module

    check_target(folder, overwrite, [source] if source else ())
    shard = shard_bytes(max_shard_size)
    check_room(folder, int(report.totals["stored_bytes"]))
    with whole_folder(folder, is_compressed if overwrite else None, _keep) as partial:
        with stage(f"saving {folder.name}"):
            model.save_pretrained(partial, max_shard_size=shard)
        if tokenizer is not None:
            clamp_length(tokenizer, model.config).save_pretrained(partial)
            _forget_paths(partial / "tokenizer_config.json")
        with _accessory("Not all files that come with the base were copied"):
            if source is not None:
                copy_companions(source, partial)
        with _accessory(f"{REPORT_FILE} was not written"):
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
            (partial / REPORT_FILE).write_text(text + "\n", "utf-8")
        with stage("loading what was saved, to check it"):
            write_record(partial, model)
            check_saved(partial, model)
        with _accessory("No model card was written; `hf-offline-compress card` writes one later"):
            if _keep_notes(folder / CARD_FILE, partial / CARD_FILE):
                write_card_if_possible(
                    partial, name=folder.resolve().name, base=pipeline_root(source) if source else None
                )
    return folder


def _keep(old: Path, new: Path) -> None:
    """Carry over what users have put into a folder that is replaced, and their evaluations.

    Those of other weights get another name, so that they are not taken for the new ones'.
    """
    files.keep_others(old, new, is_part)
    evaluation = old / EVALUATION_FILE
    if evaluation.is_file():
        numbers = ("", *(f"-{i}" for i in range(2, 1000)))
        earlier = (new / f"evaluation.previous{number}.json" for number in numbers)
        same = _recorded_weights(old) == _recorded_weights(new)
        place = new / EVALUATION_FILE if same else next(file for file in earlier if not file.exists())
        shutil.copyfile(evaluation, place)


def _recorded_weights(folder: Path) -> object:
    try:
        return (read_record(folder) or {}).get("weights")
    except ValueError:
        return None


def _keep_notes(old: Path, new: Path) -> bool:
    """Begin the new card with the user's notes of the old one; return whether there is a card to write.

    A README.md that is no card of ours is kept as it is.
    """
    from .card.writing import BEGIN, END, free_section

    try:
        text = old.read_text("utf-8") if old.is_file() else ""
    except (OSError, UnicodeDecodeError):
        text = None
    notes = free_section(text) if text else None
    if text is None or (text.strip() and notes is None):
        shutil.copyfile(old, new)
        return False
    if notes is not None:  # its metadata is of what the old folder was made from
        new.write_text(f"---\n---\n{BEGIN}\n{notes}{END}\n", "utf-8")
    return True


@contextmanager
def _accessory(lost: str) -> Iterator[None]:
    """Do what the model can be used without: where it fails, whatever the reason, the model is kept and that is said."""
    try:
        yield
    except Exception as error:
        if files.is_out_of_space(error):  # what follows would fail too
            raise
        logger.warning("%s: %s", lost, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _forget_paths(file: Path) -> None:
    """Drop the place on disk that a tokenizer was loaded from."""
    values = read_json(file)
    if values and any(values.pop(key, None) for key in ("name_or_path", "_name_or_path")):
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def is_part(name: str) -> bool:
    """Return whether a file, by its name relative to a compressed folder, belongs to the model there."""
    return bool(name in COMPANIONS or WRITTEN.fullmatch(name) or MODULE_FILE.fullmatch(name))


def is_compressed(folder: Path) -> bool:
    """Return whether a folder is that of a compressed model, as its config.json says."""
    config = read_json(folder / "config.json")
    return config is not None and str(config.get("model_type")) in MODEL_TYPES
