"""One module per structure, as a linear layer and as an embedding; each can give its `dense_weight()`.

A weight is always [rows, columns]: rows are outputs, or tokens. What decodes latents into rows is a module of its own;
layers that share one hold it *unregistered* and only ever call it, so that it is stored once, and so that offloading
hooks see every use.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "gelu": F.gelu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


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


class LinearDecoder(WeightDecoder):
    """Rows from latents by one matrix: rows = latents · weightᵀ (+ bias).

    With an identity block, the first `latent` columns of the rows, in the order of `order`, are the latents themselves,
    and `weight` [columns − latent, latent] gives only the others.
    """

    def __init__(self, group: dict[str, Any], columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(group)
        self.latent = group["latent"]
        stored = columns - self.latent if group["identity_block"] else columns
        self.weight = nn.Parameter(torch.empty(stored, self.latent))
        self.bias = nn.Parameter(torch.empty(columns)) if group["decoder_bias"] else None
        self.order: Tensor | None
        self.register_buffer("order", torch.empty(columns, dtype=torch.int16) if group["identity_block"] else None)

    def forward(self, tensor: Tensor, transposed: bool = False) -> Tensor:
        """Return rows [..., columns] of latents [..., latent].

        With `transposed`, return for inputs x [..., columns] the products [..., latent] with the columns of the weight;
        the product with the bias, if there is one, is appended.
        """
        if self.order is not None:
            return self._with_identity(tensor, self.order.long(), transposed)
        if not transposed:
            return F.linear(tensor, self.weight, self.bias)
        products = tensor @ self.weight
        return products if self.bias is None else torch.cat([products, (tensor @ self.bias)[..., None]], dim=-1)

    def _with_identity(self, tensor: Tensor, order: Tensor, transposed: bool) -> Tensor:
        if transposed:
            ordered = tensor.index_select(-1, order)
            return ordered[..., : self.latent] + ordered[..., self.latent :] @ self.weight
        others = F.linear(tensor, self.weight)
        ordered = torch.cat([tensor.to(others.dtype), others], dim=-1)
        return torch.zeros_like(ordered).index_copy(-1, order, ordered)

    def reset_parameters(self, std: float) -> None:
        """Fill with random values, for a model that is made from a config alone."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NonLinearDecoder(WeightDecoder):
    """Rows from latents by a small fully connected network."""

    def __init__(self, group: dict[str, Any], columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(group)
        widths = [group["latent"], *group["hidden"], columns]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.activation = ACTIVATIONS[group["activation"]]
        self.output_activation = ACTIVATIONS[group["output_activation"]]

    def forward(self, latents: Tensor) -> Tensor:
        """Return rows [..., columns] of latents [..., latent]."""
        for layer in self.layers[:-1]:
            latents = self.activation(layer(latents))
        return self.output_activation(self.layers[-1](latents))


class CompressedWeight(nn.Module):
    """A weight [rows, columns] that is kept as something smaller. What a structure must provide.

    Attributes:
        decoding: "cached" or "on_the_fly"; of no effect where a structure is applied without decoding.
    """

    decoder_class: type[Any]

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
        self.latents = nn.Parameter(torch.empty(rows, group["latent"]))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        if decoder is None:
            self.decoder = self.decoder_class(group, columns)
        else:
            self.__dict__["_shared_decoder"] = decoder  # unregistered: the base model owns it

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the decoder, own or shared."""
        return (self.__dict__.get("_shared_decoder") or self.decoder)(*args, **kwargs)

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
        """Return the tensors of its own that are kept in the group's storage: all but a layer's bias."""
        return {name: tensor for name, tensor in self.named_parameters(recurse=False) if name != "bias"}

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that looks at a layer's shape, dtype or device. Not a parameter."""
        return self.dense_weight()

    def reset_parameters(self, std: float) -> None:
        """Fill with random values, for a model that is made from a config alone."""
        nn.init.normal_(self.latents, std=1.0 / max(1, self.latents.shape[1]) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def resize(self, rows: int) -> None:
        """Change the number of rows; latents and norms of new ones are the mean of the old."""
        for name, old in list(self.named_parameters(recurse=False)):
            new = old.data.new_empty((rows, *old.shape[1:]))
            kept = min(rows, old.shape[0])
            new[:kept] = old.data[:kept]
            new[kept:] = old.data.float().mean(dim=0).to(old.dtype)
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))
        self.rows = rows
        if self.padding_idx is not None and self.padding_idx >= rows:
            self.padding_idx = None


class LowRankWeight(CompressedWeight):
    """Ŵ = latents · decoder: applied as two thin products, never decoded."""

    decoder_class = LinearDecoder

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self.decode(self.latents)

    def project(self, x: Tensor) -> Tensor:
        """Return (x Bᵀ) Zᵀ; see the base class."""
        products = self.decode(x, transposed=True)
        rank = self.latents.shape[1]
        out = F.linear(products[..., :rank], self.latents, self.bias)
        return out + products[..., rank:] if products.shape[-1] > rank else out

    def lookup(self, ids: Tensor) -> Tensor:
        """Decode the rows asked for; see the base class."""
        return self.decode(F.embedding(ids, self.latents, self.padding_idx))


class AutoencoderWeight(CompressedWeight):
    """ŵᵢ = decoder(zᵢ), rescaled to a stored norm: decoded once, or on every use.

    The decoded weight is a cache: it is no buffer, it is not copied or saved, it is not used while gradients are on, and
    it is made anew when a parameter has changed.
    """

    decoder_class = NonLinearDecoder

    def __init__(self, rows: int, columns: int, group: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Make an empty weight; see the base class."""
        super().__init__(rows, columns, group, *args, **kwargs)
        self.norms = nn.Parameter(torch.empty(rows)) if group["norms"] else None
        self._cache: tuple[Any, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**super().__getstate__(), "_cache": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "AutoencoderWeight":
        """Forget the cache when the module changes dtype or device."""
        self._cache = None
        return super()._apply(*args, **kwargs)

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self._rows(self.latents, self.norms)

    def project(self, x: Tensor) -> Tensor:
        """Return x Ŵᵀ; see the base class."""
        cached = self._cached()
        return F.linear(x, self.dense_weight() if cached is None else cached, self.bias)

    def lookup(self, ids: Tensor) -> Tensor:
        """Decode the rows asked for, or look them up in the cache; see the base class."""
        cached = self._cached()
        if cached is not None:
            return F.embedding(ids, cached)
        latents = F.embedding(ids, self.latents, self.padding_idx)
        return self._rows(latents, None if self.norms is None else self.norms[ids])

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        super().reset_parameters(std)
        if self.norms is not None:
            nn.init.constant_(self.norms, std * self.columns**0.5)

    def _rows(self, latents: Tensor, norms: Tensor | None) -> Tensor:
        rows = self.decode(latents)
        if norms is None:
            return rows
        lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).clamp_min(1e-12)
        return rows * (norms.float() / lengths).to(rows.dtype)[..., None]

    def _cached(self) -> Tensor | None:
        """Return the decoded weight, or None where it must not be kept."""
        # Under offloading hooks, parameters come and go between calls.
        if self.decoding != "cached" or torch.is_grad_enabled() or hasattr(self, "_hf_hook"):
            self._cache = None  # a step of training may follow, which a compiled graph would not notice
            return None
        if torch.compiler.is_compiling():
            return self._cache[1] if self._cache else None
        decoder = self.__dict__.get("_shared_decoder") or self.decoder
        tensors = (*self.parameters(recurse=False), *decoder.parameters())
        if any(tensor.device.type == "meta" for tensor in tensors):
            return None
        # In-place changes raise a tensor's version; replaced tensors have another address.
        versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        key = (versions, torch.is_autocast_enabled(self.latents.device.type))
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.dense_weight())
        return self._cache[1]


class CompressedLinear(CompressedWeight):
    """A compressed weight in the place of `nn.Linear` or GPT-2's `Conv1D`."""

    @property
    def in_features(self) -> int:
        """Number of inputs, as `nn.Linear` has it."""
        return self.columns

    @property
    def out_features(self) -> int:
        """Number of outputs, as `nn.Linear` has it."""
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Ŵᵀ + bias, [..., in_features] → [..., out_features]."""
        return self.project(x)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.columns}, {self.rows}, bias={self.bias is not None}"


class CompressedEmbedding(CompressedWeight):
    """A compressed weight in the place of `nn.Embedding`."""

    @property
    def num_embeddings(self) -> int:
        """Number of rows, as `nn.Embedding` has it."""
        return self.rows

    @property
    def embedding_dim(self) -> int:
        """Width of a row, as `nn.Embedding` has it."""
        return self.columns

    def forward(self, inputs: Tensor, as_logits: bool = False) -> Tensor:
        """Return the rows of token ids [...] → [..., width].

        With `as_logits`, `inputs` are hidden states [..., width], and their products with all rows are returned,
        [..., tokens]: what a tied language-model head does.
        """
        return self.project(inputs) if as_logits else self.lookup(inputs)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.rows}, {self.columns}"


class LowRankLinear(LowRankWeight, CompressedLinear):
    """Linear layer of low rank."""


class LowRankEmbedding(LowRankWeight, CompressedEmbedding):
    """Embedding of low rank."""


class AutoencoderLinear(AutoencoderWeight, CompressedLinear):
    """Linear layer whose rows a non-linear decoder makes."""


class AutoencoderEmbedding(AutoencoderWeight, CompressedEmbedding):
    """Embedding whose rows a non-linear decoder makes."""


LINEARS: dict[str, type[CompressedLinear]] = {"low_rank": LowRankLinear, "autoencoder": AutoencoderLinear}
EMBEDDINGS: dict[str, type[CompressedEmbedding]] = {"low_rank": LowRankEmbedding, "autoencoder": AutoencoderEmbedding}


class FusedLinear(nn.ModuleDict):
    """Linear layers on the same input, their outputs side by side: GPT-2's c_attn, with parts of their own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all parts, [..., in] → [..., sum of outs]."""
        return torch.cat([part(x) for part in self.values()], dim=-1)


class TiedHead(nn.Module):
    """A language-model head that uses the compressed input embedding; it holds only the bias."""

    def __init__(self, embedding: CompressedEmbedding, bias: nn.Parameter | None) -> None:
        """Make a head on `embedding`, which stays the property of the base model."""
        super().__init__()
        self.__dict__["_embedding"] = embedding
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The embedding's dense weight; see `CompressedWeight.weight`."""
        weight: Tensor = self.__dict__["_embedding"].weight
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, [..., width] → [..., tokens]."""
        logits: Tensor = self.__dict__["_embedding"](hidden, as_logits=True)
        return logits if self.bias is None else logits + self.bias
