"""Trellis codes: how a stream of overlapping codes becomes a weight."""

import math
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .numbers_compressed import may_keep
from .packing_compressed import packed_length, unpack
from .seen_compressed import versions_of
from .specs_compressed import ClassSpec, TrellisSpec, WeightSpec
from .weights_compressed import DecodedWeight

GOLDEN = 0.6180339887498949
# What the spiral turns by from one value of the older bits to the next, of a full turn: with codes of up to 4 bits, and
# with longer ones. Neither comes near to a fraction of small numbers; which is better was measured.
TURNS = (0.5698402909980532, 0.4142135623730951)
# Bits of a code → standard deviation of the values. Where the nearest of many is taken, values lie more widely than what
# they stand for; where most of the choice is in the path, less so. Single weights have codes of 5 and 6 bits.
SPREAD = {1: 0.95, 2: 0.97, 3: 1.0, 4: 1.04, 5: 1.1, 6: 1.12, 7: 1.15, 8: 1.17}
SPREAD_OF_SINGLES = {5: 1.38, 6: 1.4}
# Weights that are decoded at once on a CPU: few operations, of which what is on the way takes a few MB. With fewer, the
# operations themselves were measured to take as long as what they do.
WEIGHTS_AT_ONCE = 2**19
# Bits of the numbers that codes are read as.
HALF = 16
# Bytes of an entry of the table → the numbers that it is moved as: one lookup moves all weights of a code.
ENTRIES = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@lru_cache
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

    def __init__(self, entry: ClassSpec, columns: int, run: int, first: int) -> None:
        """Lay out the codes of a class."""
        self.columns, self.run, self.streams = columns, run, entry.streams
        self.bits, self.width, self.state_bits = entry.bits, entry.width, entry.state_bits
        self.blocks = -(-columns // self.width)
        self.steps = self.blocks * run
        self.length = packed_length(self.steps, self.bits)
        self.first, self.stop = first, first + self.streams * self.length
        # Whether codes of a column are integers of 16 bits, which can be looked at as such where they lie.
        self.in_halves = sys.byteorder == "little" and first % 2 == 0 and run * self.bits % HALF == 0
        # Tensors that all classes of this kind share. A compiler takes what lies here as inputs of the graph, each by its place;
        # of what functions return as constants it would tell apart no two by the same function.
        self.values = trellis_table(self.state_bits, self.width, self.bits)
        self.at, self.shifts = _begin_in_column(run, self.bits)

    def streams_of(self, codes: Tensor, first: int, last: int, scales: Tensor) -> Tensor:
        """Return the rows of streams `first` to before `last`, [rows, columns], times scales [rows]."""
        if not self.in_halves:
            rows = torch.arange(first * self.run, last * self.run, device=codes.device)
            return rows_of([(self, 0)], codes, rows, scales)
        codes = codes[self.first : self.stop].view(self.streams, self.length)[first:last]
        if not torch.compiler.is_compiling() and codes.storage_offset() % 2:
            codes = codes.clone()
        at, shifts, table = self.at.to(codes.device), self.shifts.to(codes.device), self.table(scales)
        values = table.new_empty(len(codes), self.run, self.blocks)
        for part, out, scale in _in_parts(self.run * self.columns, codes, values, scales.view(-1, self.run, 1)):
            states = self._windows(part).index_select(1, at)
            states.bitwise_right_shift_(shifts).bitwise_and_(2**self.state_bits - 1)
            torch.index_select(table, 0, states.view(-1), out=out.view(-1))
            del states  # before the next are made: one block is there at a time
            if not torch.is_grad_enabled():  # while they are in the cache
                out.view(scales.dtype).mul_(scale)
        rows = values.view(scales.dtype).flatten(0, 1)[:, : self.columns]
        return rows.mul_(scales[:, None]) if torch.is_grad_enabled() else rows

    def table(self, like: Tensor) -> Tensor:
        """Return the table with each entry, of all weights of a code, as one number, [entries]."""
        table = self.values.to(like)
        return table.view(ENTRIES[self.width * table.element_size()]).flatten()

    def _windows(self, codes: Tensor) -> Tensor:
        """Return the 32 bits that begin with each half word of each column, [streams, half words of a column, blocks].

        Half words are few beside the weights, so it is they that are brought into the order of the weights: columns are
        stored from the last to the first.
        """
        halves = self.run * self.bits // HALF
        stored = codes.view(torch.int16).view(-1, self.blocks, halves).flip(1).transpose(1, 2)
        ordered = torch.empty(len(codes), halves + 1, self.blocks, dtype=torch.int32, device=codes.device)
        ordered[:, :halves] = stored
        ordered[:, halves, 0] = 0  # before the first column there are zeros
        ordered[:, halves, 1:] = ordered[:, 0, :-1]
        return (ordered[:, 1:] << HALF).bitwise_or_(ordered[:, :-1].bitwise_and_(2**HALF - 1))


def rows_of(classes: list[tuple[RowClass, int]], codes: Tensor, places: Tensor, scales: Tensor) -> Tensor:
    """Return rows of classes of one width [rows, columns], wherever their codes begin, times scales [rows].

    Args:
        classes: the classes, and the place of the first row of each.
        codes: of the weight.
        places: of the rows in the streams, all in these classes.
        scales: of the rows.
    """
    facts, entries, kinds = [], 0, [kind for kind, _ in classes]
    for kind, first in classes:
        facts.append((first, kind.bits, kind.steps, kind.length, kind.first, kind.state_bits, entries))
        entries += 2**kind.state_bits
    table = torch.cat([kind.table(scales) for kind in kinds])
    of_kinds = torch.tensor(facts, device=places.device)
    columns, run, blocks = kinds[0].columns, kinds[0].run, kinds[0].blocks
    # Columns at the beginning, whose states are not yet full.
    few = min(blocks, max(-(-kind.state_bits // (run * kind.bits)) for kind in kinds))
    values, column = table.new_empty(len(places), blocks), torch.arange(blocks, device=places.device)
    # Bytes of a window from the lowest on, in the order that makes a number of them here.
    spanned = torch.arange(4, device=places.device)
    spanned = spanned if sys.byteorder == "little" else spanned.flip(0)
    for place, out in _in_parts(columns, places, values):
        own = of_kinds[torch.bucketize(place, of_kinds[1:, 0].contiguous(), right=True)]
        first_row, bits, steps, length, first_byte, state_bits, entry = own.T.unsqueeze(2)
        row = place[:, None] - first_row
        before = column * run + row % run
        bit = (steps - 1 - before) * bits  # a stream is stored from its end to its beginning
        at = (bit >> 3).add_(row // run * length + first_byte)[..., None] + spanned
        windows = codes.index_select(0, at.clamp_max_(len(codes) - 1).view(-1)).view(torch.int32).view(bit.shape)
        states = (windows >> bit.bitwise_and_(7)).bitwise_and_((1 << state_bits) - 1)
        # Bits of the codes before the first one are zeros.
        states[:, :few] &= (1 << ((before[:, :few] + 1) * bits).clamp_max_(62)) - 1
        torch.index_select(table, 0, states.add_(entry).view(-1), out=out.view(-1))
    return values.view(scales.dtype)[:, :columns].mul_(scales[:, None])


def _in_parts(each: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return parts of tensors that are decoded at once, of so many weights for each of their first dimension."""
    # A compiler fuses the operations itself, and a GPU is better off with a few large ones.
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return [tensors]
    step = max(1, WEIGHTS_AT_ONCE // each)
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)


@lru_cache
def _begin_in_column(run: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return the half words in which the codes of a column begin [run], and at which of their bits [run, 1]."""
    first = torch.arange(run - 1, -1, -1, device="cpu") * bits  # a stream is stored from its end to its beginning
    return first // HALF, (first % HALF).to(torch.int32)[:, None]


class Places(NamedTuple):
    """Where rows and outliers of a weight are, all int32.

    Attributes:
        rows: the place of each row in the streams [rows]; empty where that is its own number.
        outlier_rows, outlier_columns: of the outliers [outliers], sorted by rows.
    """

    rows: Tensor
    outlier_rows: Tensor
    outlier_columns: Tensor


class TrellisWeight(DecodedWeight):
    """Ŵ from streams of overlapping codes, times a scale for each row, and outliers.

    Rows fall into classes, each of a rate of its own. In the streams, one class lies after the other; within a class rows
    keep their order.
    """

    def make_tensors(self, spec: WeightSpec) -> None:
        """Make codes, scales, classes and outliers; see the base class."""
        assert isinstance(spec, TrellisSpec)
        self.run, self.outliers = spec.run, spec.outliers
        self.row_classes: list[RowClass] = []
        self.bounds: list[tuple[int, int]] = []  # first row of each class, and end; the last class may lack rows
        codes = rows = 0
        for entry in spec.classes:
            self.row_classes.append(RowClass(entry, self.columns, self.run, codes))
            codes, first, rows = self.row_classes[-1].stop, rows, rows + self.run * entry.streams
            self.bounds.append((first, min(rows, self.rows)))
        self._kept_places: tuple[list[tuple[int, int]], Places, list[Tensor]] | None = None
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is kept out of copies and pickles."""
        return {**super().__getstate__(), "_kept_places": None}

    def forget(self) -> None:
        """Drop what is kept; see the base class."""
        super().forget()
        self._kept_places = None

    def dense_weight(self) -> Tensor:
        """Return Ŵ [rows, columns]; see the base class."""
        return self.row_block(0, self.rows)

    def row_block(self, start: int, stop: int) -> Tensor:
        """Return rows of Ŵ from `start` to before `stop`; see the base class."""
        order = None
        if not self.class_bits:
            parts = [(start, stop)]
        elif (start, stop) == (0, self.rows):
            order, parts = self._order(), [(0, end - first) for first, end in self.bounds]
        elif torch.compiler.is_compiling():
            # How many of the rows are in a class is not known to a compiler.
            return self.some_rows(torch.arange(start, stop, device=self.codes.device))
        else:
            places, parts = self._places().rows, []
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
        if stop - start == self.rows:
            return weight.index_put_((rows, columns), self.outlier_values, accumulate=True)
        # Sizes must not depend on what is stored, for graphs: outliers of other rows add nothing, somewhere.
        here = (rows >= start) & (rows < stop)
        at_places = ((rows - start).clamp(0, stop - start - 1), columns)
        return weight.index_put_(at_places, self.outlier_values * here, accumulate=True)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        flat = ids.flatten()
        if self.outliers:
            flat = torch.cat([flat, flat.new_zeros(1)])  # a row for outliers of rows that are not asked for
        scales = self._scales(self.scales[flat])
        wanted = self._places().rows[flat].long() if self.class_bits else flat
        rows = None
        for width in sorted({kind.width for kind in self.row_classes}):
            own = [
                (kind, first)
                for kind, (first, _) in zip(self.row_classes, self.bounds, strict=True)
                if kind.width == width
            ]
            if len(own) == len(self.row_classes):
                rows = rows_of(own, self.codes, wanted, scales)
                continue
            inside = torch.zeros_like(wanted, dtype=torch.bool)
            for kind, first in own:
                inside |= (wanted >= first) & (wanted < first + kind.streams * kind.run)
            decoded = rows_of(own, self.codes, wanted.where(inside, own[0][1]), scales)
            rows = decoded if rows is None else decoded.where(inside[:, None], rows)
        assert rows is not None
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
        before, behind = first - begin * self.run, end * self.run - last
        if before or behind:
            scales = torch.nn.functional.pad(scales, (before, behind))
        return kind.streams_of(self.codes, begin, end, scales)[before : before + last - first]

    def _order(self) -> Tensor | None:
        """Return the rows as the streams have them [rows], or None where that is their own order."""
        return _inverse(self._places().rows.long()) if self.class_bits else None

    def _scales(self, codes: Tensor) -> Tensor:
        return decode_scales(codes, self.scale_range).to(self.scale_range.dtype)

    def _outlier_places(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the outliers, sorted by rows, both [outliers]."""
        places = self._places()
        return places.outlier_rows.long(), places.outlier_columns.long()

    def _places(self) -> "Places":
        """Return where rows and outliers are, kept from one use to the next by the rules for decoded weights."""
        names = ("classes", "outlier_rows", "outlier_columns")
        sources = [tensor for name in names if (tensor := getattr(self, name, None)) is not None]
        if torch.compiler.is_compiling() or not may_keep(self, sources):
            return self._find_places()
        kept, versions = self._kept_places, versions_of(sources)
        if kept is None or kept[0] != versions:
            # Made outside of inference mode, so that what uses it may have gradients.
            with torch.inference_mode(False), torch.no_grad():
                # The views keep addresses from being given to other tensors.
                self._kept_places = kept = (versions, self._find_places(), [source.detach() for source in sources])
        return kept[1]

    def _find_places(self) -> "Places":
        rows = outlier_rows = outlier_columns = self.scales.new_empty(0, dtype=torch.int32)
        if self.class_bits:
            order = unpack(self.classes, self.class_bits, self.rows).argsort(stable=True)
            rows = _inverse(order).to(torch.int32)
        if self.outliers:
            # A model made from a config alone has bits of no meaning here.
            outlier_rows = unpack(self.outlier_rows, self.row_bits, self.outliers).clamp_max(self.rows - 1)
            outlier_columns = unpack(self.outlier_columns, self.column_bits, self.outliers).clamp_max(self.columns - 1)
        return Places(rows, outlier_rows, outlier_columns)

    def _with_outliers(self, decoded: Tensor, ids: Tensor) -> Tensor:
        """Return decoded rows [ids − 1, columns] with the outliers that lie in them; the last takes all others."""
        rows, columns = self._outlier_places()
        at, last = torch.arange(len(ids), device=ids.device), len(ids) - 1
        # Of rows that are asked for more than once, one is filled and then copied.
        taker = torch.full((self.rows,), last, device=ids.device).scatter(0, ids[:-1], at[:-1])
        into = taker[rows]
        values: Tensor = self.outlier_values
        if not torch.compiler.is_compiling():  # a graph's sizes must not depend on the ids
            here = (into < last).nonzero().flatten()
            into, columns, values = into[here], columns[here], values[here]
        decoded = decoded.index_put_((into, columns), values, accumulate=True)
        return decoded[taker[ids[:-1]]]
