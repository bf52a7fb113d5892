"""WordPiece: the longest token that fits, from the left. A text whose tokens are all kept is split as before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .token_model import TokenModel


class WordPiece(TokenModel):
    """The model of BERT's tokenizers: at every place the longest known token, which removing other tokens does not change."""

    def text_of(self, token: str) -> str:
        """Return the token without the mark for the inside of a word."""
        return token.removeprefix(self.content.get("continuing_subword_prefix") or "##")

    def pruned(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """Return the model with the tokens that stay."""
        return {**self.content, "vocab": self._renumbered(numbers)}
