"""Which files of a folder count: those that would be published."""

from __future__ import annotations

import re
from pathlib import Path

from ..files import belongs_to

_PARTIAL = re.compile(r"\.(partial|tmp|incomplete|lock|swp)$|~$")


def folder_files(folder: Path) -> list[str]:
    """Return the files of a folder, relative to it and sorted; hidden and partial ones and caches do not count."""
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(path.as_posix() for path in paths if not _passed_over(path))


def _passed_over(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or _PARTIAL.search(path.name) is not None


def outside_links(folder: Path) -> list[str]:
    """Return what in a folder is a link to somewhere else; a download in the Hub's cache has nothing of that."""
    links = [path for path in folder.rglob("*") if path.is_symlink() and not _passed_over(path.relative_to(folder))]
    return sorted(path.relative_to(folder).as_posix() for path in links if not belongs_to(folder, path))
