"""When weights are decoded, how many bytes of them are kept, and that it makes no difference to what comes out."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from common import nonlinear, outputs_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from hf_offline_compress.plan.make import make_plan
from hf_offline_compress.request.recipe import Recipe, Rule
from hf_offline_compress.runtime import modeling_compressed, seen_compressed, trellis_compressed, weights_compressed
from hf_offline_compress.runtime.layers_compressed import EMBEDDINGS, LINEARS, TiedHead
from hf_offline_compress.runtime.modeling_compressed import compressed_class
from hf_offline_compress.runtime.packing_compressed import pack
from hf_offline_compress.runtime.specs_compressed import weight_spec
from hf_offline_compress.runtime.weights_compressed import DecodedBudget, DecodedWeight, set_decoding
from hf_offline_compress.structures import (
    Autoencoder,
    Codebook,
    GroupShape,
    Kronecker,
    Mixture,
    Quantized,
    Sparse,
    Trellis,
)

HEAD = "BertForMaskedLM"
# rows, columns, rows of a stream, step of the rate: streams that are cut, columns that are filled up, bytes of all kinds
TRELLISES = {
    "blocks_of_bytes": (70, 24, 16, 4),
    "three_bits": (70, 23, 24, 3),
    "one_bit": (80, 24, 80, 1),
    "seven_bits": (40, 11, 8, 7),
    "single_weights": (40, 11, 20, 9),
    "blocks_begin_within_a_byte": (61, 17, 61, 3),
    "a_byte_a_block": (24, 9, 8, 1),
    "one_row": (1, 9, 64, 5),
    "classes": (70, 24, 16, Mixture(((6, 1), (4, 2), (3, 2)))),
    "classes_of_single_weights_and_pairs": (45, 11, 12, Mixture(((10, 1), (5, 1), (2, 1), (1, 1)))),
}
every_trellis = pytest.mark.parametrize("case", list(TRELLISES))


def filled(layer):
    """Fill a layer with random codes and numbers."""
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter)
        if name.endswith("scale_range"):  # logarithms, in 255 steps
            parameter.data.mul_(0.01)
    for name, buffer in layer.named_buffers():
        buffer.random_(256)
        if name == "classes":  # each of as many rows as it has room for
            sizes = torch.tensor([end - first for first, end in layer.bounds])
            kinds = torch.arange(len(sizes)).repeat_interleave(sizes)
            buffer.copy_(pack(kinds[torch.randperm(layer.rows)], layer.class_bits))
    return layer


def trellis(case, kind=LINEARS, outliers=0.05, **options):
    rows, columns, run, size = TRELLISES[case]
    group = Trellis(run=run, outliers=outliers).runtime(size, GroupShape(1, rows, columns, heads=1))
    return filled(kind["trellis"](rows, columns, weight_spec({**group, "storage": "float32"}), **options))


def layer_of(structure, size, rows, columns, kind=EMBEDDINGS):
    spec = weight_spec({**structure.runtime(size, GroupShape(1, rows, columns, heads=1)), "storage": "float32"})
    return filled(kind[spec.structure](rows, columns, spec))


def by_the_book(layer):
    """Decode a trellis bit by bit: a state is the last bits of the stream, which is stored from its end."""
    low, step = layer.scale_range.tolist()
    codes, in_streams = bytes(layer.codes.tolist()), []
    for kind in layer.row_classes:
        values = torch.zeros(kind.streams * kind.run, layer.columns)
        table = trellis_compressed.trellis_table(kind.state_bits, kind.width, kind.bits).tolist()
        for stream in range(kind.streams):
            packed, codes = codes[: kind.length], codes[kind.length :]
            whole = int.from_bytes(packed, "little") & (1 << kind.steps * kind.bits) - 1
            for at in range(kind.steps):
                state = (whole >> (kind.steps - 1 - at) * kind.bits) & (1 << kind.state_bits) - 1
                i, block = stream * layer.run + at % layer.run, at // layer.run
                for k, value in enumerate(table[state]):
                    if block * kind.width + k < layer.columns:
                        values[i, block * kind.width + k] = value
        in_streams += list(values)
    assert not codes
    classes = [0] * layer.rows
    if layer.class_bits:
        packed = int.from_bytes(bytes(layer.classes.tolist()), "little")
        classes = [packed >> i * layer.class_bits & (1 << layer.class_bits) - 1 for i in range(layer.rows)]
    weight = torch.zeros(layer.rows, layer.columns)
    for row, values in zip(sorted(range(layer.rows), key=classes.__getitem__), in_streams, strict=False):
        weight[row] = values * 2 ** (low + int(layer.scales[row]) * step)
    if layer.outliers:
        for i, j, value in zip(*layer._outlier_places(), layer.outlier_values, strict=True):
            weight[i, j] += value.item()
    return weight


@pytest.fixture
def few_at_once(monkeypatch):
    """Cut the work into parts that are smaller than these tiny matrices."""
    monkeypatch.setattr(trellis_compressed, "WEIGHTS_AT_ONCE", 100)
    monkeypatch.setattr(weights_compressed, "DECODED_AT_ONCE", 230)


@every_trellis
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@torch.no_grad()
def test_trellises_decode_by_the_book(case, outliers, few_at_once):
    layer = trellis(case, outliers=outliers)
    expected = by_the_book(layer)
    torch.testing.assert_close(layer.dense_weight(), expected)
    ids = torch.randint(layer.rows, (3, 5))
    torch.testing.assert_close(layer.some_rows(ids), expected[ids])
    for start, stop in ((0, layer.rows), (layer.rows // 3, layer.rows), (layer.rows // 2, layer.rows // 2 + 1)):
        torch.testing.assert_close(layer.row_block(start, stop), expected[start:stop])
    assert not layer.some_rows(ids[:0]).numel()


@every_trellis
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_trellises_decode_in_the_models_dtype(case, dtype):
    layer = trellis(case).to(dtype)
    weight = layer.dense_weight()
    assert weight.dtype == layer.some_rows(torch.tensor([0])).dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # tables are made in float32
    torch.testing.assert_close(weight.float(), by_the_book(layer), atol=4 * rounding, rtol=rounding)


@every_trellis
def test_gradients_of_a_trellis_do_not_depend_on_what_is_decoded(case):
    layer = trellis(case, EMBEDDINGS)
    ids = torch.randint(layer.rows, (2, 7))
    found = []
    for rows in (layer.some_rows(ids), layer.dense_weight()[ids]):
        layer.zero_grad()
        rows.square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})
    torch.testing.assert_close(*found)
    assert found[0]["scale_range"].abs().sum() > 0


@every_trellis
@torch.no_grad()
def test_on_the_fly_equals_cached_equals_dense(case, few_at_once):
    linear, embedding = trellis(case, bias=True), trellis(case, EMBEDDINGS)
    x, ids = torch.randn(2, 3, linear.columns), torch.randint(linear.rows, (4, 2))
    head = TiedHead(embedding, torch.nn.Parameter(torch.randn(embedding.rows)))
    table = embedding.dense_weight()
    expected = [F.linear(x, linear.dense_weight(), linear.bias), F.linear(x, table, head.bias), F.embedding(ids, table)]
    for decoding in ("cached", "on_the_fly"):
        set_decoding([linear, embedding], decoding)
        torch.testing.assert_close([linear(x), head(x), embedding(ids)], expected)
        kept = [layer._cache is not None for layer in (linear, embedding)]
        assert kept == [decoding == "cached"] * 2


@pytest.mark.parametrize("structure,size", [(Trellis(run=8), 4), (Codebook(), 4), (Quantized(), 4), (Kronecker(), 2)])
@torch.no_grad()
def test_large_weights_are_applied_in_blocks_of_rows(structure, size, few_at_once, monkeypatch):
    layer = layer_of(structure, size, 50, 12)
    x, expected = torch.randn(2, 12), layer.dense_weight()
    blocks = []
    original = type(layer).row_block
    monkeypatch.setattr(type(layer), "row_block", lambda self, *at: blocks.append(at) or original(self, *at))
    monkeypatch.setattr(type(layer), "dense_weight", lambda self: pytest.fail("all rows were decoded at once"))
    layer.decoding = "on_the_fly"
    torch.testing.assert_close(layer(x, as_logits=True), F.linear(x, expected))
    assert blocks == [(0, 19), (19, 38), (38, 50)]


@torch.no_grad()
def test_what_can_only_be_decoded_as_a_whole_is_decoded_once(few_at_once, monkeypatch):
    layer = layer_of(Sparse(), 60, 50, 12)
    calls = []
    original = type(layer).dense_weight
    monkeypatch.setattr(type(layer), "dense_weight", lambda self: calls.append(1) or original(self))
    layer.decoding = "on_the_fly"
    layer(torch.randn(2, 12), as_logits=True)
    assert len(calls) == 1


@torch.no_grad()
def test_embeddings_decode_the_rows_asked_for(monkeypatch):
    layer = trellis("blocks_of_bytes", EMBEDDINGS)
    expected = layer.dense_weight()
    layer.decoding = "on_the_fly"
    few, many = torch.tensor([3, 69, 3]), torch.randint(70, (9, 8))
    torch.testing.assert_close(layer(many), expected[many])  # more ids than rows: each row once
    monkeypatch.setattr(type(layer), "dense_weight", lambda self: pytest.fail("all rows were decoded"))
    torch.testing.assert_close(layer(few), expected[few])


@pytest.mark.parametrize("decoding", ["cached", "on_the_fly"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@torch.no_grad()
def test_trellises_compile_in_one_graph_and_run_under_autocast(decoding, kind):
    torch.compiler.reset()
    layer = trellis("blocks_of_bytes", LINEARS if kind == "linear" else EMBEDDINGS)
    layer.decoding = decoding
    x = torch.randn(2, 24) if kind == "linear" else torch.tensor([[1, 5], [5, 60]])
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        close = {"atol": 0.1, "rtol": 0.02}
        for run in (layer, compiled):
            assert run(x).dtype == (torch.bfloat16 if kind == "linear" else torch.float32)
            torch.testing.assert_close(run(x).float(), expected, **close)


@torch.no_grad()
def test_trellises_of_two_widths_compile_in_one_graph():
    torch.compiler.reset()
    model = model_of(Rule(Trellis(), modules=("attention",), ratio=16.0), Rule(Trellis(), ratio=3.0), layers=1)
    rates = {(c.width, c.bits) for m in model.compressed_modules().values() for c in m.row_classes}
    assert len({width for width, _ in rates}) == 2
    model.set_decoding("on_the_fly")
    ids = torch.tensor([[3, 9, 20, 11]])
    expected = model(ids).logits
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits, expected)


def model_of(*rules, layers=3, **options):
    """Return a small masked language model of random codes, made from its config alone."""
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=48, max_position_embeddings=40, **options)
    plan = make_plan(config.to_dict(), Recipe("mixed", rules, modules=("all",)), architecture=HEAD, dtype="float32")
    model_class = compressed_class(BertForMaskedLM)
    own = {
        name: value for name, value in config.to_dict().items() if name not in ("model_type", "transformers_version")
    }
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**own, compression=plan.runtime())).eval()
    for module in model.compressed_modules().values():
        filled(module)
        for parameter in module.parameters():
            parameter.data.mul_(0.3)
        if hasattr(module, "scale_range"):  # a logarithm: weights of the size that models have
            module.scale_range.data[0] -= 4
    return model


TRELLIS_RULE = Rule(Trellis(), ratio=8.0)
MIXED_RULES = (
    Rule(Trellis(), modules=("word_embeddings", "feed_forward"), ratio=8.0),
    Rule(Autoencoder(), modules=("attention",), ratio=1.5),
    Rule(Quantized(), ratio=3.0),
)


def decoded(model):
    """Return the bytes of the decoded weights that a model keeps."""
    caches = [getattr(module, "_cache", None) for module in model.compressed_modules().values()]
    return sum(cache[1].untyped_storage().nbytes() for cache in caches if cache)


@pytest.mark.parametrize("rules", [(TRELLIS_RULE,), MIXED_RULES], ids=["trellis", "mixed"])
def test_a_bound_keeps_as_many_decoded_weights_as_fit(rules):
    model = model_of(*rules)
    expected = outputs_of(model, HEAD)
    whole = decoded(model)
    for bound in (0, 5_000, whole // 2, whole - 1, 2 * whole):
        model.set_decoding("cached", max_bytes=bound)
        for _ in range(2):
            torch.testing.assert_close(outputs_of(model, HEAD), expected, atol=1e-5, rtol=1e-5)
            kept = decoded(model)
            assert kept <= bound
        largest = max(m.rows * m.columns * 4 for m in model.compressed_modules().values())
        assert kept >= min(bound, whole // 2) - largest
    # Embeddings that are only looked up do not take room from what has to be decoded whole.
    assert kept < whole
    model.set_decoding("cached")
    outputs_of(model, HEAD)
    assert decoded(model) == whole


def test_room_that_is_given_up_is_room_again():
    budget = DecodedBudget(100)
    weight, other = torch.zeros(20), torch.zeros(6)
    assert budget.admit(weight) and budget.left() == 20
    assert not budget.admit(other)
    assert copy.deepcopy(budget).left() == 100
    del weight
    assert budget.left() == 100 and budget.admit(other)
    model = model_of(TRELLIS_RULE)
    model.set_decoding("cached", max_bytes=30_000)
    with torch.no_grad():
        for _ in range(3):
            outputs_of(model, HEAD)
            assert 0 < decoded(model) <= 30_000
            for parameter in model.parameters():
                parameter.mul_(1.01)
        changed = outputs_of(model, HEAD)
        model.set_decoding("on_the_fly")
        torch.testing.assert_close(outputs_of(model, HEAD), changed, atol=1e-5, rtol=1e-5)


def test_only_one_weight_is_there_at_a_time(monkeypatch):
    model = model_of(*MIXED_RULES)
    model.set_decoding("on_the_fly")
    living, most = [], []
    for cls in {type(module) for module in model.compressed_modules().values() if isinstance(module, DecodedWeight)}:

        def counted(self, original=cls.dense_weight):
            weight = original(self)
            living[:] = [ref for ref in living if ref() is not None]
            living.append(weights_compressed.weakref.ref(weight))
            most.append(len(living))
            return weight

        monkeypatch.setattr(cls, "dense_weight", counted)
    outputs_of(model, HEAD)
    assert len(most) > 12 and max(most) == 1
    assert not any(getattr(module, "_cache", None) for module in model.compressed_modules().values())


@pytest.mark.parametrize("max_bytes", [None, 40_000])
def test_decoded_weights_are_no_state(max_bytes, tmp_path):
    model = model_of(TRELLIS_RULE)
    names, size = set(model.state_dict()), sum(t.numel() for t in model.state_dict().values())
    model.set_decoding("cached", max_bytes=max_bytes)
    expected = outputs_of(model, HEAD)
    assert decoded(model) > 0
    assert set(model.state_dict()) == names and sum(t.numel() for t in model.state_dict().values()) == size
    duplicate = copy.deepcopy(model)
    assert decoded(duplicate) == 0
    torch.testing.assert_close(outputs_of(duplicate, HEAD), expected)
    assert decoded(duplicate) == decoded(model)
    model.save_pretrained(tmp_path / "bounded")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "bounded")
    assert decoded(again) == 0
    assert "max_decoded_bytes" not in again.config.compression  # a choice is for the model that it was made for
    again.config.compression["max_decoded_bytes"] = max_bytes
    again.save_pretrained(tmp_path / "bounded")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "bounded")
    torch.testing.assert_close(outputs_of(again, HEAD), expected)
    assert decoded(again) == decoded(model)
    assert again.config.compression.get("max_decoded_bytes") == max_bytes
    again.set_decoding("on_the_fly")
    assert decoded(again) == 0 and again.config.compression.get("max_decoded_bytes") == max_bytes
    # Caches are for evaluation only.
    duplicate.train()(torch.tensor([[5, 6, 7]]))
    assert decoded(duplicate) == 0


@pytest.mark.parametrize("decoding", ["on_the_fly", "cached"])
def test_a_model_compiles_in_one_graph_however_it_is_decoded(decoding):
    torch.compiler.reset()
    model = model_of(TRELLIS_RULE, layers=1)
    model.set_decoding(decoding, max_bytes=20_000 if decoding == "cached" else None)
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, expected, atol=1e-5, rtol=1e-5)
        model.to(torch.bfloat16)
        torch.testing.assert_close(model(ids).logits.float(), expected, atol=0.5, rtol=0.1)


@pytest.mark.parametrize(
    "decoding,max_bytes,said",
    [
        ("sometimes", None, "cached, on_the_fly"),
        ("on_the_fly", 100, "use 'cached'"),
        ("cached", -1, "an integer number of bytes"),
        ("cached", 1.5, "an integer number of bytes"),
        ("cached", True, "an integer number of bytes"),
    ],
)
def test_what_is_no_decoding(decoding, max_bytes, said, tmp_path):
    model = model_of(TRELLIS_RULE)
    with pytest.raises(ValueError, match=said):
        model.set_decoding(decoding, max_bytes)
    assert model.config.compression["decoding"] == "cached"
    model.config.compression |= {"decoding": decoding, "max_decoded_bytes": max_bytes}
    with pytest.raises(Exception, match=said):
        AutoConfig.for_model("compressed_bert", compression=model.config.compression)


def test_autoencoders_in_blocks(few_at_once):
    layer = layer_of(nonlinear(), 4, 50, 12)
    layer.decoding, x = "on_the_fly", torch.randn(3, 12)
    with torch.no_grad():
        expected = F.linear(x, layer.dense_weight())
        torch.testing.assert_close(layer(x, as_logits=True), expected)
    layer(x, as_logits=True).sum().backward()  # with gradients, as a whole
    assert layer.latents.grad.abs().sum() > 0


@torch.no_grad()
def test_where_rows_and_outliers_are_is_found_once_and_never_stale():
    layer = trellis("classes", EMBEDDINGS)
    ids = torch.arange(layer.rows)
    before = layer.some_rows(ids)
    found = layer._places()
    layer.dense_weight()
    assert layer._places() is found
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied._kept_places is None and "_kept_places" not in copied.state_dict()
        torch.testing.assert_close(copied.some_rows(ids), before, rtol=0, atol=0)
    with torch.inference_mode():
        layer.forget()
        layer.some_rows(ids)
    with torch.enable_grad():
        layer.some_rows(ids).sum().backward()  # what was kept in inference mode is no hindrance
    layer.outlier_columns.copy_(layer.outlier_columns.flip(0))
    torch.testing.assert_close(layer.dense_weight(), by_the_book(layer))
    layer.classes.data = pack(torch.zeros(layer.rows, dtype=torch.int32), layer.class_bits)
    assert torch.equal(layer._places().rows, torch.arange(layer.rows))
    layer.half()
    assert layer._kept_places is None


@torch.no_grad()
def test_decoding_makes_nothing_larger_than_a_block_beside_the_weight():
    group = Trellis(outliers=0).runtime(4, GroupShape(1, 2048, 512, heads=1))
    layer = filled(LINEARS["trellis"](2048, 512, weight_spec({**group, "storage": "float32"})))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(t.untyped_storage().nbytes() for t in (result,) if isinstance(t, torch.Tensor))
            return result

    with Watch():
        layer.dense_weight()
    weight = 2048 * 512 * 4
    assert max(made) == weight
    assert max(size for size in made if size < weight) <= 4 * trellis_compressed.WEIGHTS_AT_ONCE


def test_a_pass_looks_once_whether_anything_has_changed(monkeypatch):
    """And notices what changed before it, in whatever way, at whatever layer, and whatever ran in between."""
    model, ids = model_of(TRELLIS_RULE), torch.tensor([[5, 9, 30, 41]])
    looks, more = [], torch.tensor([0.5, 0.0])
    original = seen_compressed._look
    monkeypatch.setattr(seen_compressed, "_look", lambda *at: looks.append(1) or original(*at))
    layers = [layer for layer in model.compressed_modules().values() if isinstance(layer, DecodedWeight)]
    with torch.no_grad():
        for _ in range(2):
            expected = model(ids).logits
        looks.clear()
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
        assert len(looks) == 1 < len(layers)
        layers[3](torch.randn(2, layers[3].columns))
        assert len(looks) == 2  # outside of a pass a layer looks for itself
        ways = (
            lambda layer: layer.scale_range.add_(more),
            lambda layer: setattr(layer.scale_range, "data", layer.scale_range + more),
            lambda layer: layer.scale_range.data.add_(more),  # which raises no version
            lambda layer: layer.codes.random_(256),
            lambda layer: setattr(layer, "scale_range", torch.nn.Parameter(layer.scale_range + more)),
            lambda layer: layer.forget(),
        )
        for layer, change in zip(layers[-len(ways) :], ways, strict=True):
            change(layer)
            found = model(ids).logits
            again = copy.deepcopy(model)
            again.set_decoding("on_the_fly")
            torch.testing.assert_close(found, again(ids).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model(ids).logits, found, rtol=0, atol=0)
        model(ids)
        looks.clear()
        model(ids)
        assert len(looks) == 1
    assert pickle.loads(pickle.dumps(model))(ids).logits.allclose(found, atol=1e-5)
    alive = weakref.ref(model)
    del model, layer, layers, again, ways, change
    gc.collect()
    assert alive() is None  # what was seen does not keep a model


def test_an_interrupted_pass_is_over(monkeypatch):
    """Even one that is interrupted when it has just ended: later changes are noticed."""
    model, ids = model_of(TRELLIS_RULE), torch.tensor([[5, 9, 30, 41]])
    _, other, *_, last = (layer for layer in model.compressed_modules().values() if isinstance(layer, DecodedWeight))

    def interrupted(_):
        raise KeyboardInterrupt

    with torch.no_grad():
        for _ in range(2):
            before = model(ids).logits
        other.forget()
        model(ids)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(modeling_compressed, "seen_sources", interrupted)
            model(ids)
        last.scale_range.add_(torch.tensor([0.5, 0.0]))
        assert not torch.allclose(model(ids).logits, before)


def test_what_was_seen_goes_with_the_model():
    """At once, and not when Python next looks for circles: until then the memory would be taken."""
    model, ids = model_of(TRELLIS_RULE), torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        for _ in range(2):
            model(ids)
    codes = [weakref.ref(buffer) for name, buffer in model.named_buffers() if name.endswith("codes")]
    gc.disable()
    try:
        del model
        assert codes and not any(tensor() is not None for tensor in codes)
    finally:
        gc.enable()
