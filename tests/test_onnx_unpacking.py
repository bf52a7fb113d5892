"""Files of codes that are unpacked before a session is made: it says the same to the bit, and has nothing left to decode."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from test_layers import ENTRIES, make
from test_onnx import feeds_of
from test_onnx import folders as folders  # a fixture
from test_onnx_causal import InOnnx, exported, said
from test_onnx_structures import content_of, inputs_of, outputs_of, session_of

from hf_offline_compress import CompressionError, unpack_onnx
from hf_offline_compress.export.onnx import unpacking

FILES = ("model_quantized.onnx", "model.onnx")


@pytest.mark.parametrize("entry", list(ENTRIES))
@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_every_structure_says_the_same(kind, entry, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "SMALL", 16)  # these weights are tiny
    torch.manual_seed(0)
    module, _ = make(kind, entry, shared=kind == "linear")
    source = tmp_path / "packed.onnx"
    source.write_bytes(content_of(lambda builder, ids, x: outputs_of(builder, ids, x, module), module))
    unpacked = session_of(unpack_onnx(source, tmp_path / "unpacked.onnx"))
    session = session_of(source)
    assert [value.name for value in unpacked.get_outputs()] == [value.name for value in session.get_outputs()]
    for found, expected in zip(
        unpacked.run(None, inputs_of(module)), session.run(None, inputs_of(module)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("together", [unpacking.TOGETHER, 0], ids=["together", "one-by-one"])
def test_an_encoder_says_the_same_by_the_same_operators(folders, name, together, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "TOGETHER", together)
    source = folders[1] / "onnx" / name
    before = source.read_bytes()
    target = unpack_onnx(source, tmp_path / name)
    assert source.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [name]
    feeds = {name: tensor.numpy() for name, tensor in feeds_of(3, 11).items()}
    found, expected = (session_of(file).run(None, feeds)[0] for file in (target, source))
    np.testing.assert_array_equal(found, expected)
    assert operators(target, tmp_path) == operators(source, tmp_path)


def operators(file, scratch):
    """Return how often a session has each operator, once it has folded and fused all it can."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    options.log_severity_level = 3  # such a file is for this machine alone
    onnxruntime.InferenceSession(file, options)
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_all_that_is_multiplied_is_decoded_and_nothing_else(folders, tmp_path):
    target = unpack_onnx(folders[1] / "onnx/model_quantized.onnx", tmp_path / "model.onnx")
    model = onnx.load(target)
    onnx.checker.check_model(model)
    dtypes = {value.name: value.data_type for value in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert products and all(dtypes[node.input[1]] == TensorProto.INT8 for node in products)
    floats = [value for value in model.graph.initializer if value.data_type == TensorProto.FLOAT]
    # of at most two columns: the tables of trellis codes
    assert max(np.prod(value.dims) for value in floats if not value.dims or value.dims[-1] > 2) < 32 * 64
    assert not unpacking.Packed(model).groups


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("weights", ["int8", "float32"])
def test_a_causal_model_says_the_same(model_type, weights, tmp_path):
    """Its embedding is also its head: looked up as codes, and multiplied."""
    source = tmp_path / "packed.onnx"
    ir.save(exported(model_type)[2][weights], source)
    target = unpack_onnx(source, tmp_path / "unpacked.onnx")
    found, expected = (said(InOnnx(session_of(file))) for file in (target, source))
    np.testing.assert_array_equal(found, expected)


def a_graph(*nodes, **constants):
    """Return a model from x [n, 8] to y."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    values = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "g", [x], [y], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_what_graphs_within_nodes_take_is_kept(tmp_path):
    """A decoded weight that is used in a branch alone, and a node that could give another value each time."""
    decoded = helper.make_node("Cast", ["codes"], ["weight"], to=TensorProto.FLOAT)
    noise = helper.make_node("RandomNormalLike", ["weight"], ["noise"])
    nothing = helper.make_node("Sub", ["noise", "noise"], ["nothing"])
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["x", "weight"], ["out"])],
            operator,
            [],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        )
        for operator in ("MatMul", "Add")
    ]
    chosen = helper.make_node("If", ["true"], ["product"], then_branch=branches[0], else_branch=branches[1])
    end = helper.make_node("Add", ["product", "nothing"], ["y"])
    codes = np.arange(64, dtype=np.int8).reshape(8, 8)
    model = a_graph(decoded, noise, nothing, chosen, end, codes=codes, true=np.array(True))
    onnx.save(model, tmp_path / "packed.onnx")
    target = unpack_onnx(tmp_path / "packed.onnx", tmp_path / "unpacked.onnx")
    assert [node.op_type for node in onnx.load(target).graph.node] == ["RandomNormalLike", "Sub", "If", "Add"]
    x = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    np.testing.assert_allclose(session_of(target).run(None, {"x": x})[0], x @ codes, rtol=1e-5)


def test_what_a_caller_may_pass_stays_as_it_is(tmp_path):
    """A constant that is an input too, and what is computed from it."""
    nodes = [
        helper.make_node("Cast", [codes], [weight], to=TensorProto.FLOAT)
        for codes, weight in (("codes", "weight"), ("others", "other"))
    ]
    nodes += [helper.make_node("MatMul", pair, [out]) for pair, out in ((["x", "weight"], "z"), (["z", "other"], "y"))]
    codes = np.arange(64, dtype=np.int8).reshape(8, 8)
    model = a_graph(*nodes, codes=codes, others=codes)
    model.graph.input.append(helper.make_tensor_value_info("others", TensorProto.INT8, [8, 8]))
    onnx.save(model, tmp_path / "packed.onnx")
    target = unpack_onnx(tmp_path / "packed.onnx", tmp_path / "unpacked.onnx")
    assert {value.name for value in onnx.load(target).graph.initializer} == {"weight", "others"}
    x, passed = np.eye(8, dtype=np.float32), codes[::-1]
    for feeds, factor in (({"x": x}, codes), ({"x": x, "others": passed}, passed)):
        np.testing.assert_allclose(session_of(target).run(None, feeds)[0], codes.astype(np.float32) @ factor)


def write_nothing(file):
    pass


def write_text(file):
    file.write_text("not a model")


def write_dense(file):
    product = helper.make_node("MatMul", ["x", "weight"], ["y"])
    onnx.save(a_graph(product, weight=np.ones((8, 8), np.float32)), file)


def write_integers(file):
    """Integers with scales: what they stand for is four times as large."""
    larger = helper.make_node("DequantizeLinear", ["numbers", "scale"], ["weight"])
    product = helper.make_node("MatMul", ["x", "weight"], ["y"])
    onnx.save(a_graph(larger, product, numbers=np.ones((8, 8), np.int8), scale=np.array(2, np.float32)), file)


def write_damaged(file):
    """Shapes that do not fit together, in what is computed from constants."""
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("MatMul", ["x", "c"], ["y"])]
    onnx.save(a_graph(*nodes, a=np.ones((8, 8), np.float32), b=np.ones((9, 8), np.float32)), file)


@pytest.mark.parametrize(
    "write,target,sentence",
    [
        (
            write_nothing,
            "out.onnx",
            "There is no file '.*in.onnx'. Pass a file that export --format onnx has written.$",
        ),
        (write_text, "out.onnx", "'.*in.onnx' is no ONNX file: "),
        (
            write_dense,
            "out.onnx",
            "'.*in.onnx' has nothing to unpack: no weight in it is computed from codes; use it as it is.$",
        ),
        (write_integers, "out.onnx", "'.*in.onnx' has nothing to unpack: "),
        (write_damaged, "out.onnx", "ONNX Runtime does not compute what this file holds: "),
        (write_dense, "in.onnx", "'.*in.onnx' is there already; pass a file that does not exist yet.$"),
        (write_dense, "none/out.onnx", "'.*out.onnx' cannot be written: there is no folder '.*none'.$"),
    ],
)
def test_what_cannot_be_unpacked_is_one_sentence(tmp_path, write, target, sentence):
    write(tmp_path / "in.onnx")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CompressionError, match=f"^{sentence}"):
        unpack_onnx(tmp_path / "in.onnx", tmp_path / target)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_would_be_too_large_leaves_nothing(folders, tmp_path, monkeypatch):
    source = folders[1] / "onnx/model.onnx"
    monkeypatch.setattr(unpacking, "LARGEST_FILE", source.stat().st_size)
    with pytest.raises(CompressionError, match="may have 2 GB, and this one would be larger"):
        unpack_onnx(source, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
