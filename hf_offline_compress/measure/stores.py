"""Files that passes through a model's layers write, and how far each has come, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..foundation.spilled import Place, Spilled
from ..foundation.unfinished import UnfinishedRun

MEASURING = "measuring"


@dataclass(frozen=True)
class Reached:
    """How far the passes of a run have come.

    Attributes:
        steps: name of a pass → how many of its steps are done, and its sums of numbers by then.
        marks: name of a store → where its tensors lie.
    """

    steps: Mapping[str, tuple[int, Mapping[str, float]]] = field(default_factory=dict)
    marks: Mapping[str, Mapping[Hashable, Place]] = field(default_factory=dict)


class Stores:
    """Stores of large tensors by name, of which a cut leaves those of the last step that was done."""

    def __init__(self, scratch: Path | None) -> None:
        """Keep nothing yet.

        Args:
            scratch: folder on whose disk stores lie; by default that of temporary files.
        """
        self._scratch = scratch
        self._run: UnfinishedRun | None = None
        self._open: dict[str, Spilled] = {}
        self._reached = Reached()

    def keep_in(self, run: UnfinishedRun) -> None:
        """Keep everything in a run from now on, and go on from what it has."""
        self._run = run
        self._reached = run.get(MEASURING, [Reached]) or self._reached

    def open(self, name: str) -> Spilled:
        """Return a store, as it was when the last step that is kept was done; anew where there is none."""
        file = self._run.folder / f"{name}.numbers" if self._run else None
        self._open[name] = Spilled(self._scratch, file, self._reached.marks.get(name))
        return self._open[name]

    def reached(self, name: str) -> tuple[int, Mapping[str, float]]:
        """Return how many steps of a pass are done, and its sums of numbers by then."""
        return self._reached.steps.get(name, (0, {}))

    def done(self, name: str, steps: int, numbers: Mapping[str, float]) -> None:
        """Note that another step of a pass is done, and all that stores have now."""
        marks = {name: store.mark() for name, store in self._open.items()}
        if self._run is not None:
            self._reached = Reached({**self._reached.steps, name: (steps, dict(numbers))}, marks)
            self._run.put(MEASURING, self._reached)

    def close(self, name: str) -> None:
        """Delete a store that is no longer needed."""
        self._open.pop(name).clear()
