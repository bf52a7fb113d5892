"""The command line, one file a command. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from . import benchmark, card, compress, evaluate, export, inspect, plan, presets, push, verify
from .options import app


def _version(asked: bool) -> None:
    if asked:
        print(f"hf-offline-compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-offline-compress")


__all__ = [
    "app",
    "benchmark",
    "card",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "main",
    "plan",
    "presets",
    "push",
    "verify",
]
