"""Which files of a folder count: those that would be published."""

from __future__ import annotations

import re
from pathlib import Path

from ..foundation.files import belongs_to

# What Trainer leaves beside a model that it has saved: its settings, a pickle, earlier steps, and logs.
_TRAINER = re.compile(r"training_args\.bin|(checkpoint-\d+|runs)/.+")
_PARTIAL = re.compile(r"\.(partial|tmp|incomplete|lock|swp)$|~$")


def folder_files(folder: Path) -> list[str]:
    """Return the files of a folder, relative to it and sorted; hidden and partial ones, caches and Trainer's do not count."""
    return [name for name in _all_files(folder) if not _TRAINER.fullmatch(name)]


def file_sizes(folder: Path) -> dict[str, int]:
    """Return name → bytes of the files of a folder, as `folder_files` lists them."""
    return {name: (folder / name).stat().st_size for name in folder_files(folder)}


def trainer_files(folder: Path) -> list[str]:
    """Return the files that Trainer has left in a folder, relative to it and sorted."""
    return [name for name in _all_files(folder) if _TRAINER.fullmatch(name)]


def _all_files(folder: Path) -> list[str]:
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(path.as_posix() for path in paths if not _passed_over(path))


def _passed_over(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or _PARTIAL.search(path.name) is not None


def outside_links(folder: Path) -> list[str]:
    """Return what in a folder is a link to somewhere outside the folder; a download in the Hub's cache has nothing of that."""
    links = [path for path in folder.rglob("*") if path.is_symlink() and not _passed_over(path.relative_to(folder))]
    return sorted(path.relative_to(folder).as_posix() for path in links if not belongs_to(folder, path))
