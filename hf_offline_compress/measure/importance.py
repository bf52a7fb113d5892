"""How much each row of a weight matrix, or each weight, matters to the model's predictions.

The measure is a first-order one (arXiv 2302.04045; its Fisher form is that of FWSVD, Hsu et al., ICLR 2022): g is the
gradient of the mean probability that the model gives to the right tokens, taken for a few sequences at a time. With N
sequences in all, and Σ over the portions,

- `fisher`: sqrt(Σ g²) / N of a weight, sqrt(Σ_columns Σ g²) / N of a row;
- `l1_sensitivity`: Σ |g| / N of a weight, Σ_columns Σ |g| / N of a row.

A language model predicts tokens of the text: the masked ones, or each next one. For a task's head there are no labels, so
the class that it predicts itself is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..architectures.families import objective_of
from ..architectures.layout import Matrix
from ..errors import CompressionError, listing
from ..foundation.processes import ALONE, Processes
from ..plan.make import no_head
from ..request.objective import IMPORTANCES
from .sensitivity import _frozen, _portions, has_logits
from .sharing import Sums
from .texts import Batch

POSITIONS = ("start_logits", "end_logits")


def measure_importance(
    model: nn.Module,
    matrices: Iterable[Matrix],
    batches: Sequence[Batch],
    *,
    kind: str,
    parameter_wise: bool = False,
    mask_token: int | None,
    labels: Sequence[Tensor] | None = None,
    processes: Processes = ALONE,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Tensor]:
    """Return how much the weights of the given matrices matter, float32, by `Matrix.name`.

    A row that the predictions do not depend on, say of a token that the text lacks, weighs 0. Where a model has several
    outputs, a matrix is measured by the first that it takes part in: a BERT with both heads of its pre-training by the
    masked tokens, and what only serves the next sentence by that. Nothing here is random.

    Args:
        model: stock model with a head, in evaluation mode. Gradients and flags of its parameters are left as they are.
        matrices: those whose importance is wanted.
        batches: token ids with attention masks; half of their tokens are used.
        kind: one of `recipe.IMPORTANCES`, but not "none".
        parameter_wise: return [rows, columns], a weight each; otherwise [rows].
        mask_token: of a masked language model; None otherwise.
        labels: of a masked language model the true tokens, a tensor [sequences, length] for each batch. These are the
            `input_ids` of the same batches made with `masked=False`.
        processes: that share the portions.
        progress: wraps the portions of the batches, e.g. in a progress bar.

    Raises:
        CompressionError: the model has no head that predicts on plain text, the kind is unknown, the labels do not belong
            to the batches, or the predictions do not depend on one of the matrices.
    """
    if kind not in IMPORTANCES[1:]:
        raise CompressionError(f"There is no importance '{kind}'; known: {listing(IMPORTANCES[1:])}.")
    wanted = list(matrices)
    head = _head(model, kind, mask_token)
    portions = list(zip(_portions(batches), _portions(_true_batches(batches, head, mask_token, labels)), strict=True))
    prefix = f"{model.base_model_prefix}."
    names = {m.name: f"{prefix if m.in_base else ''}{m.module}.weight" for m in wanted}
    parameters = {name: model.get_parameter(name) for name in sorted(set(names.values()))}
    sums = Sums(processes)
    with torch.enable_grad(), _frozen(model):
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for _, (portion, truth) in sums.over(portions, progress):
                outcomes = _probabilities(model, head, portion, truth, mask_token)
                if not outcomes:
                    continue
                gradients = _gradients(outcomes, parameters)
                for matrix in wanted:
                    if names[matrix.name] in gradients:
                        share = _share(matrix.dense(gradients, prefix).float(), kind, parameter_wise)
                        sums.add(matrix.name, share)
                sums.count("sequences", len(portion.input_ids))
                del outcomes, gradients  # they are large: freed before the next portion
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)  # _frozen restores the flags
    sequences = sums.numbers.get("sequences", 0)
    if not sequences:
        raise CompressionError(
            f"No token of the calibration text can be predicted, so there is no importance '{kind}'; pass longer texts."
        )
    weights = {
        name: (total.sqrt_() if kind == "fisher" else total).div_(sequences) for name, total in sums.tensors.items()
    }
    _check(weights, wanted, type(model).__name__, kind)
    return weights


def _head(model: nn.Module, kind: str, mask_token: int | None) -> Literal["masked", "causal", "task"]:
    """Return what the model predicts."""
    name = type(model).__name__
    if not has_logits(model):
        raise no_head(kind, name)
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        return "task"
    if objective_of(name) == "causal":
        return "causal"
    if mask_token is None:
        raise CompressionError(f"The importance '{kind}' of {name}, a masked language model, needs its mask token.")
    return "masked"


def _true_batches(
    batches: Sequence[Batch], head: str, mask_token: int | None, labels: Sequence[Tensor] | None
) -> Sequence[Batch]:
    """Return the batches before any token was masked."""
    if head != "masked":
        return batches
    if labels is None:
        raise CompressionError("The importance of a masked language model needs the true tokens of masked places.")
    fits = len(labels) == len(batches) and all(
        truth.shape == batch.input_ids.shape
        and bool(((truth == batch.input_ids) | (batch.input_ids == mask_token)).all())
        for truth, batch in zip(labels, batches, strict=False)
    )
    if not fits:
        raise CompressionError(
            "The true tokens do not belong to the batches: they differ in more than the masked places."
        )
    return [Batch(truth, batch.attention_mask) for truth, batch in zip(labels, batches, strict=True)]


def _probabilities(model: Any, head: str, portion: Batch, truth: Batch, mask_token: int | None) -> list[Tensor]:
    """Return the mean probability of the correct outcome, a scalar per output; none if there is nothing to predict."""
    device = next(model.parameters()).device
    ids, mask = portion.input_ids.to(device), portion.attention_mask.bool().to(device)
    right = truth.input_ids.to(device)
    places = mask & (ids == mask_token)
    if head == "causal":
        places, right = mask[:, 1:] & mask[:, :-1], right[:, 1:]
    if head != "task" and not places.any():
        return []
    output = model(input_ids=ids, attention_mask=mask.long())
    named = {name: value for name, value in output.items() if name.endswith("logits")}
    outcomes = []
    if head != "task":
        logits = named.pop("prediction_logits") if "prediction_logits" in named else named.pop("logits")
        logits = (logits[:, :-1] if head == "causal" else logits)[places].float()  # [places, tokens]
        outcomes.append(logits.softmax(dim=-1).gather(-1, right[places][:, None]).mean())
    predicted = [_own_probability(model, name, logits.float(), mask) for name, logits in named.items()]
    if head == "task":  # start and end of an answer are one prediction
        return [torch.cat(predicted).mean()]
    return outcomes + [probability.mean() for probability in predicted]


def _own_probability(model: Any, name: str, logits: Tensor, mask: Tensor) -> Tensor:
    """Return the probability of the class that the model predicts itself, [predictions].

    Args:
        model: whose config says whether several classes may hold at once.
        name: of the logits.
        logits: [sequences, length, classes], [sequences, classes], or for answers in a text [sequences, length].
        mask: which places hold tokens, [sequences, length].
    """
    if name in POSITIONS:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif objective_of(type(model).__name__) == "discriminative":
        return logits[mask].abs().sigmoid()
    elif logits.dim() == 3:
        logits = logits[mask]
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        return logits.abs().sigmoid().flatten()  # each label by itself: it holds, or it does not
    if logits.shape[-1] == 1:
        raise CompressionError(
            f"{type(model).__name__} has one label, a regression, so there is no probability whose gradient gives an "
            "importance; take another objective."
        )
    return logits.softmax(dim=-1).amax(dim=-1)


def _gradients(outcomes: list[Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return for each parameter the gradient of the first outcome that depends on it; none where no outcome does."""
    gradients: dict[str, Tensor] = {}
    for i, outcome in enumerate(outcomes):
        missing = [name for name in parameters if name not in gradients]
        if not missing or not outcome.requires_grad:
            continue
        found = torch.autograd.grad(
            outcome, [parameters[name] for name in missing], retain_graph=i + 1 < len(outcomes), allow_unused=True
        )
        gradients |= {name: gradient for name, gradient in zip(missing, found, strict=True) if gradient is not None}
    return gradients


def _share(gradient: Tensor, kind: str, parameter_wise: bool) -> Tensor:
    """Return what a portion adds to a matrix's sum, [rows, columns] or [rows]; `gradient` is [rows, columns]."""
    share = gradient.square() if kind == "fisher" else gradient.abs()
    return share.contiguous() if parameter_wise else share.sum(dim=1)


def _check(weights: dict[str, Tensor], wanted: list[Matrix], architecture: str, kind: str) -> None:
    """Raise CompressionError for importances that are all zero or not finite."""
    silent = [m.name for m in wanted if m.name not in weights or not weights[m.name].any()]
    if silent:
        raise CompressionError(
            f"The predictions of {architecture} on plain text do not depend on {listing(silent[:3])}, so the importance "
            f"'{kind}' is undefined for it; leave it out of `modules`, or use another objective for it."
        )
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise CompressionError(
            f"The importance '{kind}' of {listing(broken[:3])} is not finite; compute the model in float32, or take another "
            "objective."
        )
