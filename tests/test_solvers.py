"""Solvers on matrices: closed forms are optimal, exact at full size, and never get worse with size."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from common import nonlinear

from hf_offline_compress.measure.statistics import add_gram_
from hf_offline_compress.request.objective import Objective
from hf_offline_compress.runtime.layers_compressed import LINEARS
from hf_offline_compress.runtime.numbers_compressed import unpack_numbers
from hf_offline_compress.runtime.packing_compressed import unpack
from hf_offline_compress.runtime.specs_compressed import weight_spec
from hf_offline_compress.solvers import Problem, codebook, expected_errors, rounded_to_integers, solve, solve_all
from hf_offline_compress.solvers.low_rank import OUTPUT_DAMPING, low_rank_errors
from hf_offline_compress.solvers.polishing import importances, loss_terms
from hf_offline_compress.structures import (
    Autoencoder,
    Codebook,
    GroupShape,
    Kronecker,
    LowRank,
    Quantized,
    Sparse,
    Storage,
    Training,
    Tucker,
)

L2 = Objective(l2=1.0)
COSINE = Objective(cosine=1.0)
SHAPES = [(24, 10), (10, 24), (16, 16)]
QUICK = Training("epochs", epochs=4, final_epochs=2, batch_size=16, learning_rate=3e-3)
FEW = Training(epochs=40)


def matrix(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.diag(0.8 ** torch.arange(min(rows, columns)))
    left = torch.randn(rows, min(rows, columns), generator=generator)
    return left @ spectrum @ torch.randn(min(rows, columns), columns, generator=generator)


def moments(columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) * torch.linspace(0.1, 3, columns)
    return inputs.T @ inputs / len(inputs)


def reconstruct(problem, factors):
    """Return what the runtime layers make of the factors, members stacked."""
    entry = {**problem.structure.runtime(problem.size, problem.shape), "storage": "float32"}
    parts = []
    for weight, own in zip(problem.weights, factors.members, strict=True):
        layer = LINEARS[entry["structure"]](*weight.shape, weight_spec(entry))
        state = own | {f"decoder.{name}": tensor for name, tensor in factors.decoder.items()}
        layer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        parts.append(layer.dense_weight().detach())
    return torch.cat(parts)


def low_rank(weight, size, structure=None, **options):
    problem = Problem(structure or LowRank(), L2, size, (weight,), **options)
    return reconstruct(problem, solve(problem))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_l2_is_the_truncated_svd(shape, rank):
    weight = matrix(*shape)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(low_rank(weight, rank), ((u[:, :rank] * s[:rank]) @ v[:rank]).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
def test_weighted_error_is_the_least_possible(shape, rank, rows, inputs):
    weight = matrix(*shape)
    h = moments(shape[1]) if inputs else None
    d = torch.linspace(0.2, 5, shape[0]) if rows else None
    approximation = low_rank(weight, rank, input_moments=h, row_weights=d)
    root = torch.linalg.cholesky(h.double()) if inputs else torch.eye(shape[1], dtype=torch.float64)
    scale = d.double().sqrt() if rows else torch.ones(shape[0], dtype=torch.float64)

    def error(w):
        return torch.linalg.norm(scale[:, None] * (weight - w).double() @ root)

    least = torch.linalg.svdvals(scale[:, None] * weight.double() @ root)[rank:].norm()
    assert error(approximation) <= least * (1 + 2e-3)  # damping costs a little
    if rows or inputs:
        assert error(approximation) < error(low_rank(weight, rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 6])
def test_output_moments_weigh_the_outputs(shape, rank):
    weight, h, g = matrix(*shape), moments(shape[1]), moments(shape[0], seed=2)
    damped = g.double() + OUTPUT_DAMPING * g.double().diagonal().mean() * torch.eye(shape[0])
    left, right = torch.linalg.cholesky(damped).T, torch.linalg.cholesky(h.double())
    problem = Problem(LowRank(), L2, rank, (weight,), input_moments=h, output_moments=(g,))
    error = torch.linalg.norm(left @ (weight - reconstruct(problem, solve(problem))).double() @ right).square()
    least = torch.linalg.svdvals(left @ weight.double() @ right)[rank:].square().sum()
    assert error <= least * (1 + 4e-3)
    assert float(low_rank_errors(problem)[rank]) == pytest.approx(float(least), rel=4e-3)


def test_output_moments_of_several_members():
    weights, h = tuple(matrix(8, 12, seed) for seed in range(3)), moments(12)
    outputs = tuple(moments(8, seed) for seed in range(3))
    problem = Problem(LowRank(), L2, 5, weights, input_moments=h, output_moments=outputs)
    stacked = Problem(
        LowRank(), L2, 5, (torch.cat(weights),), input_moments=h, output_moments=(torch.block_diag(*outputs),)
    )
    # One mean serves the damping of a whole block-diagonal matrix, three serve three: close, not equal.
    torch.testing.assert_close(low_rank_errors(problem), low_rank_errors(stacked), rtol=0.1, atol=1e-6)
    assert reconstruct(problem, solve(problem)).shape == (24, 12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 10])
@pytest.mark.parametrize("inputs", [False, True])
def test_an_identity_block_changes_the_bytes_and_nothing_else(shape, rank, inputs):
    weight, h = matrix(*shape), moments(shape[1]) if inputs else None
    plain = low_rank(weight, rank, input_moments=h)
    torch.testing.assert_close(
        low_rank(weight, rank, LowRank(identity_block=True), input_moments=h), plain, atol=1e-4, rtol=0
    )
    numbers = [LowRank(identity_block=b).parameters(rank, GroupShape(1, *shape)) for b in (False, True)]
    assert numbers[0] - numbers[1] == rank**2
    assert LowRank(identity_block=True).parameters(min(shape), GroupShape(1, *shape)) == shape[0] * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("singular", [False, True])
def test_exact_at_full_size(shape, singular):
    weight = matrix(*shape)
    h = moments(shape[1])
    if singular:
        h[:, -3:] = 0
        h[-3:] = 0
    size = min(shape)
    for options in ({}, {"input_moments": h}, {"row_weights": torch.rand(shape[0]) + 0.1}):
        torch.testing.assert_close(low_rank(weight, size, **options), weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"input_moments": moments(16)}, {"row_weights": torch.linspace(0.1, 2, 24)}])
def test_never_worse_with_size(options):
    weight = matrix(24, 16)
    h = options.get("input_moments", torch.eye(16))
    d = options.get("row_weights", torch.ones(24))
    errors = []
    for size in range(1, 17):
        difference = weight - low_rank(weight, size, **options)
        errors.append(float((d * ((difference @ h) * difference).sum(dim=1)).sum()))
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(errors))


def test_members_share_one_basis():
    weights = tuple(matrix(8, 12, seed) for seed in range(3))
    problem = Problem(LowRank(), L2, 5, weights)
    factors = solve(problem)
    torch.testing.assert_close(reconstruct(problem, factors), low_rank(torch.cat(weights), 5), atol=1e-5, rtol=0)
    assert [tuple(m["latents"].shape) for m in factors.members] == [(8, 5)] * 3
    assert tuple(factors.decoder["weight"].shape) == (12, 5)


@pytest.mark.parametrize("structure", [LowRank(), LowRank(identity_block=True)])
def test_degenerate_matrices(structure):
    for weight in (torch.zeros(6, 4), torch.ones(6, 4)):
        torch.testing.assert_close(low_rank(weight, 2, structure), weight, atol=1e-6, rtol=0)
        found = low_rank(weight, 2, structure, input_moments=torch.zeros(4, 4))
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("columns", [3, 10, 64])
def test_gram(columns):
    x = torch.randn(50, columns)
    total = torch.ones(columns, columns)
    add_gram_(total, x)
    torch.testing.assert_close(total, x.T @ x + 1, atol=1e-4, rtol=1e-5)


AUTOENCODERS = [
    Autoencoder(decoder="linear", norms=False, training=QUICK),
    Autoencoder(decoder="linear", norms=True, training=QUICK),
    nonlinear(training=QUICK),
    nonlinear(training=QUICK, norms=False, activation="gelu", output_activation="none"),
    Autoencoder(training=FEW),
    Autoencoder(training=FEW, norms=False, activation="tanh"),
    Autoencoder(training=FEW, decoder="linear"),
    Autoencoder(training=FEW, decoder="linear", norms=False),
]


@pytest.mark.parametrize("structure", AUTOENCODERS, ids=lambda s: f"{s.decoder}-{s.norms}-{s.training.method}")
@pytest.mark.parametrize("objective", [L2, COSINE, Objective(cosine=0.2, l1=0.01)], ids=["l2", "cosine", "cosine+l1"])
def test_autoencoder_reaches_the_loss_it_reports(structure, objective):
    weight = matrix(60, 12)
    weight[7] = 0  # as a padding row
    problem = Problem(structure, objective, 4, (weight[:20], weight[20:]))
    factors = solve(problem)
    result = reconstruct(problem, factors)
    used = weight.norm(dim=1) > 0
    assert float(loss_terms(result[used], weight[used], objective, 0.1)) == pytest.approx(
        factors.notes["loss"], rel=1e-3
    )
    if structure.norms and structure.training.method == "epochs":
        torch.testing.assert_close(result.norm(dim=1), weight.norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norms", [False, True])
def test_linear_autoencoder_never_loses_to_its_closed_form(norms):
    weight = matrix(60, 12)
    directed = torch.nn.functional.normalize(weight, dim=1)
    start = directed @ (v := torch.linalg.svd(directed, full_matrices=False).Vh[:4]).T @ v
    problem = Problem(Autoencoder(decoder="linear", norms=norms, training=QUICK), COSINE, 4, (weight,))
    result = reconstruct(problem, solve(problem))
    assert loss_terms(result, weight, COSINE, 1.0) <= loss_terms(start, weight, COSINE, 1.0) + 1e-6


@pytest.mark.parametrize("decoder", ["linear", "residual"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
def test_trained_latents_beat_the_closed_form(decoder, norms, inputs):
    """At equal latent widths, in the loss that was asked for; three problems at once are what they are one by one."""
    weights, h = [matrix(60, 12, seed) + 0.3 * torch.randn(60, 12) for seed in range(3)], moments(12)
    structure = Autoencoder(decoder=decoder, norms=norms, training=FEW)
    objective = Objective(l2=1.0, calibrated=inputs)
    problems = [Problem(structure, objective, 4, (w,), input_moments=h if inputs else None) for w in weights]
    root = torch.linalg.cholesky(h.double()).float() if inputs else torch.eye(12)

    def error(problem, factors):
        return float(((reconstruct(problem, factors) - problem.weights[0]) @ root).norm())

    for problem, together in zip(problems, solve_all(problems), strict=True):
        rank = 4 + (norms and decoder == "linear")
        closed = dataclasses.replace(problem, structure=LowRank(), size=rank)
        assert error(problem, together) <= error(closed, solve(closed)) * (1 + 1e-3)
        if decoder == "residual":
            assert error(problem, together) < 0.9 * error(closed, solve(closed))
        assert error(problem, together) == pytest.approx(error(problem, solve(problem)), rel=1e-2)


def test_a_start_that_training_does_not_beat_is_kept():
    weight = torch.zeros(30, 8)
    weight[:, :3] = torch.randn(30, 3)  # of rank 3: the closed form is exact
    for structure in (Autoencoder(training=FEW), Autoencoder(decoder="linear", norms=False, training=FEW)):
        problem = Problem(structure, L2, 3, (weight,))
        torch.testing.assert_close(reconstruct(problem, solve(problem)), weight, atol=1e-5, rtol=0)


def test_a_judge_decides_what_is_kept():
    weight, asked = matrix(40, 12), []

    def judge(rows):
        assert rows.shape == weight.shape
        asked.append(len(asked))
        return -float(len(asked) == 3)  # the third is the best there ever was

    for structure in (Autoencoder(training=FEW), nonlinear(training=QUICK), Kronecker(polish=30)):
        asked.clear()
        factors = solve(Problem(structure, COSINE, 3, (weight,), judge=judge))
        assert len(asked) > 3 and -1 in factors.notes.values()


def test_training_helps():
    weight = matrix(60, 12)
    short = nonlinear(training=dataclasses.replace(QUICK, epochs=1, final_epochs=0))
    long = nonlinear(training=dataclasses.replace(QUICK, epochs=60))
    losses = [solve(Problem(s, COSINE, 4, (weight,))).notes["loss"] for s in (short, long)]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "structure",
    [LowRank(), *AUTOENCODERS, Kronecker(), Tucker(), Sparse(), Quantized(), Codebook()],
    ids=lambda s: f"{s.name}-{getattr(s, 'decoder', '')}",
)
def test_same_seed_same_bytes(structure):
    weight = matrix(40, 12)
    first, second = (solve(Problem(structure, L2, 3, (weight,), seed=5)) for _ in range(2))
    for a, b in ((first.members[0], second.members[0]), (first.decoder, second.decoder)):
        assert all(a[name].equal(b[name]) for name in a)


def test_solving_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    solve(Problem(AUTOENCODERS[2], L2, 3, (matrix(40, 12),)))
    assert torch.rand(4).equal(expected)


def error(problem):
    return torch.linalg.norm(torch.cat(problem.weights) - reconstruct(problem, solve(problem)))


# 14 and 26 have no divisors near their roots: the products are cropped.
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (14, 26)])
@pytest.mark.parametrize("members", [1, 3])
def test_structures_that_can_be_exact_are(shape, members):
    weights = tuple(matrix(*shape, seed) for seed in range(members))
    for structure in (Kronecker(), Tucker(polish=0), Tucker(polish=20), Sparse()):
        if members > 1 and not structure.shares:
            continue
        problem = Problem(structure, L2, 1, weights, heads=2)
        problem = dataclasses.replace(problem, size=structure.limit(problem.shape))
        assert float(error(problem)) < 1e-4 * float(torch.cat(weights).norm()), structure


@pytest.mark.parametrize("structure", [Kronecker(polish=0), Tucker(polish=0), Sparse(), Quantized(), Quantized(5)])
@pytest.mark.parametrize("shape", [(24, 16), (14, 26)])
def test_closed_forms_never_get_worse_with_size(structure, shape):
    problem = Problem(structure, L2, 1, (matrix(*shape),), heads=2)
    # Where gaps get narrower, more zeros are stored on the way: a few values more need not keep more weights.
    step = problem.shape.parameters // 12 if structure.name == "sparse" else 1
    sizes = range(structure.minimum, structure.limit(problem.shape) + 1, step)
    errors = [float(error(dataclasses.replace(problem, size=size))) for size in sizes]
    assert all(later <= earlier * (1 + 1e-3) + 1e-4 for earlier, later in pairwise(errors))


def test_the_best_sum_of_kronecker_products_is_found():
    left, right = torch.randn(3, 4, 6), torch.randn(3, 6, 4)
    weight = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    assert Kronecker().sides(GroupShape(1, 24, 24)) == ((4, 6), (6, 4))
    assert float(error(Problem(Kronecker(), L2, 3, (weight,)))) < 1e-4 * float(weight.norm())
    s = torch.linalg.svdvals(weight.view(4, 6, 6, 4).transpose(1, 2).reshape(24, 24).double())
    assert float(error(Problem(Kronecker(), L2, 2, (weight,)))) == pytest.approx(float(s[2:].norm()), rel=1e-4)


def random_start(problem, steps=100):
    """Return the L2 error that the same factors reach when they are trained from random numbers."""
    structure, shape = problem.structure, problem.shape
    stored = {**structure.member_tensors(problem.size, shape), **structure.decoder_tensors(problem.size, shape)}
    factors = [(torch.randn(tensor.shape) * 0.3).requires_grad_() for tensor in stored.values()]
    optimizer = torch.optim.Adam(factors, lr=0.02)

    def decoded():
        values = dict(zip(stored, factors, strict=True))
        if structure.name == "kronecker":
            rows = torch.einsum("tac,tbd->abcd", values["left"], values["right"]).flatten(0, 1)
            return rows.flatten(1)[: shape.rows, : shape.columns]
        slices = torch.einsum("br,rst->bst", values["mixing"], values["core"])
        return (values["row_factor"] @ slices).flatten(0, 1)[: shape.rows] @ values["column_factor"].T

    for _ in range(steps):
        optimizer.zero_grad()
        (problem.weights[0] - decoded()).square().sum().backward()
        optimizer.step()
    return torch.linalg.norm(problem.weights[0] - decoded().detach())


@pytest.mark.parametrize("structure", [Kronecker(polish=0), Tucker(polish=0)])
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("shape", [(24, 16), (14, 26)])
def test_starts_beat_training_from_random_numbers(structure, size, shape):
    problem = Problem(structure, L2, size, (matrix(*shape),), heads=2)
    assert error(problem) <= random_start(problem) * (1 + 1e-4)


@pytest.mark.parametrize("structure", [Kronecker, Tucker])
@pytest.mark.parametrize("objective", [L2, COSINE, Objective(cosine=0.9, l2=0.1), Objective(l1=1.0)])
@pytest.mark.parametrize("weighted", ["", "rows", "parameters"])
def test_polishing_never_ends_worse_than_its_start(structure, objective, weighted):
    weights = (matrix(14, 26, 1), matrix(14, 26, 2))
    options = {}
    if weighted == "rows":
        options["row_weights"] = torch.rand(28) + 0.01
    if weighted == "parameters":
        if objective.cosine:
            return
        options["parameter_weights"] = tuple(torch.rand(14, 26) for _ in weights)
    started, polished = (
        Problem(structure(polish=steps), objective, 3, weights, heads=2, **options) for steps in (0, 60)
    )
    rows, single = importances(polished)

    def loss(problem):
        return float(loss_terms(reconstruct(problem, solve(problem)), torch.cat(weights), objective, 0.1, rows, single))

    assert loss(polished) <= loss(started) * (1 + 1e-4)
    assert loss(polished) < loss(started) * 0.999 or objective == L2


@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
@pytest.mark.parametrize("how", ["", "inputs", "rows", "parameters"])
def test_pruning_keeps_what_scores_highest(share, how):
    weight = matrix(40, 30)
    options = {
        "": {},
        "inputs": {"input_moments": moments(30)},
        "rows": {"row_weights": torch.rand(40)},
        "parameters": {"parameter_weights": (torch.rand(40, 30),)},
    }[how]
    problem = Problem(Sparse(), L2, int(share * weight.numel()), (weight,), **options)
    factors = solve(problem)
    kept = int(factors.notes["kept"])
    assert 0.7 * problem.size < kept <= problem.size
    scores = weight.square()
    if how:
        value = next(iter(options.values()))
        scores = (
            scores * {"inputs": lambda: value.diagonal(), "rows": lambda: value[:, None]}.get(how, lambda: value[0])()
        )
    expected = torch.zeros_like(weight).flatten()
    chosen = scores.flatten().topk(kept).indices
    expected[chosen] = weight.flatten()[chosen]
    assert reconstruct(problem, factors).equal(expected.view_as(weight))


def test_zeros_can_be_stored_and_are_not_smaller():
    structure, shape = Sparse(compact=False), GroupShape(1, 40, 30)
    size = structure.fit(shape, 1200, Storage("float32"))
    assert size == 300 and structure.stored_bytes(size, shape, Storage("float32")) == 4800
    result = reconstruct(*(lambda p: (p, solve(p)))(Problem(structure, L2, size, (matrix(40, 30),))))
    assert int((result != 0).sum()) == 300


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [0, 7])
def test_rounding_is_to_the_nearest_of_even_steps(bits, group_size):
    weight = matrix(12, 30)
    weight[3] = 0.5  # a row without range
    result = reconstruct(*(lambda p: (p, solve(p)))(Problem(Quantized(group_size), L2, bits, (weight,))))
    for start in range(0, 30, group_size or 30):
        part, rounded = weight[:, start : start + (group_size or 30)], result[:, start : start + (group_size or 30)]
        step = (part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)) / (2**bits - 1)
        assert ((part - rounded).abs() <= step[:, None] / 2 + 1e-5).all()
        assert all(len(row.unique()) <= 2**bits for row in rounded)


def weighted(problem, result):
    """Return the squared error in the metric of each member's inputs, rows weighted."""
    total, start = 0.0, 0
    found = problem.member_moments or (torch.eye(problem.shape.columns),) * problem.shape.members
    for weight, h in zip(problem.weights, found, strict=True):
        error = (weight - result[start : start + len(weight)]).double()
        rows = ((error @ h.double()) * error).sum(dim=1)
        if problem.row_weights is not None:
            rows = rows * problem.row_weights[start : start + len(weight)]
        total, start = total + float(rows.sum()), start + len(weight)
    return total


@pytest.mark.parametrize("books,width", [(1, 2), (1, 4), (2, 4)])
def test_codebooks_do_what_calibration_asks(books, width):
    weights = tuple(torch.randn(60, 30) for _ in range(2))
    inputs = tuple(moments(30, seed) for seed in (1, 5))
    structure = Codebook(width=width, books=books)
    free = Problem(structure, L2, 5, weights)
    calibrated = dataclasses.replace(free, member_moments=inputs)
    errors = [weighted(calibrated, reconstruct(p, solve(p))) for p in (calibrated, free)]
    assert errors[0] < 0.9 * errors[1]
    assert weighted(free, reconstruct(free, solve(free))) < weighted(free, reconstruct(calibrated, solve(calibrated)))
    zero = weighted(calibrated, torch.zeros(120, 30))
    assert solve(calibrated).notes["error"] == pytest.approx((errors[0] / zero) ** 0.5, rel=0.1)  # damping


def test_codebooks_are_exact_where_there_are_enough_entries():
    entries = torch.randn(16, 4)
    weight = entries[torch.randint(16, (50, 6))].flatten(1)
    problem = Problem(Codebook(rounds=4), L2, 6, (weight,))
    assert weighted(problem, reconstruct(problem, solve(problem))) < 0.02 * float(weight.square().sum())


def test_codebooks_spend_their_entries_on_rows_that_count():
    weight, importance = torch.randn(80, 16), torch.full((80,), 0.01)
    importance[:10] = 1.0
    plain = Problem(Codebook(), L2, 4, (weight,))
    weighed = dataclasses.replace(plain, row_weights=importance)
    errors = [weighted(weighed, reconstruct(p, solve(p))) for p in (weighed, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_more_bits_more_books_less_error():
    weight = torch.randn(100, 24)
    error = {}
    for books, bits in ((1, 2), (1, 4), (1, 6), (2, 4)):
        problem = Problem(Codebook(books=books), L2, bits, (weight,))
        error[books, bits] = weighted(problem, reconstruct(problem, solve(problem)))
    assert error[1, 2] > error[1, 4] > error[1, 6] and error[1, 4] > error[2, 4]


@pytest.mark.parametrize("columns", [24, 2 * codebook.BLOCK], ids=["in a block", "over blocks"])
def test_later_columns_make_good_the_errors_of_earlier_ones(columns):
    """With inputs that hang together, against the same tables with each sub-vector coded for itself."""
    inputs = torch.randn(columns, columns // 6)
    weight, width = torch.randn(1, 50, columns), 4
    problem = Problem(Codebook(), L2, 4, (weight[0],), member_moments=(inputs @ inputs.T + 0.05 * torch.eye(columns),))
    metric = codebook._metric(problem, 0)
    start = 0 if columns <= codebook.BLOCK else codebook.BLOCK
    alone = metric.root.clone()
    if start:
        alone[:, :start, start:] = 0  # blocks hear nothing of each other
    else:
        alone *= torch.block_diag(*[torch.ones(width, width)] * (columns // width))
    tables, importance = torch.randn(1, 16, width), torch.ones(1, 50)
    errors = [
        codebook._error(weight, codebook._decode(codebook._encode(weight, tables, m), tables), importance, metric)
        for m in (metric, dataclasses.replace(metric, root=alone))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("members,shape", [(1, (48, 40)), (2, (30, 52)), (1, (70, 24))])
def test_each_factor_is_rounded_in_the_metric_of_the_other(members, shape, bits):
    weights = tuple(matrix(*shape, seed=i) for i in range(members))
    h = moments(shape[1])
    problem = Problem(LowRank(), dataclasses.replace(L2, calibrated=True), 12, weights, input_moments=h)
    factors, storage = solve(problem), Storage("float32", bits)
    exact = calibrated_error(problem, factors.members, factors.decoder)
    fed_back = unpacked(rounded_to_integers(problem, factors, storage), problem, storage)
    identity = dataclasses.replace(problem, structure=Kronecker())  # a structure that is rounded to the nearest
    nearest = unpacked(rounded_to_integers(identity, factors, storage), problem, storage)
    assert exact <= calibrated_error(problem, *fed_back) * (1 + 1e-6)
    assert calibrated_error(problem, *fed_back) < calibrated_error(problem, *nearest)
    if bits == 8:
        assert calibrated_error(problem, *fed_back) < 1.05 * exact + 1e-4


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("metric", ["none", "rows", "outputs"])
@pytest.mark.parametrize("shape,rank", [((96, 64), 12), ((96, 64), 60), ((64, 130), 20)])
def test_what_integers_leave_of_low_rank_is_expected(shape, rank, metric, bits):
    objective = Objective(l2=1.0, calibrated=True, sensitive=metric != "none")
    h, weight = moments(shape[1]), matrix(*shape)
    row_weights = torch.rand(shape[0]) + 0.1
    outputs = {"none": {}, "rows": {"row_weights": row_weights}, "outputs": {"output_moments": (moments(shape[0], 1),)}}
    problem = Problem(LowRank(), objective, rank, (weight,), input_moments=h, **outputs[metric])
    storage = Storage("float32", bits)
    exact, expected = (errors[rank] for errors in expected_errors(problem, [Storage("float32"), storage]))
    members, decoder = unpacked(rounded_to_integers(problem, solve(problem), storage), problem, storage)
    left = weight - members[0]["latents"] @ decoder["weight"].T
    g = {"none": torch.eye(shape[0]), "rows": row_weights.diag(), "outputs": moments(shape[0], 1)}[metric].double()
    reached = float(((g @ left.double() @ h.double()) * left).sum())
    assert exact < expected
    assert 0.5 < reached / expected < 1.1


@pytest.mark.parametrize("group_size", [0, 16])
def test_what_scales_in_integers_add_is_expected(group_size):
    objective = Objective(l2=1.0, calibrated=True)
    weight = matrix(256, 64)
    weight[7] = 0.0  # as of padding
    problem = Problem(Quantized(group_size), objective, 8, (weight,), input_moments=moments(64))
    storage, factors = Storage("float32", 8), solve(problem)
    exact, expected = (errors[8] for errors in expected_errors(problem, [Storage("float32"), storage]))
    assert exact < expected
    whole = rounded_to_integers(problem, factors, storage).members[0]
    parts = {part: whole[f"scales_{part}"] for part in ("codes", "scales", "zeros")}
    scales = unpack_numbers(**parts, bits=8, sharing=64, shape=tuple(factors.members[0]["scales"].shape))
    width = group_size or 64
    codes, zeros = unpack(factors.members[0]["codes"], 8, 64), unpack(factors.members[0]["zeros"], 9, 64 // width)
    decoded = (codes - zeros.repeat_interleave(width, dim=1) / 2) * scales.repeat_interleave(width, dim=1)
    left = (weight - decoded).double()
    reached = float((left @ problem.input_moments.double() * left).sum())
    assert 0.5 < reached / expected < 1.5


def unpacked(factors, problem, storage):
    """Return members and decoder of low rank as numbers."""
    rows, columns = problem.weights[0].shape
    shapes = {"latents": (rows, problem.size), "weight": (columns, problem.size)}

    def numbers(tensors, name):
        parts = {part: tensors[f"{name}_{part}"] for part in ("codes", "scales", "zeros")}
        return {name: unpack_numbers(**parts, bits=storage.bits, sharing=64, shape=shapes[name])}

    return tuple(numbers(own, "latents") for own in factors.members), numbers(factors.decoder, "weight")


def calibrated_error(problem, members, decoder):
    """Return the relative error in the metric of the inputs."""
    weight = torch.cat(problem.weights).double()
    error = weight - torch.cat([own["latents"] for own in members]).double() @ decoder["weight"].double().T
    h = problem.input_moments.double()
    return float(((error @ h * error).sum() / (weight @ h * weight).sum()).sqrt())
