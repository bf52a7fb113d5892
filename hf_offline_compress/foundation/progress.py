"""Progress on stderr: bars, stages, and the elapsed time where either takes long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

# Seconds until progress is first shown, and between two updates.
FIRST, EVERY = 1.0, 8.0
_showing: ContextVar[bool] = ContextVar("showing", default=False)


class _Shown:
    """What is on the screen: the stages that are under way, the innermost last, and bars."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.bars: WeakSet[Any] = WeakSet()
        self.last: float | None = None

    def sign(self) -> None:
        """Show that work goes on: redraw bars with the elapsed time, or name the stage again."""
        self.last = time.monotonic()
        if bars := [bar for bar in list(self.bars) if not bar.disable]:
            for bar in bars:
                bar.refresh()
        elif self.stages:
            title, started = self.stages[-1]
            _say(f"{title}: {time.monotonic() - started:.0f} s")


_shown = _Shown()


@contextmanager
def showing(on: bool) -> Iterator[None]:
    """Show stages, or do not, while this is entered."""
    token = _showing.set(on)
    try:
        yield
    finally:
        _showing.reset(token)


@contextmanager
def stage(title: str, *, at_once: bool = True) -> Iterator[None]:
    """Name what is being done, on a line of its own, where stages are shown.

    Args:
        title: what it is, e.g. "loading the base".
        at_once: name it now, and not only once it takes long.
    """
    if not _showing.get():
        yield
        return
    if at_once:
        _say(title)
        _shown.last = time.monotonic()
    _shown.stages.append((title, time.monotonic()))
    try:
        yield
    finally:
        _shown.stages.pop()


def note(text: str) -> None:
    """Say something on a line of its own, where stages are shown."""
    if _showing.get():
        _say(text)


def bar(items: Iterable[Any] | None, title: str, unit: str, progress: bool, total: int | None = None) -> Any:
    """Return a tqdm bar, which counts whole units.

    Args:
        items: to iterate over; None for a bar that is moved by hand.
        title: what is being done.
        unit: what is counted.
        progress: whether it is shown.
        total: how many there are, where `items` cannot say.
    """
    from tqdm.auto import tqdm

    shown = tqdm(items, desc=title, unit=unit, total=total, disable=not progress)
    if progress:
        _shown.last = time.monotonic()
        _shown.bars.add(shown)
    return shown


@contextmanager
def alive() -> Iterator[None]:
    """Print the elapsed time regularly while this is entered and stages are shown."""
    if not _showing.get():
        yield
        return
    done = threading.Event()
    _shown.last = None
    started = time.monotonic()

    def watch() -> None:
        while not done.wait(min(FIRST, EVERY) / 4):
            due = started + FIRST if _shown.last is None else _shown.last + EVERY
            if time.monotonic() >= due:
                _shown.sign()

    thread = threading.Thread(target=watch, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
