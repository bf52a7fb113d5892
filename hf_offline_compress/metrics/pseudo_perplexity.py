"""Pseudo-perplexity of masked language models (Salazar et al. 2020): each token masked in turn, and only that one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..foundation.processes import ALONE, Processes
from .perplexity import Perplexity, by_length, check_masked, result, summed_loss, tokenized_lines


def pseudo_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    block: int = 512,
    min_tokens: int = 20,
    batch_size: int = 32,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Perplexity:
    """Return exp of the mean of −log p over all tokens, each masked in turn with all others visible.

    Lines are those of `masked_perplexity`. It has no random choices, and costs a forward pass of a line for each of the
    line's tokens. Since the other tokens of a word stay visible, it is lower than with whole words masked.

    Args:
        model: with the head of a masked language model.
        tokenizer: the model's, a fast one.
        texts: one or several lines each.
        block: lines are truncated to this many tokens, or to the model's positions if these are fewer.
        min_tokens: lines of fewer tokens are dropped; special tokens do not count.
        batch_size: lines in one forward pass, at most.
        progress: show a progress bar.
        processes: that share the work.

    Raises:
        CompressionError: the model or the tokenizer cannot do this, or no line is long enough.
    """
    started = time.perf_counter()
    lines = tokenized_lines(texts, tokenizer, block=check_masked(model, tokenizer, block), min_tokens=min_tokens)
    questions: list[tuple[Tensor, Tensor]] = []
    for tokens, words in lines:
        for place in (place for word in words for place in word):
            asked = torch.zeros(len(tokens), dtype=torch.bool)
            asked[place] = True
            questions.append((tokens, asked))
    loss, count = summed_loss(model, tokenizer, by_length(questions), batch_size, progress, processes, masked=True)
    return result(loss, count, len(lines), started)
