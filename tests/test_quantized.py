"""Rounding to few bits: to the nearest, with clipping, and with error feedback in the metric of the inputs (GPTQ)."""

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from hf_offline_compress import Recipe, Rule, compress
from hf_offline_compress.request.objective import OBJECTIVES
from hf_offline_compress.runtime.layers_compressed import LINEARS
from hf_offline_compress.runtime.specs_compressed import weight_spec
from hf_offline_compress.solvers import Problem, codebook, feedback, solve, solve_all
from hf_offline_compress.solvers import quantized as solver
from hf_offline_compress.structures import Quantized, Storage


def problem(weight, bits, moments=None, *, group_size=16, clip=False):
    """Return a problem of one matrix; calibrated if there are moments of its inputs."""
    objective = OBJECTIVES["l2" if moments is None else "calibrated"]
    members = None if moments is None else (moments,)
    structure = Quantized(group_size, clip)
    return Problem(structure, objective, bits, (weight,), input_moments=moments, member_moments=members)


def dense(asked, factors):
    """Return the weight that factors stand for, by the runtime's own layer."""
    layer = LINEARS["quantized"](
        *asked.weights[0].shape,
        weight_spec({**asked.structure.runtime(asked.size, asked.shape), "storage": "float32"}),
    )
    layer.load_state_dict(factors.members[0], assign=True)
    return layer.dense_weight().detach()


def correlated(columns, seed=0):
    """Return second moments of inputs that hang together."""
    inputs = torch.randn(columns, columns // 4 + 1, generator=torch.Generator().manual_seed(seed))
    return inputs @ inputs.T + 0.05 * torch.eye(columns)


def error(asked, moments, factors=None):
    """Return the squared error in the metric of the inputs."""
    left = asked.weights[0] - dense(asked, factors or solve(asked))
    return float(((left @ moments) * left).sum())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [0, 7])
def test_rounding_is_to_the_nearest_of_even_steps_around_zero(bits, group_size):
    weight = torch.randn(12, 30)
    weight[3], weight[4] = 0.5, 0.0  # rows without range
    asked = problem(weight, bits, group_size=group_size)
    result, width = dense(asked, solve(asked)), group_size or 30
    for start in range(0, 30, width):
        part, rounded = weight[:, start : start + width], result[:, start : start + width]
        step = (part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)) / (2**bits - 1)
        assert ((part - rounded).abs() <= step[:, None] / 2 + 1e-5).all()
        assert all(len(row.unique()) <= 2**bits for row in rounded)
    torch.testing.assert_close(result[3:5], weight[3:5])


@pytest.mark.parametrize("bits,least", [(2, 0.85), (3, 0.95), (4, 0.995)])
def test_values_may_span_less_than_the_group_does(bits, least):
    weight = torch.randn(40, 64)
    plain, clipped = (error(problem(weight, bits, group_size=32, clip=clip), torch.eye(64)) for clip in (False, True))
    assert clipped < least * plain


@pytest.mark.parametrize("bits,share", [(2, 0.6), (3, 0.5), (4, 0.5)])
@pytest.mark.parametrize(
    "columns,group_size", [(48, 16), (50, 16), (300, 0), (300, 64), (256, 7), (33, 64)], ids=lambda value: str(value)
)
def test_calibrated_is_far_below_rounding(bits, share, columns, group_size):
    """Whatever columns are a multiple of."""
    weight, moments = torch.randn(30, columns), correlated(columns)
    for clip in (False, True):
        rounded = error(problem(weight, bits, group_size=group_size, clip=clip), moments)
        assert error(problem(weight, bits, moments, group_size=group_size, clip=clip), moments) < share * rounded


@pytest.mark.parametrize("part", ["one by one", "halves", "groups"])
def test_later_columns_make_good_the_errors_of_earlier_ones(part, monkeypatch):
    """Also those behind the next half, and those of the next group: without either the error is larger."""
    columns = feedback.ONE_BY_ONE * (1 if part == "one by one" else 8)
    group_size = columns // 2 if part == "groups" else columns
    weight, moments = torch.randn(50, columns), correlated(columns)
    asked = problem(weight, 3, moments, group_size=group_size)
    whole = error(asked, moments)

    def cut(moments, damping, device):
        size = {"one by one": 1, "halves": columns // 2, "groups": group_size}[part]
        blocks = torch.block_diag(*[torch.ones(size, size)] * (columns // size))
        return feedback.inverse_roots(moments, damping, device) * blocks

    monkeypatch.setattr(solver, "inverse_roots", cut)
    assert whole < 0.8 * error(asked, moments)


def test_feedback_is_that_of_gptq():
    """Column by column, as the paper has it, with scales fixed when a group is reached."""
    weight, moments, bits, width = torch.randn(9, 37), correlated(37), 3, 12
    left = weight.clone()
    root = feedback.inverse_roots([moments], feedback.DAMPING, "cpu")[0]
    expected = torch.empty_like(left)
    for column in range(37):
        if column % width == 0:
            part = left[:, column : column + width]
            low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
            scale = (high - low) / (2**bits - 1)
            zero = (-2 * low / scale).round() / 2
        codes = (left[:, column] / scale + zero).round().clamp(0, 2**bits - 1)
        expected[:, column] = (codes - zero) * scale
        lost = (left[:, column] - expected[:, column]) / root[column, column]
        left[:, column + 1 :] -= lost[:, None] * root[column, column + 1 :]
    asked = problem(weight, bits, moments, group_size=width)
    torch.testing.assert_close(dense(asked, solve(asked)), expected, atol=1e-4, rtol=1e-4)


def test_eight_bits_are_nearly_exact():
    weight, moments = torch.randn(20, 50), correlated(50)
    for asked in (problem(weight, 8), problem(weight, 8, moments), problem(weight, 8, moments, clip=True)):
        assert float((dense(asked, solve(asked)) - weight).norm()) < 0.01 * float(weight.norm())


@pytest.mark.parametrize("clip", [False, True])
def test_a_batch_gives_what_each_gives_alone(clip):
    """Some with moments, some without, two with the same ones."""
    shared = correlated(40)
    given = [shared, None, correlated(40, 1), shared]
    asked = [problem(torch.randn(25, 40), 4, moments, clip=clip) for moments in given]
    for one, factors in zip(asked, solve_all(asked), strict=True):
        torch.testing.assert_close(dense(one, factors), dense(one, solve(one)), atol=1e-4, rtol=1e-4)


def test_inputs_that_are_shared_are_factorized_once(monkeypatch):
    calls, original = [], feedback._inverse_root
    monkeypatch.setattr(feedback, "_inverse_root", lambda damped: calls.append(0) or original(damped))
    shared, other = correlated(24), correlated(24, 1)
    solve_all([problem(torch.randn(8, 24), 4, moments) for moments in (shared, other, shared, shared)])
    assert len(calls) == 2
    roots = feedback.inverse_roots([shared, other, shared], 0.02, "cpu")
    for given, root in ((shared, roots[0]), (other, roots[1]), (shared, roots[2])):
        damped = given / given.diagonal().mean() + 0.02 * torch.eye(24)
        torch.testing.assert_close(root.T @ root @ damped, torch.eye(24), atol=1e-4, rtol=0)
        assert root.equal(root.triu())


def test_inputs_that_are_always_zero_do_no_harm():
    moments = correlated(24)
    moments[5], moments[:, 5], moments[20:], moments[:, 20:] = 0, 0, 0, 0
    weight = torch.randn(10, 24)
    for given in (moments, torch.zeros(24, 24)):
        asked = problem(weight, 4, given, clip=True)
        assert float((dense(asked, solve(asked)) - weight).norm()) < float(weight.norm())
    asked = Problem(codebook.Codebook(), OBJECTIVES["calibrated"], 4, (weight,), input_moments=torch.zeros(24, 24))
    assert all(tensor.isfinite().all() for tensor in solve(asked).members[0].values())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size,columns", [(0, 50), (16, 50), (64, 48), (1, 9)])
def test_stored_as_planned(bits, group_size, columns):
    asked = problem(torch.randn(6, columns), bits, correlated(columns), group_size=group_size)
    planned = asked.structure.member_tensors(bits, asked.shape)
    stored = solve(asked).members[0]
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {n: s.shape for n, s in planned.items()}
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.uint8} == {"codes", "zeros"}
    groups = -(-columns // (group_size or columns))
    row = -(-columns * bits // 8) + 2 * groups + -(-groups * (bits + 1) // 8)
    assert asked.structure.stored_bytes(bits, asked.shape, Storage("float16")) == 6 * row


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_codes_fit_scales_that_are_stored_in_fewer_bits(storage):
    weight, moments = torch.randn(30, 64), correlated(64)
    asked = problem(weight, 4, moments, clip=True)
    factors = solve(asked)
    before = error(asked, moments, factors)
    factors.members[0]["scales"] = factors.members[0]["scales"].to(getattr(torch, storage)).float()
    assert error(asked, moments, factors) < 1.15 * before


def test_the_preset_from_text_to_folder(tmp_path):
    """Four bits, less error on real inputs than rounding, bytes as planned, and loaded like any other."""
    model = make_model("bert", "BertForMaskedLM", hidden_size=64, intermediate_size=128)
    made = {}
    rounding = Recipe("rounding", (Rule(Quantized(64), ratio=7.0, storage="float16"),))
    for recipe in ("gptq", rounding):
        made[recipe] = compress(
            model, recipe, tokenizer=make_tokenizer("bert"), calibration=TEXTS, modules="linears", progress=False
        )
    result = made["gptq"]
    assert {group.size for group in result.report.groups} == {4} and result.report.totals["ratio"] >= 7
    calibrated, plain = (sum(group.relative_error for group in made[r].report.groups) for r in ("gptq", rounding))
    assert calibrated > plain  # what is close on inputs is less so without them
    assert all(group.calibrated_error < group.relative_error for group in result.report.groups)
    folder = result.save(tmp_path / "made")
    stored = load_file(folder / "model.safetensors")
    own = [name for name in stored if name.endswith((".codes", ".scales", ".zeros"))]
    assert sum(stored[n].nbytes for n in own) == sum(group.stored_bytes for group in result.report.groups)
    loaded = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits)


def test_clipping_knows_which_columns_count(monkeypatch):
    scale = torch.logspace(-1, 1, 64)[torch.randperm(64)]
    weight, moments = torch.randn(40, 64), correlated(64) * scale * scale[:, None]
    asked = problem(weight, 2, moments, group_size=32, clip=True)
    weighted, original = error(asked, moments), solver._grid
    monkeypatch.setattr(solver, "_grid", lambda part, cost, bits, clip: original(part, None, bits, clip))
    assert weighted < 0.9 * error(asked, moments)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_filled_at_random_weights_are_of_the_scale_asked_for(bits):
    asked = problem(torch.zeros(200, 48), bits)
    entry = {**asked.structure.runtime(bits, asked.shape), "storage": "float32"}
    layer = LINEARS["quantized"](200, 48, weight_spec(entry))
    layer.reset_parameters(0.02)
    assert 0.005 < float(layer.dense_weight().detach().std()) < 0.04
