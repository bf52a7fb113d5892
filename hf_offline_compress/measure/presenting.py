"""Calibration text as the model reads texts in use: after its prompts, or in its chat template; in its languages, if not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import listing
from .texts import CalibrationText

# Words of a text that make the user's turn of a chat; the rest is the answer.
ASKED_WORDS = 12
CHAT_SHARE = 0.5
# Of the tokens with letters, so many with others than those of English; English vocabularies have a few in a hundred.
FOREIGN, LOOKED_AT = 0.25, 2000
ENGLISH = ("en", "eng", "english")

logger = logging.getLogger(__name__)


def presented(text: CalibrationText, tokenizer: Any, *, prompts: Sequence[str], chat: bool) -> CalibrationText:
    """Return the text with what the model is to read; its hash and record remain those of the given texts.

    Args:
        text: as it was given.
        tokenizer: the base's, whose chat template is used.
        prompts: what a sentence encoder puts before its texts, taken in turn; texts that begin with one have it already.
        chat: of an instruction-tuned model, put every other text into the chat template.
    """
    if any(prompts):
        written = tuple(each for each in prompts if each)
        shown = [
            each if each.startswith(written) else prompts[i % len(prompts)] + each for i, each in enumerate(text.texts)
        ]
        return replace(text, read=tuple(shown), prompts=tuple(prompts))
    if chat and tokenizer.chat_template:
        try:
            chats = [_chat(each, tokenizer) for each in text.texts[1::2]]
        except Exception as error:  # a template is a program, and may want other turns than ours
            logger.warning(
                "The chat template does not take a question and an answer (%s); texts are read plain.",
                " ".join(str(error).split())[:200],
            )
            return text
        shown = [*text.texts]
        shown[1::2] = chats
        return replace(text, read=tuple(shown), chat=CHAT_SHARE)
    return text


def _chat(text: str, tokenizer: Any) -> str:
    """Return a text as a chat: its beginning is the question, the rest the answer."""
    words = text.split(" ")
    turns = [("user", words[:ASKED_WORDS]), ("assistant", words[ASKED_WORDS:] or words)]
    messages = [{"role": role, "content": " ".join(said)} for role, said in turns]
    shown = str(tokenizer.apply_chat_template(messages, tokenize=False))
    first = str(tokenizer.bos_token or "")
    if first and shown.startswith(first) and _adds_first(tokenizer):
        return shown.removeprefix(first)
    return shown


def _adds_first(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts the token that begins a text before it."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def warn_of_languages(text: CalibrationText, languages: Sequence[str], tokenizer: Any) -> None:
    """Warn if the bundled text, which is English, is not in the languages of the base.

    Args:
        text: of the calibration.
        languages: that the base's card names; if it names none, its tokens are examined.
        tokenizer: the base's.
    """
    if text.source != "bundled":
        return
    others = [each for each in languages if each.partition("-")[0] not in ENGLISH]
    if others:
        named = f"the base's card names {listing(others[:4])}{' …' if len(others) > 4 else ''}"
    elif not languages and foreign_share(tokenizer) > FOREIGN:
        named = "the base's tokenizer covers other languages too"
    else:
        return
    logger.warning(
        "The bundled calibration text is English, and %s; for these pass text of your own, one per line: --calibration FILE.",
        named,
    )


def foreign_share(tokenizer: Any) -> float:
    """Return the share of a tokenizer's tokens with letters that have non-English ones, in an evenly spaced sample."""
    ids = range(0, len(tokenizer), max(1, len(tokenizer) // LOOKED_AT))
    words = tokenizer.batch_decode([[i] for i in ids])
    # Partial characters, in byte-level vocabularies, belong to no language.
    letters = [[c for c in word if c.isalpha()] for word in words if "\ufffd" not in word]
    letters = [each for each in letters if each]
    return sum(not "".join(each).isascii() for each in letters) / len(letters) if letters else 0.0
