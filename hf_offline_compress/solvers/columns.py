"""Trellis codes of a block of columns: a path through the states for each few columns, errors carried on within the block.

This is the version for every device. `compiled_columns` does the same on CPUs, several times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .coupling import Block
from .paths import viterbi_path


@dataclass(frozen=True)
class Code:
    """A trellis code of one rate.

    Attributes:
        table: values of the states [states, width].
        bits: of a code.
    """

    table: Tensor
    bits: int

    @property
    def width(self) -> int:
        """Numbers that a code stands for."""
        return self.table.shape[1]

    @property
    def kept(self) -> int:
        """Number of states that differ in more than their oldest code: what the next step knows of a state."""
        return len(self.table) >> self.bits

    def values(self, states: Tensor, columns: int) -> Tensor:
        """Return the values of states [streams, steps, run], [streams, run, columns]."""
        return self.table[states.long()].transpose(1, 2).flatten(2)[:, :, :columns].contiguous()

    def features(self) -> Tensor:
        """Return the values of each state and the products of its values, [states, features]."""
        first, second = torch.triu_indices(self.width, self.width)
        return torch.cat([self.table, self.table[:, first] * self.table[:, second]], dim=1)


@dataclass(frozen=True)
class Streams:
    """Streams of one rate, which run down the rows of matrices.

    Attributes:
        weights: of a squared error in each row [streams, run].
        members: which matrix each stream is of, in rising order, [streams].
        last: the states before the next columns [streams]; changed as columns are coded.
    """

    weights: Tensor
    members: Tensor
    last: Tensor


@dataclass(frozen=True)
class Held:
    """What streams were coded as before, where they are coded again.

    Attributes:
        values: that they stand for [streams, run, columns].
        ends: the states after each step, as far as the next step depends on them: without their oldest code, or -1 where
            none does, [streams, steps], int32.
    """

    values: Tensor
    ends: Tensor

    @classmethod
    def of(cls, states: Tensor, code: Code, columns: int) -> Held:
        """Return it for states [streams, steps, run] that were found for so many columns."""
        ends = states[:, :, -1].int() % code.kept
        ends[:, -1] = -1
        return cls(code.values(states, columns), ends)

    def part(self, start: int, end: int, width: int) -> Held:
        """Return what is held of columns `start` to before `end`."""
        return Held(
            self.values[:, :, start:end].contiguous(), self.ends[:, start // width : -(-end // width)].contiguous()
        )


def code_columns(
    left: Tensor, block: Block | None, streams: Streams, code: Code, held: Held | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the states [streams, steps, run] of a block of columns, and its errors [streams, run, columns].

    Errors are what values were held to be, their targets if they had no codes before, less what they are now; there are
    none where all columns count alike. A step has `code.width` columns, the last one maybe fewer.

    Args:
        left: what is to be coded [streams, run, columns]; changed: each step absorbs the errors of those before it.
        block: how the columns depend on each other, in each matrix; None where they do not.
        streams: what is coded.
        code: what with.
        held: what they were coded as before, if they were.
    """
    count, run, columns = left.shape
    width, members = code.width, streams.members
    states = torch.zeros(count, -(-columns // width), run, dtype=torch.int16, device=left.device)
    features = code.features()
    costs = left.new_empty(run, len(features), count)
    errors = None if block is None else torch.zeros_like(left)
    for start in range(0, columns, width):
        here, after = slice(start, min(start + width, columns)), slice(min(start + width, columns), columns)
        target, step = left[:, :, here], start // width
        metrics = None if block is None else block.metrics[:, step][members]
        factors = _coefficients(target, metrics, streams.weights, width)
        torch.bmm(features.expand(run, -1, -1), factors, out=costs)
        path = viterbi_path(costs, streams.last, code.bits, None if held is None else held.ends[:, step])
        streams.last.copy_(path[-1])
        states[:, step] = path.T
        if block is not None and errors is not None:
            before = target if held is None else held.values[:, :, here]
            errors[:, :, here] = before - code.table[path.T][..., : target.shape[2]]
            left[:, :, after] -= errors[:, :, here] @ block.carried[:, here, after][members]
    return states, errors


def _coefficients(target: Tensor, metrics: Tensor | None, weights: Tensor, width: int) -> Tensor:
    """Return what the features of an entry c count in weighted squared distances (t − c) M (t − c)ᵀ, [run, features, streams].

    Without t M tᵀ, which is the same for all entries.

    Args:
        target: t [streams, run, columns]; there may be fewer columns than an entry has numbers.
        metrics: M [streams, width, width], or None for the identity.
        weights: [streams, run].
        width: numbers of an entry.
    """
    streams, run, columns = target.shape
    if metrics is None:
        metrics = torch.eye(width, device=target.device).expand(streams, -1, -1)
    metrics, lacking = metrics[:, :columns, :columns], width - columns
    product = target @ metrics
    metrics = torch.nn.functional.pad(metrics, (0, lacking, 0, lacking))
    first, second = torch.triu_indices(width, width, device=target.device)
    squares = metrics[:, first, second] * (2 - (first == second).float())
    linear = torch.nn.functional.pad(-2 * product, (0, lacking))
    factors = torch.cat([linear, squares[:, None].expand(-1, run, -1)], dim=2) * weights[..., None]
    return factors.permute(1, 2, 0).contiguous()
