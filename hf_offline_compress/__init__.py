"""Transformer language models several times smaller, offline: in minutes, without fine-tuning.

Importing this package makes `AutoModel…from_pretrained` load the folders that it writes. Nothing heavy is imported
before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration
from .errors import CompressionError
from .recipe import Grouping, Objective, Recipe, Rule, load_recipe
from .version import __version__

if TYPE_CHECKING:
    from .compressor import CompressionResult, compress
    from .folder import inspect_folder
    from .plan import Plan, make_plan
    from .report import Report

__all__ = [
    "CompressionError",
    "CompressionResult",
    "Grouping",
    "Objective",
    "Plan",
    "Recipe",
    "Report",
    "Rule",
    "__version__",
    "compress",
    "inspect_folder",
    "load_recipe",
    "make_plan",
]

_LAZY = {
    "compress": "compressor",
    "CompressionResult": "compressor",
    "inspect_folder": "folder",
    "make_plan": "plan",
    "Plan": "plan",
    "Report": "report",
}

registration.check_transformers()
registration.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name.startswith("Compressed"):
        return registration.public(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
