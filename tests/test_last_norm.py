"""The norm before a language model's head, fitted to the dense model's predictions."""

import random
from dataclasses import replace

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer
from test_in_order import CASES
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from hf_offline_compress import compress, make_plan
from hf_offline_compress.allocate.measured import Round, _last_norm
from hf_offline_compress.architectures.stock import layout_of_model
from hf_offline_compress.measure.divergence import Divergence, exchanged
from hf_offline_compress.measure.last_norm import Predictions, find_last_norm, fitted, hidden_at_head
from hf_offline_compress.measure.texts import Batch, load_texts, make_batches
from hf_offline_compress.request.reading import load_recipe
from hf_offline_compress.solve.last_norm import fit_last_norm, may_have_last_norm

NORMS = {
    "bert": "cls.predictions.transform.LayerNorm",
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "modernbert": "head.norm",
}


def batch_of(seed=0):
    ids = torch.randint(5, 20, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return Batch(ids, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model_type,head", [(model_type, head) for model_type, head, _ in CASES if model_type in NORMS]
)
def test_values_of_the_last_norm_are_what_the_head_sees(model_type, head, dtype):
    model, batch = make_model(model_type, head, layers=1).to(dtype), batch_of()
    norm = find_last_norm(model, batch)
    assert norm.name == NORMS[model_type]
    places = [batch.attention_mask.bool()]
    before = hidden_at_head(model, [batch], places)
    gain = torch.linspace(0.5, 2, before.shape[1])
    shift = gain.flip(0) if norm.has_bias else torch.zeros_like(gain)
    with exchanged(model, "", [], norm.values(gain, shift)):
        after = hidden_at_head(model, [batch], places)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(after, before * gain + shift, **tolerance)


def test_weights_may_be_stored_less_one():
    model = make_model("llama", "LlamaForCausalLM", layers=1)
    model.model.norm = GemmaRMSNorm(model.config.hidden_size)
    torch.nn.init.normal_(model.model.norm.weight, std=0.1)
    norm = find_last_norm(model, batch_of())
    assert (norm.name, norm.offset, norm.has_bias) == ("model.norm", 1.0, False)


def test_where_logits_are_not_the_heads_products_nothing_is_found():
    model = make_model("gpt2", "GPT2LMHeadModel", layers=1)

    def bounded(module, args, output):
        output["logits"] = 3 * torch.tanh(output["logits"] / 3)
        return output

    assert find_last_norm(model, batch_of()) is not None
    model.register_forward_hook(bounded)
    assert find_last_norm(model, batch_of()) is None


@pytest.mark.parametrize("shifted", [True, False])
def test_the_best_gain_and_shift_are_found(shifted):
    """Hidden states that only lack a gain and a shift predict the same again; noise never makes it worse than it was."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 8, generator=generator), torch.randn(50, generator=generator)
    hidden = torch.randn(600, 8, generator=generator)
    gain, shift = 1 + 0.3 * torch.randn(8, generator=generator), 0.3 * torch.randn(8, generator=generator) * shifted
    dense = Predictions(hidden * gain + shift, weight, bias)

    def lost(now, *numbers):
        everything = slice(None)
        return float(
            F.kl_div(now.of(everything, *numbers), dense.of(everything), reduction="batchmean", log_target=True)
        )

    now = Predictions(hidden, weight, bias)
    found = fitted(dense, now, shifted=shifted, seed=0)
    assert lost(now, *found) < 1e-3 * lost(now)
    torch.testing.assert_close(found[0], gain, rtol=0.05, atol=0.02)
    torch.testing.assert_close(found[1], shift, rtol=0.05, atol=0.02)
    noisy = Predictions(hidden + torch.randn(600, 8, generator=generator), weight, bias)
    assert lost(noisy, *fitted(dense, noisy, shifted=shifted, seed=0)) < 0.9 * lost(noisy)


def test_the_divergence_of_other_parameters_is_measured():
    model, batch = make_model("gpt2", "GPT2LMHeadModel", layers=1), batch_of()
    layout = layout_of_model(model)
    divergence = Divergence(model, layout.matrices, [batch], prefix=layout.prefix, mask_token=None)
    weight = model.transformer.ln_f.weight.detach().clone()
    assert abs(divergence.of([], others={"transformer.ln_f.weight": weight})) < 1e-6
    assert divergence.of([], others={"transformer.ln_f.weight": 2 * weight}) > 1e-4
    assert model.transformer.ln_f.weight.equal(weight)


def test_text_for_the_fit_is_none_that_layers_were_coded_on():
    texts, tokenizer = load_texts([f"{text} {i}" for i in range(4) for text in TEXTS]), make_tokenizer("gpt2")
    options = {"masked": False, "positions": 40, "seed": 0, "wanted": 800}

    def windows(**which):
        batches, _ = make_batches(texts, tokenizer, used=400, **options, **which)
        return {tuple(row) for batch in batches for row in batch.input_ids.tolist()}

    first, last = windows(), windows(from_end=True)
    assert first and last and not first & last


@pytest.mark.parametrize("measured,kept", [(0.5, True), (0.6, False), (0.7, False), (float("nan"), False)])
def test_a_fitted_norm_is_kept_only_where_less_is_lost(measured, kept):
    class Measured:
        def of(self, replaced, others):
            assert others is fit
            return measured

    config = make_model("gpt2", "GPT2LMHeadModel", layers=1).config.to_dict()
    plan = replace(make_plan(config, load_recipe("svd"), architecture="GPT2LMHeadModel"), groups=())
    fit, rounds = {"transformer.ln_f.weight": torch.ones(32)}, [Round(1.0, 0.9), Round(1.0, 0.7, 0.6)]
    outcome = {"old": torch.zeros(1)}, [], {}
    (found, _, _), told = _last_norm(plan, outcome, rounds, Measured(), lambda *_: fit)
    assert set(found) == {"old", *(fit if kept else ())}
    assert told == [rounds[0], Round(1.0, 0.7, 0.6, measured if measured == measured else None)]
    assert _last_norm(plan, outcome, rounds, Measured(), lambda *_: {}) == (outcome, rounds)


@pytest.mark.parametrize(
    "model_type,head", [(model_type, head) for model_type, head, _ in CASES if model_type in NORMS]
)
def test_a_compressed_model_has_the_norm_that_was_measured(model_type, head):
    model, tokenizer = make_model(model_type, head, layers=2), make_tokenizer(model_type)
    texts = [f"{text} {other}" for text in TEXTS[:20] for other in TEXTS[:20]]
    found = compress(model, "tiny", total_ratio=4.5, calibration=texts, tokenizer=tokenizer, progress=False)
    (step,) = [step for step in found.report.rounds if step["last_norm"] is not None]
    kept = step["last_norm"] < min(step["measured"], step["in_order"])
    assert kept or "Masked" not in head  # of the others, whose gain is small, either may come out
    name = f"{NORMS[model_type]}.weight"
    weight, own = found.model.state_dict()[name], model.state_dict()[name]
    assert weight.equal(weight.half().float())
    assert weight.equal(own.half().float()) != kept
    assert found.report.seconds["last_norm"] > 0


@pytest.mark.parametrize(
    "head,fits", [("GPT2Model", False), ("GPT2LMHeadModel", True), ("GPT2ForSequenceClassification", False)]
)
def test_models_without_predictions_have_nothing_to_fit(head, fits):
    model = make_model("gpt2", head, layers=1)
    plan = make_plan(model.config.to_dict(), load_recipe("svd"), architecture=head)
    assert may_have_last_norm(model, plan) == fits


@pytest.mark.parametrize("shared", ["parameter", "module"])
def test_what_is_used_elsewhere_is_left_alone(shared):
    model = make_model("gpt2", "GPT2LMHeadModel", layers=1)
    if shared == "module":
        model.transformer.ln_f = model.transformer.h[0].ln_2
    else:
        model.transformer.ln_f.weight = model.transformer.h[0].ln_2.weight
    assert find_last_norm(model, batch_of()) is None


def test_text_that_only_the_fit_reads_costs_no_run():
    """Here a token that the model lacks, far behind what is measured, in a vocabulary that stays dense."""
    model, tokenizer = make_model("gpt2", "GPT2LMHeadModel", layers=1), make_tokenizer("gpt2")
    while len(tokenizer) <= model.config.vocab_size:
        tokenizer.add_tokens([f"zzqq{len(tokenizer)}"])
    strange = tokenizer.convert_ids_to_tokens(model.config.vocab_size)
    draw = random.Random(1)
    texts = [f"{draw.choice(TEXTS)} {draw.choice(TEXTS)} {i}" for i in range(3000)]
    texts[1636] += f" {strange}"
    options = {"calibration": texts, "tokenizer": tokenizer, "progress": False, "modules": ["attention"]}
    found = compress(model, "tiny", total_ratio=1.2, **options)
    assert found.report.rounds and not any(step["last_norm"] for step in found.report.rounds)


@pytest.mark.parametrize("batches", [[], [batch_of()]])
def test_little_text_is_not_enough(batches):
    model = make_model("gpt2", "GPT2LMHeadModel", layers=1)
    plan = make_plan(model.config.to_dict(), load_recipe("svd"), architecture="GPT2LMHeadModel")
    assert fit_last_norm(model, plan, [], text=lambda tokens: batches, mask_token=19, seed=0) == {}
