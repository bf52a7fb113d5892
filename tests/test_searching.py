"""The search for an allowed loss: what it tries, what it judges by, and what it refuses."""

from dataclasses import replace

import pytest
from common import TEXTS, make_model, make_tokenizer

from hf_offline_compress import CompressionError, Objective, Recipe, Rule, compress
from hf_offline_compress.allocate.search import HELD_OUT, TRIALS, Trial, hold_out, largest_ratio
from hf_offline_compress.measure.texts import CalibrationText
from hf_offline_compress.request.budget import Budget
from hf_offline_compress.structures import Quantized

RECIPE = Recipe(
    "quantized",
    (Rule(Quantized(group_size=16), Objective(l2=1.0, calibrated=True, sensitive=True)),),
    modules=("all",),
    allocation="by_gain",
    budget=Budget(total_ratio=4),
)


def search(max_loss, loss, bounds=(4.0, 30.0), start=16.0):
    tried = []

    def attempt(ratio):
        tried.append(ratio)
        return Trial(ratio, int(1e6 / ratio), loss(ratio))

    best, trials = largest_ratio(attempt, bounds, max_loss, start)
    assert [trial.total_ratio for trial in trials] == tried and len(tried) <= TRIALS
    return best, tried


@pytest.mark.parametrize("border", [4.1, 7.0, 15.9, 16.1, 22.0, 29.5])
def test_the_largest_ratio_within_the_loss_is_found(border):
    best, tried = search(0.01, lambda ratio: 0.01 * (ratio / border) ** 3)
    assert border / 1.07 < best <= border and best in tried
    assert tried[0] == 16.0  # what was asked for comes first


def test_everything_is_allowed():
    best, _ = search(0.5, lambda ratio: 0.001)
    assert best > 29


def test_nothing_is_good_enough():
    with pytest.raises(CompressionError, match=r"at most 1\.00% was not reached: at total ratio 4\.\d+ it is 20\.00%"):
        search(0.01, lambda ratio: 0.2)


def test_nothing_is_both_calibrated_on_and_judged_by():
    texts = CalibrationText(tuple(f"text {i}" for i in range(50)), "mine")
    kept, held = hold_out(texts)
    assert not set(kept.texts) & set(held.texts) and set(kept.texts) | set(held.texts) == set(texts.texts)
    assert len(held.texts) == -(-50 // HELD_OUT) and held.source == "held out from mine"
    with pytest.raises(CompressionError, match="there are only 5"):
        hold_out(CalibrationText(texts.texts[:5], "mine"))


@pytest.mark.parametrize(("model_type", "head"), [("bert", "BertModel"), ("gpt2", "GPT2LMHeadModel")])
def test_a_model_within_the_loss(model_type, head):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    options = {"tokenizer": tokenizer, "calibration": TEXTS, "progress": False}
    loose, tight = (compress(model, RECIPE, max_loss=loss, **options) for loss in (0.3, 0.003))
    for result, loss in ((loose, 0.3), (tight, 0.003)):
        search = result.report.search
        assert search["max_loss"] == loss and len(search["trials"]) > 1
        chosen = [t for t in search["trials"] if t["total_ratio"] == result.report.recipe["budget"]["total_ratio"]]
        assert chosen and chosen[-1]["loss"] <= loss
        assert max(t["total_ratio"] for t in search["trials"] if t["loss"] <= loss) == chosen[-1]["total_ratio"]
        assert result.report.validation["source"] == "held out from caller"
        assert result.report.calibration["texts"] < len(TEXTS)
    assert loose.report.totals["stored_bytes"] < tight.report.totals["stored_bytes"]


def test_a_search_begins_at_the_smallest_where_its_recipe_asks_for_less():
    options = {"tokenizer": make_tokenizer("bert"), "calibration": TEXTS, "progress": False}
    few = replace(RECIPE, modules=("word_embeddings",))
    model = make_model("bert", "BertModel")
    with pytest.raises(CompressionError, match="is too small: with every chosen matrix at its smallest"):
        compress(model, few, **options)
    found = compress(model, few, max_loss=0.3, **options)
    assert 1 < found.report.recipe["budget"]["total_ratio"] < 4
    assert found.report.search["trials"][0]["loss"] <= 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_loss": 0}, "above 0 and below 1"),
        ({"max_loss": 2}, "above 0 and below 1"),
        ({"max_loss": 0.1, "total_ratio": 4}, "cannot be combined with a size"),
        ({"max_loss": 0.1, "recipe": "svd"}, "the recipe 'svd' has none; take balanced"),
        ({"max_loss": 0.1, "calibration": None}, "needs text to judge by"),
        ({"max_loss": 0.1, "calibration": TEXTS[:4]}, "there are only 4"),
        ({"max_bytes": 10}, r"The budget of 10 bytes \(10 bytes\) is too small"),
        ({"total_ratio": 500}, r"total ratio 500 .* is too small: .* \(total ratio \d"),
    ],
)
def test_requests_that_cannot_be_met(changes, message):
    options = {
        "recipe": "tiny",
        "calibration": TEXTS,
        "tokenizer": make_tokenizer("bert"),
        "progress": False,
        **changes,
    }
    with pytest.raises(CompressionError, match=message):
        compress(make_model("bert", "BertModel"), **options)
