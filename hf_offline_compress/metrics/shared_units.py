"""Perplexities of models with different tokens: by bytes of the text, or by its words, which both have."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError
from ..measure.texts import cut
from .perplexity import (
    PIECE,
    Perplexity,
    by_length,
    causal_windows,
    check_masked,
    chosen_words,
    result,
    summed_loss,
    written_lines,
)

Sequences = list[tuple[Tensor, Tensor]]


def byte_perplexity(
    model: Any, tokenizer: Any, texts: Sequence[str], *, block: int, stride: int | None, **options: Any
) -> Perplexity:
    """Return a causal language model's perplexity by bytes: exp of the summed −log p of the text over its bytes in UTF-8.

    Texts are joined, and cut into windows, as for `causal_perplexity`; the token that ends a text counts as a byte. The
    bytes of the very first token, which nothing stands before, do not count.

    Args:
        model: with the head of a causal language model.
        tokenizer: the model's, a fast one.
        texts: in their order; empty ones are skipped.
        block: tokens of a window.
        stride: tokens between the beginnings of windows.
        **options: of `summed_loss`: batch_size, progress, processes.
    """
    started = time.perf_counter()
    windows, count = causal_windows(model, tokenizer, texts, block=block, stride=stride)
    loss, _ = summed_loss(model, tokenizer, windows, masked=False, **options)
    kept = [text for text in texts if text.strip()]
    first = tokenizer(kept[0][:PIECE], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][0][1]
    size = sum(len(text.encode()) for text in kept) + len(kept) - 1 - len(kept[0][:first].encode())
    return result(loss, max(1, size), count, started)


def shared_word_lines(
    texts: Sequence[str],
    tokenizers: Sequence[Any],
    *,
    seed: int,
    share: float,
    block: int,
    min_tokens: int,
) -> tuple[list[Sequences], int]:
    """Return for each tokenizer the lines' true tokens and which are masked, both [length], and the number of masked words.

    The same words are masked for all, each as a whole: of those that no tokenizer truncates or leaves unknown, enough
    to make up a share of the first one's tokens.

    Args:
        texts: one or several lines each.
        tokenizers: fast ones that find the same words.
        seed: of the choice of words.
        share: of the first tokenizer's tokens that are masked, at least one word a line.
        block: lines are truncated to this many tokens.
        min_tokens: lines with fewer of the first tokenizer's tokens are dropped.

    Raises:
        CompressionError: no line is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Sequences] = [[] for _ in tokenizers]
    words = 0
    for line in written_lines(texts):
        encoded = [_words_of(tokenizer, cut(line, block), block) for tokenizer in tokenizers]
        common = [word for word in encoded[0][1] if all(word in places for _, places in encoded)]
        if sum(len(places) for places in encoded[0][1].values()) < min_tokens or not common:
            continue
        chosen = chosen_words([encoded[0][1][word] for word in common], share, generator)
        words += len(chosen)
        for (tokens, places), sequences in zip(encoded, found, strict=True):
            masked = torch.zeros(len(tokens), dtype=torch.bool)
            masked[[place for i in chosen for place in places[common[i]]]] = True
            sequences.append((tokens, masked))
    if not words:
        raise CompressionError(
            f"No line of the text has {min_tokens} tokens and a word that both vocabularies know; pass longer lines, or a "
            "smaller min_tokens."
        )
    return found, words


def word_perplexities(
    models: Sequence[Any],
    tokenizers: Sequence[Any],
    texts: Sequence[str],
    *,
    block: int,
    settings: dict[str, Any],
    **options: Any,
) -> tuple[list[Perplexity], int]:
    """Return masked language models' perplexities by words, exp of the summed −log p over masked words, and their number.

    Args:
        models: with the head of a masked language model.
        tokenizers: the models'.
        texts: one or several lines each.
        block: tokens of a line.
        settings: of `shared_word_lines`: seed, share, min_tokens.
        **options: of `summed_loss`.

    Raises:
        CompressionError: a model or a tokenizer cannot do this, or no line is long enough.
    """
    block = min(check_masked(model, tokenizer, block) for model, tokenizer in zip(models, tokenizers, strict=True))
    lines, words = shared_word_lines(texts, tokenizers, block=block, **settings)
    found = []
    for model, tokenizer, sequences in zip(models, tokenizers, lines, strict=True):
        started = time.perf_counter()
        loss, _ = summed_loss(model, tokenizer, by_length(sequences), masked=True, **options)
        found.append(result(loss, words, len(sequences), started))
    return found, words


def _words_of(tokenizer: Any, line: str, block: int) -> tuple[Tensor, dict[int, list[int]]]:
    """Return a line's tokens [length], and word → places, of the words that are whole and have no special token."""
    encoded = tokenizer(line, truncation=True, max_length=block)
    ids = encoded["input_ids"]
    places: dict[int, list[int]] = {}
    for place, word in enumerate(encoded.word_ids()):
        if word is not None:
            places.setdefault(word, []).append(place)
    if len(ids) == block and places:  # the last word may go on
        del places[max(places)]
    special = {*tokenizer.all_special_ids}
    whole = {word: at for word, at in places.items() if not any(ids[place] in special for place in at)}
    return torch.tensor(ids), whole
