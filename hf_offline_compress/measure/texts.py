"""Calibration text: where it comes from, and its tokens. The text itself is never stored; its hash is."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError, listing, needs_extra

TOKENS = 16_384
# Counting tokens needs no model, so more of them are used.
COUNTED = 2**20
COUNTED_AT_ONCE = 256
LENGTH = 128
# Characters: more than any token has, except runs of one character.
CHARACTERS = 64
# Texts are tokenized in pieces of at most so many characters: one line may be a whole book.
PIECE = LENGTH * CHARACTERS
# Windows are drawn from this many times the tokens asked for, so that one long text is not all that is used.
DRAWN_FROM = 4
# At most this share of what is drawn is held out from measuring, to judge by.
KEPT_APART = 8
MOST_BYTES = 2**30
BATCH_SIZE = 16
MASKED = 0.15
MOSTLY = 0.5
# With fewer tokens nothing can be measured; with fewer than these, not much: results vary with the seed.
LEAST_TOKENS, FEW_TOKENS = 256, 4_000
# Lines examined to tell whether a text is a table or JSON.
LOOKED_AT = 64
TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "document", "review")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationText:
    """Texts, and what a report records of them.

    Attributes:
        texts: at least one, none empty.
        source: "bundled", "caller", a file's name or a data set's.
        read: the same texts as the model reads them, with prompts or as chats; empty where they are read as they are.
        prompts: that stand before the texts in `read`.
        chat: share of the texts in `read` that are chats.
    """

    texts: tuple[str, ...]
    source: str
    read: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    chat: float = 0.0

    @property
    def sha256(self) -> str:
        """Hash of the texts, one per line."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationRecord:
    """The record of a calibration.

    Attributes:
        source: see `CalibrationText`.
        sha256: hash of all texts.
        texts: how many were used.
        tokens: how many tokens, padding not counted.
        counted: how many tokens were counted, for embeddings; 0 if none were.
        masked: share of tokens replaced by the mask token.
        seed: of the choice of texts and of masked places.
        prompts: that stood before the texts.
        chat: share of the texts that were put into the chat template.
    """

    source: str
    sha256: str
    texts: int
    tokens: int
    counted: int
    masked: float
    seed: int
    prompts: tuple[str, ...] = ()
    chat: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, both [sequences, length]."""

    input_ids: Tensor
    attention_mask: Tensor

    def places(self, mask_token: int | None) -> Tensor:
        """Return where a model is asked to predict, bool: where the mask token is, or at all tokens where there is none."""
        own = self.attention_mask.bool()
        return own if mask_token is None else own & (self.input_ids == mask_token)


def load_texts(calibration: str | Path | Iterable[str] | None, purpose: str = "calibration") -> CalibrationText | None:
    """Return the texts that the user chose, or None for no calibration.

    Args:
        calibration: "bundled" (the package's own text), None or "none", texts, a local file with one text per line, or the
            name of a `datasets` data set ("name", "name:config" or "name:config:split").

        purpose: what errors call the text.

    Raises:
        CompressionError: there is no such file or data set, or it has no usable line.
    """
    if calibration is None or calibration == "none":
        return None
    if calibration == "bundled":
        return _texts((files(__package__) / "data" / "calibration.txt").read_text("utf-8").splitlines(), "bundled")
    if not isinstance(calibration, str | Path):
        lines = list(calibration) if isinstance(calibration, Iterable) else [calibration]  # a generator gives them once
        if not all(isinstance(text, str) for text in lines):
            raise CompressionError(
                f"The {purpose} must be texts: a list of strings or a generator of them, a file, or a data set's name; this is a "
                f"{type(calibration).__name__} and holds what is no string."
            )
        return _texts(lines, "caller", purpose)
    path = Path(calibration)
    if path.is_file():
        if (size := path.stat().st_size) > MOST_BYTES:
            raise CompressionError(
                f"The {purpose} file '{path.name}' has {size / 1e9:.1f} GB; texts are read whole, so at most "
                f"{MOST_BYTES / 1e9:.1f} GB. Pass its first lines."
            )
        try:
            return _texts(path.read_text("utf-8").splitlines(), path.name, purpose)
        except UnicodeDecodeError as error:
            raise CompressionError(f"The {purpose} file '{path.name}' is not UTF-8 text.") from error
    if (
        isinstance(calibration, Path)
        or path.suffix in (".txt", ".text", ".csv", ".json", ".jsonl", ".md")
        or path.is_dir()
    ):
        raise CompressionError(f"There is no {purpose} file '{calibration}'; pass a text file with one text per line.")
    return _texts(_from_datasets(calibration, purpose), calibration, purpose)


def make_batches(
    text: CalibrationText,
    tokenizer: Any,
    *,
    masked: bool,
    positions: int,
    seed: int,
    batch_size: int | None = None,
    vocabulary: int | None = None,
    wanted: int = TOKENS,
    apart: int = 0,
    used: int | None = None,
    from_end: bool = False,
) -> tuple[list[Batch], CalibrationRecord]:
    """Return some tokens of the texts, in batches of texts of like length; long texts are cut into windows.

    Args:
        text: what to tokenize.
        tokenizer: the base's.
        masked: replace 15 % of the tokens by the mask token, as a masked language model has seen them.
        positions: longest sequence that the model takes.
        seed: of the choice of texts and of masked places.
        batch_size: sequences a batch.
        vocabulary: tokens that the model has; the tokenizer may have more, for padding.
        wanted: approximate number of tokens.
        apart: tokens that are held out for `batches_apart`.
        used: approximate number of these tokens that are returned; by default all.
        from_end: return the last tokens that were drawn, so that none are returned otherwise, if there is enough text.

    Raises:
        CompressionError: there is too little text, the tokenizer knows hardly any of its tokens or has no mask token where
            it is needed, or the model lacks some of them.
    """
    drawn = _drawn(text, tokenizer, positions, seed, wanted)
    rest = drawn[len(_apart(drawn, apart)) :]
    chosen = _first(rest[::-1] if from_end else rest, wanted if used is None else min(used, wanted))
    tokens = sum(len(window.ids) for window in chosen)
    # GPT-2 has one token for everything special, and none for the unknown.
    unknown_token = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    never_words = {*tokenizer.all_special_ids} - {unknown_token}
    plain = [i for window in chosen for i, special in zip(window.ids, window.special, strict=True) if not special]
    words, unknown = len(plain), sum(token == unknown_token for token in plain)
    if unknown > MOSTLY * words or not words:
        raise CompressionError(
            f"The tokenizer does not know most of the calibration text '{text.source}' ({unknown} of {words} "
            "tokens are unknown to it); pass a calibration of your own, in the model's language."
        )
    if masked and tokenizer.mask_token_id is None:
        raise CompressionError("The tokenizer has no mask token, which a masked language model's calibration needs.")
    _check_amount(text, words, sum(token in never_words for token in plain))
    if vocabulary is not None:
        _check_known(torch.tensor([token for window in chosen for token in window.ids]), tokenizer, vocabulary)
    padding = padding_of(tokenizer, vocabulary)
    batches = _batches(chosen, tokenizer, masked, seed, batch_size or BATCH_SIZE, padding)
    share = MASKED if masked else 0.0
    record = CalibrationRecord(text.source, text.sha256, len(chosen), tokens, 0, share, seed, text.prompts, text.chat)
    return batches, record


def batches_apart(
    text: CalibrationText,
    tokenizer: Any,
    *,
    masked: bool,
    positions: int,
    seed: int,
    batch_size: int | None = None,
    vocabulary: int | None = None,
    wanted: int = TOKENS,
    apart: int = 0,
) -> list[Batch]:
    """Return the tokens that `make_batches`, with the same arguments but `used`, leaves out: `apart`, or fewer of little text."""
    drawn = _drawn(text, tokenizer, positions, seed, wanted)
    padding = padding_of(tokenizer, vocabulary)
    return _batches(_apart(drawn, apart), tokenizer, masked, seed, batch_size or BATCH_SIZE, padding)


@dataclass(frozen=True)
class Counts:
    """How often tokens and positions are looked up, float64.

    Attributes:
        tokens: each token, [rows].
        places: each position in a text, [tokens of the longest text].
    """

    tokens: Tensor
    places: Tensor


def count_tokens(text: CalibrationText, tokenizer: Any, *, masked: bool, positions: int, rows: int) -> Counts:
    """Return the counts over all texts, or over their first `COUNTED` tokens.

    Args:
        text: what to tokenize.
        tokenizer: the base's.
        masked: count 15 % of the tokens as the mask token, as a masked language model has seen them.
        positions: longest sequence that the model takes. Places are counted beyond it too.
        rows: of the embedding.
    """
    counts, lengths = torch.zeros(rows, dtype=torch.float64), list[int]()
    texts = text.read or text.texts
    for start in range(0, len(texts), COUNTED_AT_ONCE):
        some = texts[start : start + COUNTED_AT_ONCE]
        pieces = [(i, piece) for i, whole in enumerate(some) for piece in _pieces(whole)]
        long, ids, special = [0] * len(some), [], []
        for window in _windows([piece for _, piece in pieces], tokenizer, positions):
            ids += window.ids
            special += window.special
            i = pieces[window.text][0]
            long[i] += len(window.ids) if not long[i] else len(window.ids) - sum(window.special)
        numbers = torch.tensor(ids, dtype=torch.long)
        _check_known(numbers, tokenizer, rows)
        hidden = MASKED * (1 - torch.tensor(special, dtype=torch.float64)) * masked
        counts += torch.bincount(numbers, 1 - hidden, minlength=rows)
        if masked:
            counts[tokenizer.mask_token_id] += hidden.sum()
        lengths += long
        if counts.sum() >= COUNTED:
            break
    # A text has each place below its length.
    places = torch.bincount(torch.tensor(lengths)).double().flip(0).cumsum(0).flip(0)[1:]
    return Counts(counts, places)


@dataclass(frozen=True)
class _Window:
    """A window of tokens: their ids, which of them the tokenizer added, and the number of the text."""

    ids: list[int]
    special: list[int]
    text: int


def _windows(texts: Sequence[str], tokenizer: Any, positions: int) -> list[_Window]:
    """Return texts cut into windows of the length that calibration has; by slow tokenizers, the first one of each."""
    fast = getattr(tokenizer, "is_fast", False)
    more = {"return_overflowing_tokens": True} if fast else {}
    length = min(LENGTH, positions)
    found = tokenizer(list(texts), truncation=True, max_length=length, return_special_tokens_mask=True, **more)
    owners = found["overflow_to_sample_mapping"] if fast else range(len(texts))
    items = zip(found["input_ids"], found["special_tokens_mask"], owners, strict=True)
    return [_Window(ids, special, owner) for ids, special, owner in items if ids]


def _drawn(text: CalibrationText, tokenizer: Any, positions: int, seed: int, wanted: int) -> list[_Window]:
    """Return windows of texts in an order drawn at random, of `DRAWN_FROM` times the tokens wanted or of all texts."""
    order = [piece for whole in text.read or text.texts for piece in _pieces(whole)]
    draw = random.Random(seed)  # noqa: S311
    draw.shuffle(order)
    windows: list[_Window] = []
    tokens = 0
    for start in range(0, len(order), 64):
        some = _windows(order[start : start + 64], tokenizer, positions)
        windows += some
        tokens += sum(len(window.ids) for window in some)
        if tokens >= DRAWN_FROM * wanted:
            break
    draw.shuffle(windows)
    return windows


def _first(windows: Sequence[_Window], wanted: int) -> list[_Window]:
    """Return windows from the first one on, until they have this many tokens."""
    chosen, tokens = [], 0
    for window in windows:
        if tokens >= wanted:
            break
        chosen.append(window)
        tokens += len(window.ids)
    return chosen


def _apart(drawn: Sequence[_Window], apart: int) -> list[_Window]:
    """Return the windows that are held out: this many tokens, but at most a share of all."""
    return _first(drawn, min(apart, sum(len(window.ids) for window in drawn) // KEPT_APART))


def _pieces(text: str) -> list[str]:
    """Return a text in pieces of at most `PIECE` characters, cut at white space where there is any."""
    pieces = []
    while len(text) > PIECE:
        end = text.rfind(" ", PIECE // 2, PIECE)
        end = end if end > 0 else PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def cut(text: str, tokens: int) -> str:
    """Return the beginning of a text, enough for this many tokens.

    Tokenizers cut what they have tokenized whole, and one line may be a whole book.
    """
    return text[: tokens * CHARACTERS]


def padding_of(tokenizer: Any, vocabulary: int | None) -> int:
    """Return the token to pad with, one within the model's vocabulary: the attention mask hides it, but it is looked up."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in known if i is not None and (vocabulary is None or i < vocabulary)), 0)


def _check_amount(text: CalibrationText, words: int, empty: int) -> None:
    """Raise CompressionError if there is too little text, and warn if there is little.

    Args:
        text: as it was given.
        words: tokens of it that are used, except those that the tokenizer adds around each text.
        empty: of these, special tokens, which stand for no text.
    """
    if words < LEAST_TOKENS:
        raise CompressionError(
            f"The calibration text '{text.source}' has {words} tokens, and needs {LEAST_TOKENS} at least, better "
            f"{FEW_TOKENS:,}; pass more text, calibration='bundled', or calibration=None (--calibration none) for a "
            "run without text."
        )
    if words < FEW_TOKENS and text.source != "bundled":
        logger.warning(
            "The calibration text '%s' has only %s tokens: below %s, results vary with the seed; give more.",
            text.source,
            f"{words:,}",
            f"{FEW_TOKENS:,}",
        )
    if empty > MOSTLY * words:
        logger.warning("The calibration text '%s' is mostly special tokens, and so hardly a text.", text.source)


def _check_known(tokens: Tensor, tokenizer: Any, vocabulary: int) -> None:
    """Raise CompressionError if a text has tokens that the model lacks."""
    if unknown := tokens[tokens >= vocabulary].unique().tolist():
        raise CompressionError(
            f"The tokenizer makes tokens of the calibration text that the model does not have: it has {vocabulary:,}, and "
            f"{tokenizer.convert_ids_to_tokens(unknown[0])!r} is number {unknown[0]:,}. Pass the tokenizer that the model was "
            "trained with, or resize the model's embeddings and train them."
        )


def _batches(
    windows: list[_Window],
    tokenizer: Any,
    masked: bool,
    seed: int,
    batch_size: int,
    padding: int,
) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    by_length = sorted(windows, key=lambda window: len(window.ids))
    batches = []
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        longest = max(len(window.ids) for window in chosen)
        ids = torch.full((len(chosen), longest), padding)
        mask = torch.zeros_like(ids)
        free = torch.zeros_like(ids, dtype=torch.bool)
        for row, window in enumerate(chosen):
            length = len(window.ids)
            ids[row, :length] = torch.tensor(window.ids)
            mask[row, :length] = 1
            free[row, :length] = torch.tensor(window.special) == 0
        if masked:
            hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & free
            if not hidden.any() and free.any():  # the loss of a masked language model lies at masked tokens alone
                places = free.nonzero()
                hidden[tuple(places[len(places) // 2])] = True
            ids[hidden] = tokenizer.mask_token_id
        batches.append(Batch(ids, mask))
    return batches


def _texts(lines: Sequence[str], source: str, purpose: str = "calibration") -> CalibrationText:
    texts = tuple(stripped for line in lines if (stripped := encodable(line).strip()))
    if not texts:
        raise CompressionError(f"The {purpose} '{source}' has no usable line; it needs at least one text.")
    if source != "bundled" and (doubt := _doubt(texts)):
        logger.warning("The %s text '%s' %s", purpose.removesuffix(" text"), source, doubt)
    return CalibrationText(texts, source)


def encodable(line: str) -> str:
    """Return a text that UTF-8 has codes for; halves of characters, as JSON may have, are put together, or replaced."""
    return line if line.isascii() else line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def warn_of_overlap(text: CalibrationText | None, validation: CalibrationText | None) -> None:
    """Warn where a validation text is, in good part, the calibration text: it would judge by text that was calibrated on."""
    if text is None or validation is None:
        return
    known = set(text.texts)
    if sum(line in known for line in validation.texts) > MOSTLY * len(validation.texts):
        logger.warning(
            "The validation text '%s' is part of the calibration text '%s', which biases results; pass held-out text.",
            validation.source,
            text.source,
        )


def _doubt(texts: Sequence[str]) -> str | None:
    """Return what makes texts unusual input for a model, as the end of a sentence; None if nothing does."""
    if len(texts) > 1 and len(set(texts)) == 1:
        return "is one line over and over; pass texts of many kinds."
    some = texts[:LOOKED_AT]
    words = Counter(word for text in some for word in text.split())
    word, times = words.most_common(1)[0]
    if times > MOSTLY * words.total() and words.total() > 1:
        return f"is mostly one word, '{word[:40]}'; pass texts of many kinds."
    if sum(map(_is_json, some)) > MOSTLY * len(some):
        return "looks like JSON lines; pass only the texts, one per line."
    if len(some) >= 5 and any(_is_table(some, mark) for mark in "\t,;"):
        return "looks like a table (CSV); pass only the column of texts, one per line."
    return None


def _is_json(line: str) -> bool:
    if line[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_table(lines: Sequence[str], mark: str) -> bool:
    """Whether nearly all lines have as many separators as the first one, and more than prose would."""
    wanted = lines[0].count(mark)
    alike = sum(line.count(mark) == wanted for line in lines)
    return wanted >= (1 if mark == "\t" else 2) and alike >= 0.9 * len(lines)


def _from_datasets(spec: str, purpose: str) -> list[str]:
    """Return texts of a data set, of its text column, as many as a calibration can use."""
    try:
        import datasets
    except ImportError as error:
        reading = f"'{spec}' is no local file, and reading it as a data set"
        raise CompressionError(needs_extra(reading, "datasets", "datasets")) from error
    name, config, split = [*spec.split(":"), "", ""][:3]
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        column = next((c for c in TEXT_COLUMNS if c in (stream.column_names or [])), None)
        if column is None:
            raise CompressionError(f"The data set '{spec}' has none of the columns {listing(TEXT_COLUMNS)}.")
        return [str(row[column]) for row in stream.take(4096)]
    except CompressionError:
        raise
    except Exception as error:  # datasets raises many kinds
        raise CompressionError(
            f"There is no {purpose} file '{spec}', and no data set of that name could be loaded: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
