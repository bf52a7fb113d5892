"""The exceptions that users see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CompressionError(ValueError):
    """A request that cannot be met.

    The message has one or two sentences: the request, the problem and a remedy. It is raised before any work is
    done wherever that is possible, and nothing has been written when it is raised. The command line prints the message
    and exits with 1.
    """


class BudgetTooSmallError(CompressionError):
    """A budget that not even the smallest form of everything fits into.

    Attributes:
        total_ratio: of the smallest form.
    """

    def __init__(self, message: str, total_ratio: float) -> None:
        """Keep the ratio beside the message."""
        super().__init__(message)
        self.total_ratio = total_ratio


class UnsavedError(CompressionError):
    """The results could not be saved.

    Attributes:
        result: what would have been returned.
    """

    def __init__(self, message: str, result: Any) -> None:
        """Keep the result beside the message."""
        super().__init__(message)
        self.result = result


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Raise CompressionError for whatever a library raises over files that are none of ours; for a few lines only.

    Args:
        what: which files, and what cannot be done with them.
        advice: what would work.
    """
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:300]}…"
        raise CompressionError(f"{what}: {reason.rstrip('.')}. {advice}") from error


def needs_extra(what: str, package: str, extra: str) -> str:
    """Return the sentence for a library that is not installed; how extras are installed stands in the README alone."""
    return f"{what} needs {package}, which is not installed; the extra '{extra}' has it (see Install in the README)."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; torch's on a CPU is a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def shortened(names: list[str], shown: int = 3) -> str:
    """Return the first of some names in one line, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{listing(names[:shown])}{more}"


def listing(names: object) -> str:
    """Return names in one line for an error message, e.g. ``"ae, svd"``."""
    return ", ".join(str(name) for name in names)  # type: ignore[attr-defined]
