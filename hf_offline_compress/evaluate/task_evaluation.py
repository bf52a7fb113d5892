"""A task, solved by a compressed model and by its base: as they are, or after the same fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..architectures.families import family_of
from ..errors import CompressionError
from ..foundation.processes import Processes
from ..foundation.progress import stage
from ..metrics.agreement import sentence_embeddings
from ..metrics.scores import require, score, squad_scores
from .classification import class_order, classifier_logits, predictions, texts_of
from .fine_tuning import train
from .options import EvaluationOptions
from .pair import Pair
from .question_answering import answers, make_windows, training_features
from .records import Evaluation, metric
from .task_data import Example, Split, load_splits, load_training
from .tasks import Settings, Task, TaskSettings

HEADS = {"classification": "ForSequenceClassification", "regression": "ForSequenceClassification"}
HEADS["question answering"] = "ForQuestionAnswering"
Scores = dict[str, float]


def evaluate_task(pair: Pair, task: Task, options: EvaluationOptions, processes: Processes) -> Evaluation:
    """Return base and compressed model on a task.

    Raises:
        CompressionError: neither model has a head for the task and there is no fine-tuning, or the data do not fit.
    """
    data, train_data, fine_tune, dtype = options.data, options.train_data, options.fine_tune, options.dtype
    require("sklearn", "scipy", *(("datasets",) if data is None else ()), *(("accelerate",) if fine_tune else ()))
    if fine_tune and data is not None and train_data is None:
        raise CompressionError("Fine-tuning on a file of your own needs --train-data (train_data=) beside --data.")
    if train_data is not None and not fine_tune:
        raise CompressionError(
            "Training data without --fine-tune would not be used; add --fine-tune, or leave them out."
        )
    if fine_tune and dtype != "float32":
        raise CompressionError(f"Fine-tuning is done in float32, not {dtype}; leave --dtype out.")
    settings = (options.task_settings or TaskSettings()).for_task(task, pair.tokenizer.model_max_length)
    method = "fine-tuned" if fine_tune else _zero_shot_method(pair, task)
    with stage("reading the task's data"):
        splits = load_splits(task, data, options.columns, options.limit)
    training = load_training(task, train_data, options.columns, settings.limit) if fine_tune else None
    found: dict[str, Scores] = {}
    seconds: dict[str, float] = {}
    for name, loader in (("base", pair.load_base), ("compressed", pair.load_compressed)):
        started, tokenizer = time.perf_counter(), pair.tokenizers[name]
        model = _model(pair, task, loader, options).to(processes.device)
        if training:
            features = _features(task, training.examples, tokenizer, settings)
            train(
                model,
                tokenizer,
                features,
                settings,
                seed=options.seed,
                processes=processes,
                progress=options.progress,
            )
        shown = pair.base.name if name == "base" else pair.contents.name
        found[name] = _scores(model, tokenizer, task, splits, method, shown, settings, options.forward(processes))
        seconds[name] = round(time.perf_counter() - started, 3)
    record: dict[str, Any] = {"method": method, "length": settings.length, "dtype": dtype, "limit": options.limit}
    if task.kind == "question answering":
        record["stride"] = settings.stride
    if training:
        record |= {
            "seed": options.seed,
            "processes": processes.count,
            "fine_tuning": asdict(settings),
            "training": asdict(training.data),
        }
    hub_type = "sentence-similarity" if method == "embeddings" else task.hub_type
    return Evaluation(
        id=":".join([task.name, *(["fine-tuned"] if fine_tune else []), splits[0].data.name]),
        task={"type": hub_type, "name": f"{task.title}{', fine-tuned' if fine_tune else ''}"},
        data=splits[0].data,
        settings=record,
        metrics=tuple(metric(name, "higher", found["base"][name], found["compressed"][name]) for name in found["base"]),
        seconds=seconds,
    )


def _zero_shot_method(pair: Pair, task: Task) -> str:
    """Return how models answer a task without training: by their head, or by the cosine of sentence embeddings.

    Raises:
        CompressionError: they cannot.
    """
    if pair.architecture.endswith(HEADS[task.kind]):
        return "head"
    if task.kind == "regression":
        return "embeddings"
    raise CompressionError(
        f"'{pair.contents.name}' is a {pair.architecture}, and {task.name} needs a model {HEADS[task.kind]}; "
        "pass --fine-tune, which adds such a head to it and its base."
    )


def _model(pair: Pair, task: Task, loader: Callable[..., Any], options: EvaluationOptions) -> Any:
    """Return the model to evaluate or to fine-tune, on the CPU; a new head is drawn from the seed."""
    if not options.fine_tune:
        return loader(dtype=options.dtype)
    from transformers import set_seed

    family = family_of(pair.base.config)
    architecture = next(name for name in family.heads if name.endswith(HEADS[task.kind]))
    labels = dict(enumerate(task.labels or ("score",)))
    head: dict[str, Any] = {}
    if task.kind != "question answering":
        problem = "single_label_classification" if task.labels else "regression"
        head = {
            "id2label": labels,
            "label2id": {name: i for i, name in labels.items()},
            "problem_type": problem,
            "ignore_mismatched_sizes": True,
        }
    set_seed(options.seed)
    try:
        return loader(architecture, options.dtype, new_head=True, **head)
    except RuntimeError as error:
        raise CompressionError(
            f"'{pair.contents.name}' cannot be given a new head for {task.name}: its own is compressed, and of another size."
        ) from error


def _features(task: Task, examples: Sequence[Example], tokenizer: Any, settings: Settings) -> list[dict[str, Any]]:
    """Return what `Trainer` takes: inputs and labels of each example, or of each window."""
    if task.kind == "question answering":
        windows = make_windows(examples, tokenizer, length=settings.length, stride=settings.stride)
        return training_features(examples, windows)
    columns = [list(column) for column in zip(*texts_of(examples), strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=settings.length)
    return [
        {
            **{name: encoded[name][i] for name in tokenizer.model_input_names if name in encoded},
            "labels": int(example.label) if task.labels else float(example.label),
        }
        for i, example in enumerate(examples)
    ]


def _scores(
    model: Any,
    tokenizer: Any,
    task: Task,
    splits: Sequence[Split],
    method: str,
    name: str,
    settings: Settings,
    options: dict[str, Any],
) -> Scores:
    """Return the metrics of one model on all splits."""
    found: Scores = {}
    for split in splits:
        examples = split.examples
        if task.kind == "question answering":
            said = answers(model, tokenizer, examples, length=settings.length, stride=settings.stride, **options)
            scores = squad_scores(said, [example.answers for example in examples])
        else:
            if method == "embeddings":
                given = similarities(model, tokenizer, examples, max_length=settings.length, **options)
            else:
                order = class_order(task, model.config, name)
                logits = classifier_logits(model, tokenizer, texts_of(examples), max_length=settings.length, **options)
                given = predictions(task, logits, order)
            scores = score(task.metrics, [example.label for example in examples], given)
        found |= {f"{metric_name}{split.suffix}": value for metric_name, value in scores.items()}
    return found


def similarities(model: Any, tokenizer: Any, examples: Sequence[Example], **options: Any) -> list[float]:
    """Return the cosines of the mean-pooled embeddings of each example's two texts; options of `sentence_embeddings`."""
    first, second = (
        sentence_embeddings(model, tokenizer, [example.texts[i] for example in examples], **options) for i in (0, 1)
    )
    return (first * second).sum(dim=1).tolist()
