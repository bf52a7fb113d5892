"""Weights held as bytes and multiplied by integer kernels: close to what they stand for, however a model is used."""

import copy
import pickle

import pytest
import torch
from common import ONE_EACH, make_model, make_tokenizer, outputs_of
from test_decoding import filled, model_of
from test_layers import ENTRIES
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_offline_compress import Recipe, Rule, compress
from hf_offline_compress.cli import app
from hf_offline_compress.runtime import engines_compressed, executing_compressed
from hf_offline_compress.runtime.engines_compressed import ENGINES, fast_engine, rounded, saturates
from hf_offline_compress.runtime.executing_compressed import Bytes, execution_of, why_not_int8
from hf_offline_compress.runtime.layers_compressed import EMBEDDINGS, LINEARS, TiedHead
from hf_offline_compress.runtime.specs_compressed import weight_spec
from hf_offline_compress.runtime.weights_compressed import set_decoding
from hf_offline_compress.structures import GroupShape, Quantized, Trellis

HEAD = "BertForMaskedLM"
# What int8 may change, of the size of the outputs.
TOLERANCE = 0.05
WHOLE = Recipe("all", (Rule(Quantized(), ratio=4.0),), modules=("all",))
here = pytest.mark.skipif(fast_engine() is None, reason="no integer kernel on this CPU")


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def layer(structure=None, kind=LINEARS, rows=96, columns=64, bias=True):
    chosen = structure or Trellis(run=32, outliers=0.01)
    spec = weight_spec({**chosen.runtime(4, GroupShape(1, rows, columns, heads=1)), "storage": "float32"})
    torch.manual_seed(0)
    options = {"bias": bias} if kind is LINEARS else {}
    return filled(kind[spec.structure](rows, columns, spec, **options)).eval()


@pytest.mark.parametrize("name", list(ENGINES))
@torch.no_grad()
def test_every_engine_that_torch_has_here_multiplies_correctly(name):
    if (pairs := saturates(name)) is None:
        pytest.skip("not on this machine")
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 50), torch.randn(24)
    weight[:, :2] = 4.0  # neighbours whose products, added up, do not fit into 16 bits
    x = torch.rand(7, 50)
    codes, scales = rounded(weight, pairs)
    assert error(codes * scales[:, None], weight) < 0.02
    for added in (bias, None):
        expected = F.linear(x, weight, added)
        found = ENGINES[name].multiply(x, ENGINES[name].pack(codes, scales, added))
        assert found.dtype == torch.float32 and error(found, expected) < 0.02


def test_neighbours_are_kept_within_16_bits():
    torch.manual_seed(0)
    codes, scales = rounded(torch.randn(40, 33).abs() * 3, pairs=True)
    even = F.pad(codes.int(), (0, 1))
    assert (even[:, ::2] + even[:, 1::2]).abs().max() * 255 < 2**15
    codes, _ = rounded(torch.randn(40, 33), pairs=False)
    assert codes.abs().amax(dim=1).eq(127).all()
    codes, scales = rounded(torch.zeros(2, 4), pairs=True)
    assert not codes.any() and scales.isfinite().all()


@here
@pytest.mark.parametrize("entry", [name for name in ENTRIES if "low_rank" not in name and "linear_auto" not in name])
@torch.no_grad()
def test_every_structure_is_close_to_what_it_stands_for(entry):
    from test_layers import make

    linear, _ = make("linear", entry, bias=True)
    embedding, _ = make("embedding", entry)
    head = TiedHead(embedding, torch.nn.Parameter(torch.randn(embedding.rows)))
    for each in (linear, embedding):
        each.eval()
    set_decoding([linear, embedding], "int8")
    x, ids = torch.randn(5, 6, linear.columns), torch.tensor([[0, 3], [13, 2]])
    for module, weight, bias in ((linear, linear.dense_weight(), linear.bias), (head, head.weight, head.bias)):
        expected = F.linear(x, weight, bias)
        assert error(module(x), expected) < TOLERANCE
        assert error(module(x[0, :1]), expected[0, :1]) < TOLERANCE
        assert not module(x[:0]).numel()
    torch.testing.assert_close(embedding(ids), embedding.dense_weight()[ids])  # decoded, exactly
    assert all(
        not each._cache or isinstance(each._cache[1], Bytes) for each in (linear, embedding) if hasattr(each, "_cache")
    )


@here
@torch.no_grad()
def test_outlying_inputs_and_tokens_keep_their_precision():
    own = layer()
    set_decoding([own], "int8")
    x = torch.randn(40, 64)
    x[:, 5] *= 50  # one input of all tokens
    x[3] *= 200  # and all of one token
    expected = F.linear(x, own.dense_weight(), own.bias)
    for token, wanted in zip(own(x), expected, strict=True):
        assert error(token, wanted) < TOLERANCE
    held = own._cache[1]
    assert held.by_token and 5 in held.columns
    # With a scale of its own a token has the same products in any company.
    torch.testing.assert_close(own(x[7:8]), own(x)[7:8])


@here
@torch.no_grad()
def test_a_vocabulary_is_rounded_in_blocks(monkeypatch):
    from hf_offline_compress.runtime import weights_compressed

    own = layer(kind=EMBEDDINGS, rows=90)
    expected = own.dense_weight()
    monkeypatch.setattr(weights_compressed, "DECODED_AT_ONCE", 20 * 64)
    monkeypatch.setattr(type(own), "dense_weight", lambda self: pytest.fail("all rows were decoded"))
    set_decoding([own], "int8")
    x = torch.randn(9, 64)
    assert error(own(x, as_logits=True), x @ expected.T) < TOLERANCE


@here
def test_gradients_are_those_of_the_decoded_weight():
    own, x = layer(), torch.randn(9, 64)
    set_decoding([own], "int8")
    found = {}
    for decoding in ("int8", "on_the_fly"):
        own.decoding = decoding
        own.zero_grad()
        inputs = x.clone().requires_grad_()
        out = own(inputs)
        out.backward(torch.ones_like(out))
        found[decoding] = [inputs.grad, *(parameter.grad for parameter in own.parameters())]
    torch.testing.assert_close(found["int8"], found["on_the_fly"])
    own.decoding = "int8"
    with torch.no_grad():
        before = own(x)
    out = own(x.clone().requires_grad_())
    assert out.detach().equal(before)  # integers in evaluation, whether gradients are on or not
    own.bias.data.add_(1)
    with torch.no_grad():
        own.bias.add_(1)
        assert not own(x).allclose(before, atol=0.5)
    with pytest.raises(RuntimeError, match="were changed"):
        out.sum().backward()
    own.train()(x)
    assert own._cache is None  # a step of training may follow


@here
@pytest.mark.parametrize("model_type,head", ONE_EACH)
def test_every_family_says_the_same(model_type, head):
    torch.manual_seed(0)
    model = compress(make_model(model_type, head), WHOLE, calibration=None, progress=False).model.eval()
    expected = outputs_of(model, head)
    model.set_decoding("int8")
    found = outputs_of(model, head)
    assert error(found, expected) < TOLERANCE
    assert any(getattr(module, "_cache", None) for module in model.modules())


@here
@torch.no_grad()
def test_generation_with_a_cache_and_the_tops_of_logits():
    model = compress(make_model("llama", "LlamaForCausalLM"), WHOLE, calibration=None, progress=False).model.eval()
    ids = torch.randint(5, 60, (8, 24))
    exact = model(ids).logits
    best = exact.topk(2).values
    clear = best[..., 0] - best[..., 1] > TOLERANCE * exact.square().mean().sqrt()  # random weights have near ties
    model.set_decoding("int8")
    same = (model(ids).logits.argmax(-1) == exact.argmax(-1))[clear]
    assert len(same) > 50 and same.float().mean() >= 0.99
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids[:2], **options).shape == (2, 30)
    whole = model(ids).logits
    past = model(ids[:, :20], use_cache=True).past_key_values
    steps = [model(ids[:, i : i + 1], past_key_values=past).logits for i in range(20, 24)]
    assert error(torch.cat(steps, dim=1), whole[:, 20:]) < TOLERANCE


@here
@torch.no_grad()
def test_copies_dtypes_and_threads_of_use(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    model = model_of(Rule(Trellis(), ratio=8.0))
    ids = torch.randint(5, 80, (3, 12))
    exact = model(ids).logits
    model.set_decoding("int8")
    expected = model(ids).logits
    assert error(expected, exact) < TOLERANCE
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(getattr(module, "_cache", None) for module in again.modules())
        torch.testing.assert_close(again(ids).logits, expected)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model(ids).logits, range(8)):
            torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(ids).logits.float(), exact) < 2 * TOLERANCE
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, expected)
    model.to(torch.bfloat16)
    low = model(ids).logits
    assert low.dtype == torch.bfloat16 and error(low.float(), exact) < 2 * TOLERANCE


class Run(torch.utils.data.Dataset):
    """What a model says of single texts."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def __len__(self):
        return len(self.ids)

    @torch.no_grad()
    def __getitem__(self, i):
        return self.model(self.ids[i : i + 1]).logits[0]


@here
@pytest.mark.parametrize("decoding", ["int8", "on_the_fly"])
def test_workers_of_a_data_loader_run_it(decoding):
    model, ids = model_of(Rule(Trellis(), ratio=8.0)), torch.randint(5, 80, (2, 12))
    model.set_decoding(decoding)
    texts = Run(model, ids)
    expected = [texts[i] for i in range(2)]
    loader = torch.utils.data.DataLoader(texts, batch_size=None, num_workers=1, timeout=60)
    torch.testing.assert_close(list(loader), expected)


@here
@torch.no_grad()
def test_a_model_compiles_in_one_graph():
    torch.compiler.reset()
    model = model_of(Rule(Trellis(), ratio=8.0)).to(torch.bfloat16)
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    model.set_decoding("int8")
    ids = torch.tensor([[5, 9, 30, 41]])
    expected = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(ids).logits, expected) < TOLERANCE  # other orders of additions, other roundings
    assert all(module._cache for module in model.compressed_modules().values() if hasattr(module, "out_features"))


@here
def test_only_the_folder_says_what_a_folder_says(tmp_path, monkeypatch):
    result = compress(make_model("bert", HEAD), WHOLE, calibration=None, progress=False)
    with pytest.raises(Exception, match="cached, on_the_fly, int8"):
        result.save(tmp_path / "never", decoding="bytes")
    folder = result.save(tmp_path / "plain")
    model = AutoModelForMaskedLM.from_pretrained(folder, decoding="int8")
    assert {module.decoding for module in model.compressed_modules().values()} == {"int8"}
    outputs_of(model, HEAD)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "again")]
    assert weights[0] == weights[1]
    # What a folder says is done as well as can be; what is asked for is done or refused.
    said = result.save(tmp_path / "said", decoding="int8")
    assert AutoModelForMaskedLM.from_pretrained(said).config.compression["decoding"] == "int8"
    monkeypatch.setattr(executing_compressed, "fast_engine", lambda: None)
    warned = []
    monkeypatch.setattr(executing_compressed.logger, "warning_once", warned.append)
    without = AutoModelForMaskedLM.from_pretrained(said)
    torch.testing.assert_close(
        outputs_of(without, HEAD), outputs_of(AutoModelForMaskedLM.from_pretrained(folder), HEAD)
    )
    assert "needs an integer kernel" in warned[0] and len(set(warned)) == 1
    with pytest.raises(ValueError, match="needs an integer kernel"):
        AutoModelForMaskedLM.from_pretrained(said, decoding="int8")
    with pytest.raises(ValueError, match="needs an integer kernel"):
        without.set_decoding("int8")


def test_where_there_are_integers(monkeypatch):
    assert "on cuda; use 'cached'" in why_not_int8("cuda")
    assert type(execution_of("auto", "cuda", asked=True)).__name__ == "Decoded"
    for family, machine in (("x86", "x86_64"), ("arm", "aarch64")):
        monkeypatch.setattr(engines_compressed.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(engines_compressed, "saturates", lambda name: False)  # as with VNNI
        assert fast_engine().name == engines_compressed.FAST[family][0]
        assert type(execution_of("auto", "cpu", asked=True)).__name__ == "Int8"
    monkeypatch.setattr(engines_compressed, "saturates", lambda name: True)  # as without: integers gain little there
    assert type(execution_of("auto", "cpu", asked=True)).__name__ == "Decoded"
    monkeypatch.setattr(engines_compressed, "saturates", lambda name: None)
    assert type(execution_of("auto", "cpu", asked=True)).__name__ == "Decoded"


def test_an_accelerate_map_runs_it(tmp_path):
    pytest.importorskip("accelerate")
    result = compress(
        make_model("gpt2", "GPT2LMHeadModel"), WHOLE, tokenizer=make_tokenizer("gpt2"), calibration=None, progress=False
    )
    folder = result.save(tmp_path / "gpt2")
    expected = outputs_of(result.model.eval(), "GPT2LMHeadModel")
    mapped = AutoModelForCausalLM.from_pretrained(folder, decoding="auto", device_map="cpu")
    assert error(outputs_of(mapped, "GPT2LMHeadModel"), expected) < TOLERANCE


def test_the_command_line_writes_it_or_refuses_before_any_work():
    from typer.testing import CliRunner

    found = CliRunner().invoke(app, ["compress", "nowhere", "out", "--decoding", "bytes"])
    assert found.exit_code and "known are cached, on_the_fly, int8, auto" in " ".join(found.output.split())
