"""All that a card is written from: report, evaluations, config and file sizes of a compressed folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base import TOKENIZER_FILES
from ..folder import inspect_folder, read_evaluation


@dataclass(frozen=True)
class CardInputs:
    """What a card is written from; plain JSON all of it, so that a card can be written anew from kept files.

    Attributes:
        name: of the folder; the card's title.
        config: the contents of config.json.
        report: the contents of the compression report.
        evaluation: the contents of evaluation.json; None if there is none.
        files: name → bytes, of every file of the folder but the card.
    """

    name: str
    config: dict[str, Any]
    report: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    files: dict[str, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(size for name, size in self.files.items() if name.endswith(".safetensors"))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The report's groups."""
        found: list[dict[str, Any]] = self.report["groups"]
        return found

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations; empty if there are none."""
        return list((self.evaluation or {}).get("evaluations") or [])

    @property
    def benchmark(self) -> dict[str, Any] | None:
        """The benchmark; None if there is none."""
        return (self.evaluation or {}).get("benchmark")

    @property
    def base_name(self) -> str:
        """The base's Hub id, or the last component of a local path."""
        return file_name(str(self.report["base"]["name"]), self.report["base"].get("revision"))

    @property
    def is_sentence_encoder(self) -> bool:
        """Whether it is a model of sentence-transformers."""
        return "modules.json" in self.files

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is in the folder."""
        return any(name in self.files for name in TOKENIZER_FILES)


def read_inputs(folder: str | Path, *, name: str | None = None) -> CardInputs:
    """Return what a card of a compressed folder is written from; neither torch nor weights are loaded.

    Args:
        folder: one that `compress` has written.
        name: how the card calls it; by default the folder's name.

    Raises:
        CompressionError: it is no such folder, or its evaluation.json cannot be read.
    """
    contents, path = inspect_folder(folder), Path(folder)
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "README.md"
    }
    return CardInputs(name or contents.name, contents.config, contents.report, read_evaluation(path), files)


def file_name(name: str, revision: object = None) -> str:
    """Return a name that may be shown: a Hub id as it is, of a path the last component."""
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    return name if revision or not is_path else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
