"""Codes of a few bits with scales and zeros in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import FLOAT, INT8, INT32, GraphBuilder, float32, int32, integers, to_numpy
from .packing import unpack_codes
from .source import LARGEST, Int8Matrix, Source, rounded, some_rows

# Codes of up to so many bits are looked up as integers; of more, the table would be larger than the weight.
LOOKED_UP = 5


class Quantized(Source):
    """A scale and a zero for each row, or for each part of one."""

    def __init__(self, graph: GraphBuilder, weight: Any) -> None:
        """Take the codes apart; see the base class."""
        from ...runtime.packing_compressed import unpack

        super().__init__(graph, weight)
        self.bits, self.size = weight.bits, weight.group_size
        self.scales = to_numpy(weight.scales.float())
        self.parts = self.scales.shape[1]
        self.zeros = to_numpy(unpack(weight.zeros, self.bits + 1, self.parts))
        codes = to_numpy(unpack(weight.codes, self.bits, self.columns))
        self.codes = np.pad(codes, ((0, 0), (0, self.parts * self.size - self.columns)))

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        return self.graph("Transpose", self._rows(None), perm=[1, 0])

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        return self._rows(ids)

    def int8(self) -> Int8Matrix:
        """Return the weight from a table of what each code of each part stands for; see the base class."""
        if self.bits > LOOKED_UP:
            return rounded(self.graph, self.float32())
        graph, entries = self.graph, 2**self.bits
        zeros = graph.cast(unpack_codes(graph, self.zeros, self.bits + 1), FLOAT)
        halves = graph("Sub", float32(2 * np.arange(entries)), graph("Unsqueeze", zeros, integers(2)))
        values = graph("Mul", halves, self.scales[:, :, None] / 2)  # [rows, parts, entries]
        largest = graph("ReduceMax", graph("Abs", values), integers(1, 2), keepdims=1)
        scales = graph("Div", graph("Max", largest, float32(np.finfo(np.float32).tiny)), float32(LARGEST))
        table = graph.reshape(graph.cast(graph("Round", graph("Div", values, scales)), INT8), -1)
        starts = int32(np.arange(self.rows * self.parts) * entries).reshape(self.rows, self.parts, 1)
        first = graph.reshape(
            graph("Range", int32(0), int32(starts.size * entries), int32(entries)), self.rows, self.parts, 1
        )
        codes = graph.reshape(unpack_codes(graph, self.codes, self.bits), self.rows, self.parts, self.size)
        found = graph("Gather", table, graph("Add", graph.cast(codes, INT32), first))
        found = graph("Transpose", graph.reshape(found, self.rows, -1), perm=[1, 0])
        return Int8Matrix(self._cropped(found, 0), graph.reshape(scales, -1))

    def _rows(self, ids: ir.Value | None) -> ir.Value:
        """Return rows [n, columns], or all."""
        graph = self.graph
        codes = unpack_codes(graph, self.codes, self.bits, ids)
        zeros = graph.cast(unpack_codes(graph, self.zeros, self.bits + 1, ids), FLOAT)
        scales = graph.constant(self.scales) if ids is None else some_rows(graph, self.scales, ids)
        doubled = graph("Mul", graph.cast(graph.reshape(codes, 0, self.parts, self.size), FLOAT), float32(2))
        halves = graph("Sub", doubled, graph("Unsqueeze", zeros, integers(2)))
        steps = graph("Unsqueeze", graph("Div", scales, float32(2)), integers(2))
        return self._cropped(graph.reshape(graph("Mul", halves, steps), 0, self.parts * self.size), 1)

    def _cropped(self, value: ir.Value, axis: int) -> ir.Value:
        whole = self.parts * self.size == self.columns
        return value if whole else self.graph.slice(value, 0, self.columns, axis)
