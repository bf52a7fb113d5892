"""Which rows of an embedding get more bits than others.

By the theory of rate and distortion, what matters twice as much in the mean square is worth half a bit more per weight
("reverse water-filling"; Cover & Thomas, Elements of Information Theory, ch. 10). Rows matter by their variance and their
importance, which for tokens spans orders of magnitude. So they fall into classes a factor of two apart, each half a bit
above the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..structures import Mixture
from ..structures.trellis import DISTORTIONS, MOST_CLASSES

# So many places within a factor of two where borders of classes may lie are tried, and for each number of classes the best
# few ways to cut are kept.
PHASES, KEPT = 4, 4
# Beside the largest energy; what is below counts as this.
LEAST = 2.0**-12


def mixtures(energies: Tensor, run: int) -> dict[Mixture, float]:
    """Return mixtures of rates that may be worth their bytes, and the squared error to expect of each.

    Args:
        energies: the squared error in each row where nothing is coded, [rows].
        run: rows of a stream; a class has whole streams.
    """
    top = max(DISTORTIONS)
    left = torch.tensor([DISTORTIONS[step] for step in range(top + 1)], dtype=torch.float64)
    found: dict[Mixture, float] = {}
    for way in _ways(energies.double(), run):
        for base in range(1, top + 1):
            # No row is dropped: a token that the text lacks may still occur.
            if base + way.offsets[0] <= top and base + way.offsets[-1] >= 1:
                steps = [base + offset for offset in way.offsets]
                found[Mixture(tuple(zip(steps, way.streams, strict=True)))] = float((way.sums * left[steps]).sum())
    return found


def by_class(energies: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the order in which classes of so many rows follow each other, the highest energies first, [rows].

    Within a class rows keep their own order. The last class may lack some.
    """
    order = energies.argsort(descending=True, stable=True)
    *whole, _ = counts
    return torch.cat([part.sort().values for part in order.split([*whole, len(order) - sum(whole)])])


@dataclass(frozen=True)
class _Way:
    """A way to cut rows into classes.

    Attributes:
        offsets: of each class, steps of the rate more or less.
        streams: of each class.
        sums: energies of each class.
    """

    offsets: list[int]
    streams: list[int]
    sums: Tensor

    def gain(self) -> float:
        """Return the steps that are saved at equal error, where rates are high."""
        offsets = torch.tensor(self.offsets, dtype=torch.float64)
        streams = torch.tensor(self.streams, dtype=torch.float64)
        left = (self.sums * torch.exp2(-offsets)).sum() / self.sums.sum().clamp_min(1e-300)
        return -float(left.log2() + (offsets * streams).sum() / streams.sum())


def _ways(energies: Tensor, run: int) -> list[_Way]:
    """Return ways to cut rows into two classes or more; by falling energy they form streams of `run` rows."""
    ranked = energies.sort(descending=True).values
    streams = torch.nn.functional.pad(ranked, (0, -len(ranked) % run)).view(-1, run).sum(dim=1)
    levels = streams.clamp_min(max(float(streams[0]) * LEAST, 1e-300)).log2()
    ways: list[_Way] = []
    most = 2
    while most <= MOST_CLASSES:
        found: dict[tuple[int, ...], _Way] = {}
        for phase in range(PHASES):
            steps = (levels + phase / PHASES).floor().long()
            lowest = min(int(steps[0]), int(steps[-1]) + most - 1)
            for high in range(int(steps[0]), lowest - 1, -1):
                kinds, counts = steps.clamp(high - most + 1, high).unique_consecutive(return_counts=True)
                if len(kinds) == 1:
                    continue
                middle = round(float((kinds * counts).sum() / counts.sum()))
                sums = torch.stack([part.sum() for part in streams.split(counts.tolist())])
                found[tuple(counts.tolist())] = _Way((kinds - middle).tolist(), counts.tolist(), sums)
        ways += sorted(found.values(), key=_Way.gain, reverse=True)[:KEPT]
        most *= 2
    return ways
