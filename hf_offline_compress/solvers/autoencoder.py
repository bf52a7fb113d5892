"""Autoencoders of the rows of weight matrices (arXiv 2106.08181 and 2302.04045), in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..structures import Autoencoder
from .base import Factors, Problem
from .epoch_training import train_by_epochs
from .latent_training import train_latents


def solve_autoencoders(problems: Sequence[Problem]) -> list[Factors]:
    """Return latents, norms and decoder for each problem; the encoder, if there was one, is dropped."""
    structure = problems[0].structure
    assert isinstance(structure, Autoencoder)
    if structure.training.method == "latents":
        with torch.no_grad():
            return train_latents(problems)
    return [_by_epochs(problem) for problem in problems]


@torch.no_grad()
def _by_epochs(problem: Problem) -> Factors:
    structure = problem.structure
    assert isinstance(structure, Autoencoder)
    rows = torch.cat([weight.float() for weight in problem.weights])
    norms = rows.norm(dim=1)
    keep = norms > 0  # a zero row has no direction, and is restored by its norm
    if not bool(keep.any()):
        keep = ~keep
    latents, layers, reached = train_by_epochs(problem, rows, keep)
    notes = {"loss" if problem.judge is None else "validation": reached}
    factors = _linear_factors if structure.decoder == "linear" else _non_linear_factors
    return factors(structure, layers, latents, norms, [len(w) for w in problem.weights], notes)


def _linear_factors(
    structure: Autoencoder,
    layers: list[nn.Linear],
    latents: Tensor,
    norms: Tensor,
    rows: list[int],
    notes: dict[str, float],
) -> Factors:
    """Fold norms and bias: ŵᵢ = sᵢ(D zᵢ + b) = [sᵢ zᵢ, sᵢ] [D, b]ᵀ, sᵢ = ‖wᵢ‖ / ‖D zᵢ + b‖."""
    (linear,) = layers
    decoder_tensors = {"weight": linear.weight.detach(), "bias": linear.bias.detach()}
    if structure.norms:
        scale = norms / linear(latents).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        latents = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1) * scale[:, None]
        decoder_tensors = {"weight": torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach()}
    return Factors(tuple({"latents": part} for part in latents.split(rows)), decoder_tensors, notes)


def _non_linear_factors(
    structure: Autoencoder,
    layers: list[nn.Linear],
    latents: Tensor,
    norms: Tensor,
    rows: list[int],
    notes: dict[str, float],
) -> Factors:
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        tensors |= {f"layers.{i}.weight": layer.weight.detach(), f"layers.{i}.bias": layer.bias.detach()}
    members = [{"latents": part} for part in latents.split(rows)]
    if structure.norms:
        members = [m | {"norms": part} for m, part in zip(members, norms.split(rows), strict=True)]
    return Factors(tuple(members), tensors, notes)
