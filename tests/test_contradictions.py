"""Where weights and config.json disagree, the weights are followed, or the model is refused; nothing is made up."""

import hashlib
import json

import pytest
import torch
import transformers
from common import make_model, make_tokenizer, outputs_of, save_base
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_offline_compress import CompressionError, compress
from hf_offline_compress.export.dense import dense_model


def quick(base, **options):
    return compress(base, "quantized", modules="all", calibration=None, progress=False, **options)


@pytest.mark.parametrize(
    "model_type,head",
    [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("distilbert", "DistilBertForMaskedLM")],
)
def test_an_output_matrix_of_its_own_is_kept_whatever_the_config_says(tmp_path, model_type, head):
    model = make_model(model_type, head, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    result = quick(tmp_path / "base")
    result.save(tmp_path / "out")
    expected = outputs_of(model, head)
    loaded = type(result.model).from_pretrained(tmp_path / "out")
    assert (outputs_of(loaded, head) - expected).norm() < 0.1 * expected.norm()
    assert not loaded.config.tie_word_embeddings


def test_a_pooler_that_is_not_there_is_not_made_up(tmp_path):
    save_base(tmp_path / "base", "bert", "BertForMaskedLM")
    digests = set()
    for seed in (1, 2):  # what fills missing weights
        torch.manual_seed(seed)
        out = quick(tmp_path / "base", auto_class="AutoModel").save(tmp_path / str(seed))
        digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    model, info = AutoModel.from_pretrained(tmp_path / "1", output_loading_info=True)
    assert model.config.compression["absent"] == ["pooler"] and model.pooler is None
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(8)[None]
    assert model(input_ids=ids).pooler_output is None
    assert dense_model(tmp_path / "1")(input_ids=ids).pooler_output is None


def test_other_weights_that_are_not_there_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "roberta", "RobertaForMaskedLM")
    state = load_file(base / "model.safetensors")
    del state["roberta.encoder.layer.1.output.dense.bias"]
    save_file(state, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressionError, match="no weights for roberta.encoder.layer.1.output.dense.bias"):
        quick(base)


def test_other_shapes_than_the_config_says_are_refused():
    model = make_model("bert", "BertForSequenceClassification")
    model.classifier = torch.nn.Linear(32, 5)
    with pytest.raises(CompressionError, match=r"'classifier.weight' has the shape \[5, 32\].*num_labels"):
        quick(model, tokenizer=make_tokenizer("bert"))


def test_missing_heads_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "electra", "ElectraModel")
    with pytest.raises(CompressionError, match="no weights for generator_lm_head"):
        quick(base, auto_class="AutoModelForMaskedLM")


def test_a_stock_class_of_another_library_is_refused():
    class Poetry(transformers.BertForMaskedLM):
        pass

    with pytest.raises(CompressionError, match=r"'Poetry' is not an architecture of BERT.*BertForMaskedLM"):
        quick(Poetry(make_model("bert", "BertForMaskedLM").config))
