"""Runs of a model over the portions of a text: through the whole model at once, or through one layer at a time.

The second is for models that are larger than memory. All portions go through a layer before the next one is read, and
backward likewise from the last layer on, each computed anew from its inputs. What hooks see is what they see in a run
through the whole model, by the same kernels and for each module in the same order of the portions: so sums have the same
bits. What is kept meanwhile, in a file, are the hidden states of all portions, for a backward pass those between all layers.
Between two layers there is nothing else, so that a run that was cut can go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.layout import Matrix
from ..base.shards import Shards
from ..errors import CompressionError
from ..foundation.memory import release_memory
from ..foundation.unfinished import UnfinishedRun
from .sharing import Sums
from .stores import Stores

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """What is done with the portions of a text.

    Attributes:
        portions: of the text, the same in every process.
        sums: which hooks add to.
        each: place and portion → runs the model, and where that is asked for backward.
        enter: told the portion before any part of it runs, so that hooks know of it.
        done: called whenever sums that were added to are complete; it puts them into stores.
        name: tells it from other runs, where it may be cut and go on.
        backward: whether `each` does run backward.
        progress: wraps what is gone through, e.g. in a progress bar.
    """

    portions: Sequence[Any]
    sums: Sums
    each: Callable[[int, Any], None]
    enter: Callable[[Any], None] = _nothing
    done: Callable[[], None] = _nothing
    name: str = ""
    backward: bool = False
    progress: Progress = iter


class Passes:
    """Every portion runs through the whole model at once.

    Attributes:
        unit: what progress counts.
        counting: whether what hooks see now is to be summed; a run may see some of it twice.
    """

    unit = "batch"
    counting = True

    def __init__(self, model: nn.Module) -> None:
        """Take a stock model in evaluation mode."""
        self._model = model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self._model.parameters()).device

    def store(self, name: str) -> MutableMapping[str, Tensor]:
        """Return what keeps large statistics, by a name that tells it from others."""
        return {}

    def go(self, run: Run) -> None:
        """Run all portions."""
        for place, portion in run.sums.over(run.portions, run.progress):
            run.enter(portion)
            run.each(place, portion)
        run.done()


class LayerPasses(Passes):
    """All portions go through one layer before the next one is read. For one process, on the CPU."""

    unit = "step"

    def __init__(
        self, model: nn.Module, shards: Shards, prefix: str, matrices: Sequence[Matrix], scratch: Path | None
    ) -> None:
        """Take a stock model without weights.

        Args:
            model: in evaluation mode, its parameters on the meta device.
            shards: which have them.
            prefix: of parameters of the base model.
            matrices: of the model, by which its layers are found.
            scratch: folder on whose disk lies what does not stay in memory; by default that of temporary files.

        Raises:
            CompressionError: the model's layers cannot be told apart.
        """
        super().__init__(model)
        self._shards, self._stores = shards, Stores(scratch)
        base: Any = model.base_model
        names = layer_names(base, matrices)
        depth = getattr(model.config, "num_hidden_layers", len(names))
        if not names or depth != len(names):  # layers may share weights
            raise _not_by_layers(model)
        self._layers: list[nn.Module] = [base.get_submodule(name) for name in names]
        every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.of_layers = [[name for name in every if name.startswith(f"{prefix}{layer}.")] for layer in names]
        known = {name for own in self.of_layers for name in own}
        self.outside = [name for name in every if name not in known]
        self._template: Any = None

    @property
    def device(self) -> torch.device:
        """See the base class."""
        return torch.device("cpu")

    def keep_in(self, run: UnfinishedRun) -> None:
        """Save progress after every step, and resume from what an interrupted run has saved."""
        self._stores.keep_in(run)

    def store(self, name: str) -> MutableMapping[str, Tensor]:
        """See the base class."""
        return self._stores.open(name)

    def go(self, run: Run) -> None:
        """See the base class.

        Raises:
            CompressionError: the model computes something between its layers.
        """
        begun, numbers = self._stores.reached(run.name)
        run.sums.numbers.update(numbers)
        states = f"{run.name}_states"
        text = _Text(run, self._stores.open(states))
        forwards = [partial(self._forward, text, i) for i in range(len(self._layers))]
        backwards = [partial(self._backward, text, i) for i in range(len(self._layers))]
        steps: list[Callable[[], None]] = [lambda: self._record(text), *forwards, lambda: self._end(text)]
        if run.backward:
            steps += [*reversed(backwards), lambda: self._begin(text)]
        if 0 < begun < len(steps):
            self._record(text)  # what layers are called with is not kept
        for number, step in enumerate(run.progress(steps) if run.portions else (), start=1):
            if number > begun:
                step()
                run.done()
                self._stores.done(run.name, number, run.sums.numbers)
                release_memory()
        self._stores.close(states)

    def _record(self, text: _Text) -> None:
        """Find out what every layer is called with, and the hidden states before the first one."""
        self.counting = False
        try:
            with self._present(self.outside):
                for place in range(len(text.run.portions)):
                    hidden, calls = self._calls(text, place, self._layers)
                    text.states.setdefault((0, place), hidden)
                    text.calls.append(calls)
        finally:
            self.counting = True

    def _calls(self, text: _Text, place: int, layers: Sequence[nn.Module]) -> tuple[Tensor, list[Call]]:
        """Return the hidden states before the first of some layers, and how a portion's run calls these; it ends there.

        Layers give what they were given: were there anything between two of them, the second would be given something else.
        """
        first: Tensor | None = None
        calls: list[Call] = []

        def called(index: int, hidden: Tensor, *others: Any, **options: Any) -> Any:
            nonlocal first
            first = hidden if first is None else first
            call = Call.of(others, options)
            if index != len(calls) or hidden is not first or call.takes_gradient:
                raise _not_by_layers(self._model)
            calls.append(call)
            if index + 1 == len(layers):
                raise Reached
            return self._like(hidden, call)

        with forwards_replaced(layers, called):
            try:
                text.each(place)
            except Reached:
                assert first is not None
                return first, calls
        raise _not_by_layers(self._model)

    def _like(self, hidden: Tensor, call: Call) -> Any:
        """Return hidden states in the form in which layers give them, which is tried once."""
        if self._template is None:
            own: Any = type(self._layers[0]).forward
            counting, self.counting = self.counting, False
            try:
                with self._present(self.of_layers[0]), torch.no_grad():
                    self._template = own(self._layers[0], hidden, *call.others, **call.options)
            finally:
                self.counting = counting
        return (hidden, *[None] * (len(self._template) - 1)) if isinstance(self._template, tuple) else hidden

    def _forward(self, text: _Text, index: int) -> None:
        with self._present(self.of_layers[index]):
            for place, portion in enumerate(text.run.portions):
                text.run.enter(portion)
                hidden = text.states[index, place]
                if text.run.backward:  # the graph is dropped, but the kernels are those of a run with one
                    hidden.requires_grad_()
                else:
                    del text.states[index, place]
                text.states[index + 1, place] = text.calls[place][index].run(self._layers[index], hidden)

    def _end(self, text: _Text) -> None:
        """Run what comes before and behind the layers; all that hooks see there counts now."""
        depth = len(self._layers)
        with self._present(self.outside):
            for place, portion in enumerate(text.run.portions):
                text.run.enter(portion)
                hidden = text.states.pop((depth, place)).requires_grad_(text.run.backward)
                given = self._like(hidden, text.calls[place][0])
                with forwards_replaced(self._layers, lambda *args, given=given, **options: given):
                    text.each(place)
                if text.run.backward:
                    text.states[depth, place] = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad

    def _backward(self, text: _Text, index: int) -> None:
        with self._present(self.of_layers[index]):
            for place, portion in enumerate(text.run.portions):
                text.run.enter(portion)
                hidden = text.states[index, place].requires_grad_()
                gradient = text.states.pop((index + 1, place))
                text.calls[place][index].run(self._layers[index], hidden).backward(gradient)
                assert hidden.grad is not None
                text.states[index, place] = hidden.grad

    def _begin(self, text: _Text) -> None:
        """Go back from the first layer's inputs into the embeddings."""
        with self._present(self.outside):
            for place, portion in enumerate(text.run.portions):
                text.run.enter(portion)
                hidden, _ = self._calls(text, place, self._layers[:1])
                if hidden.requires_grad:
                    hidden.backward(text.states[0, place])

    @contextmanager
    def _present(self, names: Sequence[str]) -> Iterator[None]:
        """Read parameters for the while; tied ones once."""
        read: dict[Any, nn.Parameter] = {}
        absent: list[tuple[nn.Module, str, Any]] = []
        try:
            for name in names:
                place = self._shards.places[name]
                if place not in read:
                    read[place] = nn.Parameter(self._shards[name], requires_grad=False)
                path, _, leaf = name.rpartition(".")
                module = self._model.get_submodule(path)
                absent.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = read[place]
            yield
        finally:
            for module, leaf, parameter in reversed(absent):
                module._parameters[leaf] = parameter


@dataclass(frozen=True)
class Call:
    """What a layer was called with beside hidden states.

    Attributes:
        others: arguments by position.
        options: by name.
    """

    others: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, others: tuple[Any, ...], options: dict[str, Any]) -> Call:
        """Return a call without a cache of keys and values, which would keep those of all layers."""
        from transformers.cache_utils import Cache

        kept = {name: None if isinstance(value, Cache) else value for name, value in options.items()}
        return cls(tuple(None if isinstance(value, Cache) else value for value in others), kept)

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states that a layer, called like this with some, gives."""
        return hidden_of(layer(hidden, *self.others, **self.options))

    @property
    def takes_gradient(self) -> bool:
        """Whether gradients flow into more than the hidden states."""
        given = (*self.others, *self.options.values())
        return any(isinstance(value, Tensor) and value.requires_grad for value in given)


class _Text:
    """A text on its way through the layers.

    Attributes:
        run: what is done with its portions.
        calls: of each portion, what its layers are called with.
        states: layer and place of a portion → the hidden states that go in, where the run has come forward; and where it has
            come back to, the gradients at them. What comes out of the last layer goes into one more.
    """

    def __init__(self, run: Run, states: MutableMapping[Any, Tensor]) -> None:
        self.run, self.states = run, states
        self.calls: list[list[Call]] = []

    def each(self, place: int) -> None:
        """Run a portion through the model."""
        self.run.each(place, self.run.portions[place])


class Reached(Exception):  # noqa: N818 - no error
    """A run has come as far as it should."""


def hidden_of(output: Any) -> Any:
    """Return the hidden states among what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def removed(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwards_replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward(index, *args, **options)` stand for the forward passes of layers, or of other modules."""
    kept = [vars(layer).get("forward") for layer in layers]  # libraries that move weights put their own there
    for index, layer in enumerate(layers):
        layer.forward = lambda *args, index=index, **options: forward(index, *args, **options)
    try:
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            if own is None:
                del layer.forward  # that of its class is there again
            else:
                layer.forward = own


def layer_names(base: nn.Module, matrices: Sequence[Matrix]) -> list[str]:
    """Return the modules of a base model that are its layers, in order; none where names do not tell them."""
    found: dict[int, str] = {}
    for matrix in matrices:
        if matrix.layer is None or not matrix.in_base:
            continue
        parts = matrix.module.split(".")
        ends = [i for i, part in enumerate(parts) if part == str(matrix.layer)]
        if not ends:
            return []
        name = ".".join(parts[: ends[0] + 1])
        if found.setdefault(matrix.layer, name) != name:
            return []
    if sorted(found) != list(range(len(found))):
        return []
    return [found[i] for i in range(len(found))]


def _not_by_layers(model: nn.Module) -> CompressionError:
    return CompressionError(
        f"{type(model).__name__} cannot be run layer by layer, which max_memory (--max-memory) needs: its layers share "
        "weights, or something is computed between them. Leave it out, or pass calibration=None with a recipe that allows it."
    )
