"""Low rank in ONNX: two thin products, never decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import integers, to_numpy
from .packing import number_rows, numbers
from .source import Int8Matrix, Source, int8_product, rounded


class LowRank(Source):
    """Ŵ = latents · decoder, of which some columns may be the latents themselves."""

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        return self.graph("Transpose", self._rows(numbers(self.graph, self.weight, "latents")), perm=[1, 0])

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        return self._rows(number_rows(self.graph, self.weight, "latents", ids))

    def product(self, x: ir.Value, int8: bool) -> ir.Value:
        """Return both products; see the base class."""
        graph, decoder = self.graph, decoder_of(self.weight)
        bias = (
            None if decoder.bias is None else graph("MatMul", x, graph.reshape(numbers(graph, decoder, "bias"), -1, 1))
        )
        if decoder.order is None:
            inner = self._apply(x, decoder, "weight", int8)
        else:
            x = graph("Gather", x, to_numpy(decoder.order).astype(np.int64), axis=-1)
            same = graph.slice(x, 0, decoder.latent, -1)
            rest = graph.slice(x, decoder.latent, self.columns, -1)
            inner = graph("Add", same, self._apply(rest, decoder, "weight", int8)) if self._stored else same
        out = self._apply(inner, self.weight, "latents", int8, transposed=True)
        return out if bias is None else graph("Add", out, bias)

    @property
    def _stored(self) -> int:
        """Columns that the decoder gives."""
        return self.columns - (decoder_of(self.weight).latent if decoder_of(self.weight).order is not None else 0)

    def _apply(self, x: ir.Value, module: object, name: str, int8: bool, transposed: bool = False) -> ir.Value:
        """Return a product with a factor [inputs, outputs], or transposed [outputs, inputs]."""
        graph = self.graph
        if not int8:
            factor = numbers(graph, module, name)
            return graph("MatMul", x, graph("Transpose", factor, perm=[1, 0]) if transposed else factor)
        return int8_product(graph, x, self._int8(module, name, transposed))

    def _int8(self, module: object, name: str, transposed: bool) -> Int8Matrix:
        if name not in module.packed:  # type: ignore[attr-defined]
            array = to_numpy(getattr(module, name).float())
            return rounded(self.graph, np.ascontiguousarray(array.T if transposed else array))
        factor = numbers(self.graph, module, name)
        return rounded(self.graph, self.graph("Transpose", factor, perm=[1, 0]) if transposed else factor)

    def _rows(self, latents: ir.Value) -> ir.Value:
        """Return rows [n, columns] of latents [n, latent]."""
        graph, decoder = self.graph, decoder_of(self.weight)
        if decoder.order is None:
            rows = graph("MatMul", latents, graph("Transpose", numbers(graph, decoder, "weight"), perm=[1, 0]))
            return rows if decoder.bias is None else graph("Add", rows, numbers(graph, decoder, "bias"))
        if self._stored:
            others = graph("MatMul", latents, graph("Transpose", numbers(graph, decoder, "weight"), perm=[1, 0]))
            latents = graph.concat([latents, others], 1)
        return graph("Gather", latents, integers(*np.argsort(to_numpy(decoder.order))), axis=1)


def decoder_of(weight: Any) -> Any:
    """Return the decoder that a compressed module calls, its own or a shared one."""
    return weight.__dict__.get("_shared_decoder") or weight.decoder
