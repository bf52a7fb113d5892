"""What something was made from, and whether it has changed since."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

# Numbers of a tensor that are looked at again, whether it has changed.
_SAMPLED = 8
# Bytes of a number → integers of as many.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_version = attrgetter("_version")
_held: Callable[[dict[str, Any], str], Any] = dict.get


def versions_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return what changes whenever one of the tensors does: in place, which raises its version, or for another one."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _look(
    holders: Sequence[dict[str, Any]], names: Sequence[str], tensors: Sequence[Tensor], samples: Sequence[Any]
) -> tuple[list[int], list[int], list[int], list[bytes]]:
    """Return which tensors are where they were, their versions and addresses, and numbers of some of them.

    Column by column, in loops in C.
    """
    return (
        list(map(id, map(_held, holders, names))),
        list(map(_version, tensors)),
        list(map(Tensor.data_ptr, tensors)),
        [sample.tobytes() for sample in samples],
    )


class SeenSources:
    """Tensors that something was made from, as they were then.

    Changes through `.data` raise no version, so a few numbers of each float tensor are compared as well: weights that are
    exchanged differ in them. Only on a CPU: looking at numbers on a GPU would wait for all that it still has to do.
    """

    def __init__(self, sources: Sequence[Tensor], modules: Iterable[nn.Module] = ()) -> None:
        """Remember the tensors, and the precision that operations have now.

        Args:
            sources: the tensors.
            modules: those that hold them, if `untouched` is to be asked.
        """
        self._key = self._key_of(sources)
        # Views: what they look at cannot be freed meanwhile, and its address not be given to another tensor. As arrays of
        # bits, which are compared in a tenth of the time that a tensor takes.
        self._samples = [
            source.detach().view(-1)[:: max(1, source.numel() // _SAMPLED)].view(_BITS[source.element_size()]).numpy()
            for source in sources
            if source.device.type == "cpu" and source.is_floating_point() and source.is_contiguous()
        ]
        self._numbers = [sample.tobytes() for sample in self._samples]
        held = {id(source) for source in sources}
        places = [
            (named, name, tensor)
            for module in modules
            for named in (module._parameters, module._buffers)
            for name, tensor in named.items()
            if tensor is not None and id(tensor) in held and not tensor.is_inference()
        ]
        self._quick = len(places) == len(sources) and not self._key[1][0]
        self._device_type = sources[0].device.type
        self._holders: list[dict[str, Any]] = [holder for holder, _, _ in places]
        self._names: list[str] = [name for _, name, _ in places]
        self._tensors: list[Tensor] = [tensor for _, _, tensor in places]
        self._seen: Any = self._look() if self._quick else None
        self.together: SeenTogether | None = None

    def untouched(self) -> bool:
        """Whether nothing can have changed, as far as a quick look tells; if not, `unchanged` tells.

        In a forward pass of a model a look at all of it, when the pass began, stands for looks at each layer.
        """
        if not self._quick or not _may_be_quick(self._device_type):
            return False
        if self.together is not None and self.together is _passes.seen:
            return True
        if self._look() != self._seen:
            return False
        _passes.missed = True
        return True

    def _look(self) -> tuple[list[int], list[int], list[int], list[bytes]]:
        """Return which tensors are where they were, their versions and addresses, and numbers of some of them."""
        return _look(self._holders, self._names, self._tensors, self._samples)

    def unchanged(self, sources: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, with the same numbers as far as was looked."""
        if self._key != self._key_of(sources):
            return False
        traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
        return traced or self._numbers == [sample.tobytes() for sample in self._samples]

    @staticmethod
    def _key_of(sources: Sequence[Tensor]) -> tuple[Any, ...]:
        return versions_of(sources), precision_of(sources[0].device.type)


def precision_of(device_type: str) -> tuple[bool, torch.dtype | None]:
    """Return whether autocast is on, and its dtype."""
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return enabled, torch.get_autocast_dtype(device_type) if enabled else None


def _may_be_quick(device_type: str) -> bool:
    """Whether what was kept may be used without a closer look: without gradients, transforms and casts."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return not torch.is_autocast_enabled(device_type)


class SeenTogether:
    """All that the layers of a model were made from, looked at once in a forward pass.

    A look at each layer costs little by itself. Between large products, though, all that it reads has left the processor's
    cache: in small models looks at each layer took a twentieth of a pass.
    """

    def __init__(self, parts: Sequence[SeenSources]) -> None:
        """Take the sources that were seen, which must be there.

        They refer to this and not the other way round: tensors in a circle would stay in memory after their model.
        """
        parts = [part for part in parts if part._quick]
        self._columns: Any = tuple(
            [entry for part in parts for entry in getattr(part, name)]
            for name in ("_holders", "_names", "_tensors", "_samples")
        )
        self._seen = tuple([entry for part in parts for entry in part._seen[i]] for i in range(4))
        self.device_types = {part._device_type for part in parts}
        for part in parts:
            part.together = self

    def unchanged(self) -> bool:
        """Whether nothing has changed, as far as was looked."""
        return _look(*self._columns) == self._seen


class _Passes(threading.local):
    """The forward pass that a thread is in.

    Attributes:
        running: whether it is in any.
        seen: what was looked at when it began, if nothing had changed.
        missed: whether a layer was looked at by itself since.
    """

    running = False
    seen: SeenTogether | None = None
    missed = False


_passes = _Passes()
# Beside the models, not in them: what was seen is no part of a copy.
_together: "weakref.WeakKeyDictionary[nn.Module, SeenTogether]" = weakref.WeakKeyDictionary()


@contextmanager
def forward_pass(model: nn.Module, parts: Callable[[], Sequence[SeenSources]]) -> Iterator[None]:
    """Look once at all that a model's layers were made from, for the time of a forward pass; within another, do nothing.

    Args:
        model: the model.
        parts: returns what its layers have seen.
    """
    if _passes.running:
        yield
        return
    together = _together.get(model)
    if together is not None and not (all(map(_may_be_quick, together.device_types)) and together.unchanged()):
        _together.pop(model, None)  # it would keep tensors that the model no longer has
        together = None
    try:
        _passes.running, _passes.seen, _passes.missed = True, together, False
        yield
    finally:
        _passes.running, _passes.seen = False, None
    if _passes.missed:  # only now, so that a thread that is interrupted here is no longer in a pass
        _together[model] = SeenTogether(parts())
