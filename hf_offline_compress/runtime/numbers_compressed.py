"""Parameters kept as integers of few bits, with a scale and a zero for each group of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packing_compressed import packed_length, round_min_max, unpack
from .seen_compressed import SeenSources, precision_of, versions_of


def pack_numbers(tensor: Tensor, bits: int, sharing: int) -> dict[str, Tensor]:
    """Return codes, scales and zeros of a tensor, rounded to 2ᵇ evenly spaced values for every `sharing` numbers.

    Those that share a scale are neighbours along the first dimensions: rows of one latent dimension, say, which are of
    one size.
    """
    codes, scales, zeros = round_min_max(in_order(tensor)[None], bits, sharing)
    return {"codes": codes[0], "scales": scales[0], "zeros": zeros[0]}


def unpack_numbers(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, sharing: int, shape: tuple[int, ...]
) -> Tensor:
    """Return the tensor that `pack_numbers` was given, rounded, in the dtype of the scales."""
    count = math.prod(shape)
    parts = F.pad(unpack(codes, bits, count), (0, -count % sharing)).unflatten(0, (-1, sharing))
    halves = 2 * parts - unpack(zeros, bits + 1, len(scales))[:, None]
    numbers = (halves.to(scales.dtype) * (scales / 2)[:, None]).flatten()[:count]
    return numbers.view(shape[-1], *shape[:-1]).movedim(0, -1)


@contextmanager
def _in_precision(device_type: str, precision: tuple[bool, torch.dtype | None]) -> Iterator[None]:
    """Compute as autocast did at another time, without its memory of casts, in which some may lack their gradients."""
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    enabled, dtype = precision
    with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def in_order(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers in the order in which they are packed, [count]."""
    return tensor.movedim(-1, 0).flatten()


CHANGED = (
    "Parameters of a compressed layer were changed or exchanged between its forward and its backward pass, so there are no "
    "gradients; take them first, or call train() on the model before the forward pass."
)


class _Kept(torch.autograd.Function):
    """A tensor that was made from others and kept: used as it is, and made anew where a gradient is really taken."""

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        make: Callable[[], Tensor],
        forget: Callable[[], None],
        read: Callable[[], Sequence[Tensor]],
        *wanted: Tensor,
    ) -> Tensor:
        """Return what was kept."""
        ctx.make, ctx.forget, ctx.read, ctx.wanted = make, forget, read, wanted
        ctx.versions = versions_of(read())
        ctx.precision = precision_of(kept.device.type)
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of the parameters, of which the tensor is made anew.

        Raises:
            RuntimeError: they are not what they were in the forward pass.
        """
        sources = ctx.read()
        if versions_of(sources) != ctx.versions or not {*map(id, ctx.wanted)} <= {*map(id, sources)}:
            raise RuntimeError(CHANGED)
        ctx.forget()  # a step of training may follow, which a compiled graph would not notice
        with torch.enable_grad(), _in_precision(gradients[0].device.type, ctx.precision):
            made = ctx.make()
        found = torch.autograd.grad(
            made, ctx.wanted, gradients[0], create_graph=torch.is_grad_enabled(), allow_unused=True
        )
        return None, None, None, None, *found


class _Straight(torch.autograd.Function):
    """A product that is computed in one way, whose gradients are those of another."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        apply: Callable[[Tensor], Tensor],
        exact: Callable[[Tensor], Tensor],
        read: Callable[[], Sequence[Tensor]],
        *wanted: Tensor,
    ) -> Tensor:
        """Return the product, [..., columns] → [..., rows]."""
        ctx.save_for_backward(x)
        ctx.exact, ctx.read, ctx.wanted, ctx.versions = exact, read, wanted, versions_of(read())
        return apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of inputs and parameters that the exact product has.

        Raises:
            RuntimeError: the parameters are not what they were in the forward pass.
        """
        if versions_of(ctx.read()) != ctx.versions:
            raise RuntimeError(CHANGED)
        (x,) = ctx.saved_tensors
        of_inputs = ctx.needs_input_grad[0]
        with torch.enable_grad():
            own = x.detach().requires_grad_(of_inputs)
            made = ctx.exact(own)
        found = torch.autograd.grad(
            made, [own, *ctx.wanted] if of_inputs else ctx.wanted, gradients[0], allow_unused=True
        )
        of_x = found[:1] if of_inputs else (None,)
        return *of_x, None, None, None, *found[len(found) - len(ctx.wanted) :]


def with_gradients_of(
    exact: Callable[[Tensor], Tensor],
    x: Tensor,
    apply: Callable[[Tensor], Tensor],
    read: Callable[[], Sequence[Tensor]],
) -> Tensor:
    """Return `apply(x)`, [..., columns] → [..., rows], with the gradients of `exact(x)` where any are on and asked for.

    Args:
        exact: the product that is differentiated, in the backward pass.
        x: inputs [..., columns].
        apply: the product that is computed.
        read: returns the tensors that `exact` reads.
    """
    wanted = [source for source in read() if source.requires_grad] if torch.is_grad_enabled() else []
    if not wanted and not takes_gradient([x]):
        return apply(x)
    product: Tensor = _Straight.apply(x, apply, exact, read, *wanted)
    return product


def make_kept(make: Callable[[], Any], device_type: str) -> Any:
    """Return what `make` returns, without gradients, and without casts that autocast would use again where they are on."""
    with torch.no_grad(), _in_precision(device_type, precision_of(device_type)):
        return make()


def with_gradient(
    kept: Tensor, make: Callable[[], Tensor], forget: Callable[[], None], read: Callable[[], Sequence[Tensor]]
) -> Tensor:
    """Return a kept tensor so that gradients reach the parameters that it was made from, if any are on and asked for.

    Args:
        kept: what `make` returned without gradients, [...].
        make: makes it anew.
        forget: drops it; called when a gradient is taken.
        read: returns the tensors that `make` reads.
    """
    wanted = [source for source in read() if source.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        return kept
    made: Tensor = _Kept.apply(kept, make, forget, read, *wanted)
    return made


def takes_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether what is computed from tensors now may be asked for a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_stuck(kept: Any) -> bool:
    """Whether a tensor that was kept in inference mode cannot be used any more, since gradients are on."""
    return torch.is_grad_enabled() and isinstance(kept, Tensor) and kept.is_inference()


def may_keep(module: nn.Module, sources: Sequence[Tensor]) -> bool:
    """Whether what is made of a module's tensors may be kept for the next use.

    Not under offloading hooks, where tensors come and go between calls; not in replicas of `nn.DataParallel`, which last
    for one call; not where the next step of training will change it; and not where other tensors stand in for parameters,
    as in `torch.func`, since they are gone when gradients are taken.
    """
    if "_hf_hook" in module.__dict__ or "_is_replica" in module.__dict__ or any(source.is_meta for source in sources):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    if not takes_gradient(sources):
        return True
    own = all(isinstance(source, nn.Parameter) for source in sources if source.requires_grad)
    return own and not module.training and not torch.compiler.is_compiling()


class PackedNumbers(nn.Module):
    """A module some of whose parameters may be packed: they are read by their names as ever, and cannot be trained.

    Attributes:
        keep: keep unpacked parameters for the next use. Like decoded weights they are a cache: not copied, not saved,
            not used in training, and made anew when what they are made from has changed.
    """

    keep = False

    def pack(self, bits: Mapping[str, int], sharing: int) -> None:
        """Make packed tensors, still empty, in the place of parameters, of submodules too, by their names."""
        parameters = dict(self.named_parameters())
        for name, width in bits.items():
            if name not in parameters:
                raise ValueError(f"A {type(self).__name__} has no '{name[:80]}' that could be kept as integers.")
            path, _, leaf = name.rpartition(".")
            part: Any = self.get_submodule(path)
            part._pack_one(leaf, width, min(sharing, parameters[name].numel()))

    def _pack_one(self, name: str, bits: int, sharing: int) -> None:
        parameter = self._parameters.pop(name)
        assert parameter is not None
        groups = -(-parameter.numel() // sharing)
        codes, zeros = packed_length(parameter.numel(), bits), packed_length(groups, bits + 1)
        self.register_buffer(f"{name}_codes", torch.empty(codes, dtype=torch.uint8))
        self.register_parameter(f"{name}_scales", nn.Parameter(torch.empty(groups)))
        self.register_buffer(f"{name}_zeros", torch.empty(zeros, dtype=torch.uint8))
        self.__dict__.setdefault("_packed", {})[name] = (bits, sharing, tuple(parameter.shape))
        self.__dict__["_unpacked"] = {}

    def __getattr__(self, name: str) -> Any:
        """Return a packed parameter as it would be."""
        if name in self.__dict__.get("_packed", ()):
            return self._numbers(name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**self.__dict__, "_unpacked": {}} if self.packed else super().__getstate__()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Forget the cache when the module changes dtype or device."""
        self.forget()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Forget the cache on the way into training, and out of it: weights may have been exchanged in between."""
        if mode or self.training:
            self.forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Forget the cache when other numbers are loaded."""
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def packed(self) -> tuple[str, ...]:
        """The names of the parameters that are packed."""
        return tuple(self.__dict__.get("_packed", ()))

    def forget(self) -> None:
        """Drop what was kept."""
        if self.packed:
            self.__dict__["_unpacked"] = {}

    def fill_packed(self, std: float) -> None:
        """Fill packed tensors with something, for a model that is made from a config alone."""
        for part in self.modules():
            for name in part.packed if isinstance(part, PackedNumbers) else ():
                bits, _, _ = part.__dict__["_packed"][name]
                nn.init.constant_(part.get_buffer(f"{name}_codes"), 0b11100100)
                nn.init.constant_(part.get_parameter(f"{name}_scales"), std / 2**bits)
                nn.init.constant_(part.get_buffer(f"{name}_zeros"), 0)

    def _numbers(self, name: str) -> Tensor:
        bits, sharing, shape = self.__dict__["_packed"][name]
        # By attribute: replicas of `nn.DataParallel` have no parameters, but tensors by their names.
        codes, scales, zeros = sources = tuple(getattr(self, f"{name}_{part}") for part in ("codes", "scales", "zeros"))

        if scales.is_meta:  # parameters alone are, where a model is made empty
            codes, zeros = codes.to("meta"), zeros.to("meta")

        def make() -> Tensor:
            return unpack_numbers(codes, scales, zeros, bits, sharing, shape)

        kept = self.__dict__["_unpacked"]
        if not self.keep or not may_keep(self, sources):
            if "_is_replica" not in self.__dict__:  # a replica has the original's dictionary
                kept.pop(name, None)
            return make()
        if torch.compiler.is_compiling():
            return kept[name][1] if name in kept else make()
        if name not in kept or not kept[name][0].unchanged(sources) or is_stuck(kept[name][1]):
            kept[name] = (SeenSources(sources), make_kept(make, codes.device.type))
        return with_gradient(kept[name][1], make, self.forget, lambda: sources)


class PackableLinear(PackedNumbers, nn.Linear):
    """A linear layer whose weight and bias may be packed."""
