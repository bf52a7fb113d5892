"""Results of evaluations as plain JSON: `evaluation.json` in a compressed folder, extended by every run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..artifact.reading import EVALUATION_FILE, EVALUATION_FORMAT, read_evaluation
from ..errors import CompressionError, UnsavedError
from ..foundation.files import write_whole


@dataclass(frozen=True)
class Metric:
    """One number of base and compressed model.

    Attributes:
        name: e.g. "perplexity", "accuracy".
        better: "lower" or "higher".
        base: the base's value; of what compares both with the base, the value of a perfect copy. None: not finite.
        compressed: the compressed model's. None: not finite, e.g. a correlation with predictions that are all the same.
    """

    name: str
    better: str
    base: float | None
    compressed: float | None


@dataclass(frozen=True)
class Data:
    """The data of an evaluation.

    Attributes:
        name: a file's name, a Hub id, "bundled" or "caller".
        config: of a data set on the Hub.
        split: of a data set on the Hub.
        revision: its commit.
        sha256: of a local file, or of texts, one per line.
        examples: how many were used.
    """

    name: str
    examples: int
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a compressed model beside its base.

    Attributes:
        id: unique within the folder; a later evaluation with the same id replaces it.
        task: `type` as the Hub calls it, e.g. "fill-mask", and `name`.
        data: the data used.
        settings: all that the numbers depend on, as plain JSON.
        metrics: the numbers.
        seconds: time that base and compressed model took.
        versions: of the libraries.
    """

    id: str
    task: dict[str, str]
    data: Data
    settings: dict[str, Any]
    metrics: tuple[Metric, ...]
    seconds: dict[str, float]
    versions: dict[str, str] = field(default_factory=lambda: library_versions())

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON."""
        return asdict(self)


def metric(name: str, better: str, base: float, compressed: float) -> Metric:
    """Return a metric; numbers that JSON does not have (infinite, undefined) become None."""
    return Metric(name, better, *(float(value) if math.isfinite(value) else None for value in (base, compressed)))


def library_versions() -> dict[str, str]:
    """Return the versions that an evaluation depends on."""
    from ..artifact.report import versions

    found = versions()
    for module, name in {
        "accelerate": "accelerate",
        "datasets": "datasets",
        "sklearn": "scikit-learn",
        "scipy": "scipy",
    }.items():
        if find_spec(module) is not None:
            found[name] = version(name)
    return found


def read_evaluations(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a folder's evaluation.json; an empty record where there is none yet.

    Raises:
        CompressionError: the file is there but cannot be read.
    """
    empty = {"format_version": EVALUATION_FORMAT, "evaluations": [], "benchmark": None}
    return read_evaluation(Path(folder)) or empty


def check_writable(folder: Path) -> None:
    """Raise CompressionError unless evaluations can be added to a folder; asked before hours of work."""
    read_evaluations(folder)
    if not os.access(folder, os.W_OK):
        raise CompressionError(
            f"'{folder}' cannot be written to, so {EVALUATION_FILE} cannot be saved; copy the folder first."
        )


@contextmanager
def saving(result: Any, file: str = EVALUATION_FILE) -> Iterator[None]:
    """Raise UnsavedError, with the result in it, where it cannot be written to a file of that name."""
    try:
        yield
    except (CompressionError, OSError) as error:
        raise UnsavedError(f"The numbers were not added to {file}: {error}", result) from error


def with_evaluations(
    folder: Path, evaluations: Sequence[Evaluation] = (), benchmark: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a folder's evaluation.json with evaluations added in place of those of the same id, and a benchmark."""
    content = read_evaluations(folder)
    entries = {entry["id"]: entry for entry in content["evaluations"]}
    entries |= {item.id: item.to_dict() for item in evaluations}
    content["evaluations"] = list(entries.values())
    content["benchmark"] = dict(benchmark) if benchmark is not None else content.get("benchmark")
    return content


def write_evaluations(
    folder: Path, evaluations: Sequence[Evaluation] = (), benchmark: Mapping[str, Any] | None = None
) -> None:
    """Add evaluations to a folder's evaluation.json; see `with_evaluations`."""
    content = with_evaluations(folder, evaluations, benchmark)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(folder / EVALUATION_FILE, text)
