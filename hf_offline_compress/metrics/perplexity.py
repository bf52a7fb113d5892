"""Perplexity of language models: how well a model predicts the tokens of a text.

Masked language models are measured as in arXiv 2302.04045: line by line, 15 % of the words masked as a whole, with a fixed
seed. Causal ones in strided windows over the joined text. What is masked and where windows lie depends on the tokenizer,
the text and the settings alone, so that both models are measured on the same predictions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..architectures.families import objective_of
from ..base.checkpoint import clamp_length
from ..errors import CompressionError
from ..foundation.processes import ALONE, Processes
from ..measure.texts import cut, padding_of
from ..runtime.architectures_compressed import architecture_of

# A batch is cut so that its logits take no more memory than this, as long as it has more than one sequence.
LOGITS_BYTES = 128 * 2**20
PLACES_AT_ONCE = 128
# What is tokenized at once: lines, and characters of a text.
TEXTS_AT_ONCE, PIECE = 256, 2**18


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and what it was measured on.

    Attributes:
        perplexity: exp of the mean of −log p over all predicted tokens.
        tokens: how many tokens were predicted.
        lines: how many lines or texts they lay in.
        seconds: how long it took, tokenization included.
    """

    perplexity: float
    tokens: int
    lines: int
    seconds: float


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], **options: Any) -> Perplexity:
    """Return a language model's perplexity, by `masked_perplexity` or `causal_perplexity`, depending on its head.

    Args:
        model: stock or compressed.
        tokenizer: the model's.
        texts: to predict.
        **options: of the one function or the other.

    Raises:
        CompressionError: the model has no head of a language model, or one of the functions says so.
    """
    measure = causal_perplexity if is_causal(model) else masked_perplexity
    return measure(model, tokenizer, texts, **options)


@torch.inference_mode()
def masked_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    seed: int = 0,
    share: float = 0.15,
    block: int = 512,
    min_tokens: int = 20,
    batch_size: int = 32,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Perplexity:
    """Return a masked language model's perplexity: exp of its mean loss on words that were masked as a whole.

    Every line of the texts is a sequence. Words "=", WikiText's mark of headings, are dropped first, then lines that are
    too short. All tokens of a masked word become the mask token; none stays or is replaced by another.

    Args:
        model: with the head of a masked language model.
        tokenizer: the model's, a fast one, which knows the words that tokens belong to.
        texts: one or several lines each.
        seed: of the choice of words.
        share: of a line's tokens that are masked, at least one word a line.
        block: lines are truncated to this many tokens, or to the model's positions if these are fewer.
        min_tokens: lines of fewer tokens are dropped; special tokens do not count.
        batch_size: lines in one forward pass, at most.
        progress: show a progress bar.
        processes: that share the work.

    Raises:
        CompressionError: the model or the tokenizer cannot do this, or no line is long enough.
    """
    started = time.perf_counter()
    if not 0 < share <= 1:
        raise CompressionError(f"The share of masked tokens must be above 0 and at most 1, not {share}.")
    block = check_masked(model, tokenizer, block)
    lines = masked_lines(texts, tokenizer, seed=seed, share=share, block=block, min_tokens=min_tokens)
    loss, tokens = summed_loss(model, tokenizer, by_length(lines), batch_size, progress, processes, masked=True)
    return result(loss, tokens, len(lines), started)


def check_masked(model: Any, tokenizer: Any, block: int) -> int:
    """Return how many tokens a line may have: `block`, or the model's positions if these are fewer.

    Raises:
        CompressionError: the model is not a masked one, or the tokenizer lacks what masking needs.
    """
    if is_causal(model):
        raise CompressionError(f"{type(model).__name__} is not a masked language model; use causal_perplexity.")
    if tokenizer.mask_token_id is None or not tokenizer.is_fast:
        missing = "mask token" if tokenizer.mask_token_id is None else "word boundaries, as fast tokenizers have"
        raise CompressionError(f"The tokenizer has no {missing}, which masked perplexity needs; pass the model's own.")
    return clamped(block, model)


def by_length(lines: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return sequences with like lengths together, which needs less padding."""
    return sorted(lines, key=lambda line: len(line[0]))


def masked_lines(
    texts: Sequence[str], tokenizer: Any, *, seed: int, share: float, block: int, min_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the lines' true tokens and which of them are masked, both [length], in the order of the texts.

    Args: see `masked_perplexity`.

    Raises:
        CompressionError: no line is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for tokens, words in tokenized_lines(texts, tokenizer, block=block, min_tokens=min_tokens):
        masked = torch.zeros(len(tokens), dtype=torch.bool)
        masked[[place for i in chosen_words(words, share, generator) for place in words[i]]] = True
        lines.append((tokens, masked))
    return lines


def tokenized_lines(
    texts: Sequence[str], tokenizer: Any, *, block: int, min_tokens: int
) -> list[tuple[Tensor, list[list[int]]]]:
    """Return the lines that are long enough: true tokens [length], and the places of each word's tokens.

    Words with a special token in them, such as unknown words, are left out: they cannot be predicted fairly.

    Args: see `masked_perplexity`.

    Raises:
        CompressionError: no line is long enough.
    """
    found = written_lines(texts)
    # A line that fills the block is long enough, however short that is.
    least = max(1, min(min_tokens, block - tokenizer.num_special_tokens_to_add()))
    special = torch.tensor(tokenizer.all_special_ids)
    lines = []
    for start in range(0, len(found), TEXTS_AT_ONCE):
        some = [cut(line, block) for line in found[start : start + TEXTS_AT_ONCE]]
        encoded = tokenizer(some, truncation=True, max_length=block, return_special_tokens_mask=True)
        for i, (ids, added) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)):
            if len(ids) - sum(added) < least:
                continue
            tokens = torch.tensor(ids)
            words = _words(encoded.word_ids(i), torch.isin(tokens, special).tolist())
            if words:
                lines.append((tokens, words))
    if not lines:
        raise CompressionError(
            f"None of the {len(found)} lines of the text has {min_tokens} tokens that the tokenizer knows; pass longer "
            "lines, or a smaller min_tokens."
        )
    return lines


def written_lines(texts: Sequence[str]) -> list[str]:
    """Return the lines of texts that have words, without WikiText's marks of headings."""
    found = [
        " ".join(word for word in line.split() if word != "=") for text in _listed(texts) for line in text.splitlines()
    ]
    return [line for line in found if line]


def _words(word_ids: list[int | None], special: list[bool]) -> list[list[int]]:
    """Return the places of each word's tokens, without words that hold a special token."""
    words = [
        [i for i, _ in places] for word, places in groupby(enumerate(word_ids), lambda x: x[1]) if word is not None
    ]
    return [places for places in words if not any(special[i] for i in places)]


def chosen_words(words: list[list[int]], share: float, generator: torch.Generator) -> list[int]:
    """Return words drawn at random, by their places in the list: up to the share of all tokens, but at least one.

    Args:
        words: the places of each word's tokens.
        share: of all these tokens.
        generator: draws.
    """
    wanted = max(1, round(share * sum(map(len, words))))
    chosen: list[int] = []
    tokens = 0
    for i in torch.randperm(len(words), generator=generator).tolist():
        if not chosen or tokens + len(words[i]) <= wanted:
            chosen.append(i)
            tokens += len(words[i])
    return chosen


@torch.inference_mode()
def causal_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    block: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Perplexity:
    """Return a causal language model's perplexity over the texts, joined with the token that ends a text between them.

    Windows of `block` tokens begin every `stride` tokens. Of each window only those tokens count that the windows before
    did not have, so every token but the very first counts once, and after the first window each has at least
    `block - stride` tokens before it.

    Args:
        model: with the head of a causal language model.
        tokenizer: the model's.
        texts: in their order; empty ones are skipped.
        block: tokens of a window, or the model's positions if these are fewer.
        stride: tokens between the beginnings of windows, fewer than a window has; by default half a window.
        batch_size: windows in one forward pass, at most.
        progress: show a progress bar.
        processes: that share the work.

    Raises:
        CompressionError: the model cannot do this, the stride does not fit, or there is no text.
    """
    started = time.perf_counter()
    windows, count = causal_windows(model, tokenizer, texts, block=block, stride=stride)
    loss, tokens = summed_loss(model, tokenizer, windows, batch_size, progress, processes, masked=False)
    return result(loss, tokens, count, started)


def causal_windows(
    model: Any, tokenizer: Any, texts: Sequence[str], *, block: int, stride: int | None
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Return the windows' tokens and which of them are predicted there, both [length], and the number of texts.

    Args: see `causal_perplexity`.

    Raises:
        CompressionError: see `causal_perplexity`.
    """
    if not is_causal(model):
        raise CompressionError(f"{type(model).__name__} is not a causal language model; use masked_perplexity.")
    block = clamped(block, model)
    stride = max(1, block // 2) if stride is None else stride
    if not 1 <= stride < block:
        raise CompressionError(
            f"The stride must be at least 1 and below the window's {block} tokens, not {stride}: the first token of a "
            "window cannot be predicted there."
        )
    kept = [text for text in _listed(texts) if text.strip()]
    between = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids: list[int] = []
    for i, text in enumerate(kept):
        ids += [between] if i and between is not None else []
        for piece in _pieces(text):
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise CompressionError(
            f"The text has {len(ids)} tokens, and a perplexity needs at least 2; pass a longer text."
        )
    return list(_windows(torch.tensor(ids), block, stride)), len(kept)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that begin with white space: a tokenizer keeps far more of a text than its tokens."""
    start = 0
    while len(text) - start > PIECE:
        end = max(text.rfind(" ", start + 1, start + PIECE), text.rfind("\n", start + 1, start + PIECE))
        end = end if end > start else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _windows(ids: Tensor, block: int, stride: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield windows of all tokens [tokens], and which of their tokens are new and have one before them, both [length]."""
    seen = 1  # nothing stands before the first token
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + block]
        new = torch.arange(begin, begin + len(window)) >= seen
        yield window, new
        seen = begin + len(window)
        if seen == len(ids):
            return


@torch.inference_mode()
def summed_loss(
    model: Any,
    tokenizer: Any,
    sequences: list[tuple[Tensor, Tensor]],
    batch_size: int,
    progress: bool,
    processes: Processes,
    *,
    masked: bool,
) -> tuple[float, int]:
    """Return the sum of −log p over the asked tokens, and their number.

    Args:
        model: a language model; it is put into evaluation mode temporarily.
        tokenizer: the model's.
        sequences: true tokens and which of them are asked for, both [length]; those of like length side by side.
        batch_size: sequences in one forward pass, at most.
        progress: show a progress bar.
        processes: that share the work.
        masked: whether asked tokens are replaced by the mask token, or each is predicted from the tokens before it.
    """

    def batch_loss(batch: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        total, tokens = 0.0, 0
        for logits, true in asked_logits(model, tokenizer, batch, masked=masked):
            total += float(F.cross_entropy(logits, true.to(logits.device), reduction="none").double().sum())
            tokens += len(true)
        return total, tokens

    with evaluating(model):
        found = processes.map(
            batch_loss, batches_of(sequences, batch_size, model), desc="perplexity", progress=progress
        )
    return sum(total for total, _ in found), sum(tokens for _, tokens in found)


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode temporarily."""
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def asked_logits(
    model: Any, tokenizer: Any, batch: list[tuple[Tensor, Tensor]], *, masked: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits [places, vocabulary] of asked tokens in float32, a few at a time, and the true tokens [places]."""
    shift = 0 if masked else 1
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), padding_of(tokenizer, model.config.vocab_size))
    attention = torch.zeros_like(ids)
    for row, (true, asked) in enumerate(batch):
        ids[row, : len(true)] = true.masked_fill(asked, tokenizer.mask_token_id) if masked else true
        attention[row, : len(true)] = 1
    output = model(input_ids=ids.to(model.device), attention_mask=attention.to(model.device))
    logits = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
    for row, (true, asked) in enumerate(batch):
        (all_places,) = asked.nonzero(as_tuple=True)
        for places in all_places.split(PLACES_AT_ONCE):  # the loss needs copies of the logits
            yield logits[row, (places - shift).to(logits.device)].float(), true[places]


def batches_of(
    sequences: list[tuple[Tensor, Tensor]], batch_size: int, model: Any
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the sequences in batches, whose logits take at most `LOGITS_BYTES` where they have several sequences."""
    per_token = model.config.vocab_size * model.dtype.itemsize
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for sequence in sequences:
        batch = batches[-1] if batches else []
        longest = max(len(ids) for ids, _ in [*batch, sequence])
        if batch and len(batch) < batch_size and (len(batch) + 1) * longest * per_token <= LOGITS_BYTES:
            batch.append(sequence)
        else:
            batches.append([sequence])
    return batches


def is_causal(model: Any) -> bool:
    """Return whether the model predicts the next token, rather than masked ones.

    Raises:
        CompressionError: it has no language model's head, or its causal head sees the tokens that it should predict.
    """
    name, config = type(model).__name__, model.config
    if name.endswith("DoubleHeadsModel") or model.get_output_embeddings() is None:
        raise CompressionError(
            f"Perplexity needs a language model, and {name} has no language modelling head; load the "
            "model with AutoModelForMaskedLM or AutoModelForCausalLM, if its checkpoint has such a head."
        )
    if objective_of(name) != "causal":
        return False
    entry = architecture_of(config.model_type)
    if not (entry and entry.causal) and not getattr(config, "is_decoder", False):
        raise CompressionError(
            f"{name} is set up as an encoder (its config's is_decoder is false), which already sees the next token, "
            "so a perplexity would be meaningless."
        )
    return True


def clamped(block: int, model: Any) -> int:
    """Return `block`, or the number of tokens that the model takes if that is smaller."""
    return int(clamp_length(SimpleNamespace(model_max_length=block), model.config).model_max_length)


def _listed(texts: Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def result(loss: float, tokens: int, lines: int, started: float) -> Perplexity:
    """Return the perplexity of a summed loss."""
    value = float(torch.tensor(loss / tokens, dtype=torch.float64).exp())  # which says inf where math.exp raises
    return Perplexity(value, tokens, lines, round(time.perf_counter() - started, 3))
