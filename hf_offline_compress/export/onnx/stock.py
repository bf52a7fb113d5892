"""The graph of a stock model, with its matrices as inputs, so that nothing that is made of them is computed yet."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx_ir as ir


def stock_graph(model: Any, opset: int, token_types: bool) -> ir.Model:
    """Return the graph of a stock model without a cache, with its matrices as inputs, by the names of their parameters.

    Args:
        model: stock, with any weights.
        opset: of ONNX.
        token_types: whether segments of a text are told apart by an input of their own.
    """
    import torch
    from onnxscript import optimizer
    from torch.export import Dim
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    choices = (3,) if "MultipleChoice" in type(model).__name__ or "DoubleHeads" in type(model).__name__ else ()
    ids = torch.ones(2, *choices, 7, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if token_types and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    axes = {0: Dim.DYNAMIC, ids.dim() - 1: Dim.DYNAMIC}
    if choices:
        axes[1] = Dim.DYNAMIC
    config = OnnxConfig(
        dynamic=True, dynamic_shapes={name: dict(axes) for name in inputs}, opset_version=opset, optimize=False
    )
    kept = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    try:
        with _quiet():
            program = OnnxExporter().export(model, inputs, config).program
    finally:
        model.config.use_cache = kept
    _name_axes(program.graph)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() == 2 and name in program.graph.initializers:
            value = program.graph.initializers.pop(name)
            value.const_value = None
            program.graph.inputs.append(value)
    with _quiet():
        optimizer.optimize(program)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what exporters say of their versions and their progress."""
    import transformers

    before = logging.root.manager.disable
    verbosity = transformers.logging.get_verbosity()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        transformers.logging.set_verbosity(verbosity)


def _name_axes(graph: ir.Graph) -> None:
    """Give the dynamic axes of inputs and outputs the names that they have everywhere."""
    ids = graph.inputs[0]
    names = ["batch_size", *(["choices"] if len(ids.shape) == 3 else []), "sequence_length"]
    known = {str(axis): name for axis, name in zip(ids.shape, names, strict=True)}
    for value in [*graph.inputs, *graph.outputs]:
        axes = list(value.shape)
        if value in graph.inputs:
            axes = list(names)
        else:
            axes = [known.get(str(axis), axis) if not isinstance(axis, int) else axis for axis in axes]
        value.shape = ir.Shape(axes)
