"""What must not be in a published folder: disguised code, secrets, local paths, machine names."""

from __future__ import annotations

import getpass
import json
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifact.sizes import folder_files
from ..foundation.tensor_files import damage
from .checks import Check, outcome
from .foreign import foreign_kind
from .secrets import secret_in

# Vocabularies hold any string there is, "/home" too; they are searched for secrets only.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
VOCABULARY_KEYS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
TEXT_SUFFIXES = (".json", ".md", ".txt", ".yaml", ".yml", ".py", ".csv", ".jinja", ".toml", ".cfg", ".svg")

_ROOTS = (
    "home|Users|root|tmp|var|private|mnt|media|scratch|workspace|workdir|work|content|kaggle|data|opt|srv|nfs|gpfs|"
    "lustre|Volumes"
)
# In running text a path begins after a space, a quote or a bracket, so that addresses of web pages are none.
_PATHS = re.compile(
    rf"(?:^|(?<=[\s\"'`=:(,\[<]))(?:file://)?(?:/(?:{_ROOTS})/[^\s\"'`)\],<>]+|~/[^\s\"'`)\],<>]+|[A-Za-z]:\\[^\s\"'`]+)"
)
_WHOLE_PATH = re.compile(r"/[\w.@+-]+(/[\w.@+ -]+)+/?")
_GENERIC = {"localhost", "root", "user", "users", "admin", "ubuntu", "debian", "runner", "jovyan", "test", "model"}
_GENERIC |= {"models", "bert", "roberta", "gpt2", "ec2-user", "nobody", "docker", "python"}


def content_checks(folder: Path, token: str | None = None) -> list[Check]:
    """Return the checks of what is written in a folder's files; nothing of it is loaded or run.

    Args:
        folder: any folder.
        token: looked for in every file, beside the one that you are logged in with.
    """
    names = folder_files(folder)
    texts = {name: text for name in names if (text := _text(folder / name)) is not None}
    values = {name: list(_values(name, text)) for name, text in texts.items()}
    headers = {name: _header(folder / name) for name in names if name.endswith(".safetensors")}
    broken = [f"{name} {problem}" for name in headers if (problem := damage(folder / name))]
    values |= {name: list(_strings(header.get("__metadata__"))) for name, header in headers.items() if header}
    formats = [f"{name} {kind}" for name in names if (kind := foreign_kind(folder / name))]
    formats += [
        f"{name} cannot be read as JSON"
        for name in names
        if name.endswith(".json") and (name not in texts or _json(texts[name]) is None)
    ]
    own = _own(token)
    secrets = [f"{name} holds {found}" for name in names if (found := secret_in(folder / name, own))]
    return [
        outcome("formats", formats + broken, "No pickle or archive; every JSON and safetensors file can be read."),
        outcome("tokens", secrets, "No access token or private key in any file."),
        outcome("paths", _named(values, _path_in), "No absolute path in any file."),
        outcome("machine", _named(values, _machine_in()), "Neither this machine's nor this user's name in any file."),
    ]


def _named(values: dict[str, list[str]], find: Any) -> list[str]:
    """Return a phrase for each file in one of whose values something is found."""
    found = {name: next((hit for value in texts if (hit := find(value))), None) for name, texts in values.items()}
    return [f"{name} holds {hit}" for name, hit in found.items() if hit]


def _path_in(value: str) -> str | None:
    hit = _WHOLE_PATH.fullmatch(value.strip()) or _PATHS.search(value)
    if hit is None and len(home := str(Path.home())) > 5 and home in value:
        return "this user's home folder"
    return f"the absolute path '{hit[0][:60]}'" if hit else None


def _machine_in() -> Any:
    """Return a function that finds this machine or this user in a text.

    A name that is an ordinary word counts only if it is the whole of a value, or stands before or after an @.
    """
    host = socket.gethostname().partition(".")[0]
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = ""
    patterns = []
    for label, name in (("host", host), ("user", user)):
        if len(name) < 4 or name.lower() in _GENERIC:
            continue
        quoted = re.escape(name)
        if label == "host" and re.search(r"[\d-]", name):
            patterns.append((label, re.compile(rf"(?<![\w-]){quoted}(?![\w-])")))
        else:
            patterns.append((label, re.compile(rf"\A{quoted}\Z|\b{quoted}@|@{quoted}\b")))

    def find(value: str) -> str | None:
        return next((f"this machine's {label} name" for label, pattern in patterns if pattern.search(value)), None)

    return find


def _own(token: str | None) -> set[str]:
    """Return the tokens in use that are long enough to be found by chance nowhere."""
    from huggingface_hub import get_token

    return {own for own in (token, get_token()) if own and len(own) > 8}


def _values(name: str, text: str) -> Iterator[str]:
    """Give what people wrote in a file: the strings of JSON, all of other texts; nothing of vocabularies and code."""
    if Path(name).name in VOCABULARIES or name.endswith(".py"):
        return
    content = _json(text) if name.endswith(".json") else None
    if content is None:
        yield from text.splitlines()
    else:
        yield from _strings(content)


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            if key not in VOCABULARY_KEYS:
                yield str(key)
                yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)


def _text(file: Path) -> str | None:
    """Return a file's text; None if it is no text."""
    if file.suffix.lower() not in TEXT_SUFFIXES:
        return None
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _header(file: Path) -> dict[str, Any] | None:
    """Return the header of a safetensors file, or None if it is none."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                return None
            content = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
