"""What a matrix of a stock graph is made from: the weight as a part of a graph, in float32 or as integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import FLOAT, INT8, Array, GraphBuilder, float32, integers, to_numpy

# Of a weight's integers. Processors with AVX2 and no newer instructions add two products with a byte in 16 bits:
# 2 · 255 · 64 just fits, and with 127 sums were cut off there. Codes of a few bits lose nothing by it that shows.
LARGEST = 64


@dataclass(frozen=True)
class Int8Matrix:
    """A weight as integers.

    Attributes:
        numbers: [columns, rows], int8, as a product takes them.
        scales: of each row, [rows], float32.
    """

    numbers: ir.Value
    scales: ir.Value


class Source(ABC):
    """A matrix [rows, columns] as a part of a graph. What a structure must provide.

    A session computes what depends on constants alone once, when it is made: `float32` and `int8` cost it seconds then,
    and nothing later.
    """

    def __init__(self, graph: GraphBuilder, weight: Any) -> None:
        """Remember the compressed module that stands for the matrix."""
        self.graph, self.weight = graph, weight
        self.rows, self.columns = weight.rows, weight.columns

    @abstractmethod
    def float32(self) -> ir.Value:
        """Return the weight [columns, rows], float32."""

    @abstractmethod
    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return the rows of ids [n], int64 → [n, columns], float32; no other row is decoded if that can be."""

    def int8(self) -> Int8Matrix:
        """Return the weight as integers with scales; by default it is decoded, then rounded."""
        return rounded(self.graph, self.float32())

    def product(self, x: ir.Value, int8: bool) -> ir.Value:
        """Return x · Ŵᵀ, [..., columns] → [..., rows]."""
        return int8_product(self.graph, x, self.int8()) if int8 else self.graph("MatMul", x, self.float32())


class Dense(Source):
    """A matrix that is not compressed."""

    def __init__(self, graph: GraphBuilder, weight: Any) -> None:
        """Remember it, a tensor [rows, columns]."""
        self.graph, self.numbers = graph, to_numpy(weight.float())
        self.rows, self.columns = self.numbers.shape

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        return self.graph.constant(self.numbers.T)

    def int8(self) -> Int8Matrix:
        """Return the weight, rounded now; see the base class."""
        return rounded(self.graph, self.numbers.T)

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        return some_rows(self.graph, self.numbers, ids)


class Fused(Source):
    """Several weights on the same input, one below the other."""

    def __init__(self, graph: GraphBuilder, parts: list[Source]) -> None:
        """Remember the parts."""
        self.graph, self.parts = graph, parts
        self.rows, self.columns = sum(part.rows for part in parts), parts[0].columns

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        return self.graph.concat([part.float32() for part in self.parts], 1)

    def int8(self) -> Int8Matrix:
        """Return the weight; see the base class."""
        parts = [part.int8() for part in self.parts]
        scales = self.graph.concat([part.scales for part in parts], 0)
        return Int8Matrix(self.graph.concat([part.numbers for part in parts], 1), scales)

    def lookup(self, ids: ir.Value) -> ir.Value:
        """No embedding has parts."""
        raise NotImplementedError

    def product(self, x: ir.Value, int8: bool) -> ir.Value:
        """Return one product, or where some parts are applied without decoding, one of each."""
        if all(type(part).product is Source.product for part in self.parts):
            return super().product(x, int8)
        return self.graph.concat([part.product(x, int8) for part in self.parts], -1)


def int8_product(graph: GraphBuilder, x: ir.Value, weight: Int8Matrix) -> ir.Value:
    """Return x · Ŵᵀ where x is rounded to 8 bits as it comes: what ONNX Runtime makes one operator of.

    That operator has one scale for all of x. So each row, which is a token, is divided by its largest number first: else
    one token's outliers, which causal models have at the first place, leave nothing of the others, and what is said of a
    text depends on those beside it. Where x comes from a layer norm, all tokens are of one size already.
    """
    if graph.in_two_parts:
        largest = _largest(graph, x)
        return graph("Mul", _product_in_two_parts(graph, graph("Div", x, largest), weight), largest)
    if _is_normed(x):
        return _product_of_bytes(graph, x, weight)
    largest = _largest(graph, x)
    return graph("Mul", _product_of_bytes(graph, graph("Div", x, largest), weight), largest)


def _largest(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    """Return the largest absolute value of each row, [..., columns] → [..., 1]."""
    largest = graph("ReduceMax", graph("Abs", x), integers(-1), keepdims=1)
    return graph("Max", largest, float32(np.finfo(np.float32).tiny))


def _is_normed(x: ir.Value) -> bool:
    """Return whether a value comes straight from a layer norm."""
    node = x.producer()
    return node is not None and node.op_type == "LayerNormalization"


def _product_of_bytes(graph: GraphBuilder, x: ir.Value, weight: Int8Matrix) -> ir.Value:
    """Return x · Ŵᵀ for x in 8 bits, with one scale."""
    numbers, scale, zero = graph.outputs("DynamicQuantizeLinear", 3, x)
    product = graph.cast(graph("MatMulInteger", numbers, weight.numbers, zero), FLOAT)
    return graph("Mul", product, graph("Mul", scale, weight.scales))


def _product_in_two_parts(graph: GraphBuilder, x: ir.Value, weight: Int8Matrix) -> ir.Value:
    """Return x · Ŵᵀ for x within ±1, of 8 bits and of 8 bits of what they leave, in one product.

    Tokens of causal models have numbers 40 times as large as the rest: 8 bits leave 3 for most of them.
    """
    steps, finer, zero = float32(127), float32(254), np.array(128, np.uint8)
    first = graph("Div", graph("Round", graph("Mul", x, steps)), steps)
    rest = graph("Mul", graph("Sub", x, first), finer)
    both = graph.concat([graph("Unsqueeze", part, integers(0)) for part in (first, rest)], 0)
    numbers = graph("QuantizeLinear", both, float32(1 / 127), zero)
    product = graph.cast(graph("MatMulInteger", numbers, weight.numbers, zero), FLOAT)
    product = graph("Mul", product, graph("Div", weight.scales, steps))
    coarse, fine = (graph("Gather", product, np.array(part), axis=0) for part in (0, 1))
    return graph("Add", coarse, graph("Div", fine, finer))


def rounded(graph: GraphBuilder, weight: ir.Value | Array) -> Int8Matrix:
    """Return a weight [columns, rows] as integers; of an array, which are stored so."""
    tiny = np.finfo(np.float32).tiny
    if isinstance(weight, np.ndarray):
        scales = np.maximum(np.abs(weight).max(axis=0), tiny) / np.float32(LARGEST)
        return Int8Matrix(graph.constant(np.rint(weight / scales).astype(np.int8)), graph.constant(scales))
    largest = graph("ReduceMax", graph("Abs", weight), integers(0), keepdims=0)
    value = graph("Div", graph("Max", largest, float32(tiny)), float32(LARGEST))
    return Int8Matrix(graph.cast(graph("Round", graph("Div", weight, value)), INT8), value)


def some_rows(graph: GraphBuilder, numbers: Array, ids: ir.Value) -> ir.Value:
    """Return rows of an array [rows, ...], float32; what is stored narrow is widened after it was looked up."""
    narrow = numbers.astype(np.float16)
    if np.array_equal(narrow, numbers):
        return graph.cast(graph("Gather", narrow, ids), FLOAT)
    return graph("Gather", numbers, ids)
