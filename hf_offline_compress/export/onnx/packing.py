"""Integers of a few bits in ONNX, packed in planes whose bits divide a byte, so that bytes are all it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import FLOAT, INT32, Array, GraphBuilder, int32, integers, to_numpy
from .source import some_rows


def unpack_codes(graph: GraphBuilder, codes: Array, bits: int, ids: ir.Value | None = None) -> ir.Value:
    """Return a graph's value that is codes [rows, count], stored in about `bits` bits each.

    Codes of 3 bits, say, are stored as a plane of their 2 high bits and one of the low bit.

    Args:
        graph: the graph.
        codes: below 2ᵇ, at least one row.
        bits: of a code, up to 16.
        ids: of rows, [n]; then those alone are unpacked.

    Returns:
        uint8, or for more than 8 bits int32.
    """
    if bits > 8:
        high = graph.cast(unpack_codes(graph, codes >> 8, bits - 8, ids), INT32)
        low = graph.cast(unpack_codes(graph, codes & 255, 8, ids), INT32)
        return graph("Add", graph("Mul", high, int32(256)), low)
    count, left = codes.shape[1], bits
    value: ir.Value | None = None
    for plane in (8, 4, 2, 1):
        while left >= plane:
            left -= plane
            part = _plane(graph, (codes >> left) & (2**plane - 1), plane, ids)
            if left:
                part = graph("BitShift", part, np.array([left], np.uint8), direction="LEFT")
            value = part if value is None else graph("BitwiseOr", value, part)
    assert value is not None
    return graph.slice(value, 0, count, 1) if count % 8 and bits < 8 else value


def numbers(graph: GraphBuilder, module: Any, name: str) -> ir.Value:
    """Return a parameter of a compressed module, packed or not, float32."""
    if name not in module.packed:
        return graph.constant(to_numpy(getattr(module, name).float()))
    bits, sharing, shape = module.__dict__["_packed"][name]
    codes, scales, zeros = _parts(module, name)
    padded = np.pad(codes, (0, -len(codes) % sharing)).reshape(-1, sharing)
    halves = _halves(graph, unpack_codes(graph, padded, bits), _column(graph, zeros, bits + 1))
    values = graph("Mul", halves, scales[:, None] / 2)
    if padded.size != len(codes):
        values = graph.slice(graph.reshape(values, -1), 0, len(codes), 0)
    values = graph.reshape(values, shape[-1], *shape[:-1])
    return values if len(shape) == 1 else graph("Transpose", values, perm=[*range(1, len(shape)), 0])


def number_rows(graph: GraphBuilder, module: Any, name: str, ids: ir.Value) -> ir.Value:
    """Return rows [n, ...] of a parameter [rows, width] or [rows] of a compressed module, packed or not, float32."""
    if name not in module.packed:
        return some_rows(graph, to_numpy(getattr(module, name).float()), ids)
    bits, sharing, shape = module.__dict__["_packed"][name]
    codes, scales, zeros = _parts(module, name)
    rows, width = shape[0], shape[1] if len(shape) > 1 else 1
    here = unpack_codes(graph, codes.reshape(width, rows).T, bits, ids)
    # Numbers are packed column by column, and neighbours share a scale.
    places = graph("Add", graph("Unsqueeze", ids, integers(1)), integers(*(np.arange(width) * rows)))
    groups = graph("Div", places, integers(sharing))
    halves = _halves(graph, here, graph("Gather", graph.reshape(_column(graph, zeros, bits + 1), -1), groups))
    values = graph("Mul", halves, graph("Gather", scales / 2, groups))
    return values if len(shape) > 1 else graph.reshape(values, -1)


def _halves(graph: GraphBuilder, codes: ir.Value, zeros: ir.Value) -> ir.Value:
    """Return what codes are, in half steps, float32."""
    doubled = graph("Mul", graph.cast(codes, FLOAT), np.float32(2))
    return graph("Sub", doubled, graph.cast(zeros, FLOAT))


def _parts(module: Any, name: str) -> tuple[Array, Array, Array]:
    """Return codes, scales (float32) and zeros of a packed parameter."""
    from ...runtime.packing_compressed import unpack

    bits, _, shape = module.__dict__["_packed"][name]
    codes, scales, zeros = (getattr(module, f"{name}_{part}") for part in ("codes", "scales", "zeros"))
    return (
        to_numpy(unpack(codes, bits, int(np.prod(shape)))),
        to_numpy(scales.float()),
        to_numpy(unpack(zeros, bits + 1, len(scales))),
    )


def _column(graph: GraphBuilder, codes: Array, bits: int) -> ir.Value:
    """Return packed codes [count] as [count, 1]."""
    return graph.reshape(unpack_codes(graph, codes[None], bits), -1, 1)


def _plane(graph: GraphBuilder, codes: Array, bits: int, ids: ir.Value | None) -> ir.Value:
    """Return codes of 1, 2, 4 or 8 bits, as many as fill whole bytes of single bits."""
    together = 8 // bits
    padded = codes if bits == 8 else np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    shifts = (bits * np.arange(together)).astype(np.uint8)
    parts = padded.astype(np.uint8).reshape(len(padded), -1, together) << shifts
    packed: Any = graph.constant(np.bitwise_or.reduce(parts, axis=2))
    if ids is not None:
        packed = graph("Gather", packed, ids)
    if bits == 8:
        return packed
    spread = graph("BitShift", graph("Unsqueeze", packed, integers(2)), shifts, direction="RIGHT")
    # −1 is not for what may have no rows.
    return graph.reshape(graph("BitwiseAnd", spread, np.array([2**bits - 1], np.uint8)), 0, padded.shape[1])
