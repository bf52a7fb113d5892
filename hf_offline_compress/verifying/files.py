"""Which files of a folder count: those that would be published."""

from __future__ import annotations

import re
from pathlib import Path

_PARTIAL = re.compile(r"\.(partial|tmp|incomplete|lock|swp)$|~$")


def folder_files(folder: Path) -> list[str]:
    """Return the files of a folder, relative to it and sorted; hidden and partial ones and caches do not count."""
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(path.as_posix() for path in paths if not _passed_over(path))


def _passed_over(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or _PARTIAL.search(path.name) is not None


def outside_links(folder: Path) -> list[str]:
    """Return the files of a folder that are links to somewhere else; a download in the Hub's cache has none."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"
    places = {name: (folder / name).resolve() for name in folder_files(folder)}
    return [name for name, place in places.items() if not place.is_relative_to(root) and place.parent != blobs]
