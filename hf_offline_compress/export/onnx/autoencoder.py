"""Autoencoders in ONNX: rows from latents by a small network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from .graph import GraphBuilder, float32, integers
from .low_rank import decoder_of
from .packing import number_rows, numbers
from .source import Source


class Autoencoder(Source):
    """ŵᵢ = decoder(zᵢ), rescaled to a stored norm."""

    scale = "norms"

    def float32(self) -> ir.Value:
        """Return the weight; see the base class."""
        graph, weight = self.graph, self.weight
        scales = None if getattr(weight, self.scale) is None else numbers(graph, weight, self.scale)
        return graph("Transpose", self._rows(numbers(graph, weight, "latents"), scales), perm=[1, 0])

    def lookup(self, ids: ir.Value) -> ir.Value:
        """Return rows; see the base class."""
        graph, weight = self.graph, self.weight
        scales = None if getattr(weight, self.scale) is None else number_rows(graph, weight, self.scale, ids)
        return self._rows(number_rows(graph, weight, "latents", ids), scales)

    def _rows(self, latents: ir.Value, norms: ir.Value | None) -> ir.Value:
        graph, decoder = self.graph, decoder_of(self.weight)
        for layer in decoder.layers[:-1]:
            latents = activated(graph, decoder.activation, linear(graph, latents, layer))
        rows = activated(graph, decoder.output_activation, linear(graph, latents, decoder.layers[-1]))
        if norms is None:
            return rows
        lengths = graph("ReduceL2", rows, integers(1), keepdims=1)
        lengths = graph("Max", lengths, float32(1e-12))
        return graph("Mul", rows, graph("Div", graph("Unsqueeze", norms, integers(1)), lengths))


class Residual(Autoencoder):
    """ŵᵢ = decoder(zᵢ), a matrix and a hidden layer on top of it, times a stored scale."""

    scale = "scales"

    def _rows(self, latents: ir.Value, norms: ir.Value | None) -> ir.Value:
        graph, decoder = self.graph, decoder_of(self.weight)
        hidden = activated(graph, decoder.activation, linear(graph, latents, decoder.hidden))
        rows = graph("Add", linear(graph, latents, decoder.linear), linear(graph, hidden, decoder.output))
        return rows if norms is None else graph("Mul", rows, graph("Unsqueeze", norms, integers(1)))


def linear(graph: GraphBuilder, x: ir.Value, layer: Any) -> ir.Value:
    """Return a small linear layer's outputs [n, out] of x [n, in]."""
    out = graph("MatMul", x, graph("Transpose", numbers(graph, layer, "weight"), perm=[1, 0]))
    bias = None if layer.bias is None else numbers(graph, layer, "bias")
    return out if bias is None else graph("Add", out, bias)


def activated(graph: GraphBuilder, activation: Callable[[Any], Any], x: ir.Value) -> ir.Value:
    """Return an activation of the runtime's of x."""
    from ...runtime.structures_compressed import ACTIVATIONS

    name = next(name for name, known in ACTIVATIONS.items() if known is activation)
    if name == "none":
        return x
    if name == "gelu":
        share = graph("Add", graph("Erf", graph("Mul", x, float32(1 / math.sqrt(2)))), float32(1))
        return graph("Mul", graph("Mul", x, float32(0.5)), share)
    attributes = {"leaky_relu": {"alpha": 0.01}, "elu": {"alpha": 1.0}}.get(name, {})
    operator = {"leaky_relu": "LeakyRelu", "relu": "Relu", "elu": "Elu", "tanh": "Tanh", "sin": "Sin"}[name]
    return graph(operator, x, **attributes)
