"""Codes into tables of sub-vectors in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import INT32, GraphBuilder, float32, int32, integers, to_numpy
from .low_rank import decoder_of
from .packing import number_rows, numbers, unpack_codes
from .source import LARGEST, Int8Matrix, Source


class Codebook(Source):
    """Ŵ from codes into tables, times a scale for each row."""

    def __init__(self, graph: GraphBuilder, weight: Any) -> None:
        """Take the codes apart; see the base class."""
        from ...runtime.packing_compressed import unpack

        super().__init__(graph, weight)
        self.decoder: Any = decoder_of(weight)
        self.books, self.entries, self.width = self.decoder.tables.shape
        self.bits = weight.bits
        self.codes = to_numpy(unpack(weight.codes, weight.bits, weight.count))

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        graph = self.graph
        rows = graph("Mul", self._rows(None), graph("Unsqueeze", numbers(graph, self.weight, "scales"), integers(1)))
        return graph("Transpose", rows, perm=[1, 0])

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        graph = self.graph
        scales = number_rows(graph, self.weight, "scales", ids)
        return graph("Mul", self._rows(ids), graph("Unsqueeze", scales, integers(1)))

    def int8(self) -> Int8Matrix:
        """Return the weight from a table of integers; see the base class."""
        if self.books > 1 or "tables" in self.decoder.packed:
            return super().int8()
        graph, table = self.graph, to_numpy(self.decoder.tables[0].float())
        unit = max(float(np.abs(table).max()), float(np.finfo(np.float32).tiny)) / LARGEST
        found = graph("Gather", np.rint(table / unit).astype(np.int8), self._indices(None))
        found = graph.reshape(graph("Transpose", found, perm=[1, 2, 0]), -1, self.rows)
        scales = graph("Mul", numbers(graph, self.weight, "scales"), float32(unit))
        return Int8Matrix(graph.slice(found, 0, self.columns, 0), scales)

    def _indices(self, ids: ir.Value | None) -> ir.Value:
        """Return codes [n, sub-vectors · books], int32."""
        return self.graph.cast(unpack_codes(self.graph, self.codes, self.bits, ids), INT32)

    def _rows(self, ids: ir.Value | None) -> ir.Value:
        """Return rows [n, columns], or all, without their scales."""
        graph, parts = self.graph, self.codes.shape[1] // self.books
        codes = graph.reshape(self._indices(ids), 0, parts, self.books)
        if self.books > 1:
            codes = graph("Add", codes, int32(np.arange(self.books) * self.entries))
        tables = graph.reshape(numbers(graph, self.decoder, "tables"), -1, self.width)
        found = graph("ReduceSum", graph("Gather", tables, codes), integers(2), keepdims=0)
        return graph.slice(graph.reshape(found, 0, parts * self.width), 0, self.columns, 1)
