"""The graph of a stock model, with its matrices as inputs, so that nothing that is made of them is computed yet."""

from __future__ import annotations

import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx_ir as ir

# Axes of inputs, by what they are; all others of a cache are what they are in the model.
_IDS = ("batch_size", "sequence_length")
_CHOICES = ("batch_size", "choices", "sequence_length")
_MASK = ("batch_size", "total_sequence_length")
_CACHE = ("batch_size", None, "past_sequence_length", None)
_PRESENT = ("batch_size", None, "total_sequence_length", None)
# How the exporter calls the keys and values of a layer.
_STATE = re.compile(r"(?:input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")


def stock_graph(model: Any, opset: int, *, token_types: bool = False, cached: bool = False) -> ir.Model:
    """Return the graph of a stock model, with its matrices as inputs, by the names of their parameters.

    Args:
        model: stock, with any weights.
        opset: of ONNX.
        token_types: whether segments of a text are told apart by an input of their own.
        cached: whether it takes keys and values of the tokens before, and gives them with those of the new tokens. The
            cache may be empty, so that one graph reads a prompt and goes on from it.
    """
    from onnxscript import optimizer
    from torch.export import Dim
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs = _cached_inputs(model) if cached else _inputs(model, token_types)
    shapes: dict[str, Any] = {
        name: dict.fromkeys(range(value.dim()), Dim.DYNAMIC)
        for name, value in inputs.items()
        if name != "past_key_values"
    }
    if cached:
        states = 2 * len(inputs["past_key_values"].layers)
        shapes["past_key_values"] = [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in range(states)]
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset, optimize=False)
    kept = getattr(model.config, "use_cache", None)
    model.config.use_cache = cached
    try:
        with _quiet():
            program = OnnxExporter().export(model, inputs, config).program
    finally:
        model.config.use_cache = kept
    _name(program.graph)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() == 2 and name in program.graph.initializers:
            value = program.graph.initializers.pop(name)
            value.const_value = None
            program.graph.inputs.append(value)
    with _quiet():
        optimizer.optimize(program)
    return program


def _inputs(model: Any, token_types: bool) -> dict[str, Any]:
    """Return inputs of an encoder to make its graph with."""
    import torch

    choices = (3,) if "MultipleChoice" in type(model).__name__ or "DoubleHeads" in type(model).__name__ else ()
    ids = torch.ones(2, *choices, 7, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if token_types and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def _cached_inputs(model: Any) -> dict[str, Any]:
    """Return inputs of a causal model to make its graph with: three tokens after five.

    Every layer keeps all tokens: where attention is to the last ones alone, the mask says so.
    """
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        before = model(torch.ones(2, 5, dtype=torch.long), past_key_values=DynamicCache(), use_cache=True)
    inputs: dict[str, Any] = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": torch.arange(5, 8).repeat(2, 1),
        "past_key_values": before.past_key_values,
    }
    if "position_ids" not in inspect.signature(model.forward).parameters:
        del inputs["position_ids"]
    return inputs


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


def _name(graph: ir.Graph) -> None:
    """Give inputs, outputs and their dynamic axes the names that they have everywhere."""
    for value in graph.inputs:
        if state := _STATE.fullmatch(str(value.name)):
            value.name = f"past_key_values.{state[1]}.{state[2]}"
    for value in graph.outputs:
        if state := _STATE.fullmatch(str(value.name)):
            value.name = f"present.{state[1]}.{state[2]}"
    cached = any(str(value.name).startswith("past_key_values.") for value in graph.inputs)
    known: dict[str, str] = {}
    for value in graph.inputs:
        name = str(value.name)
        if name.startswith("past_key_values."):
            axes: tuple[str | None, ...] = _CACHE
        elif cached and name == "attention_mask":
            axes = _MASK
        else:
            axes = _IDS if len(value.shape) == len(_IDS) else _CHOICES
        known |= {str(axis): axis_name for axis, axis_name in zip(value.shape, axes, strict=True) if axis_name}
        value.shape = ir.Shape([new or old for old, new in zip(value.shape, axes, strict=True)])
    for value in graph.outputs:
        if str(value.name).startswith("present."):
            value.shape = ir.Shape([new or old for old, new in zip(value.shape, _PRESENT, strict=True)])
        else:
            value.shape = ir.Shape([known.get(str(axis), axis) for axis in value.shape])
