"""Secrets in files: access tokens and private keys, found in bytes, whatever the name or encoding of the file is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHUNK = 8_000_000  # bytes that are read at once
OVERLAP = 16_384  # bytes of the chunk before that are looked at again: more than any key has
GAPS = (b"", b"\0", b"\0\0\0")  # between characters: of UTF-8, UTF-16, UTF-32, in either byte order


@dataclass(frozen=True)
class Form:
    """What a kind of key looks like.

    Attributes:
        owner: who issues it.
        start: literal that it begins with; found first, since that is fast.
        characters: of the rest, as they are written between brackets.
        least: how many of them there are.
        most: how many there are at most; None for any number.
    """

    owner: str
    start: str
    characters: str
    least: int
    most: int | None = None


_LETTERS, _WIDER = "A-Za-z0-9", "A-Za-z0-9_-"
# Long enough that neither random bytes nor the words of a vocabulary look like one.
FORMS = (
    Form("Hugging Face", "hf_", _LETTERS, 20),
    Form("Hugging Face", "hf_oauth_", _WIDER, 20),
    Form("Hugging Face", "hf_jwt_", "A-Za-z0-9._-", 20),
    Form("Hugging Face", "api_org_", _LETTERS, 20),
    Form("OpenAI", "sk-", _LETTERS, 32),
    *(Form("OpenAI", f"sk-{kind}-", _WIDER, 24) for kind in ("proj", "svcacct", "admin", "None")),
    Form("Anthropic", "sk-ant-", _WIDER, 24),
    *(Form("AWS", start, "A-Z0-9", 16, 16) for start in ("AKIA", "ASIA")),
    Form("Google", "AIza", _WIDER, 35, 35),
    Form("Google", "GOCSPX-", _WIDER, 28, 28),
    *(Form("GitHub", f"gh{kind}_", _LETTERS, 30) for kind in "pousr"),
    Form("GitHub", "github_pat_", "A-Za-z0-9_", 22),
    *(Form("GitLab", f"gl{kind}-", _WIDER, 20) for kind in ("pat", "dt", "rt", "ptt", "soat", "cbt", "ft")),
    *(Form("Slack", f"xox{kind}-", "A-Za-z0-9-", 16) for kind in "abeoprs"),
    Form("Slack", "xapp-", "A-Za-z0-9-", 20),
    Form("Slack", "hooks.slack.com/services/", "A-Za-z0-9/", 24),
)
_KEY_START, _KEY_END = "-----BEGIN ", "PRIVATE KEY"


def secret_in(file: Path, own: Iterable[str] = ()) -> str | None:
    """Return what secret a file holds, as the object of a sentence that does not repeat it; None if it holds none.

    Args:
        file: of any kind; it is read in chunks.
        own: tokens in use, found wherever they stand.
    """
    before = b""
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            if found := _secret(before + chunk, own):
                return found
            before = chunk[-OVERLAP:]
    return None


def _secret(content: bytes, own: Iterable[str]) -> str | None:
    for token in own:
        if any(gap.join(_characters(token)) in content for gap in GAPS):
            return "the access token that is in use"
    for start, pattern, what in _patterns():
        position = content.find(start)
        while position >= 0:
            if pattern.match(content, position):
                return what
            position = content.find(start, position + 1)
    return None


@cache
def _patterns() -> list[tuple[bytes, re.Pattern[bytes], str]]:
    """Return the literal to find, the pattern to match from there on, and what was found, of each form and encoding."""
    found = []
    for gap in GAPS:
        # A key begins where a word does, or after an escaped end of line in JSON; but not within base64.
        begins = rb"(?:(?<![A-Za-z0-9]%b)|(?<=\\%b[nrt]%b))(?<!(?:[A-Za-z0-9_-]%b){40})" % (gap, gap, gap, gap)
        for form in FORMS:
            start, character = gap.join(_characters(form.start)), gap + b"[" + form.characters.encode() + b"]"
            most = b"" if form.most is None else str(form.most).encode()
            rest = b"(?:%b){%d,%b}(?!%b[A-Za-z0-9])" % (character, form.least, most, gap)
            what = f"what looks like a secret token or key of {form.owner}"
            found.append((start, re.compile(begins + re.escape(start) + rest), what))
        start, end = gap.join(_characters(_KEY_START)), gap.join(_characters(_KEY_END))
        between = b"(?:%b[A-Z0-9 ]){0,30}?%b" % (gap, gap)
        found.append((start, re.compile(re.escape(start) + between + re.escape(end)), "a private key"))
    return found


def _characters(text: str) -> list[bytes]:
    return [character.encode() for character in text]
