"""The report of a compression, sizes and errors, as folder, card and command line use it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..plan.groups import Dense, Group, Plan
from ..request.recipe import STORAGES
from ..solvers import Problem

# Numbers of a weight that are compared at a time; an embedding is large, and comparing takes several times as much memory.
NUMBERS_AT_ONCE = 2**21
VERSIONED = ("hf-offline-compress", "transformers", "torch", "huggingface_hub", "safetensors", "tokenizers")
# Numba compiles the search for codes; sums are rounded otherwise without it.
VERSIONED_IF_INSTALLED = ("numba",)


@dataclass(frozen=True)
class GroupReport:
    """One group: its sizes before and after, and its errors.

    Attributes:
        name: as in the plan.
        kind: of its matrices.
        structure: name of the structure.
        size: rank, latent width, or whatever the structure counts.
        members: names of the matrices.
        rows: of all members together.
        columns: of each.
        parameters: dense weights.
        stored_bytes: bytes of the factors.
        ratio: 4 bytes × parameters over stored bytes.
        storage: how the factors are kept.
        objective: what was minimised, with the weights of its terms.
        relative_error: ‖W − Ŵ‖ / ‖W‖. Of layers coded in order, W is what they were fitted to in the end.
        cosine_distance: mean over rows of 1 − cos(ŵ, w); zero rows left out.
        calibrated_error: the relative error weighted by real inputs, ‖(W − Ŵ) H^½‖ / ‖W H^½‖; None without calibration.
        seconds: time to solve it.
        notes: what the solver said.
        forecast: what the group alone was expected to cost the model's output, where it was measured too; in the unit of
            `measured`, and at the same size: the last one that was followed by another allocation.
        measured: its actual cost: nats per token where there are logits, else squared error of a token's states. In
            deep models, its share of what it costs together with its neighbours.
    """

    name: str
    kind: str
    structure: str
    size: float
    members: tuple[str, ...]
    rows: int
    columns: int
    parameters: int
    stored_bytes: int
    ratio: float
    storage: str
    objective: dict[str, Any]
    relative_error: float
    cosine_distance: float
    calibrated_error: float | None
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)
    forecast: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class Report:
    """One compression.

    Attributes:
        base: name and revision of the base model, and bytes of its weight files if it has any.
        architecture: stock class of the base.
        recipe: the recipe, with all overrides applied.
        seed: the random seed.
        dtype: of what stays dense.
        calibration: source, hash and size of the text; None if no text was used.
        validation: source and hash of the text that training was judged by; None if it was judged by its loss.
        search: loss allowed and sizes tried, where the size was searched for; else None.
        rounds: what each allocation was expected and measured to cost, where it was measured; else None.
        options: options set for loading the base.
        groups: what was compressed.
        dense: what was not, and why.
        totals: bytes, parameters and ratios of the whole; in a saved report also `folder_bytes`, of all that loading needs:
            weights, config, code, tokenizer and what else comes with the base (not report, record and card).
        seconds: time for each stage.
        versions: of the libraries.
        vocabulary: which tokens stayed, by which text, and what of texts they cover; None where none was pruned.
    """

    base: dict[str, Any]
    architecture: str
    recipe: dict[str, Any]
    seed: int
    dtype: str
    calibration: dict[str, Any] | None
    validation: dict[str, str] | None
    search: dict[str, Any] | None
    options: dict[str, Any]
    groups: tuple[GroupReport, ...]
    dense: tuple[Dense, ...]
    totals: dict[str, float]
    seconds: dict[str, float]
    versions: dict[str, str]
    vocabulary: dict[str, Any] | None = None
    rounds: list[dict[str, float]] | None = None

    def __repr__(self) -> str:
        """Return one line; `to_dict` has the rest."""
        size, ratio = self.totals["stored_bytes"] / 1e6, self.totals["total_ratio"]
        return (
            f"<Report: {self.base['name']} ({self.architecture}) with recipe {self.recipe['name']}, {len(self.groups)} groups, "
            f"{size:.2f} MB of tensors, {ratio:.2f} x smaller than in float32>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Return the report that plain JSON holds."""
        values = dict(content)
        values["groups"] = tuple(GroupReport(**{**g, "members": tuple(g["members"])}) for g in values["groups"])
        values["dense"] = tuple(Dense(**item) for item in values["dense"])
        return cls(**values)


def group_report(
    group: Group, problem: Problem, stored: list[Tensor], *, seconds: float, notes: dict[str, float]
) -> GroupReport:
    """Return the record of one group.

    Args:
        group: from the plan.
        problem: what was to be solved, with the weights and how errors in them count.
        stored: for each member what stands for its weight now, [rows, columns].
        seconds: time to solve it.
        notes: what the solver said.
    """
    squared = torch.zeros(2, dtype=torch.float64)  # of the error, of the weight
    weighted = torch.zeros(2, dtype=torch.float64)
    cosines: list[Tensor] = []
    input_moments, row_weights = problem.input_moments, problem.row_weights
    start = 0
    for weight, replacement in zip(problem.weights, stored, strict=True):
        step = max(1, NUMBERS_AT_ONCE // weight.shape[1])
        for dense, kept in zip(weight.split(step), replacement.split(step), strict=True):
            dense = dense.float()
            kept = kept.float().to(dense.device)
            importance = None if row_weights is None else row_weights[start : start + len(dense)].to(dense)
            start += len(dense)
            for i, part in enumerate((dense - kept, dense)):
                rows = part.square().sum(dim=1)
                squared[i] += rows.sum(dtype=torch.float64).cpu()
                if input_moments is not None:
                    rows = ((part @ input_moments.to(part)) * part).sum(dim=1)
                if importance is not None:
                    rows = rows * importance
                weighted[i] += rows.sum(dtype=torch.float64).cpu()
            used = dense.norm(dim=1) > 0
            cosines.append(1 - torch.nn.functional.cosine_similarity(dense[used], kept[used], dim=1))
    calibrated = input_moments is not None or row_weights is not None
    distances = torch.cat(cosines) if cosines else torch.empty(0)
    return GroupReport(
        name=group.name,
        kind=group.matrices[0].kind,
        structure=group.structure.name,
        size=group.shown_size,
        members=tuple(matrix.name for matrix in group.matrices),
        rows=group.rows,
        columns=group.columns,
        parameters=group.parameters,
        stored_bytes=group.stored_bytes,
        ratio=group.ratio,
        storage=str(group.storage),
        objective=asdict(problem.objective),
        relative_error=_root_ratio(squared),
        cosine_distance=float(distances.mean()) if len(distances) else 0.0,  # rows of zeros have no direction
        calibrated_error=_root_ratio(weighted) if calibrated else None,
        seconds=round(seconds, 3),
        notes=notes,
    )


def totals(plan: Plan) -> dict[str, float]:
    """Return bytes, parameters and ratios of a plan; bytes of tensors, without file headers."""
    return {
        "parameters": plan.layout.total,
        "dense_bytes": plan.layout.total * STORAGES[plan.dtype],
        "stored_bytes": plan.total_stored_bytes,
        "total_ratio": plan.total_ratio,
        "compressed_parameters": plan.parameters,
        "compressed_stored_bytes": plan.stored_bytes,
        "ratio": plan.ratio,
    }


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    # Each is parsed from a file of its own, and they do not change within a process.
    present = (*VERSIONED, *(name for name in VERSIONED_IF_INSTALLED if find_spec(name)))
    return {"python": platform.python_version(), **{name: version(name) for name in present}}


def _root_ratio(pair: Tensor) -> float:
    return float((pair[0].clamp_min(0) / pair[1]).sqrt()) if pair[1] > 0 else 0.0
