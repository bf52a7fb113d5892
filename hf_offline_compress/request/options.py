"""Everything that a compression can be asked for beside its base and its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..foundation.options import option
from .recipe import Recipe, Rule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


VOCABULARY = ("vocabulary", "vocabulary_size", "vocabulary_coverage")
OVERRIDES = ("ratio", "modules", "grouping", "storage", "allocation", "total_ratio", "max_bytes", "effort", *VOCABULARY)
_SAID = {
    item.name: str(item.metadata["help"]) for cls in (Rule, Recipe) for item in fields(cls) if "help" in item.metadata
}


@dataclass(frozen=True)
class CompressionOptions:
    """The options of `compress`. The first eleven override the recipe."""

    ratio: float | None = option(None, _SAID["ratio"], cli=float)
    modules: str | Sequence[str] | None = option(
        None, _SAID["modules"], cli=str, help=f"{_SAID['modules']}, comma-separated"
    )
    grouping: str | None = option(None, _SAID["grouping"], cli=str)
    storage: str | None = option(None, _SAID["storage"], cli=str)
    allocation: str | None = option(None, _SAID["allocation"], cli=str)
    total_ratio: float | None = option(
        None, "4 bytes x all parameters, over the bytes of all weight files: a budget for the whole model", cli=float
    )
    max_bytes: int | str | None = option(None, "the same budget in bytes, e.g. 6MB (of 1,000,000 bytes)", cli=str)
    vocabulary: str | Path | Sequence[str] | None = option(
        None,
        "the tokens of this text are kept, and all others pruned from tokenizer and model before anything else is done: "
        "bundled, a file with one text per line, a dataset name, or texts",
        cli=str,
        help=_SAID["vocabulary"],
    )
    vocabulary_size: int | None = option(
        None,
        "number of tokens to keep: the most frequent of the text, then the most probable of its writing systems",
        cli=int,
        min=1,
    )
    vocabulary_coverage: float | None = option(
        None, "keep the most frequent tokens that make up this share of the text; all by default", cli=float
    )
    effort: str | None = option(None, _SAID["effort"], cli=str)
    max_loss: float | None = option(
        None,
        "instead of a size, the allowed loss: the relative increase of perplexity, or for models without a language-model "
        "head the decrease of agreement; 0.01 is 1 %. The smallest model within it is searched for, which takes several "
        "times as long. It is measured on `validation`, or on held-out calibration text",
        cli=float,
        help="find the smallest model whose loss on held-out text is at most this, e.g. 0.01 for 1 %",
    )
    calibration: str | Path | Sequence[str] | None = option(
        "bundled",
        "text to calibrate on: bundled, none (None), a file with one text per line, a dataset name, or texts",
        cli=str,
        help="text to calibrate on: bundled, none, a file with one text per line, or a dataset name",
    )
    validation: str | Path | Sequence[str] | None = option(
        None,
        "held-out text: trained structures keep the step with the lowest perplexity on it; a file, a dataset name, or texts",
        cli=str,
        help="held-out text, a file or a dataset name: trained structures keep the step with the lowest perplexity on it",
    )
    tokenizer: PreTrainedTokenizerBase | None = option(None, "of the base, if that is a model in memory")
    auto_class: str | None = option(
        None, "class to load the base with, e.g. AutoModelForMaskedLM; the one it was saved from if not given", cli=str
    )
    dtype: str | torch.dtype | None = option(
        None,
        "dtype in which the base is loaded and computed, and of the result; by default float32 for computing, and the "
        "checkpoint's dtype for the result",
        cli=str,
        help="dtype of the model; the checkpoint's if not given",
    )
    device: str | torch.device | None = option(
        None,
        "where to compute, e.g. cuda; by default on the CPU, or where a model in memory is",
        cli=str,
        help="where to compute, e.g. cuda",
    )
    batch_size: int | None = option(None, "calibration texts per forward pass", cli=int, min=1)
    max_memory: int | str | None = option(
        None,
        "for a base larger than memory: tensors are read from its safetensors files one layer at a time, so that this "
        "process uses about this much memory at most, e.g. 4GB. Requests that cannot be met in this way are an error. The "
        "result is the same; it decodes its weights on use. Needs accelerate",
        cli=str,
        help="read the base layer by layer, within about this much memory, e.g. 4GB; presets by size need --effort fast",
    )
    seed: int = option(0, "random seed", cli=int)
    revision: str | None = option(None, "branch, tag or commit of a base on the Hub", cli=str)
    token: str | bool | None = option(None, "for a base on the Hub; by default the one you are logged in with")
    trust_remote_code: bool = option(
        False,
        "run code that comes with the base's tokenizer. The model is always a stock class",
        cli=bool,
        help="run code that comes with the base's tokenizer",
    )
    progress: bool = option(True, "show progress bars")
    target: str | Path | None = option(
        None, "where the result will be saved; free disk space is checked before any work"
    )
    resume: bool = option(
        False,
        "keep intermediate results in TARGET.partial until the result is saved, and continue from them if a run with the "
        "same request was interrupted; needs a target",
        cli=bool,
        help="keep intermediate results in OUT.partial, and continue from them after an interruption",
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """What replaces values of the recipe; see `Recipe.override`."""
        return {name: getattr(self, name) for name in OVERRIDES}
