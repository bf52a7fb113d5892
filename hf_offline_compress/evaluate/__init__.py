"""Quality and speed of a compressed model, always beside its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..metrics.agreement import agreement, sentence_embeddings
    from .benchmarking import benchmark_folder
    from .evaluation import evaluate_folder
    from .options import EvaluationOptions
    from .tasks import TaskSettings
    from .text_settings import TextSettings

__all__ = [
    "EvaluationOptions",
    "TaskSettings",
    "TextSettings",
    "agreement",
    "benchmark_folder",
    "evaluate_folder",
    "sentence_embeddings",
]

_LAZY = {
    "EvaluationOptions": ".options",
    "TaskSettings": ".tasks",
    "TextSettings": ".text_settings",
    "agreement": "..metrics.agreement",
    "benchmark_folder": ".benchmarking",
    "evaluate_folder": ".evaluation",
    "sentence_embeddings": "..metrics.agreement",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
