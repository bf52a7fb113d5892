"""Autoencoders trained on the rows of weight matrices (arXiv 2106.08181 and 2302.04045), in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..recipe import Objective
from ..structures import Autoencoder, Training
from .base import Factors, Problem
from .low_rank import _leading

ANNEALED_FROM, ANNEALED_TO = 1.0, 0.1
LEAKY_SLOPE = 0.01
TINY = 1e-10
ROWS_AT_ONCE = 8192

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


def solve_autoencoder(problem: Problem) -> Factors:
    """Return latents, norms and decoder of an autoencoder trained on the members' rows.

    The encoder is dropped. The epoch of the lowest loss on all rows is kept. A linear autoencoder starts from the closed
    form (the singular vectors of the rows, of unit length where the loss looks at direction), and so never ends worse
    than that; its factors come back in low-rank form.
    """
    structure = problem.structure
    assert isinstance(structure, Autoencoder)
    rows = torch.cat([weight.float() for weight in problem.weights])
    norms = rows.norm(dim=1)
    used = rows[norms > 0]  # a zero row has no direction, and is restored by its norm
    if len(used) == 0:
        used = rows
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(problem.seed)
        encoder, decoder = _networks(structure, problem.size, rows.shape[1])
        encoder.to(rows.device)
        decoder.to(rows.device)
        if structure.decoder == "linear":
            _closed_form_start(encoder, decoder, used, problem.objective, problem.size)
        loss = _train(encoder, decoder, used, structure, problem.objective, problem.progress)
    with torch.no_grad():
        latents = torch.cat([encoder(part) for part in rows.split(ROWS_AT_ONCE)])
        factors = _linear_factors if structure.decoder == "linear" else _non_linear_factors
        return factors(structure, decoder, latents, norms, [len(w) for w in problem.weights], loss)


def loss_terms(decoded: Tensor, rows: Tensor, objective: Objective, exponent: float) -> Tensor:
    """Return cosine · CD + l2 · RMSE + l1 · L1α between decoded and true rows, both [rows, columns]; a scalar."""
    loss = decoded.new_zeros(())
    if objective.cosine:
        loss = loss + objective.cosine * (1 - F.cosine_similarity(decoded, rows, dim=1)).mean()
    if objective.l2:
        loss = loss + objective.l2 * (decoded - rows).square().mean().add(TINY**2).sqrt()
    if objective.l1:
        loss = loss + objective.l1 * ((decoded - rows).abs() + TINY).pow(exponent).mean()
    return loss


def _networks(structure: Autoencoder, size: int, columns: int) -> tuple[nn.Sequential, nn.Sequential]:
    if structure.decoder == "linear":
        return nn.Sequential(nn.Linear(columns, size)), nn.Sequential(nn.Linear(size, columns))
    activation = _ACTIVATIONS[structure.activation]
    widths = [columns, *(max(1, round(width * size)) for width in structure.encoder_widths), size]
    encoder: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        encoder += [nn.Linear(inputs, outputs), activation()]
    widths = [size, *structure.hidden(size), columns]
    decoder: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        decoder += [nn.Linear(inputs, outputs), activation()]
    decoder[-1] = _ACTIVATIONS[structure.output_activation]()
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


@torch.no_grad()
def _closed_form_start(encoder: nn.Module, decoder: nn.Module, rows: Tensor, objective: Objective, size: int) -> None:
    """Set a linear autoencoder to the projection onto the rows' leading singular vectors."""
    directed = F.normalize(rows.double(), dim=1) if objective.cosine else rows.double()
    vectors = _leading(directed.T @ directed, size).float()
    encoder[0].weight.copy_(vectors.T)  # type: ignore[index]
    decoder[0].weight.copy_(vectors)  # type: ignore[index]
    encoder[0].bias.zero_()  # type: ignore[index]
    decoder[0].bias.zero_()  # type: ignore[index]


def _train(
    encoder: nn.Module,
    decoder: nn.Module,
    rows: Tensor,
    structure: Autoencoder,
    objective: Objective,
    progress: Callable[[float], None],
) -> float:
    """Train in place, leave the best epoch's parameters, and return its loss on all rows."""
    training: Training = structure.training
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
        # The root of a mean is not a mean of roots, so what is compared is on all rows at once, the exponent at its end.
        decoded = torch.cat([decode(part) for part in rows.split(ROWS_AT_ONCE)])
        return float(loss_terms(decoded, rows, objective, ANNEALED_TO))

    best = evaluate()
    kept = [parameter.detach().clone() for parameter in parameters]
    epochs = training.epochs + training.final_epochs
    for epoch in range(epochs):
        exponent = ANNEALED_FROM + (ANNEALED_TO - ANNEALED_FROM) * min(1.0, epoch / max(1, training.epochs - 1))
        for chosen in torch.randperm(len(rows), generator=generator).split(training.batch_size):
            batch = rows[chosen.to(rows.device)]
            optimizer.zero_grad(set_to_none=True)
            loss_terms(decode(batch), batch, objective, exponent).backward()
            optimizer.step()
        schedule.step()
        loss = evaluate()
        if math.isfinite(loss) and loss < best:
            best, kept = loss, [parameter.detach().clone() for parameter in parameters]
        progress((epoch + 1) / epochs)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return best


def _linear_factors(
    structure: Autoencoder, decoder: nn.Sequential, latents: Tensor, norms: Tensor, rows: list[int], loss: float
) -> Factors:
    """Fold norms and bias: ŵᵢ = sᵢ(D zᵢ + b) = [sᵢ zᵢ, sᵢ] [D, b]ᵀ, sᵢ = ‖wᵢ‖ / ‖D zᵢ + b‖."""
    linear = decoder[0]
    assert isinstance(linear, nn.Linear)
    decoder_tensors = {"weight": linear.weight.detach(), "bias": linear.bias.detach()}
    if structure.norms:
        scale = norms / decoder(latents).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        latents = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1) * scale[:, None]
        decoder_tensors = {"weight": torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach()}
    return Factors(tuple({"latents": part} for part in latents.split(rows)), decoder_tensors, {"loss": loss})


def _non_linear_factors(
    structure: Autoencoder, decoder: nn.Sequential, latents: Tensor, norms: Tensor, rows: list[int], loss: float
) -> Factors:
    linears = [layer for layer in decoder if isinstance(layer, nn.Linear)]
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(linears):
        tensors |= {f"layers.{i}.weight": layer.weight.detach(), f"layers.{i}.bias": layer.bias.detach()}
    members = [{"latents": part} for part in latents.split(rows)]
    if structure.norms:
        members = [m | {"norms": part} for m, part in zip(members, norms.split(rows), strict=True)]
    return Factors(tuple(members), tensors, {"loss": loss})
