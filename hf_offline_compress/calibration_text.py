"""Calibration text: where it comes from, and its tokens. The text itself is never stored; its hash is."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CompressionError, listing

TOKENS = 16_384
# Counting tokens takes no model, so there may be more of them.
COUNTED = 2**20
COUNTED_AT_ONCE = 256
LENGTH = 128
BATCH_SIZE = 16
MASKED = 0.15
MOSTLY = 0.5
TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "document", "review")


@dataclass(frozen=True)
class CalibrationText:
    """Texts, and what a report says of them.

    Attributes:
        texts: at least one, none empty.
        source: "bundled", "caller", a file's name or a data set's.
    """

    texts: tuple[str, ...]
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the texts, one a line."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()


@dataclass(frozen=True)
class CalibrationRecord:
    """What of a calibration is written down.

    Attributes:
        source: see `CalibrationText`.
        sha256: hash of all texts.
        texts: how many were used.
        tokens: how many tokens, padding not counted.
        counted: how many tokens were counted, for embeddings; 0 if none were.
        masked: share of tokens replaced by the mask token.
        seed: of the choice of texts and of masked places.
    """

    source: str
    sha256: str
    texts: int
    tokens: int
    counted: int
    masked: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, both [sequences, length]."""

    input_ids: Tensor
    attention_mask: Tensor


def load_texts(calibration: str | Path | Sequence[str] | None, purpose: str = "calibration") -> CalibrationText | None:
    """Return the texts that a user means, or None for no calibration.

    Args:
        calibration: "bundled" (the package's own text), None or "none", texts, a local file with one text a line, or the
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
        if not all(isinstance(text, str) for text in calibration):
            raise CompressionError(f"The {purpose} must be texts: a list of strings, a file, or a data set's name.")
        return _texts(calibration, "caller", purpose)
    path = Path(calibration)
    if path.is_file():
        try:
            return _texts(path.read_text("utf-8").splitlines(), path.name)
        except UnicodeDecodeError as error:
            raise CompressionError(f"The {purpose} file '{path.name}' is not UTF-8 text.") from error
    if (
        isinstance(calibration, Path)
        or path.suffix in (".txt", ".text", ".csv", ".json", ".jsonl", ".md")
        or path.is_dir()
    ):
        raise CompressionError(f"There is no {purpose} file '{calibration}'; pass a text file with one text a line.")
    return _texts(_from_datasets(calibration, purpose), calibration, purpose)


def make_batches(
    text: CalibrationText, tokenizer: Any, *, masked: bool, positions: int, seed: int, batch_size: int | None = None
) -> tuple[list[Batch], CalibrationRecord]:
    """Return about `TOKENS` tokens of the texts, in batches of texts of like length.

    Args:
        text: what to tokenize.
        tokenizer: the base's.
        masked: replace 15 % of the tokens by the mask token, as a masked language model has seen them.
        positions: longest sequence that the model takes.
        seed: of the choice of texts and of masked places.
        batch_size: sequences a batch.

    Raises:
        CompressionError: the tokenizer knows hardly any of the tokens, or has no mask token where it is needed.
    """
    order = list(text.texts)
    random.Random(seed).shuffle(order)  # noqa: S311
    sequences, special, tokens, words, unknown = [], [], 0, 0, 0
    for start in range(0, len(order), 64):
        encoded = _encoded(order[start : start + 64], tokenizer, positions)
        for ids, specials in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            if tokens >= TOKENS or not ids:
                break
            sequences.append(ids)
            special.append(specials)
            tokens += len(ids)
            plain = [i for i, is_special in zip(ids, specials, strict=True) if not is_special]
            words += len(plain)
            # GPT-2 has one token for everything special, and none for the unknown.
            unknown += plain.count(tokenizer.unk_token_id) if tokenizer.unk_token_id != tokenizer.eos_token_id else 0
        if tokens >= TOKENS:
            break
    if unknown > MOSTLY * words or not words:
        raise CompressionError(
            f"The tokenizer knows almost none of the calibration text '{text.source}' ({unknown} of {words} "
            "tokens are unknown to it); pass a calibration of your own, in the model's language."
        )
    if masked and tokenizer.mask_token_id is None:
        raise CompressionError("The tokenizer has no mask token, which a masked language model's calibration needs.")
    batches = _batches(sequences, special, tokenizer, masked, seed, batch_size or BATCH_SIZE)
    record = CalibrationRecord(text.source, text.sha256, len(sequences), tokens, 0, MASKED if masked else 0.0, seed)
    return batches, record


def count_tokens(text: CalibrationText, tokenizer: Any, *, masked: bool, positions: int, rows: int) -> Tensor:
    """Return how often each token is looked up, [rows], float64, in all texts or the first `COUNTED` tokens of them.

    Args:
        text: what to tokenize.
        tokenizer: the base's.
        masked: count 15 % of the tokens as the mask token, as a masked language model has seen them.
        positions: longest sequence that the model takes.
        rows: of the embedding.
    """
    counts = torch.zeros(rows, dtype=torch.float64)
    for start in range(0, len(text.texts), COUNTED_AT_ONCE):
        encoded = _encoded(text.texts[start : start + COUNTED_AT_ONCE], tokenizer, positions)
        ids, special = (
            torch.tensor([number for sequence in encoded[key] for number in sequence], dtype=torch.long)
            for key in ("input_ids", "special_tokens_mask")
        )
        hidden = MASKED * (1 - special.double()) * masked
        counts += torch.bincount(ids, 1 - hidden, minlength=rows)
        if masked:
            counts[tokenizer.mask_token_id] += hidden.sum()
        if counts.sum() >= COUNTED:
            break
    return counts


def _encoded(texts: Sequence[str], tokenizer: Any, positions: int) -> Any:
    """Return ids and special tokens of texts, each cut to the length that calibration has."""
    return tokenizer(list(texts), truncation=True, max_length=min(LENGTH, positions), return_special_tokens_mask=True)


def _batches(
    sequences: list[list[int]], special: list[list[int]], tokenizer: Any, masked: bool, seed: int, batch_size: int
) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    batches = []
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        longest = max(len(sequences[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), padding)
        mask = torch.zeros_like(ids)
        free = torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(chosen):
            length = len(sequences[i])
            ids[row, :length] = torch.tensor(sequences[i])
            mask[row, :length] = 1
            free[row, :length] = torch.tensor(special[i]) == 0
        if masked:
            hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & free
            ids[hidden] = tokenizer.mask_token_id
        batches.append(Batch(ids, mask))
    return batches


def _texts(lines: Sequence[str], source: str, purpose: str = "calibration") -> CalibrationText:
    texts = tuple(stripped for line in lines if (stripped := line.strip()))
    if not texts:
        raise CompressionError(f"The {purpose} '{source}' has no usable line; it needs at least one text.")
    return CalibrationText(texts, source)


def _from_datasets(spec: str, purpose: str) -> list[str]:
    """Return texts of a data set, of its text column, as many as a calibration can use."""
    try:
        import datasets
    except ImportError as error:
        raise CompressionError(
            f"'{spec}' is no local file, and reading it as a data set needs `pip install datasets`."
        ) from error
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
