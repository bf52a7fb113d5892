"""Recipes: presets, files, overrides, and an error in one sentence for everything that is wrong with one."""

import json

import pytest
import yaml

from hf_offline_compress import CompressionError, Grouping, Objective, Recipe, Rule, load_recipe
from hf_offline_compress.foundation.parsing import parse_bytes
from hf_offline_compress.request.budget import Budget
from hf_offline_compress.request.reading import preset_names, recipe_from_dict
from hf_offline_compress.request.selectors import split_selectors
from hf_offline_compress.structures import Autoencoder, LowRank, Training

EPOCHS = {"method": "epochs", "epochs": 1, "batch_size": 1}
MINIMAL = {"rules": [{"structure": "low_rank"}]}


def rule(**changes):
    return {"rules": [{"structure": "low_rank", **changes}]}


@pytest.mark.parametrize("name", preset_names())
def test_presets(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.references
    # What has a budget for everything compresses everything.
    assert recipe.modules == (("all",) if recipe.budget else ("linears", "word_embeddings"))
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(file) == recipe == load_recipe(str(file))


def test_names_of_the_presets():
    papers = {"svd", "fwsvd", "calibrated-svd", "direction-ae", "ae", "paper-d", "paper-r"}
    assert papers | {"kronecker", "tucker", "pruning", "quantized", "gptq", "allocated-svd"} <= set(preset_names())
    sizes = {"balanced": 4, "small": 8, "tiny": 16, "nano": 24}
    assert {name: load_recipe(name).budget.total_ratio for name in sizes} == sizes


@pytest.mark.parametrize(
    ("text", "count"),
    [("6MB", 6_000_000), ("1.5 gb", 1_500_000_000), ("500 kB", 500_000), ("77", 77), (12, 12), ("2TB", 2 * 10**12)],
)
def test_sizes_in_bytes(text, count):
    assert parse_bytes(text) == count
    assert load_recipe("tiny").override(max_bytes=text).budget == Budget(max_bytes=count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bytes": "6 apples"}, "'6 apples' is unknown"),
        ({"max_bytes": "9" * 400 + "GB"}, "is unknown"),
        ({"max_bytes": 0}, "above 0"),
        ({"total_ratio": 1}, "would not make the model smaller"),
        ({"total_ratio": "four"}, "must be a number"),
        ({"total_ratio": 4, "ratio": 3}, "exclude each other"),
        ({"total_ratio": 4, "max_bytes": 3}, "exclude each other"),
    ],
)
def test_budgets_that_are_none(changes, message):
    with pytest.raises(CompressionError, match=message):
        load_recipe("tiny").override(**changes)


def test_a_ratio_takes_the_place_of_a_budget_and_the_other_way_round():
    assert load_recipe("tiny").override(ratio=8).budget is None
    assert load_recipe("svd").override(total_ratio=8).budget == Budget(total_ratio=8)
    with pytest.raises(CompressionError, match="give one of them"):
        recipe_from_dict({**MINIMAL, "budget": {"total_ratio": 4, "max_bytes": 5}})


def test_what_presets_ask_for():
    assert load_recipe("svd").rules[0].objective == Objective(l2=1)
    assert load_recipe("calibrated-svd").calibrated and not load_recipe("svd").calibrated
    assert load_recipe("fwsvd").rules[0].objective.importance == "fisher" and load_recipe("fwsvd").calibrated


def test_the_papers_settings():
    paper_d, paper_r = load_recipe("paper-d").rules[0], load_recipe("paper-r").rules[0]
    assert paper_d.structure.decoder == "linear" and not paper_d.structure.norms
    assert paper_d.structure.training == Training("epochs", 20, 10, 32, 1e-3, 0.5, 4)
    assert paper_r.structure == Autoencoder(
        "nonlinear", (8, 4), (2, 4), "leaky_relu", "tanh", True, Training("epochs", 20, 10, 16, 1e-3, 0.8, 10)
    )
    assert [str(r.grouping) for r in (paper_d, paper_r)] == ["separated", "concatenated"]
    assert paper_d.objective == Objective(cosine=0.1995, l1=0.0025)
    assert paper_r.objective == load_recipe("ae").rules[0].objective == Objective(cosine=0.9091, l2=0.0909)


def test_overrides():
    recipe = load_recipe("svd").override(modules="query,key", ratio=5, grouping="blocks:2", storage="float16")
    assert recipe.modules == ("query", "key")
    assert (recipe.rules[0].ratio, str(recipe.rules[0].grouping), recipe.rules[0].storage) == (5, "blocks:2", "float16")
    assert load_recipe("svd").override() == load_recipe("svd")
    assert not load_recipe("calibrated-svd").without_calibration().calibrated


def test_a_recipe_made_in_python():
    recipe = Recipe("mine", (Rule(LowRank(), grouping=Grouping(3)), Rule(None, modules=("pooler",))))
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert load_recipe(recipe) is recipe


def test_options_of_a_structure():
    structure = {"name": "autoencoder", "decoder_widths": [3], "activation": "gelu", "training": {"epochs": 7}}
    recipe = recipe_from_dict({"rules": [{"structure": structure, "objective": {"cosine": 1}}]})
    asked = recipe.rules[0].structure
    assert isinstance(asked, Autoencoder) and asked.decoder_widths == (3,) and asked.training.epochs == 7


@pytest.mark.parametrize(
    "text,parts", [("a,b", ("a", "b")), (r"h\.\d{1,2}\..*, wte", (r"h\.\d{1,2}\..*", "wte")), (None, None)]
)
def test_selectors_with_commas(text, parts):
    assert split_selectors(text) == parts


@pytest.mark.parametrize(
    "content,message",
    [
        ([], "not a mapping"),
        ({"rules": []}, "at least one rule"),
        ({**MINIMAL, "colour": 1}, "unknown key 'colour'; known keys are name, rules, modules"),
        (rule(colour=1), "unknown key 'colour'; known keys are structure, objective"),
        ({"rules": [{"ratio": 2}]}, "has no structure"),
        ({"rules": [{"structure": "dense"}]}, "no rule that compresses"),
        ({"rules": [{"structure": "wavelets"}]}, "'wavelets', which is unknown; known are low_rank, autoencoder"),
        ({"rules": [{"structure": {"name": "low_rank", "rank": 3}}]}, "unknown key 'rank'"),
        ({"rules": [{"structure": {"name": "autoencoder", "norms": 1}}]}, "norms: 1, which is not true or false"),
        ({"rules": [{"structure": {"name": "autoencoder", "training": {"method": "epochs"}}}]}, "must be at least 1"),
        (
            {"rules": [{"structure": {"name": "autoencoder", "decoder": "cubic"}}]},
            "'cubic' is unknown; known are linear",
        ),
        ({"rules": [{"structure": {"name": "autoencoder", "activation": "sine"}}]}, "activation 'sine' is unknown"),
        ({"rules": [{"structure": {"name": "autoencoder", "decoder_widths": [0]}}]}, "every width must be above 0"),
        (
            {"rules": [{"structure": {"name": "autoencoder", "training": {**EPOCHS, "learning_rate": 0}}}]},
            "must be above 0",
        ),
        ({"rules": [{"structure": {"name": "autoencoder", "training": {"decay": 0.5}}}]}, "is of the method 'epochs'"),
        (rule(objective="close"), "'close', which is unknown; known are l2, calibrated, sensitive"),
        (rule(objective={"l2": -1}), "none may be negative"),
        (rule(objective={"l2": 0}), "at least one must be above 0"),
        (rule(objective={"cosine": 1}), "'low_rank' cannot be solved for cosine"),
        (
            {
                "rules": [
                    {
                        "structure": {"name": "autoencoder", "decoder": "linear", "training": EPOCHS},
                        "objective": "calibrated",
                    }
                ]
            },
            "cannot be solved for calibrated",
        ),
        ({"rules": [{"structure": "tucker", "objective": "calibrated"}]}, "cannot be solved for calibrated"),
        (
            {
                "rules": [
                    {"structure": "sparse", "objective": {"cosine": 1, "importance": "fisher", "parameter_wise": True}}
                ]
            },
            "cannot be used with a cosine loss",
        ),
        ({"rules": [{"structure": "low_rank", "objective": {"l2": 1, "parameter_wise": True}}]}, "needs an importance"),
        (
            {
                "rules": [
                    {"structure": "low_rank", "objective": {"l2": 1, "importance": "fisher", "parameter_wise": True}}
                ]
            },
            "cannot be solved for parameter_wise",
        ),
        ({"rules": [{"structure": "low_rank", "objective": {"l2": 1, "importance": "luck"}}]}, "'luck' is unknown"),
        ({"rules": [{"structure": "sparse", "grouping": "concatenated"}]}, "nothing to share between matrices"),
        ({"rules": [{"structure": {"name": "autoencoder", "decoder": "nonlinear"}}]}, "needs method: epochs"),
        (
            {
                "rules": [
                    {
                        "structure": {
                            "name": "autoencoder",
                            "training": {"method": "epochs", "epochs": 1, "batch_size": 1},
                        }
                    }
                ]
            },
            "needs method: latents",
        ),
        ({"rules": [{"structure": {"name": "autoencoder", "decoder_widths": [1, 2]}}]}, "one hidden layer"),
        ({"rules": [{"structure": {"name": "quantized", "group_size": -1}}]}, "must be 0"),
        ({**MINIMAL, "allocation": "fair"}, "'fair' is unknown; known are uniform, by_gain"),
        ({"rules": [{"structure": "autoencoder"}], "allocation": "by_gain"}, "needs structures whose errors are known"),
        ({**rule(objective="calibrated"), "allocation": "by_gain"}, "needs the objective 'sensitive'"),
        (rule(objective={"l2": 1, "sensitive": True}), "must also be calibrated"),
        (rule(alternatives=["quantized"]), "allocation must be 'by_gain'"),
        (rule(storages=["int8"]), "allocation must be 'by_gain'"),
        (rule(storages=["int9"]), "'int9' is unknown"),
        (rule(structure="dense", storages=["int8"]), "has no alternatives; name a structure"),
        (rule(structure={"name": "low_rank", "identity_block": True}, storages=["int8"]), "without an identity block"),
        (rule(alternatives="quantized"), "which is not a list of structures"),
        (rule(alternatives=["dense"]), "names dense as an alternative"),
        (rule(structure="dense", alternatives=["quantized"]), "has no alternatives; name a structure"),
        (rule(structure="low_rank", grouping="concatenated", alternatives=["trellis"]), "use separated"),
        (
            {**rule(objective="sensitive", alternatives=["codebook"]), "allocation": "by_gain"},
            "needs structures whose errors are known",
        ),
        (rule(grouping="piles"), "'piles' is unknown; known are separated"),
        (rule(grouping="blocks:0"), "'blocks:0' is unknown"),
        (rule(ratio=1), "must be above 1"),
        (rule(ratio=0.5), "must be above 1"),
        (rule(ratio="big"), "`ratio` must be a number"),
        (rule(ratio=float("nan")), "must be above 1"),
        (rule(storage="int3.5"), "'int3.5' is unknown; known are float32"),
        ({**MINIMAL, "modules": ["heads"]}, "'heads' is unknown; known are word_embeddings"),
        ({**MINIMAL, "modules": [r"h\.(0"]}, "not a valid regular expression"),
        ({**MINIMAL, "modules": []}, "`modules` is empty"),
        ({**MINIMAL, "modules": 3}, "must be a name or a list of names"),
    ],
)
def test_what_is_wrong_with_a_recipe(content, message):
    with pytest.raises(CompressionError, match=message):
        recipe_from_dict(content)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(
        CompressionError, match="no recipe 'tidy'.*presets are ae, allocated-svd, balanced, calibrated-ae, "
    ):
        load_recipe("tidy")
    broken = tmp_path / "broken.yaml"
    broken.write_text("rules: [")
    with pytest.raises(CompressionError, match=r"'broken.yaml' is not valid YAML"):
        load_recipe(broken)
