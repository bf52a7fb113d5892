"""Importance weights: those of a plain loop, row by row and weight by weight, and what has none."""

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer
from test_calibration import matrices_of

from hf_offline_compress import CompressionError
from hf_offline_compress.measure import sensitivity
from hf_offline_compress.measure.importance import measure_importance
from hf_offline_compress.measure.texts import Batch, load_texts, make_batches

KINDS = ("fisher", "l1_sensitivity")
LANGUAGE = [
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForPreTraining"),
    ("bert", "BertLMHeadModel"),
    ("roberta", "RobertaForMaskedLM"),
    ("gpt2", "GPT2LMHeadModel"),
]
TASKS = [
    ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForTokenClassification"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("bert", "BertForNextSentencePrediction"),
    ("bert", "BertForQuestionAnswering"),
    ("gpt2", "GPT2ForQuestionAnswering"),
]


@pytest.fixture(autouse=True)
def all_of_the_text(monkeypatch):
    """Measure on every portion, as the loops here do, and not on one in two."""
    monkeypatch.setattr(sensitivity, "PART", 1)


def setting(model_type, head, **overrides):
    """Return a model, batches, and the options that its head needs."""
    model, tokenizer = make_model(model_type, head, **overrides), make_tokenizer(model_type)
    masked = head.endswith(("ForMaskedLM", "ForPreTraining"))
    make = {"text": load_texts(TEXTS), "tokenizer": tokenizer, "positions": 30, "seed": 3, "batch_size": 16}
    batches, _ = make_batches(**make, masked=masked)
    options = {"mask_token": None}
    if masked:
        plain, _ = make_batches(**make, masked=False)
        options = {"mask_token": tokenizer.mask_token_id, "labels": [batch.input_ids for batch in plain]}
    return model, batches, options


def right_probability(model, head, ids, true, mask, mask_token):
    """Return the mean probability that importance is the gradient of, computed token by token."""
    output = model(input_ids=ids, attention_mask=mask)
    found = []
    if "QuestionAnswering" in head:
        for logits in (output.start_logits, output.end_logits):
            found += [row[keep.bool()].softmax(0).max() for row, keep in zip(logits, mask, strict=True)]
        return torch.stack(found).mean()
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    if logits.dim() == 2:
        return logits.softmax(-1).max(-1).values.mean()
    for row in range(len(ids)):
        for place in range(int(mask[row].sum())):
            if "TokenClassification" in head:
                found.append(logits[row, place].softmax(0).max())
            elif mask_token is not None and ids[row, place] == mask_token:
                found.append(logits[row, place].softmax(0)[true[row, place]])
            elif mask_token is None and place > 0:
                found.append(logits[row, place - 1].softmax(0)[true[row, place]])
    return torch.stack(found).mean()


def expected(model, head, matrix, batches, options, kind):
    """Return the weights of a module's matrix as it is stored, from a loop that does nothing else."""
    root = model.base_model if matrix.in_base else model
    weight = root.get_submodule(matrix.module).weight
    total, sequences = torch.zeros_like(weight), 0
    labels = options.get("labels") or [batch.input_ids for batch in batches]
    for batch, true in zip(batches, labels, strict=True):
        at_once = 512 // batch.input_ids.shape[1]
        for start in range(0, len(true), at_once):
            part = slice(start, start + at_once)
            ids, mask = batch.input_ids[part], batch.attention_mask[part]
            model.zero_grad()
            right_probability(model, head, ids, true[part], mask, options["mask_token"]).backward()
            total += weight.grad**2 if kind == "fisher" else weight.grad.abs()
            sequences += len(ids)
    model.zero_grad()
    return ((total.sqrt() if kind == "fisher" else total) / sequences).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type,head", LANGUAGE + TASKS)
def test_as_a_plain_loop_says(model_type, head, kind):
    model, batches, options = setting(model_type, head)
    matrix = next(m for m in matrices_of(model, "intermediate") if m.layer == 1)
    found = measure_importance(model, [matrix], batches, kind=kind, parameter_wise=True, **options)
    stored = expected(model, head, matrix, batches, options, kind)
    stored = stored.T if model_type == "gpt2" else stored
    assert found[matrix.name].shape == (matrix.rows, matrix.columns) and found[matrix.name].dtype == torch.float32
    torch.testing.assert_close(found[matrix.name], stored, rtol=1e-3, atol=1e-11)


def test_fused_and_transposed_parts():
    model, batches, options = setting("gpt2", "GPT2LMHeadModel")
    parts = [m for m in matrices_of(model, "query", "key", "value") if m.layer == 0]
    found = measure_importance(model, parts, batches, kind="fisher", parameter_wise=True, **options)
    stored = expected(model, "GPT2LMHeadModel", parts[0], batches, options, "fisher")  # [in, 3 × out]
    joined = torch.cat([found[f"h.0.attn.c_attn.{part}"] for part in ("query", "key", "value")])
    torch.testing.assert_close(joined, stored.T, rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("model_type,head", [*LANGUAGE, *TASKS])
def test_rows_are_sums_of_their_weights(model_type, head):
    model, batches, options = setting(model_type, head)
    wanted = matrices_of(model)
    for kind in KINDS:
        rows = measure_importance(model, wanted, batches, kind=kind, **options)
        single = measure_importance(model, wanted, batches, kind=kind, parameter_wise=True, **options)
        assert set(rows) == set(single) == {m.name for m in wanted}
        for matrix in wanted:
            each = single[matrix.name]
            assert rows[matrix.name].shape == (matrix.rows,) and each.shape == (matrix.rows, matrix.columns)
            reduced = each.square().sum(dim=1).sqrt() if kind == "fisher" else each.sum(dim=1)
            torch.testing.assert_close(rows[matrix.name], reduced, rtol=1e-3, atol=1e-11)


def test_tied_embeddings_count_both_uses():
    model, batches, options = setting("gpt2", "GPT2LMHeadModel")
    untied, _, _ = setting("gpt2", "GPT2LMHeadModel", tie_word_embeddings=False)
    unused = [i for i in range(model.config.vocab_size) if not any((b.input_ids == i).any() for b in batches)]
    rows = [measure_importance(m, matrices_of(m), batches, kind="fisher", **options) for m in (model, untied)]
    assert unused and (rows[0]["wte"][unused] > 0).all()  # the head spreads its probability over all tokens
    assert not rows[1]["wte"][unused].any() and (rows[1]["lm_head"][unused] > 0).all()


def test_each_output_of_pretraining_measures_what_serves_it():
    model, batches, options = setting("bert", "BertForPreTraining")
    wanted = matrices_of(model)
    all_rows = measure_importance(model, wanted, batches, kind="fisher", **options)
    assert {"pooler.dense", "cls.seq_relationship"} <= set(all_rows)
    body = [m for m in wanted if m.kind == "query"]
    alone = measure_importance(model, body, batches, kind="fisher", **options)
    assert all(torch.equal(alone[m.name], all_rows[m.name]) for m in body)  # not mixed with the next sentence


def test_several_labels_at_once():
    model, batches, options = setting(
        "bert", "BertForSequenceClassification", problem_type="multi_label_classification", num_labels=1
    )
    wanted = matrices_of(model, "pooler")
    assert measure_importance(model, wanted, batches, kind="fisher", **options)["pooler.dense"].all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, batches, options = setting("bert", "BertForMaskedLM")
    flags = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
        flags[name] = (i % 3 > 0, i if i % 2 else None)

    def stop(items):
        yield next(iter(items))
        raise KeyboardInterrupt

    options["progress"] = stop if fails else iter
    try:
        measure_importance(model, matrices_of(model), batches, kind="fisher", **options)
    except KeyboardInterrupt:
        assert fails
    for name, parameter in model.named_parameters():
        flag, gradient = flags[name]
        assert parameter.requires_grad == flag
        assert parameter.grad is None if gradient is None else (parameter.grad == gradient).all()


def test_same_seed_same_bytes():
    found = []
    for _ in range(2):
        model, batches, options = setting("roberta", "RobertaForMaskedLM")
        found.append(measure_importance(model, matrices_of(model), batches, kind="l1_sensitivity", **options))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_padding_does_not_matter():
    model, batches, options = setting("bert", "BertForSequenceClassification")
    other = [Batch(b.input_ids.masked_fill(b.attention_mask == 0, 7), b.attention_mask) for b in batches]
    wanted = matrices_of(model)
    rows, same = (measure_importance(model, wanted, b, kind="fisher", **options) for b in (batches, other))
    for matrix in wanted:
        torch.testing.assert_close(rows[matrix.name], same[matrix.name], rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(
    "model_type,head",
    [
        ("bert", "BertModel"),
        ("gpt2", "GPT2Model"),
        ("roberta", "RobertaForMultipleChoice"),
        ("gpt2", "GPT2DoubleHeadsModel"),
    ],
)
def test_models_that_predict_nothing(model_type, head):
    model, batches, options = setting(model_type, head)
    with pytest.raises(
        CompressionError, match=rf"'fisher' needs a language model's head .*{head} has none .*auto_class"
    ):
        measure_importance(model, matrices_of(model), batches, kind="fisher", **options)


def test_matrices_without_importance():
    model, batches, options = setting("bert", "BertForMaskedLM")
    wanted = matrices_of(model, "query", "intermediate")
    with torch.no_grad():  # what it computes is thrown away
        model.base_model.get_submodule("encoder.layer.2.output.dense").weight.zero_()
    with pytest.raises(CompressionError, match=r"do not depend on encoder.layer.2.intermediate.dense, so .*'fisher'"):
        measure_importance(model, wanted, batches, kind="fisher", **options)
    with torch.no_grad():
        model.base_model.get_submodule("encoder.layer.1.output.dense").weight.fill_(torch.nan)
    with pytest.raises(CompressionError, match=r"'fisher' of encoder.* is not finite"):
        measure_importance(model, wanted[:1], batches, kind="fisher", **options)


def test_a_pooler_that_nothing_uses():
    from transformers import BertModel

    model, batches, options = setting("bert", "BertForTokenClassification")
    model.bert = BertModel(model.config).eval()  # with a pooler, which this head does not read
    pooler = matrices_of(make_model("bert", "BertModel"), "pooler")
    with pytest.raises(
        CompressionError, match=r"BertForTokenClassification on plain text do not depend on pooler.dense"
    ):
        measure_importance(model, pooler, batches, kind="fisher", **options)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"kind": "hessian"}, "no importance 'hessian'; known: fisher, l1_sensitivity"),
        ({"mask_token": None}, "needs its mask token"),
        ({"labels": None}, "needs the true tokens"),
        ({"labels": []}, "true tokens do not belong to the batches"),
        ({"mask_token": 9}, "true tokens do not belong to the batches"),
    ],
)
def test_wrong_requests(changes, message):
    model, batches, options = setting("bert", "BertForMaskedLM")
    with pytest.raises(CompressionError, match=message):
        measure_importance(model, matrices_of(model, "query"), batches, **{"kind": "fisher", **options, **changes})


def test_nothing_to_predict():
    model = make_model("gpt2", "GPT2LMHeadModel")
    one = Batch(torch.tensor([[5]]), torch.tensor([[1]]))
    with pytest.raises(CompressionError, match="No token of the calibration text can be predicted"):
        measure_importance(model, matrices_of(model, "query"), [one], kind="fisher", mask_token=None)


def test_regressions():
    model, batches, options = setting("bert", "BertForSequenceClassification", num_labels=1)
    with pytest.raises(CompressionError, match="has one label, a regression"):
        measure_importance(model, matrices_of(model, "query"), batches, kind="fisher", **options)
