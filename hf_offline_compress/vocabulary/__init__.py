"""A vocabulary with some of its tokens: chosen by a text, written into tokenizer, config and weights."""

from .prune import PrunedVocabulary, prune_vocabulary, vocabulary_text

__all__ = ["PrunedVocabulary", "prune_vocabulary", "vocabulary_text"]
