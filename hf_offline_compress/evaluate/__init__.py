"""How good a compressed model still is, always beside its base."""

from .agreement import agreement, sentence_embeddings

__all__ = ["agreement", "sentence_embeddings"]
