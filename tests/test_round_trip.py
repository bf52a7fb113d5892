"""What is saved is what a stranger loads: every family, head and structure, in fresh processes, with and without us.

One process a mode loads all folders, since starting one costs seconds.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import HEADS, QUICK, TEXTS, make_model, make_tokenizer, nonlinear, outputs_of
from inputs import TEXT
from processes import run_python
from safetensors import safe_open

from hf_offline_compress import Grouping, Objective, Recipe, Rule, compress, inspect_folder, make_plan
from hf_offline_compress.architectures.families import FAMILIES, KINDS, is_language_model
from hf_offline_compress.request.budget import Budget
from hf_offline_compress.structures import (
    Autoencoder,
    Codebook,
    Kronecker,
    LowRank,
    Mixture,
    Quantized,
    Sparse,
    Training,
    Trellis,
    Tucker,
)
from hf_offline_compress.structures.trellis import RATES

CALIBRATED = Objective(l2=1.0, calibrated=True)
SENSITIVE = Objective(l2=1.0, calibrated=True, sensitive=True)
COSINE = Objective(cosine=0.9, l2=0.1)
FEW = Autoencoder(training=Training(epochs=3))
ALL = ("linears", "word_embeddings", "position_embeddings")
RECIPES = {
    "budget": Recipe(
        "budget",
        (Rule(Trellis(state_bits=8, outliers=0.01), SENSITIVE),),
        modules=("all",),
        allocation="by_gain",
        budget=Budget(total_ratio=4),
    ),
    "alternatives": Recipe(
        "alternatives",
        (Rule(Trellis(state_bits=8, outliers=0.01), SENSITIVE, alternatives=(Quantized(8, clip=True), LowRank())),),
        modules=("all",),
        allocation="by_gain",
        budget=Budget(total_ratio=2.5),
    ),
    "storages": Recipe(
        "storages",
        (Rule(LowRank(), SENSITIVE, alternatives=(Quantized(8),), storages=("int8", "int4")),),
        modules=("all",),
        allocation="by_gain",
        budget=Budget(total_ratio=4),
    ),
    "low_rank": Recipe("low_rank", (Rule(LowRank(), CALIBRATED, ratio=2.0),), modules=(".+",)),
    "low_rank_shared": Recipe(
        "low_rank_shared", (Rule(LowRank(), CALIBRATED, Grouping(None), ratio=2.5, storage="float16"),), modules=ALL
    ),
    "allocated": Recipe(
        "allocated",
        (Rule(LowRank(identity_block=True), SENSITIVE, ratio=2.0),),
        modules=("linears", "word_embeddings"),
        allocation="by_gain",
    ),
    "autoencoder": Recipe("autoencoder", (Rule(nonlinear(), COSINE, ratio=1.2),), modules=ALL),
    "autoencoder_shared": Recipe(
        "autoencoder_shared", (Rule(nonlinear(), COSINE, Grouping(2), ratio=1.2),), modules=ALL
    ),
    "residual": Recipe("residual", (Rule(FEW, COSINE, Grouping(None), ratio=1.5),), modules=ALL),
    "residual_calibrated": Recipe(
        "residual_calibrated", (Rule(FEW, CALIBRATED, ratio=1.5, storage="float16"),), modules=ALL
    ),
    "kronecker": Recipe("kronecker", (Rule(Kronecker(polish=2), COSINE, Grouping(None), ratio=2.0),), modules=ALL),
    "tucker": Recipe(
        "tucker",
        (Rule(Tucker(polish=2), Objective(l2=1.0), Grouping(None), ratio=2.0, storage="bfloat16"),),
        modules=ALL,
    ),
    "sparse": Recipe("sparse", (Rule(Sparse(), CALIBRATED, ratio=2.0),), modules=(".+",)),
    "codebook": Recipe(
        "codebook", (Rule(Codebook(rounds=1), CALIBRATED, Grouping(None), ratio=6.0, storage="float16"),), modules=ALL
    ),
    "quantized": Recipe("quantized", (Rule(Quantized(group_size=8), ratio=2.0, storage="float16"),), modules=(".+",)),
    "gptq": Recipe("gptq", (Rule(Quantized(8, clip=True), CALIBRATED, ratio=4.0, storage="float16"),), modules=ALL),
    "low_rank_int8": Recipe("low_rank_int8", (Rule(LowRank(), CALIBRATED, ratio=6.0, storage="int8"),), modules=ALL),
    "low_rank_shared_int4": Recipe(
        "low_rank_shared_int4", (Rule(LowRank(), CALIBRATED, Grouping(None), ratio=8.0, storage="int4"),), modules=ALL
    ),
    "identity_int3": Recipe(
        "identity_int3", (Rule(LowRank(identity_block=True), CALIBRATED, ratio=8.0, storage="int3"),), modules=ALL
    ),
    "autoencoder_int8": Recipe(
        "autoencoder_int8", (Rule(nonlinear(), COSINE, Grouping(2), ratio=4.0, storage="int8"),), modules=ALL
    ),
    "residual_int8": Recipe(
        "residual_int8", (Rule(FEW, COSINE, Grouping(None), ratio=4.0, storage="int8"),), modules=ALL
    ),
    "kronecker_int4": Recipe(
        "kronecker_int4", (Rule(Kronecker(polish=2), COSINE, Grouping(None), ratio=8.0, storage="int4"),), modules=ALL
    ),
    "tucker_int8": Recipe(
        "tucker_int8",
        (Rule(Tucker(polish=2), Objective(l2=1.0), Grouping(None), ratio=6.0, storage="int8"),),
        modules=ALL,
    ),
    "sparse_int4": Recipe("sparse_int4", (Rule(Sparse(), CALIBRATED, ratio=6.0, storage="int4"),), modules=ALL),
    "codebook_int8": Recipe(
        "codebook_int8", (Rule(Codebook(rounds=1), CALIBRATED, Grouping(None), ratio=8.0, storage="int8"),), modules=ALL
    ),
    "quantized_int8": Recipe(
        "quantized_int8", (Rule(Quantized(8), CALIBRATED, ratio=5.0, storage="int8"),), modules=ALL
    ),
    "trellis_int8": Recipe(
        "trellis_int8",
        (Rule(Trellis(state_bits=8, outliers=0.05), CALIBRATED, ratio=5.0, storage="int8"),),
        modules=ALL,
    ),
    "linear_autoencoder": Recipe(
        "linear_autoencoder",
        (Rule(Autoencoder(decoder="linear", norms=False, training=QUICK), COSINE, ratio=2.0),),
        modules=(*ALL, "attention"),
    ),
}
# Every head with these three in one folder, kinds of matrices taking turns; one head with every recipe by itself; and each
# structure on a linear layer, on a transposed fused one, and on a fused one without bias.
TURNS = ("low_rank", "quantized", "sparse")
EVERY_RECIPE = "BertForMaskedLM"
THOROUGH = (EVERY_RECIPE, "GPT2LMHeadModel", "ModernBertForMaskedLM")
EACH_STRUCTURE = (
    *("alternatives", "low_rank_shared_int4", "autoencoder_shared", "residual_calibrated", "kronecker", "tucker"),
    *("sparse_int4", "codebook_int8", "gptq", "trellis_int8", "linear_autoencoder"),
)
# A budget is met by gain in each family once.
ALLOCATED = dict(HEADS).values()  # the last head of each


def recipes_of(head):
    """Return the names of the recipes that a head is saved by."""
    names = RECIPES if head == EVERY_RECIPE else EACH_STRUCTURE if head in THOROUGH else ()
    return dict.fromkeys(("turns", *names, *(("budget",) if head in (*ALLOCATED, *THOROUGH) else ())))


CASES = [(model_type, head, recipe) for model_type, head in HEADS for recipe in recipes_of(head)]
LOADER = Path(__file__).with_name("load_folders.py")


def model_of(model_type, head, recipe):
    """Return a model; where no groups are shared by layers, one of a single layer."""
    return make_model(model_type, head, layers=1 if recipe == "turns" and head not in THOROUGH else 3)


def turns(head):
    """Return a recipe of three structures: which kinds have which differs from head to head."""
    first = HEADS.index(next(each for each in HEADS if each[1] == head))
    names = [TURNS[(first + i) % 3] for i in range(3)]
    rules = [
        replace(RECIPES[name].rules[0], modules=KINDS[i::3] if i < 2 else ("all", ".+")) for i, name in enumerate(names)
    ]
    return Recipe("turns", tuple(rules), modules=(".+",))


def recipe_of(model_type, head, recipe):
    """Return a recipe, without the position embeddings that a family does not have."""
    found = turns(head) if recipe == "turns" else RECIPES[recipe]
    if "position_embeddings" in FAMILIES[model_type].entry.kinds.values():
        return found
    return replace(found, modules=tuple(name for name in found.modules if name != "position_embeddings"))


def also_remote(head, recipe):
    """Return whether a folder is loaded by its own code too, whose import takes longest: each head and recipe once."""
    return recipe == "turns" or head == EVERY_RECIPE


def name_of(model_type, head, recipe):
    return f"{head}-{recipe}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Compress every case; return its folder and the result."""
    root = tmp_path_factory.mktemp("folders")
    made = {}
    for model_type, head, recipe in CASES:
        model = model_of(model_type, head, recipe)
        config = model.config.to_dict()
        result = compress(
            model,
            recipe_of(model_type, head, recipe),
            tokenizer=make_tokenizer(model_type),
            calibration=TEXTS,
            progress=False,
        )
        name = name_of(model_type, head, recipe)
        folder = root / ("also remote" if also_remote(head, recipe) else "package") / name
        result.save(folder)
        made[name] = (folder, result, config)
    return root, made


@pytest.fixture(scope="module", params=["package", "remote"])
def loaded(request, folders, tmp_path_factory):
    """Load all folders in one fresh process; return what it found."""
    out = tmp_path_factory.mktemp(request.param)
    roots = [str(folders[0] / kind) for kind in ("also remote", "package")][: 1 if request.param == "remote" else 2]
    env = {"HF_MODULES_CACHE": str(out / "modules"), "PYTHONPATH": str(LOADER.parent)}
    run = run_python(LOADER, request.param, out, *roots, fresh=True, **env)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "facts.json").read_text()), torch.load(out / "outputs.pt", weights_only=True)


@pytest.mark.parametrize("model_type,head,recipe", CASES)
def test_a_fresh_process_gives_the_same_outputs(folders, loaded, model_type, head, recipe):
    name = name_of(model_type, head, recipe)
    if name not in loaded[0] and not also_remote(head, recipe):
        return
    result = folders[1][name][1]
    facts, outputs = loaded[0][name], loaded[1][name]
    torch.testing.assert_close(outputs, outputs_of(result.model, head), atol=1e-5, rtol=0)
    assert facts["class"] == f"Compressed{head}"
    assert facts["missing"] == facts["unexpected"] == []
    assert facts["compressed"] == len(result.model.compressed_modules()) > 0
    assert facts["tokens"] == result.tokenizer(TEXT).input_ids


STEPS = {code: step for step, code in RATES.items()}


@pytest.mark.parametrize("model_type,head,recipe", CASES)
def test_predicted_bytes_are_the_bytes_on_disk(folders, model_type, head, recipe):
    folder, result, config = folders[1][name_of(model_type, head, recipe)]
    groups = result.model.config.compression["groups"]
    asked = recipe_of(model_type, head, recipe)
    plan = make_plan(config, asked, architecture=head)
    # Numbers that half precision does not hold are kept in bfloat16.
    wider = {g.name: "bfloat16" for g in plan.groups if groups.get(g.name, {}).get("storage") == "bfloat16"}
    if wider:
        plan = make_plan(config, asked, architecture=head, wider=wider)
    chosen = {group.name: (group.structure, group.storage, group.size) for group in result.report.groups}
    forms = {
        (group.name, form.structure.name, str(form.storage), form.shown_size): form
        for group in (plan.groups if asked.allocation == "by_gain" else ())
        for form in plan.forms(group)
    }
    for group in plan.groups:  # rows of several rates are a size that no plan knows beforehand
        entry = result.model.config.compression["groups"].get(group.name, {})
        if len(entry.get("classes", ())) > 1:
            size = Mixture(tuple((STEPS[kind["width"], kind["bits"]], kind["streams"]) for kind in entry["classes"]))
            form = next(form for form in plan.forms(group) if form.structure.name == "trellis")
            forms[group.name, *chosen[group.name]] = replace(form, size=size)
    if asked.budget:
        allowed = plan.layout.total * 4 / asked.budget.total_ratio
        plan = plan.reformed({g.name: forms.get((g.name, *chosen.get(g.name, ("dense",)))) for g in plan.groups})
        assert len({(group.structure.name, group.size) for group in plan.groups}) > 1
        if recipe == "storages":
            assert len({storage for _, storage, _ in chosen.values()}) > 1
        assert 0.98 * allowed < plan.file_bytes <= allowed
    if recipe == "allocated":
        budget = plan.parameters * 4 / 2.0
        plan = plan.reformed({g.name: forms[g.name, *chosen[g.name]] for g in plan.groups})
        assert 0.9 * budget < plan.stored_bytes <= budget
        assert len({group.size for group in plan.groups if group.columns == 32}) > 1
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    planned = plan.tensors()
    assert {name: (tuple(stored[name].shape), str(stored[name].dtype)) for name in planned} == {
        name: (shape, f"torch.{dtype}") for name, (shape, dtype) in planned.items()
    }
    sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in stored.items()}
    assert sum(sizes[name] for name in planned) == plan.stored_bytes == result.report.totals["compressed_stored_bytes"]
    assert sum(sizes.values()) == plan.total_stored_bytes == result.report.totals["stored_bytes"]
    assert plan.total_stored_bytes < result.report.totals["dense_bytes"]
    assert plan.file_bytes == inspect_folder(folder).weight_bytes
    report = inspect_folder(folder).report
    report["totals"].pop("folder_bytes")
    assert report == json.loads(json.dumps(result.report.to_dict()))


@pytest.mark.parametrize("model_type,head,recipe", [case for case in CASES if is_language_model(case[1])])
def test_heads_stay_tied(folders, model_type, head, recipe):
    folder, result, _ = folders[1][name_of(model_type, head, recipe)]
    model = result.model
    if not model.config.tie_word_embeddings:
        return
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    hidden = torch.randn(2, embedding.embedding_dim)
    bias = 0 if output.bias is None else output.bias
    torch.testing.assert_close(output(hidden), hidden @ embedding.weight.T + bias, atol=1e-4, rtol=1e-4)
    words, width = embedding.num_embeddings, embedding.embedding_dim
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    stored = [name for name, shape in shapes.items() if shape == [words, width] and name.endswith(".weight")]
    stays = not any(group.kind == "word_embeddings" for group in result.report.groups)  # where that gains most
    assert len(stored) == stays


def test_nothing_of_this_machine_is_saved(folders):
    private = [str(folders[0]), str(Path.cwd()), str(Path.home()), *TEXTS[:5]]
    for file in folders[0].rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [text for text in private if len(text) > 3 and text.encode() in content], file.name
            assert file.suffix in (".json", ".md", ".py", ".safetensors", ".txt"), file.name
            if file.suffix == ".json":
                assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", content.decode()), file.name
