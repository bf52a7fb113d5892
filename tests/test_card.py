"""A card says what report and evaluations say, no more and no less, and always in the same bytes."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from common import TEXTS, make_model, make_tokenizer, save_base
from processes import run_cli

from hf_offline_compress import CompressionError, Recipe, Rule, compress, load_recipe
from hf_offline_compress.architectures.families import FAMILIES
from hf_offline_compress.artifact.reading import EVALUATION_FILE
from hf_offline_compress.card import (
    free_section,
    inherited_metadata,
    parse_card,
    read_inputs,
    render_card,
    renew_card,
    write_card,
)
from hf_offline_compress.card.citations import citations
from hf_offline_compress.card.command import reproduction
from hf_offline_compress.card.inputs import CardInputs
from hf_offline_compress.card.limits import FACTORED, NOT_RESIZED
from hf_offline_compress.card.metadata import pipeline_tag
from hf_offline_compress.request.reading import preset_names, recipe_from_dict
from hf_offline_compress.request.selectors import split_selectors
from hf_offline_compress.structures import STRUCTURES, Kronecker, LowRank

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
EVALUATION = {
    "format_version": 1,
    "evaluations": [
        {
            "id": "agreement:test.txt",
            "task": {"type": "feature-extraction", "name": "agreement with the base"},
            "data": {"name": "test.txt", "sha256": "ab" * 32, "examples": 1200},
            "settings": {"seed": 0},
            "metrics": [{"name": "cosine", "better": "higher", "base": 1.0, "compressed": 0.98765432}],
            "seconds": {"base": 1.0, "compressed": 1.0},
            "versions": {},
        },
        {
            "id": "masked_perplexity:/home/me/test.txt",
            "task": {"type": "fill-mask", "name": "masked language modelling"},
            "data": {"name": "/home/me/test.txt", "config": None, "split": None, "sha256": "cd" * 32, "examples": 200},
            "settings": {"seed": 0, "share": 0.15, "columns": ["a", "b"], "fine_tuned": False, "limit": None},
            "metrics": [
                {"name": "perplexity", "better": "lower", "base": 85.4132, "compressed": 12345.678},
                {"name": "loss|odd", "better": "lower", "base": 4.4475, "compressed": 4.4321},
            ],
            "seconds": {"base": 3.1, "compressed": 3.2},
            "versions": {},
        },
        {
            "id": "sst2",
            "task": {"type": "text-classification", "name": "SST-2"},
            "data": {
                "name": "nyu-mll/glue",
                "config": "sst2",
                "split": "validation",
                "revision": "f" * 40,
                "examples": 872,
            },
            "settings": {},
            "metrics": [{"name": "accuracy", "better": "higher", "base": 0.9231, "compressed": None}],
            "seconds": {},
            "versions": {},
        },
    ],
    "benchmark": {
        "device": "cpu",
        "memory_kind": "resident memory",
        "unavailable": [{"name": "int4", "reason": "there is none."}],
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "seed": 0,
        "repeats": 9,
        "models": [
            {
                "name": name,
                "disk_bytes": size,
                "load_seconds": seconds,
                "memory_bytes": memory,
                "latency": [
                    {"batch": 1, "length": 128, "median_ms": ms, "low_ms": ms - 0.5, "high_ms": ms + 0.5},
                    {"batch": 8, "length": 128, "median_ms": 8 * ms, "low_ms": 7 * ms, "high_ms": 9 * ms},
                ],
            }
            for name, size, seconds, memory, ms in (
                ("base", 90_868_376, 0.51, 181_000_000, 20.25),
                ("int8 (torch dynamic)", 41_000, 0.62, 60_000_000, 11.75),
                ("compressed", 46_198_348, 0.33, 190_500_000, 23.5),
            )
        ],
    },
}


def saved(folder, base, recipe_, **options):
    result = compress(
        base,
        recipe_,
        tokenizer=make_tokenizer(base.config.model_type),
        progress=False,
        **{"calibration": TEXTS} | options,
    )
    result.save(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with evaluations."""
    base = make_model("bert", "BertForMaskedLM")
    folder = saved(tmp_path_factory.mktemp("made") / "tiny-small", base, "codebook", ratio=5.0)
    (folder / EVALUATION_FILE).write_text(json.dumps(EVALUATION))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(made, tmp_path / made.name)


@pytest.fixture(scope="module")
def inputs(made):
    return read_inputs(made)


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)[1]


def rows(text):
    """Return the tables of a text, as lists of cells without emphasis."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| :---")]
    return [[part.strip().strip("*") for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def shows(text, number):
    """Whether the text is the number, rounded to the digits that it shows."""
    assert re.fullmatch(NUMBER, text), text
    digits = len(text.partition(".")[2])
    return float(text.replace(",", "")) == pytest.approx(number, abs=0.5000001 * 10**-digits)


# What it says


def test_all_numbers_are_those_of_the_report(inputs):
    card, report, totals = render_card(inputs), inputs.report, inputs.report["totals"]
    groups = rows(section(card, "What was compressed"))[1:]
    assert len(groups) == len(report["groups"]) > 12 and "<details><summary>" in section(card, "What was compressed")
    for cells, group in zip(groups, report["groups"], strict=True):
        name, structure, matrices, shape, storage, size, ratio, error, calibrated = cells
        assert name == group["name"] and storage == group["storage"]
        assert structure == f"codebook, {STRUCTURES['codebook'].unit} {group['size']}"
        assert shows(matrices, len(group["members"])) and shows(size, group["stored_bytes"])
        assert [shows(x, group[k]) for x, k in zip(shape.split(" × "), ("rows", "columns"), strict=True)] == [
            True,
            True,
        ]
        assert shows(ratio, group["ratio"]) and shows(error, group["relative_error"])
        assert shows(calibrated, group["calibrated_error"])
    values = [cells[1] for cells in rows(section(card, "Sizes"))[1:]]
    expected = [
        totals["parameters"],
        totals["parameters"] * 4,
        totals["stored_bytes"],
        inputs.weight_bytes,
        inputs.folder_bytes,
        totals["compressed_parameters"],
        totals["compressed_stored_bytes"],
        totals["ratio"],
        totals["total_ratio"],
    ]
    assert all(shows(text, number) for text, number in zip(values, expected, strict=True))
    made_ = section(card, "How it was made")
    record = report["calibration"]
    assert f"{record['tokens']:,} tokens in {record['texts']} texts" in made_ and record["sha256"] in made_
    assert all(f"{stage.replace('_', ' ')} {seconds:.1f} s" in made_ for stage, seconds in report["seconds"].items())
    assert all(f"{name} {number}" in section(card, "Versions") for name, number in report["versions"].items())


def test_the_bytes_are_those_on_disk(made, inputs):
    size = (made / "model.safetensors").stat().st_size
    head = rows(render_card(inputs).partition("## Load it")[0])
    assert head[0] == ["", "bytes of weights", "MB", "perplexity on test.txt ↓"]
    assert head[1][0] == "base, in float32" and shows(head[1][1], inputs.report["totals"]["parameters"] * 4)
    assert head[2][:2] == ["this model", f"{size:,}"] and shows(head[2][2], size / 1e6)
    assert shows(head[1][3], 85.4132) and shows(head[2][3], 12345.678)


def test_all_evaluations_are_shown_beside_the_base(inputs):
    table = rows(section(render_card(inputs), "Results"))
    assert table[1] == ["agreement with the base", "test.txt, 1,200 examples", "cosine ↑", "1.0000", "0.9877"]
    assert table[2][2:] == ["perplexity ↓", "85.41", "12,345.7"] and table[2][1] == "test.txt, 200 examples"
    assert table[3][2:] == ["loss\\|odd ↓", "4.4475", "4.4321"]
    assert table[4] == ["SST-2", "nyu-mll/glue sst2 validation, 872 examples", "accuracy ↑", "0.9231", "–"]
    assert "columns a b, fine_tuned no, limit none" in section(render_card(inputs), "Results")
    assert "memory is resident memory; int4 not measured: there is none." in section(render_card(inputs), "Results")
    speeds = table[6:]
    for cells, model in zip(speeds, EVALUATION["benchmark"]["models"], strict=True):
        assert cells[0] == model["name"]
        assert shows(cells[1], model["disk_bytes"] / 1e6) and shows(cells[2], model["load_seconds"])
        assert shows(cells[3], model["memory_bytes"] / 1e6)
        for text, times in zip(cells[4:], model["latency"], strict=True):
            found = re.findall(NUMBER, text)
            assert all(shows(a, times[b]) for a, b in zip(found, ("median_ms", "low_ms", "high_ms"), strict=True))


def test_the_metadata_have_every_number_in_full(inputs):
    data = parse_card(render_card(inputs)).data
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ("test.txt", "cosine"): 0.98765432,
        ("test.txt", "perplexity"): 12345.678,
        ("test.txt", "loss|odd"): 4.4321,
    }
    assert data.model_name == "tiny-small" and data.library_name == "transformers" and data.pipeline_tag == "fill-mask"
    assert data.tags == ["hf-offline-compress", "compressed", "codebook", "bert"]
    assert data.base_model is data.license is None


@pytest.mark.parametrize("what", ["groups", "totals", "evaluations"])
def test_a_changed_number_changes_the_card(inputs, what):
    """Every number that the card has is read, none is copied from elsewhere."""
    before, changed = render_card(inputs), copy.deepcopy(inputs)
    if what == "groups":
        for group in changed.report["groups"]:
            for key in ("size", "rows", "columns", "stored_bytes", "ratio", "relative_error", "calibrated_error"):
                group[key] = group[key] * 3 + 1
    elif what == "totals":
        for key, number in changed.report["totals"].items():
            changed.report["totals"][key] = number * 3 + 1
    else:
        for evaluation in changed.evaluation["evaluations"]:
            for metric in evaluation["metrics"]:
                metric |= {k: metric[k] * 3 + 1 for k in ("base", "compressed") if metric[k] is not None}
    title = {"groups": "What was compressed", "totals": "Sizes", "evaluations": "Results"}[what]
    old, new = (rows(section(card, title)) for card in (before, render_card(changed)))
    numbers = [
        (a, b) for x, y in zip(old, new, strict=True) for a, b in zip(x, y, strict=True) if re.fullmatch(NUMBER, a)
    ]
    same = [a for a, b in numbers if a == b]
    kept = {  # what does not come from there: one matrix a group, bytes on disk, speeds
        "groups": {"1"},
        "totals": {f"{inputs.weight_bytes:,}", f"{inputs.folder_bytes:,}"},
        "evaluations": {text for cells in rows(section(before, title))[6:] for text in cells},
    }
    assert len(numbers) > 5 and set(same) <= kept[what]


def test_bars_are_as_long_as_numbers(inputs):
    changed = copy.deepcopy(inputs)
    for i, group in enumerate(changed.report["groups"]):
        group |= {"relative_error": 0.5 / (i + 1), "stored_bytes": 1000 * (i + 1)}
    lines = re.search(r"```text\n(.*?)```", render_card(changed), re.DOTALL)[1].splitlines()[1:]
    bars = [re.findall(r"[█▏▎▍▌▋▊▉]+", line) for line in lines]
    lengths = [[sum(1 if c == "█" else ("▏▎▍▌▋▊▉".index(c) + 1) / 8 for c in b) for b in pair] for pair in bars]
    assert max(a for a, _ in lengths) == max(b for _, b in lengths) == 24
    assert all(x[0] >= y[0] and x[1] <= y[1] for x, y in pairwise(lengths))
    assert lengths[1][0] == 12


def test_costs_are_stated(inputs):
    text = section(render_card(inputs), "Limitations")
    assert "Worse than the base: perplexity on test.txt is 12,345.7; the base has 85.41." in text
    assert "on test.txt, cosine 0.9877 (identical outputs: 1.0000)." in text and "loss" not in text
    assert "batch 1, length 128 takes 23.50 ms; the base takes 20.25 ms" in text
    assert "Takes 190.50 MB of memory, the base 181.00 MB of memory" in text and "Loads in" not in text
    assert "int8 (torch dynamic) (0.04 MB)" in text
    assert "dense from then on" in text and "not fine-tuned" in text and "cannot be resized" in text
    assert "It has not been evaluated" in section(
        render_card(CardInputs(inputs.name, inputs.config, inputs.report, files=inputs.files)), "Limitations"
    )


@pytest.mark.parametrize(
    "integers,decoding,said",
    [
        (None, "cached", "it saves memory as well as disk"),
        ({"sharing": 64, "own": {"latents": 8}, "decoder": {"weight": 8}}, "cached", "more memory than disk"),
        (
            {"sharing": 64, "own": {"latents": 8}, "decoder": {"weight": 8}},
            "on_the_fly",
            "it saves memory as well as disk",
        ),
    ],
)
def test_what_factors_cost_in_memory(inputs, integers, decoding, said):
    changed = copy.deepcopy(inputs)
    for group in changed.config["compression"]["groups"].values():
        group |= {"structure": "low_rank"} | ({"integers": integers} if integers else {})
    changed.config["compression"]["decoding"] = decoding
    costs = section(render_card(changed), "Limitations")
    assert said in costs and ("cannot be resized" in costs) == bool(integers)


@pytest.mark.parametrize("module", ["embeddings.word_embeddings", "wte", "embed_tokens", "embeddings.tok_embeddings"])
@pytest.mark.parametrize("structure", ["trellis", "low_rank"])
def test_a_vocabulary_that_cannot_be_resized_is_named_in_every_architecture(inputs, module, structure):
    changed = copy.deepcopy(inputs)
    changed.config["compression"]["groups"] = {
        "word_embeddings": {"structure": structure, "members": [{"module": module}]}
    }
    assert ("cannot be resized" in section(render_card(changed), "Limitations")) == (structure == "trellis")


def test_limits_name_the_structures_as_the_runtime_has_them():
    from hf_offline_compress.runtime.structures_compressed import WEIGHTS
    from hf_offline_compress.runtime.weights_compressed import CompressedWeight, DecodedWeight

    assert set(FACTORED) == {name for name, cls in WEIGHTS.items() if not issubclass(cls, DecodedWeight)}
    assert set(NOT_RESIZED) == {name for name, cls in WEIGHTS.items() if cls.resize is CompressedWeight.resize}


def test_every_head_has_its_task():
    tags = {head: pipeline_tag(head) for family in FAMILIES.values() for head in family.heads}
    assert tags["BertForPreTraining"] == tags["RobertaForMaskedLM"] == "fill-mask"
    assert tags["GPT2LMHeadModel"] == tags["RobertaForCausalLM"] == "text-generation"
    assert tags["BertModel"] == "feature-extraction" and tags["GPT2ForTokenClassification"] == "token-classification"
    none = ("ForMultipleChoice", "ForNextSentencePrediction", "ElectraForPreTraining")
    assert {head for head, tag in tags.items() if tag is None} == {head for head in tags if head.endswith(none)}


@pytest.mark.parametrize("name", preset_names())
def test_methods_are_cited(name):
    asked = load_recipe(name)
    used = {rule.structure.name for rule in asked.rules if rule.structure}
    entries, unknown = citations({"recipe": asked.to_dict(), "groups": [{"structure": s} for s in used]})
    assert entries and not unknown
    assert all(re.match(r"@\w+\{[\w]+,\n", entry) and entry.count("{") == entry.count("}") for entry in entries)
    both = {"2302.04045", "2106.08181"} <= set(re.findall(r"eprint = \{(.*?)\}", "".join(entries)))
    assert both == ("autoencoder" in used)


def test_a_reference_of_ones_own_is_shown_as_it_is(inputs):
    changed = copy.deepcopy(inputs)
    changed.report["recipe"]["references"] = ["Me, My method, 2030"]
    assert "- Me, My method, 2030" in section(render_card(changed), "References")


# How to make and load it


@pytest.mark.parametrize(
    "name,changes",
    [
        ("svd", {}),
        ("codebook", {"ratio": 20.0, "modules": ("linears", "pooler"), "storage": "float16"}),
        ("kronecker", {"grouping": "blocks:2", "ratio": 3.5}),
        ("allocated-svd", {"allocation": "uniform"}),
        ("calibrated-svd", {"modules": (r".*layer\.(0|1)\..{1,9}",)}),
    ],
)
def test_the_command_gives_the_recipe_again(inputs, name, changes):
    wanted = load_recipe(name).override(**changes)
    report = inputs.report | {"recipe": wanted.to_dict()}
    command, text = reproduction(CardInputs("x", inputs.config, report), None)
    assert text is None
    options = dict(re.findall(r"--([\w-]+) (\S+)", command))
    assert options["recipe"] == name and options["seed"] == "0" and options["calibration"] == "TEXTS.txt"
    given = {key: options[key].strip("'") for key in ("modules", "grouping", "storage", "allocation") if key in options}
    if "modules" in given:
        given["modules"] = split_selectors(given["modules"])
    ratio = float(options["ratio"]) if "ratio" in options else None
    assert load_recipe(name).override(ratio=ratio, **given) == wanted
    assert set(given) | ({"ratio"} if ratio else set()) == set(changes)


def test_a_preset_without_text_is_asked_for_so(inputs):
    report = inputs.report | {
        "recipe": load_recipe("allocated-svd").without_calibration().to_dict(),
        "calibration": None,
    }
    command, text = reproduction(CardInputs("x", inputs.config, report), None)
    assert text is None and "--recipe allocated-svd" in command and "--calibration none" in command


def test_any_other_recipe_is_there_as_yaml(inputs):
    own = Recipe("mine", (Rule(Kronecker(), ratio=3.0, modules=("key",)), Rule(LowRank(), ratio=2.0)))
    changed = copy.deepcopy(inputs)
    for content in (
        own.to_dict(),
        {**load_recipe("svd").to_dict(), "modules": ["key"], "rules": own.to_dict()["rules"]},
    ):
        changed.report["recipe"] = content
        card = section(render_card(changed), "How it was made")
        assert "--recipe recipe.yaml" in card
        shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
        assert recipe_from_dict(shown) == recipe_from_dict(content)


def test_the_command_is_the_one_that_was_given(forked, tmp_path):
    """The command of a card, run as it stands, writes the same weights."""
    base = save_base(tmp_path / "tiny", "gpt2", "GPT2LMHeadModel")
    (tmp_path / "my texts.txt").write_text("\n".join(TEXTS))
    compress(
        base, "codebook", ratio=4, storage="float16", calibration=tmp_path / "my texts.txt", seed=3, progress=False
    ).save(tmp_path / "small")
    command, _ = reproduction(read_inputs(tmp_path / "small"), None)
    before = (tmp_path / "small" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "small")
    assert command.startswith("hf-offline-compress compress tiny small ") and str(tmp_path) not in command
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-euc", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == before


def test_what_was_asked_for_is_in_the_command_if_the_report_has_it(inputs):
    report = inputs.report | {"options": {"auto_class": "AutoModel", "dtype": None, "batch_size": 4, "token": "secret"}}
    command, _ = reproduction(CardInputs("x", inputs.config, report), None)
    assert "--auto-class AutoModel" in command and "--batch-size 4" in command
    assert "--dtype" not in command and "secret" not in command


def test_snippets_load_the_model(made, inputs, monkeypatch):
    monkeypatch.chdir(made.parent)
    blocks = re.findall(r"```python\n(.*?)```", section(render_card(inputs), "Load it"), re.DOTALL)
    assert len(blocks) == 2 and "trust_remote_code=True" in blocks[1] and "AutoModelForMaskedLM" in blocks[1]
    assert "import hf_offline_compress" in blocks[0] and "hf_offline_compress" not in blocks[1]
    names = {}
    exec(blocks[0], names)
    assert type(names["model"]).__name__ == "CompressedBertForMaskedLM" and len(names["tokenizer"]) > 10
    assert 'from_pretrained("me/tiny"' in render_card(inputs, model_id="me/tiny")


def test_a_sentence_encoder_is_one_on_the_hub(inputs):
    changed = copy.deepcopy(inputs)
    changed.files["modules.json"] = 10
    card = render_card(changed)
    data = parse_card(card).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert {"sentence-transformers", "transformers"} <= set(data.tags)
    first = re.search(r"```python\n(.*?)```", section(card, "Load it"), re.DOTALL)[1]
    assert 'SentenceTransformer("tiny-small")' in first and "AutoModel" not in first


@pytest.mark.parametrize(
    "rest,asked,said",
    [
        (None, None, "nothing else is changed"),
        ("float32", None, "nothing else is changed"),
        ("float16", None, "everything else is kept in half precision"),
        (None, "bfloat16", "everything else is kept in bfloat16"),
    ],
)
def test_what_is_said_of_the_rest(inputs, rest, asked, said):
    changed = copy.deepcopy(inputs)
    changed.config["compression"]["rest"] = rest
    changed.report["options"] = {"dtype": asked}
    found = {text for text in ("nothing else is", "everything else is") if text in render_card(changed)}
    assert said in render_card(changed) and len(found) == 1


@pytest.mark.parametrize(
    "step,kept",
    [
        ({"measured": 0.5}, False),
        ({"measured": 0.5, "in_order": 0.4, "last_norm": 0.3}, True),
        ({"measured": 0.5, "in_order": 0.4, "last_norm": 0.4}, False),
        ({"measured": 0.4, "in_order": 0.5, "last_norm": 0.45}, False),
        ({"measured": 0.4, "in_order": None, "last_norm": 0.3}, True),
        ({"measured": None, "in_order": None, "last_norm": 0.3}, True),
    ],
)
def test_a_fitted_norm_is_told(inputs, step, kept):
    changed = copy.deepcopy(inputs)
    changed.report["rounds"] = [{"measured": 0.9}, step]
    assert ("the norm before the head was fitted" in render_card(changed)) == kept


def test_the_chart_is_seen_without_unfolding(inputs):
    text = section(render_card(inputs), "What was compressed")
    assert text.index("</details>") < text.index("```text")


def test_a_head_that_no_auto_class_knows(tmp_path):
    folder = saved(tmp_path / "double", make_model("gpt2", "GPT2DoubleHeadsModel"), "svd")
    card = render_card(read_inputs(folder))
    assert "hf_offline_compress.CompressedGPT2DoubleHeadsModel.from_pretrained" in card
    assert 'get_class_from_dynamic_module("modeling_compressed.CompressedGPT2DoubleHeadsModel"' in card


# Licence and base


@pytest.mark.parametrize(
    "name,revision,expected",
    [
        ("tiny", None, None),
        ("tiny", "a" * 40, "tiny"),
        ("google-bert/bert-base-uncased", None, "google-bert/bert-base-uncased"),
        ("google-bert/bert-base-uncased", "a" * 40, "google-bert/bert-base-uncased"),
        ("a model in memory", None, None),
        ("/home/me/model", None, None),
    ],
)
def test_only_an_id_on_the_hub_is_the_base_model(inputs, name, revision, expected):
    changed = copy.deepcopy(inputs)
    changed.report["base"] = {"name": name, "revision": revision}
    card = render_card(changed)
    data = parse_card(card).data.to_dict()
    assert data.get("base_model") == expected
    assert data.get("base_model_relation") == (expected and "quantized")
    assert "/home/me" not in card
    if revision:
        assert f"--revision {revision}" in card


def test_a_licence_is_inherited_and_never_assumed(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert inherited_metadata(base) == {}
    text = write_card(folder, base=base).read_text()
    assert "license" not in parse_card(text).data.to_dict() and "licence of the base is not known" in text
    (base / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- de\ntags: [x]\nwidget: 1\n---\n# The base\n")
    text = write_card(folder, base=base).read_text()
    data = parse_card(text).data.to_dict()
    assert (data["license"], data["language"]) == ("mit", ["en", "de"]) and "widget" not in data
    assert "Its licence is mit" in text and "The base" not in text
    # kept when the card is written again, until the user says otherwise
    assert write_card(folder).read_text() == text
    assert parse_card(write_card(folder, license="apache-2.0").read_text()).data.license == "apache-2.0"
    report = json.loads((folder / "compression_report.json").read_text())
    report["base"]["metadata"] = {"license": "bsd-3-clause"}
    (folder / "compression_report.json").write_text(json.dumps(report))
    (folder / "README.md").unlink()
    assert "Its licence is bsd-3-clause, that of the base." in write_card(folder).read_text()


@pytest.mark.parametrize(
    "readme",
    ["no metadata", "---\nlicense: [a, b]\n---\n", "---\n: : :\n---\n", "---\nlicense: No Such\n---\n", "\xff"],
)
def test_a_card_of_the_base_that_says_nothing_is_passed_over(tmp_path, readme):
    (tmp_path / "README.md").write_text(readme, "latin-1")
    assert inherited_metadata(tmp_path) == {}


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ("license: [mit]", {"license": "mit"}),
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: mit\nlanguage: no", {"license": "mit", "language": ["no"]}),
        ("language: [en, no]", {"language": ["en", "no"]}),
    ],
)
def test_usual_ways_to_write_a_licence_and_a_language_are_understood(tmp_path, metadata, kept):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert inherited_metadata(tmp_path) == kept


@pytest.mark.parametrize(("metadata", "lost"), [("license: No Such", "No Such"), ("language: [en, 7]", "7")])
def test_what_is_not_inherited_is_said(tmp_path, caplog, metadata, lost):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    inherited_metadata(tmp_path)
    assert lost in caplog.text


def test_texts_of_others_stay_texts(inputs):
    """Names and descriptions neither end a block of code nor begin tags, links, images or metadata."""
    evil = '"); import os; ("\n```\n<img src=x> [a](http://x) ![b](c) | `code`\n---\n# Title'
    changed = copy.deepcopy(inputs)
    object.__setattr__(changed, "name", evil)
    changed.report["recipe"] |= {"name": evil, "description": evil}
    changed.report["base"] = {"name": evil, "revision": None}
    changed.report["dense"] = [{"name": evil, "parameters": 3, "reason": evil}]
    changed.report["versions"] = {"torch": evil}
    card = render_card(changed, model_id=evil)
    assert parse_card(card).data.to_dict().get("license") is None
    outside, fence = [], None
    for line in card.split("---", 2)[2].splitlines():
        mark = line.strip().partition("bash")[0].partition("python")[0].partition("yaml")[0]
        if fence is None and set(mark) == {"`"} and len(mark) >= 3:
            fence = mark
        elif line.strip() == fence:
            fence = None
        elif fence is None:
            outside.append(line)
        elif "from_pretrained" in line:
            compile(line, "card", "exec")  # one statement, of one string
            assert "import os" in line and line.count("from_pretrained") == 1
    assert fence is None
    text = "\n".join(outside)
    assert "<img" not in text and "](http://x)" not in text.replace("\\](", "") and "\n# Title" not in text


# What the user wrote


def test_notes_and_metadata_of_the_user_are_kept(folder):
    path = write_card(folder)
    text = path.read_text()
    assert free_section(text) == ""
    notes = "## My notes\n\n{{ 7 * 7 }} {% raw %} | <b> --- \\1\n"
    edited = text.replace("<!-- your notes: end -->", f"{notes}<!-- your notes: end -->")
    edited = edited.replace("tags:\n", "co2_eq_emissions: 3\nlicense: mit\ntags:\n- mine\n").replace(
        "## Sizes", "## Changed"
    )
    path.write_text(edited)
    again = write_card(folder).read_text()
    assert free_section(again) == notes and "## Sizes" in again and "## Changed" not in again
    data = parse_card(again).data.to_dict()
    assert data["license"] == "mit" and data["co2_eq_emissions"] == 3 and data["tags"][-1] == "mine"
    assert write_card(folder).read_text() == again
    (folder / EVALUATION_FILE).unlink()
    assert "model-index" not in parse_card(write_card(folder).read_text()).data.to_dict()


def test_another_readme_is_not_overwritten(folder):
    path = folder / "README.md"
    path.write_text("# Mine\n")
    with pytest.raises(CompressionError, match=r"has a README\.md that this command did not write"):
        write_card(folder)
    assert path.read_text() == "# Mine\n"
    assert "Mine" not in write_card(folder, overwrite=True).read_text()


# Always the same, and nothing else


def test_same_inputs_same_bytes(folder, made, inputs):
    first = write_card(folder).read_bytes()
    assert write_card(folder).read_bytes() == first and render_card(inputs).encode() == first
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(p.name for p in made.iterdir()), "README.md"])
    shuffled = copy.deepcopy(inputs)
    shuffled.files.update({k: shuffled.files.pop(k) for k in reversed(list(shuffled.files))})
    assert render_card(shuffled).encode() == first


def test_nothing_of_this_machine_is_in_it(made, inputs):
    card = render_card(inputs)
    private = [str(made.parent), str(Path.home()), "/home/me", str(ROOT), *TEXTS[:3]]
    assert not [text for text in private if len(text) > 5 and text in card]


@pytest.mark.parametrize(
    "change,options,message",
    [
        ("", {"license": "Apache 2.0"}, "The licence 'Apache 2.0' is not one that the Hub knows"),
        ("", {"language": ["English!"]}, "The language 'English!' is not one"),
        ("", {"base_model": "./tiny"}, r"The base model './tiny' is not a Hub id"),
        ("", {"base_model": "tiny"}, "pass owner/name"),
        ("", {"base": "nowhere"}, "There is no folder 'nowhere' of the base"),
        ("{", {}, "cannot be read"),
        ('{"format_version": 9}', {}, "has format 9"),
        ("no folder", {}, "is not a compressed folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder, tmp_path, change, options, message):
    if change == "no folder":
        folder = tmp_path
    elif change:
        (folder / EVALUATION_FILE).write_text(change)
    with pytest.raises(CompressionError, match=message):
        write_card(folder, **options)
    assert not (folder / "README.md").exists() and not list(folder.glob(".README*"))


def test_without_jinja(folder, monkeypatch):
    monkeypatch.setattr("hf_offline_compress.card.writing.find_spec", lambda name: None)
    with pytest.raises(CompressionError, match="needs Jinja2, which is not installed; the extra 'card' has it"):
        write_card(folder)
    renew_card(folder, folder)
    assert not (folder / "README.md").exists()


def test_the_command(folder):
    shown = run_cli("card", folder, "--stdout", "--license", "mit", "--language", "en,de", "--base-model", "me/tiny")
    assert shown.returncode == 0, shown.stderr
    data = parse_card(shown.stdout).data
    assert (data.license, data.language, data.base_model) == ("mit", ["en", "de"], "me/tiny")
    assert not (folder / "README.md").exists()
    done = run_cli("card", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"] == "README.md" and found["written"] and found["metadata"]["library_name"] == "transformers"
    assert (folder / "README.md").is_file()


# The cards in the repository


def kept_cards():
    spec = importlib.util.spec_from_file_location("model_cards", ROOT / "examples" / "model_cards.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_cards"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("card", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda p: p.parent.name)
def test_committed_cards_are_what_the_code_writes(card):
    assert kept_cards().kept_card(card.parent) == card.read_text("utf-8"), "run `make model-cards`"
    parse_card(card.read_text("utf-8"))


def test_there_are_cards():
    names = {card.parent.name for card in (ROOT / "model_cards").glob("*/README.md")}
    assert len([name for name in names if name.startswith("minilm")]) >= 2 and any("mlm-" in name for name in names)
