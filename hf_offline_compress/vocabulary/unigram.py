"""Unigram: the most probable segmentation of a text into pieces; after pruning, the most probable one of kept pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .token_model import SPACE, TokenModel


class Unigram(TokenModel):
    """The model of SentencePiece's tokenizers (XLM-RoBERTa, ALBERT, …); a piece's id is its place in the list."""

    def _tokens(self) -> dict[str, int]:
        return {piece: number for number, (piece, _) in enumerate(self.content["vocab"])}

    def indispensable(self) -> set[int]:
        """Return the unknown piece, bytes, and the least probable piece, from which the unknown piece's score is computed."""
        pieces = self.content["vocab"]
        least = min(range(len(pieces)), key=lambda number: pieces[number][1])
        unknown = self.content.get("unk_id")
        return super().indispensable() | {least} | ({unknown} if unknown is not None else set())

    def ranking(self) -> list[str]:
        """Return all pieces by their probability."""
        return [piece for piece, _ in sorted(self.content["vocab"], key=lambda entry: -entry[1])]

    def text_of(self, token: str) -> str:
        """Return the piece without marks for spaces."""
        return token.replace(SPACE, " ").strip()

    def pruned(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """Return the model with the pieces that stay."""
        kept = [entry for number, entry in enumerate(self.content["vocab"]) if number in numbers]
        unknown = self.content.get("unk_id")
        return {**self.content, "vocab": kept, "unk_id": None if unknown is None else numbers[unknown]}
