"""Simple alternatives in ONNX: a base's graph in float32, and in int8 by ONNX Runtime's own quantization."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CompressionError, needs_extra
from ..export.onnx.folder import check_head, check_packages
from ..runtime.engines_compressed import has_vnni

# What runs a file → the package that it needs.
RUNTIMES = {"onnxruntime-float32": "onnxruntime", "onnxruntime-int8": "onnxruntime", "openvino-int8": "openvino"}

# Bytes of one protobuf message, as a file is, at most.
LARGEST = 2**31 - 1


def why_not(kind: str, config: Mapping[str, Any]) -> str | None:
    """Return why a file of the base cannot be made or run, or None.

    Args:
        kind: one of `RUNTIMES`.
        config: of the compressed model, whose class is the base's.
    """
    package = RUNTIMES[kind]
    if find_spec(package) is None:
        in_extra = package == "onnxruntime"
        return needs_extra("An ONNX file", package, "onnx") if in_extra else f"{package} is not installed"
    try:
        check_packages()
        check_head(config)
    except CompressionError as error:
        return str(error)
    return None


def too_large(model: Any) -> str | None:
    """Return why a stock model does not fit into one ONNX file, or None."""
    # A tied head counts twice: for int8 it gets a matrix of its own.
    size = 4 * sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    if size < LARGEST:
        return None
    return f"an ONNX file has at most {LARGEST / 1e9:.1f} GB, and this one would have {size / 1e9:.1f} in float32"


def dense_files(
    model: Any, folder: Path, kinds: Sequence[str], *, cached: bool, token_types: bool = False
) -> dict[str, Path]:
    """Write a stock model as ONNX files, and return them by their kinds.

    Args:
        model: stock, in float32.
        folder: where to.
        kinds: of `RUNTIMES`.
        cached: whether it is a causal language model, with a cache.
        token_types: whether segments of a text are told apart by an input of their own.
    """
    from ..export.onnx.model import onnx_models, save

    whole = folder / "dense.onnx"
    models = onnx_models(model, model, ("float32",), opset=18, token_types=token_types, cached=cached)
    save(models["float32"], whole)
    files = dict.fromkeys(kinds, whole)
    if any(kind.endswith("int8") for kind in kinds):
        quantized = folder / "dense-int8.onnx"
        quantize(whole, quantized)
        files |= {kind: quantized for kind in kinds if kind.endswith("int8")}
    return files


def quantize(file: Path, out: Path) -> None:
    """Write a file in int8 as ONNX Runtime does, with a scale for each column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    apart = out.with_name("dense-apart.onnx")
    _as_others_write_it(file, apart)
    # Without VNNI, 7 bits: two products of a byte are added in 16 bits, and 8 would be cut off there.
    options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": not has_vnni()}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises to shape a graph that needs no shaping
    try:
        quantize_dynamic(apart, out, **options)
    finally:
        logging.disable(before)
    apart.unlink()


def _as_others_write_it(file: Path, out: Path) -> None:
    """Write a file whose constants are float32 and whose tied head has a matrix of its own.

    `quantize_dynamic` makes an invalid file of a lookup in half precision, and passes over a matrix that is transposed in
    the graph.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in stored.values():
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in list(model.graph.node):
        if node.op_type in ("Cast", "Transpose") and (tensor := stored.get(node.input[0])) is not None:
            if tensor.data_type != onnx.TensorProto.FLOAT:
                continue
            array = numpy_helper.to_array(tensor)
            array = array.T.copy() if node.op_type == "Transpose" else array
            made = numpy_helper.from_array(array, node.output[0])
            model.graph.initializer.append(made)
            stored[made.name] = made
            model.graph.node.remove(node)
    onnx.save(model, out)
