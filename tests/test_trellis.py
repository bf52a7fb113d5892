"""Trellis codes on matrices: their paths, their metric, their outliers; and the sizes they promise."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer

from hf_offline_compress import CompressionError, Objective, Recipe, Rule, compress
from hf_offline_compress.foundation.progress import showing
from hf_offline_compress.request.effort import EFFORTS
from hf_offline_compress.runtime.layers_compressed import LINEARS
from hf_offline_compress.runtime.packing_compressed import unpack
from hf_offline_compress.runtime.specs_compressed import weight_spec
from hf_offline_compress.runtime.trellis_compressed import decode_scales, trellis_table
from hf_offline_compress.solvers import Problem, expected_errors, solve, solve_all, trellis
from hf_offline_compress.solvers import columns as columns_
from hf_offline_compress.solvers.columns import Code, Held, Streams, _coefficients
from hf_offline_compress.solvers.coupling import FirstTurn, NextTurn
from hf_offline_compress.solvers.feedback import BLOCK, inverse_roots
from hf_offline_compress.solvers.mixtures import mixtures
from hf_offline_compress.solvers.paths import viterbi_path
from hf_offline_compress.solvers.trellis import _rounded_scales
from hf_offline_compress.structures import GroupShape, LowRank, Mixture, Storage, Trellis
from hf_offline_compress.structures.trellis import DISTORTIONS, RATES, bits_a_weight

L2, CALIBRATED = Objective(l2=1.0), Objective(l2=1.0, calibrated=True)
SMALL = Trellis(state_bits=8, outliers=0.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(columns, seed=1):
    x = normal(400, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    return x.T @ x / 400


def decoded(problem, factors):
    shape = problem.shape
    entry = {**problem.structure.runtime(problem.size, shape), "storage": "float32"}
    layer = LINEARS["trellis"](shape.rows, shape.columns, weight_spec(entry))
    layer.load_state_dict(factors.members[0])
    with torch.no_grad():
        return layer.dense_weight()


def error(problem, factors, metric=None):
    left = (problem.weights[0] - decoded(problem, factors)).double()
    return float(left.square().sum() if metric is None else ((left @ metric.double()) * left).sum())


@pytest.mark.parametrize("size", RATES)
def test_distortion_is_what_the_allocation_counts_on(size):
    problem = Problem(Trellis(outliers=0.0), L2, size, (normal(64, 64),))
    reached = error(problem, solve(problem)) / float(problem.weights[0].square().sum())
    assert 4 ** -bits_a_weight(size) < reached < DISTORTIONS[size] * 1.35
    (expected,) = expected_errors(problem)
    assert float(expected[size] / expected[0]) == pytest.approx(DISTORTIONS[size])


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_distortion_is_that_of_even_choices(size):
    """A table in random order leaves up to a quarter more: on so many numbers, that would be seen."""
    problem = Problem(Trellis(outliers=0.0), L2, size, (normal(256, 128),))
    assert solve(problem).notes["error"] ** 2 < 1.02 * DISTORTIONS[size]


def test_expected_errors_compare_between_matrices_of_other_sizes_and_inputs():
    for rows, columns, metric in ((48, 64, None), (96, 32, moments(32)), (32, 96, moments(96) * 7)):
        options = {} if metric is None else {"input_moments": metric}
        problem = Problem(
            Trellis(outliers=0.0), CALIBRATED if options else L2, 5, (normal(rows, columns) * 3,), **options
        )
        assert 0.7 < error(problem, solve(problem), metric) / float(expected_errors(problem)[0][5]) < 1.5


@pytest.mark.parametrize("ends", [None, [-1, 0, 1, 0, -1, 1]])
@pytest.mark.parametrize("bits", [1, 2])
def test_no_path_is_cheaper_than_the_one_found(bits, ends):
    steps, states = 5, 8
    costs = torch.rand(steps, 6, states, generator=torch.Generator().manual_seed(bits))
    start = torch.tensor([0, 3, 5, 1, 0, 7])
    bound = None if ends is None else torch.tensor(ends)
    found = viterbi_path(costs.transpose(1, 2).contiguous(), start, bits, bound)
    for stream in range(len(start)):
        best, best_path = float("inf"), None
        for codes in itertools.product(range(2**bits), repeat=steps):
            state, total, path = int(start[stream]), 0.0, []
            for step, code in enumerate(codes):
                state = (state * 2**bits + code) % states
                total += float(costs[step, stream, state])
                path.append(state)
            allowed = ends is None or ends[stream] < 0 or state % (states >> bits) == ends[stream]
            if allowed and total < best:
                best, best_path = total, path
        assert found[:, stream].tolist() == best_path


@pytest.mark.parametrize("columns", [6, 7])
@pytest.mark.parametrize("rate", sorted(RATES))
@pytest.mark.parametrize("turn", ["uncoupled", "first", "next"])
def test_compiled_paths_are_those_of_the_version_for_every_device(columns, rate, turn):
    compiled = pytest.importorskip("hf_offline_compress.solvers.compiled_columns")
    code = Trellis().code(rate)
    code = Code(trellis_table(**code), code["bits"])
    members = torch.tensor([0, 0, 1, 1, 1])
    left, weights = normal(5, 24, columns), torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) + 0.1
    metrics = [moments(columns), moments(columns, seed=1)]
    roots = inverse_roots(metrics, 0.01, "cpu")
    block, held = FirstTurn(roots, code.width).block(0, columns), None
    if turn == "uncoupled":
        block = None
    elif turn == "next":
        states, _ = columns_.code_columns(left.clone(), block, Streams(weights, members, members * 0), code)
        coupling = NextTurn.of(torch.cholesky_inverse(roots, upper=True), code.width)
        block, held = coupling.block(0, columns), Held.of(states, code, columns)
    found = []
    for code_columns in (columns_.code_columns, compiled.code_columns):
        streams, mine = Streams(weights, members, torch.zeros(5, dtype=torch.long)), left.clone()
        states, errors = code_columns(mine, block, streams, code, held)
        assert streams.last.tolist() == states[:, -1, -1].tolist()
        values = code.values(states, columns)
        if errors is None:
            errors = values - left
        elif held is not None:
            torch.testing.assert_close(errors, held.values - values)
        found.append((states, (errors.square() * weights[..., None]).sum()))
    # Paths that cost the same but for rounding may differ.
    assert (found[0][0] == found[1][0]).float().mean() > 0.9
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=0)


def test_a_numba_that_cannot_be_imported_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_offline_compress.solvers.compiled_columns", None)
    assert trellis._coder(torch.device("cpu")) is columns_.code_columns


def test_what_is_done_part_by_part_is_the_same_as_at_once(monkeypatch):
    problem = Problem(
        Trellis(state_bits=8, outliers=0.01), CALIBRATED, 4, (normal(40, 24) ** 3,), input_moments=moments(24)
    )
    whole = solve(problem)
    monkeypatch.setattr(trellis, "NUMBERS_AT_ONCE", 7)
    monkeypatch.setattr(trellis, "ROWS_AT_ONCE", 3)
    parts = solve(problem)
    assert len(whole.members[0]["outlier_values"]) == 10
    for name, tensor in whole.members[0].items():
        assert tensor.equal(parts.members[0][name]), name


def test_without_numba_codes_are_as_good(monkeypatch):
    problem = Problem(SMALL, CALIBRATED, 4, (normal(40, 24),), input_moments=moments(24))
    compiled = solve(problem)
    monkeypatch.setattr(trellis, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "hf_offline_compress.solvers.compiled_columns", None)  # importing it would fail
    plain = solve(problem)
    assert plain.notes["error"] == pytest.approx(compiled.notes["error"], rel=1e-3)


def test_a_missing_numba_is_told_where_it_would_help(monkeypatch, capsys):
    model = make_model("bert", "BertModel", layers=1)

    def said(structure, shown=True):
        with showing(shown):
            compress(model, Recipe("keys", (Rule(structure, ratio=4.0),), modules=("key",)), progress=False)
        return capsys.readouterr().err

    assert "Numba" not in said(SMALL)
    monkeypatch.setattr(trellis, "find_spec", lambda name: None)
    assert said(SMALL).count("Numba is not installed") == 1
    assert "Numba" not in said(LowRank()) + said(SMALL, shown=False)


@pytest.mark.parametrize("width,columns", [(1, 1), (2, 2), (2, 1)])
def test_costs_of_entries_are_weighted_distances_but_for_what_all_have_alike(width, columns):
    table, target, weights = normal(16, width), normal(3, 5, columns, seed=1), torch.rand(3, 5)
    inverse = torch.eye(columns) + normal(3, columns, columns, seed=2).triu()
    factors = _coefficients(target, inverse @ inverse.mT, weights, width)
    costs = (Code(table, 1).features() @ factors).permute(2, 0, 1)  # [streams, run, entries]
    away = (target[:, :, None] - table[:, :columns]) @ inverse[:, None]
    expected = weights[..., None] * away.square().sum(dim=-1)
    torch.testing.assert_close(costs - costs[..., :1], expected - expected[..., :1], atol=1e-4, rtol=1e-4)


def test_columns_behind_make_good_the_errors_before_them():
    weight, metric = normal(64, 160), moments(160)
    plain = Problem(SMALL, L2, 4, (weight,))
    informed = Problem(SMALL, CALIBRATED, 4, (weight,), input_moments=metric)
    assert error(informed, solve(informed), metric) < 0.75 * error(plain, solve(plain), metric)


@pytest.mark.parametrize("columns", [BLOCK + 33, 33])
@pytest.mark.parametrize("size", [1, 3, 9, Mixture(((6, 1), (2, 2)))])
def test_columns_that_are_coded_again_fit_each_other_better_every_time(size, columns):
    """The more so, the fewer bits there are: what later columns had to absorb at first is then as large as the weights."""
    weight, metric = normal(48, columns) ** 3, moments(columns)
    importance = torch.rand(48, generator=torch.Generator().manual_seed(3)) + 0.1
    found = []
    for passes in range(4):
        structure = Trellis(state_bits=8, run=16, outliers=0.01)
        options = {"input_moments": metric, "row_weights": importance, "passes": passes}
        found.append(solve(Problem(structure, CALIBRATED, size, (weight,), **options)).notes["error"] ** 2)
    assert found[3] < found[2] < found[1] < found[0]
    assert found[1] < 0.99 * found[0]


@pytest.mark.parametrize("seed", [27, 97, 123])
def test_rows_that_no_code_fits_are_not_coded_worse_again(seed):
    """What is left of them in the metric is nearly nothing, and codes may point away from it."""
    problem = Problem(SMALL, CALIBRATED, 2, (normal(20, 3, seed=seed),), input_moments=torch.ones(3, 3))
    found = [solve(replace(problem, passes=passes)).notes["error"] for passes in range(4)]
    assert all(after < 1.01 * before for before, after in itertools.pairwise(found))  # scales are rounded


def test_effort_says_how_often_columns_are_coded_again(monkeypatch):
    rule = Rule(Trellis(state_bits=8), CALIBRATED, ratio=16.0)

    def lost(passes):
        monkeypatch.setitem(EFFORTS, "fast", replace(EFFORTS["fast"], passes=passes))
        recipe = Recipe("some", (rule,), modules=("linears",), effort="fast")
        model = make_model("bert", "BertModel")
        result = compress(model, recipe, tokenizer=make_tokenizer("bert"), calibration=TEXTS, progress=False)
        return sum(group.calibrated_error for group in result.report.groups)

    assert lost(2) < lost(1) < lost(0)


def test_a_column_that_is_coded_again_is_the_best_there_is_beside_the_others():
    """All of its paths that later columns allow are tried, one by one."""
    rows, columns, metric = normal(6, 3)[None], 3, moments(3)[None]
    code, weights = Code(normal(16, 1), 1), torch.rand(1, 6, generator=torch.Generator().manual_seed(3)) + 0.1
    streams = Streams(weights, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    states, _ = columns_.code_columns(rows.clone(), None, streams, code)
    held, coupling = Held.of(states, code, columns), NextTurn.of(metric, 1)
    left = coupling.targets(held.values, rows)
    start = replace(streams, last=torch.zeros(1, dtype=torch.long))
    again, errors = columns_.code_columns(left, coupling.block(0, columns), start, code, held)

    def cost(of_column, column):
        values = held.values[0].clone()
        values[:, :column] -= errors[0, :, :column]
        values[:, column] = code.table[of_column, 0]
        left = values - rows[0]
        return float(((left @ metric[0] * left).sum(dim=1) * weights[0]).sum())

    state = 0
    for column in range(columns):
        best, end = float("inf"), int(states[0, column, -1]) % 8 if column < columns - 1 else None
        for codes in itertools.product(range(2), repeat=6):
            path, at = [], state
            for newest in codes:
                path.append(at := (at * 2 + newest) % 16)
            if end is None or at % 8 == end:
                best = min(best, cost(torch.tensor(path), column))
        state = int(again[0, column, -1])
        assert cost(again[0, column].long(), column) == pytest.approx(best, rel=1e-4)


def test_rows_that_matter_more_are_nearer():
    weight = normal(64, 64)
    importance = torch.ones(64)
    importance[::2] = 100.0
    even = Problem(SMALL, L2, 3, (weight,))
    uneven = Problem(SMALL, Objective(l2=1.0, calibrated=True), 3, (weight,), row_weights=importance)
    before, after = ((weight - decoded(p, solve(p))).square().sum(dim=1) for p in (even, uneven))
    assert float(after[::2].sum()) < 0.9 * float(before[::2].sum())


def test_outliers_are_kept_as_they_are():
    weight, metric = normal(40, 50) * 0.1, torch.eye(50)
    places = ((3, 7), (3, 8), (17, 0), (39, 49))
    for row, column in places:
        weight[row, column] = 5.0 + row
    problem = Problem(Trellis(state_bits=8, outliers=4 / 2000), L2, 4, (weight,), input_moments=metric)
    result = decoded(problem, solve(problem))
    for row, column in places:
        assert result[row, column] == pytest.approx(float(weight[row, column]), abs=0.5)
    without = Problem(SMALL, L2, 4, (weight,), input_moments=metric)
    assert float((weight - result).norm()) < 0.3 * float((weight - decoded(without, solve(without))).norm())


def test_outliers_are_where_inputs_are_large():
    weight = normal(32, 32)
    weight[5, 5], weight[6, 6] = 6.0, 7.0
    metric = torch.eye(32)
    metric[5, 5] = 1000.0
    problem = Problem(Trellis(state_bits=8, outliers=1 / 1024), CALIBRATED, 4, (weight,), input_moments=metric)
    factors = solve(problem).members[0]
    assert unpack(factors["outlier_rows"], 5, 1).item() == unpack(factors["outlier_columns"], 5, 1).item() == 5


@pytest.mark.parametrize("shape", [(1, 7), (2, 384), (70, 3), (65, 33)])
@pytest.mark.parametrize("size", [1, 4, 6, 8])
def test_odd_shapes_have_the_bytes_planned(shape, size):
    structure = Trellis(state_bits=8, run=64, outliers=0.01)
    problem = Problem(structure, L2, size, (normal(*shape),))
    factors = solve(problem).members[0]
    planned = structure.member_tensors(size, GroupShape(1, *shape))
    assert {name: tuple(t.shape) for name, t in factors.items()} == {name: t.shape for name, t in planned.items()}
    assert error(problem, solve(problem)) < float(problem.weights[0].square().sum())


@pytest.mark.parametrize("special", ["zeros", "a zero row", "a huge row", "constant"])
def test_matrices_without_a_normal_distribution(special):
    weight = normal(16, 24)
    if special == "zeros":
        weight.zero_()
    elif special == "a zero row":
        weight[3] = 0
    elif special == "a huge row":
        weight[3] *= 1e4
    else:
        weight.fill_(0.5)
    problem = Problem(SMALL, L2, 6, (weight,))
    result = decoded(problem, solve(problem))
    assert torch.isfinite(result).all()
    assert float((weight - result).norm()) <= 0.3 * float(weight.norm()) + 1e-6


@pytest.mark.parametrize("passes", [0, 2])
def test_batched_is_one_by_one(passes):
    shares = []
    problems = [
        Problem(
            Trellis(state_bits=8),
            CALIBRATED,
            3,
            (normal(30, BLOCK + 12, seed=i),),
            input_moments=moments(BLOCK + 12, seed),
            passes=passes,
            progress=shares.append,
        )
        for i, seed in enumerate((1, 5))
    ]
    together = solve_all(problems)
    assert shares == sorted(shares) and shares[-1] == 1
    for problem, found in zip(problems, together, strict=True):
        torch.testing.assert_close(decoded(problem, solve(problem)), decoded(problem, found), atol=1e-4, rtol=0.02)


@pytest.mark.parametrize("width,bits", sorted(set(RATES.values())))
def test_what_follows_a_state_covers_the_normal_distribution(width, bits):
    """Whatever the older bits: so the values are normal all together, and none of the choices is crowded."""
    table = trellis_table(12, width, bits)
    spread = float(table.square().mean().sqrt())
    assert table.shape == (4096, width) and 0.9 < spread < 1.45
    assert table.mean(dim=0).abs().max() < 0.02 and (table.std(dim=0) / spread - 1).abs().max() < 0.03
    choices = table.view(-1, 2**bits, width)
    if bits > 3:
        assert (choices.square().mean(dim=(1, 2)).sqrt() / spread - 1).abs().max() < 0.3
    assert len(torch.unique(table, dim=0)) == len(table)


MIXTURE = Mixture(((7, 1), (5, 2), (1, 1)))


def uneven(rows=200, columns=40, seed=3, **options):
    """Rows of falling importance, in an order of their own."""
    importance = torch.logspace(3, -3, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]
    return Problem(
        Trellis(outliers=0.0),
        CALIBRATED,
        MIXTURE,
        (normal(rows, columns, seed=seed),),
        input_moments=moments(columns),
        row_weights=importance,
        **options,
    )


def test_rows_that_matter_more_have_more_bits():
    problem = uneven()
    left = (problem.weights[0] - decoded(problem, solve(problem))).square().mean(dim=1)
    ranked = left[problem.row_weights.argsort(descending=True)]
    assert ranked[:50].mean() < 0.4 * ranked[50:150].mean()
    assert ranked[150:].mean() > 3 * ranked[50:150].mean()


def test_a_mixture_has_the_bytes_planned_and_comes_back_as_it_was():
    problem = uneven()
    factors, planned = solve(problem).members[0], problem.structure.member_tensors(MIXTURE, problem.shape)
    assert {name: tuple(t.shape) for name, t in factors.items()} == {name: t.shape for name, t in planned.items()}
    assert problem.structure.shown(MIXTURE, problem.shape) == pytest.approx(
        (50 * 3.5 + 100 * 2.5 + 50 * 0.5) / 200, abs=0.01
    )
    weight, metric = decoded(problem, solve(problem)), problem.input_moments.double()
    left = (problem.weights[0] - weight).double()
    reached, whole = (
        float((((x @ metric) * x).sum(dim=1) * problem.row_weights).sum()) for x in (left, problem.weights[0].double())
    )
    assert (reached / whole) ** 0.5 == pytest.approx(solve(problem).notes["error"], rel=0.03)


def test_of_embeddings_mixtures_are_known_and_the_best_leaves_less_than_one_rate_does():
    problem = replace(uneven(rows=1600), embedding=True)
    (known,), structure, shape = expected_errors(problem), problem.structure, problem.shape
    assert all(isinstance(size, int) for size in expected_errors(replace(problem, embedding=False))[0])
    storage, metric, lost = Storage("float16"), problem.input_moments.double(), {}
    budget = structure.stored_bytes(4, shape, storage)
    best = min((s for s in known if s and structure.stored_bytes(s, shape, storage) <= budget), key=known.get)
    assert isinstance(best, Mixture)
    for size in (4, best):
        chosen = replace(problem, size=size)
        left = (problem.weights[0] - decoded(chosen, solve(chosen))).double()
        lost[size] = float((((left @ metric) * left).sum(dim=1) * problem.row_weights).sum())
    assert 0.7 < lost[best] / known[best] < 1.5
    assert lost[best] < 0.6 * lost[4]


def test_matrices_of_different_rates_are_coded_together_as_they_are_alone():
    problems = [
        uneven(seed=1),
        replace(uneven(seed=2), size=3),
        replace(uneven(seed=3), size=Mixture(((9, 3), (2, 1)))),
    ]
    for problem, together in zip(problems, solve_all(problems), strict=True):
        torch.testing.assert_close(decoded(problem, solve(problem)), decoded(problem, together), atol=1e-4, rtol=0.02)


@pytest.mark.parametrize("energies", [torch.ones(300), torch.zeros(300), torch.logspace(0, -30, 300), torch.ones(5)])
def test_mixtures_are_few_and_fall_from_class_to_class(energies):
    found = mixtures(energies, 64)
    assert len(found) <= 150 and all(error >= 0 for error in found.values())
    for mixture in found:
        steps = [step for step, _ in mixture.classes]
        assert steps == sorted(steps, reverse=True) and steps[-1] >= 1 and steps[0] <= max(RATES)
        assert sum(streams for _, streams in mixture.classes) == -(-len(energies) // 64)
        assert len(mixture.classes) > 1


@pytest.mark.parametrize("size", [3, 0.03, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_stored_to_two_percent_and_alike_in_every_dtype(size, dtype):
    scales = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) * size + 1e-3 * size
    rounded, codes, bounds = _rounded_scales(scales)
    assert ((rounded / scales) - 1).abs().max() < 0.03
    for i in range(2):
        assert rounded[i].equal(decode_scales(codes[i], bounds[i].to(dtype)))


def test_scales_that_are_all_alike():
    rounded, _, _ = _rounded_scales(torch.full((1, 7), 0.3))
    assert ((rounded / 0.3) - 1).abs().max() < 0.001


@pytest.mark.parametrize(
    "options", [{"state_bits": 7}, {"state_bits": 15}, {"run": 0}, {"outliers": -0.1}, {"outliers": 0.3}]
)
def test_options_that_are_none(options):
    with pytest.raises(CompressionError, match=next(iter(options))):
        Trellis(**options)
