"""A weight that is kept as something smaller: what every structure has in common.

A weight is always [rows, columns]: rows are outputs, or tokens. What several layers share is a decoder, a module of its own;
layers that share one hold it *unregistered* and only ever call it, so that it is stored once, and so that offloading
hooks see every use.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightDecoder(nn.Module):
    """What turns latents into rows of a weight; one for a weight, or one that several share."""

    def __init__(self, group: dict[str, Any]) -> None:
        """Remember the dtype that the group is stored in."""
        super().__init__()
        self.storage = group["storage"]

    def factors(self) -> dict[str, Tensor]:
        """Return the tensors that are kept in the group's storage."""
        return dict(self.named_parameters())

    def reset_parameters(self, std: float) -> None:
        """Fill with random values, for a model that is made from a config alone."""


class CompressedWeight(nn.Module):
    """A weight [rows, columns] that is kept as something smaller. What a structure must provide.

    Attributes:
        decoding: "cached" or "on_the_fly"; of no effect where a structure is applied without decoding.
    """

    # Made as decoder_class(group, columns); None where a structure has nothing to share.
    decoder_class: Any = None

    def __init__(
        self,
        rows: int,
        columns: int,
        group: dict[str, Any],
        decoder: nn.Module | None = None,
        bias: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        """Make an empty weight.

        Args:
            rows: outputs, or tokens.
            columns: inputs, or width.
            group: the group's entry in the config's `compression`.
            decoder: the shared decoder; by default the weight has one of its own.
            bias: whether a linear layer adds a bias.
            padding_idx: of an embedding, the row that gets no gradient.
        """
        super().__init__()
        self.rows, self.columns, self.padding_idx = rows, columns, padding_idx
        self.storage, self.decoding = group["storage"], "cached"
        self.make_tensors(group)
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.decoder: nn.Module | None = None
        if decoder is not None:
            self.__dict__["_shared_decoder"] = decoder  # unregistered: the base model owns it
        elif self.decoder_class is not None:
            self.decoder = self.decoder_class(group, columns)

    def make_tensors(self, group: dict[str, Any]) -> None:
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
        return self.dense_weight()

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


class DecodedWeight(CompressedWeight):
    """A weight that has to be decoded before it is applied: once, or on every use.

    The decoded weight is a cache: it is no buffer, it is not copied or saved, it is not used while gradients are on, and
    it is made anew when a parameter has changed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make an empty weight; see the base class."""
        super().__init__(*args, **kwargs)
        self._cache: tuple[Any, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**super().__getstate__(), "_cache": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "DecodedWeight":
        """Forget the cache when the module changes dtype or device."""
        self._cache = None
        return super()._apply(*args, **kwargs)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ by their indices, [...] → [..., columns], decoding little else."""
        return self.dense_weight()[ids]

    def project(self, x: Tensor) -> Tensor:
        """Return x Ŵᵀ; see the base class."""
        cached = self._cached()
        return F.linear(x, self.dense_weight() if cached is None else cached, self.bias)

    def lookup(self, ids: Tensor) -> Tensor:
        """Decode the rows asked for, or look them up in the cache; see the base class."""
        cached = self._cached()
        return self.some_rows(ids) if cached is None else F.embedding(ids, cached)

    def _cached(self) -> Tensor | None:
        """Return the decoded weight, or None where it must not be kept."""
        # Under offloading hooks, parameters come and go between calls.
        if self.decoding != "cached" or torch.is_grad_enabled() or hasattr(self, "_hf_hook"):
            self._cache = None  # a step of training may follow, which a compiled graph would not notice
            return None
        if torch.compiler.is_compiling():
            return self._cache[1] if self._cache else None
        shared = self.__dict__.get("_shared_decoder")
        tensors = [*self.parameters(), *self.buffers(), *(shared.parameters() if shared is not None else ())]
        if any(tensor.device.type == "meta" for tensor in tensors):
            return None
        # In-place changes raise a tensor's version; replaced tensors have another address.
        versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        key = (versions, torch.is_autocast_enabled(tensors[0].device.type))
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.dense_weight())
        return self._cache[1]
