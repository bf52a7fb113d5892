"""Trellis codes of a block of columns: a path through the states for each few columns, errors handed on within the block.

This is the version for every device. `compiled_columns` does the same on CPUs, several times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def code_columns(left: Tensor, roots: Tensor | None, streams: Streams, code: Code) -> tuple[Tensor, Tensor | None]:
    """Return the states [streams, steps, run] of a block of columns, and its errors [streams, run, columns].

    Errors are as the metric has them given the columns before; there are none where all columns count alike. A step has
    `code.width` columns, the last one maybe fewer.

    Args:
        left: what is to be coded [streams, run, columns]; changed: each step absorbs the errors of those before it.
        roots: the block's part of the roots of the metrics [members, columns, columns], or None.
        streams: what is coded.
        code: what with.
    """
    count, run, columns = left.shape
    width, members = code.width, streams.members
    states = torch.zeros(count, -(-columns // width), run, dtype=torch.int16, device=left.device)
    features = code.features()
    costs = left.new_empty(run, len(features), count)
    errors = None if roots is None else torch.zeros_like(left)
    for start in range(0, columns, width):
        here, after = slice(start, min(start + width, columns)), slice(min(start + width, columns), columns)
        target, inverse = left[:, :, here], None
        if roots is not None:
            # It brings errors into the metric that these columns have, given those before them.
            inverse = torch.linalg.inv(roots[:, here, here])[members]
        factors = _coefficients(target, inverse, streams.weights, width)
        torch.bmm(features.expand(run, -1, -1), factors, out=costs)
        path = viterbi_path(costs, streams.last, code.bits)
        streams.last.copy_(path[-1])
        states[:, start // width] = path.T
        if roots is not None and inverse is not None and errors is not None:
            errors[:, :, here] = (target - code.table[path.T][..., : target.shape[2]]) @ inverse
            left[:, :, after] -= errors[:, :, here] @ roots[:, here, after][members]
    return states, errors


def _coefficients(target: Tensor, inverse: Tensor | None, weights: Tensor, width: int) -> Tensor:
    """Return what the features of an entry c count in weighted squared distances |(t − c) E|², [run, features, streams].

    Without |t E|², which is the same for all entries.

    Args:
        target: t [streams, run, columns]; there may be fewer columns than an entry has numbers.
        inverse: E [streams, columns, columns], or None for the identity.
        weights: [streams, run].
        width: numbers of an entry.
    """
    streams, run, columns = target.shape
    if inverse is None:
        metric, product = torch.eye(columns, device=target.device).expand(streams, -1, -1), target
    else:
        metric = inverse @ inverse.mT
        product = target @ metric
    lacking = width - columns
    metric = torch.nn.functional.pad(metric, (0, lacking, 0, lacking))
    first, second = torch.triu_indices(width, width, device=target.device)
    squares = metric[:, first, second] * (2 - (first == second).float())
    linear = torch.nn.functional.pad(-2 * product, (0, lacking))
    factors = torch.cat([linear, squares[:, None].expand(-1, run, -1)], dim=2) * weights[..., None]
    return factors.permute(1, 2, 0).contiguous()
