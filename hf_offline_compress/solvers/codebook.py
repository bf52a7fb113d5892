"""Codebooks: k-means for the tables, codes one after the other with error feedback, tables again by least squares.

In the metric of a layer's inputs, H = E[x xᵀ], an error in one column can be compensated by the columns that are still to be
coded (GPTQ: Frantar et al., ICLR 2023; for sub-vectors GPTVQ: van Baalen et al., 2024). With H⁻¹ = Uᵀ U, U upper
triangular, a sub-vector's error e costs ‖e U_bb⁻¹‖², and the later columns absorb it by subtracting e U_bb⁻¹ U_b,later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.packing_compressed import pack
from ..structures import Codebook
from .base import Factors, Problem
from .feedback import BLOCK, DAMPING, damped_moments, inverse_roots, metric_of, row_importance

POINTS, ITERATIONS = 2**16, 15
REFINEMENTS = 20
DISTANCES_AT_ONCE = 2**24
TINY = 1e-12


@torch.no_grad()
def solve_codebook(problem: Problem) -> Factors:
    """Return packed codes and scales for each member, and the tables that they share.

    The tables begin with k-means of the rows' sub-vectors. Then codes and tables are made anew from each other, in turn, and
    what has the least error in the metric of the objective is kept.
    """
    structure = problem.structure
    assert isinstance(structure, Codebook)
    width, columns = structure.width, problem.weights[0].shape[1]
    weights = torch.stack([weight.float() for weight in problem.weights])
    filling = -columns % width
    rows = torch.nn.functional.pad(weights, (0, filling))
    scales = (rows.square().sum(dim=2) / columns).sqrt().clamp_min(TINY)  # [members, rows]
    metric = _metric(problem, filling)
    importance = _importance(problem).to(rows)  # [members, rows]
    tables = _start(rows / scales[..., None], importance * scales.square(), structure, problem)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for turn in range(structure.rounds):
        codes = _encode(rows / scales[..., None], tables, metric)
        tables, scales = _refine(rows, codes, tables, scales, importance, metric)
        reached = _error(rows, _decode(codes, tables) * scales[..., None], importance, metric)
        if best is None or reached < best[0]:
            best = (reached, codes, tables, scales)
        problem.progress((turn + 1) / structure.rounds)
    assert best is not None
    reached, codes, tables, scales = best
    packed = pack(codes.flatten(2), problem.integer_size)
    total = _error(rows, torch.zeros_like(rows), importance, metric)
    members = tuple({"codes": c, "scales": s} for c, s in zip(packed, scales, strict=True))
    return Factors(members, {"tables": tables}, {"error": (reached / max(total, TINY)) ** 0.5})


@dataclass(frozen=True)
class _Metric:
    """H of each member, damped, and the upper root U of its inverse, both [members, columns, columns]; or neither."""

    moments: Tensor | None = None
    root: Tensor | None = None


def _metric(problem: Problem, filling: int) -> _Metric:
    found = metric_of(problem)
    if found is None:
        return _Metric()
    device = problem.weights[0].device
    # One tensor for each that members share, so that each is factorized once.
    padded = {id(given): torch.nn.functional.pad(given, (0, filling, 0, filling)) for given in found}
    damped = {key: damped_moments(given, DAMPING, device).float() for key, given in padded.items()}
    roots = inverse_roots([padded[id(given)] for given in found], DAMPING, device)
    return _Metric(torch.stack([damped[id(given)] for given in found]), roots)


def _importance(problem: Problem) -> Tensor:
    """Return the weight of each row's squared error, of mean 1, [members, rows]."""
    weights = row_importance(problem).view(len(problem.weights), -1)
    return weights / weights.mean().clamp_min(1e-30)


def _start(rows: Tensor, importance: Tensor, structure: Codebook, problem: Problem) -> Tensor:
    """Return tables [books, entries, width] by k-means of sub-vectors, each book of the residual of those before."""
    generator = torch.Generator().manual_seed(problem.seed)
    points = rows.unflatten(2, (-1, structure.width))
    weights = importance[..., None].expand(points.shape[:-1]).flatten()
    points = points.flatten(0, 2)
    if len(points) > POINTS:
        chosen = torch.randperm(len(points), generator=generator)[:POINTS].to(points.device)
        points, weights = points[chosen], weights[chosen]
    tables = []
    for _ in range(structure.books):
        table = _k_means(points, weights, 2**problem.integer_size, generator)
        tables.append(table)
        points = points - table[_nearest(points, table)]
    return torch.stack(tables)


def _k_means(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` centres of weighted points (Lloyd); empty ones move to the points of largest error."""
    start = torch.randint(len(points), (count,), generator=generator)
    if len(points) >= count:
        start = torch.randperm(len(points), generator=generator)[:count]
    centres = points[start.to(points.device)].clone()
    for _ in range(ITERATIONS):
        nearest = _nearest(points, centres)
        mass = weights.new_zeros(count).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])
        centres = torch.where(mass[:, None] > 0, sums / mass.clamp_min(TINY)[:, None], centres)
        if empty := int((mass <= 0).sum()):
            far = ((points - centres[nearest]).square().sum(dim=1) * weights).topk(min(empty, len(points))).indices
            centres[(mass <= 0).nonzero()[: len(far), 0]] = points[far]
    return centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the nearest centre of each point; points [..., n, width], centres [..., k, width]; [..., n]."""
    half = 0.5 * centres.square().sum(dim=-1)[..., None, :]
    at_once = max(1, DISTANCES_AT_ONCE // (centres.shape[-2] * max(1, points[..., 0, 0].numel())))
    parts = [
        (part @ centres.transpose(-1, -2) - half).argmax(dim=-1) for part in points.split(at_once, dim=points.dim() - 2)
    ]
    return torch.cat(parts, dim=-1)


def _encode(rows: Tensor, tables: Tensor, metric: _Metric) -> Tensor:
    """Return codes [members, rows, sub-vectors, books] of scaled rows [members, rows, columns].

    Without a metric each sub-vector gets its nearest entries; with one, its error is passed on to the columns after it:
    within a block of columns at once, to all others when the block is done.
    """
    books, _, width = tables.shape
    if metric.root is None:
        parts = rows.unflatten(2, (-1, width))
        found, rest = [], parts.flatten(1, 2)
        for table in tables:
            nearest = _nearest(rest, table.expand(len(rows), -1, -1))
            rest = rest - table[nearest]
            found.append(nearest.unflatten(1, parts.shape[1:3]))
        return torch.stack(found, dim=-1)
    left, root = rows.clone(), metric.root
    columns = rows.shape[2]
    codes = torch.empty(*rows.shape[:2], columns // width, books, dtype=torch.long, device=rows.device)
    step = max(width, BLOCK // width * width)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = left.new_zeros(*rows.shape[:2], end - start)
        for at in range(start, end, width):
            here = slice(at, at + width)
            own = root[:, here, here]
            # (w − c) U_bb⁻¹ for all entries at once: both are brought into the metric of this sub-vector.
            inverse = torch.linalg.solve_triangular(
                own, torch.eye(width, device=rows.device).expand_as(own), upper=True
            )
            target = left[..., here] @ inverse
            for book, table in enumerate(tables):
                entries = table @ inverse
                chosen = _nearest(target, entries)
                codes[:, :, at // width, book] = chosen
                target = target - entries.gather(1, chosen[..., None].expand(-1, -1, width))
            errors[..., at - start : at - start + width] = target
            if at + width < end:
                left[..., at + width : end] -= target @ root[:, here, at + width : end]
        if end < columns:
            left[..., end:] -= errors @ root[:, start:end, end:]
    return codes


def _decode(codes: Tensor, tables: Tensor) -> Tensor:
    """Return scaled rows [members, rows, columns] of codes [members, rows, sub-vectors, books]."""
    parts = tables[0][codes[..., 0]]
    for book in range(1, len(tables)):
        parts = parts + tables[book][codes[..., book]]
    return parts.flatten(2)


def _refine(
    rows: Tensor, codes: Tensor, tables: Tensor, scales: Tensor, importance: Tensor, metric: _Metric
) -> tuple[Tensor, Tensor]:
    """Return tables and scales of least error for given codes: conjugate gradients for tables, a quotient for scales.

    The error is quadratic in the tables: Σ gᵢ (sᵢ ĉᵢ − wᵢ) H (sᵢ ĉᵢ − wᵢ)ᵀ, ĉᵢ the entries of row i.
    """
    weight = (importance * scales)[..., None]

    def gathered(values: Tensor) -> Tensor:
        """Return the sums over all places where an entry is used; the transpose of decoding."""
        parts = values.unflatten(2, (-1, tables.shape[2])).flatten(0, 2)
        sums = [
            torch.zeros_like(tables[0]).index_add_(0, codes[..., book].flatten(), parts) for book in range(len(tables))
        ]
        return torch.stack(sums)

    def times_metric(values: Tensor) -> Tensor:
        return values if metric.moments is None else values @ metric.moments

    def applied(direction: Tensor) -> Tensor:
        return gathered(times_metric(_decode(codes, direction) * scales[..., None]) * weight)

    residual = gathered(times_metric(rows - _decode(codes, tables) * scales[..., None]) * weight)
    direction, squared = residual.clone(), residual.square().sum()
    first = squared.clone()
    for _ in range(REFINEMENTS):
        if squared <= 1e-10 * first:
            break
        product = applied(direction)
        step = squared / (direction * product).sum().clamp_min(1e-30)
        tables = tables + step * direction
        residual = residual - step * product
        before, squared = squared, residual.square().sum()
        direction = residual + squared / before * direction
    decoded = _decode(codes, tables)
    shaped = times_metric(decoded)
    best = (rows * shaped).sum(dim=2) / (decoded * shaped).sum(dim=2).clamp_min(TINY)
    return tables, torch.where(best > 0, best, scales)


def _error(rows: Tensor, decoded: Tensor, importance: Tensor, metric: _Metric) -> float:
    """Return the weighted squared error in the metric."""
    error = rows - decoded
    shaped = error if metric.moments is None else error @ metric.moments
    return float(((error * shaped).sum(dim=2) * importance).sum(dtype=torch.float64))
