"""A compressed model and its base on a text: perplexity, pseudo-perplexity, and agreement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import CompressionError, listing
from ..foundation.processes import Processes
from ..measure.texts import CalibrationText
from ..metrics.agreement import agreement, sentence_embeddings
from ..metrics.perplexity import Perplexity, causal_perplexity, masked_perplexity
from ..metrics.predictions import PredictionAgreement, class_agreement, language_agreement
from ..metrics.pseudo_perplexity import pseudo_perplexity
from ..metrics.shared_units import byte_perplexity, word_perplexities
from ..runtime.architectures_compressed import architecture_of
from .classification import classifier_logits
from .options import EvaluationOptions
from .pair import Pair, language_model_kind
from .records import Data, Evaluation, Metric, metric
from .text_settings import TextSettings

MEASURES = ("perplexity", "pseudo_perplexity", "agreement")


def choose_measures(measures: Sequence[str] | None, pair: Pair) -> tuple[str, ...]:
    """Return what is measured on a text: what was asked for, else perplexity of language models, and agreement if it can be.

    Raises:
        CompressionError: there is no such measure, or the models do not have it.
    """
    architecture = pair.architecture
    kind = language_model_kind(architecture)
    agree = _compares_states(pair) or _compares_predictions(pair)
    if measures is None and kind:
        return ("perplexity", "agreement") if agree else ("perplexity",)
    measures = ("agreement",) if measures is None else measures
    for name in measures:
        if name not in MEASURES:
            raise CompressionError(f"There is no measure '{name}'; known: {listing(MEASURES)}.")
        if (name == "perplexity" and not kind) or (name == "pseudo_perplexity" and kind != "masked"):
            needed = "masked language model" if name == "pseudo_perplexity" else "language model"
            raise CompressionError(
                f"The measure '{name}' needs a {needed}, and {architecture} is none; choose agreement."
            )
        if name == "agreement" and not agree:
            raise CompressionError(
                f"Agreement with the base cannot be measured: '{pair.onnx and pair.onnx.name}' gives no hidden states, and its "
                f"predictions are {'of other tokens than' if kind else 'not compared with'} the base's. "
                f"{'Choose perplexity, or evaluate' if kind else 'Evaluate'} the folder's weights, without the ONNX file."
            )
    return tuple(dict.fromkeys(measures))


def _compares_states(pair: Pair) -> bool:
    """Whether both models give hidden states; an ONNX file of a model with a head gives what that says alone."""
    entry = architecture_of(pair.contents.config["model_type"])
    return pair.onnx is None or (entry is not None and pair.architecture == entry.base)


def _compares_predictions(pair: Pair) -> bool:
    """Whether both models predict, and the same things: tokens of one vocabulary, or classes."""
    if language_model_kind(pair.architecture):
        return pair.same_tokens
    labels = pair.contents.config.get("id2label")  # two classes, if nothing is said
    return pair.architecture.endswith("ForSequenceClassification") and (labels is None or len(labels) > 1)


def evaluate_text(
    pair: Pair,
    text: CalibrationText,
    measures: Sequence[str],
    options: EvaluationOptions,
    processes: Processes,
) -> list[Evaluation]:
    """Return base and compressed model on a text, an evaluation for each measure.

    Raises:
        CompressionError: the text is unsuitable, e.g. since all lines are too short.
    """
    dtype, limit = options.dtype, options.limit
    settings = replace(options.text_settings or TextSettings(), seed=options.seed)
    texts = text.texts[:limit] if limit else text.texts
    models = {"base": pair.load_base(dtype=dtype), "compressed": pair.load_compressed(dtype=dtype)}
    for model in models.values():
        model.to(processes.device)
    shared = options.forward(processes)
    found = []
    for name in measures:
        measure: Callable[..., Outcome] = _agreement if name == "agreement" else _perplexity
        kind = language_model_kind(pair.architecture)
        task, metrics, seconds, used, examples = measure(
            models, pair, texts, settings, "pseudo" if name == "pseudo_perplexity" else kind, shared
        )
        prefix = f"{kind}_perplexity" if name == "perplexity" else name
        found.append(
            Evaluation(
                id=f"{prefix}:{text.source}",
                task=task,
                data=Data(text.source, examples, sha256=text.sha256),
                settings={**used, "dtype": dtype, "limit": limit},
                metrics=metrics,
                seconds=seconds,
            )
        )
    return found


Outcome = tuple[dict[str, str], tuple[Metric, ...], dict[str, float], dict[str, Any], int]
MEASURED: dict[str, Callable[..., Perplexity]] = {
    "masked": masked_perplexity,
    "causal": causal_perplexity,
    "pseudo": pseudo_perplexity,
}
TASKS = {
    "masked": {"type": "fill-mask", "name": "masked language modelling"},
    "causal": {"type": "text-generation", "name": "causal language modelling"},
    "pseudo": {"type": "fill-mask", "name": "masked language modelling, a token at a time"},
}


def _perplexity(
    models: dict[str, Any],
    pair: Pair,
    texts: Sequence[str],
    settings: TextSettings,
    kind: str | None,
    shared: dict[str, Any],
) -> Outcome:
    assert kind is not None
    used = settings.of(kind, pair.tokenizer.model_max_length)
    if not pair.same_tokens:
        return _perplexity_by_units(models, pair, texts, used, kind, shared)
    base, compressed = (MEASURED[kind](model, pair.tokenizer, texts, **used, **shared) for model in models.values())
    name = "pseudo_perplexity" if kind == "pseudo" else "perplexity"
    metrics = (metric(name, "lower", base.perplexity, compressed.perplexity),)
    seconds = {"base": base.seconds, "compressed": compressed.seconds}
    return TASKS[kind], metrics, seconds, {**used, "tokens": base.tokens}, base.lines


def _perplexity_by_units(
    models: dict[str, Any],
    pair: Pair,
    texts: Sequence[str],
    used: dict[str, Any],
    kind: str,
    shared: dict[str, Any],
) -> Outcome:
    """Return perplexities of models with different tokens, in units that both share: bytes, or words masked as a whole.

    Raises:
        CompressionError: tokens are to be masked one at a time.
    """
    if kind == "pseudo":
        raise CompressionError(
            f"The vocabulary of '{pair.contents.name}' was pruned, so its tokens differ from the base's, and "
            "pseudo_perplexity, which masks one token at a time, would not compare; choose perplexity, by whole words."
        )
    tokenizers = pair.tokenizers
    if kind == "causal":
        base, compressed = (
            byte_perplexity(model, tokenizers[name], texts, **used, **shared) for name, model in models.items()
        )
        unit, count = "byte", base.tokens
    else:
        options = {key: used[key] for key in ("seed", "share", "min_tokens")}
        (base, compressed), count = word_perplexities(
            [*models.values()], [*tokenizers.values()], texts, block=used["block"], settings=options, **shared
        )
        unit = "word"
    metrics = (metric(f"perplexity per {unit}", "lower", base.perplexity, compressed.perplexity),)
    seconds = {"base": base.seconds, "compressed": compressed.seconds}
    return TASKS[kind], metrics, seconds, {**used, f"{unit}s": count, "vocabularies": "different"}, base.lines


def _agreement(
    models: dict[str, Any],
    pair: Pair,
    texts: Sequence[str],
    settings: TextSettings,
    kind: str | None,
    shared: dict[str, Any],
) -> Outcome:
    """Compare pooled states of texts, and predictions where there is a head for them; the base agrees with itself."""
    used: dict[str, Any] = {"max_length": min(settings.max_length, pair.tokenizer.model_max_length)}
    options = {**shared, "max_length": used["max_length"]}
    metrics: list[Metric] = []
    seconds: dict[str, float] = dict.fromkeys(models, 0.0)
    if _compares_states(pair):
        (base, compressed), seconds = _timed_each(
            models, pair, lambda model, tokenizer: sentence_embeddings(model, tokenizer, texts, **options)
        )
        metrics.append(metric("cosine", "higher", 1.0, agreement(compressed, base)))
    compared: PredictionAgreement | None = None
    if not pair.same_tokens:
        used["vocabularies"] = "different"  # of different tokens no probabilities compare
    if kind and _compares_predictions(pair):
        of_kind = settings.of(kind, pair.tokenizer.model_max_length)
        used |= of_kind
        compared = language_agreement(
            models["base"],
            models["compressed"],
            pair.tokenizer,
            texts,
            masked=kind == "masked",
            **of_kind,
            **shared,
        )
    elif _compares_predictions(pair):
        alone = [(text,) for text in texts]
        (base, compressed), _ = _timed_each(
            models, pair, lambda model, tokenizer: classifier_logits(model, tokenizer, alone, **options)
        )
        compared = class_agreement(base, compressed)
    if compared:
        metrics.append(metric("kl_divergence", "lower", 0.0, compared.kl_divergence))
        metrics.append(metric("top_1_agreement", "higher", 1.0, compared.top_1))
        used["predictions"] = compared.places
    task = {"type": "feature-extraction", "name": "agreement with the base"}
    return task, tuple(metrics), seconds, used, len(texts)


def _timed_each(
    models: dict[str, Any], pair: Pair, work: Callable[[Any, Any], torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, float]]:
    found, seconds = [], {}
    for name, model in models.items():
        started = time.perf_counter()
        found.append(work(model, pair.tokenizers[name]))
        seconds[name] = round(time.perf_counter() - started, 3)
    return found, seconds
