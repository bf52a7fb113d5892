"""`evaluate`: a compressed folder beside its base, on a text or a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from ..evaluate.options import EvaluationOptions
from ..evaluate.tasks import TaskSettings
from ..evaluate.text_settings import TextSettings
from ..foundation.processes import is_main_process
from ..foundation.progress import stage
from .options import NOTHING_ELSE, AsJson, Debug, Folder, Quiet, app, takes
from .output import calm, print_json, print_table, run

TUNING = "for fine-tuning"


@app.command()
@takes(EvaluationOptions, behind="train_data")
def evaluate(
    folder: Folder,
    train_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="at most this many training examples; for classification per class (default: 8, or the set's own)",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"{TUNING} (default: 2e-5, squad 3e-5)", show_default=False)
    ] = None,
    train_batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"{TUNING} (default: 32)", show_default=False)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help=f"{TUNING} (default: 3)", show_default=False)] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=8, help="tokens per example (default: 128, squad 384, classification 512)", show_default=False
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="share of tokens to mask, as whole words")] = 0.15,
    block: Annotated[
        int | None,
        typer.Option(min=2, help="tokens per line (default: 512) or causal window (1024)", show_default=False),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="step between causal windows (default: half); for squad their overlap (128)", show_default=False
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="drop lines with fewer tokens than this")] = 20,
    options: EvaluationOptions = NOTHING_ELSE,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate FOLDER against its base, and add the results to evaluation.json."""

    def work() -> None:
        calm(quiet)
        from ..errors import CompressionError, UnsavedError

        with stage("importing torch and transformers"):
            from ..evaluate.evaluation import evaluate_folder
            from ..evaluate.linear_probe import is_linear_probe

        training = (learning_rate, train_batch_size, epochs, None if is_linear_probe(options.task) else train_limit)
        if not options.fine_tune and any(value is not None for value in training):
            raise CompressionError("Settings of training belong to --fine-tune; add it, or leave them out.")
        asked = replace(
            options,
            columns=_split(options.columns),
            measures=_split(options.measures),
            task_settings=TaskSettings(learning_rate, train_batch_size, length, stride, epochs, train_limit),
            text_settings=TextSettings(
                share=share, block=block, stride=stride, min_tokens=min_tokens, max_length=length or 128
            ),
            progress=not quiet,
        )
        unsaved = None
        try:
            found = evaluate_folder(folder, asked)
        except UnsavedError as error:
            found, unsaved = error.result, error
        if not is_main_process():
            return
        if as_json:
            print_json({"folder": folder.resolve().name, "evaluations": [item.to_dict() for item in found]})
        elif unsaved or not quiet:
            rows = [
                (item.id if i == 0 else "", each.name, _number(each.base), _number(each.compressed), each.better)
                for item in found
                for i, each in enumerate(item.metrics)
            ]
            print_table(("evaluation", "metric", "base", "compressed", "better"), rows)
            if not unsaved:
                print(
                    f"\nadded to {folder / 'evaluation.json'}{f'; report in {options.report}' if options.report else ''}"
                )
        if unsaved:
            raise unsaved

    run(work, debug, quiet or not is_main_process())


def _split(names: Sequence[str] | None) -> list[str] | None:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else None


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
