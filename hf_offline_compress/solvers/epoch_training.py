"""The papers' way to train an autoencoder: an encoder, small batches, epochs, the best epoch kept (arXiv 2302.04045)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..request.objective import Objective
from ..structures import Autoencoder
from .base import Problem
from .low_rank import leading_vectors
from .polishing import ANNEALED_TO, importances, loss_terms

ROWS_AT_ONCE = 8192
LEAKY_SLOPE = 0.01
ANNEALED_FROM = 1.0

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sin": lambda: _Sine(),
    "none": nn.Identity,
}


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def train_by_epochs(problem: Problem, rows: Tensor, keep: Tensor) -> tuple[Tensor, list[nn.Linear], float]:
    """Return latents of all rows, the decoder's layers, and what the kept epoch was judged by.

    A linear autoencoder starts from the closed form (the singular vectors of the rows, of unit length if the loss measures
    direction), and so never ends worse than that.

    Args:
        problem: structure, objective, weights of rows or parameters, seed; its judge chooses the epoch, if it has one.
        rows: of all members, float32 [rows, columns].
        keep: which rows are trained on; zero rows have no direction, [rows].
    """
    structure = problem.structure
    assert isinstance(structure, Autoencoder)
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []), torch.enable_grad():
        torch.manual_seed(problem.seed)
        encoder, decoder = _networks(structure, problem)
        encoder.to(rows.device)
        decoder.to(rows.device)
        if structure.decoder == "linear":
            _closed_form_start(encoder, decoder, rows[keep], problem.objective, problem.integer_size)
        best = _train(encoder, decoder, rows, keep, structure, problem)
    with torch.no_grad():
        latents = torch.cat([encoder(part) for part in rows.split(ROWS_AT_ONCE)])
    return latents, [layer for layer in decoder if isinstance(layer, nn.Linear)], best


def _networks(structure: Autoencoder, problem: Problem) -> tuple[nn.Sequential, nn.Sequential]:
    size, columns = problem.integer_size, problem.shape.columns
    if structure.decoder == "linear":
        return nn.Sequential(nn.Linear(columns, size)), nn.Sequential(nn.Linear(size, columns))
    activation = _ACTIVATIONS[structure.activation]
    widths = [columns, *(max(1, round(width * size)) for width in structure.encoder_widths), size]
    encoder: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        encoder += [nn.Linear(inputs, outputs), activation()]
    widths = [size, *structure.hidden(size, problem.shape), columns]
    decoder: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        decoder += [nn.Linear(inputs, outputs), activation()]
    decoder[-1] = _ACTIVATIONS[structure.output_activation]()
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


@torch.no_grad()
def _closed_form_start(encoder: nn.Module, decoder: nn.Module, rows: Tensor, objective: Objective, size: int) -> None:
    """Set a linear autoencoder to the projection onto the rows' leading singular vectors."""
    directed = F.normalize(rows.double(), dim=1) if objective.cosine else rows.double()
    vectors = leading_vectors(directed.T @ directed, size).float()
    encoder[0].weight.copy_(vectors.T)  # type: ignore[index]
    decoder[0].weight.copy_(vectors)  # type: ignore[index]
    encoder[0].bias.zero_()  # type: ignore[index]
    decoder[0].bias.zero_()  # type: ignore[index]


def _train(
    encoder: nn.Module, decoder: nn.Module, all_rows: Tensor, keep: Tensor, structure: Autoencoder, problem: Problem
) -> float:
    """Train in place, leave the best epoch's parameters, and return what it was judged by."""
    training, objective = structure.training, problem.objective
    rows = all_rows[keep]
    row_weights, parameter_weights = importances(problem)
    row_weights = None if row_weights is None else row_weights[keep]
    parameter_weights = None if parameter_weights is None else parameter_weights[keep]
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, training.decay_epochs, training.decay)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))

    def decode(batch: Tensor) -> Tensor:
        decoded: Tensor = decoder(encoder(batch))
        if structure.norms:
            decoded = F.normalize(decoded, dim=1) * batch.norm(dim=1, keepdim=True)
        return decoded

    @torch.no_grad()
    def evaluate() -> float:
        if problem.judge is not None:
            return problem.judge(torch.cat([decode(part) for part in all_rows.split(ROWS_AT_ONCE)]))
        # The root of a mean is not a mean of roots, so what is compared is on all rows at once, the exponent at its end.
        decoded = torch.cat([decode(part) for part in rows.split(ROWS_AT_ONCE)])
        return float(loss_terms(decoded, rows, objective, ANNEALED_TO, row_weights, parameter_weights))

    best = evaluate()
    kept = [parameter.detach().clone() for parameter in parameters]
    epochs = training.epochs + training.final_epochs
    for epoch in range(epochs):
        exponent = ANNEALED_FROM + (ANNEALED_TO - ANNEALED_FROM) * min(1.0, epoch / max(1, training.epochs - 1))
        for chosen in torch.randperm(len(rows), generator=generator).split(training.batch_size):
            chosen = chosen.to(rows.device)
            batch = rows[chosen]
            optimizer.zero_grad(set_to_none=True)
            loss_terms(
                decode(batch),
                batch,
                objective,
                exponent,
                None if row_weights is None else _of_mean_one(row_weights[chosen]),
                None if parameter_weights is None else _of_mean_one(parameter_weights[chosen]),
            ).backward()
            optimizer.step()
        schedule.step()
        reached = evaluate()
        if math.isfinite(reached) and not reached >= best:  # the start may be as bad as infinite
            best, kept = reached, [parameter.detach().clone() for parameter in parameters]
        problem.progress((epoch + 1) / epochs)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return best


def _of_mean_one(weights: Tensor) -> Tensor:
    return weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
