"""Sums of Kronecker products in ONNX."""

from __future__ import annotations

import onnx_ir as ir

from .graph import integers
from .low_rank import decoder_of
from .packing import numbers
from .source import Source


class Kronecker(Source):
    """Ŵ = Σ A ⊗ B, cropped."""

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        graph = self.graph
        _, height, columns = self.weight.left.shape
        _, below, width = decoder_of(self.weight).right.shape
        whole = graph("Einsum", self._left(), self._right(), equation="tac,tbd->cdab")
        whole = graph.reshape(whole, columns * width, height * below)
        return graph.slice(graph.slice(whole, 0, self.columns, 0), 0, self.rows, 1)

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        graph = self.graph
        _, _, columns = self.weight.left.shape
        _, below, width = decoder_of(self.weight).right.shape
        height = integers(below)[0]
        left = graph("Gather", self._left(), graph("Div", ids, height), axis=1)
        right = graph("Gather", self._right(), graph("Mod", ids, height), axis=1)
        rows = graph.reshape(graph("Einsum", left, right, equation="tnc,tnd->ncd"), 0, columns * width)
        return graph.slice(rows, 0, self.columns, 1)

    def _left(self) -> ir.Value:
        return numbers(self.graph, self.weight, "left")

    def _right(self) -> ir.Value:
        return numbers(self.graph, decoder_of(self.weight), "right")
