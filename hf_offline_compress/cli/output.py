"""How commands run and what they print: tables, JSON, and errors of one line."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import CompressionError, is_out_of_memory
from ..foundation.files import is_out_of_space
from ..foundation.processes import is_main_process
from ..foundation.progress import alive, showing, stage

WIDTH = 80


class Terminated(KeyboardInterrupt):
    """The process was told to end, by SIGTERM or because its terminal closed."""


def run(work: Callable[[], None], debug: bool, quiet: bool = False) -> None:
    """Do the work; an error is one line on stderr and exit code 1. Unless quiet, it is never silent for long.

    A request to end is an exception wherever the work is, so that it leaves neither partial folders nor processes.
    """
    received: list[int] = []
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not undo the work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _ended_by_signals(received), showing(not quiet), stage("working", at_once=False), alive():
            work()
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (typer.Exit, typer.Abort, typer.BadParameter):  # typer's own
        raise
    except KeyboardInterrupt as error:
        word = "ended" if received else "interrupted"
        if is_main_process():
            print(f"{word}; {str(error) or 'nothing was written'}", file=sys.stderr)
        raise typer.Exit(128 + received[0] if received else 130) from error
    except Exception as error:
        if debug:
            traceback.print_exc()
        if is_main_process() or debug:  # of several, one says it
            print(f"error: {' '.join(_sentence(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error


def _sentence(error: Exception) -> str:
    """Return what to say of an error: what was foreseen says it itself, the rest is for the maintainers."""
    if isinstance(error, CompressionError | ImportError):
        return str(error)
    if is_out_of_space(error):
        return (
            "There is no space left on the disk (or a quota or limit is reached); free some, or write to another disk."
        )
    if is_out_of_memory(error):
        return "There is not enough memory; pass a smaller --batch-size, or use a machine with more."
    if isinstance(error, OSError):
        return f"{error.strerror}: '{error.filename}'" if error.filename and error.strerror else str(error)
    said = " ".join(str(error).split())[:200].rstrip(".")
    return f"Unexpected error ({type(error).__name__}{f': {said}' if said else ''}); --debug shows where."


@contextmanager
def _ended_by_signals(received: list[int]) -> Iterator[None]:
    """Let the signals that ask a process to end raise `Terminated`; the number of one that came is put into the list."""

    def end(number: int, frame: object) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # what cleans up is not cut short
        raise Terminated

    before: dict[int, Any] = {}
    names = ("SIGTERM", "SIGHUP")
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) == signal.SIG_DFL:  # who ignores it, as nohup does, goes on
                before[number] = signal.signal(number, end)
    except ValueError:  # only the main thread may
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines(logging.Handler):
    """Prints what is logged as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {' '.join(self.format(record).split())}", file=sys.stderr)


def calm(quiet: bool) -> None:
    """Keep other libraries' bars and notes out of the output; ours are warnings, of one line each, and none if quiet."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if quiet:
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    logging.getLogger(__package__.partition(".")[0]).handlers = [_Lines(logging.ERROR if quiet else logging.WARNING)]


def print_text(text: str, indent: str = "") -> None:
    """Print a sentence in lines of 80 columns; what has no blanks is not cut."""
    print(textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def print_field(name: str, items: Sequence[str]) -> None:
    """Print a name and, beside it, what it has: with commas between, and broken only there."""
    kept = [item.replace(" ", "\0") for item in items]
    lines = textwrap.wrap(", ".join(kept), WIDTH - 13, break_long_words=False, break_on_hyphens=False)
    for label, line in zip([name, *[""] * len(lines)], lines, strict=False):
        print(f"{label.ljust(13)}{line}".replace("\0", " "))


def print_dense(items: list[tuple[str, int, str]]) -> None:
    """Print what stays dense, one entry a reason."""
    print("\nstays dense:")
    for reason in dict.fromkeys(reason for _, _, reason in items):
        chosen = [(name, count) for name, count, why in items if why == reason]
        names = ", ".join(name for name, _ in chosen[:4]) + (f", … {len(chosen)} in all" if len(chosen) > 4 else "")
        print_text(f"  {names}: {sum(count for _, count in chosen):,} parameters; {reason}", indent="    ")


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print columns: the first to the left, the others to the right.

    Names in the first column are cut in the middle where the table would be wider than 80 columns.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    for row in [header, *rows]:
        cells = (
            _cut(cell, width).ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _cut(name: str, width: int) -> str:
    """Return a name of at most so many letters, its end kept."""
    tail = width * 2 // 3
    return name if len(name) <= width else f"{name[: width - tail - 1]}…{name[-tail:]}"


def print_json(content: dict[str, Any]) -> None:
    """Print plain JSON; what the output's encoding lacks is escaped as JSON escapes it."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(content, indent=2)
    print(text)


def megabytes(count: float) -> str:
    """Return bytes as MB, of 10⁶ bytes."""
    return f"{count / 1e6:.2f} MB"
