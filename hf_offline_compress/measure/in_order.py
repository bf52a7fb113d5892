"""What the layers of a model see once everything before them is compressed, beside what they see in the dense model.

A `Course` takes a text through both forms of a model, one layer after the other, and stops at the inputs of each linear layer:
there it measures how they differ. Between two layers there are only hidden states, which are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Place:
    """Inputs of linear layers, and what the outputs of these are added to.

    Attributes:
        inputs: their name (`Matrix.inputs`).
        module: the first linear layer that they go into, by its path within the layer of the model.
        residual: the module, by such a path, that what the output is added to goes into, or comes out of; "" for the layer
            itself. None where nothing was found.
        goes_in: which of both.
    """

    inputs: str
    module: str
    residual: str | None
    goes_in: bool


@dataclass(frozen=True)
class Change:
    """How inputs x' behind compressed layers differ from those of the dense model, x; means over tokens.

    Attributes:
        moments: E[x' x'ᵀ] [columns, columns].
        inputs: E[(x - x') x'ᵀ] [columns, columns].
        residual: E[(r - r') x'ᵀ] [rows, columns] of what outputs are added to; None where that is nothing.
        tokens: how many.
    """

    moments: Tensor
    inputs: Tensor
    residual: Tensor | None
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        known = (self.moments, self.inputs, *(() if self.residual is None else (self.residual,)))
        return all(bool(tensor.isfinite().all()) for tensor in known)


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
        mine = range(processes.index, len(self._batches), processes.count)
        # A layer's copy with a forward pass of its own, which libraries put there, may run the layer that it is a copy of.
        replaced = any("forward" in vars(module) for layer in self._layers for module in layer.modules())
        self.depth = 0 if replaced else len(self._layers)
        if not all(processes.gather(all(self._recorded(number) for number in mine))):
            self.depth = 0
        elif self.depth:
            with exchanged(model, prefix, embeddings):
                self._now = {number: self._entering(number) for number in mine}

    @torch.no_grad()
    def places(self, index: int, matrices: Sequence[Matrix]) -> list[Place]:
        """Return the inputs of some matrices of a layer, in the order of the data, if they are places of the text."""
        found = self._found(index, matrices) if self._processes.is_main else []  # which has the first portion
        return self._processes.gather(found)[0]

    @contextmanager
    def through(self, index: int, replaced: Replaced) -> Iterator[Callable[[Replaced], None]]:
        """Go through a layer; within, `change` compares its inputs, and what is yielded compresses more of it.

        Args:
            index: of the layer, the one after that of the last time.
            replaced: its matrices, and the weights that stand for them.
        """
        self._form = copy.deepcopy(self._layers[index])
        at = f"{self._prefix}{self._names[index]}."
        state = {at + name: tensor for name, tensor in self._form.state_dict().items()}  # views: this is its memory

        def put(more: Replaced) -> None:
            with torch.no_grad():
                for matrix, weight in more:
                    matrix.dense(state, self._prefix).copy_(weight)

        put(replaced)
        yield put
        with torch.no_grad():
            for hidden, form in ((self._dense, self._layers[index]), (self._now, self._form)):
                for number, given in hidden.items():
                    hidden[number] = self._run(form, index, number, given)

    @torch.no_grad()
    def change(self, index: int, place: Place) -> Change:
        """Return how the inputs at a place of the layer that is gone through differ."""
        sums = Sums(self._processes)
        for number, _ in sums.over(self._batches):
            kept = self._masks[number]
            dense = self._seen(self._layers[index], index, number, self._dense[number], place)
            now = self._seen(self._form, index, number, self._now[number], place)
            x, r = (_rows(tensor)[kept].float() if tensor is not None else None for tensor in dense)
            y, s = (_rows(tensor)[kept].float() if tensor is not None else None for tensor in now)
            assert x is not None and y is not None
            sums.add_gram("moments", y)
            sums.add("inputs", (x - y).T @ y)
            if r is not None and s is not None:
                sums.add("residual", (r - s).T @ y)
            sums.count("tokens", len(y))
        tokens = int(sums.numbers["tokens"])
        means = {name: total.div_(max(1, tokens)) for name, total in sums.tensors.items()}
        return Change(means["moments"], means["inputs"], means.get("residual"), tokens)

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

    def _seen(
        self, layer: nn.Module, index: int, number: int, hidden: Tensor, place: Place
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a form of a layer has at a place: inputs, and what outputs are added to; it is run no further."""
        inputs: list[Tensor] = []
        residual = [hidden] if place.residual == "" else []

        def reached(module: nn.Module, args: Any) -> None:
            inputs.append(args[0])
            raise Reached

        handles = [layer.get_submodule(place.module).register_forward_pre_hook(reached)]
        if place.residual:
            other = layer.get_submodule(place.residual)
            if place.goes_in:
                handles.append(other.register_forward_pre_hook(lambda module, args: residual.append(args[0])))
            else:
                handles.append(
                    other.register_forward_hook(lambda module, args, output: residual.append(hidden_of(output)))
                )
        with removed(handles), suppress(Reached):
            self._run(layer, index, number, hidden)
        return inputs[0], residual[0] if residual else None

    def _found(self, index: int, matrices: Sequence[Matrix]) -> list[Place]:
        """See `places`."""
        layer, hidden, tokens = self._layers[index], self._dense[0], len(self._masks[0])
        # What goes into modules and comes out of them, in this order, by path.
        events: list[tuple[str, bool, Tensor]] = [("", True, hidden)]

        def note(path: str, goes_in: bool, tensor: Any) -> None:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and _rows(tensor).shape[0] == tokens:
                events.append((path, goes_in, _rows(tensor)[:COMPARED].clone()))

        handles = []
        for path, module in layer.named_modules():
            if path:
                into: Any = lambda _, args, path=path: note(path, True, args[0] if args else None)  # noqa: E731
                out: Any = lambda _, args, output, path=path: note(path, False, hidden_of(output))  # noqa: E731
                handles += [module.register_forward_pre_hook(into), module.register_forward_hook(out)]
        with removed(handles):
            note("", False, self._run(layer, index, 0, hidden))
        events[0] = ("", True, _rows(hidden)[:COMPARED])
        own = len(self._names[index]) + 1
        wanted: dict[str, str] = {}
        for matrix in matrices:
            wanted.setdefault(matrix.module[own:], matrix.inputs)
        found: dict[str, Place] = {}
        for start, (path, goes_in, _) in enumerate(events):
            if goes_in and path in wanted and wanted[path] not in found:
                end = next((i for i, event in enumerate(events) if i > start and event[:2] == (path, False)), None)
                source = None if end is None else _added_to(events[:start], events[end][2], events[end + 1 :])
                found[wanted[path]] = Place(wanted[path], path, *(source or (None, True)))
        return list(found.values())


def _added_to(
    before: Sequence[tuple[str, bool, Tensor]], output: Tensor, behind: Sequence[tuple[str, bool, Tensor]]
) -> tuple[str, bool] | None:
    """Return which of the tensors before an output it is added to, so that the sum is one of those behind it."""
    same, output = max(SAME, torch.finfo(output.dtype).eps), output.float()
    for (path, goes_in, one), (_, _, total) in product(before, behind):
        if one.shape == output.shape == total.shape:
            off, of = (total.float() - output - one.float()).norm(), total.float().norm()
            if off <= same * of and 2 * off < output.norm():  # were `one` the total, it would be off by the output
                return path, goes_in
    return None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
