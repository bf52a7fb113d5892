"""The matrices of a stock graph are replaced by what decodes them, at each place where they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import GraphBuilder, integers
from .source import Source


class Substitution:
    """Takes the place of a graph's matrices.

    Attributes:
        int8: whether products are those of integers.
    """

    def __init__(self, builder: GraphBuilder, int8: bool) -> None:
        """See the class."""
        self.builder, self.graph, self.int8 = builder, builder.graph, int8

    def replace(self, matrix: ir.Value, source: Source, transposed: bool) -> None:
        """Give every use of a matrix what it is made from.

        Args:
            matrix: an input of the graph.
            source: what it is made from.
            transposed: whether the graph has it as [in, out].
        """
        builder = self.builder
        for node, index in tuple(matrix.uses()):
            if node.op_type == "Gather" and index == 0 and _attribute(node, "axis", 0) == 0 and not transposed:
                self._put(node, self._lookup(source, node.inputs[1]))
            elif node.op_type == "Transpose" and not transposed:
                self._put_transposed(node, source)
            elif _is_product(node, index, transposed):
                out = source.product(node.inputs[0], self.int8)
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                self._put(node, out if bias is None else builder("Add", out, bias))
            else:
                node.replace_input_with(index, self._whole(source, transposed))
        self.graph.inputs.remove(matrix)

    def finish(self) -> None:
        """Store constants as narrow as they can be, and drop what only tells where nodes come from."""
        for value in list(self.graph.initializers.values()):
            array = value.const_value.numpy() if value.const_value is not None else np.empty(0)
            if array.dtype != np.float32 or value in self.graph.outputs:
                continue
            new = self.builder.constant(array)
            for use, index in tuple(value.uses()) if new is not value else ():
                use.replace_input_with(index, new)
        self.builder.finish()
        _strip(self.graph)

    def _lookup(self, source: Source, ids: ir.Value) -> ir.Value:
        """Return the rows of ids [...] → [..., width]."""
        rows = source.lookup(self.builder.reshape(ids, -1))
        return self.builder("Reshape", rows, self.builder.concat([self.builder("Shape", ids), integers(-1)], 0))

    def _put_transposed(self, node: ir.Node, source: Source) -> None:
        """Put products into the places of those with a transposed matrix."""
        for use, place in tuple(node.outputs[0].uses()):
            if use.op_type == "MatMul" and place == 1:
                self._put(use, source.product(use.inputs[0], self.int8))
        if node.outputs[0].uses() or node.outputs[0] in self.graph.outputs:
            self._put(node, self._whole(source, True))
        else:
            self.graph.remove(node, safe=True)

    def _whole(self, source: Source, transposed: bool) -> ir.Value:
        whole = source.float32()
        return whole if transposed else self.builder("Transpose", whole, perm=[1, 0])

    def _put(self, node: ir.Node, new: ir.Value) -> None:
        """Put a value into the place of a node's output, and drop the node."""
        old = node.outputs[0]
        if old in self.graph.outputs:
            new = self.builder("Identity", new) if new in self.graph.outputs else new
            new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, None
            self.graph.outputs[list(self.graph.outputs).index(old)] = new
        for use, index in tuple(old.uses()):
            use.replace_input_with(index, new)
        self.graph.remove(node, safe=True)


def _is_product(node: ir.Node, index: int, transposed: bool) -> bool:
    """Return whether a node multiplies rows with a matrix, and does nothing else but add a bias."""
    if index != 1:
        return False
    if node.op_type == "Gemm":
        plain = all(_attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        turned = bool(_attribute(node, "transB", 0)) != transposed
        return plain and turned and not _attribute(node, "transA", 0)
    return node.op_type == "MatMul" and transposed


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _strip(graph: ir.Graph) -> None:
    """Drop what only tells where nodes come from, and give short names to all that nobody outside asks for."""
    outside = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in list(graph.initializers.values()):
        if not value.uses() and id(value) not in outside:
            graph.initializers.pop(value.name)
    graph.doc_string = None
    graph.metadata_props.clear()
    for value in graph.inputs:
        value.metadata_props.clear()
    for number, node in enumerate(graph):
        node.name = node.doc_string = None
        node.metadata_props.clear()
        for place, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in outside:
                value.name = f"v{number}" if place == 0 else f"v{number}_{place}"
                value.type = value.shape = None
    for number, value in enumerate([value for value in graph.initializers.values() if id(value) not in outside]):
        value.name = f"i{number}"
        value.metadata_props.clear()
