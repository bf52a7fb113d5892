"""A compressed weight: what all structures have in common.

A weight is always [rows, columns]: rows are outputs, or tokens. What several layers share is a decoder, a module of its own;
layers that share one hold it *unregistered* and only ever call it, so that it is stored once, and so that offloading
hooks see every use.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .executing_compressed import Execution, execution_of
from .numbers_compressed import PackedNumbers, is_stuck, make_kept, may_keep, takes_gradient
from .seen_compressed import SeenSources
from .specs_compressed import WeightSpec

# Numbers decoded and applied at once if a weight is not kept: a whole layer, or a block of a vocabulary.
DECODED_AT_ONCE = 2**22


class WeightDecoder(PackedNumbers):
    """What turns latents into rows of a weight; one for a weight, or one that several share."""

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Remember the dtype that the group is stored in; make empty tensors, for rows of `columns` entries."""
        super().__init__()
        self.storage = spec.storage

    @classmethod
    def make(cls, spec: WeightSpec, columns: int) -> "WeightDecoder":
        """Return an empty decoder of a group, for rows of `columns` entries, its numbers packed if the group's are."""
        decoder = cls(spec, columns)
        if spec.integers is not None:
            decoder.pack(spec.integers.decoder, spec.integers.sharing)
        return decoder

    def factors(self) -> dict[str, Tensor]:
        """Return the tensors that are kept in the group's storage."""
        return dict(self.named_parameters())

    def reset_parameters(self, std: float) -> None:
        """Fill with random values, for a model that is made from a config alone."""


def nothing_to_fill(rows: int, columns: int) -> Tensor:
    """Return what a stock class finds in place of a decoded weight: an empty tensor, marked as initialised."""
    tensor = torch.empty(rows, columns, device="meta")
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


class CompressedWeight(PackedNumbers):
    """A compressed weight [rows, columns]. What a structure must provide.

    Attributes:
        decoding: how the weight is held, one of `DECODINGS`; of no effect where a structure is applied without decoding.
        asked: whether the caller asked for it, rather than the folder.
    """

    # Made as decoder_class.make(spec, columns); None where a structure has nothing to share.
    decoder_class: Any = None

    def __init__(
        self,
        rows: int,
        columns: int,
        spec: WeightSpec,
        decoder: nn.Module | None = None,
        bias: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        """Make an empty weight.

        Args:
            rows: outputs, or tokens.
            columns: inputs, or width.
            spec: what the config's `compression` says of it.
            decoder: the shared decoder; by default the weight has one of its own.
            bias: whether a linear layer adds a bias.
            padding_idx: of an embedding, the row that gets no gradient.

        Raises:
            ValueError: the group's sizes do not fit the weight's.
        """
        super().__init__()
        spec.check_fits(rows, columns)
        self.rows, self.columns, self.padding_idx = rows, columns, padding_idx
        self.storage, self.decoding, self.asked = spec.storage, "cached", True
        self.make_tensors(spec)
        if spec.integers is not None:
            self.pack(spec.integers.own, spec.integers.sharing)
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.decoder: nn.Module | None = None
        if decoder is not None:
            self.__dict__["_shared_decoder"] = decoder  # unregistered: the base model owns it
        elif self.decoder_class is not None:
            self.decoder = self.decoder_class.make(spec, columns)

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make the tensors of its own, still empty: numbers as parameters, packed integers as buffers."""
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the decoder, own or shared."""
        decoder: Any = self.__dict__.get("_shared_decoder") or self.decoder
        decoded: Tensor = decoder(*args, **kwargs)
        return decoded

    def dense_weight(self) -> Tensor:
        """Return the weight [rows, columns] that this module stands for."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Return x · Ŵᵀ, [..., columns] → [..., rows]."""
        raise NotImplementedError

    def lookup(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ, [...] → [..., columns]."""
        raise NotImplementedError

    def factors(self) -> dict[str, Tensor]:
        """Return the numbers of its own that are kept in the group's storage: all but a layer's bias."""
        return {name: tensor for name, tensor in self.named_parameters(recurse=False) if name != "bias"}

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that looks at a layer's shape, dtype or device. Not a parameter."""
        return nothing_to_fill(self.rows, self.columns) if "initializing" in self.__dict__ else self.dense_weight()

    def reset_parameters(self, std: float) -> None:
        """Fill with random values, for a model that is made from a config alone."""
        for tensor in self.factors().values():
            nn.init.normal_(tensor, std=1.0 / max(1, tensor.shape[-1]) ** 0.5)
        for buffer in self.buffers(recurse=False):
            nn.init.zeros_(buffer)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def resize(self, rows: int) -> None:
        """Change the number of rows.

        Raises:
            NotImplementedError: the structure has no tensors that belong to single rows.
        """
        raise NotImplementedError(
            f"The vocabulary of a model whose embedding is kept as {type(self).__name__} cannot be resized; resize the "
            "base model, then compress it."
        )

    def _resize_tensors(self, rows: int) -> None:
        """Change the number of rows of all tensors, which have one for each of the weight's; new ones are the old's mean."""
        if self.packed:
            raise NotImplementedError(
                "The vocabulary of a model whose embedding's factors are packed integers cannot be resized; resize the base "
                "model, then compress it."
            )
        for name, old in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            new = old.data.new_empty((rows, *old.shape[1:]))
            kept = min(rows, old.shape[0])
            new[:kept] = old.data[:kept]
            new[kept:] = old.data.float().mean(dim=0).to(old.dtype)
            if isinstance(old, nn.Parameter):
                setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
            else:
                setattr(self, name, new)
        self.rows = rows
        if self.padding_idx is not None and self.padding_idx >= rows:
            self.padding_idx = None


class DecodedBudget:
    """The bytes that a model's decoded weights may take together, in order of first use."""

    def __init__(self, max_bytes: int) -> None:
        """Begin with nothing kept."""
        self.max_bytes = max_bytes
        self._kept: list[weakref.ref[Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Exclude what is kept from copies, like decoded weights."""
        return {"max_bytes": self.max_bytes, "_kept": []}

    def left(self) -> int:
        """Return the bytes that may still be taken; weights that were dropped do not count any more."""
        kept = [weight for ref in self._kept if (weight := ref()) is not None]
        self._kept = [weakref.ref(weight) for weight in kept]
        return self.max_bytes - sum(weight.untyped_storage().nbytes() for weight in kept)

    def admit(self, weight: Tensor) -> bool:
        """Whether a decoded weight may be kept; if so, it counts as long as it is there."""
        fits = weight.untyped_storage().nbytes() <= self.left()
        if fits:
            self._kept.append(weakref.ref(weight))
        return fits


def set_decoding(
    modules: Iterable[CompressedWeight], decoding: str, max_bytes: int | None = None, asked: bool = True
) -> None:
    """Choose how the weights of a model are held, and how many bytes of them decoded; see the model's method.

    Args:
        modules: the model's.
        decoding: its name.
        max_bytes: the bound, if there is one.
        asked: whether somebody asks for it now. What a folder says is not insisted on: see `execution_of`.
    """
    budget = None if max_bytes is None else DecodedBudget(max_bytes)
    for module in modules:
        module.decoding, module.asked = decoding, asked
        # Of a weight that is decoded and kept, its factors need not be.
        decoded = isinstance(module, DecodedWeight)
        for part in (module, module.__dict__.get("_shared_decoder") or module.decoder):
            if isinstance(part, PackedNumbers):
                part.keep = decoding != "on_the_fly" and budget is None and not decoded
                part.forget()
        if isinstance(module, DecodedWeight):
            module.budget = budget
            module.forget()


class DecodedWeight(CompressedWeight):
    """A weight that has to be decoded before it is applied: once, or on every use.

    The decoded weight is a cache: it is no buffer, it is not copied or saved, it is not used in training, and it is made
    anew when a parameter has changed. In evaluation with gradients on it is used, and decoded anew only if a gradient is
    really taken.

    Attributes:
        budget: bytes that all decoded weights of the model may take, if they are bounded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make an empty weight; see the base class."""
        super().__init__(*args, **kwargs)
        self.budget: DecodedBudget | None = None
        self._cache: tuple[SeenSources, Any, Execution, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**super().__getstate__(), "_cache": None}

    def forget(self) -> None:
        """Drop the decoded weight."""
        super().forget()
        self._cache = None

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ by their indices, [...] → [..., columns], decoding little else."""
        return self.dense_weight()[ids]

    def row_block(self, start: int, stop: int) -> Tensor:
        """Return rows of Ŵ from `start` to before `stop`, [stop − start, columns], decoding little else."""
        device = next(tensor for tensor in self.sources() if tensor.is_floating_point()).device
        return self.some_rows(torch.arange(start, stop, device=device))

    def project(self, x: Tensor) -> Tensor:
        """Return x Ŵᵀ; see the base class.

        A large weight that is not kept, as of a tied head, is decoded and applied in blocks of its rows.
        """
        if (kept := self._kept(x)) is not None:
            held, execution = kept
            return execution.apply(held, x, self)
        # The whole weight is needed for gradients.
        if takes_gradient([x, *self.sources()]):
            return F.linear(x, self.dense_weight(), self.bias)
        out: Tensor | None = None
        for start, block in self.row_blocks():
            stop = start + len(block)
            part = F.linear(x, block, None if self.bias is None else self.bias[start:stop])
            if len(block) == self.rows:
                return part
            if out is None:
                out = part.new_empty(*part.shape[:-1], self.rows)
            out[..., start:stop] = part
        assert out is not None
        return out

    def lookup(self, ids: Tensor) -> Tensor:
        """Decode the rows asked for, or look them up in the cache; see the base class."""
        if (kept := self._kept(None)) is not None:
            held, execution = kept
            return execution.look_up(held, ids, self)
        return self.some_rows(ids) if ids.numel() <= self.rows else F.embedding(ids, self.dense_weight())

    def row_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Return blocks of rows of Ŵ [some, columns], one after the other, and where each begins."""
        step = max(1, DECODED_AT_ONCE // self.columns)
        if self.rows <= step or type(self).some_rows is DecodedWeight.some_rows:
            yield 0, self.dense_weight()
            return
        for start in range(0, self.rows, step):
            yield start, self.row_block(start, min(start + step, self.rows))

    def sources(self) -> list[Tensor]:
        """Return the tensors that the weight is made from; this must be quick: no walk over submodules."""
        named = {**self._parameters, **self._buffers}
        if "_former_parameters" in self.__dict__:  # a replica of `nn.DataParallel` has no parameters
            named |= self.__dict__["_former_parameters"]
        own = [tensor for name, tensor in named.items() if tensor is not None and name != "bias"]
        decoder = self.__dict__.get("_shared_decoder") or self.decoder
        return own if decoder is None else [*own, *decoder.parameters(), *decoder.buffers()]

    def _kept(self, x: Tensor | None) -> tuple[Any, Execution] | None:
        """Return what is kept of the weight, and how it is applied, or None where nothing must be kept.

        Without inputs `x`, rows are to be looked up.
        """
        if self.decoding == "on_the_fly":
            self._cache = None
            return None
        compiling = torch.compiler.is_compiling()
        cache = self._cache
        if cache is not None and not compiling and self._is_fresh(cache, x):
            return cache[1], cache[2]
        own = self.sources()
        if compiling and cache is None:
            return None
        execution = cache[2] if compiling and cache else execution_of(self.decoding, own[0].device.type, self.asked)
        sources = execution.sources(own, self)
        if not may_keep(self, sources) or (compiling and not execution.compiles(x)):
            self._cache = None  # a step of training may follow, which a compiled graph would not notice
            return None
        if not execution.keeps_for(x):
            return None
        if compiling and cache:
            return cache[1], execution
        if cache is None or cache[2] is not execution or not cache[0].unchanged(sources) or is_stuck(cache[1]):
            self._cache = None
            # A small budget goes to layers that need their whole weight.
            size = execution.bytes(self.rows, self.columns, own[0].dtype)
            if self.budget is not None and (x is None or size > self.budget.left()):
                return None
            held = make_kept(lambda: execution.prepare(self, x), own[0].device.type)
            if self.budget is not None and not self.budget.admit(held):
                return held, execution
            decoder = self.__dict__.get("_shared_decoder") or self.decoder
            modules = [self, *(() if decoder is None else decoder.modules())]
            self._cache = cache = (SeenSources(sources, modules), held, execution, self.decoding)
        return cache[1], execution

    def _is_fresh(self, cache: Any, x: Tensor | None) -> bool:
        """Whether what is kept may be used as it is, by a quick check; if not, everything is checked."""
        seen, _, execution, decoding = cache
        if "_hf_hook" in self.__dict__ or "_is_replica" in self.__dict__ or decoding != self.decoding:
            return False
        return (x is not None or execution.keeps_for(None)) and seen.untouched()


def seen_sources(model: nn.Module) -> list[SeenSources]:
    """Return what all kept weights of a model were made from."""
    caches = [module._cache for module in model.modules() if isinstance(module, DecodedWeight)]
    return [cache[0] for cache in caches if cache is not None]
