"""Byte-pair encoding: neighbouring symbols are merged, the pair that was learned first before all others.

A token can only be produced if all intermediate results of its merges are kept too. A text whose tokens are all kept is
then split as before: each merge that happened is still there, none has been added, and their order is the same, so at
every step the first of all possible merges is the one that it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from tokenizers import decoders

from .token_model import SPACE, TokenModel


class ByteBPE(TokenModel):
    """The model of GPT-2's, RoBERTa's and Llama's tokenizers; of bytes, or of characters with bytes for what is unknown."""

    def __init__(self, content: Mapping[str, Any], *, byte_level: bool = True) -> None:
        """Read the merges, which files of different ages write as lists or as texts.

        Args:
            content: the model's part of the file.
            byte_level: whether tokens are written in GPT-2's letters for bytes.
        """
        super().__init__(content)
        self.byte_level = byte_level
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in content["merges"]]
        self.pairs = [(first, second) for first, second in merges]
        self.ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self.inside = content.get("continuing_subword_prefix") or ""
        self.end = content.get("end_of_word_suffix") or ""
        self.decoder = decoders.ByteLevel()

    def indispensable(self) -> set[int]:
        """Return the unknown token and all single bytes."""
        alphabet = {token for token in self.tokens if self.byte_level and len(token) == 1}
        return super().indispensable() | {self.tokens[token] for token in alphabet}

    def parts(self, token: str) -> set[int]:
        """Return the token and all intermediate results of its merges; nothing where the merges do not produce it."""
        symbols = self._symbols(token)
        needed = {*symbols}
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair) for pair in pairwise(symbols)]
            best = min((rank for rank in ranks if rank is not None), default=None)
            if best is None:
                return set()
            place = ranks.index(best)
            symbols[place : place + 2] = [self._merged(symbols[place], symbols[place + 1])]
            needed.add(symbols[place])
        return {self.tokens[each] for each in needed} if needed <= self.tokens.keys() else set()

    def text_of(self, token: str) -> str:
        """Return the text that the token's bytes stand for; bytes that are not valid text become U+FFFD."""
        token = token.removeprefix(self.inside).removesuffix(self.end)
        return self.decoder.decode([token]).strip() if self.byte_level else token.replace(SPACE, " ").strip()

    def pruned(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """Return the model with the kept tokens, and the merges whose parts and result are kept."""
        vocabulary = self._renumbered(numbers)
        merges = [
            merge
            for merge, pair in zip(self.content["merges"], self.pairs, strict=True)
            if {*pair, self._merged(*pair)} <= vocabulary.keys()
        ]
        return {**self.content, "vocab": vocabulary, "merges": merges}

    def _merged(self, first: str, second: str) -> str:
        return first + second.removeprefix(self.inside)

    def _symbols(self, token: str) -> list[str]:
        """Return what a token is before any merge: its characters, with the marks for the inside and the end of a word."""
        inside, end = bool(self.inside) and token.startswith(self.inside), bool(self.end) and token.endswith(self.end)
        letters = list(
            token.removeprefix(self.inside).removesuffix(self.end) if end else token.removeprefix(self.inside)
        )
        symbols = [letter if i == 0 and not inside else f"{self.inside}{letter}" for i, letter in enumerate(letters)]
        return [*symbols[:-1], f"{symbols[-1]}{self.end}"] if end and symbols else symbols
