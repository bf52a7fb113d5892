"""Layers coded again in the order of the data: what they see behind compressed ones, and what they are fitted to."""

import json
from dataclasses import replace
from functools import partial
from math import isfinite

import pytest
import torch
from common import TEXTS, WORDS, content, make_model, make_tokenizer, save_inputs, save_pair
from processes import run_cli, run_python

from hf_offline_compress import Recipe, Rule, compress, make_plan, write_card
from hf_offline_compress.allocate.measured import Round, _in_order
from hf_offline_compress.architectures.stock import layout_of_model
from hf_offline_compress.artifact.reading import FITTED
from hf_offline_compress.artifact.report import GroupReport
from hf_offline_compress.measure.divergence import exchanged
from hf_offline_compress.measure.in_order import Change, Course, Tap, _added_to
from hf_offline_compress.measure.passes import hidden_of, removed
from hf_offline_compress.measure.statistics import Statistics
from hf_offline_compress.measure.texts import Batch
from hf_offline_compress.request.objective import Objective
from hf_offline_compress.solve.in_order import _targets, solve_in_order
from hf_offline_compress.structures import LowRank


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return Batch(ids, mask)


@torch.no_grad()
def inputs_at(model, module, batches, goes_in=True):
    """What goes into a module, or comes out of it, run through the whole model: tokens of all batches."""
    found = []
    module = model.base_model.get_submodule(module)
    if goes_in:
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: found.append(hidden_of(output)))
    for batch in batches:
        model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    return torch.cat(
        [x.reshape(-1, x.shape[-1])[b.attention_mask.bool().flatten()] for x, b in zip(found, batches, strict=True)]
    )


# Normed behind the sum and before it; fused and transposed; gated; and of an order of its own.
CASES = [
    ("bert", "BertForMaskedLM", 2),
    ("gpt2", "GPT2LMHeadModel", 2),
    ("llama", "LlamaForCausalLM", 2),
    ("modernbert", "ModernBertForMaskedLM", 2),
    ("opt", "OPTForCausalLM", 2),
]


@pytest.mark.parametrize("model_type,head,sums", CASES)
def test_what_a_layer_sees_is_what_it_sees_in_the_whole_model(model_type, head, sums):
    model, batches = make_model(model_type, head, layers=2), [batch_of(0), batch_of(1)]
    layout = layout_of_model(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def other(matrix):
        weight = matrix.dense(state, layout.prefix)
        return weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)

    changed = {m.name: (m, other(m)) for m in layout.matrices if m.in_base}
    outside = [pair for pair in changed.values() if pair[0].layer is None]
    course = Course(model, layout.matrices, batches, outside, prefix=layout.prefix)
    assert course.depth == 2
    done = list(outside)
    for index in range(course.depth):
        own = [pair for pair in changed.values() if pair[0].layer == index]
        with course.through(index, [], [matrix for matrix, _ in own]) as (places, put):
            assert [place.inputs for place in places] == list(dict.fromkeys(m.inputs for m, _ in own))
            # Two outputs of a layer are added to what went in.
            assert sum(place.residual is not None for place in places) == sums
            for place in places:
                matrix = next(m for m, _ in own if m.inputs == place.inputs)
                change = course.change(index, place)
                x = inputs_at(model, matrix.module, batches)
                with exchanged(model, layout.prefix, done):
                    y = inputs_at(model, matrix.module, batches)
                torch.testing.assert_close(change.moments, y.T @ y / len(y), rtol=1e-3, atol=1e-4)
                assert (change.outputs is None) == (place.residual is None) != (change.inputs is None)
                if change.outputs is None:
                    torch.testing.assert_close(change.inputs, (x - y).T @ y / len(y), rtol=1e-3, atol=1e-4)
                else:
                    at = f"{matrix.module.removesuffix(place.module)}{place.residual.path}".removesuffix(".")
                    r = inputs_at(model, at, batches, place.residual.goes_in)
                    with exchanged(model, layout.prefix, done):
                        s = inputs_at(model, at, batches, place.residual.goes_in)
                    lost = (x - y) @ matrix.dense(state, layout.prefix).T + r - s
                    torch.testing.assert_close(change.outputs, lost.T @ y / len(y), rtol=1e-3, atol=1e-4)
                more = [pair for pair in own if pair[0].inputs == place.inputs]
                put(more)
                done += more
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_an_output_is_added_to():
    model, batches = make_model("bert", "BertModel", layers=1), [batch_of(0)]
    layout = layout_of_model(model)
    words = next(m for m in layout.matrices if m.kind == "word_embeddings")
    weight = words.dense(model.state_dict(), "") * 0.5
    course = Course(model, layout.matrices, batches, [(words, weight)], prefix="")
    found, inputs = {}, {}
    # BERT's own names of output and what it is added to, in both forms of the model.
    layer, own = "encoder.layer.0", [m for m in layout.matrices if m.layer == 0]
    for name in ("attention.output", "output"):
        module = model.get_submodule(f"{layer}.{name}")

        def note(module, args, output, name=name):
            found.setdefault(name, []).append((module.dense(args[0]), args[1]))

        handle = module.register_forward_hook(note)
        inputs_at(model, f"{layer}.{name}", batches)
        with exchanged(model, "", [(words, weight)]):
            inputs[f"{name}.dense"] = inputs_at(model, f"{layer}.{name}", batches)
        handle.remove()
    with course.through(0, [], own) as (places, _):
        for place in places:
            name = place.module.removesuffix(".dense")
            if name not in found:
                assert place.residual is None
                continue
            kept = batches[0].attention_mask.bool()
            (o, r), (p, s) = (tuple(tensor[kept] for tensor in args) for args in found[name])
            y = inputs[place.module]
            torch.testing.assert_close(
                course.change(0, place).outputs, (o + r - p - s).T @ y / len(y), rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type,head,sums", CASES)
def test_sums_are_found_as_narrow_dtypes_round_them(model_type, head, sums, dtype):
    model = make_model(model_type, head, layers=1).to(dtype)
    layout = layout_of_model(model)
    course = Course(model, layout.matrices, [batch_of()], [], prefix=layout.prefix)
    with course.through(0, [], [m for m in layout.matrices if m.layer == 0]) as (places, _):
        pass
    assert sum(place.residual is not None for place in places) == sums


def test_what_a_small_output_is_added_to_is_no_total():
    total, output = torch.ones(4, 8).bfloat16(), torch.full((4, 8), 1e-3).bfloat16()
    one, other = Tap("a", True), Tap("b", True)
    assert _added_to([(one, total)], output, [(other, total)]) is None
    assert _added_to([(one, total)], output + 1, [(other, total + 1)]) == (one, other)


def test_relative_positions_as_many_as_tokens_are_no_places():
    """DeBERTa's are: portions of 80 tokens and of 100, beside 80 relative positions."""
    model, tokenizer = make_model("deberta-v2", "DebertaV2ForMaskedLM", layers=1), make_tokenizer("deberta-v2")
    texts = [" ".join(WORDS[(i + 5 * j) % len(WORDS)] for j in range(14 + 4 * (i % 2))) for i in range(600)]
    options = {"calibration": texts, "tokenizer": tokenizer, "batch_size": 5, "progress": False}
    found = compress(model, "tiny", total_ratio=4, **options).report
    assert any(step["in_order"] is not None for step in found.rounds)
    assert {group.kind for group in found.groups} >= {"position_query", "position_key"}


def test_models_whose_layers_are_one_are_left_alone():
    model = make_model("albert", "AlbertForMaskedLM")
    layout = layout_of_model(model)
    assert Course(model, layout.matrices, [batch_of()], [], prefix=layout.prefix).depth == 0


def test_forward_passes_of_layers_themselves_stay():
    model, tokenizer = make_model("gpt2", "GPT2LMHeadModel", layers=2), make_tokenizer("gpt2")
    modules = [*model.transformer.h, model.lm_head]
    own = [partial(type(module).forward, module) for module in modules]
    for module, forward in zip(modules, own, strict=True):
        module.forward = forward
    texts = [f"{text} {other}" for text in TEXTS[:20] for other in TEXTS[:20]]
    options = {"calibration": texts, "tokenizer": tokenizer, "progress": False, "total_ratio": 4.5}
    found = compress(model, "tiny", **options).report
    assert [module.forward for module in modules] == own
    assert found.rounds and not any(step["in_order"] for step in found.rounds)


@pytest.fixture
def planned():
    """Return a plan of one group."""
    model = make_model("bert", "BertModel", layers=1)
    recipe = Recipe("x", (Rule(LowRank(), Objective(l2=1.0, calibrated=True)),), modules=("attention_output",))
    return make_plan(model.config.to_dict(), recipe, architecture="BertModel")


@pytest.mark.parametrize("measured,kept", [(0.6, True), (0.7, False), (0.8, False), (float("nan"), False)])
def test_what_is_coded_in_order_is_kept_only_where_less_is_lost(measured, kept, planned):
    class Measured:
        def of(self, replaced):
            assert all(weight.eq(0).all() for _, weight in replaced)
            return measured

    (group,) = planned.groups
    tensors = {name: torch.zeros(shape) for name, (shape, _) in planned.tensors().items()}
    own = (group.name, "attention_output", "low_rank", group.size, (), 1, 1, 1, 1, 1.0, "float32", {})
    old, new = GroupReport(*own, 0.5, 0.4, 2.0, 3.0, {}, 0.2, 0.1), GroupReport(*own, 0.3, 0.2, 1.0, 5.0)
    rounds = [Round(0.9, 1.0), Round(0.9, 0.7), Round(0.9, 0.8)]
    outcome = {"old": torch.ones(1)}, [old], {}
    (found, reports, _), told = _in_order(
        planned, outcome, rounds, Measured(), lambda plan, found: (tensors, {group.name: new})
    )
    assert told == [rounds[0], Round(0.9, 0.7, measured if isfinite(measured) else None), rounds[2]]
    assert found is (tensors if kept else outcome[0])
    if kept:
        assert (reports[0].relative_error, reports[0].forecast, reports[0].measured) == (0.3, 0.2, 0.1)
        assert reports[0].seconds == old.seconds + new.seconds
    else:
        assert reports == [old]


def test_targets_are_half_way_to_the_best_matrix_in_least_squares(planned):
    model = make_model("bert", "BertModel", layers=1)
    (group,) = planned.groups
    generator = torch.Generator().manual_seed(0)
    x, noise, r = (torch.randn(4096, 32, generator=generator) for _ in range(3))
    now = x + 0.3 * noise
    state = model.state_dict()
    matrix = group.matrices[0]
    weight = matrix.dense(state, "")
    lost = ((x - now) @ weight.T + r).T @ now / 4096
    for change, wanted in (
        (Change(now.T @ now / 4096, 16_000, outputs=lost), x @ weight.T + r),
        (Change(now.T @ now / 4096, 16_000, inputs=(x - now).T @ now / 4096), x @ weight.T),
    ):
        found = matrix.dense(_targets([group], state, "", change), "")
        best = torch.linalg.lstsq(now, wanted).solution.T
        share = ((found - weight) * (best - weight)).sum() / (best - weight).square().sum()
        assert 0.43 < share < 0.5  # damped by a tenth
        torch.testing.assert_close(found - weight, share * (best - weight), rtol=0.05, atol=0.01)


def test_parts_of_a_fused_layer_have_their_own_rows_of_its_outputs():
    model = make_model("gpt2", "GPT2Model", layers=1)
    recipe = Recipe("x", (Rule(LowRank(), Objective(l2=1.0, calibrated=True), ratio=2.0),), modules=("key",))
    (group,) = make_plan(model.config.to_dict(), recipe, architecture="GPT2Model").groups
    matrix, state = group.matrices[0], model.state_dict()
    assert matrix.start > 0
    outputs = torch.zeros(3 * matrix.rows, matrix.columns)
    outputs[matrix.start : matrix.start + matrix.rows] = 1.0
    change = Change(torch.eye(matrix.columns), 1_600, outputs=outputs)
    found = matrix.dense(_targets([group], state, "", change), "")
    # Half of 1 in moments of one, and as much again of noise.
    torch.testing.assert_close(found - matrix.dense(state, ""), torch.full_like(found, 0.25))


def test_layers_run_no_further_than_they_are_looked_at():
    """The dense one once, the compressed one to each place, and the dense output beside what it is added to."""
    model = make_model("bert", "BertModel", layers=1)
    layout = layout_of_model(model)
    course = Course(model, layout.matrices, [batch_of()], [], prefix="")
    run = []

    def finished(module, args, output):
        run.append(isinstance(module, torch.nn.Linear))

    found = []
    hooks = [torch.nn.modules.module.register_module_forward_hook(finished)]
    own = [m for m in layout.matrices if m.layer == 0]
    with removed(hooks), course.through(0, [], own) as (places, _):
        for place in places:
            run.clear()
            course.change(0, place)
            found.append(sum(run))
        run.clear()
    assert found == [0, 3 + 1, 4, 5 + 1] and sum(run) == 6  # at the end, the compressed layer once


def test_what_overflows_behind_compressed_layers_is_left_as_it_was(planned):
    class Overflown(Course):
        def change(self, index, place):
            found = super().change(index, place)
            return replace(found, moments=found.moments * torch.nan)

    model = make_model("bert", "BertModel", layers=1)
    layout = layout_of_model(model)
    tensors = {name: torch.zeros(shape) for name, (shape, _) in planned.tensors().items()}

    def course(outside):
        return Overflown(model, layout.matrices, [batch_of()], outside, prefix="")

    found, reports = solve_in_order(planned, tensors, model.state_dict(), Statistics(), course, None, False)
    assert not reports and found == tensors


def test_no_text_is_run_where_nothing_may_be_coded_again():
    recipe = Recipe("x", (Rule(LowRank(), Objective(l2=1.0, calibrated=True)),), modules=("pooler",))
    plan = make_plan(make_model("bert", "BertModel").config.to_dict(), recipe, architecture="BertModel")
    assert solve_in_order(plan, {}, {}, Statistics(), None, None, False) == ({}, {})


@pytest.mark.parametrize("model_type,head", [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel")])
def test_best_codes_in_order_and_never_ends_worse(model_type, head):
    model, tokenizer = make_model(model_type, head, layers=2), make_tokenizer(model_type)
    texts = [f"{text} {other}" for text in TEXTS[:20] for other in TEXTS[:20]]
    options = {"total_ratio": 4.5, "calibration": texts, "tokenizer": tokenizer, "progress": False, "effort": "best"}
    found = compress(model, "tiny", **options)
    (step,) = [step for step in found.report.rounds if step["in_order"] is not None]
    assert step["measured"] == min(other["measured"] for other in found.report.rounds)
    assert found.report.seconds["in_order"] > 0
    assert all(group.forecast > 0 and group.measured >= 0 for group in found.report.groups)
    again = compress(model, "tiny", **options).model.state_dict()
    assert all(tensor.equal(again[name]) for name, tensor in found.model.state_dict().items())


@pytest.mark.parametrize(
    "rounds,noted",
    [
        (None, False),
        ([{"measured": 0.5, "in_order": None}, {"measured": 0.4}], False),
        ([{"measured": 0.5, "in_order": 0.6}], False),
        ([{"measured": 0.5, "in_order": 0.4}], True),
        ([{"measured": None, "in_order": 0.4}], True),
    ],
)
def test_what_errors_are_relative_to_is_said(rounds, noted, tmp_path):
    """By `inspect` and the card, of layers that were coded in order and kept so."""
    _, folder = save_pair(tmp_path)
    report = json.loads((folder / "compression_report.json").read_text())
    (folder / "compression_report.json").write_text(json.dumps(report | {"rounds": rounds}))
    told = " ".join(run_cli("inspect", folder).stdout.split())
    assert "weighted by the calibration inputs" in told
    assert (FITTED in told) == (FITTED in write_card(folder).read_text()) == noted


def test_two_processes_write_the_bytes_of_one(tmp_path):
    base, _, _ = save_inputs(tmp_path, "")
    text = tmp_path / "long.txt"
    text.write_text("\n".join(f"{text} {other}" for text in TEXTS[:15] for other in TEXTS[:20]))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    options = ["--recipe", "tiny", "--effort", "best", "--total-ratio", "4.5", "--calibration", text, "--json"]
    for command in (["-m"], [*launch, "--module"]):
        out = tmp_path / str(len(command))
        run = run_python(
            *command, "hf_offline_compress", "compress", base, out, *options, "--quiet", CUDA_VISIBLE_DEVICES=""
        )
        assert run.returncode == 0, run.stderr[-3000:]
        for told in ("in_order", "last_norm"):
            assert [step for step in json.loads(run.stdout)["rounds"] if step[told] is not None]
    assert content(tmp_path / "1") == content(tmp_path / str(len(launch) + 1))
