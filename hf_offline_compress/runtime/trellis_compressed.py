"""Trellis codes: how a stream of overlapping codes becomes a weight."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .packing_compressed import packed_length, spanned_bytes, unpack
from .weights_compressed import DecodedWeight

GOLDEN = 0.6180339887498949
# What the spiral turns by from one value of the older bits to the next, of a full turn: with codes of up to 4 bits, and
# with longer ones. Neither comes near to a fraction of small numbers; which is better was measured.
TURNS = (0.5698402909980532, 0.4142135623730951)
# Bits of a code → standard deviation of the values. Where the nearest of many is taken, values lie more widely than what
# they stand for; where most of the choice is in the path, less so. Single weights have codes of 5 and 6 bits.
SPREAD = {1: 0.95, 2: 0.97, 3: 1.0, 4: 1.04, 5: 1.1, 6: 1.12, 7: 1.15, 8: 1.17}
SPREAD_OF_SINGLES = {5: 1.38, 6: 1.4}
# Weights that are decoded at once on a CPU. What is on the way stays in its cache, and each operation on one thread: for
# so little work, waiting for other threads takes longer, by far where other processes use the cores too.
WEIGHTS_AT_ONCE = 2**15
# Bytes of an entry of the table → the numbers that it is moved as: one lookup moves all weights of a code.
ENTRIES = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def trellis_table(state_bits: int, width: int, bits: int) -> Tensor:
    """Return the values that states stand for, [2^state_bits, width], float32.

    Whatever the older bits of a state, its newest code chooses among 2^bits values that cover the normal distribution
    evenly by themselves: quantiles, or for two weights a code the points of a spiral. The older bits shift them, within a
    quantile and around the spiral, so that all states together lie as densely as that many values can.

    Args:
        state_bits: of a state, of which the newest code is the lowest bits.
        width: weights that a code stands for, 1 or 2.
        bits: of a code.
    """
    return _trellis_table(state_bits, width, bits)


@lru_cache
def _trellis_table(state_bits: int, width: int, bits: int) -> Tensor:
    states = torch.arange(2**state_bits, device="cpu")  # kept, so on the device of no context
    code, older = (states % 2**bits).double(), (states >> bits).double()
    share = (code + (older * GOLDEN + 0.5) % 1) / 2**bits
    if width == 1:
        return SPREAD_OF_SINGLES[bits] * torch.special.ndtri(share).float()[:, None]
    turn = TURNS[bits > 4]
    radius = SPREAD[bits] * (-2 * torch.log(1 - share)).sqrt()
    angle = 2 * math.pi * ((code * GOLDEN + older * turn) % 1)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).float()


def decode_scales(codes: Tensor, bounds: Tensor) -> Tensor:
    """Return scales of bytes: evenly spaced logarithms, from 2^bounds[0] in 255 steps of bounds[1]."""
    low, step = bounds.float()
    return torch.exp2(low + codes.float() * step)


def _inverse(order: Tensor) -> Tensor:
    """Return where each of the items is that are in an order [items]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class RowClass:
    """Streams of one rate.

    Attributes:
        columns: of the weight.
        run: rows of a stream.
        streams: how many there are.
        bits, width, state_bits: of a code, and of a state.
        first, stop: where its codes begin and end among the weight's.
    """

    def __init__(self, entry: dict[str, int], columns: int, run: int, first: int) -> None:
        """Lay out the codes of a class."""
        self.columns, self.run, self.streams = columns, run, entry["streams"]
        self.bits, self.width, self.state_bits = entry["bits"], entry["width"], entry["state_bits"]
        self.blocks = -(-columns // self.width)
        self.steps = self.blocks * run
        self.length = packed_length(self.steps, self.bits)
        self.first, self.stop = first, first + self.streams * self.length
        self.spanned = spanned_bytes(self.bits, self.state_bits)
        # Codes of a block of columns that begin with a byte, and are enough to look at the next block only.
        self.in_bytes = run * self.bits % 8 == 0 and run * self.bits // 8 >= self.spanned - 1

    def streams_of(self, codes: Tensor, first: int, last: int, scales: Tensor) -> Tensor:
        """Return the rows of streams `first` to before `last`, [rows, columns], times scales [rows]."""
        if not self.in_bytes:
            rows = torch.arange(first * self.run, last * self.run, device=codes.device)
            return self.rows_of(codes, rows, scales)
        codes = codes[self.first : self.stop].view(self.streams, self.length)
        at_once = self._at_once(codes, self.length, last - first)
        row = torch.arange(at_once * self.run, device=codes.device)
        bit = (self.run - 1 - row % self.run) * self.bits  # a stream is stored from its end to its beginning
        at = row // self.run * (self.run * self.bits // 8) + (bit >> 3)
        shift = (bit & 7).to(torch.int32)[:, None]
        values = self._empty(len(scales), scales)
        for stream in range(first, last, at_once):
            windows = self._windows(codes[stream : min(stream + at_once, last)])

            def states(part: slice, windows: Tensor = windows) -> Tensor:
                return (windows.index_select(0, at[part]) >> shift[part]).bitwise_and_(2**self.state_bits - 1)

            part = slice((stream - first) * self.run, (stream - first + at_once) * self.run)
            self._look_up(states, values[part], scales[part])
        return self._scaled(values, scales)

    def rows_of(self, codes: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
        """Return rows of the class [rows, columns], wherever their codes begin, times scales [rows]."""
        codes = codes[self.first : self.stop]
        values = self._empty(len(rows), scales)
        self._look_up(lambda part: self._states_of(codes, rows[part]), values, scales)
        return self._scaled(values, scales)

    def _at_once(self, codes: Tensor, each: int, count: int) -> int:
        """Return how many of `count` rows or streams are decoded at once, of so many weights or bytes each."""
        # A compiler fuses the operations itself, and a GPU is better off with a few large ones.
        whole = torch.compiler.is_compiling() or codes.device.type != "cpu"
        # What is too much for one thread even singly is left to all of them, in few operations.
        return count if whole or each > WEIGHTS_AT_ONCE else max(1, WEIGHTS_AT_ONCE // each)

    def _table(self, like: Tensor) -> Tensor:
        """Return the table with each entry, of all weights of a code, as one number, [entries]."""
        table = trellis_table(self.state_bits, self.width, self.bits).to(like)
        return table.view(ENTRIES[self.width * table.element_size()]).flatten()

    def _empty(self, rows: int, like: Tensor) -> Tensor:
        """Return where entries of the table go, [rows, blocks]."""
        return torch.empty(rows, self.blocks, dtype=self._table(like).dtype, device=like.device)

    def _look_up(self, states: Callable[[slice], Tensor], values: Tensor, scales: Tensor) -> None:
        """Fill `values` [rows, blocks] with the table's entries for states of some of the rows, [some, blocks].

        Without gradients they are scaled here, while they are in the cache; see `_scaled`.
        """
        table = self._table(scales)
        at_once = self._at_once(values, self.columns, len(values))
        for first in range(0, len(values), at_once):
            some = slice(first, min(first + at_once, len(values)))
            torch.index_select(table, 0, states(some).flatten(), out=values[some].view(-1))
            if not torch.is_grad_enabled():
                values[some].view(scales.dtype).mul_(scales[some, None])

    def _scaled(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return entries of the table [rows, blocks] as numbers [rows, columns], scaled."""
        rows = values.view(scales.dtype)[:, : self.columns]
        # Gradients take one operation on all rows.
        return rows.mul_(scales[:, None]) if torch.is_grad_enabled() else rows

    def _windows(self, codes: Tensor) -> Tensor:
        """Return what begins with each byte of streams, as numbers [streams · bytes of a block, blocks].

        The bytes are few beside the weights, so it is they that are brought into the order of the weights: blocks are
        stored from the last to the first.
        """
        size = self.run * self.bits // 8
        # [streams, blocks + 1, size]: behind the first block, which is stored last, there are zeros.
        stored = torch.nn.functional.pad(codes, (0, size)).unflatten(1, (-1, size)).flip(1)
        following = stored[:, :-1, : self.spanned - 1]
        ordered = torch.cat([stored[:, 1:], following], dim=2).transpose(1, 2).to(torch.int32)
        windows = ordered[:, :size].contiguous()
        for i in range(1, self.spanned):
            windows |= ordered[:, i : i + size] << (8 * i)
        return windows.flatten(0, 1)

    def _states_of(self, codes: Tensor, rows: Tensor) -> Tensor:
        """Return the states of rows, [rows] → [rows, blocks], wherever their codes begin."""
        rows = rows.to(torch.int32)[:, None]
        blocks = torch.arange(self.blocks, device=rows.device, dtype=torch.int32)
        step = blocks * self.run + rows % self.run
        first = (self.steps - 1 - step) * self.bits  # a stream is stored from its end to its beginning
        at = (first >> 3) + (rows // self.run) * self.length
        states = torch.zeros_like(first)
        for i in range(self.spanned):
            place = (at + i).clamp_max(len(codes) - 1).flatten()
            states |= codes.index_select(0, place).view_as(states).to(torch.int32) << (8 * i)
        # Bits of the codes before the first one are zeros.
        known = ((step + 1) * self.bits).clamp_max(self.state_bits)
        return (states >> (first & 7)) & ((1 << known) - 1)


class TrellisWeight(DecodedWeight):
    """Ŵ from streams of overlapping codes, times a scale for each row, and outliers.

    Rows fall into classes, each of a rate of its own. In the streams, one class lies after the other; within a class rows
    keep their order.
    """

    def make_tensors(self, group: dict[str, Any]) -> None:
        """Make codes, scales, classes and outliers; see the base class."""
        self.run, self.outliers = group["run"], group["outliers"]
        self.row_classes: list[RowClass] = []
        self.bounds: list[tuple[int, int]] = []  # first row of each class, and end; the last class may lack rows
        codes = rows = 0
        for entry in group["classes"]:
            self.row_classes.append(RowClass(entry, self.columns, self.run, codes))
            codes, first, rows = self.row_classes[-1].stop, rows, rows + self.run * entry["streams"]
            self.bounds.append((first, min(rows, self.rows)))
        self.class_bits = (len(self.bounds) - 1).bit_length()
        self.row_bits, self.column_bits = (max(1, (n - 1).bit_length()) for n in (self.rows, self.columns))
        self.codes: Tensor
        self.scales: Tensor
        self.classes: Tensor
        self.outlier_rows: Tensor
        self.outlier_columns: Tensor
        self.register_buffer("codes", torch.empty(codes, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(self.rows, dtype=torch.uint8))
        self.scale_range = nn.Parameter(torch.empty(2))
        if self.class_bits:
            length = packed_length(self.rows, self.class_bits)
            self.register_buffer("classes", torch.empty(length, dtype=torch.uint8))
        if self.outliers:
            for name, bits in (("outlier_rows", self.row_bits), ("outlier_columns", self.column_bits)):
                packed = torch.empty(packed_length(self.outliers, bits), dtype=torch.uint8)
                self.register_buffer(name, packed)
            self.outlier_values = nn.Parameter(torch.empty(self.outliers))

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self.row_block(0, self.rows)

    def row_block(self, start: int, stop: int) -> Tensor:
        """Return rows of Ŵ from `start` to before `stop`; see the base class."""
        order = self._order()
        if order is None:
            parts = [(start, stop)]
        elif (start, stop) == (0, self.rows):
            parts = [(0, end - first) for first, end in self.bounds]
        elif torch.compiler.is_compiling():
            # How many of the rows are in a class is not known to a compiler.
            return self.some_rows(torch.arange(start, stop, device=self.codes.device))
        else:
            places, parts = _inverse(order), []
            order = places[start:stop].argsort()
            for first, end in self.bounds:
                inside = (places[:stop] >= first) & (places[:stop] < end)
                parts.append((int(inside[:start].sum()), int(inside.sum())))
        scales = self._scales(self.scales[start:stop])
        ordered = scales if order is None else scales[order]
        weight, end = scales.new_empty(0), 0
        for kind, (first, last) in zip(self.row_classes, parts, strict=True):
            at, end = end, end + last - first
            if at == end:
                continue
            part = self._part(kind, first, last, ordered[at:end])
            if order is None:
                weight = part
            else:
                weight = weight if len(weight) else part.new_empty(stop - start, self.columns)
                weight.index_copy_(0, order[at:end], part)
        if not self.outliers:
            return weight
        rows, columns = self._outlier_places()
        # Sizes must not depend on what is stored, for graphs: outliers of other rows add nothing, somewhere.
        here = (rows >= start) & (rows < stop)
        at_places = ((rows - start).clamp(0, stop - start - 1), columns)
        return weight.index_put_(at_places, self.outlier_values * here, accumulate=True)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        flat = ids.flatten()
        if self.outliers:
            flat = torch.cat([flat, flat.new_zeros(1)])  # a row for outliers of rows that are not asked for
        scales, order = self._scales(self.scales[flat]), self._order()
        if order is None:
            rows = self.row_classes[0].rows_of(self.codes, flat, scales)
        else:
            wanted = _inverse(order)[flat]
            rows = scales.new_zeros(len(flat), self.columns)
            for kind, (first, end) in zip(self.row_classes, self.bounds, strict=True):
                inside = (wanted >= first) & (wanted < end)
                if torch.compiler.is_compiling():
                    own = kind.rows_of(self.codes, (wanted - first).clamp(0, end - first - 1), scales)
                    rows = torch.where(inside[:, None], own, rows)
                else:
                    at = inside.nonzero().flatten()
                    rows.index_put_((at,), kind.rows_of(self.codes, wanted[at] - first, scales[at]))
        return (self._with_outliers(rows, flat) if self.outliers else rows).unflatten(0, ids.shape)

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        super().reset_parameters(std)
        # Both by a function that leaves alone what a checkpoint has filled.
        init.copy_(self.scale_range, self.scale_range.new_tensor([math.log2(std), 0.0]))
        if self.outliers:
            nn.init.zeros_(self.outlier_values)

    def _part(self, kind: RowClass, first: int, last: int, scales: Tensor) -> Tensor:
        """Return rows `first` to before `last` of a class [rows, columns], times scales [rows]."""
        begin, end = first // self.run, -(-last // self.run)  # streams
        before = first - begin * self.run
        scales = torch.nn.functional.pad(scales, (before, end * self.run - last))
        return kind.streams_of(self.codes, begin, end, scales)[before : before + last - first]

    def _order(self) -> Tensor | None:
        """Return the rows as the streams have them [rows], or None where that is their own order."""
        if not self.class_bits:
            return None
        return unpack(self.classes, self.class_bits, self.rows).argsort(stable=True)

    def _scales(self, codes: Tensor) -> Tensor:
        return decode_scales(codes, self.scale_range).to(self.scale_range.dtype)

    def _outlier_places(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the outliers, sorted by rows, both [outliers]."""
        rows = unpack(self.outlier_rows, self.row_bits, self.outliers).long()
        columns = unpack(self.outlier_columns, self.column_bits, self.outliers).long()
        # A model made from a config alone has bits of no meaning here.
        return rows.clamp_max(self.rows - 1), columns.clamp_max(self.columns - 1)

    def _with_outliers(self, decoded: Tensor, ids: Tensor) -> Tensor:
        """Return decoded rows [ids − 1, columns] with the outliers that lie in them; the last takes all others."""
        rows, columns = self._outlier_places()
        at = torch.arange(len(ids), device=ids.device)
        # Of rows that are asked for more than once, one is filled and then copied: sizes must not depend on the ids.
        taker = torch.full((self.rows,), len(ids) - 1, device=ids.device).scatter(0, ids[:-1], at[:-1])
        decoded = decoded.index_put_((taker[rows], columns), self.outlier_values, accumulate=True)
        return decoded[taker[ids[:-1]]]
