"""Where the bytes of one budget go, and the sensitivities that decide it."""

import itertools

import pytest
import torch
from common import make_model
from test_calibration import matrices_of

from hf_offline_compress import Recipe, Rule, make_plan
from hf_offline_compress.allocate.allocation import Choices, allocate
from hf_offline_compress.allocate.apply import _gains
from hf_offline_compress.measure.inputs import collect
from hf_offline_compress.measure.sensitivity import measure_sensitivity
from hf_offline_compress.measure.statistics import Statistics
from hf_offline_compress.measure.texts import Batch
from hf_offline_compress.request.objective import OBJECTIVES
from hf_offline_compress.solve.problems import problem_of
from hf_offline_compress.structures import LowRank, Trellis


def choices(seed, sizes=8, unit=10):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(sizes, generator=generator).sort(descending=True).values.double()
    errors = gains.flip(0).cumsum(0).flip(0)
    return Choices(errors, torch.arange(1, sizes + 1, dtype=torch.float64) * unit)


@pytest.mark.parametrize("budget", [30, 77, 120, 235, 240, 1000])
def test_close_to_the_best_of_all_combinations(budget):
    groups = [choices(seed) for seed in range(3)]
    chosen = allocate(groups, budget)

    def total(indices, of):
        return sum(float(getattr(group, of)[i]) for group, i in zip(groups, indices, strict=True))

    assert total(chosen, "costs") <= budget
    best = min(total(i, "errors") for i in itertools.product(range(8), repeat=3) if total(i, "costs") <= budget)
    assert total(chosen, "errors") <= best + 1e-9  # equal units and convex errors: greedy is exact


def test_unequal_units_stay_within_the_budget_and_use_it():
    groups = [choices(seed, sizes=40, unit=3 + 4 * seed) for seed in range(6)]
    for budget in (400, 1000, 2000):
        spent = sum(float(g.costs[i]) for g, i in zip(groups, allocate(groups, budget), strict=True))
        assert budget - 25 < spent <= budget


def test_a_budget_below_the_cheapest():
    with pytest.raises(ValueError, match="cheapest choices cost 30"):
        allocate([choices(seed) for seed in range(3)], 29)


def batch(rows=3, length=9):
    ids = torch.randint(5, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return Batch(ids, mask)


def mean_moments(model, matrices, part, repeats=60, **options):
    return (
        sum(
            measure_sensitivity(model, matrices, [part], mask_token=None, seed=s, **options).output_moments[
                matrices[0].name
            ]
            for s in range(repeats)
        )
        / repeats
    )


@pytest.mark.parametrize("model_type,head", [("bert", "BertModel"), ("gpt2", "GPT2Model")])
def test_hidden_states_change_as_predicted(model_type, head):
    """E[δᵀ G δ] is the squared change of the model's last hidden states, for small δ."""
    model = make_model(model_type, head)
    part = batch()
    wanted = [m for m in matrices_of(model, "attention_output") if m.layer == 1]
    predicted = mean_moments(model, wanted, part).trace()
    module = model.get_submodule(wanted[0].module)
    tokens, changes = part.attention_mask.bool(), []
    with torch.no_grad():
        reference = model(part.input_ids, attention_mask=part.attention_mask)[0][tokens]
        for seed in range(60):
            noise = 1e-3 * torch.randn(*part.input_ids.shape, 32, generator=torch.Generator().manual_seed(seed))
            handle = module.register_forward_hook(
                lambda m, a, out, noise=noise: out + noise * part.attention_mask[..., None]
            )
            moved = model(part.input_ids, attention_mask=part.attention_mask)[0][tokens]
            handle.remove()
            changes.append((moved - reference).square().sum() / tokens.sum() / 1e-6)
    assert float(predicted) == pytest.approx(float(torch.stack(changes).mean()), rel=0.2)


def test_logits_change_as_predicted():
    """For a language model, ½ δᵀ G δ is the divergence between the predictions."""
    model = make_model("gpt2", "GPT2LMHeadModel")
    part = batch()
    wanted = [m for m in matrices_of(model, "output") if m.layer == 2]
    predicted = mean_moments(model, wanted, part).trace() / 2
    module, tokens, divergences = model.transformer.get_submodule(wanted[0].module), part.attention_mask.bool(), []
    with torch.no_grad():
        before = model(part.input_ids, attention_mask=part.attention_mask).logits[tokens].log_softmax(-1)
        for seed in range(60):
            noise = 3e-3 * torch.randn(*part.input_ids.shape, 32, generator=torch.Generator().manual_seed(seed))
            handle = module.register_forward_hook(
                lambda m, a, out, noise=noise: out + noise * part.attention_mask[..., None]
            )
            after = model(part.input_ids, attention_mask=part.attention_mask).logits[tokens].log_softmax(-1)
            handle.remove()
            divergences.append((before.exp() * (before - after)).sum() / tokens.sum() / 9e-6)
    assert float(predicted) == pytest.approx(float(torch.stack(divergences).mean()), rel=0.25)


def test_measuring_leaves_the_model_alone():
    model = make_model("bert", "BertForMaskedLM")
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    measure_sensitivity(model, matrices_of(model, "query", "word_embeddings"), [batch()], mask_token=4, seed=0)
    for name, parameter in model.named_parameters():
        assert (
            parameter.equal(before[name][0]) and parameter.requires_grad == before[name][1] and parameter.grad is None
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_outputs_one_by_one_are_the_diagonal_of_all_together():
    """What is asked for alone takes less room, says the same, and weighs the rows of a problem."""
    model, part = make_model("bert", "BertForMaskedLM"), batch()
    part.input_ids[:, 2] = 4  # a mask token, where the loss lies
    wanted = matrices_of(model, "query", "output", "word_embeddings")
    chosen = {m.name for m in wanted if not m.embedding}
    whole = measure_sensitivity(model, wanted, [part], mask_token=4, seed=0)
    single = measure_sensitivity(model, wanted, [part], mask_token=4, seed=0, squares=chosen)
    assert set(single.output_squares) == chosen and not chosen & set(single.output_moments)
    for name in chosen:
        torch.testing.assert_close(single.squares(name), whole.squares(name))
        assert single.squares(name).dim() == 1 and single.squares(name).any()
    recipe = Recipe("some", (Rule(Trellis(), OBJECTIVES["sensitive"], ratio=8.0),), modules=("query",))
    plan = make_plan(model.config.to_dict(), recipe, architecture="BertForMaskedLM", dtype="float32")
    group = plan.groups[0]
    statistics = collect(model, group.matrices, [part])
    statistics.sensitivity = single
    weights = problem_of(group, model.state_dict(), plan, statistics).row_weights
    squares = whole.squares(group.matrices[0].name)
    torch.testing.assert_close(weights, squares + 0.1 * squares.mean())


def test_rows_of_words_weigh_what_their_token_occurs_and_none_weighs_nothing():
    model = make_model("bert", "BertModel")
    recipe = Recipe("some", (Rule(LowRank(), OBJECTIVES["calibrated"]),), modules=("word_embeddings",))
    plan = make_plan(model.config.to_dict(), recipe, architecture="BertModel", dtype="float32")
    (group,) = plan.groups
    statistics = Statistics(
        token_counts=torch.zeros(group.rows, dtype=torch.float64).index_fill_(0, torch.tensor(7), 60)
    )
    weights = problem_of(group, model.state_dict(), plan, statistics).row_weights
    assert float(weights.sum()) == pytest.approx(1)
    others = torch.cat([weights[:7], weights[8:]])
    assert others.min() > 0 and others.eq(others[0]).all() and weights[7] > 10 * others[0]


def test_fewer_bits_of_the_same_rank_cost_less_and_leave_more():
    model, part = make_model("bert", "BertModel"), batch()
    rule = Rule(LowRank(), OBJECTIVES["sensitive"], storage="float16", storages=("int8", "int2"))
    recipe = Recipe("some", (rule,), modules=("query",), allocation="by_gain")
    plan = make_plan(model.config.to_dict(), recipe, architecture="BertModel", dtype="float32")
    statistics = collect(model, plan.groups[0].matrices, [part])
    statistics.sensitivity = measure_sensitivity(model, plan.groups[0].matrices, [part], mask_token=None, seed=0)
    found = _gains(plan.groups[0], plan, model.state_dict(), statistics, may_stay=False)
    facts = {
        (str(form.storage), form.size): (float(error), float(cost))
        for form, error, cost in zip(found.forms, found.choices.errors, found.choices.costs, strict=True)
    }
    (error, cost), *others = (facts[storage, 8] for storage in ("float16", "int8", "int2"))
    for more, less in others:
        assert more > error and less < cost
        error, cost = more, less
