"""Pruned vocabularies: tokens are chosen by a text, and written into tokenizer, config and weights."""

from .prune import PrunedVocabulary, prune_vocabulary, vocabulary_text

__all__ = ["PrunedVocabulary", "prune_vocabulary", "vocabulary_text"]
