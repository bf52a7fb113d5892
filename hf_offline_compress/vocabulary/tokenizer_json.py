"""A tokenizer.json with some of its tokens: model, added tokens, post-processor and padding, all with new ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CompressionError, listing
from .byte_bpe import ByteBPE
from .token_model import TokenModel
from .unigram import Unigram
from .wordpiece import WordPiece

MODELS = {"WordPiece": WordPiece, "Unigram": Unigram, "BPE": ByteBPE}


def token_model(content: Mapping[str, Any], name: str) -> TokenModel:
    """Return the model of a tokenizer.json.

    Args:
        content: of the file.
        name: whose tokenizer it is, for the error.

    Raises:
        CompressionError: its kind of model cannot be pruned.
    """
    model = content["model"]
    if model["type"] not in MODELS:
        raise CompressionError(
            f"The tokenizer of '{name}' is a {model['type']}, and a vocabulary can be pruned of {listing(MODELS)}; leave the "
            "vocabulary as it is."
        )
    if model["type"] == "BPE":
        return ByteBPE(model, byte_level=_mentions(content, "ByteLevel"))
    return Unigram(model) if model["type"] == "Unigram" else WordPiece(model)


def fixed_ids(content: Mapping[str, Any]) -> set[int]:
    """Return the tokens that the file names outside of its model: added ones, those around texts, and padding."""
    return {
        *(token["id"] for token in content["added_tokens"]),
        *_post_processor_ids(content.get("post_processor")),
        *_padding_ids(content),
    }


def pruned_tokenizer(content: Mapping[str, Any], model: TokenModel, kept: Iterable[int]) -> dict[str, Any]:
    """Return a tokenizer.json with some of its tokens, numbered anew in their order.

    Args:
        content: of the file.
        model: of the same content.
        kept: ids, `fixed_ids` and all that its model needs among them.
    """
    numbers = numbered(kept)
    result = json.loads(json.dumps({key: value for key, value in content.items() if key != "model"}))
    for token in result["added_tokens"]:
        token["id"] = numbers[token["id"]]
    _renumber_post_processor(result.get("post_processor"), numbers)
    if padding := result.get("padding"):
        padding["pad_id"] = numbers.get(padding["pad_id"], 0)
    return {**result, "model": model.pruned(numbers)}


def numbered(kept: Iterable[int]) -> dict[int, int]:
    """Return id → new id: those that stay keep their order."""
    return {old: new for new, old in enumerate(sorted(kept))}


def _mentions(content: Mapping[str, Any], kind: str) -> bool:
    """Return whether pre-tokenizer or decoder is of a kind, or has one of that kind in it."""
    found = [content.get("pre_tokenizer"), content.get("decoder")]
    while found:
        step = found.pop() or {}
        if step.get("type") == kind:
            return True
        found += [*step.get("pretokenizers", []), *step.get("decoders", [])]
    return False


def _post_processor_ids(step: Mapping[str, Any] | None) -> set[int]:
    step = step or {}
    ids = {number for token in step.get("special_tokens", {}).values() for number in token["ids"]}
    ids |= {step[name][1] for name in ("sep", "cls") if name in step}
    return ids.union(*(_post_processor_ids(each) for each in step.get("processors", [])))


def _renumber_post_processor(step: dict[str, Any] | None, numbers: Mapping[int, int]) -> None:
    step = step or {}
    for token in step.get("special_tokens", {}).values():
        token["ids"] = [numbers[number] for number in token["ids"]]
    for name in ("sep", "cls"):
        if name in step:
            step[name][1] = numbers[step[name][1]]
    for each in step.get("processors", []):
        _renumber_post_processor(each, numbers)


def _padding_ids(content: Mapping[str, Any]) -> set[int]:
    padding = content.get("padding")
    known = {token["id"] for token in content["added_tokens"]}
    return {padding["pad_id"]} & known if padding else set()
