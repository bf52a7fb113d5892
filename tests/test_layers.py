"""Runtime layers against their own dense weight, and the rules that keep a decoded weight a cache."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from common import nonlinear
from torch.func import functional_call
from torch.nn import functional as F

from hf_offline_compress.runtime import weights_compressed
from hf_offline_compress.runtime.layers_compressed import EMBEDDINGS, LINEARS, TiedHead
from hf_offline_compress.runtime.numbers_compressed import in_order, pack_numbers, unpack_numbers
from hf_offline_compress.runtime.packing_compressed import pack, unpack
from hf_offline_compress.runtime.specs_compressed import weight_spec
from hf_offline_compress.runtime.weights_compressed import set_decoding
from hf_offline_compress.structures import (
    Autoencoder,
    Codebook,
    GroupShape,
    Kronecker,
    LowRank,
    Mixture,
    Quantized,
    Sparse,
    Trellis,
    Tucker,
)

ROWS, COLUMNS = 14, 9
SHAPE = GroupShape(1, ROWS, COLUMNS, heads=2)
# structure and size
STRUCTURES = {
    "low_rank": (LowRank(), 5),
    "low_rank_with_identity": (LowRank(identity_block=True), 5),
    "linear_autoencoder": (Autoencoder(decoder="linear"), 5),
    "linear_autoencoder_with_bias": (Autoencoder(decoder="linear", norms=False), 5),
    "autoencoder": (nonlinear(), 5),
    "autoencoder_without_norms": (nonlinear(norms=False, activation="gelu", output_activation="none"), 5),
    "residual": (Autoencoder(), 3),
    "residual_without_norms": (Autoencoder(norms=False, activation="gelu"), 3),
    "kronecker": (Kronecker(), 3),
    "tucker": (Tucker(), 4),
    "sparse": (Sparse(), 30),
    "sparse_with_zeros": (Sparse(compact=False), 30),
    "quantized": (Quantized(), 3),
    "codebook": (Codebook(), 5),
    "trellis": (Trellis(run=5, outliers=0.02), 4),
    "trellis_of_classes": (Trellis(run=5, outliers=0.02), Mixture(((6, 1), (3, 2)))),
    "trellis_of_single_weights": (Trellis(run=64, outliers=0.0), 9),
    "codebook_of_sums": (Codebook(width=2, books=2), 4),
    "quantized_in_groups": (Quantized(group_size=4), 5),
}
ENTRIES = {name: structure.runtime(size, SHAPE) for name, (structure, size) in STRUCTURES.items()}


def integers(structure, size, bits=3, sharing=8):
    """Return what an entry says where all numbers are packed."""

    def packed(tensors):
        return {name: bits for name, tensor in tensors.items() if tensor.dtype is None and tensor.count >= sharing}

    own, decoder = structure.member_tensors(size, SHAPE), structure.decoder_tensors(size, SHAPE)
    return {"sharing": sharing, "own": packed(own), "decoder": packed(decoder)}


PACKED = {f"{name}_packed": ENTRIES[name] | {"integers": integers(*chosen)} for name, chosen in STRUCTURES.items()}
PACKED = {name: entry for name, entry in PACKED.items() if entry["integers"]["own"] or entry["integers"]["decoder"]}
ENTRIES |= PACKED
every_entry = pytest.mark.parametrize("entry", list(ENTRIES))


def make(kind, entry, shared=False, **options):
    spec = weight_spec({**ENTRIES[entry], "storage": "float32"})
    layer_class = (LINEARS if kind == "linear" else EMBEDDINGS)[spec.structure]
    decoder = layer_class.decoder_class.make(spec, COLUMNS) if shared and layer_class.decoder_class else None
    layer = layer_class(ROWS, COLUMNS, spec, decoder, **options)
    both = torch.nn.ModuleList([layer] if decoder is None else [layer, decoder])
    for name, parameter in both.named_parameters():
        torch.nn.init.normal_(parameter)
        if name.endswith("scale_range"):  # logarithms, in 255 steps
            parameter.data.mul_(0.01)
        elif name.endswith("_scales"):  # of integers up to 7
            parameter.data.mul_(0.2)
    for name, buffer in both.named_buffers():
        if name.endswith("order"):
            buffer.copy_(torch.randperm(COLUMNS))
        elif name.endswith("outlier_rows"):  # in their order
            buffer.copy_(pack(torch.randint(ROWS, (layer.outliers,)).sort().values, layer.row_bits))
        else:
            buffer.copy_(torch.randint(256, buffer.shape))
    return layer, decoder


@every_entry
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15), (torch.float16, 2e-2)])
@pytest.mark.parametrize("grad", [False, True])
def test_layers_do_what_their_dense_weight_does(entry, shared, dtype, tolerance, grad):
    linear, decoder = make("linear", entry, shared, bias=True)
    embedding, second = make("embedding", entry, shared)
    for module in (linear, decoder, embedding, second):
        if module is not None:
            module.to(dtype)
    x, ids = torch.randn(3, 4, COLUMNS).to(dtype), torch.tensor([[0, 3, 13], [2, 2, 1]])
    with torch.set_grad_enabled(grad):
        weight, table = linear.dense_weight(), embedding.dense_weight()
        assert weight.shape == (ROWS, COLUMNS) and weight.dtype == dtype
        close = {"atol": tolerance * 4, "rtol": tolerance}
        torch.testing.assert_close(linear(x), F.linear(x, weight, linear.bias), **close)
        torch.testing.assert_close(embedding(ids), F.embedding(ids, table), **close)
        torch.testing.assert_close(embedding(x, as_logits=True), F.linear(x, table), **close)
        head = TiedHead(embedding, torch.nn.Parameter(torch.randn(ROWS).to(dtype)))
        torch.testing.assert_close(head(x), F.linear(x, table, head.bias), **close)
    assert (linear.in_features, linear.out_features) == (COLUMNS, ROWS)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (ROWS, COLUMNS)


@every_entry
def test_every_factor_gets_a_gradient(entry):
    for kind, call in (("linear", torch.randn(2, COLUMNS)), ("embedding", torch.arange(ROWS))):
        layer, decoder = make(kind, entry, shared=True)
        layer(call).square().sum().backward()
        for name, parameter in torch.nn.ModuleList([layer, decoder]).named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_packed_factors_are_unpacked_once_and_never_stale():
    layer, _ = make("linear", "low_rank_packed")
    set_decoding([layer], "cached")
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        before = layer(x)
        kept = layer.latents
        assert layer.latents is kept and copy.deepcopy(layer).latents is not kept
        layer.latents_scales.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.decoder.weight_scales.mul_(2)
        torch.testing.assert_close(layer(x), 4 * before)
        layer.double()
        assert layer.latents.dtype == torch.float64
        set_decoding([layer], "on_the_fly")
        assert layer.latents is not layer.latents
    assert layer.latents.requires_grad and set(layer.state_dict()) == {
        *(f"latents_{part}" for part in ("codes", "scales", "zeros")),
        *(f"decoder.weight_{part}" for part in ("codes", "scales", "zeros")),
    }


@pytest.mark.parametrize("decoding", ["cached", "on_the_fly"])
def test_packed_factors_compile_in_one_graph(decoding):
    torch.compiler.reset()
    layer, _ = make("linear", "low_rank_packed")
    set_decoding([layer], decoding)
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(compiled(x), layer(x))


def test_packed_vocabularies_cannot_be_resized():
    layer, _ = make("embedding", "residual_packed")
    with pytest.raises(NotImplementedError, match="packed integers cannot be resized"):
        layer.resize(ROWS + 1)


@pytest.mark.parametrize("shape", [(64,), (7, 5), (3, 50, 4), (130, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_numbers_are_within_half_a_step(shape, bits):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack_numbers(numbers, bits, 16)
    again = unpack_numbers(**packed, bits=bits, sharing=16, shape=shape)
    steps = packed["scales"].repeat_interleave(16)[: numbers.numel()]
    error = in_order(numbers) - in_order(again)
    assert again.shape == shape and bool((error.abs() <= 0.76 * steps).all())  # zeros are whole half steps
    assert torch.equal(pack_numbers(again, bits, 16)["codes"], packed["codes"]) or bits == 8


def test_padding_gets_no_gradient():
    layer, _ = make("embedding", "low_rank", padding_idx=3)
    layer(torch.tensor([3, 1])).sum().backward()
    assert not layer.latents.grad[3].any() and layer.latents.grad[1].any()


def test_the_cache_is_used_and_never_stale():
    layer, decoder = make("linear", "autoencoder", shared=True)
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        first = layer(x)
        cached = layer._cache[1]
        layer(x)
        assert layer._cache[1] is cached
        for parameter in (layer.latents, layer.norms, decoder.layers[0].weight):
            parameter.mul_(1.5)
            torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()))
        assert not torch.allclose(layer(x), first)
        layer.load_state_dict({name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()})
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()))
        layer.latents = torch.nn.Parameter(torch.randn_like(layer.latents))
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()))


def test_the_cache_is_no_state():
    layer, _ = make("linear", "autoencoder")
    with torch.no_grad():
        layer(torch.randn(2, COLUMNS))
    assert set(layer.state_dict()) == {
        "latents",
        "norms",
        *(f"decoder.layers.{i}.{n}" for i in range(3) for n in ("weight", "bias")),
    }
    assert copy.deepcopy(layer)._cache is None
    assert layer.to(torch.float64)._cache is None


@every_entry
def test_gradients_are_exact_whether_the_weight_is_kept_or_not(entry):
    """In evaluation the decoded weight is used with gradients on too; in training it is decoded at every step."""
    layer, _ = make("linear", entry)
    set_decoding([layer], "cached")
    x = torch.randn(3, COLUMNS)
    with torch.no_grad():
        expected = layer.eval()(x)
    cached = getattr(layer, "_cache", None)
    gradients = []
    for mode in (False, True):
        layer.train(mode)
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        if not mode and cached is not None:
            assert layer._cache is not None
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        assert getattr(layer, "_cache", None) is None  # a step may follow
        gradients.append([inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for kept, decoded in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, decoded)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_needs_no_gradient_is_decoded_once(mode, monkeypatch):
    layer, _ = make("linear", "autoencoder")
    layer.eval()
    calls, decode = [], layer.dense_weight
    monkeypatch.setattr(layer, "dense_weight", lambda: calls.append(1) or decode())
    with mode():
        for _ in range(3):
            layer(torch.randn(2, COLUMNS))
        layer.requires_grad_(False).train()
        for _ in range(3):
            layer(torch.randn(2, COLUMNS))
    assert len(calls) <= 2  # a change of mode drops what was kept


def test_what_was_kept_in_inference_mode_does_not_stop_gradients():
    layer, _ = make("linear", "autoencoder")
    with torch.inference_mode():
        layer.eval()(torch.randn(2, COLUMNS))
    layer(torch.randn(2, COLUMNS, requires_grad=True)).sum().backward()
    assert layer.latents.grad is not None


def test_no_cache_in_training_or_when_told():
    layer, _ = make("linear", "autoencoder")
    layer(torch.randn(2, COLUMNS))
    assert layer._cache is None
    layer.decoding = "on_the_fly"
    with torch.no_grad():
        layer(torch.randn(2, COLUMNS))
    assert layer._cache is None


def gradients_of(layer, x, forward, backward):
    """Return the gradients of a layer's parameters, forward and backward each within a context."""
    layer.zero_grad()
    with forward():
        loss = layer(x).float().square().sum()
        if backward is None:
            loss.backward()
    if backward is not None:
        with backward():
            loss.backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (AUTOCAST, nullcontext),
        (AUTOCAST, None),
        (nullcontext, AUTOCAST),
        (torch.autograd.graph.save_on_cpu, nullcontext),
    ],
)
@pytest.mark.parametrize("entry", ["autoencoder", "residual_without_norms", "kronecker", "trellis_of_classes"])
def test_gradients_are_exact_under_autocast_and_where_saved_tensors_are_moved(entry, forward, backward):
    layer, _ = make("linear", entry)
    x = torch.randn(3, COLUMNS)
    layer.eval()
    with AUTOCAST(), torch.no_grad():
        layer(x)  # casts that autocast remembers have no gradients
    kept = gradients_of(layer, x, forward, backward)
    decoded = gradients_of(layer.train(), x, forward, backward)
    for name in decoded:  # bfloat16 sums in another order
        torch.testing.assert_close(kept[name], decoded[name], rtol=5e-3, atol=1e-3 * float(decoded[name].abs().max()))


def test_gradients_reach_tensors_that_stand_in_for_parameters():
    layer, _ = make("linear", "autoencoder")
    x = torch.randn(3, COLUMNS)
    layer.eval()
    with torch.no_grad():
        layer(x)
    given = {name: (1.1 * parameter.detach()).requires_grad_() for name, parameter in layer.named_parameters()}

    def loss(parameters):
        return functional_call(layer, parameters, (x,)).square().sum()

    taken = torch.autograd.grad(loss(given), [*given.values()])
    transformed = torch.func.grad(loss)({name: tensor.detach() for name, tensor in given.items()})
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(given[name].detach())
    layer.train()(x).square().sum().backward()
    for name, gradient in zip(given, taken, strict=True):
        torch.testing.assert_close(gradient, layer.get_parameter(name).grad)
        torch.testing.assert_close(gradient, transformed[name])
    # Parameters of another layer are gone when the gradient is taken.
    exchanged = loss({name: torch.nn.Parameter(tensor) for name, tensor in given.items()})
    assert exchanged.requires_grad
    layer.eval()
    with pytest.raises(RuntimeError, match="exchanged between its forward and its backward pass"):
        loss({name: torch.nn.Parameter(tensor) for name, tensor in given.items()}).backward()


def test_weights_that_change_before_the_backward_pass_are_an_error():
    layer, _ = make("linear", "autoencoder")
    out = layer.eval()(torch.randn(2, COLUMNS))
    with torch.no_grad():
        layer.latents.mul_(2)
    with pytest.raises(RuntimeError, match="take them first"):
        out.sum().backward()


def test_a_bias_is_trained_alone_without_decoding_anew(monkeypatch):
    layer, _ = make("linear", "autoencoder", bias=True)
    layer.requires_grad_(False).bias.requires_grad_()
    calls, decode = [], layer.dense_weight
    monkeypatch.setattr(layer, "dense_weight", lambda: calls.append(1) or decode())
    for _ in range(3):
        layer(torch.randn(2, COLUMNS)).sum().backward()
    assert len(calls) == 1 and layer.bias.grad is not None


@pytest.mark.parametrize("decoding", ["cached", "on_the_fly"])
def test_a_large_frozen_weight_that_is_not_kept_is_never_whole(decoding, monkeypatch):
    """Without `no_grad` too: what needs no gradient is applied in blocks of rows."""
    layer, _ = make("linear", "quantized")
    set_decoding([layer], decoding, max_bytes=1 if decoding == "cached" else None)
    x, expected = torch.randn(2, COLUMNS), layer.dense_weight()
    monkeypatch.setattr(weights_compressed, "DECODED_AT_ONCE", 3 * COLUMNS)
    monkeypatch.setattr(layer, "dense_weight", lambda: pytest.fail("decoded whole"))
    torch.testing.assert_close(layer.requires_grad_(False)(x), F.linear(x, expected, layer.bias))


@pytest.mark.parametrize("entry", ["autoencoder", "quantized", "trellis_of_classes", "low_rank_packed"])
def test_changes_that_torch_does_not_count_are_seen(entry):
    """Weights that are exchanged through `.data`, as moving averages are: at once, or when what was kept is dropped."""
    layer, _ = make("linear", entry)
    set_decoding([layer], "cached")
    x = torch.randn(2, COLUMNS)
    drops = {
        "nothing": lambda: None,
        "forget": layer.forget,
        "train": lambda: layer.train().eval(),
        "load": lambda: layer.load_state_dict(layer.state_dict()),
        "move": lambda: layer.to(torch.float64).to(torch.float32),
    }
    with torch.no_grad():
        layer.eval()
        for name, drop in drops.items():
            for exchange in (lambda p: setattr(p, "data", 1.5 * p.data), lambda p: p.data.div_(1.5)):
                layer(x)
                for parameter in layer.parameters():
                    exchange(parameter)
                drop()
                torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(), layer.bias), msg=name)


@pytest.mark.parametrize("drop", ["forget", "train", "load", "move"])
def test_what_was_kept_is_dropped(drop):
    """Also where changes cannot be seen: on a GPU, or in numbers that are not looked at."""
    layer, _ = make("linear", "autoencoder")
    with torch.no_grad():
        layer.eval()(torch.randn(2, COLUMNS))
    assert layer._cache is not None
    {
        "forget": layer.forget,
        "train": layer.train,
        "load": lambda: layer.load_state_dict(layer.state_dict()),
        "move": lambda: layer.to(torch.float64),
    }[drop]()
    assert layer._cache is None


def test_a_compiled_layer_sees_what_training_changed():
    layer, _ = make("linear", "autoencoder")
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        layer(x)
        compiled(x)
    compiled(x).square().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
        torch.testing.assert_close(compiled(x), F.linear(x, layer.dense_weight()), atol=1e-4, rtol=1e-4)


def test_autocast_and_cache():
    layer, _ = make("linear", "autoencoder")
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32


@every_entry
def test_compiles_in_one_graph(entry):
    layer, _ = make("linear", entry)
    x = torch.randn(2, COLUMNS)
    torch.compiler.reset()  # many small layers in one process: each counts as a recompilation of the same code
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name not in PACKED])
def test_resizing_keeps_rows_and_adds_the_mean(entry):
    layer, _ = make("embedding", entry)
    before = layer.dense_weight().detach()
    own = {name: tensor.detach().clone() for name, tensor in layer.named_parameters(recurse=False)}
    if entry.startswith(("kronecker", "tucker", "sparse", "codebook", "trellis")):
        with pytest.raises(NotImplementedError, match="resize the base model, then compress it"):
            layer.resize(ROWS + 3)
        return
    layer.resize(ROWS + 3)
    after = layer.dense_weight()
    torch.testing.assert_close(after[:ROWS], before)
    if entry.startswith("quantized"):
        step = layer.scales[ROWS:].max() / 2
        torch.testing.assert_close(after[ROWS:], before.mean(dim=0).expand(3, -1), atol=float(step) * 1.01, rtol=0)
    else:
        torch.testing.assert_close(layer.latents[ROWS:], own["latents"].mean(dim=0).expand(3, -1))
    layer.resize(4)
    torch.testing.assert_close(layer.dense_weight(), before[:4])


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_packing(bits, count):
    codes = torch.randint(2**bits, (3, count), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-count * bits // 8))
    assert unpack(packed, bits, count).equal(codes)
