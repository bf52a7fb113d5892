"""Transformer language models several times smaller, offline: in minutes, without fine-tuning.

Importing this package makes `AutoModel…from_pretrained` load the folders that it writes. Nothing heavy is imported
before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration
from .errors import CompressionError
from .request.objective import Objective
from .request.options import CompressionOptions
from .request.reading import load_recipe
from .request.recipe import Grouping, Recipe, Rule
from .version import __version__

if TYPE_CHECKING:
    from .artifact.reading import inspect_folder
    from .artifact.report import Report
    from .card import write_card
    from .compressor import CompressionResult, compress
    from .evaluate import EvaluationOptions, evaluate_folder
    from .export.exporting import export_folder
    from .export.onnx.unpacking import unpack_onnx
    from .hub.push import Pushed, push_folder
    from .plan.groups import Plan
    from .plan.make import make_plan
    from .verifying import Verification, verify_folder

__all__ = [
    "CompressionError",
    "CompressionOptions",
    "CompressionResult",
    "EvaluationOptions",
    "Grouping",
    "Objective",
    "Plan",
    "Pushed",
    "Recipe",
    "Report",
    "Rule",
    "Verification",
    "__version__",
    "compress",
    "evaluate_folder",
    "export_folder",
    "inspect_folder",
    "load_recipe",
    "make_plan",
    "push_folder",
    "unpack_onnx",
    "verify_folder",
    "write_card",
]

_LAZY = {
    "compress": "compressor",
    "CompressionResult": "compressor",
    "EvaluationOptions": "evaluate",
    "evaluate_folder": "evaluate",
    "export_folder": "export.exporting",
    "inspect_folder": "artifact.reading",
    "make_plan": "plan.make",
    "Plan": "plan.make",
    "Pushed": "hub.push",
    "push_folder": "hub.push",
    "Report": "artifact.report",
    "unpack_onnx": "export.onnx.unpacking",
    "Verification": "verifying",
    "verify_folder": "verifying",
    "write_card": "card",
}


def _publish(model: Any, repo_id: str, **options: Any) -> str:
    """Verify and publish a model: what its `push_to_hub` does where the package is there."""
    published: str = import_module(".hub.push", __name__).push_model(model, repo_id, **options)
    return published


registration.publish = _publish
registration.check_transformers()
registration.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name.startswith("Compressed"):
        return registration.public(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
