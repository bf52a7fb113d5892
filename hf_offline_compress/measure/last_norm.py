"""The norm before a language model's head, fitted to the dense model's predictions.

Behind compressed layers its inputs are off, and what the head makes of that is, too. Logits are linear in the norm's numbers,
so that the divergence of predictions from the dense model's is convex in them: there is one best answer, which a few steps
of a quasi-Newton method find from hidden states that are computed once. They begin with the Fisher matrix of the predictions,
as random directions show it (see `sensitivity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .passes import Reached, removed
from .texts import Batch

# Steps of the quasi-Newton method: further ones follow what is special about the text.
STEPS = 8
# Predictions that are compared at a time.
AT_ONCE = 256
# On the diagonal of the Fisher matrix, in parts of its mean.
RIDGE = 1e-2
# Texts that are enough to find it by.
ROWS = 2
# The most memory for the dense model's predictions that are kept from one step to the next.
KEPT_BYTES = 2**28
# What logits may be off by if they are just the head's products.
SAME = 1e-3


@dataclass(frozen=True)
class LastNorm:
    """The norm whose outputs a head multiplies with its rows, and nothing else happens to them.

    Attributes:
        name: of the module.
        module: itself; outputs are linear in its `weight` and, where it has one, its `bias`, both [columns].
        offset: that the module adds to its weight.
    """

    name: str
    module: Any
    offset: float

    def values(self, gain: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Return its numbers by full name such that outputs z become z · gain + shift; without a bias there is no shift."""
        found = {f"{self.name}.weight": (self.module.weight.float() + self.offset) * gain - self.offset}
        if self.has_bias:
            found[f"{self.name}.bias"] = self.module.bias.float() * gain + shift
        return found

    @property
    def has_bias(self) -> bool:
        """Whether it adds numbers of its own."""
        return getattr(self.module, "bias", None) is not None


@torch.no_grad()
def find_last_norm(model: Any, batch: Batch) -> LastNorm | None:
    """Return the norm before a language model's head, by what a portion of text shows; None where there is no such thing."""
    head = model.get_output_embeddings()
    columns = head.weight.shape[1]
    seen: list[tuple[str, nn.Module, Any, Any]] = []
    given: list[Tensor] = []

    def behind(name: str) -> Any:
        return lambda module, args, output: seen.append((name, module, args[0] if args else None, output))

    shape = torch.Size([columns])
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "shape", None) == shape
        and getattr(getattr(module, "bias", None), "shape", shape) == shape
    ]
    handles = [module.register_forward_hook(behind(name)) for name, module in norms]
    handles.append(head.register_forward_pre_hook(lambda _, args: given.append(args[0])))
    device = head.weight.device
    ids, mask = (tensor[:ROWS].to(device) for tensor in (batch.input_ids, batch.attention_mask))
    with removed(handles):
        output = model(input_ids=ids, attention_mask=mask)
    if len(given) != 1:
        return None
    (hidden,) = given
    logits = next((value for key, value in output.items() if key.endswith("logits") and value.dim() == 3), None)
    if logits is None:
        return None
    told = F.linear(hidden, head.weight, getattr(head, "bias", None)).float()
    if logits.shape != told.shape or not (logits.float() - told).abs().max() <= SAME * told.abs().max():
        return None  # they are scaled, or bounded, or no numbers
    for name, module, into, out in reversed(seen):
        if isinstance(into, Tensor) and isinstance(out, Tensor) and out.equal(hidden):
            if _is_shared(model, module) or sum(other is module for _, other, _, _ in seen) > 1:
                return None
            found = (LastNorm(name, module, offset) for offset in (0.0, 1.0))
            return next((norm for norm in found if _is_linear(norm, into, out)), None)
    return None


def _is_shared(model: nn.Module, module: nn.Module) -> bool:
    """Return whether another place of the model has parameters of a module."""
    own = {id(parameter) for parameter in module.parameters()}
    return sum(id(p) in own for _, p in model.named_parameters(remove_duplicate=False)) > len(own)


def _is_linear(norm: LastNorm, into: Tensor, out: Tensor) -> bool:
    """Return whether a norm's outputs are what its values are thought to make of them."""
    columns = out.shape[-1]
    gain = torch.linspace(0.5, 1.5, columns, device=out.device)
    shift = gain.flip(0) if norm.has_bias else torch.zeros_like(gain)
    values = {name.rpartition(".")[2]: value.to(out.dtype) for name, value in norm.values(gain, shift).items()}
    found, wanted = torch.func.functional_call(norm.module, values, (into,)), out.float() * gain + shift
    tolerance = max(SAME, 4 * torch.finfo(out.dtype).eps) * wanted.abs().max()
    return bool((found.float() - wanted).abs().max() <= tolerance)


@torch.no_grad()
def hidden_at_head(model: Any, batches: Sequence[Batch], places: Sequence[Tensor]) -> Tensor:
    """Return what a head is given at some places [places, columns], float32.

    Args:
        model: a language model.
        batches: of text.
        places: of each batch [sequences, length], bool.
    """
    head = model.get_output_embeddings()
    device, found = head.weight.device, list[Tensor]()

    def keep(module: nn.Module, args: Any) -> None:
        found.append(args[0])
        raise Reached

    rows: list[Tensor] = []
    with removed([head.register_forward_pre_hook(keep)]):
        for batch, own in zip(batches, places, strict=True):
            found.clear()
            with suppress(Reached):
                model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
            rows.append(found[0][own.to(device)].float())
    return torch.cat(rows)


@dataclass(frozen=True)
class Predictions:
    """What a head makes of hidden states: log-probabilities of tokens.

    Attributes:
        hidden: [places, columns].
        weight: of the head [tokens, columns].
        bias: of the head [tokens], or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def of(self, part: slice, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return them at some places [places, tokens], of hidden states · gain + shift."""
        hidden = self.hidden[part]
        if gain is not None and shift is not None:
            hidden = hidden * gain + shift
        return F.linear(hidden, self.weight, self.bias).log_softmax(dim=-1)


def fitted(dense: Predictions, now: Predictions, *, shifted: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Return gain and shift [columns] of the hidden states of `now` that bring its predictions nearest to the dense ones.

    Args:
        dense: predictions to be met.
        now: those to be changed, at the same places.
        shifted: whether there is to be a shift; else it is 0.
        seed: of drawn directions.
    """
    count, columns = now.hidden.shape
    parts = [slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE)]
    known: list[Tensor] | None = None
    if 4 * count * len(dense.weight) <= KEPT_BYTES:
        known = [dense.of(part) for part in parts]
    root = _root(now, parts, shifted, seed)
    steps = torch.zeros(len(root), device=root.device, requires_grad=True)
    unchanged = torch.zeros(columns, device=root.device)

    def numbers(found: Tensor) -> tuple[Tensor, Tensor]:
        changes = torch.linalg.solve_triangular(root.mT, found[:, None], upper=True)[:, 0]
        return 1 + changes[:columns], changes[columns:] if shifted else unchanged

    optimizer = torch.optim.LBFGS([steps], max_iter=STEPS, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=root.device)
        for i, part in enumerate(parts):
            wanted = dense.of(part) if known is None else known[i]
            lost = F.kl_div(now.of(part, *numbers(steps)), wanted, reduction="sum", log_target=True) / count
            lost.backward()
            total += lost.detach()
        return total

    with torch.enable_grad():
        optimizer.step(divergence)
    gain, shift = numbers(steps.detach())
    return gain, shift


@torch.no_grad()
def _root(now: Predictions, parts: Sequence[slice], shifted: bool, seed: int) -> Tensor:
    """Return a Cholesky factor of the Fisher matrix of gain and shift, hidden states and what they meet taken as independent."""
    generator = torch.Generator().manual_seed(seed)
    count, columns = now.hidden.shape
    met = now.hidden.new_zeros(columns, columns)
    for part in parts:
        roots = now.of(part).mul_(0.5).exp_()
        drawn = torch.randn(roots.shape, generator=generator).to(roots)
        directions = roots * (drawn - roots * (roots * drawn).sum(dim=-1, keepdim=True)) @ now.weight
        met += directions.mT @ directions / count
    moments, means = now.hidden.mT @ now.hidden / count, now.hidden.mean(dim=0)
    fisher = moments * met
    if shifted:
        across = means[:, None] * met
        fisher = torch.cat([torch.cat([fisher, across], dim=1), torch.cat([across.mT, met], dim=1)])
    fisher = fisher.double()
    # Gains and shifts have units of their own.
    ridge = torch.cat([half.mean().clamp_min(1e-30).expand(columns) for half in fisher.diagonal().split(columns)])
    return torch.linalg.cholesky(fisher + RIDGE * ridge.diag()).float()
