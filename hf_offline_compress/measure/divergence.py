"""The measured change of a model's output when weights are replaced; second-order forecasts are checked against it.

The unit is that of the sensitivity: for logits the divergence KL(dense ‖ changed), for anything else squared error, per token.
The dense model's hidden states after every layer are kept, so that only what follows a change is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architectures.families import is_language_model, objective_of
from ..architectures.layout import Matrix
from .passes import forwards_replaced, layer_names, removed
from .sensitivity import has_logits
from .statistics import CHOICES
from .texts import Batch

# The most memory for the dense model's distributions that are kept.
KEPT_BYTES = 2**28
# Tolerance for what skipping layers changes by itself.
SAME = 1e-6

Replaced = Sequence[tuple[Matrix, Tensor]]


@contextmanager
def exchanged(
    model: nn.Module, prefix: str, replaced: Replaced, others: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Replace matrices by other weights [rows, columns], and other parameters by name, temporarily."""
    state, others = model.state_dict(), others or {}
    # Views: this is the model's own memory.
    places = [*(matrix.dense(state, prefix) for matrix, _ in replaced), *(state[name] for name in others)]
    kept = [place.clone() for place in places]
    with torch.no_grad():
        try:
            for place, weight in zip(places, [*(weight for _, weight in replaced), *others.values()], strict=True):
                place.copy_(weight)
            yield
        finally:
            for place, before in zip(places, kept, strict=True):
                place.copy_(before)


@dataclass
class _Dense:
    """One batch, and the dense model's outputs on it.

    Attributes:
        ids: [sequences, length].
        mask: which of them are not padding, of the same shape.
        places: where predictions count, of the same shape.
        behind: outputs of the layers.
        told: the model's predictions, each [places, …].
    """

    ids: Tensor
    mask: Tensor
    places: Tensor
    behind: list[Any] = field(default_factory=list)
    told: list[tuple[str, Tensor]] = field(default_factory=list)


class Divergence:
    """The dense model's outputs on some batches, for comparison after weights are replaced.

    Attributes:
        of_curvature: factor from the sensitivity's δᵀGδ to the unit of `of`.
    """

    def __init__(
        self, model: Any, matrices: Sequence[Matrix], batches: Sequence[Batch], *, prefix: str, mask_token: int | None
    ) -> None:
        """Run the dense model.

        Args:
            model: a stock model in evaluation mode.
            matrices: all that may be replaced.
            batches: token ids with attention masks.
            prefix: of parameters of the base model.
            mask_token: of a masked language model; None otherwise.
        """
        name = type(model).__name__
        self._model, self._base, self._prefix = model, model.base_model, prefix
        self._choices = name.endswith(CHOICES)
        self._headed = has_logits(model) or (self._choices and any(not m.in_base for m in matrices))
        self._pooled = any(m.kind == "pooler" for m in matrices)
        self._binary = objective_of(name) == "discriminative"
        self._narrow = is_language_model(name) and model.base_model is not model
        self.of_curvature = 0.5 if self._headed else 1.0
        self._layers = [self._base.get_submodule(name) for name in layer_names(self._base, matrices)]
        device = next(model.parameters()).device
        masks = [batch.attention_mask.bool().to(device) for batch in batches]
        ids = [batch.input_ids.to(device) for batch in batches]
        places = [batch.places(mask_token).to(device) for batch in batches]
        thin = self._thinned(places)
        self._known = [_Dense(i, m, p) for i, m, p in zip(ids, masks, thin, strict=True)]
        # Each place that is kept represents several.
        self._stands_for = count(places) / max(1, count(thin))
        self._record()

    @torch.no_grad()
    def of(self, replaced: Replaced, every: int = 1, others: Mapping[str, Tensor] | None = None) -> float:
        """Return the change of the output per token with these weights in place of the model's.

        Args:
            replaced: matrices and their weights [rows, columns].
            every: run one batch in this many.
            others: parameters behind all layers, by full name.
        """
        if not (replaced or others):
            return 0.0
        first = min((self._layer_of(matrix) for matrix, _ in replaced), default=len(self._layers))
        some = self._known[::every]
        with exchanged(self._model, self._prefix, replaced, others):
            moved = sum(self._moved(known, first) for known in some)
        return moved * self._stands_for / sum(int(known.mask.sum()) for known in some)

    def work(self, matrices: Sequence[Matrix], every: int = 1) -> float:
        """Return roughly how many operations `of` takes for these matrices: two for each weight and token behind them."""
        first, some = min(map(self._layer_of, matrices)), self._known[::every]
        layers = self._layers[first:] if self._layers else [self._base]
        behind = sum(p.numel() for layer in layers for p in layer.parameters())
        words = self._model.get_output_embeddings() if self._headed else None
        head = 0 if words is None else words.weight.numel()
        return 2.0 * (count([known.mask for known in some]) * behind + count([known.places for known in some]) * head)

    def _layer_of(self, matrix: Matrix) -> int:
        """Return the first layer that has to be computed again."""
        if matrix.layer is not None:
            return min(matrix.layer, len(self._layers))
        behind = not matrix.in_base or matrix.kind == "pooler"
        return len(self._layers) if behind else 0

    def _thinned(self, places: Sequence[Tensor]) -> list[Tensor]:
        """Return the places, or one in several where the vocabulary is so large that not all can be kept."""
        if not self._narrow:
            return list(places)
        return thinned(places, -(-count(places) * 4 * self._model.config.vocab_size // KEPT_BYTES))

    @torch.no_grad()
    def _record(self) -> None:
        """Compute the dense model's outputs, and disable shortcuts that do not reproduce them."""
        calls: list[int] = [0] * len(self._layers)
        here: list[Any] = [None] * len(self._layers)

        def keep(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                calls[index] += 1
                here[index] = output

            return hook

        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(self._layers)]
        with removed(handles):
            for known in self._known:
                known.told = self._told(known)
                known.behind = list(here)
        if any(count != len(self._known) for count in calls):  # layers that share weights, or are left out
            self._layers = []
        if self._layers and self._moved(self._known[0], len(self._layers)) > SAME * int(self._known[0].mask.sum()):
            self._layers = []

    def _moved(self, known: _Dense, first: int) -> float:
        """Return the difference between the model's and the dense model's output on a batch, summed over places."""
        with forwards_replaced(self._layers[:first], lambda index, *_, **__: known.behind[index]):
            told = self._told(known)
        total = 0.0
        for (kind, dense), (_, now) in zip(known.told, told, strict=True):
            if kind == "distribution":
                total += float(F.kl_div(now, dense, reduction="sum", log_target=True))
            elif kind == "binary":
                apart = dense.sigmoid() * (dense - now) - (F.softplus(dense) - F.softplus(now))
                total += float(apart.sum())
            else:
                total += float((dense - now).square().sum()) * (0.5 if self._headed else 1.0)
        return total

    def _told(self, known: _Dense) -> list[tuple[str, Tensor]]:
        """Return the model's output on a batch: kind and values, log-probabilities for distributions."""
        ids, mask = (known.ids[None], known.mask[None]) if self._choices else (known.ids, known.mask)
        if not self._headed:
            output = self._base(input_ids=known.ids, attention_mask=known.mask.long())
            pooled = [("number", output.pooler_output.float())] if self._pooled else []
            return [("number", output[0][known.mask].float()), *pooled]
        with self._narrowed(known.places):
            output = self._model(input_ids=ids, attention_mask=mask.long())
        told = []
        for name, logits in output.items():
            if not name.endswith("logits"):
                continue
            if logits.dim() == 3 or self._binary:
                logits = logits[0] if self._narrow else logits[known.places]
            if self._binary:
                told.append(("binary", logits.float()))
            elif logits.shape[-1] == 1:
                told.append(("number", logits.float()))
            else:
                told.append(("distribution", logits.float().log_softmax(dim=-1)))
        return told

    @contextmanager
    def _narrowed(self, places: Tensor) -> Iterator[None]:
        """Give a language model's head only the hidden states of the places, as one sequence."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][places][None]
            return output

        with removed([self._base.register_forward_hook(hook)] if self._narrow else []):
            yield


def count(places: Sequence[Tensor]) -> int:
    """Return how many places there are in all batches."""
    return sum(int(own.sum()) for own in places)


def thinned(places: Sequence[Tensor], every: int) -> list[Tensor]:
    """Return one in `every` of the places of each batch, all where that is below 1."""
    found = []
    for own in places:
        thin = torch.zeros_like(own).flatten()
        thin[own.flatten().nonzero()[:: max(1, every), 0]] = True
        found.append(thin.view_as(own))
    return found
