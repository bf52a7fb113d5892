"""Training from a start: factors are trained by the loss on all rows, and the start is kept if nothing is better."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..request.objective import Objective
from .base import Problem

ANNEALED_TO = 0.1
TINY = 1e-10
LEARNING_RATE = 0.05
CHECKS = 10


def loss_terms(
    decoded: Tensor,
    rows: Tensor,
    objective: Objective,
    exponent: float,
    row_weights: Tensor | None = None,
    parameter_weights: Tensor | None = None,
) -> Tensor:
    """Return cosine · CD + l2 · RMSE + l1 · L1α between decoded and true rows, both [..., rows, columns]; [...].

    Args:
        decoded: the rows as they would be.
        rows: the rows as they are.
        objective: weights of the terms.
        exponent: α.
        row_weights: importance of each row, of mean 1, [..., rows].
        parameter_weights: importance of each parameter, of mean 1, [..., rows, columns].
    """
    loss = decoded.new_zeros(decoded.shape[:-2])
    weight = row_weights[..., None] if row_weights is not None else parameter_weights
    error = decoded - rows

    def mean(values: Tensor) -> Tensor:
        return (values if weight is None else values * weight).mean(dim=(-2, -1))

    if objective.cosine:
        distance = 1 - F.cosine_similarity(decoded, rows, dim=-1)
        loss = loss + objective.cosine * (distance if row_weights is None else distance * row_weights).mean(dim=-1)
    if objective.l2:
        loss = loss + objective.l2 * mean(error.square()).add(TINY**2).sqrt()
    if objective.l1:
        loss = loss + objective.l1 * mean((error.abs() + TINY).pow(exponent))
    return loss


def importances(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Return the problem's row weights and parameter weights over all members, normalised and of mean 1.

    A problem's weights are those of squared errors; a loss is multiplied by an importance itself (arXiv 2302.04045), which
    is their root.
    """
    how = problem.objective.normalization
    if problem.objective.importance == "none":
        return None if problem.row_weights is None else problem.row_weights.float() / problem.row_weights.mean(), None
    rows = None if problem.row_weights is None else _normalized(problem.row_weights.float().sqrt(), how)
    if problem.parameter_weights is None:
        return rows, None
    return rows, _normalized(torch.cat([weight.float().sqrt() for weight in problem.parameter_weights]), how)


def _normalized(weights: Tensor, how: str) -> Tensor:
    """Return weights of mean 1: as they are ("sum"), by their square roots ("power") or logarithms ("log")."""
    weights = weights / weights.mean()
    if how != "sum":
        weights = weights.sqrt() if how == "power" else weights.log1p()
    return weights / weights.mean()


def polish(problem: Problem, factors: list[Tensor], decode: Callable[[list[Tensor]], Tensor], steps: int) -> float:
    """Train factors in place by the problem's loss, by Adam on all rows at once; return the loss or the judge's value.

    Steps are compared by the loss with the final exponent, or by the problem's judge; the best is kept, the start included.

    Args:
        problem: its weights are the targets.
        factors: the start, float32.
        decode: factors → rows of all members [rows, columns].
        steps: of the optimizer.
    """
    rows = torch.cat([weight.float() for weight in problem.weights])
    row_weights, parameter_weights = importances(problem)
    used = rows.norm(dim=1) > 0  # a zero row has no direction
    whole = bool(used.all()) or not problem.objective.cosine

    def loss(values: list[Tensor], exponent: float) -> Tensor:
        decoded = decode(values)
        if whole:
            return loss_terms(decoded, rows, problem.objective, exponent, row_weights, parameter_weights)
        chosen = row_weights[used] if row_weights is not None else None
        single = parameter_weights[used] if parameter_weights is not None else None
        return loss_terms(decoded[used], rows[used], problem.objective, exponent, chosen, single)

    @torch.no_grad()
    def judged(values: list[Tensor]) -> float:
        return problem.judge(decode(values)) if problem.judge else float(loss(values, ANNEALED_TO))

    best = judged(factors)
    kept = [factor.clone() for factor in factors]
    trained = [factor.clone().requires_grad_() for factor in factors]
    # The scale of a step is that of the numbers it moves.
    groups = [
        {"params": [t], "lr": LEARNING_RATE * float(t.detach().square().mean().sqrt()) or LEARNING_RATE}
        for t in trained
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    )
    for step in range(steps):
        exponent = 1 - (1 - ANNEALED_TO) * min(1.0, 1.5 * step / max(1, steps - 1))
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss(trained, exponent).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // CHECKS) == 0 or step == steps - 1:
            reached = judged(trained)
            if math.isfinite(reached) and reached < best:
                best, kept = reached, [factor.detach().clone() for factor in trained]
            problem.progress((step + 1) / steps)
    for factor, value in zip(factors, kept, strict=True):
        factor.copy_(value)
    return best
