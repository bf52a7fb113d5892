"""One class per structure: its tensors, and how they are decoded to the weight."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .numbers_compressed import PackableLinear
from .packing_compressed import packed_length, round_min_max, unpack
from .specs_compressed import (
    AutoencoderSpec,
    CodebookSpec,
    KroneckerSpec,
    LowRankSpec,
    QuantizedSpec,
    ResidualSpec,
    SparseSpec,
    TuckerSpec,
    WeightSpec,
)
from .trellis_compressed import TrellisWeight
from .weights_compressed import CompressedWeight, DecodedWeight, WeightDecoder

# Numbers held at once when single rows of a tensor are decoded.
NUMBERS_AT_ONCE = 2**24
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "gelu": F.gelu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "none": lambda x: x,
}


class LinearDecoder(WeightDecoder):
    """Rows from latents by one matrix: rows = latents · weightᵀ (+ bias).

    With an identity block, the first `latent` columns of the rows, in the order of `order`, are the latents themselves,
    and `weight` [columns − latent, latent] gives only the others.
    """

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(spec, columns)
        assert isinstance(spec, LowRankSpec)
        self.latent = spec.latent
        stored = columns - self.latent if spec.identity_block else columns
        self.weight = nn.Parameter(torch.empty(stored, self.latent))
        self.bias = nn.Parameter(torch.empty(columns)) if spec.decoder_bias else None
        self.order: Tensor | None
        self.register_buffer("order", torch.empty(columns, dtype=torch.int16) if spec.identity_block else None)

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


class LowRankWeight(CompressedWeight):
    """Ŵ = latents · decoder: applied as two thin products, never decoded."""

    decoder_class = LinearDecoder

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make the latents; see the base class."""
        assert isinstance(spec, LowRankSpec)
        self.latents = nn.Parameter(torch.empty(self.rows, spec.latent))

    def resize(self, rows: int) -> None:
        """Change the number of rows; see the base class."""
        self._resize_tensors(rows)

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


class NonLinearDecoder(WeightDecoder):
    """Rows from latents by a small fully connected network."""

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(spec, columns)
        assert isinstance(spec, AutoencoderSpec)
        widths = [spec.latent, *spec.hidden, columns]
        self.layers = nn.ModuleList(PackableLinear(i, o) for i, o in pairwise(widths))
        self.activation = ACTIVATIONS[spec.activation]
        self.output_activation = ACTIVATIONS[spec.output_activation]

    def forward(self, latents: Tensor) -> Tensor:
        """Return rows [..., columns] of latents [..., latent]."""
        for layer in self.layers[:-1]:
            latents = self.activation(layer(latents))
        return self.output_activation(self.layers[-1](latents))


class AutoencoderWeight(DecodedWeight):
    """ŵᵢ = decoder(zᵢ), rescaled to a stored norm."""

    decoder_class = NonLinearDecoder

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make latents and norms; see the base class."""
        assert isinstance(spec, AutoencoderSpec)
        self.latents = nn.Parameter(torch.empty(self.rows, spec.latent))
        self.norms = nn.Parameter(torch.empty(self.rows)) if spec.norms else None

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self._rows(self.latents, self.norms)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        latents = F.embedding(ids, self.latents, self.padding_idx)
        return self._rows(latents, None if self.norms is None else self.norms[ids])

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        super().reset_parameters(std)
        if self.norms is not None:
            nn.init.constant_(self.norms, std * self.columns**0.5)

    def resize(self, rows: int) -> None:
        """Change the number of rows; see the base class."""
        self._resize_tensors(rows)

    def _rows(self, latents: Tensor, norms: Tensor | None) -> Tensor:
        rows = self.decode(latents)
        if norms is None:
            return rows
        wide = torch.promote_types(rows.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=wide).clamp_min(1e-12)
        return rows * (norms.to(wide) / lengths).to(rows.dtype)[..., None]


class ResidualDecoder(WeightDecoder):
    """Rows from latents by a matrix, and by a hidden layer on top of it."""

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(spec, columns)
        assert isinstance(spec, ResidualSpec)
        (units,) = spec.hidden
        self.linear = PackableLinear(spec.latent, columns, bias=False)
        self.hidden = PackableLinear(spec.latent, units)
        self.output = PackableLinear(units, columns, bias=False)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, latents: Tensor) -> Tensor:
        """Return rows [..., columns] of latents [..., latent]."""
        return self.linear(latents) + self.output(self.activation(self.hidden(latents)))


class ResidualWeight(DecodedWeight):
    """ŵᵢ = decoder(zᵢ), times a stored scale."""

    decoder_class = ResidualDecoder

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make latents and scales; see the base class."""
        assert isinstance(spec, ResidualSpec)
        self.latents = nn.Parameter(torch.empty(self.rows, spec.latent))
        self.scales = nn.Parameter(torch.empty(self.rows)) if spec.norms else None

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        rows = self.decode(self.latents)
        return rows if self.scales is None else rows * self.scales[:, None].to(rows.dtype)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        rows = self.decode(F.embedding(ids, self.latents, self.padding_idx))
        return rows if self.scales is None else rows * self.scales[ids][..., None].to(rows.dtype)

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        super().reset_parameters(std)
        if self.scales is not None:
            nn.init.constant_(self.scales, std)

    def resize(self, rows: int) -> None:
        """Change the number of rows; see the base class."""
        self._resize_tensors(rows)


class KroneckerDecoder(WeightDecoder):
    """The right factors of a sum of Kronecker products."""

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(spec, columns)
        assert isinstance(spec, KroneckerSpec)
        self.columns = columns
        self.right = nn.Parameter(torch.empty(spec.terms, *spec.right))

    def forward(self, left: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return Σ A ⊗ B of left factors [terms, a, c], cropped to the columns: all rows [a · b, columns].

        With `ids` [n], return those rows alone, [n, columns].
        """
        height = self.right.shape[1]
        if ids is None:
            rows = torch.einsum("tac,tbd->abcd", left, self.right).flatten(0, 1)
        else:
            rows = torch.einsum("tnc,tnd->ncd", left[:, ids // height], self.right[:, ids % height])
        return rows.flatten(1)[:, : self.columns]

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        nn.init.normal_(self.right, std=std)


class KroneckerWeight(DecodedWeight):
    """Ŵ = Σ A ⊗ B, cropped."""

    decoder_class = KroneckerDecoder

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make the left factors; see the base class."""
        assert isinstance(spec, KroneckerSpec)
        self.left = nn.Parameter(torch.empty(spec.terms, *spec.left))

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self.decode(self.left)[: self.rows]

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        parts = ids.flatten().split(max(1, NUMBERS_AT_ONCE // (self.columns * self.left.shape[0])))
        return torch.cat([self.decode(self.left, part) for part in parts]).unflatten(0, ids.shape)


class TuckerDecoder(WeightDecoder):
    """Core, row factor and column factor of a Tucker decomposition."""

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(spec, columns)
        assert isinstance(spec, TuckerSpec)
        self.core = nn.Parameter(torch.empty(spec.ranks))
        self.row_factor = nn.Parameter(torch.empty(spec.height, spec.ranks[1]))
        self.column_factor = nn.Parameter(torch.empty(columns, spec.ranks[2]))

    def forward(self, mixing: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return all rows [blocks · height, columns] of mixing [blocks, rank]; with `ids` [n], those alone."""
        if ids is None:
            slices = torch.einsum("br,rst->bst", mixing, self.core)
            return (self.row_factor @ slices).flatten(0, 1) @ self.column_factor.T
        height = len(self.row_factor)
        parts = ids.split(max(1, NUMBERS_AT_ONCE // self.core[0].numel()))
        rows = [
            torch.einsum("nr,rst,ns->nt", mixing[part // height], self.core, self.row_factor[part % height])
            for part in parts
        ]
        return torch.cat(rows) @ self.column_factor.T

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        nn.init.normal_(self.core, std=std)
        for factor in (self.row_factor, self.column_factor):
            nn.init.normal_(factor, std=factor.shape[1] ** -0.5)


class TuckerWeight(DecodedWeight):
    """Ŵ as stacked slices of a tensor in Tucker form."""

    decoder_class = TuckerDecoder

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make the mixing of the core's slices; see the base class."""
        assert isinstance(spec, TuckerSpec)
        self.mixing = nn.Parameter(torch.empty(spec.blocks, spec.ranks[0]))

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self.decode(self.mixing)[: self.rows]

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        return self.decode(self.mixing, ids.flatten()).unflatten(0, ids.shape)


class SparseWeight(DecodedWeight):
    """Ŵ from its values and the gaps between their places, in row-major order; or with its zeros."""

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make values and packed gaps; see the base class."""
        assert isinstance(spec, SparseSpec)
        self.gap_bits = spec.gap_bits
        if spec.values is None:
            self.values = nn.Parameter(torch.empty(self.rows, self.columns))
            return
        self.values = nn.Parameter(torch.empty(spec.values))
        gaps = torch.empty(packed_length(spec.values, self.gap_bits), dtype=torch.uint8)
        self.gaps: Tensor
        self.register_buffer("gaps", gaps)

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        if not self.gap_bits:
            return self.values
        total, values = self.rows * self.columns, self.values
        gaps = unpack(self.gaps, self.gap_bits, len(values))
        places = ((gaps + 1).cumsum(0) - 1).clamp_max(total - 1)  # zeros that pad the gaps may lie beyond the end
        return values.new_zeros(total).index_add(0, places, values).view(self.rows, self.columns)


class QuantizedWeight(DecodedWeight):
    """Ŵ from codes of a few bits, with a scale and a zero, in half steps, for each row or each part of one."""

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make codes, scales and zeros; see the base class."""
        assert isinstance(spec, QuantizedSpec)
        # A group is no larger than a row: decoding pads to whole groups.
        self.bits, self.group_size = spec.bits, min(spec.group_size, self.columns)
        parts = -(-self.columns // self.group_size)
        self.codes: Tensor
        self.zeros: Tensor
        for name, count, bits in (("codes", self.columns, self.bits), ("zeros", parts, self.bits + 1)):
            self.register_buffer(name, torch.empty(self.rows, packed_length(count, bits), dtype=torch.uint8))
        self.scales = nn.Parameter(torch.empty(self.rows, parts))

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self._rows(self.codes, self.scales, self.zeros)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        return self._rows(self.codes[ids], self.scales[ids], self.zeros[ids])

    def reset_parameters(self, std: float) -> None:
        """Fill with codes that are not all alike, and random scales; see the base class."""
        super().reset_parameters(std)
        nn.init.constant_(self.codes, 0b11100100)
        nn.init.normal_(self.scales, std=std / 2**self.bits)

    def resize(self, rows: int) -> None:
        """Change the number of rows; see the base class."""
        old, mean = self.rows, self.dense_weight().float().mean(dim=0, keepdim=True)
        self._resize_tensors(rows)
        self.codes[old:], self.scales.data[old:], self.zeros[old:] = round_min_max(mean, self.bits, self.group_size)

    def _rows(self, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        codes = unpack(packed, self.bits, self.columns)
        parts = F.pad(codes, (0, -self.columns % self.group_size)).unflatten(-1, (-1, self.group_size))
        halves = 2 * parts - unpack(zeros, self.bits + 1, scales.shape[-1])[..., None]
        return (halves.to(scales.dtype) * (scales / 2)[..., None]).flatten(-2)[..., : self.columns]


class CodebookDecoder(WeightDecoder):
    """Tables of sub-vectors."""

    def __init__(self, spec: WeightSpec, columns: int) -> None:
        """Make the decoder of a group, for rows of `columns` entries."""
        super().__init__(spec, columns)
        assert isinstance(spec, CodebookSpec)
        self.columns = columns
        self.tables = nn.Parameter(torch.empty(spec.books, 2**spec.bits, spec.width))

    def forward(self, codes: Tensor) -> Tensor:
        """Return rows [..., columns] of codes [..., sub-vectors · books], those of one sub-vector next to each other."""
        books, entries, _ = self.tables.shape
        codes = codes.unflatten(-1, (-1, books))
        if books > 1:
            codes = codes + torch.arange(books, device=codes.device, dtype=codes.dtype) * entries
        parts = F.embedding(codes, self.tables.flatten(0, 1)).sum(dim=-2)
        return parts.flatten(-2)[..., : self.columns]

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        nn.init.normal_(self.tables)


class CodebookWeight(DecodedWeight):
    """Ŵ from codes into tables, times a scale for each row."""

    decoder_class = CodebookDecoder

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make codes and scales; see the base class."""
        assert isinstance(spec, CodebookSpec)
        self.bits = spec.bits
        self.count = -(-self.columns // spec.width) * spec.books
        self.codes: Tensor
        self.register_buffer("codes", torch.empty(self.rows, packed_length(self.count, self.bits), dtype=torch.uint8))
        self.scales = nn.Parameter(torch.empty(self.rows))

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self._rows(self.codes, self.scales)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        return self._rows(self.codes[ids], self.scales[ids])

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        super().reset_parameters(std)
        nn.init.constant_(self.scales, std)

    def _rows(self, packed: Tensor, scales: Tensor) -> Tensor:
        rows = self.decode(unpack(packed, self.bits, self.count))
        return rows * scales[..., None].to(rows.dtype)


# structure → its class
WEIGHTS: dict[str, type[CompressedWeight]] = {
    "low_rank": LowRankWeight,
    "autoencoder": AutoencoderWeight,
    "residual": ResidualWeight,
    "kronecker": KroneckerWeight,
    "tucker": TuckerWeight,
    "sparse": SparseWeight,
    "quantized": QuantizedWeight,
    "codebook": CodebookWeight,
    "trellis": TrellisWeight,
}
