"""Everything that a card is written from: report, evaluations, config and file sizes of a compressed folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact.reading import inspect_folder, read_evaluation, stock_name
from ..artifact.record import RECORD_FILE
from ..artifact.sizes import file_sizes, trainer_files
from ..base.checkpoint import TOKENIZER_FILES


@dataclass(frozen=True)
class CardInputs:
    """What a card is written from; plain JSON all of it, so that a card can be written anew from kept files.

    Attributes:
        name: of the folder; the card's title.
        config: the contents of config.json.
        report: the contents of the compression report; empty where the model was saved anew, as Trainer does.
        evaluation: the contents of evaluation.json; None if there is none.
        files: name → bytes, of every file of the folder but the card, and what Trainer has left there.
        trained: whether Trainer has left something there.
    """

    name: str
    config: dict[str, Any]
    report: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    files: dict[str, int] = field(default_factory=dict)
    trained: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(size for name, size in self.files.items() if name.endswith(".safetensors"))

    @property
    def folder_bytes(self) -> int:
        """Bytes of all files but the card."""
        return sum(self.files.values())

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The report's groups; empty where there is no report."""
        return list(self.report.get("groups") or [])

    @property
    def structures(self) -> list[str]:
        """Names of the structures, each once, in the order of the groups."""
        groups = self.groups or self.config["compression"]["groups"].values()
        return [*dict.fromkeys(str(group["structure"]) for group in groups)]

    @property
    def architecture(self) -> str:
        """Stock class of the base."""
        return str(self.report["architecture"]) if self.report else stock_name(self.config)

    @property
    def since(self) -> str | None:
        """What has happened to the weights since they were compressed, as a sentence; None where they are as they were."""
        if self.trained:
            return "It was fine-tuned after it was compressed."
        if not self.report or RECORD_FILE not in self.files:
            return "It was saved again after it was compressed, and may have been fine-tuned."
        return None

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
    files = {file: size for file, size in file_sizes(path).items() if Path(file).name != "README.md"}
    return CardInputs(
        name or contents.name,
        contents.config,
        contents.report or {},
        read_evaluation(path),
        files,
        trained=bool(trainer_files(path)),
    )


def file_name(name: str, revision: object = None) -> str:
    """Return a name that may be shown: a Hub id as it is, of a path the last component."""
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    return name if revision or not is_path else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
