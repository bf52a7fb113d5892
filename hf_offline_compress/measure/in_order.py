"""What the layers of a model see once everything before them is compressed, beside what they see in the dense model.

A `Course` takes a text through both forms of a model, one layer after the other. The dense layer runs once; the other one as
far as the inputs of each linear layer, whose weights are not settled before, and there both are compared. Between two layers
there are only hidden states, which are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..architectures.layout import Matrix
from ..foundation.processes import ALONE, Processes
from .divergence import Replaced, exchanged
from .passes import Call, Reached, hidden_of, layer_names, removed
from .sharing import Sums
from .texts import Batch

# A tensor is the sum of two others where it is off by no more than this share of its norm, or by what its dtype rounds.
SAME = 1e-4
# Rows of tensors that are compared.
COMPARED = 256


class Tap(NamedTuple):
    """Where a tensor is seen.

    Attributes:
        path: of a module within the layer of the model; "" for the layer itself.
        goes_in: whether it goes into the module, or comes out of it.
    """

    path: str
    goes_in: bool


@dataclass(frozen=True)
class Place:
    """Inputs of linear layers, and what the outputs of these are added to.

    Attributes:
        inputs: their name (`Matrix.inputs`).
        module: the first linear layer that they go into, by its path within the layer of the model.
        residual: where what the output is added to is seen. None where nothing was found.
        total: where the sum of both is seen.
    """

    inputs: str
    module: str
    residual: Tap | None = None
    total: Tap | None = None


@dataclass(frozen=True)
class Change:
    """How what linear layers see behind compressed ones, x', differs from what they see in the dense model, x.

    All are means over tokens. One of `inputs` and `outputs` is there.

    Attributes:
        moments: E[x' x'ᵀ] [columns, columns].
        tokens: how many.
        inputs: E[(x - x') x'ᵀ] [columns, columns], where outputs are not added to anything.
        outputs: E[(W x + r - W x' - r') x'ᵀ] [rows, columns], with the dense weight W, and r that outputs are added to.
    """

    moments: Tensor
    tokens: int
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        known = (self.moments, self.inputs, self.outputs)
        return all(bool(tensor.isfinite().all()) for tensor in known if tensor is not None)


class Course:
    """A text on its way through both forms of a model.

    Attributes:
        depth: number of layers; 0 where they cannot be run one by one.
    """

    def __init__(
        self,
        model: Any,
        matrices: Sequence[Matrix],
        batches: Sequence[Batch],
        embeddings: Replaced,
        *,
        prefix: str,
        processes: Processes = ALONE,
    ) -> None:
        """Run both forms up to the first layer.

        Args:
            model: a stock model in evaluation mode; it stays dense.
            matrices: all of it, by which its layers are found.
            batches: the text in portions.
            embeddings: matrices outside of the layers, and the weights that stand for them.
            prefix: of parameters of the base model.
            processes: that share the portions.
        """
        self._base, self._prefix, self._processes = model.base_model, prefix, processes
        self._names = layer_names(self._base, matrices)
        self._layers: list[nn.Module] = [self._base.get_submodule(name) for name in self._names]
        self._batches = list(batches)
        self._masks = [batch.attention_mask.bool().flatten().to(next(model.parameters()).device) for batch in batches]
        self._calls: dict[int, list[Call]] = {}
        self._dense: dict[int, Tensor] = {}
        self._now: dict[int, Tensor] = {}
        # Of the layer that is gone through, what the dense form has at each place: rows of tokens, by portion.
        self._compared: dict[tuple[str, int], Tensor] = {}
        mine = range(processes.index, len(self._batches), processes.count)
        # A layer's copy with a forward pass of its own, which libraries put there, may run the layer that it is a copy of.
        replaced = any("forward" in vars(module) for layer in self._layers for module in layer.modules())
        self.depth = 0 if replaced else len(self._layers)
        if not all(processes.gather(all(self._recorded(number) for number in mine))):
            self.depth = 0
        elif self.depth:
            with exchanged(model, prefix, embeddings):
                self._now = {number: self._entering(number) for number in mine}

    @contextmanager
    def through(
        self, index: int, replaced: Replaced, matrices: Sequence[Matrix]
    ) -> Iterator[tuple[list[Place], Callable[[Replaced], None]]]:
        """Go through a layer; within, `change` compares what it sees at a place.

        Args:
            index: of the layer, the one after that of the last time.
            replaced: its matrices, and the weights that stand for them.
            matrices: some of these.

        Yields:
            The places of their inputs, in the order of the data, and what puts other weights into the compressed layer.
        """
        with torch.no_grad():
            found = self._found(index, matrices) if self._processes.is_main else []  # which has the first portion
            places = self._processes.gather(found)[0]
            for number in self._dense:
                self._run_dense(index, number, places)
        self._form = copy.deepcopy(self._layers[index])
        at = f"{self._prefix}{self._names[index]}."
        state = {at + name: tensor for name, tensor in self._form.state_dict().items()}  # views: this is its memory

        def put(more: Replaced) -> None:
            with torch.no_grad():
                for matrix, weight in more:
                    matrix.dense(state, self._prefix).copy_(weight)

        put(replaced)
        yield places, put
        self._compared.clear()
        with torch.no_grad():
            for number, given in self._now.items():
                self._now[number] = self._run(self._form, index, number, given)

    @torch.no_grad()
    def change(self, index: int, place: Place) -> Change:
        """Return how both forms differ at a place of the layer that is gone through."""
        sums = Sums(self._processes)
        dense = self._layers[index].get_submodule(place.module)
        for number, _ in sums.over(self._batches):
            y, residual = self._seen(index, number, place)
            x = y.float()
            sums.add_gram("moments", x)
            compared = self._compared[place.inputs, number]
            if residual is None:
                sums.add("inputs", (compared - x).T @ x)
            else:
                sums.add("outputs", (compared - dense(y).float() - residual.float()).T @ x)
            sums.count("tokens", len(x))
        tokens = int(sums.numbers["tokens"])
        means = {name: total.div_(max(1, tokens)) for name, total in sums.tensors.items()}
        return Change(tokens=tokens, **means)

    def _recorded(self, number: int) -> bool:
        """Record what layers are called with on a portion; return whether they can be run one by one."""
        calls: list[Call] = []
        last: Any = None
        plain = True

        def before(module: nn.Module, args: Any, options: Any) -> None:
            nonlocal plain
            plain = plain and bool(args) and (not calls or args[0] is last)
            if plain and not calls:
                self._dense[number] = args[0]
            calls.append(Call.of(args[1:], options))

        def behind(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            last = hidden_of(output)

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        handles += [layer.register_forward_hook(behind) for layer in self._layers]
        with removed(handles):
            self._run_base(number)
        self._calls[number] = calls
        return plain and len(calls) == len(self._layers)

    def _entering(self, number: int) -> Tensor:
        """Return the hidden states before the first layer."""
        found: list[Tensor] = []

        def before(module: nn.Module, args: Any) -> None:
            found.append(args[0])
            raise Reached

        with removed([self._layers[0].register_forward_pre_hook(before)]):
            self._run_base(number)
        return found[0]

    @torch.no_grad()
    def _run_base(self, number: int) -> None:
        batch, device = self._batches[number], self._masks[number].device
        with suppress(Reached):
            self._base(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))

    def _run(self, layer: nn.Module, index: int, number: int, hidden: Tensor) -> Tensor:
        return self._calls[number][index].run(layer, hidden)

    def _run_dense(self, index: int, number: int, places: Sequence[Place]) -> None:
        """Run the dense layer on a portion, and keep what it has at the places: totals, or inputs where there are none."""
        layer, kept = self._layers[index], self._masks[number]
        taps = [place.total or Tap(place.module, True) for place in places]
        with _tapped(layer, taps, kept) as seen:
            self._dense[number] = self._run(layer, index, number, self._dense[number])
        for place, tap in zip(places, taps, strict=True):
            self._compared[place.inputs, number] = seen[tap].float()

    def _seen(self, index: int, number: int, place: Place) -> tuple[Tensor, Tensor | None]:
        """Return what the compressed layer has at a place: rows of inputs, and of what outputs are added to.

        It is run no further.
        """
        goal = Tap(place.module, True)
        taps = [goal] if place.residual is None else [place.residual, goal]
        with _tapped(self._form, taps, self._masks[number], last=goal) as seen, suppress(Reached):
            self._run(self._form, index, number, self._now[number])
        return seen[goal], None if place.residual is None else seen[place.residual]

    def _found(self, index: int, matrices: Sequence[Matrix]) -> list[Place]:
        """Return the places of the inputs of some matrices of a layer, in the order of the data, by the first portion."""
        layer, hidden, tokens = self._layers[index], self._dense[0], len(self._masks[0])
        # What goes into modules and comes out of them, in this order.
        events: list[tuple[Tap, Tensor]] = [(Tap("", True), _rows(hidden)[:COMPARED].clone())]

        def note(tap: Tap, tensor: Any) -> None:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and _rows(tensor).shape[0] == tokens:
                events.append((tap, _rows(tensor)[:COMPARED].clone()))

        handles = []
        for path, module in layer.named_modules():
            if path:
                into: Any = lambda _, args, path=path: note(Tap(path, True), args[0] if args else None)  # noqa: E731
                out: Any = lambda _, args, output, path=path: note(Tap(path, False), hidden_of(output))  # noqa: E731
                handles += [module.register_forward_pre_hook(into), module.register_forward_hook(out)]
        with removed(handles):
            note(Tap("", False), self._run(layer, index, 0, hidden))
        own = len(self._names[index]) + 1
        wanted: dict[str, str] = {}
        for matrix in matrices:
            wanted.setdefault(matrix.module[own:], matrix.inputs)
        found: dict[str, Place] = {}
        for start, ((path, goes_in), _) in enumerate(events):
            if goes_in and path in wanted and wanted[path] not in found:
                end = next((i for i, (tap, _) in enumerate(events) if i > start and tap == (path, False)), None)
                added = None if end is None else _added_to(events[:start], events[end][1], events[end + 1 :])
                found[wanted[path]] = Place(wanted[path], path, *(added or ()))
        return list(found.values())


@contextmanager
def _tapped(
    layer: nn.Module, taps: Iterable[Tap], kept: Tensor, last: Tap | None = None
) -> Iterator[dict[Tap, Tensor]]:
    """Copy rows of what is seen at taps while a layer runs, where it is seen first; what is seen may change later.

    Args:
        layer: to be run.
        taps: of it.
        kept: which rows, bool [tokens].
        last: the tap at which the run ends by `Reached`.
    """
    seen: dict[Tap, Tensor] = {}

    def note(tap: Tap, tensor: Tensor) -> None:
        if tap not in seen:
            seen[tap] = _rows(tensor)[kept]
        if tap == last:
            raise Reached

    def hook(tap: Tap) -> RemovableHandle:
        module = layer.get_submodule(tap.path)
        if tap.goes_in:
            return module.register_forward_pre_hook(lambda _, args: note(tap, args[0]))
        return module.register_forward_hook(lambda _, args, output: note(tap, hidden_of(output)))

    with removed([hook(tap) for tap in dict.fromkeys(taps)]):
        yield seen


def _added_to(
    before: Sequence[tuple[Tap, Tensor]], output: Tensor, behind: Sequence[tuple[Tap, Tensor]]
) -> tuple[Tap, Tap] | None:
    """Return which of the tensors before an output it is added to, and which of those behind it is the sum."""
    same, output = max(SAME, torch.finfo(output.dtype).eps), output.float()
    for (source, one), (sum_of_both, total) in product(before, behind):
        if one.shape == output.shape == total.shape:
            off, of = (total.float() - output - one.float()).norm(), total.float().norm()
            if off <= same * of and 2 * off < output.norm():  # were `one` the total, it would be off by the output
                return source, sum_of_both
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
