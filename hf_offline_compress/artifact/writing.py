"""A finished folder: written whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.checkpoint import clamp_length, copy_companions
from ..errors import CompressionError
from ..foundation import files
from ..foundation.files import read_json, whole_folder
from ..foundation.memory import release_memory
from ..foundation.preflight import check_room, shard_bytes
from ..foundation.progress import stage
from ..foundation.tokenizer_files import compact_tokenizer
from ..foundation.unfinished import UnfinishedRun, leftover_of, remove_unfinished
from .reading import EVALUATION_FILE, REPORT_FILE, is_compressed, is_part
from .record import read_record, write_record
from .saved import check_saved
from .sizes import file_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .report import Report

logger = logging.getLogger(__name__)


def check_target(folder: Path, overwrite: bool, inputs: Iterable[str | Path] = (), *, resume: bool = False) -> None:
    """Raise CompressionError unless a folder can be written there; see `files.check_target`.

    What an unfinished run for the same folder has left is in the way, unless it is to be resumed or may be replaced.
    """
    files.check_target(folder, overwrite, is_compressed, "this package", inputs)
    if not (resume or overwrite) and (left := leftover_of(folder)):
        raise CompressionError(
            f"An unfinished run for output folder '{folder}' lies in '{left.name}' beside it; resume it with --resume "
            "(resume=True), or pass --overwrite (overwrite=True) to discard it."
        )


def save_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: Report,
    source: Path | None,
    overwrite: bool,
    max_shard_size: str | int,
    write_card: Callable[[Path, Path], None] | None = None,
    run: UnfinishedRun | None = None,
) -> Path:
    """Write weights, config, code, tokenizer, report and companions beside the target, then rename; return its path.

    `write_card(folder, partial)`, where given, writes the card of the finished folder, which still has another name. What
    an unfinished run for the folder has left, the `run` that gave this model or another one, is of no more use then.

    Raises:
        CompressionError: see `check_target`; or what was saved does not say what the model says.
    """
    check_target(folder, overwrite, [source] if source else (), resume=run is not None)
    shard = shard_bytes(max_shard_size)
    check_room(folder, int(report.totals["stored_bytes"]))
    release_memory()  # the base may have gone just now
    with whole_folder(folder, is_compressed if overwrite else None, _keep) as partial:
        with stage(f"saving {folder.name}"):
            model.save_pretrained(partial, max_shard_size=shard)
        if tokenizer is not None:
            clamp_length(tokenizer, model.config).save_pretrained(partial)
            _forget_paths(partial / "tokenizer_config.json")
        with _accessory("Not all files that come with the base were copied"):
            if source is not None:
                copy_companions(source, partial, pruned=report.vocabulary is not None)
        compact_tokenizer(partial)
        with _accessory(f"{REPORT_FILE} was not written"):
            content = report.to_dict()
            content["totals"]["folder_bytes"] = sum(file_sizes(partial).values())
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (partial / REPORT_FILE).write_text(text + "\n", "utf-8")
        with stage("loading the saved model to check it"):
            write_record(partial, model)
            release_memory()  # what was decoded is not needed for the other
            check_saved(partial, model)
        with _accessory("No model card was written; `hf-offline-compress card` writes one later"):
            if write_card is not None:
                write_card(folder, partial)
    if run is not None:
        run.remove()
    elif left := leftover_of(folder):
        remove_unfinished(left)
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
