"""Measured allocation: what exchanging weights really does, and what follows from it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer

from hf_offline_compress import CompressionError, Recipe, Rule, compress, make_plan
from hf_offline_compress.allocate.measured import _by_measure
from hf_offline_compress.allocate.neighbours import neighbours
from hf_offline_compress.architectures.families import objective_of
from hf_offline_compress.architectures.stock import layout_of_model
from hf_offline_compress.artifact.report import GroupReport
from hf_offline_compress.measure.divergence import Divergence, exchanged
from hf_offline_compress.measure.texts import Batch, batches_apart, load_texts, make_batches
from hf_offline_compress.request.effort import EFFORTS
from hf_offline_compress.structures import LowRank

MASK = 4


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (3, 12), generator=generator)
    ids[:, ::3] = MASK
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return Batch(ids, mask)


@torch.no_grad()
def plainly(model, replaced, prefix, batch, mask_token):
    """The divergence as a plain loop has it: everything computed again, everywhere."""
    mask = batch.attention_mask.bool()
    places = mask & (batch.input_ids == mask_token) if mask_token is not None else mask
    headed = model.base_model is not model

    def told():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return output.logits[places].log_softmax(-1) if headed else output[0][mask]

    before = told()
    with exchanged(model, prefix, replaced):
        after = told()
    if not headed:
        return float((before - after).square().sum() / mask.sum())
    return float((before.exp() * (before - after)).sum() / mask.sum())


# Layers of their own, fused and transposed, shared, called by another path; with a head and without.
CASES = [
    ("bert", "BertForMaskedLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("albert", "AlbertForMaskedLM"),
    ("modernbert", "ModernBertForMaskedLM"),
    ("llama", "LlamaForCausalLM"),
    ("roberta", "RobertaModel"),
]


@pytest.mark.parametrize("model_type,head", CASES)
def test_divergence_is_that_of_the_whole_model(model_type, head):
    model = make_model(model_type, head)
    layout = layout_of_model(model)
    mask_token = MASK if objective_of(head) == "masked" else None
    batches = [batch_of(0), batch_of(1)]
    matrices = [m for m in layout.matrices if m.kind != "pooler"]
    divergence = Divergence(model, matrices, batches, prefix=layout.prefix, mask_token=mask_token)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for matrix in matrices[::3]:
        weight = matrix.dense(state, layout.prefix)
        other = weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
        found = divergence.of([(matrix, other)])
        counts = [int(b.attention_mask.sum()) for b in batches]
        parts = [plainly(model, [(matrix, other)], layout.prefix, b, mask_token) for b in batches]
        expected = sum(n * part for n, part in zip(counts, parts, strict=True)) / sum(counts)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7), matrix.name
    assert divergence.of([]) == 0
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_layers_before_a_change_are_not_computed_again():
    model = make_model("bert", "BertForMaskedLM")
    layout = layout_of_model(model)
    divergence = Divergence(model, layout.matrices, [batch_of()], prefix=layout.prefix, mask_token=MASK)
    last = max(m.layer for m in layout.matrices if m.layer is not None)
    calls = []
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_hook(lambda *args, index=index: calls.append(index))
    for matrix in layout.matrices:
        if matrix.layer is not None or matrix.embedding:
            calls.clear()
            divergence.of([(matrix, torch.zeros(matrix.rows, matrix.columns))])
            assert calls == list(range(matrix.layer or 0, last + 1))


def test_what_is_judged_on_is_not_measured_on():
    text, tokenizer = load_texts("bundled"), make_tokenizer("bert")
    options = {"masked": False, "positions": 40, "seed": 3, "wanted": 2000, "apart": 500}
    seen, _ = make_batches(text, tokenizer, **options)
    apart = batches_apart(text, tokenizer, **options)

    def lines(batches):
        return [
            tuple(ids[mask.bool()].tolist())
            for b in batches
            for ids, mask in zip(b.input_ids, b.attention_mask, strict=True)
        ]

    part = lines(make_batches(text, tokenizer, used=800, **options)[0])
    assert 800 <= sum(map(len, part)) < 840 and set(part) <= set(lines(seen))
    windows = lines(make_batches(text, tokenizer, **options | {"wanted": 10**6, "apart": 0})[0])
    assert 500 <= sum(map(len, lines(apart))) < 540 and 2000 <= sum(map(len, lines(seen))) < 2040
    assert len(lines(seen)) + len(lines(apart)) < len(windows)
    everything, rest = (
        make_batches(text, tokenizer, **options | {"wanted": 10**6})[0],
        batches_apart(text, tokenizer, **options | {"wanted": 10**6}),
    )
    assert sorted(lines(everything) + lines(rest)) == sorted(windows)  # no window is in both


@pytest.mark.parametrize(
    "model_type,head,effort", [("bert", "BertForMaskedLM", "best"), ("gpt2", "GPT2Model", "default")]
)
def test_rounds_are_reported_and_never_end_worse(model_type, head, effort):
    model, tokenizer = make_model(model_type, head, layers=1), make_tokenizer(model_type)
    texts = [f"{text} {other}" for text in TEXTS[:20] for other in TEXTS[:20]]
    options = {"total_ratio": 5, "calibration": texts, "tokenizer": tokenizer, "progress": False}
    found = compress(model, "tiny", effort=effort, **options)
    measured = [step["measured"] for step in found.report.rounds]
    assert 1 < len(measured) <= 1 + EFFORTS[effort].rounds
    assert all(later < earlier for earlier, later in pairwise(measured[:-1]))  # the last may have been one too many
    assert all(group.forecast > 0 and group.measured >= 0 for group in found.report.groups)
    if effort == "default":
        state = compress(model, "tiny", effort=effort, **options).model.state_dict()
        assert all(tensor.equal(state[name]) for name, tensor in found.model.state_dict().items())
        fast = compress(model, "tiny", effort="fast", **options).report
        assert fast.rounds is None and all(group.measured is None for group in fast.groups)


def test_an_effort_that_is_none():
    with pytest.raises(CompressionError, match="The effort 'much' is unknown; known are fast, default"):
        compress("nowhere", "tiny", effort="much")


class Script:
    """Offers, a divergence and a solver in one, which say what they are told to: one plan and one loss a round."""

    of_curvature = 0.5

    def __init__(self, plan, sizes, alone, together, error=0.5):
        self.plan, self.error = plan, error
        self.plans = [replace(plan, groups=tuple(replace(g, size=size) for g in plan.groups)) for size in sizes]
        self.alone, self.together = list(alone), list(together)
        self.asked, self.solved = [], []

    def sized(self, factors, least):
        self.asked.append((dict(factors), dict(least)))
        return self.plans[len(self.asked) - 1]

    def forecast(self, group):
        return 0.4

    def of(self, replaced, every=1):
        return self.together.pop(0) if every == 1 else self.alone.pop(0)

    def work(self, matrices, every=1):
        return 1.0

    def solve(self, plan):
        self.solved.append([(group.name, group.size) for group in plan.groups])
        tensors = {name: torch.zeros(shape) for name, (shape, _) in plan.tensors().items()}
        reports = [
            GroupReport(
                g.name, "query", "low_rank", g.size, (), 1, 1, 1, 1, 1.0, "float32", {}, self.error, 0.0, None, 0.0
            )
            for g in plan.groups
        ]
        return tensors, reports, {}

    def run(self, rounds):
        return _by_measure(self, self, self.solve, replace(EFFORTS["default"], rounds=rounds))


@pytest.fixture
def planned():
    model = make_model("bert", "BertModel", layers=1)
    recipe = Recipe("x", (Rule(LowRank()),), modules=("query", "key"))
    return make_plan(model.config.to_dict(), recipe, architecture="BertModel")


def test_forecasts_are_corrected_by_the_root_of_what_they_are_off_by(planned):
    script = Script(planned, [2, 3], alone=[0.8, 0.05], together=[1.0, 0.9])
    _, (_, reports, _), rounds = script.run(1)
    first, second = (group.name for group in planned.groups)
    # forecast 0.5 × 0.4 = 0.2: measured four times as much, and a quarter
    assert script.asked == [({}, {}), ({first: pytest.approx(2.0), second: pytest.approx(0.5)}, {})]
    # Nothing is allocated after the last round, so groups keep the figures of the one before.
    assert [(r.forecast, r.measured) for r in reports] == [(0.2, 0.8), (0.2, 0.05)] and not script.alone
    assert [(step.forecast, step.measured) for step in rounds] == [(pytest.approx(0.4), 1.0), (pytest.approx(0.4), 0.9)]


def test_the_best_round_is_kept_and_a_worse_one_is_the_last(planned):
    script = Script(planned, [2, 3, 4, 5], alone=[0.2] * 8, together=[1.0, 0.7, 0.8, 0.1])
    plan, (tensors, _, _), rounds = script.run(3)
    assert [step.measured for step in rounds] == [1.0, 0.7, 0.8]
    assert {group.size for group in plan.groups} == {3} and tensors.keys() == plan.tensors().keys()


def test_what_is_solved_once_is_not_solved_again(planned):
    script = Script(planned, [2, 3, 2], alone=[0.2] * 4, together=[1.0, 0.9, 0.8])
    plan, _, _ = script.run(2)
    assert [len(groups) for groups in script.solved] == [2, 2, 0] and {group.size for group in plan.groups} == {2}


def test_a_group_that_zeros_would_be_nearer_to_must_get_more(planned):
    script = Script(planned, [2, 3], alone=[0.2] * 4, together=[1.0, 0.9], error=1.2)
    script.run(1)
    assert script.asked[1][1] == {group.name: group.stored_bytes for group in script.plans[0].groups}


def test_work_is_that_of_the_layers_behind_and_the_head():
    model = make_model("bert", "BertForMaskedLM")
    layout = layout_of_model(model)
    batch = batch_of()
    divergence = Divergence(model, layout.matrices, [batch, batch], prefix=layout.prefix, mask_token=MASK)
    layers = model.bert.encoder.layer
    tokens, places = int(batch.attention_mask.sum()), int((batch.input_ids * batch.attention_mask == MASK).sum())
    head = places * model.get_output_embeddings().weight.numel()
    for matrix in layout.matrices:
        if matrix.layer is not None or matrix.embedding:
            behind = sum(p.numel() for layer in layers[matrix.layer or 0 :] for p in layer.parameters())
            assert divergence.work([matrix], 2) == 2 * (tokens * behind + head)


def planned_of(layers):
    model = make_model("bert", "BertModel", layers=layers)
    recipe = Recipe("x", (Rule(LowRank()),), modules=("query", "key", "word_embeddings"))
    return make_plan(model.config.to_dict(), recipe, architecture="BertModel").groups


@pytest.mark.parametrize("allowed,sets", [(13, 13), (12, 11), (7, 7), (2, 3)])
def test_neighbours_are_measured_together_where_each_alone_would_take_too_long(allowed, sets):
    groups = planned_of(6)
    found = neighbours(groups, lambda _: 1.0, allowed)
    assert len(found) == sets and sorted(g.name for part in found for g in part) == sorted(g.name for g in groups)
    for part in found:
        layers = [group.matrices[0].layer for group in part]
        assert len({group.matrices[0].kind for group in part}) == 1
        assert layers == [None] or layers == list(range(layers[0], layers[-1] + 1))
    assert max(map(len, found)) - min(len(part) for part in found if part[0].matrices[0].layer is not None) <= 1


def test_neighbours_share_what_they_cost(planned):
    both = [replace(g, matrices=(replace(g.matrices[0], kind="query", layer=i),)) for i, g in enumerate(planned.groups)]
    script = Script(replace(planned, groups=tuple(both)), [2, 3], alone=[0.9], together=[1.0, 0.9])
    script.forecast = lambda group: 0.2 if group.name == both[0].name else 0.4
    script.work = lambda matrices, every: 0.6 * EFFORTS["default"].checking * sum(g.parameters for g in both)
    _, (_, reports, _), _ = script.run(1)
    assert [r.measured for r in reports] == [pytest.approx(0.3), pytest.approx(0.6)]  # expected were 0.1 and 0.2
    assert script.asked[1][0] == {group.name: pytest.approx(3**0.5) for group in both}
