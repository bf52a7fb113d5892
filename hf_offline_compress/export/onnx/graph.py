"""Building an ONNX graph: operators by their names, constants that are stored once, and what many weights need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]
FLOAT, UINT8, INT8, INT32, INT64, BOOL = (
    int(dtype)
    for dtype in (
        ir.DataType.FLOAT,
        ir.DataType.UINT8,
        ir.DataType.INT8,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.BOOL,
    )
)
Operand: TypeAlias = "ir.Value | Array | np.generic"


class GraphBuilder:
    """Nodes and constants that are added to a graph.

    Equal constants are stored once, and equal operators on the same values are one node: what several matrices share,
    such as a table, is so without anybody having to think of it.
    """

    def __init__(self, graph: ir.Graph, in_two_parts: bool = False) -> None:
        """Begin with nothing added.

        Args:
            graph: that is added to.
            in_two_parts: whether inputs of products of integers keep 16 bits, as two parts of 8.
        """
        self.graph, self.in_two_parts = graph, in_two_parts
        self._constants: dict[Any, ir.Value] = {}
        self._made: dict[Any, tuple[ir.Value, ...]] = {}
        self._nodes: list[ir.Node] = []

    def __call__(self, operator: str, *inputs: Operand | None, **attributes: Any) -> ir.Value:
        """Return the first output of an operator; arrays among the inputs become constants."""
        return self.outputs(operator, 1, *inputs, **attributes)[0]

    def outputs(self, operator: str, count: int, *inputs: Operand | None, **attributes: Any) -> tuple[ir.Value, ...]:
        """Return `count` outputs of an operator."""
        values = [value if value is None or isinstance(value, ir.Value) else self.constant(value) for value in inputs]
        key = (operator, count, tuple(map(id, values)), repr(sorted(attributes.items())))
        if key not in self._made:
            node = ir.node(operator, values, attributes, num_outputs=count)
            self._nodes.append(node)
            self._made[key] = tuple(node.outputs)
        return self._made[key]

    def constant(self, array: Array | np.generic) -> ir.Value:
        """Return an array as an initializer; float32 that float16 holds exactly is stored as that."""
        array = np.asarray(array, order="C")  # an array without axes stays one
        if array.dtype == np.float32 and array.size > SMALL and np.array_equal(array.astype(np.float16), array):
            return self("Cast", self._stored(array.astype(np.float16)), to=FLOAT)
        return self._stored(array)

    def _stored(self, array: Array) -> ir.Value:
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            value = ir.Value(name=f"c{len(self._constants)}", const_value=ir.tensor(array))
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def finish(self) -> None:
        """Put the nodes into the graph, and all of it into an order in which it can be computed."""
        self.graph.extend(self._nodes)
        self._nodes = []
        self.graph.sort()

    def reshape(self, value: Operand, *shape: int) -> ir.Value:
        """Return a value in another shape; 0 keeps a size, −1 takes what is left."""
        return self("Reshape", value, integers(*shape))

    def slice(self, value: Operand, start: int, stop: int, axis: int) -> ir.Value:
        """Return the part of a value from `start` to before `stop` along an axis."""
        return self("Slice", value, integers(start), integers(stop), integers(axis))

    def concat(self, values: Iterable[Operand], axis: int) -> ir.Value:
        """Return values one behind the other; of a single one, itself."""
        values = list(values)
        if len(values) == 1 and isinstance(values[0], ir.Value):
            return values[0]
        return self("Concat", *values, axis=axis)

    def cast(self, value: Operand, to: int) -> ir.Value:
        """Return a value in another dtype."""
        return self("Cast", value, to=to)


# Numbers for which another dtype is not worth a node.
SMALL = 64


def integers(*values: int) -> Array:
    """Return integers as shapes and axes are given, int64."""
    return np.array(values, dtype=np.int64)


def int32(values: Any) -> Array:
    """Return numbers as int32."""
    return np.asarray(values, dtype=np.int32)


def float32(values: Any) -> Array:
    """Return numbers as float32."""
    return np.asarray(values, dtype=np.float32)


def narrowest(values: Array) -> Array:
    """Return integers, none negative, in the narrowest unsigned dtype."""
    largest = int(values.max(initial=0))
    return values.astype(next(dtype for dtype in (np.uint8, np.uint16, np.uint32) if largest <= np.iinfo(dtype).max))


def to_numpy(tensor: Any) -> Array:
    """Return a torch tensor's numbers."""
    array: Array = tensor.detach().cpu().numpy()
    return array
