"""What pruning needs from a tokenizer's model of any kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

BYTES = tuple(f"<0x{number:02X}>" for number in range(256))  # what SentencePiece calls bytes
SPACE = "▁"  # what SentencePiece writes for a space


class TokenModel(ABC):
    """The model of a tokenizer.json, which splits words into tokens.

    Attributes:
        content: the model's part of the file.
        tokens: token → id.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Keep the model's part of the file."""
        self.content = content
        self.tokens = self._tokens()

    def _tokens(self) -> dict[str, int]:
        return dict(self.content["vocab"])

    def indispensable(self) -> set[int]:
        """Return the tokens without which the model does not work: the unknown one, and bytes."""
        names = [self.content.get("unk_token"), *(BYTES if self.content.get("byte_fallback") else ())]
        return {self.tokens[name] for name in names if name in self.tokens}

    def parts(self, token: str) -> set[int]:
        """Return the other tokens without which a token cannot be produced."""
        del token
        return set()

    def ranking(self) -> list[str]:
        """Return all tokens, the most probable first; where there are no probabilities, in the order they were learned."""
        return sorted(self.tokens, key=self.tokens.__getitem__)

    @abstractmethod
    def text_of(self, token: str) -> str:
        """Return the text that a token stands for, without marks for the beginning or the inside of a word."""

    @abstractmethod
    def pruned(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """Return the model's part of a tokenizer.json with some of the tokens.

        Args:
            numbers: id → new id, of the tokens that stay; they follow the order of the old ones.
        """

    def _renumbered(self, numbers: Mapping[int, int]) -> dict[str, int]:
        return {token: numbers[number] for token, number in self.tokens.items() if number in numbers}
