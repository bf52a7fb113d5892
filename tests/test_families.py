"""The parameter lists that plans are made from are those of the real models."""

from math import prod

import pytest
from common import HEADS, make_model

from hf_offline_compress import CompressionError, load_recipe, make_plan
from hf_offline_compress.architectures import stock
from hf_offline_compress.architectures.families import FAMILIES, KINDS, family_of
from hf_offline_compress.architectures.stock import layout_of_config

WIDTHS = (
    "hidden_size",
    "n_embd",
    "dim",
    "embedding_size",
    "word_embed_proj_dim",
    "intermediate_size",
    "hidden_dim",
    "ffn_dim",
)


def stored_shapes(model):
    """Return name → shape of what save_pretrained would store: tied tensors under their source's name."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def layout_of(model):
    config = model.config.to_dict()
    return layout_of_config(config, type(model).__name__)


@pytest.mark.parametrize("model_type,head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_layout_is_the_model(model_type, head, tied):
    model = make_model(model_type, head, tie_word_embeddings=tied)
    assert layout_of(model).parameters == stored_shapes(model)


@pytest.mark.parametrize(
    "model_type,head,overrides",
    [
        ("bert", "BertLMHeadModel", {"is_decoder": True, "add_cross_attention": True}),
        ("roberta", "RobertaForCausalLM", {"is_decoder": True, "add_cross_attention": True}),
        ("gpt2", "GPT2LMHeadModel", {"add_cross_attention": True, "n_inner": 48}),
        ("bert", "BertForTokenClassification", {"num_labels": 7}),
        ("gpt2", "GPT2DoubleHeadsModel", {"summary_proj_to_labels": False}),
        ("gpt2", "GPT2DoubleHeadsModel", {"summary_use_proj": False}),
    ],
)
def test_layout_of_unusual_configs(model_type, head, overrides):
    model = make_model(model_type, head, **overrides)
    assert layout_of(model).parameters == stored_shapes(model)


@pytest.mark.parametrize("model_type,head", HEADS)
def test_matrices_are_views_of_the_checkpoint(model_type, head):
    model = make_model(model_type, head)
    layout = layout_of(model)
    state = model.state_dict()
    for matrix in layout.matrices:
        assert matrix.kind in KINDS
        assert tuple(matrix.dense(state, layout.prefix).shape) == (matrix.rows, matrix.columns)
    layers = {matrix.layer for matrix in layout.matrices if matrix.kind == "query"}
    assert layers == ({0} if model_type == "albert" else {0, 1, 2})  # whose layers are one


def test_fused_parts_are_cut_and_turned():
    model = make_model("gpt2", "GPT2Model")
    layout = layout_of(model)
    weight = model.h[1].attn.c_attn.weight  # [in, 3 * out]
    parts = {m.part: m for m in layout.matrices if m.layer == 1 and m.part}
    for i, part in enumerate(("query", "key", "value")):
        assert parts[part].dense(model.state_dict(), "").equal(weight[:, 32 * i : 32 * (i + 1)].T)


@pytest.mark.parametrize("model_type,head", HEADS)
def test_every_kind_of_the_table_is_found(model_type, head):
    entry = FAMILIES[model_type].entry
    kinds = {part for kind in entry.kinds.values() for part in ((kind,) if isinstance(kind, str) else kind)}
    layout = layout_of(make_model(model_type, head))
    found = {matrix.kind for matrix in layout.matrices}
    assert found - {"head"} | {"pooler"} == kinds | {"word_embeddings", "pooler"}
    assert ("pooler" in found) == any(name.startswith(f"{layout.prefix}pooler") for name in layout.parameters)


@pytest.mark.parametrize("model_type,head", HEADS)
def test_small_reaches_its_ratio_where_matrices_dominate(model_type, head):
    """Ninety-nine in a hundred parameters of matrices are in compressed modules."""
    config = make_model(model_type, head, layers=1).config.to_dict()
    config |= {name: size * 16 for name, size in config.items() if name in WIDTHS and size}
    config |= {"vocab_size": 9000, "head_dim": 128}
    plan = make_plan(config, load_recipe("small"), architecture=head)
    assert plan.layout.total * 4 / plan.file_bytes >= 8
    matrices = sum(prod(shape) for shape in plan.layout.parameters.values() if len(shape) > 1)
    assert plan.parameters >= 0.99 * matrices


@pytest.mark.parametrize(
    "config,message",
    [
        ({"model_type": "t5"}, "'t5' is not supported; supported are bert, roberta, gpt2, xlm-roberta"),
        ({}, "'None' is not supported"),
        ({"model_type": "compressed_bert"}, "compressed already"),
        ({"model_type": "bert", "quantization_config": {"bits": 4}}, "quantized already"),
        ({"model_type": "bert", "return_dict": False}, "outputs have no names; set it to true"),
    ],
)
def test_what_cannot_be_compressed(config, message):
    with pytest.raises(CompressionError, match=message):
        family_of(config)


def test_unknown_head():
    with pytest.raises(CompressionError, match="BertForPoetry.*BertForMaskedLM"):
        layout_of_config({"model_type": "bert"}, "BertForPoetry")


def test_memory_that_runs_out_is_no_fault_of_the_config(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(stock, "empty_model", full)
    with pytest.raises(MemoryError):
        layout_of_config({"model_type": "bert"}, "BertModel")
