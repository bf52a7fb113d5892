"""Sparse weights in ONNX."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import INT64, float32, integers, to_numpy
from .packing import numbers, unpack_codes
from .source import Source


class Sparse(Source):
    """Ŵ from its values and the gaps between their places, in row-major order; or with its zeros."""

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        return self.graph("Transpose", self._whole(), perm=[1, 0])

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows of the whole weight: no row says where its values are."""
        return self.graph("Gather", self._whole(), ids)

    def _whole(self) -> ir.Value:
        """Return the weight [rows, columns]."""
        graph, values = self.graph, numbers(self.graph, self.weight, "values")
        if not self.weight.gap_bits:
            return values
        from ...runtime.packing_compressed import unpack

        bits, total = self.weight.gap_bits, self.rows * self.columns
        gaps = to_numpy(unpack(self.weight.gaps, bits, len(self.weight.values)))
        steps = graph.reshape(graph.cast(unpack_codes(graph, gaps[None], bits), INT64), -1)
        places = graph("CumSum", graph("Add", steps, integers(1)), np.int64(0))
        places = graph("Min", graph("Sub", places, integers(1)), integers(total - 1))
        zeros = graph("Expand", float32(0), integers(total))
        whole = graph("ScatterElements", zeros, places, values, reduction="add")
        return graph.reshape(whole, self.rows, self.columns)
