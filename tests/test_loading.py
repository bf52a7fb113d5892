"""What loading makes of a folder: composites, new heads, damaged weights, dropped layers, and where models are published."""

import json
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from common import TEXTS, make_model, make_tokenizer, outputs_of
from inputs import inputs_for
from safetensors.torch import load_file, save_file
from test_data_parallel import CASES
from test_round_trip import RECIPES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EncoderDecoderModel,
)

from hf_offline_compress import Recipe, Rule, compress
from hf_offline_compress.structures import Quantized, Trellis

RECIPE_NAMES = [recipe for _, recipe in CASES]


def compressed(head, recipe, **options):
    return compress(
        make_model("bert", head, **options), recipe, tokenizer=make_tokenizer("bert"), calibration=TEXTS, progress=False
    )


@pytest.mark.parametrize("recipe", [*RECIPE_NAMES, "kronecker_int4", "trellis_int8"])
def test_composites_of_compressed_parts_are_loaded_as_they_were_saved(recipe, tmp_path):
    encoder = compressed("BertModel", RECIPES[recipe], layers=2).model
    decoder = compressed(
        "BertLMHeadModel", RECIPES[recipe], layers=2, seed=1, is_decoder=True, add_cross_attention=True
    ).model
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    inputs = {**inputs_for("BertModel"), "decoder_input_ids": torch.tensor([[5, 6, 7], [8, 9, 5]])}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path / "both")
        again = EncoderDecoderModel.from_pretrained(tmp_path / "both").eval()
        torch.testing.assert_close(again(**inputs).logits, expected)


@pytest.fixture(scope="module", params=["quantized", "trellis"])
def classifier(request, tmp_path_factory):
    structure = {"quantized": Quantized(), "trellis": Trellis(run=16, state_bits=8)}[request.param]
    rules = (Rule(structure, ratio=3.0),)
    model = make_model("bert", "BertForSequenceClassification", num_labels=18)
    result = compress(model, Recipe("all", rules, modules=("all",)), calibration=None, progress=False)
    folder = result.save(tmp_path_factory.mktemp("classifier") / request.param)
    assert type(result.model.classifier).__name__ != "Linear"
    return folder


@pytest.mark.parametrize("labels", [3, 40])
def test_a_head_that_is_made_anew_is_dense_and_learns(classifier, labels, tmp_path):
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises((ValueError, RuntimeError), match="ignore_mismatched_sizes"):
        load(classifier, num_labels=labels)
    model = load(classifier, num_labels=labels, ignore_mismatched_sizes=True)
    head = model.classifier
    assert type(head) is torch.nn.Linear and head.weight.shape[0] == labels and head.weight.requires_grad
    assert 0 < head.weight.std() < 0.1
    model(**inputs_for("x"), labels=torch.tensor([0, 1])).loss.backward()
    assert head.weight.grad.any()
    model.save_pretrained(tmp_path / "tuned")
    again = load(tmp_path / "tuned")
    torch.testing.assert_close(outputs_of(again, "x"), outputs_of(model, "x"))


def damaged(folder, target, damage):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    state = load_file(target / "model.safetensors")
    name = next(key for key in sorted(state) if ".query." in key and key.endswith(".codes"))
    if damage == "null":
        config["compression"] = None
    elif damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state[f"{name}_more"] = torch.zeros(3)
    else:
        state[name] = state[name][:-1].contiguous()
    (target / "config.json").write_text(json.dumps(config))
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("null", "config.json"),
        ("missing", "lacks"),
        ("unexpected", "too many"),
        ("shape", "shape|ignore_mismatched_sizes"),
    ],
)
@pytest.mark.parametrize("ignore", [False, True])
def test_damaged_weights_are_refused(classifier, tmp_path, damage, said, ignore):
    folder = damaged(classifier, tmp_path / "damaged", damage)
    with pytest.raises((ValueError, RuntimeError), match=said):
        AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_other_heads_are_no_damage(classifier):
    assert AutoModel.from_pretrained(classifier) is not None
    assert type(AutoModelForMaskedLM.from_pretrained(classifier).cls.predictions.transform.dense) is torch.nn.Linear


def test_other_sizes_at_load_are_refused_in_a_sentence(classifier):
    with pytest.raises(ValueError, match="the layers and sizes that it was compressed with"):
        AutoModel.from_pretrained(classifier, num_hidden_layers=2)


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_layers_that_are_dropped_in_memory_stay_dropped(recipe, tmp_path):
    model = compressed("BertForMaskedLM", RECIPES[recipe]).model
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = torch.nn.ModuleList([layers[0], layers[2]])
    model.config.num_hidden_layers = 2
    expected = outputs_of(model, "BertForMaskedLM")
    model.save_pretrained(tmp_path / "short")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "short")
    torch.testing.assert_close(outputs_of(again, "BertForMaskedLM"), expected)


@pytest.mark.parametrize("recipe", ["budget", "kronecker_int4", "low_rank_shared", "trellis_int8"])
@pytest.mark.parametrize("buffers", [False, True])
def test_empty_models(recipe, buffers, tmp_path):
    compressed("BertModel", RECIPES[recipe]).model.save_pretrained(tmp_path / "model")
    with init_empty_weights(include_buffers=buffers):
        model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert all(parameter.is_meta for parameter in model.parameters())
