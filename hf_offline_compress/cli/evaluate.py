"""`evaluate`: a compressed folder beside its base, on a text or a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..foundation.processes import is_main_process
from ..foundation.progress import stage
from .options import AsJson, Debug, Device, Folder, Quiet, Revision, app
from .output import calm, print_json, print_table, run

BaseOption = Annotated[
    str | None,
    typer.Option(help="the base, a Hub id or a folder; by default the Hub id in its report", show_default=False),
]
TUNING = "of fine-tuning"


@app.command()
def evaluate(
    folder: Folder,
    base: BaseOption = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            help="an ONNX file exported from FOLDER, to evaluate in the place of its weights", show_default=False
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="text for perplexity and agreement: a file with one text per line, or a dataset name",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="what to measure on the text, comma-separated: perplexity, pseudo_perplexity, agreement "
            "(default: agreement, and for language models perplexity)",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, squad, nanobeir[:SET] or classification[:SET]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="a CSV or JSON file, for nanobeir a folder, instead of the task's dataset", show_default=False
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="columns of the file, comma-separated: texts, then the label; numbers from 1 if it has no header",
            show_default=False,
        ),
    ] = None,
    fine_tune: Annotated[bool, typer.Option("--fine-tune", help="train both models on the task first")] = False,
    train_data: Annotated[
        Path | None,
        typer.Option(help="a CSV or JSON file to train on, of fine-tuning and classification", show_default=False),
    ] = None,
    train_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="at most this many training examples; for classification per class (default: 8)",
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
    limit: Annotated[
        int | None, typer.Option(min=1, help="at most this many texts or examples", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences per forward pass")] = 32,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype to compute in: float32, bfloat16, float16")] = "float32",
    device: Device = None,
    revision: Revision = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="an .html or .md file to write all evaluations of FOLDER to, with figures", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate FOLDER beside its base, and add the numbers to its evaluation.json."""

    def work() -> None:
        calm(quiet)
        from ..errors import CompressionError, UnsavedError

        with stage("importing torch and transformers"):
            from ..evaluate.evaluation import evaluate_folder
            from ..evaluate.linear_probe import is_linear_probe
        from ..evaluate.tasks import TaskSettings
        from ..evaluate.text_evaluation import TextSettings

        settings = TaskSettings(learning_rate, train_batch_size, length, stride, epochs, train_limit)
        training = (learning_rate, train_batch_size, epochs, train_limit if not is_linear_probe(task) else None)
        if not fine_tune and any(value is not None for value in training):
            raise CompressionError("Settings of training belong to --fine-tune; add it, or leave them out.")
        unsaved = None
        try:
            found = evaluate_folder(
                folder,
                base=base,
                onnx=onnx,
                text=text,
                task=task,
                data=data,
                train_data=train_data,
                columns=_split(columns),
                measures=_split(measure),
                text_settings=TextSettings(
                    share=share, block=block, stride=stride, min_tokens=min_tokens, max_length=length or 128
                ),
                task_settings=settings,
                fine_tune=fine_tune,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
                dtype=dtype,
                device=device,
                revision=revision,
                report=report,
                progress=not quiet,
            )
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
                print(f"\nadded to {folder / 'evaluation.json'}{f'; report in {report}' if report else ''}")
        if unsaved:
            raise unsaved

    run(work, debug, quiet or not is_main_process())


def _split(names: str | None) -> list[str] | None:
    return [name.strip() for name in names.split(",")] if names is not None else None


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
