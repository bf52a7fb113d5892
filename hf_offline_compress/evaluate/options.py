"""All options of an evaluation besides its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..foundation.options import option
from ..foundation.processes import Processes
from .tasks import TaskSettings
from .text_settings import TextSettings


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `evaluate_folder`."""

    base: str | Path | None = option(
        None,
        "folder or Hub id of the base; by default what the folder's report names, if that is on the Hub",
        cli=str,
        help="the base, a Hub id or a folder; by default the Hub id in its report",
    )
    onnx: str | Path | None = option(
        None,
        "an ONNX file that was exported from the folder, to evaluate instead of its weights, in ONNX Runtime; the results "
        "are kept beside the evaluations of the weights",
        cli=Path,
        help="an ONNX file exported from FOLDER, to evaluate instead of its weights",
    )
    text: str | Path | Sequence[str] | None = option(
        None,
        "to measure perplexity and agreement on: a file with one text per line, a data set's name, or texts",
        cli=str,
        help="text for perplexity and agreement: a file with one text per line, or a dataset name",
    )
    measures: Sequence[str] | None = option(
        None,
        'on the text: "perplexity", "pseudo_perplexity", "agreement"; by default agreement, and perplexity of language models',
        cli=str,
        name="measure",
        help="what to measure on the text, comma-separated: perplexity, pseudo_perplexity, agreement "
        "(default: agreement, and for language models perplexity)",
    )
    task: str | None = option(
        None,
        'one of `tasks.TASKS`, e.g. "sst2" or "squad"; "nanobeir", or one of its sets, e.g. "nanobeir:NFCorpus"; '
        '"classification", by a logistic regression on embeddings, or with a data set, e.g. "classification:banking77"',
        cli=str,
        help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, squad, nanobeir[:SET] or classification[:SET]",
    )
    data: str | Path | None = option(
        None,
        "local CSV or JSON file instead of the task's dataset on the Hub; for retrieval a folder in BEIR's form",
        cli=Path,
        help="a CSV or JSON file, for nanobeir a folder, instead of the task's dataset",
    )
    columns: Sequence[str] | None = option(
        None,
        "of these files: those of the texts, then that of the label, by name or by number from 1; found by their names if not "
        "given",
        cli=str,
        help="columns of the file, comma-separated: texts, then the label; numbers from 1 if it has no header",
    )
    fine_tune: bool = option(
        False,
        "fine-tune both models on the task first; by default they are used as is",
        cli=bool,
        help="train both models on the task first",
    )
    train_data: str | Path | None = option(
        None,
        'the same as `data`, for fine-tuning and for "classification"',
        cli=Path,
        help="a CSV or JSON file to train on, for fine-tuning and classification",
    )
    task_settings: TaskSettings | None = option(
        None, "settings of the task and of fine-tuning; the papers' settings by default"
    )
    text_settings: TextSettings | None = option(None, "how the text is prepared; its seed is `seed`")
    limit: int | None = option(
        None,
        "at most this many texts or examples, from the beginning",
        cli=int,
        min=1,
        help="at most this many texts or examples",
    )
    batch_size: int = option(
        32, "sequences in one forward pass, at most", cli=int, min=1, help="sequences per forward pass"
    )
    seed: int = option(0, "for masking, new heads and training", cli=int, help="random seed")
    dtype: str = option(
        "float32",
        'to compute in: "float32", "bfloat16" or "float16"',
        cli=str,
        help="dtype to compute in: float32, bfloat16, float16",
    )
    device: str | None = option(
        None,
        "where to compute; by default the CPU, or what `accelerate launch` chooses",
        cli=str,
        help="where to compute, e.g. cuda",
    )
    revision: str | None = option(
        None,
        "of a base on the Hub; by default the one that the report names",
        cli=str,
        help="branch, tag or commit of a base on the Hub",
    )
    report: str | Path | None = option(
        None,
        "an .html or .md file to write all evaluations of the folder to, with figures; an earlier report is replaced",
        cli=Path,
        help="an .html or .md file to write all evaluations of FOLDER to, with figures",
    )
    write: bool = option(True, "add what was found to evaluation.json")
    progress: bool = option(True, "show progress bars")

    def forward(self, processes: Processes) -> dict[str, Any]:
        """Return the keywords of everything that puts texts through a model, on processes that share the work."""
        return {"batch_size": self.batch_size, "progress": self.progress, "processes": processes}
