"""Training without an encoder: latents and decoder themselves, many rows at a time, groups of equal shape together.

The start is the closed form, which is kept if training ends worse. A residual decoder's hidden layer begins with
random frequencies and no effect: sin(U z + u) are random Fourier features of the latents (Rahimi & Recht 2007), of which
training finds those latents whose features add what the linear part lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..request.objective import Objective
from ..runtime.structures_compressed import ACTIVATIONS
from ..structures import Autoencoder
from .base import Factors, Problem
from .low_rank import damped_root, leading_vectors
from .polishing import ANNEALED_TO, TINY, importances, loss_terms

FREQUENCY = 16.0
LATENT_RATE, DECODER_RATE, MANY_CHUNKS = 0.1, 0.01, 8
LEAST_ROWS, MOST_ROWS = 192, 2304
LEAST_EPOCHS, MOST_EPOCHS, LEAST_STEPS, WEIGHT_VISITS = 30, 50, 200, 3e8
WARM_UP = 10
CHECKS = 5


def train_latents(problems: Sequence[Problem]) -> list[Factors]:
    """Return the factors of problems of equal shape, size, objective and structure, trained in one batched program.

    With calibration, rows are trained in the metric of the layer's inputs, W L with L Lᵀ = E[x xᵀ]; the decoder is linear
    in its last step, so L⁻¹ is multiplied into it afterwards.
    """
    first = problems[0]
    structure, objective, size = first.structure, first.objective, first.integer_size
    assert isinstance(structure, Autoencoder)
    weights = torch.stack([torch.cat([weight.float() for weight in p.weights]) for p in problems])
    roots = [None if p.input_moments is None else damped_root(p.input_moments.to(weights.device)) for p in problems]
    rows = weights
    if roots[0] is not None:
        rows = torch.stack([(w.double() @ root).float() for w, root in zip(weights, roots, strict=True)])
    model = _Batch(structure, objective, rows, size, problems)
    reached = model.train(problems, roots)
    factors = []
    for i, (problem, (latents, scales, decoder)) in enumerate(zip(problems, model.results(), strict=True)):
        if (root := roots[i]) is not None:
            for name in ("linear.weight", "output.weight", "weight", "bias"):
                if name in decoder:  # [columns, width]: of W L = f, W = f L⁻¹
                    value = decoder[name].double().view(len(root), -1)
                    value = torch.linalg.solve_triangular(root.T, value, upper=True)
                    decoder[name] = value.float().view_as(decoder[name])
        sizes = [len(weight) for weight in problem.weights]
        members = [{"latents": part} for part in latents.split(sizes)]
        if scales is not None:
            members = [m | {"scales": part} for m, part in zip(members, scales.split(sizes), strict=True)]
        note = "loss" if problem.judge is None else "validation"
        factors.append(Factors(tuple(members), decoder, {note: reached[i]}))
    return factors


class _Batch:
    """Latents and decoders of several matrices of equal shape, [groups, …] each."""

    def __init__(
        self, structure: Autoencoder, objective: Objective, rows: Tensor, size: int, problems: Sequence[Problem]
    ) -> None:
        """Start from the closed form.

        Args:
            structure: what is trained.
            objective: its loss.
            rows: the targets, [groups, rows, columns].
            size: latent width.
            problems: for seeds, and importances of rows and parameters.
        """
        self.structure, self.objective = structure, objective
        groups, columns = len(rows), rows.shape[2]
        self.norms = rows.norm(dim=2)
        used = self.norms > 0
        self.row_weights, self.parameter_weights = self._weights(problems, used)
        self.rows = rows
        directed = rows / self.norms.clamp_min(torch.finfo(rows.dtype).tiny)[..., None]
        self.scaled = structure.norms
        if structure.decoder == "linear":
            size += structure.norms  # what norms and bias take is worth one rank
        counted = directed if objective.cosine else rows
        if self.row_weights is not None:
            counted = counted * self.row_weights.sqrt()[..., None]
        vectors = torch.stack([leading_vectors((c.T @ c).double(), size).float() for c in counted])
        latents = (directed if self.scaled else rows) @ vectors
        # Latents are trained in units in which they are about 1.
        self.unit = latents.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-12)
        self.latents = latents / self.unit
        self.decoder = {"linear": vectors.transpose(1, 2).contiguous()}
        if structure.decoder == "residual":
            (units,) = structure.hidden(size, problems[0].shape)
            generators = [torch.Generator().manual_seed(p.seed) for p in problems]
            frequencies = [torch.randn(size, units, generator=g) * FREQUENCY / math.sqrt(size) for g in generators]
            phases = [torch.rand(1, units, generator=g) * 2 * math.pi for g in generators]
            self.decoder["hidden"] = torch.stack(frequencies).to(rows)
            self.decoder["phase"] = torch.stack(phases).to(rows)
            self.decoder["output"] = rows.new_zeros(groups, units, columns)
        elif not structure.norms:
            self.decoder["bias"] = rows.new_zeros(groups, 1, columns)

    def train(self, problems: Sequence[Problem], roots: Sequence[Tensor | None]) -> list[float]:
        """Train, keep the best factors of every group, and return their losses or the judges' values.

        Args:
            problems: for seeds, progress and judges.
            roots: of the metrics that the rows are in, or None where they are as they were.
        """
        training = self.structure.training
        groups, count, columns = self.rows.shape
        batch = training.batch_size or min(MOST_ROWS, max(LEAST_ROWS, count // 4))
        chunks = max(1, round(count / batch))
        epochs = training.epochs or max(
            round(min(MOST_EPOCHS, max(LEAST_EPOCHS, WEIGHT_VISITS / (count * columns)))), -(-LEAST_STEPS // chunks)
        )
        generator = torch.Generator().manual_seed(problems[0].seed)
        order = torch.randperm(count, generator=generator).to(self.rows.device)
        parts = order.chunk(chunks)
        latents = [self.latents[:, part].clone().requires_grad_() for part in parts]
        decoder = {name: value.clone().requires_grad_() for name, value in self.decoder.items()}
        optimizers = [_adam([part], LATENT_RATE) for part in latents]
        shared = _adam(list(decoder.values()), DECODER_RATE if chunks < MANY_CHUNKS else DECODER_RATE / 2)
        best = self._judge(problems, roots, self.latents, self.decoder)
        kept = (self.latents.clone(), {name: value.clone() for name, value in self.decoder.items()})
        checks = {round(epochs * (i + 1) / CHECKS) for i in range(CHECKS)}
        steps, done = epochs * chunks, 0
        for epoch in range(1, epochs + 1):
            exponent = 1 - (1 - ANNEALED_TO) * min(1.0, 1.5 * (epoch - 1) / epochs)
            for part, own, optimizer in zip(parts, latents, optimizers, strict=True):
                share = 0.5 * (1 + math.cos(math.pi * done / steps)) * min(1.0, (done + 1) / WARM_UP)
                for each in (optimizer, shared):
                    for group in each.param_groups:
                        group["lr"] = group["initial_lr"] * share
                    each.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    self._training_loss(own, decoder, part, exponent).sum().backward()
                optimizer.step()
                shared.step()
                done += 1
            if epoch in checks:
                together = torch.empty_like(self.latents)
                for part, own in zip(parts, latents, strict=True):
                    together[:, part] = own.detach()
                reached = self._judge(problems, roots, together, decoder)
                for i in range(groups):
                    if math.isfinite(reached[i]) and reached[i] < best[i]:
                        best[i] = reached[i]
                        kept[0][i] = together[i]
                        for name, value in decoder.items():
                            kept[1][name][i] = value[i].detach()
            for problem in problems:
                problem.progress(epoch / epochs)
        self.latents, self.decoder = kept
        return best

    def results(self) -> list[tuple[Tensor, Tensor | None, dict[str, Tensor]]]:
        """Return latents, scales and decoder of each group, as they are stored."""
        _, scales = self._scaled(self._decode(self.latents, self.decoder), slice(None))
        return [self._result(i, scales[i]) for i in range(len(scales))]

    def _result(self, i: int, scales: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        latents = self.latents[i]
        decoder = {name: value[i] for name, value in self.decoder.items()}
        if self.structure.decoder == "residual":
            stored = {
                "linear.weight": decoder["linear"].T * self.unit[i],
                "hidden.weight": decoder["hidden"].T,
                "hidden.bias": decoder["phase"][0],
                "output.weight": decoder["output"].T * self.unit[i],
            }
            return latents, scales if self.scaled else None, _whole(stored)
        if self.scaled:
            latents = latents * scales[:, None]
        stored = {"weight": decoder["linear"].T * self.unit[i]}
        if "bias" in decoder:
            stored["bias"] = (decoder["bias"] * self.unit[i]).flatten()
        return latents, None, _whole(stored)

    def _decode(self, latents: Tensor, decoder: dict[str, Tensor]) -> Tensor:
        """Return rows before their scales, [groups, rows, columns]."""
        if "hidden" in decoder:
            features = ACTIVATIONS[self.structure.activation](
                torch.baddbmm(decoder["phase"], latents, decoder["hidden"])
            )
            rows = torch.baddbmm(latents @ decoder["linear"], features, decoder["output"])
        elif "bias" in decoder:
            rows = torch.baddbmm(decoder["bias"], latents, decoder["linear"])
        else:
            rows = latents @ decoder["linear"]
        return rows * self.unit

    def _scaled(self, decoded: Tensor, part: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return decoded rows at their scale, and the scales."""
        if not self.scaled:
            return decoded, torch.ones_like(decoded[..., 0])
        rows = self.rows[:, part]
        if self.objective.l2:  # the length that is closest does not change the direction
            scales = (decoded * rows).sum(dim=2) / decoded.square().sum(dim=2).clamp_min(1e-20)
        else:
            scales = self.norms[:, part] / decoded.norm(dim=2).clamp_min(1e-10)
        return decoded * scales[..., None], scales

    def _loss(self, latents: Tensor, decoder: dict[str, Tensor], part: Tensor | slice, exponent: float) -> Tensor:
        """Return the loss of each group on some of its rows, [groups]."""
        decoded, _ = self._scaled(self._decode(latents, decoder), part)
        rows = None if self.row_weights is None else self.row_weights[:, part]
        single = None if self.parameter_weights is None else self.parameter_weights[:, part]
        return loss_terms(decoded, self.rows[:, part], self.objective, exponent, rows, single)

    def _training_loss(
        self, latents: Tensor, decoder: dict[str, Tensor], part: Tensor | slice, exponent: float
    ) -> Tensor:
        """Return the same from two products a row, where that is enough: several times fewer passes over the rows."""
        if self.objective.l1 or self.parameter_weights is not None:
            return self._loss(latents, decoder, part, exponent)
        decoded, rows = self._decode(latents, decoder), self.rows[:, part]
        inner, squared = (decoded * rows).sum(dim=2), decoded.square().sum(dim=2).clamp_min(1e-20)
        true = self.norms[:, part].square()
        cosine = inner * (squared * true).clamp_min(1e-20).rsqrt()
        if not self.scaled:
            error = squared - 2 * inner + true
        elif self.objective.l2:
            error = true - inner.square() / squared
        else:
            error = 2 * true * (1 - cosine)
        weights = 1.0 if self.row_weights is None else self.row_weights[:, part]
        loss = self.objective.cosine * ((1 - cosine) * weights).mean(dim=1)
        if self.objective.l2:
            mean = (error.clamp_min(0) * weights).mean(dim=1) / rows.shape[2]
            loss = loss + self.objective.l2 * mean.add(TINY**2).sqrt()
        return loss

    @torch.no_grad()
    def _judge(
        self,
        problems: Sequence[Problem],
        roots: Sequence[Tensor | None],
        latents: Tensor,
        decoder: dict[str, Tensor],
    ) -> list[float]:
        """Return for each group its loss on all rows, or its judge's value."""
        if problems[0].judge is None:
            return [float(value) for value in self._loss(latents, decoder, slice(None), ANNEALED_TO)]
        decoded, _ = self._scaled(self._decode(latents, decoder), slice(None))
        found = []
        for problem, root, rows in zip(problems, roots, decoded, strict=True):
            assert problem.judge is not None
            if root is not None:
                rows = torch.linalg.solve_triangular(root, rows.double(), upper=False, left=False).float()
            found.append(problem.judge(rows))
        return found

    @staticmethod
    def _weights(problems: Sequence[Problem], used: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return importances of rows and parameters, [groups, …]; zero rows have no direction, and no weight."""
        pairs = [importances(problem) for problem in problems]
        rows = torch.stack([r for r, _ in pairs if r is not None]) if pairs[0][0] is not None else None
        single = torch.stack([p for _, p in pairs if p is not None]) if pairs[0][1] is not None else None
        if single is None and not bool(used.all()) and bool(used.any()):
            rows = used.float() if rows is None else rows * used
        if rows is not None:
            rows = rows / rows.mean(dim=1, keepdim=True)
        return rows, single


def _adam(numbers: list[Tensor], rate: float) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(numbers, lr=rate, betas=(0.9, 0.98), eps=1e-10, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
