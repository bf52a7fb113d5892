"""The one exception that users meet."""


class CompressionError(ValueError):
    """Something that was asked for cannot be done.

    The message is one sentence or two: what was asked, what is wrong, what would work. It is raised before any work is
    done wherever that is possible, and nothing has been written when it is raised. The command line prints the message
    and exits with 1.
    """


def listing(names: object) -> str:
    """Return names in one line for an error message, e.g. ``"ae, svd"``."""
    return ", ".join(str(name) for name in names)  # type: ignore[attr-defined]
