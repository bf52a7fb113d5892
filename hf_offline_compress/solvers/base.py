"""What goes into a solver and what comes out: matrices and factors, no models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..request.objective import Objective
from ..structures import GroupShape, Size, Structure, integer


@dataclass(frozen=True)
class Problem:
    """One group to be solved.

    Attributes:
        structure: the structure and its options.
        objective: the error measure.
        size: rank, latent width, or whatever the structure counts.
        weights: the members, each [rows, columns].
        input_moments: E[x xᵀ] [columns, columns] of the inputs (pooled over members), or None.
        member_moments: the same for each member by itself; or None.
        output_moments: for each member E[g gᵀ] [rows, rows] of the gradients at its outputs, or None.
        row_weights: importance of each row's squared error, [all rows of all members], above 0; or None. Not with
            output moments.
        parameter_weights: importance of each parameter's error, for each member [rows, columns]; or None.
        heads: attention heads that the rows of each member are cut into.
        embedding: whether rows are looked up.
        judge: decoded rows of all members [rows, columns] → the model's loss with them, by which training chooses among its
            steps. None: by its own loss.
        passes: how often all columns of a trellis are coded again, the others as they are.
        seed: of whatever is random.
        progress: called from time to time with the share that is done, 0 to 1.
    """

    structure: Structure
    objective: Objective
    size: Size
    weights: tuple[Tensor, ...]
    input_moments: Tensor | None = None
    member_moments: tuple[Tensor, ...] | None = None
    output_moments: tuple[Tensor, ...] | None = None
    row_weights: Tensor | None = None
    parameter_weights: tuple[Tensor, ...] | None = None
    heads: int = 1
    embedding: bool = False
    judge: Callable[[Tensor], float] | None = None
    passes: int = 0
    seed: int = 0
    progress: Callable[[float], None] = lambda share: None

    @property
    def integer_size(self) -> int:
        """The size, of a structure that has integers alone."""
        return integer(self.size)

    @property
    def shape(self) -> GroupShape:
        """What sizes depend on."""
        rows, columns = self.weights[0].shape
        return GroupShape(len(self.weights), rows, columns, self.heads, self.embedding)


@dataclass(frozen=True)
class Factors:
    """What a solver returns: the tensors that a structure stores.

    Attributes:
        members: for each member, tensor name → tensor (e.g. `latents` [rows, rank]).
        decoder: tensor name → tensor of the shared decoder.
        notes: what a report should say of how it went, e.g. the loss reached.
    """

    members: tuple[dict[str, Tensor], ...]
    decoder: dict[str, Tensor]
    notes: dict[str, float] = field(default_factory=dict)
