"""Plans: the sizes of the papers to the unit, groups, and what stays dense with its reason."""

import dataclasses

import pytest
from common import nonlinear

from hf_offline_compress import CompressionError, Objective, Recipe, Rule, load_recipe, make_plan
from hf_offline_compress.architectures.layout import Matrix
from hf_offline_compress.plan.make import shape_of
from hf_offline_compress.structures import Autoencoder, GroupShape, LowRank, Storage

BERT = {"model_type": "bert", "architectures": ["BertModel"]}


@pytest.mark.parametrize(
    "members,autoencoder,svd",
    [
        ((1, 30522), (217, 67, 26), (249, 74, 29)),
        ((1, 768), (45, 14, 5), (128, 38, 15)),
        ((12, 768), (168, 54, 21), (236, 70, 28)),
    ],
    ids=["embeddings", "key", "12 keys"],
)
def test_sizes_of_the_papers(members, autoencoder, svd):
    for ratio, latent, rank in zip((3, 10, 25), autoencoder, svd, strict=True):
        shape = GroupShape(*members, 768)
        budget = int(shape.parameters / ratio)
        assert nonlinear().fit(shape, 4 * budget, Storage("float32")) == latent
        assert LowRank().fit(shape, 4 * budget, Storage("float32")) == rank
        # k = int((nm/CR − m − n·[norm]) / (n + m)), the linear autoencoder's
        for norms in (False, True):
            expected = int((budget - 768 - shape.all_rows * norms) / (shape.all_rows + 768))
            assert Autoencoder(decoder="linear", norms=norms).fit(shape, 4 * budget, Storage("float32")) == expected


def test_a_nonlinear_autoencoder_counts_every_number():
    x, n, m = 45, 768, 768
    assert nonlinear().parameters(x, GroupShape(1, n, m)) == 10 * x * x + (n + 6 + 4 * m) * x + m + n


def plan(recipe="svd", config=BERT, **changes):
    return make_plan(config, load_recipe(recipe).override(**changes))


@pytest.mark.parametrize("recipe", ["svd", "ae", "direction-ae", "kronecker", "tucker", "paper-r"])
@pytest.mark.parametrize("grouping,groups", [("separated", 73), ("concatenated", 7), ("blocks:5", 19)])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_groups_and_bytes(recipe, grouping, groups, storage):
    outcome = plan(recipe, ratio=4, grouping=grouping, storage=storage)
    assert len(outcome.groups) == groups == len({group.name for group in outcome.groups})
    assert all(group.ratio >= 4 for group in outcome.groups)
    itemsize = {"float32": 4, "float16": 2}[storage]
    counted = 0
    for shape, dtype in outcome.tensors().values():
        size = {"int16": 2, "uint8": 1}.get(dtype, itemsize)
        for side in shape:
            size *= side
        counted += size
    assert counted == outcome.stored_bytes
    assert sum(len(group.matrices) for group in outcome.groups) == 73
    assert outcome.parameters + sum(item.parameters for item in outcome.dense) == outcome.layout.total == 109482240


def test_blocks_are_neighbouring_layers():
    groups = plan(grouping="blocks:5", modules="key").groups
    assert [[m.layer for m in g.matrices] for g in groups] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert [g.name for g in groups] == ["key_0_4", "key_5_9", "key_10_11"]


def test_what_stays_dense_and_why():
    rules = (Rule(None, modules=(r"encoder\.layer\.0\..*",)), Rule(LowRank(), ratio=2.0))
    outcome = make_plan(BERT, Recipe("r", rules))
    reasons = {item.name: item.reason for item in outcome.dense}
    assert reasons["encoder.layer.0.attention.self.query"] == "was left out by a rule"
    assert reasons["pooler.dense"] == "was not chosen"
    assert not any(m.layer == 0 for g in outcome.groups for m in g.matrices)


def test_a_matrix_that_would_not_shrink_stays_dense():
    config = {**BERT, "architectures": ["BertForSequenceClassification"]}
    outcome = plan(config=config, modules="linears,head", ratio=3)
    (reason,) = [item.reason for item in outcome.dense if item.name == "classifier"]
    assert "would not shrink" in reason


def test_rules_apply_in_order():
    special = Rule(Autoencoder(), Objective(cosine=1.0), modules=("query",), ratio=8.0)
    outcome = make_plan(BERT, Recipe("r", (special, Rule(LowRank(), ratio=2.0)), modules=("attention",)))
    assert {g.structure.name for g in outcome.groups if g.matrices[0].kind == "query"} == {"autoencoder"}
    assert {g.structure.name for g in outcome.groups if g.matrices[0].kind == "key"} == {"low_rank"}


def test_factors_have_the_models_dtype():
    outcome = plan(config={**BERT, "dtype": "float16"}, ratio=4)
    assert {str(group.storage) for group in outcome.groups} == {"float16"}


@pytest.mark.parametrize(
    "changes,config,message",
    [
        (
            {"ratio": 1e9},
            BERT,
            "Nothing would shrink: embeddings.word_embeddings would not shrink: even the smallest low rank",
        ),
        (
            {"ratio": 2},
            {**BERT, "dtype": "float16"},
            "the model, stored in float16, is at 2 already. Ask for a larger one, e.g. ratio 4",
        ),
        ({"modules": r"h\..*"}, BERT, "matches no weight matrix of this BertModel; it has word_embeddings, "),
        ({"modules": "pooler"}, {**BERT, "architectures": ["BertForMaskedLM"]}, "'pooler' matches no weight matrix"),
        (
            {"ratio": 4, "storage": "float32"},
            {**BERT, "dtype": "float16"},
            "'float32' does not fit a model in float16",
        ),
        ({}, {**BERT, "dtype": "float8"}, "dtype 'float8' is not supported"),
        ({}, {**BERT, "architectures": ["BertForPoetry"]}, "BertForPoetry"),
    ],
)
def test_what_cannot_be_planned(changes, config, message):
    with pytest.raises(CompressionError, match=message):
        plan(config=config, **changes)


def test_the_tied_head_is_counted_once():
    untied = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False}
    tied = {**untied, "tie_word_embeddings": True}
    words = 50257 * 768
    assert plan(config=untied).layout.total - plan(config=tied).layout.total == words
    assert "head_lm_head" in {group.name for group in plan(config=untied, modules="all").groups}
    assert "head_lm_head" not in {group.name for group in plan(config=tied, modules="linears,word_embeddings").groups}


def test_importance_needs_a_head_that_predicts():
    for config in (BERT, {**BERT, "architectures": ["BertForMultipleChoice"]}):
        with pytest.raises(
            CompressionError, match=r"'fisher' needs a language model's head or a task's, and Bert\w+ has none"
        ):
            plan("fwsvd", config)
    assert plan("fwsvd", {**BERT, "architectures": ["BertForMaskedLM"]}).groups


def test_matrices_of_unlike_shapes_cannot_be_compressed_together():
    first = Matrix("a", "key", 0, 4, 8, inputs="a")
    with pytest.raises(CompressionError, match=r"a \[4, 8\] and b \[4, 6\] are not of one shape"):
        shape_of((first, first, Matrix("b", "key", 1, 4, 6, inputs="b")))


@pytest.mark.parametrize(
    "recipe,ratio,size", [("quantized", 3, 8), ("quantized", 10, 3), ("codebook", 14, 8), ("codebook", 30, 4)]
)
def test_discrete_sizes_take_the_nearest_that_is_not_larger(recipe, ratio, size):
    outcome = plan(recipe, ratio=ratio, modules="key")
    assert {group.size for group in outcome.groups} == {size} and outcome.ratio >= ratio
    larger = outcome.reformed({group.name: dataclasses.replace(group, size=size + 1) for group in outcome.groups})
    assert (recipe, size) == ("quantized", 8) or larger.ratio < ratio


def test_what_bits_cannot_reach():
    with pytest.raises(CompressionError, match=r"smallest quantized \(bits 2\) is larger than ratio 25 allows"):
        plan("quantized", ratio=25)
