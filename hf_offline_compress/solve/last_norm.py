"""The norm before a language model's head, fitted once everything is compressed, to what the dense model predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..architectures.families import is_language_model
from ..measure.divergence import Replaced, count, exchanged, thinned
from ..measure.last_norm import Predictions, find_last_norm, fitted, hidden_at_head
from ..measure.texts import Batch
from ..plan.groups import Plan

# Predictions that are compared: as many as take so many products, at least, and no more than those of so many tokens.
PRODUCTS, LEAST_PLACES, MOST_TOKENS = 2**34, 2_048, 32_768
# Neighbouring predictions have much in common: one is compared of so many tokens, where there are enough.
APART = 8


def may_have_last_norm(model: Any, plan: Plan) -> bool:
    """Whether a model makes predictions, to which a norm may be fitted."""
    return is_language_model(plan.architecture) and model.base_model is not model


def fit_last_norm(
    model: Any,
    plan: Plan,
    weights: Replaced,
    *,
    text: Callable[[int], Sequence[Batch]],
    mask_token: int | None,
    seed: int,
) -> dict[str, Tensor]:
    """Return what the norm's numbers should be by their full names, as they will be stored; nothing where there is none.

    Or where there is too little text to fit it to.

    Args:
        model: the dense model.
        plan: what becomes of it.
        weights: matrices, and the weights that stand for them.
        text: number of tokens → about so many of calibration text, or nothing.
        mask_token: of a masked language model; None otherwise.
        seed: of drawn directions.
    """
    head = model.get_output_embeddings()
    wanted = max(LEAST_PLACES, PRODUCTS // head.weight.numel())
    batches = text(min(MOST_TOKENS, APART * wanted))
    asked = [batch.places(mask_token) for batch in batches]
    places = thinned(asked, count(asked) // wanted)
    norm = find_last_norm(model, batches[0]) if batches else None
    if norm is None or count(places) < head.weight.shape[1]:
        return {}
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias.detach().float()
    dense = Predictions(hidden_at_head(model, batches, places), head.weight.detach().float(), bias)
    with exchanged(model, plan.layout.prefix, weights):
        own = head.weight.detach().to(torch.float32, copy=True)
        now = Predictions(hidden_at_head(model, batches, places), own, bias)
    if not all(tensor.isfinite().all() for tensor in (dense.hidden, now.hidden, now.weight)):
        return {}
    if own.equal(dense.weight):  # the head is not compressed: one copy is enough
        now = Predictions(now.hidden, dense.weight, bias)
    gain, shift = fitted(dense, now, shifted=norm.has_bias, seed=seed)
    found = norm.values(gain, shift)
    kept = {
        name: value.to(getattr(torch, plan.wider.get(name, plan.rest))).to(value.dtype).cpu()
        for name, value in found.items()
    }
    return kept if all(value.isfinite().all() for value in kept.values()) else {}
