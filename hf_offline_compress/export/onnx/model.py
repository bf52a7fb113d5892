"""A compressed model as one ONNX model: the stock model's graph, and in the place of each matrix its codes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from .graph import GraphBuilder
from .sources import source_of
from .stock import stock_graph
from .substitution import Substitution

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def onnx_models(
    compressed: PreTrainedModel,
    stock: PreTrainedModel,
    weights: tuple[str, ...],
    *,
    opset: int,
    token_types: bool = False,
    cached: bool = False,
) -> dict[str, ir.Model]:
    """Return ONNX models by the dtype of their products.

    Args:
        compressed: what is exported.
        stock: the stock model that it stands for.
        weights: "int8", "float32" or both.
        opset: of ONNX.
        token_types: whether segments of a text are told apart by an input of their own.
        cached: whether keys and values of the tokens before are inputs, and with those of the new tokens outputs.
    """
    from transformers.pytorch_utils import Conv1D

    program = stock_graph(stock, opset, token_types=token_types, cached=cached)
    models = {}
    for kind in weights:
        model = program if kind == weights[-1] else program.clone()
        builder = GraphBuilder(model.graph, in_two_parts=cached)
        substitution = Substitution(builder, kind == "int8")
        for matrix in [value for value in model.graph.inputs if str(value.name).endswith(".weight")]:
            name = str(matrix.name).removesuffix(".weight")
            transposed = isinstance(stock.get_submodule(name), Conv1D)
            source = source_of(builder, compressed.get_submodule(name), transposed)
            substitution.replace(matrix, source, transposed)
        substitution.finish()
        model.producer_name, model.producer_version = _producer()
        models[kind] = model
    return models


def _producer() -> tuple[str, str]:
    from ...version import __version__

    return "hf-offline-compress", __version__


def save(model: Any, path: Path) -> None:
    """Write a model as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)
