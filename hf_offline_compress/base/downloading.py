"""A base on the Hub: its files fetched, or taken from the local cache where the Hub cannot be asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CompressionError
from ..foundation.hub_errors import is_broken_connection

ADDRESS = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?([^/\s]+/[^/\s]+)")
SNAPSHOT = re.compile(r"models--(.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Folders of sentence-transformers' own modules, and, in its first version, of the model.
MODULE = r"\d+_[\w-]+"
WEIGHT_FILE = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)")


def check_id(base: str) -> None:
    """Raise CompressionError unless a base that is no folder can be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with suppress(OSError):  # of names that are too long for one
        if Path(base).is_file():
            raise CompressionError(
                f"'{base}' is a file; pass the folder that contains it, with config.json and weights."
            )
    if address := ADDRESS.match(base):
        raise CompressionError(f"'{base}' is an address; pass the repository's id, '{address[1]}'.")
    try:
        validate_repo_id(base)
        valid = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise CompressionError(
            f"There is no folder '{base[:100]}', and it is not a Hub id (name or owner/name, e.g. bert-base-uncased)."
        )


def cached_name(folder: Path) -> tuple[str, str] | None:
    """Return the repository and the commit of a folder of the Hub's cache; None for any other."""
    place = folder.resolve()
    repository = SNAPSHOT.fullmatch(place.parent.parent.name)
    if repository is None or place.parent.name != "snapshots" or not COMMIT.fullmatch(place.name):
        return None
    return repository[1].replace("--", "/"), place.name


def fetch_file(name: str, file: str, revision: str | None, token: str | bool | None) -> Path | None:
    """Return a file of a repository on this disk; None if the repository has no such file.

    Raises:
        CompressionError: there is no such repository, or it can neither be asked nor is it in the local cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        with _told_once():
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision, token=token))
    except errors.EntryNotFoundError as error:
        # What was never asked for online is not known offline: of a repository in the cache, it counts as not there.
        if isinstance(error, errors.LocalEntryNotFoundError) and _cached(name, revision) is None:
            raise CompressionError(_explain(error, name)) from error
        return None
    except Exception as error:
        raise CompressionError(_explain(error, name)) from error


def fetch_files(name: str, wanted: re.Pattern[str], revision: str | None, token: str | bool | None) -> Path:
    """Return the folder of a repository's files on this disk.

    They are fetched, or are what the local cache has of them where the Hub is not asked, not reached, or refuses.

    Args:
        name: id of the repository.
        wanted: names of the files that are needed; of weights, only safetensors where there are any.
        revision: branch, tag or commit.
        token: for the Hub.

    Raises:
        CompressionError: they can neither be fetched nor are they in the local cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        with _told_once():
            names = huggingface_hub.list_repo_files(name, revision=revision, token=token)
        needed = [file for file in _one_format(names) if wanted.fullmatch(file)]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, token=token, allow_patterns=needed))
    except Exception as error:
        folder = None if isinstance(error, errors.RevisionNotFoundError) else _cached(name, revision)
        if folder is None or not any(map(WEIGHT_FILE.fullmatch, _names_of_model(folder))):
            raise CompressionError(_explain(error, name, partial=folder is not None)) from error
        return folder


def _one_format(names: list[str]) -> list[str]:
    """Return the files of a repository without pickled weights where there are safetensors, folder by folder."""
    safe = {Path(name).parent for name in names if re.fullmatch(r"model.*\.safetensors", Path(name).name)}
    return [n for n in names if not (Path(n).parent in safe and Path(n).name.startswith("pytorch_model"))]


def _names_of_model(folder: Path) -> list[str]:
    """Return the files of a snapshot that are of the model itself, and not of modules behind it."""
    return [file.name for place in (folder, *folder.glob("0_*")) for file in place.glob("*")]


@contextmanager
def _told_once() -> Iterator[None]:
    """Silence huggingface_hub's lines about each try; what comes of them is one sentence."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the local cache; None if there is none."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _explain(error: Exception, name: str, partial: bool = False) -> str:
    """Return the sentence for what huggingface_hub has raised over a repository.

    Args:
        error: what it has raised.
        name: id of the repository.
        partial: whether the local cache has the repository without its weights.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"'{name}' is gated: request access on its page, and pass a token."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{name}' does not have this revision on the Hub; pass a branch, a tag or a commit that it has."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"There is neither a folder nor a repository on the Hub named '{name}' (a private one needs a token)."
    absent = (
        f"The local cache has '{name}' without its weights"
        if partial
        else f"There is no folder '{name}', and no repository of that name in the local cache"
    )
    if constants.is_offline_mode():
        return f"{absent}; HF_HUB_OFFLINE is set: unset it to ask the Hub, or pass a folder."
    if isinstance(error, errors.LocalEntryNotFoundError) or is_broken_connection(error):
        return f"{absent}; the Hub cannot be reached: connect to a network, or pass a folder."
    return f"'{name}' could not be fetched from the Hub: {' '.join(str(error).split())[:300]}"
