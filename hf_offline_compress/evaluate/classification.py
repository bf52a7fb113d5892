"""Sequence classifiers and regressors: their predictions, and whether their labels are those of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError, listing
from ..foundation.processes import ALONE, Processes
from ..metrics.perplexity import evaluating
from .task_data import Example
from .tasks import Task

# Synonymous names of classes.
SAME = {"neg": "negative", "pos": "positive", "non_entailment": "not_entailment"}


@torch.inference_mode()
def classifier_logits(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str, ...]],
    *,
    batch_size: int = 32,
    max_length: int = 128,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Tensor:
    """Return a sequence classifier's logits, [texts, classes], float32.

    Args:
        model: with the head of a sequence classifier.
        tokenizer: the model's.
        texts: one or two each, which the tokenizer joins.
        batch_size: texts in one forward pass.
        max_length: tokens of a text or pair, at most.
        progress: show a progress bar.
        processes: that share the work.
    """

    def logits(chosen: list[int]) -> Tensor:
        columns = [list(column) for column in zip(*(texts[i] for i in chosen), strict=True)]
        encoded = tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return model(**encoded.to(model.device)).logits.float().cpu()

    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluating(model):
        found = torch.cat(processes.map(logits, batches, desc="predictions", progress=progress))
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result


def predictions(task: Task, logits: Tensor, order: Sequence[int]) -> list[float]:
    """Return the numbers of the likeliest classes in the task's order, or the scores of a regression.

    Args:
        task: what is predicted.
        logits: [examples, classes].
        order: the model's class for each of the task's.
    """
    return (logits[:, 0] if not task.labels else logits[:, list(order)].argmax(dim=1)).tolist()


def class_order(task: Task, config: Any, name: str) -> list[int]:
    """Return the model's class for each of the task's, by their names; names like LABEL_0 stand for the task's order.

    Args:
        task: with its labels.
        config: of the model.
        name: of the model, for the error.

    Raises:
        CompressionError: the model has other labels.
    """
    count = max(1, len(task.labels))
    labels = [_plain(config.id2label[i]) for i in range(config.num_labels)]
    if config.num_labels == count and (not task.labels or all(label == f"label_{i}" for i, label in enumerate(labels))):
        return list(range(count))
    if sorted(labels) == sorted(task.labels):
        return [labels.index(label) for label in task.labels]
    wanted = listing(task.labels) if task.labels else "one number"
    raise CompressionError(
        f"The head of '{name}' predicts {listing(labels)}, and {task.name} needs {wanted}; pass another task, or --fine-tune."
    )


def texts_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Return the texts of examples."""
    return [example.texts for example in examples]


def _plain(label: str) -> str:
    lower = str(label).strip().lower().replace(" ", "_").replace("-", "_")
    return SAME.get(lower, lower)
