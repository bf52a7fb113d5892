"""How commands run and what they print: tables, JSON, and errors of one line."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from ..errors import CompressionError


def run(work: Callable[[], None], debug: bool) -> None:
    """Do the work; an error is one line on stderr and exit code 1."""
    try:
        work()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CompressionError, ImportError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print(f"interrupted; {str(error) or 'nothing was written'}", file=sys.stderr)
        raise typer.Exit(130) from error


def calm(quiet: bool) -> None:
    """Keep transformers' own bars and notes out of the output; ours are warnings, of one line each, and none if quiet."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if quiet:
        transformers_logging.set_verbosity_error()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    ours = logging.getLogger(__package__.partition(".")[0])
    ours.handlers = [handler]
    ours.setLevel(logging.ERROR if quiet else logging.WARNING)


def print_dense(items: list[tuple[str, int, str]]) -> None:
    """Print what stays dense, one line a reason."""
    print("\nstays dense:")
    for reason in dict.fromkeys(reason for _, _, reason in items):
        chosen = [(name, count) for name, count, why in items if why == reason]
        names = ", ".join(name for name, _ in chosen[:4]) + (f", … {len(chosen)} in all" if len(chosen) > 4 else "")
        print(f"  {names}: {sum(count for _, count in chosen):,} parameters; {reason}")


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def print_json(content: dict[str, Any]) -> None:
    """Print plain JSON."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def megabytes(count: float) -> str:
    """Return bytes as MB, of 10⁶ bytes."""
    return f"{count / 1e6:.2f} MB"
