"""What a text loses by pruning: how many of its tokens are kept, and how the others are tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from ..measure.texts import CalibrationText

TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Coverage:
    """A text before and after pruning.

    Attributes:
        source: of the text; see `CalibrationText`.
        sha256: its hash.
        tokens: of the text before, without those put around it.
        kept: share of these that stay.
        growth: tokens after over tokens before: pruned tokens are split into several pieces, characters or bytes.
        unknown: share of the tokens after that are unknown and were not before.
    """

    source: str
    sha256: str
    tokens: int
    kept: float
    growth: float
    unknown: float

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON."""
        return asdict(self)


def ids_of(tokenizer: Any, texts: Sequence[str]) -> Iterable[list[int]]:
    """Give the tokens of each text, whole and without those put around it."""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chosen = list(texts[start : start + TEXTS_AT_ONCE])
        yield from tokenizer(chosen, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]


def counted(tokenizer: Any, texts: Sequence[str]) -> Counter[int]:
    """Return how often each token occurs in texts."""
    counts: Counter[int] = Counter()
    for ids in ids_of(tokenizer, texts):
        counts.update(ids)
    return counts


def coverage_of(text: CalibrationText, before: Any, after: Any, kept: Set[int]) -> Coverage:
    """Return how pruning changes the tokens of a text.

    Args:
        text: at least one token long.
        before: the tokenizer before pruning.
        after: the pruned one.
        kept: ids before pruning that stay.
    """
    old, new = counted(before, text.texts), counted(after, text.texts)
    tokens, now = max(1, old.total()), max(1, new.total())
    unknown = new[after.unk_token_id] - old[before.unk_token_id] if after.unk_token_id is not None else 0
    return Coverage(
        text.source,
        text.sha256,
        old.total(),
        sum(count for number, count in old.items() if number in kept) / tokens,
        new.total() / tokens,
        max(0, unknown) / now,
    )
