"""A compressed folder evaluated beside its base; what was found goes into the folder's evaluation.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import CompressionError, listing
from ..foundation.arguments import seed_of
from ..foundation.processes import launched_processes
from ..measure.texts import load_texts
from ..metrics.scores import require
from .linear_probe import check_linear_probe, evaluate_linear_probe, is_linear_probe
from .onnx_model import check_onnx
from .pair import Pair, find_pair
from .records import Evaluation, check_writable, saving, with_evaluations, write_evaluations
from .reporting import check_report, write_report
from .retrieval import evaluate_retrieval, is_retrieval
from .task_evaluation import evaluate_task
from .tasks import TaskSettings, find_task
from .text_evaluation import TextSettings, choose_measures, evaluate_text

DTYPES = ("float32", "bfloat16", "float16")


def evaluate_folder(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    onnx: str | Path | None = None,
    text: str | Path | Sequence[str] | None = None,
    task: str | None = None,
    data: str | Path | None = None,
    train_data: str | Path | None = None,
    columns: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    text_settings: TextSettings | None = None,
    task_settings: TaskSettings | None = None,
    fine_tune: bool = False,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    report: str | Path | None = None,
    write: bool = True,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate a compressed folder beside its base, and add what was found to its evaluation.json.

    Under `accelerate launch` several processes share the work, and all return the same.

    Args:
        folder: that this package has written. Its weights are read; code in it is never run.
        base: folder or Hub id of the base; by default what the folder's report names, if that is on the Hub.
        onnx: an ONNX file that was exported from the folder, to evaluate in the place of its weights, in ONNX Runtime; what is
            found stands beside the weights' own evaluations.
        text: to measure perplexity and agreement on: a file with one text per line, a data set's name, or texts.
        task: one of `tasks.TASKS`, e.g. "sst2" or "squad"; "nanobeir", or one of its sets, e.g. "nanobeir:NFCorpus";
            "classification", by a logistic regression on embeddings, or with a data set, e.g. "classification:banking77".
        data: local CSV or JSON file in the place of the task's data set on the Hub; of retrieval a folder as BEIR has them.
        train_data: the same, for fine-tuning and for "classification".
        columns: of these files: those of the texts, then that of the label, by name or by number from 1; found by their
            names if not given.
        measures: on the text: "perplexity", "pseudo_perplexity", "agreement"; by default agreement, and perplexity of
            language models.
        text_settings: how the text is put to the models; its seed is `seed`.
        task_settings: how the task is put to the models, and how they are fine-tuned; the papers' settings by default.
        fine_tune: fine-tune both models on the task first. Without it they answer as they are.
        limit: at most this many texts or examples, from the beginning.
        seed: of masked words, new heads and training.
        batch_size: sequences in one forward pass, at most.
        dtype: to compute in: "float32", "bfloat16" or "float16".
        device: where to compute; by default the CPU, or what `accelerate launch` chooses.
        revision: of a base on the Hub; by default the one that the report names.
        report: an .html or .md file to write all evaluations of the folder to, with figures; an earlier report is replaced.
        write: add what was found to evaluation.json.
        progress: show progress bars.

    Raises:
        CompressionError: something of this cannot be done. Nothing is written then.
        UnsavedError: it was evaluated, but cannot be written; it has the result.
    """
    _check_request(text, task, data, train_data, columns, task_settings, fine_tune, dtype, limit)
    report_file = check_report(report) if report is not None else None
    retrieval = is_retrieval(task)
    linear_probe = is_linear_probe(task)
    found_task = find_task(task) if task is not None and not retrieval and not linear_probe else None
    if found_task is not None:
        require("sklearn", "scipy")
    if linear_probe:
        require("sklearn", *(("datasets",) if data is None else ()))
    loaded = load_texts(text, "evaluation text") if text is not None else None
    if text is not None and loaded is None:
        raise CompressionError("The evaluation text cannot be 'none'; pass a file with one text per line.")
    seed = seed_of(seed)
    check_onnx(onnx, fine_tune, dtype)
    pair = find_pair(folder, base, revision=revision, onnx=onnx)
    if write:
        check_writable(pair.folder)
    chosen = choose_measures(measures, pair.architecture) if loaded else ()
    processes = launched_processes(device)
    found: list[Evaluation] = []
    if loaded is not None:
        settings = text_settings or TextSettings()
        settings = TextSettings(**{**settings.__dict__, "seed": seed})
        found += evaluate_text(
            pair,
            loaded,
            chosen,
            settings,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            processes=processes,
            progress=progress,
        )
    if retrieval:
        found += evaluate_retrieval(
            pair,
            str(task),
            data=data,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            processes=processes,
            progress=progress,
        )
    if linear_probe:
        asked = task_settings or TaskSettings()
        item = evaluate_linear_probe(
            pair,
            str(task),
            data=data,
            train_data=train_data,
            columns=columns,
            length=asked.length,
            per_class=asked.limit,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            processes=processes,
            progress=progress,
        )
        found.append(item)
    if found_task is not None:
        item = evaluate_task(
            pair,
            found_task,
            data=data,
            train_data=train_data,
            columns=columns,
            task_settings=task_settings or TaskSettings(),
            fine_tune=fine_tune,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            processes=processes,
            progress=progress,
        )
        found.append(item)
    found = _of_file(found, pair)
    try:
        if write and processes.is_main:
            with saving(found):
                write_evaluations(pair.folder, found)
        if report_file is not None and processes.is_main:
            with saving(found, report_file.name):
                write_report(report_file, pair.folder, with_evaluations(pair.folder, found))
    finally:
        processes.wait()
    return found


def _of_file(found: list[Evaluation], pair: Pair) -> list[Evaluation]:
    """Return evaluations; of an ONNX file, told apart from those of the weights by their ids and titles."""
    if pair.onnx is None:
        return found
    name = pair.onnx.name
    return [
        replace(
            item,
            id=f"{item.id}:{name}",
            task={**item.task, "name": f"{item.task['name']} ({name})"},
            settings={**item.settings, "onnx": name},
        )
        for item in found
    ]


def _check_request(
    text: str | Path | Sequence[str] | None,
    task: str | None,
    data: str | Path | None,
    train_data: str | Path | None,
    columns: Sequence[str] | None,
    task_settings: TaskSettings | None,
    fine_tune: bool,
    dtype: str,
    limit: int | None,
) -> None:
    """Raise CompressionError for what cannot be evaluated; see `evaluate_folder` for the arguments."""
    if text is None and task is None:
        raise CompressionError("There is nothing to evaluate on; pass --text (text=) or --task (task=), or both.")
    if task is None and (data is not None or train_data is not None or fine_tune):
        raise CompressionError("A data file and fine-tuning belong to a task; name it with --task (task=).")
    if dtype not in DTYPES:
        raise CompressionError(f"The dtype '{dtype}' is not one of {listing(DTYPES)}.")
    if limit is not None and limit < 1:
        raise CompressionError(f"The limit must be at least 1, not {limit}.")
    if is_retrieval(task) and (fine_tune or train_data is not None or columns is not None):
        raise CompressionError(
            f"Retrieval is not trained, and its files have fixed columns; {task} takes --data alone."
        )
    if is_linear_probe(task):
        if fine_tune:
            raise CompressionError(
                f"{task} trains a classifier on embeddings, not the models; leave --fine-tune out, or fine-tune on sst2 with "
                "your files."
            )
        check_linear_probe(str(task), data, train_data, task_settings or TaskSettings())
