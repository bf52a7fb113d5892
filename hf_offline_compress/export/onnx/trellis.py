"""Trellis codes in ONNX: a window of the stream of codes is an index into a table of the weights that it stands for.

The codes are stored in another order of bits than in the folder, in as many bytes: the first code first, its high bit
first, so that the window of a state ends with its newest code and nothing has to be reversed. A window ends with several
codes, as many as a table of 65,536 entries allows, so that one lookup decodes all of them: few and narrow steps, since a
session keeps what it folds until all is folded. A convolution cuts the windows out of the bytes, all its numbers being
whole and below 2²⁴.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import FLOAT, INT32, INT64, Array, GraphBuilder, float32, int32, integers, narrowest, to_numpy
from .packing import unpack_codes
from .source import LARGEST, Int8Matrix, Source

# Bytes of zeros before the first code of a stream, so that every window has as many bytes.
BEFORE = 2
# Bits of the widest window: of as large a table.
WIDEST = 16


@dataclass(frozen=True)
class Streams:
    """The streams of one class of rows, as the file keeps them.

    Attributes:
        count: streams.
        run: rows of a stream.
        blocks: codes of a row.
        bits: of a code.
        width: weights of a code.
        state_bits: of a state.
        rows: of the class.
        stream_bytes: of a stream, with the zeros before and behind it.
        first: its first byte among the weight's.
    """

    count: int
    run: int
    blocks: int
    bits: int
    width: int
    state_bits: int
    rows: int
    stream_bytes: int
    first: int

    @property
    def codes(self) -> int:
        """Codes that are looked up at once."""
        return next(k for k in (4, 2, 1) if self.state_bits + (k - 1) * self.bits <= WIDEST or k == 1)

    @property
    def window(self) -> int:
        """Bits of a window."""
        return self.state_bits + (self.codes - 1) * self.bits

    @property
    def lookups(self) -> int:
        """Lookups after which the codes begin with a whole byte again."""
        return 8 // gcd(8, self.codes * self.bits)


def pack_streams(weight: Any) -> tuple[Array, list[Streams]]:
    """Return the codes of a weight as the file keeps them, uint8, and where the streams of each class are."""
    from ...runtime.packing_compressed import unpack

    parts, found, first = [], [], 0
    for kind, (start, end) in zip(weight.row_classes, weight.bounds, strict=True):
        packed = weight.codes[kind.first : kind.stop].view(kind.streams, kind.length)
        codes = to_numpy(unpack(packed, kind.bits, kind.steps))[:, ::-1]
        streams = Streams(
            kind.streams, kind.run, kind.blocks, kind.bits, kind.width, kind.state_bits, end - start, 0, first
        )
        together = streams.lookups * streams.codes
        codes = np.pad(codes, ((0, 0), (0, -kind.steps % together)))
        bits = (codes[:, :, None] >> np.arange(kind.bits)[::-1]) & 1
        stored = np.packbits(bits.reshape(kind.streams, -1).astype(np.uint8), axis=1)
        stored = np.pad(stored, ((0, 0), (BEFORE, 0)))
        found.append(replace(streams, stream_bytes=stored.shape[1]))
        parts.append(stored.ravel())
        first += stored.size
    return np.concatenate(parts), found


class Trellis(Source):
    """Trellis codes."""

    def __init__(self, graph: GraphBuilder, weight: Any) -> None:
        """Store the codes; see the base class."""
        super().__init__(graph, weight)
        self.run = weight.run
        codes, self.classes = pack_streams(weight)
        self.codes = graph.constant(codes)
        self.scale_codes = graph.constant(to_numpy(weight.scales))
        low, self.step = to_numpy(weight.scale_range.float())
        self.low = low
        self.tables = [self._table(streams) for streams in self.classes]

    def int8(self) -> Int8Matrix:
        """Return the weight as integers, with a scale for each row.

        They are gathered from a table of integers. In rows with outliers beyond the table they are made smaller.
        """
        graph, scales = self.graph, self._scales(self.scale_codes)
        peak = max(float(np.abs(table).max()) for table in self.tables)
        tables = [np.rint(table * (LARGEST / peak)).astype(np.int8) for table in self.tables]
        value = self._in_order([self._decoded(s, t) for s, t in zip(self.classes, tables, strict=True)])
        unit = float32(peak / LARGEST)
        if not self.weight.outliers:
            return Int8Matrix(value, graph("Mul", scales, unit))
        exact = to_numpy(self.weight.dense_weight().double())
        own = to_numpy(self.weight._scales(self.weight.scales).double())
        largest = np.abs(exact).max(axis=1) / own
        parts = np.clip(np.floor(LARGEST * peak / np.maximum(largest, peak)), 1, LARGEST)  # of the row's own scale
        if (parts < LARGEST).any():
            stored = graph.cast(parts.astype(np.uint8), FLOAT)
            zeros = graph("Expand", np.zeros(1, np.int8), integers(self.rows))
            value = graph(
                "QuantizeLinear", graph.cast(value, FLOAT), graph("Div", float32(LARGEST), stored), zeros, axis=1
            )
            scales = graph("Div", graph("Mul", scales, float32(peak)), stored)
        else:
            scales = graph("Mul", scales, unit)
        rows, columns = self._outlier_places()
        steps = (own * peak / parts)[rows]
        numbers = np.clip(np.rint(exact[rows, columns] / steps), -LARGEST, LARGEST).astype(np.int8)
        return Int8Matrix(graph("ScatterND", value, self._places(columns, rows), numbers), scales)

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        graph = self.graph
        value = self._in_order([self._decoded(s, t) for s, t in zip(self.classes, self.tables, strict=True)])
        value = graph("Mul", value, self._scales(self.scale_codes))
        if not self.weight.outliers:
            return value
        rows, columns = self._outlier_places()
        return graph("ScatterND", value, self._places(columns, rows), self._outlier_values(), reduction="add")

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        graph = self.graph
        order = self._order()
        places = ids if order is None else graph("Gather", order[1], ids)
        places = graph.cast(places, INT32)
        widths = sorted({streams.width for streams in self.classes})
        starts = np.cumsum([0, *(streams.rows for streams in self.classes[:-1])])
        if len(self.classes) == 1:
            kind = None
        else:
            behind = graph("GreaterOrEqual", graph("Unsqueeze", places, integers(1)), int32(starts[None, 1:]))
            kind = graph("ReduceSum", graph.cast(behind, INT32), integers(1), keepdims=0)
        if len(widths) == 1:
            rows = self._some_rows(places, kind, starts, list(range(len(self.classes))))
        else:
            rows = self._by_width(places, kind, starts, widths)
        scales = self._scales(graph("Gather", self.scale_codes, ids))
        rows = graph("Mul", rows, graph("Unsqueeze", scales, integers(1)))
        return self._with_outliers(rows, ids) if self.weight.outliers else rows

    def _by_width(self, places: ir.Value, kind: Any, starts: Array, widths: Sequence[int]) -> ir.Value:
        """Return rows of classes whose codes stand for one weight, and for two, each decoded by itself."""
        graph, parts, found = self.graph, [], []
        of_width = graph("Gather", int32([streams.width for streams in self.classes]), kind)
        for width in widths:
            at = graph.reshape(graph("NonZero", graph("Equal", of_width, int32(width))), -1)
            chosen = [i for i, streams in enumerate(self.classes) if streams.width == width]
            numbers = np.zeros(len(self.classes), np.int32)
            numbers[chosen] = np.arange(len(chosen))
            own = graph("Gather", numbers, graph("Gather", kind, at))
            parts.append(self._some_rows(graph("Gather", places, at), own, starts, chosen))
            found.append(at)
        order = graph("Unsqueeze", graph.concat(found, 0), integers(1))
        rows = graph.concat(parts, 0)
        return graph("ScatterND", rows, order, rows)

    def _some_rows(self, places: ir.Value, kind: ir.Value | None, starts: Array, chosen: list[int]) -> ir.Value:
        """Return rows [n, columns], not yet scaled, of classes of one width.

        Args:
            graph: the graph.
            places: of the rows in the order of the streams, [n].
            kind: of each row, its class among the chosen ones, [n]; None where there is one.
            starts: first row of each class.
            chosen: classes.
        """
        graph = self.graph
        classes = [self.classes[i] for i in chosen]
        offsets = np.cumsum([0, *(2**streams.state_bits for streams in classes[:-1])])
        facts = int32(
            [
                (starts[i], streams.first, streams.stream_bytes, streams.bits, 2**streams.state_bits, offset)
                for i, streams, offset in zip(chosen, classes, offsets, strict=True)
            ]
        )
        own = facts if kind is None else graph("Gather", facts, kind)
        start, first, length, bits, states, offset = (graph.slice(own, i, i + 1, 1) for i in range(facts.shape[1]))
        place = graph("Sub", graph("Unsqueeze", places, integers(1)), start)
        stream = graph("Div", place, int32(self.run))
        within = graph("Sub", place, graph("Mul", stream, int32(self.run - 1)))  # + 1, and stream · 1
        within = graph("Sub", within, stream)
        blocks = int32(np.arange(classes[0].blocks) * self.run + 1)[None]
        last = graph("Sub", graph("Mul", graph("Add", within, blocks), bits), int32(1 - 8 * BEFORE))  # bit
        byte = graph("Div", last, int32(8))
        unused = graph("Sub", int32(7), graph("Sub", last, graph("Mul", byte, int32(8))))
        at = graph("Add", byte, graph("Add", first, graph("Mul", stream, length)))
        window = graph.cast(graph("Gather", self.codes, at), INT32)
        widest = max(streams.state_bits + 8 - gcd(8, streams.bits) for streams in classes)
        for i in range(1, -(-widest // 8)):
            more = graph.cast(graph("Gather", self.codes, graph("Sub", at, int32(i))), INT32)
            window = graph("Add", window, graph("Mul", more, int32(256**i)))
        window = graph("Div", window, graph("Gather", int32(2 ** np.arange(8)), unused))
        state = graph("Add", graph("Mod", window, states), offset)
        tables = graph.concat([self.tables[i] for i in chosen], 0)
        rows = graph.reshape(graph("Gather", tables, state), -1, classes[0].blocks * classes[0].width)
        return graph.slice(rows, 0, self.columns, 1)

    def _decoded(self, streams: Streams, table: Array) -> ir.Value:
        """Return what the streams of a class stand for, [columns, rows], not yet scaled, in the table's dtype."""
        graph, codes, width = self.graph, streams.codes, streams.width
        size = streams.count * streams.stream_bytes
        own = graph.slice(self.codes, streams.first, streams.first + size, 0) if len(self.classes) > 1 else self.codes
        bits = graph.cast(graph.reshape(own, streams.count, 1, streams.stream_bytes), FLOAT)
        kernel, exact = _kernel(streams)
        windows = graph("Conv", bits, kernel, strides=[streams.lookups * codes * streams.bits // 8])
        windows = graph.cast(windows, INT32)
        if not exact:
            windows = graph("BitwiseAnd", windows, int32(2**streams.window - 1))
        values = graph("Gather", self._of_windows(streams, table), windows)
        # [streams, lookups, groups, codes · width]; a row's codes lie `run` apart
        together = streams.lookups * codes
        if streams.run % together == 0:
            shape = (streams.count, streams.lookups, streams.blocks, streams.run // together, codes, width)
            order = [2, 5, 0, 3, 1, 4]
            values = graph("Transpose", graph.reshape(values, *shape), perm=order)
        else:
            values = graph("Transpose", values, perm=[0, 2, 1, 3])
            values = graph.reshape(values, streams.count, -1, width)
            values = graph.slice(values, 0, streams.blocks * streams.run, 1)
            values = graph.reshape(values, streams.count, streams.blocks, streams.run, width)
            values = graph("Transpose", values, perm=[1, 3, 0, 2])
        values = graph.reshape(values, streams.blocks * width, streams.count * streams.run)
        if streams.blocks * width > self.columns:
            values = graph.slice(values, 0, self.columns, 0)
        return graph.slice(values, 0, streams.rows, 1) if streams.count * streams.run > streams.rows else values

    def _of_windows(self, streams: Streams, table: Array) -> ir.Value:
        """Return the weights of all windows, [windows, codes · width]."""
        if streams.codes == 1:
            return self.graph.constant(table)
        graph = self.graph
        all_windows = graph("Range", int32(0), int32(2**streams.window), int32(1))
        shifts = int32(2 ** (streams.bits * np.arange(streams.codes)[::-1]))
        states = graph("Div", graph("Unsqueeze", all_windows, integers(1)), shifts[None])
        states = graph("BitwiseAnd", states, int32(2**streams.state_bits - 1))
        return graph.reshape(graph("Gather", table, states), 0, streams.codes * streams.width)

    def _in_order(self, parts: list[ir.Value]) -> ir.Value:
        """Return parts [columns, rows of a class] as one, its rows in their own order."""
        order = self._order()
        whole = self.graph.concat(parts, 1)
        return whole if order is None else self.graph("Gather", whole, order[1], axis=1)

    def _order(self) -> tuple[ir.Value, ir.Value] | None:
        """Return the rows as the streams have them, and where each row is among them, both [rows], int64."""
        if not self.weight.class_bits:
            return None
        graph, rows = self.graph, self.rows
        from ...runtime.packing_compressed import unpack

        kinds = to_numpy(unpack(self.weight.classes, self.weight.class_bits, rows))
        kinds_of_rows = graph.cast(unpack_codes(graph, kinds[None], self.weight.class_bits), INT64)
        numbers = graph("Range", integers(0)[0], integers(rows)[0], integers(1)[0])
        keys = graph("Add", graph("Mul", graph.reshape(kinds_of_rows, -1), integers(rows)), numbers)
        _, order = graph.outputs("TopK", 2, keys, integers(rows), largest=0)
        return order, graph("ScatterElements", order, order, numbers)

    def _scales(self, codes: ir.Value) -> ir.Value:
        """Return the scales of bytes, float32."""
        graph = self.graph
        steps = graph("Mul", graph.cast(codes, FLOAT), float32(self.step))
        return graph("Pow", float32(2), graph("Add", steps, float32(self.low)))

    def _table(self, streams: Streams) -> Array:
        from ...runtime.trellis_compressed import trellis_table

        return to_numpy(trellis_table(streams.state_bits, streams.width, streams.bits))

    def _outlier_places(self) -> tuple[Array, Array]:
        rows, columns = self.weight._outlier_places()
        return to_numpy(rows), to_numpy(columns)

    def _outlier_values(self) -> Array:
        return to_numpy(self.weight.outlier_values.float())

    def _places(self, *indices: Array) -> ir.Value:
        """Return indices [n] as those of ScatterND, [n, axes], int64."""
        columns = [self.graph.cast(narrowest(index)[:, None], INT64) for index in indices]
        return self.graph.concat(columns, 1)

    def _with_outliers(self, rows: ir.Value, ids: ir.Value) -> ir.Value:
        """Return rows [n, columns] with the outliers that lie in them, which are sorted by rows."""
        graph = self.graph
        at_rows, columns = self._outlier_places()
        stored = graph.cast(narrowest(at_rows), INT64)
        ones = graph("Expand", int32(1), integers(len(at_rows)))
        none = graph("Expand", int32(0), integers(self.rows))
        counts = graph("ScatterElements", none, stored, ones, reduction="add")
        firsts = graph("Sub", graph("CumSum", counts, int32(0)), counts)
        own = graph("Unsqueeze", graph("Gather", counts, ids), integers(1))
        most = graph("ReduceMax", counts, keepdims=0)
        several = graph("Range", int32(0), most, int32(1))
        there = graph("Less", several, own)  # [n, most]
        which = graph("Add", graph("Unsqueeze", graph("Gather", firsts, ids), integers(1)), several)
        which = graph("Mul", which, graph.cast(there, INT32))  # places beyond the last
        values = graph("Mul", graph("Gather", self._outlier_values(), which), graph.cast(there, FLOAT))
        at_columns = graph.cast(graph("Gather", narrowest(columns), which), INT64)
        count = graph("Shape", ids)
        numbers = graph("Range", integers(0)[0], graph("Squeeze", count, integers(0)), integers(1)[0])
        at_rows_here = graph("Expand", graph("Unsqueeze", numbers, integers(1)), graph("Shape", which))
        places = graph.concat([graph("Unsqueeze", at, integers(2)) for at in (at_rows_here, at_columns)], 2)
        return graph("ScatterND", rows, places, values, reduction="add")


def _kernel(streams: Streams) -> tuple[Array, bool]:
    """Return the convolution that cuts windows out of bytes, [lookups, 1, bytes], and whether they have no other bits."""
    step = streams.codes * streams.bits
    kernel = np.zeros((streams.lookups, 1, streams.lookups * step // 8 + BEFORE), np.float32)
    exact = True
    for i in range(streams.lookups):
        end = (i + 1) * step
        last = -(-end // 8) - 1
        unused = 8 * (last + 1) - end
        spanned = -(-(streams.window + unused) // 8)
        exact &= 8 * spanned == streams.window + unused
        for back in range(spanned):
            kernel[i, 0, last + BEFORE - back] = 256.0**back / 2**unused
    return kernel, exact
