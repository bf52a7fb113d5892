"""How good a compressed model still is, always beside its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..metrics.agreement import agreement, sentence_embeddings

if TYPE_CHECKING:
    from .benchmarking import benchmark_folder
    from .evaluation import evaluate_folder
    from .tasks import TaskSettings
    from .text_evaluation import TextSettings

__all__ = [
    "TaskSettings",
    "TextSettings",
    "agreement",
    "benchmark_folder",
    "evaluate_folder",
    "sentence_embeddings",
]

_LAZY = {
    "TaskSettings": "tasks",
    "TextSettings": "text_evaluation",
    "benchmark_folder": "benchmarking",
    "evaluate_folder": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
