"""How columns that are coded in turns depend on each other: the first time, and each time after that.

Errors E of a matrix cost tr(E H Eᵀ). The first time, columns that are still to be coded will absorb what they can of an error
(`FirstTurn`, see `feedback`). What is found in this way is not the best: at low rates errors are as large as the weights, and
so is what later columns have to absorb. Once all columns have codes, each may be coded again, the others as they are; the
cost never rises (`NextTurn`; coordinate descent: Behdin et al., QuantEase, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Block(NamedTuple):
    """Columns that depend on each other.

    An error d in the columns of a step [run, width], off its target, costs tr(d M dᵀ); and what they turn out to be, off what
    they were held to be, is handed on times C: the targets of later columns are less by it.

    Attributes:
        metrics: M [members, steps, width, width].
        carried: C [members, columns, columns]; what is not of later columns is not read.
    """

    metrics: Tensor
    carried: Tensor


class Coupling(Protocol):
    """How all columns of some matrices depend on each other."""

    def block(self, start: int, end: int) -> Block:
        """Return what columns `start` to before `end`, whole steps or the last ones, do among themselves."""

    def beyond(self, member: int, start: int, end: int) -> Tensor:
        """Return what is carried from them to all columns after them, [columns, later columns]."""


@dataclass(frozen=True)
class FirstTurn:
    """Columns after a column are still to be coded, and will absorb what they can.

    Attributes:
        roots: upper U with H⁻¹ = UᵀU [members, columns, columns].
        width: columns of a step.
    """

    roots: Tensor
    width: int

    def block(self, start: int, end: int) -> Block:
        """See `Coupling`."""
        own = self.roots[:, start:end, start:end]
        # It brings errors into the metric that these columns have, given those before them.
        inverses = torch.linalg.inv(steps_of(own, self.width))
        return Block(inverses @ inverses.mT, times_steps(own.mT, inverses.mT).mT)

    def beyond(self, member: int, start: int, end: int) -> Tensor:
        """See `Coupling`."""
        inverses = torch.linalg.inv(steps_of(self.roots[member, start:end, start:end], self.width))
        return times_steps(self.roots[member, start:end, end:].mT, inverses.mT).mT


@dataclass(frozen=True)
class NextTurn:
    """All columns have codes.

    Attributes:
        metrics: H [members, columns, columns].
        width: columns of a step.
        inverses: of the parts of H on the diagonal [members, steps, width, width].
    """

    metrics: Tensor
    width: int
    inverses: Tensor

    @classmethod
    def of(cls, metrics: Tensor, width: int) -> NextTurn:
        """Return it for metrics H [members, columns, columns]."""
        return cls(metrics, width, torch.linalg.inv(steps_of(metrics, width)))

    def targets(self, values: Tensor, wanted: Tensor) -> Tensor:
        """Return what each column would best be, the others as they are; all are [members, rows, columns]."""
        return values - times_steps((values - wanted) @ self.metrics, self.inverses)

    def block(self, start: int, end: int) -> Block:
        """See `Coupling`."""
        own = self.metrics[:, start:end, start:end]
        inverses = self.inverses[:, start // self.width : -(-end // self.width)]
        return Block(steps_of(own, self.width), times_steps(own, inverses).neg_())

    def beyond(self, member: int, start: int, end: int) -> Tensor:
        """See `Coupling`."""
        return times_steps(self.metrics[member, start:end, end:], self.inverses[member, end // self.width :]).neg_()


def steps_of(matrices: Tensor, width: int) -> Tensor:
    """Return the parts on the diagonal of matrices [..., columns, columns], [..., steps, width, width].

    A last step of fewer columns is filled up as if by columns of their own.
    """
    columns = matrices.shape[-1]
    lacking = -columns % width
    if lacking:
        matrices = torch.nn.functional.pad(matrices, (0, lacking, 0, lacking))
        matrices[..., columns:, columns:] = torch.eye(lacking, device=matrices.device)
    parts = matrices.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))  # [..., steps, width, steps, width]
    return parts.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


def times_steps(rows: Tensor, steps: Tensor) -> Tensor:
    """Return rows [..., rows, columns] times a matrix that has only parts on its diagonal [..., steps, width, width]."""
    columns, width = rows.shape[-1], steps.shape[-1]
    lacking = -columns % width
    if lacking:
        rows = torch.nn.functional.pad(rows, (0, lacking))
    parts = rows.unflatten(-1, (-1, width)).transpose(-3, -2) @ steps  # [..., steps, rows, width]
    return parts.transpose(-3, -2).flatten(-2)[..., :columns]
