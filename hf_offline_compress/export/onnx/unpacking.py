"""A file that unpacks itself, unpacked beforehand: an ordinary ONNX file of int8 weights, made one matrix at a time.

A session keeps all that it folds until everything is folded, 20 bytes a weight and more. Here each matrix is computed by a
session of its own, of nothing but the operators that decode it, so that no more than one is unpacked at a time. What comes
of it is what a session would have folded, to the bit. `examples/browser/unpack.js` does the same in a page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CompressionError, listing, needs_extra, refusing
from ...foundation.files import whole_file

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto

# Bytes of constants: what is computed from fewer is left to the session.
SMALL = 64
# Bytes of constants: what is computed from fewer shares a session with others, since one takes milliseconds.
TOGETHER = 1 << 16
# Bytes of the weights of the largest ONNX file: protobuf takes 2 GiB, of which names and shapes need some.
LARGEST_FILE = (1 << 31) - (1 << 20)
# Whose outputs do not follow from their inputs, and what would only make integers larger.
NOT_FOLDED = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
NOT_FOLDED |= {"DequantizeLinear"}
ADVICE = "Pass a file that export --format onnx has written."


def unpack_onnx(source: str | Path, target: str | Path) -> Path:
    """Write an ONNX file of codes as one of ordinary weights, whole or not at all, and return its path.

    Its session is created at once and needs only the memory of its int8 weights; its outputs equal those of the
    file of codes, to the bit, at equal speed. It is about as large as the weights: a byte each for products in
    int8, four for float32. Embeddings that are only looked up stay codes.

    Args:
        source: such as `export --format onnx` writes.
        target: a file that does not exist yet, in a folder that does.

    Raises:
        CompressionError: there is no such file, it is no ONNX file, a damaged one, or has no codes; a package is missing; the
            target is there already, or would be larger than the 2 GB that an ONNX file may have. Nothing has been written.
    """
    source, target = Path(source), Path(target)
    if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        raise CompressionError(needs_extra("Unpacking an ONNX file", listing(missing), "onnx"))
    if not source.is_file():
        raise CompressionError(f"There is no file '{source}'. {ADVICE}")
    if os.path.lexists(target):
        raise CompressionError(f"'{target}' is there already; pass a file that does not exist yet.")
    if not target.parent.is_dir():
        raise CompressionError(f"'{target}' cannot be written: there is no folder '{target.parent}'.")
    import onnx

    with refusing(f"'{source}' is no ONNX file", ADVICE):
        packed = Packed(onnx.load(source))
    if not packed.groups:
        raise CompressionError(
            f"'{source}' has nothing to unpack: no weight in it is computed from codes; use it as it is."
        )
    with whole_file(target) as file:
        # Messages one behind the other are one file, since readers of protobuf merge the graphs in them.
        file.write(packed.rest().SerializeToString())
        for name, value in (each for group in packed.groups for each in packed.values(group)):
            if file.tell() + value.nbytes > LARGEST_FILE:
                raise CompressionError(
                    f"'{source}' cannot be unpacked: an ONNX file may have 2 GB, and this one would be larger; "
                    "make a session of the file as it is."
                )
            tensor = onnx.numpy_helper.from_array(value, name)
            file.write(onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString())
    return target


@dataclass(frozen=True)
class Group:
    """Values that are computed together.

    Attributes:
        names: of the values.
        nodes: numbers of all nodes that they are computed by.
        constants: names of the initializers that those take.
        size: bytes of these.
    """

    names: tuple[str, ...]
    nodes: frozenset[int]
    constants: frozenset[str]
    size: int


class Packed:
    """What in a model is computed from constants alone, and taken by what is not.

    Attributes:
        groups: of such values, as they are unpacked together.
    """

    def __init__(self, model: ModelProto) -> None:
        """Find it; nothing is computed yet."""
        self.model, self.graph = model, model.graph
        given = {value.name for value in self.graph.input}  # which a caller may pass otherwise
        self.constants = {value.name: value for value in self.graph.initializer if value.name not in given}
        self.made: dict[str, int] = {}  # name of a value → the number of its node
        asked = {value.name: None for value in self.graph.output}
        for number, node in enumerate(self.graph.node):
            if _is_folded(node) and all(name in self.constants or name in self.made for name in _taken(node)):
                self.made.update(dict.fromkeys(node.output, number))
            else:
                asked.update(dict.fromkeys(_taken(node)))
        self.groups = _joined(_merged([self._group(name) for name in asked if name in self.made]))

    def _group(self, name: str) -> Group:
        """Return what a value is computed by."""
        nodes: set[int] = set()
        constants: set[str] = set()
        waiting = [name]
        while waiting:
            value = waiting.pop()
            if value not in self.made:
                constants.add(value)
            elif self.made[value] not in nodes:
                nodes.add(self.made[value])
                waiting += _taken(self.graph.node[self.made[value]])
        size = sum(_size(self.constants[each]) for each in constants)
        return Group((name,), frozenset(nodes), frozenset(constants), size)

    def rest(self) -> ModelProto:
        """Return the model without the groups and all that they alone take."""
        from onnx import ModelProto

        done = {name for group in self.groups for name in group.names}
        asked = {value.name for value in self.graph.output}
        nodes = []
        for node in reversed(self.graph.node):
            if not asked.isdisjoint(set(node.output) - done):
                nodes.append(node)
                asked.update(_taken(node))
        rest = ModelProto()
        _copy(self.model, rest, "graph")
        _copy(self.graph, rest.graph, "node", "initializer", "value_info")
        rest.graph.node.extend(reversed(nodes))
        rest.graph.initializer.extend(value for value in self.graph.initializer if value.name in asked)
        return rest

    def values(self, group: Group) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Compute the values of a group, and yield them with their names."""
        import numpy as np
        import onnxruntime
        from onnx import ModelProto, ValueInfoProto

        part = ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        part.graph.name = "part"
        part.graph.node.extend(self.graph.node[number] for number in sorted(group.nodes))
        part.graph.initializer.extend(self.constants[name] for name in group.constants)
        part.graph.output.extend(ValueInfoProto(name=name) for name in group.names)
        options = onnxruntime.SessionOptions()
        # What is no longer needed is given back at once; folding would keep it.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.intra_op_num_threads = 1  # as folding has: sums in the same order
        with refusing("ONNX Runtime does not compute what this file holds", ADVICE):
            session = onnxruntime.InferenceSession(
                part.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            values = session.run(group.names, {})
        for name, value in zip(group.names, values, strict=True):
            yield name, np.asarray(value)


def _is_folded(node: NodeProto) -> bool:
    """Return whether a session computes a node beforehand if all that it takes is constant."""
    inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    return node.domain in ("", "ai.onnx") and node.op_type not in NOT_FOLDED and not inner


def _taken(node: NodeProto) -> list[str]:
    """Return the names of all values that a node takes, those of graphs within it included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names += [name for inner in graph.node for name in _taken(inner)]
            names += [value.name for value in graph.output]
    return names


def _size(constant: TensorProto) -> int:
    """Return bytes of a constant; shapes and places, which are no codes, count for nothing."""
    from onnx import TensorProto

    return 0 if constant.data_type in (TensorProto.INT64, TensorProto.BOOL) else constant.ByteSize()


def _merged(groups: list[Group]) -> list[Group]:
    """Return groups of which none is computed on the way to another, as scales may be; small ones are left out."""
    found: list[Group] = []
    for group in sorted(groups, key=lambda each: len(each.nodes), reverse=True):
        place = next((i for i, other in enumerate(found) if group.nodes <= other.nodes), None)
        if place is not None:
            found[place] = replace(found[place], names=found[place].names + group.names)
        elif group.size >= SMALL:
            found.append(group)
    return found


def _joined(groups: list[Group]) -> list[Group]:
    """Return groups of which small ones are one."""
    found: list[Group] = []
    for group in sorted(groups, key=lambda each: each.size):
        if found and found[-1].size + group.size <= TOGETHER:
            last = found.pop()
            constants = last.constants | group.constants
            group = Group(last.names + group.names, last.nodes | group.nodes, constants, last.size + group.size)
        found.append(group)
    return found


def _copy(source: Any, target: Any, *left_out: str) -> None:
    """Copy the fields of a message but some."""
    for field, value in source.ListFields():
        if field.name in left_out:
            continue
        if isinstance(value, int | float | str | bytes):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)
