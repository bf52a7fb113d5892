"""A compressed folder evaluated beside its base; what was found goes into the folder's evaluation.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CompressionError, listing
from ..foundation.arguments import seed_of
from ..foundation.options import chosen, documented
from ..foundation.processes import launched_processes
from ..measure.texts import load_texts
from ..metrics.scores import require
from .linear_probe import check_linear_probe, evaluate_linear_probe, is_linear_probe
from .onnx_model import check_onnx
from .options import EvaluationOptions
from .pair import Pair, find_pair
from .records import Evaluation, check_writable, saving, with_evaluations, write_evaluations
from .reporting import check_report, write_report
from .retrieval import evaluate_retrieval, is_retrieval
from .task_evaluation import evaluate_task
from .tasks import find_task
from .text_evaluation import choose_measures, evaluate_text

DTYPES = ("float32", "bfloat16", "float16")


@documented(EvaluationOptions)
def evaluate_folder(folder: str | Path, options: EvaluationOptions | None = None, **changes: Any) -> list[Evaluation]:
    """Evaluate a compressed folder against its base, and add the results to its evaluation.json.

    Under `accelerate launch` several processes share the work, and all return the same.

    Args:
        folder: that this package has written. Its weights are read; code in it is never run.
        options: all options below as one object, reusable across calls.
        **changes: any of these, by name; they change `options`.
        {options}

    Raises:
        CompressionError: the request cannot be met. Nothing has been written.
        UnsavedError: the results cannot be saved; the error has them.
    """
    options = chosen(EvaluationOptions, options, changes)
    _check_request(options)
    text, task = options.text, options.task
    report_file = check_report(options.report) if options.report is not None else None
    retrieval = is_retrieval(task)
    linear_probe = is_linear_probe(task)
    found_task = find_task(task) if task is not None and not retrieval and not linear_probe else None
    if found_task is not None:
        require("sklearn", "scipy")
    if linear_probe:
        require("sklearn", *(("datasets",) if options.data is None else ()))
    loaded = load_texts(text, "evaluation text") if text is not None else None
    if text is not None and loaded is None:
        raise CompressionError("The evaluation text cannot be 'none'; pass a file with one text per line.")
    options = replace(options, seed=seed_of(options.seed))
    check_onnx(options.onnx, options.fine_tune, options.dtype)
    pair = find_pair(folder, options.base, revision=options.revision, onnx=options.onnx)
    if options.write:
        check_writable(pair.folder)
    chosen_measures = choose_measures(options.measures, pair) if loaded else ()
    processes = launched_processes(options.device)
    found: list[Evaluation] = []
    if loaded is not None:
        found += evaluate_text(pair, loaded, chosen_measures, options, processes)
    if retrieval:
        found += evaluate_retrieval(pair, str(task), options, processes)
    if linear_probe:
        found.append(evaluate_linear_probe(pair, str(task), options, processes))
    if found_task is not None:
        found.append(evaluate_task(pair, found_task, options, processes))
    found = _of_file(found, pair)
    try:
        if options.write and processes.is_main:
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


def _check_request(options: EvaluationOptions) -> None:
    """Raise CompressionError for what cannot be evaluated."""
    task, data, train_data, fine_tune = options.task, options.data, options.train_data, options.fine_tune
    if options.text is None and task is None:
        raise CompressionError("There is nothing to evaluate on; pass --text (text=) or --task (task=), or both.")
    if task is None and (data is not None or train_data is not None or fine_tune):
        raise CompressionError("A data file and fine-tuning belong to a task; name it with --task (task=).")
    if options.dtype not in DTYPES:
        raise CompressionError(f"The dtype '{options.dtype}' is not one of {listing(DTYPES)}.")
    if options.limit is not None and options.limit < 1:
        raise CompressionError(f"The limit must be at least 1, not {options.limit}.")
    if is_retrieval(task) and (fine_tune or train_data is not None or options.columns is not None):
        raise CompressionError(
            f"Retrieval is not trained, and its files have fixed columns; {task} takes --data alone."
        )
    if is_linear_probe(task):
        if fine_tune:
            raise CompressionError(
                f"{task} trains a classifier on embeddings, not the models; leave --fine-tune out, or fine-tune on sst2 with "
                "your files."
            )
        check_linear_probe(str(task), options)
