"""Effort: how much is measured before bytes are allocated, and how often the allocation is checked and repeated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """One level of effort.

    Attributes:
        tokens: of calibration text that inputs are measured on; gradients on half as many.
        judged: tokens of other calibration text on which loss is measured, at most.
        checking: operations a weight of the model that measuring its groups may take, before each further allocation.
        rounds: allocations by what was measured, at most, after the first one by what is expected.
        passes: how often all columns of a trellis are coded again, the others as they are.
        in_order: tokens of calibration text on which layers are coded once more in the end, for what the compressed layers
            before them give; 0 where they are not.
    """

    tokens: int
    judged: int
    checking: int
    rounds: int
    passes: int
    in_order: int


EFFORTS = {
    "fast": Effort(tokens=8_192, judged=0, checking=0, rounds=0, passes=1, in_order=0),
    # Finding the codes of a weight takes about as long as so many operations, each time.
    "default": Effort(tokens=32_768, judged=2_048, checking=2**15, rounds=1, passes=1, in_order=16_384),
    "best": Effort(tokens=65_536, judged=8_192, checking=2**18, rounds=4, passes=4, in_order=65_536),
}
