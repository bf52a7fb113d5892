"""Which tokens are kept: all or the most frequent of a text, and those that any text may need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from ..errors import CompressionError
from .scripts import is_common, is_written_in
from .token_model import TokenModel


def lasting_tokens(model: TokenModel, fixed: Iterable[int], scripts: set[str]) -> set[int]:
    """Return the tokens that are always kept: fixed ones, and all single characters that may occur.

    Args:
        model: of the tokenizer.
        fixed: ids of special and added tokens.
        scripts: writing systems of the text, whose characters stay.
    """
    names = _names(model)
    lasting = {*fixed} | model.indispensable()
    lasting = lasting.union(*(model.parts(names[number]) for number in fixed if number in names))
    for token, number in model.tokens.items():
        text = model.text_of(token)
        # What is nothing but a mark stands for a space, or for the beginning of a word.
        if not text or (len(text) == 1 and (is_common(text) or is_written_in(text, scripts))):
            lasting |= {number} | model.parts(token)
    return lasting


def covering_tokens(model: TokenModel, counts: Mapping[int, int], lasting: Set[int], coverage: float) -> set[int]:
    """Return the fewest tokens, the most frequent, that make up a share of a text's tokens; those that last included.

    Args:
        model: of the tokenizer.
        counts: how often each token occurs in the text, by id.
        lasting: tokens that stay anyway.
        coverage: share of the text's tokens, up to 1.
    """
    kept, names = {*lasting}, _names(model)
    wanted = coverage * sum(counts.values())
    covered = sum(count for number, count in counts.items() if number in kept)
    for number, _ in _frequent(counts):
        if covered >= wanted:
            break
        if number not in kept:
            added = {number} | model.parts(names[number])
            covered += sum(counts.get(each, 0) for each in added - kept)
            kept |= added
    return kept


def tokens_of_size(
    model: TokenModel, counts: Mapping[int, int], lasting: Set[int], scripts: set[str], size: int
) -> set[int]:
    """Return so many tokens: those that last, the most frequent of a text, and the most probable of its writing systems.

    Args:
        model: of the tokenizer.
        counts: how often each token occurs in the text, by id.
        lasting: tokens that stay anyway.
        scripts: writing systems of the text.
        size: how many.

    Raises:
        CompressionError: those that last are more.
    """
    if len(lasting) > size:
        raise CompressionError(
            f"A vocabulary of {size:,} tokens is too small: special tokens, bytes and single characters alone are "
            f"{len(lasting):,}; ask for more than these."
        )
    kept, names = {*lasting}, _names(model)
    candidates = [names[number] for number, _ in _frequent(counts)]
    candidates += [token for token in model.ranking() if is_written_in(model.text_of(token), scripts)]
    for token in candidates:
        if len(kept) >= size:
            break
        if model.tokens[token] not in kept:
            added = ({model.tokens[token]} | model.parts(token)) - kept
            if len(kept) + len(added) <= size:
                kept |= added
    return kept


def _frequent(counts: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return tokens and their counts, the most frequent first."""
    return sorted(((number, count) for number, count in counts.items() if count), key=lambda item: (-item[1], item[0]))


def _names(model: TokenModel) -> dict[int, str]:
    return {number: token for token, number in model.tokens.items()}
