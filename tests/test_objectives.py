"""What heads of each family were trained to tell: the next token, with a cache and padding; masked ones; replaced ones."""

import pytest
import torch
from common import HEADS, TEXTS, make_model, make_tokenizer

from hf_offline_compress import CompressionError, Objective, Recipe, Rule, compress
from hf_offline_compress.architectures.families import FAMILIES, objective_of
from hf_offline_compress.architectures.stock import layout_of_config
from hf_offline_compress.measure.sensitivity import _portions, measure_sensitivity
from hf_offline_compress.measure.texts import Batch
from hf_offline_compress.metrics.perplexity import is_causal, perplexity
from hf_offline_compress.structures import Quantized

CAUSAL = [(t, h) for t, h in HEADS if FAMILIES[t].entry.causal and objective_of(h) == "causal" and "Double" not in h]
MASKED = [(t, h) for t, h in HEADS if h.endswith("ForMaskedLM")]
SENSITIVE = Recipe(
    "sensitive",
    (Rule(Quantized(8), Objective(l2=1.0, calibrated=True, sensitive=True), ratio=4.0, storage="float16"),),
    ("all",),
)


@pytest.mark.parametrize("model_type,head", CAUSAL)
def test_a_causal_model_generates_with_a_cache_and_padding_before_the_text(model_type, head):
    tokenizer = make_tokenizer(model_type)
    model = compress(
        make_model(model_type, head, layers=1), SENSITIVE, tokenizer=tokenizer, calibration=TEXTS, progress=False
    ).model
    alone = torch.tensor([[9, 41, 60, 8]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
    again = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False, **options)
    assert expected.equal(again)
    batch = torch.tensor([[0, 0, 9, 41, 60, 8], [12, 7, 33, 52, 61, 5]])
    padded = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    assert padded[0, 2:].equal(expected[0])
    assert is_causal(model) and perplexity(model, tokenizer, TEXTS[:4]).perplexity > 1


@pytest.mark.parametrize("model_type,head", MASKED)
def test_masked_models_have_a_perplexity(model_type, head):
    model, tokenizer = make_model(model_type, head, layers=1), make_tokenizer(model_type)
    assert not is_causal(model) and perplexity(model, tokenizer, TEXTS[:4], min_tokens=4).perplexity > 1


def test_a_discriminator_is_no_masked_language_model():
    model, tokenizer = make_model("electra", "ElectraForPreTraining", layers=1), make_tokenizer("electra")
    assert objective_of("ElectraForPreTraining") == objective_of("CompressedElectraForPreTraining") == "discriminative"
    assert objective_of("BertForPreTraining") == objective_of("AlbertForPreTraining") == "masked"
    with pytest.raises(CompressionError, match="no language modelling head"):
        perplexity(model, tokenizer, TEXTS[:4])
    result = compress(model, SENSITIVE, tokenizer=tokenizer, calibration=TEXTS, progress=False)
    assert result.report.calibration["masked"] == 0


def test_the_sensitivity_of_a_discriminator_predicts_the_change_of_its_answers():
    """Half the curvature of what is told of each token, summed, is the divergence that a small error makes."""
    model = make_model("electra", "ElectraForPreTraining", layers=1)
    layout = layout_of_config(model.config.to_dict(), "ElectraForPreTraining")
    matrix = next(m for m in layout.matrices if m.kind == "output")
    ids = torch.randint(5, 60, (300, 12))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    found = measure_sensitivity(model, [matrix], _portions([Batch(ids, mask)]), mask_token=None, seed=0)
    error = 1e-2 * torch.randn(matrix.rows)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        model.get_submodule(f"electra.{matrix.module}").bias += error
        after = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    p = before.sigmoid()
    change = (p * (1 - p) * (after - before).square()).mean()
    # An error at every place at once: what places do to each other is not in the metric, but little beside it.
    assert float(error @ found.output_moments[matrix.name] @ error) == pytest.approx(float(change), rel=0.5)
