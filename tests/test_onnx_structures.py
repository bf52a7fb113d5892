"""Every structure's part of an ONNX graph, in ONNX Runtime, against what the runtime decodes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from test_layers import ENTRIES, make

from hf_offline_compress.export.onnx.graph import FLOAT, GraphBuilder
from hf_offline_compress.export.onnx.source import LARGEST
from hf_offline_compress.export.onnx.sources import SOURCES, source_of
from hf_offline_compress.runtime.layers_compressed import EMBEDDINGS, LINEARS
from hf_offline_compress.runtime.packing_compressed import pack
from hf_offline_compress.runtime.specs_compressed import weight_spec

IDS = np.array([0, 13, 3, 3, 7, 2], np.int64)
# Only gathered, and multiplied by stored scales.
EXACT = ("quantized", "codebook")


def content_of(outputs, model):
    """Return a file of a graph with the outputs that a function makes, given a builder and the graph's inputs."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["m", model.columns]))
    graph = ir.Graph([ids, x], [], nodes=[], opset_imports={"": 18}, name="g")
    builder = GraphBuilder(graph)
    for name, value in outputs(builder, ids, x).items():
        value = builder("Identity", value)
        value.name = name
        graph.outputs.append(value)
    builder.finish()
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def session_of(file):
    """Return a session of a file, or of what is in one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options)


def inputs_of(module):
    return {"ids": IDS, "x": np.random.default_rng(0).standard_normal((4, module.columns)).astype(np.float32)}


def outputs_of(builder, ids, x, module):
    source = source_of(builder, module, False)
    matrix = source.int8()
    return {
        "whole": source.float32(),
        "rows": source.lookup(ids),
        "product": source.product(x, False),
        "int8": source.product(x, True),
        "numbers": builder.cast(matrix.numbers, FLOAT),
        "scales": matrix.scales,
    }


def compare(module, exact):
    session = session_of(content_of(lambda builder, ids, x: outputs_of(builder, ids, x, module), module))
    names = [output.name for output in session.get_outputs()]
    inputs = inputs_of(module)
    found = dict(zip(names, session.run(None, inputs), strict=True))
    with torch.no_grad():
        dense = module.dense_weight().numpy()
    limits = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6 * np.abs(dense).max()}
    np.testing.assert_allclose(found["whole"], dense.T, **limits)
    np.testing.assert_allclose(found["rows"], dense[IDS], **limits)
    expected = inputs["x"] @ dense.T
    np.testing.assert_allclose(found["product"], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found["numbers"]).max() <= LARGEST
    step = np.abs(found["scales"])[None]
    # one step: of the table's rounding, and of a row that was made smaller
    assert (np.abs(found["numbers"] * found["scales"] - dense.T) <= step * 1.000001).all()
    error = np.linalg.norm(found["int8"] - expected) / np.linalg.norm(expected)
    assert error < 0.05


@pytest.mark.parametrize("entry", list(ENTRIES))
@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_every_structure_decodes_to_what_the_runtime_decodes(entry, kind):
    torch.manual_seed(0)
    module, _ = make(kind, entry, shared=kind == "linear")
    compare(module, exact=entry.removesuffix("_in_groups").removesuffix("_packed") in EXACT)


def test_there_is_a_generator_for_every_structure():
    assert set(SOURCES) == set(LINEARS) == set(EMBEDDINGS)


@pytest.mark.parametrize("step", range(1, 11))
@pytest.mark.parametrize("rows,columns,run", [(50, 31, 16), (64, 32, 64), (21, 10, 7)])
def test_every_rate_of_a_trellis(step, rows, columns, run):
    from hf_offline_compress.structures import GroupShape, Trellis

    torch.manual_seed(step)
    shape = GroupShape(1, rows, columns)
    group = {**Trellis(run=run, outliers=0.01).runtime(step, shape), "storage": "float32"}
    module = LINEARS["trellis"](rows, columns, weight_spec(group))
    module.codes.random_(256)
    module.scales.random_(256)
    module.scale_range.data = torch.tensor([-6.0, 0.01])
    module.outlier_rows.copy_(pack(torch.randint(rows, (module.outliers,)).sort().values, module.row_bits))
    module.outlier_columns.copy_(pack(torch.randint(columns, (module.outliers,)), module.column_bits))
    module.outlier_values.data.normal_()
    compare(module, exact=False)
