"""Tucker decompositions in ONNX."""

from __future__ import annotations

import onnx_ir as ir

from .graph import integers
from .low_rank import decoder_of
from .packing import number_rows, numbers
from .source import Source


class Tucker(Source):
    """Ŵ as some slices of a tensor in Tucker form, one below the other."""

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        graph = self.graph
        slices = graph("Einsum", numbers(graph, self.weight, "mixing"), self._factor("core"), equation="br,rst->bst")
        rows = graph("MatMul", self._factor("row_factor"), slices)  # [blocks, height, rank]
        rows = graph.reshape(rows, -1, decoder_of(self.weight).core.shape[2])
        return graph.slice(graph("MatMul", self._columns(), graph("Transpose", rows, perm=[1, 0])), 0, self.rows, 1)

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        graph, decoder = self.graph, decoder_of(self.weight)
        height = integers(len(decoder.row_factor))[0]
        mixing = number_rows(graph, self.weight, "mixing", graph("Div", ids, height))
        factors = number_rows(graph, decoder, "row_factor", graph("Mod", ids, height))
        slices = graph("Einsum", mixing, self._factor("core"), equation="nr,rst->nst")
        rows = graph("Einsum", factors, slices, equation="ns,nst->nt")
        return graph("MatMul", rows, graph("Transpose", self._columns(), perm=[1, 0]))

    def _factor(self, name: str) -> ir.Value:
        return numbers(self.graph, decoder_of(self.weight), name)

    def _columns(self) -> ir.Value:
        return self._factor("column_factor")
