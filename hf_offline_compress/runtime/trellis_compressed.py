"""Trellis codes: how a stream of overlapping codes becomes a weight."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .packing_compressed import packed_length, spanned_bytes, unpack
from .weights_compressed import DecodedWeight

# Odd numbers that mix the bits of an index.
MIXERS = (0x9E3779B1, 0x85EBCA6B)
GOLDEN = 0.6180339887498949
# Codes that are decoded at once: few enough for the numbers on the way to stay in a processor's cache.
CODES_AT_ONCE = 2**17
# Bytes of an entry of the table → the numbers that it is moved as: one lookup moves all weights of a code.
ENTRIES = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@lru_cache
def trellis_table(state_bits: int, width: int) -> Tensor:
    """Return the values that states stand for, [2^state_bits, width], float32: normally distributed, in mixed order.

    For one weight a code they are quantiles; for two, a spiral of points of equal mass.
    """
    count = 2**state_bits
    mixed = torch.arange(count, device="cpu")  # kept, so on the device of no context
    for mixer in MIXERS:
        mixed = (mixed * (mixer % count)) % count
        mixed = mixed ^ (mixed >> (state_bits // 2))
    share = (mixed.double() + 0.5) / count
    if width == 1:
        return torch.special.ndtri(share).float()[:, None]
    radius = (-2 * torch.log(1 - share)).sqrt()
    angle = 2 * math.pi * ((mixed.double() * GOLDEN + 0.5) % 1)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).float()


def decode_scales(codes: Tensor, bounds: Tensor) -> Tensor:
    """Return scales of bytes: evenly spaced logarithms, from 2^bounds[0] in 255 steps of bounds[1]."""
    low, step = bounds.float()
    return torch.exp2(low + codes.float() * step)


class TrellisWeight(DecodedWeight):
    """Ŵ from streams of overlapping codes, times a scale for each row, and outliers."""

    def make_tensors(self, group: dict[str, Any]) -> None:
        """Make codes, scales and outliers; see the base class."""
        self.bits, self.width, self.state_bits = group["bits"], group["width"], group["state_bits"]
        self.run, self.outliers = group["run"], group["outliers"]
        self.steps = -(-self.columns // self.width) * self.run
        self.spanned = spanned_bytes(self.bits, self.state_bits)
        self.row_bits, self.column_bits = (max(1, (n - 1).bit_length()) for n in (self.rows, self.columns))
        self.codes: Tensor
        self.scales: Tensor
        self.outlier_rows: Tensor
        self.outlier_columns: Tensor
        shape = (-(-self.rows // self.run), packed_length(self.steps, self.bits))
        self.register_buffer("codes", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(self.rows, dtype=torch.uint8))
        self.scale_range = nn.Parameter(torch.empty(2))
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
        if self.run * self.bits % 8 or self.run * self.bits // 8 < self.spanned - 1:
            # Codes of a column block that do not begin with a byte, or are too few to look at the next block only.
            return self.some_rows(torch.arange(start, stop, device=self.codes.device))
        first, last = start // self.run, -(-stop // self.run)  # streams
        shape = (last - first, self.run, self.steps // self.run)
        values = self._looked_up(lambda part: self._states(self.codes[first:last][part]), shape)
        weight = values[start - first * self.run : stop - first * self.run, : self.columns]
        weight = weight.mul_(self._scales(self.scales[start:stop])[:, None])
        if not self.outliers:
            return weight
        rows, columns = self._outlier_places()
        if (start, stop) == (0, self.rows):
            return weight.index_put_((rows, columns), self.outlier_values, accumulate=True)
        # Sizes must not depend on what is stored (graphs): outliers of other rows add nothing, somewhere.
        here = (rows >= start) & (rows < stop)
        places = ((rows - start).clamp(0, stop - start - 1), columns)
        return weight.index_put_(places, self.outlier_values * here, accumulate=True)

    def some_rows(self, ids: Tensor) -> Tensor:
        """Return rows of Ŵ; see the base class."""
        flat = ids.flatten()
        if self.outliers:
            flat = torch.cat([flat, flat.new_zeros(1)])  # a row for outliers of rows that are not asked for
        values = self._looked_up(lambda part: self._states_of(flat[part]), (len(flat), self.steps // self.run))
        rows = values[:, : self.columns].mul_(self._scales(self.scales[flat])[:, None])
        return (self._with_outliers(rows, flat) if self.outliers else rows).unflatten(0, ids.shape)

    def reset_parameters(self, std: float) -> None:
        """Fill with random values; see the base class."""
        super().reset_parameters(std)
        nn.init.constant_(self.scale_range, math.log2(std))
        self.scale_range.data[1] = 0
        if self.outliers:
            nn.init.zeros_(self.outlier_values)

    def _looked_up(self, states: Callable[[slice], Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return the table's values for states [n, ..., blocks], some of the n at a time: [n · ..., blocks · width]."""
        table = trellis_table(self.state_bits, self.width).to(self.scale_range)
        entries = table.view(ENTRIES[self.width * table.element_size()]).flatten()
        found = torch.empty(shape, dtype=entries.dtype, device=entries.device)
        # A compiler fuses the steps itself.
        at_once = shape[0] if torch.compiler.is_compiling() else max(1, CODES_AT_ONCE // math.prod(shape[1:]))
        for first in range(0, shape[0], at_once):
            part = slice(first, first + at_once)
            torch.index_select(entries, 0, states(part).flatten(), out=found[part].view(-1))
        return found.view(table.dtype).flatten(0, -2)

    def _states(self, codes: Tensor) -> Tensor:
        """Return the states of whole streams, [streams, bytes] → [streams, run, blocks], where blocks begin with bytes.

        A stream is stored from its end to its beginning, so that a state is the bits from its newest code on. Its bytes
        are few beside its weights, so it is they that are brought into the order of the weights.
        """
        size = self.run * self.bits // 8
        # [streams, blocks + 1, bytes of a block]: behind the first block of columns, which is stored last, there are zeros.
        stored = torch.nn.functional.pad(codes, (0, size)).unflatten(1, (-1, size)).flip(1)
        following = stored[:, :-1, : self.spanned - 1]
        ordered = torch.cat([stored[:, 1:], following], dim=2).transpose(1, 2).to(torch.int32)
        windows = ordered[:, :size].contiguous()
        for i in range(1, self.spanned):
            windows |= ordered[:, i : i + size] << (8 * i)
        first = torch.arange(self.run - 1, -1, -1, device=codes.device, dtype=torch.int32) * self.bits
        states = windows.index_select(1, first >> 3)
        states >>= (first & 7)[:, None]
        states &= 2**self.state_bits - 1
        return states

    def _states_of(self, ids: Tensor) -> Tensor:
        """Return the states of rows, [ids] → [ids, blocks], wherever their codes begin."""
        ids = ids.to(torch.int32)[:, None]
        blocks = torch.arange(self.steps // self.run, device=ids.device, dtype=torch.int32)
        step = blocks * self.run + ids % self.run
        first = (self.steps - 1 - step) * self.bits  # a stream is stored from its end to its beginning
        at = (first >> 3) + (ids // self.run) * self.codes.shape[1]
        codes = self.codes.flatten()
        states = torch.zeros_like(first)
        for i in range(self.spanned):
            place = (at + i).clamp_max(len(codes) - 1).flatten()
            states |= codes.index_select(0, place).view_as(states).to(torch.int32) << (8 * i)
        # Bits of the codes before the first one are zeros.
        known = ((step + 1) * self.bits).clamp_max(self.state_bits)
        return (states >> (first & 7)) & ((1 << known) - 1)

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
