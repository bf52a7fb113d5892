"""Agreement of predictions: how far a compressed model's probabilities are from its base's, at the same places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..foundation.processes import ALONE, Processes
from .perplexity import asked_logits, batches_of, by_length, causal_windows, check_masked, evaluating, masked_lines


@dataclass(frozen=True)
class PredictionAgreement:
    """How two models' predictions compare.

    Attributes:
        kl_divergence: mean of KL(base ‖ compressed) = Σ p log(p / q), in nats; 0 for equal models.
        top_1: share of places where both have the same most likely answer.
        places: how many predictions were compared: tokens of language models, texts of classifiers.
    """

    kl_divergence: float
    top_1: float
    places: int


@torch.inference_mode()
def language_agreement(
    base: Any,
    compressed: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    masked: bool,
    seed: int = 0,
    share: float = 0.15,
    block: int | None = None,
    stride: int | None = None,
    min_tokens: int = 20,
    batch_size: int = 32,
    progress: bool = False,
    processes: Processes = ALONE,
) -> PredictionAgreement:
    """Return how two language models agree on the tokens that their perplexity is measured on.

    Args:
        base: the one whose predictions are the reference.
        compressed: of the same vocabulary.
        tokenizer: of both.
        texts: see `masked_perplexity` or `causal_perplexity`, as for all that follows.
        masked: whether they are masked language models.
        seed: of the choice of masked words.
        share: of tokens that are masked.
        block: tokens of a line (by default 512) or of a window (1024), at most.
        stride: between windows.
        min_tokens: of a line.
        batch_size: sequences in one forward pass, at most.
        progress: show a progress bar.
        processes: that share the work.

    Raises:
        CompressionError: as the perplexities.
    """
    if masked:
        block = check_masked(base, tokenizer, block or 512)
        sequences = by_length(
            masked_lines(texts, tokenizer, seed=seed, share=share, block=block, min_tokens=min_tokens)
        )
    else:
        sequences, _ = causal_windows(base, tokenizer, texts, block=block or 1024, stride=stride)

    def compare(batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        found = torch.zeros(3, dtype=torch.float64)
        pairs = zip(
            *(asked_logits(model, tokenizer, batch, masked=masked) for model in (base, compressed)), strict=True
        )
        for (reference, _), (other, _) in pairs:
            found += _compared(reference, other)
        return found

    with evaluating(base, compressed):
        batches = batches_of(sequences, batch_size, base)
        return _summed(processes.map(compare, batches, desc="agreement", progress=progress))


def class_agreement(reference: Tensor, other: Tensor) -> PredictionAgreement:
    """Return how two classifiers agree, from their logits, both [examples, classes]."""
    return _summed([_compared(reference, other)])


def _compared(reference: Tensor, other: Tensor) -> Tensor:
    """Return summed KL divergence, number of equal answers and of places, from logits [places, classes]."""
    log_p, log_q = (F.log_softmax(logits.double(), dim=-1) for logits in (reference, other.to(reference.device)))
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    equal = (reference.argmax(dim=-1) == other.to(reference.device).argmax(dim=-1)).sum()
    return torch.stack(
        [divergence.cpu(), equal.double().cpu(), torch.tensor(float(len(reference)), dtype=torch.float64)]
    )


def _summed(found: list[Tensor]) -> PredictionAgreement:
    divergence, equal, places = sum(found, torch.zeros(3, dtype=torch.float64)).tolist()
    # Rounding can leave the divergence of equal models slightly below zero.
    return PredictionAgreement(max(0.0, divergence / places), equal / places, int(places))
