"""Prunes a vocabulary: which tokens are kept, and tokenizer, config and model with only these."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..architectures.families import family_of
from ..base.checkpoint import pipeline_root
from ..base.texts import prompts_of
from ..errors import CompressionError, refusing
from ..measure.presenting import presented
from ..measure.texts import CalibrationText, load_texts
from ..request.vocabulary import Vocabulary
from .coverage import counted, coverage_of
from .numbers import named_ids, renumbered
from .scripts import scripts_of
from .selection import covering_tokens, lasting_tokens, tokens_of_size
from .tokenizer_json import fixed_ids, numbered, pruned_tokenizer, token_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_JSON = "tokenizer.json"
# A padding token's number is where positions begin in some models; then it keeps its number, and all before it stay.
MOST_BEFORE_PADDING = 1000
# Of so many texts it is seen which tokens the model reads with them, as prompts or in its chat template.
SHOWN = 64


@dataclass(frozen=True)
class PrunedVocabulary:
    """A vocabulary with some of its tokens.

    Attributes:
        rows: of the base's embeddings that stay, in their new order.
        tokenizer: with these tokens alone.
        record: what reports say of it.
    """

    rows: tuple[int, ...]
    tokenizer: Any
    record: dict[str, Any]

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json with the new vocabulary."""
        return {**values, **renumbered(values, self._numbers), "vocab_size": len(self.rows)}

    def apply(self, model: PreTrainedModel) -> int:
        """Prune a stock model in place; return the number of removed parameters.

        Raises:
            CompressionError: see `keep_rows`.
        """
        from .weights import keep_rows

        removed = keep_rows(model, self.rows, renumbered(model.config.to_dict(), self._numbers))
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            for key, value in renumbered(generation.to_dict(), self._numbers).items():
                setattr(generation, key, value)
        return removed

    @property
    def _numbers(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.rows)}


def vocabulary_text(asked: Vocabulary, tokenizer: Any, folder: Path | None) -> CalibrationText:
    """Return the text whose tokens stay, with what the model reads around it: a base's prompts, or its chat template.

    Args:
        asked: names the text.
        tokenizer: of the base, if it has one.
        folder: of the base; None for a model in memory.

    Raises:
        CompressionError: the text cannot be read.
    """
    text = load_texts(asked.text, "vocabulary text")
    assert text is not None  # a recipe's vocabulary names one
    if tokenizer is None:
        return text
    return presented(text, tokenizer, prompts=prompts_of(pipeline_root(folder)) if folder else (), chat=True)


def prune_vocabulary(
    asked: Vocabulary,
    text: CalibrationText,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    name: str,
    generation: Mapping[str, Any] | None = None,
    judged: Mapping[str, CalibrationText | None] | None = None,
) -> PrunedVocabulary:
    """Return the vocabulary with the tokens that were asked for.

    Special and added tokens stay, those that the configs name, bytes, and single characters of the text's writing systems.

    Args:
        asked: how many tokens of the text stay.
        text: whose tokens stay, and those that the model reads around it.
        tokenizer: of the base, a fast one.
        config: of the base.
        name: how the base is called, for errors.
        generation: the base's generation config, if it has one.
        judged: purpose → text of which the record says what becomes of it.

    Raises:
        CompressionError: the tokenizer cannot be pruned, nothing would be left out, or the text's tokens are unknown to it.
    """
    size = int(config["vocab_size"])
    content = _content(tokenizer, name)
    model = token_model(content, name)
    counts = counted(tokenizer, text.texts)
    unknown = counts[tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else 0
    if 2 * unknown >= counts.total():
        raise CompressionError(
            f"The tokenizer of '{name}' does not know most of the vocabulary text '{text.source}' ({unknown:,} of "
            f"{counts.total():,} tokens are unknown); pass text in the model's language."
        )
    scripts = scripts_of(text.texts)
    named = {number for number in named_ids(config) | named_ids(generation or {}) if number < size}
    fixed = fixed_ids(content) | named | _before_padding(config, name)
    tokens = {*tokenizer.get_vocab().values()}
    around = counted(tokenizer, text.read[:SHOWN]) - counted(tokenizer, text.texts[: min(SHOWN, len(text.read))])
    lasting = lasting_tokens(model, (fixed & tokens) | {*around}, scripts)
    known = {*model.tokens.values()}
    of_model = {number: count for number, count in counts.items() if number in known}
    if asked.size is None:
        kept = covering_tokens(model, of_model, lasting, 1.0 if asked.coverage is None else asked.coverage)
    else:
        if asked.size >= len(tokens):
            raise CompressionError(
                f"The vocabulary of '{name}' has {len(tokens):,} tokens, fewer than the {asked.size:,} asked for; ask for fewer."
            )
        kept = tokens_of_size(model, of_model, lasting, scripts, asked.size)
    if len(kept) >= len(tokens):
        raise CompressionError(
            f"All {len(tokens):,} tokens of '{name}' would stay: the text '{text.source}' has them all; ask for a smaller "
            "vocabulary_size (--vocabulary-size), or leave the vocabulary as it is."
        )
    beyond = [number for number in kept if number >= size]
    if beyond and fixed - tokens:
        raise CompressionError(
            f"The tokenizer of '{name}' has tokens that the model lacks, and its config names rows that are no tokens, so its "
            "vocabulary cannot be pruned; correct its config."
        )
    written = json.dumps(pruned_tokenizer(content, model, kept), ensure_ascii=False, separators=(",", ":"))
    new = _tokenizer_of(tokenizer, written, numbered(kept), name)
    rows = [number for number in sorted(kept) if number < size] + sorted(fixed - tokens)
    record = {
        **asked.to_dict(),
        "text": {"source": text.source, "sha256": text.sha256},
        "writing_systems": sorted(scripts),
        "tokens_before": len(tokens),
        "tokens": len(kept),
        "tokenizer_bytes": len(written.encode()),
        "rows_before": size,
        "rows": len(rows),
        "coverage_of": {
            purpose: coverage_of(each, tokenizer, new, kept).to_dict()
            for purpose, each in {"vocabulary": text, **(judged or {})}.items()
            if each is not None
        },
    }
    return PrunedVocabulary(tuple(rows), new, record)


def _content(tokenizer: Any, name: str) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer.

    Raises:
        CompressionError: it has none.
    """
    if tokenizer is None:
        raise CompressionError(f"'{name}' has no tokenizer, so there is no vocabulary to prune; pass tokenizer=.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not tokenizer.is_fast:
        raise CompressionError(
            f"The tokenizer of '{name}' is a {type(tokenizer).__name__}, which has no fast form (tokenizer.json); only "
            "vocabularies of fast tokenizers can be pruned."
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return {**content, "truncation": None, "padding": None}  # set by calls, and again by the next


def _before_padding(config: Mapping[str, Any], name: str) -> set[int]:
    """Return the rows that must be kept so that the padding token keeps its id, where position ids start after it.

    Raises:
        CompressionError: they are too many.
    """
    if not family_of(config).entry.positions_from_padding:
        return set()
    padding = config.get("pad_token_id") or 0
    if padding > MOST_BEFORE_PADDING:
        raise CompressionError(
            f"Positions of '{name}' start after its padding token (id {padding:,}), so its vocabulary cannot be pruned."
        )
    return set(range(padding + 1))


def _tokenizer_of(tokenizer: Any, text: str, numbers: Mapping[int, int], name: str) -> Any:
    """Return a tokenizer of the same class, as it will be loaded from what is saved, and check that it is what was meant."""
    what, advice = f"The pruned tokenizer of '{name}' cannot be read", "Leave the vocabulary as it is."
    with tempfile.TemporaryDirectory() as folder, refusing(what, advice):
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            if file.name not in (TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json") and (
                file.suffix in (".txt", ".json", ".model")
            ):
                file.unlink()
        (Path(folder) / TOKENIZER_JSON).write_text(text, "utf-8")
        _forget_ids(Path(folder) / "tokenizer_config.json", numbers)
        found = type(tokenizer).from_pretrained(folder, local_files_only=True)
    found.name_or_path = ""
    wanted = Tokenizer.from_str(text).get_vocab()
    expected = {token: numbers[number] for token, number in tokenizer.get_vocab().items() if number in numbers}
    if not found.get_vocab() == wanted == expected:
        raise CompressionError(
            f"The tokenizer of '{name}', a {type(tokenizer).__name__}, adds tokens of its own when it is loaded, so its "
            "vocabulary cannot be pruned. Leave the vocabulary as it is."
        )
    return found


def _forget_ids(file: Path, numbers: Mapping[int, int]) -> None:
    """Renumber the added tokens in a tokenizer_config.json, where it lists them."""
    values = json.loads(file.read_text("utf-8"))
    if added := values.get("added_tokens_decoder"):
        values["added_tokens_decoder"] = {str(numbers[int(number)]): token for number, token in added.items()}
        file.write_text(json.dumps(values, ensure_ascii=False), "utf-8")
