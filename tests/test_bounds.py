"""What untrusted files may ask for: every number that is read has a type and a bound, and what has not is one sentence."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from common import make_model, make_tokenizer, nonlinear
from transformers import AutoModelForMaskedLM

from hf_offline_compress import Grouping, Recipe, Rule, compress
from hf_offline_compress.runtime.bounds_compressed import check_sizes
from hf_offline_compress.runtime.layers_compressed import LINEARS
from hf_offline_compress.runtime.specs_compressed import group_specs, weight_spec
from hf_offline_compress.structures import Autoencoder, Codebook, Kronecker, LowRank, Quantized, Sparse, Trellis, Tucker

EVERY = Recipe(
    "every",
    (
        Rule(LowRank(), modules=("query",), storage="int4"),
        Rule(nonlinear(), modules=("key",)),
        Rule(Autoencoder(), modules=("value",), storage="int8"),
        Rule(Kronecker(polish=0), modules=("attention_output",)),
        Rule(Tucker(polish=0), grouping=Grouping(None), modules=("intermediate",)),
        Rule(Sparse(), modules=(r"encoder\.layer\.0\.output\.dense",)),
        Rule(Quantized(group_size=16), modules=(r"encoder\.layer\.1\.output\.dense",), ratio=4),
        Rule(Codebook(), modules=("output",), ratio=4),
        Rule(Trellis(), modules=("word_embeddings",), ratio=6),
    ),
)
# Structure and field of a group → values that no group may have.
HOSTILE = {
    ("trellis", "classes.0.state_bits"): (27, 0, "10", 10.0, None, [10]),
    ("trellis", "classes.0.streams"): (10**9, 0, True),
    ("trellis", "classes"): ([], {}, None, [{}] * 17, [3]),
    ("trellis", "run"): (10**9, 0, "64"),
    ("trellis", "outliers"): (10**12, -1, math.nan),
    ("quantized", "group_size"): (10**10, 0, -1, "64"),
    ("quantized", "bits"): (27, 0, 2.0),
    ("codebook", "width"): (10**8, 0),
    ("codebook", "books"): (10**8, 0),
    ("codebook", "bits"): (31,),
    ("low_rank", "latent"): (10**9, 0, "8", math.inf),
    ("low_rank", "identity_block"): ("no", 1),
    ("low_rank", "integers.sharing"): (0, 10**12, None),
    ("low_rank", "integers.own"): ([], None, {"latents": 0}, {"latents": 64}),
    ("autoencoder", "hidden"): ([10**9], [0], 3, [1] * 17, ["a"]),
    ("autoencoder", "activation"): ("system", None, []),
    ("residual", "hidden"): ([], [2, 2]),
    ("kronecker", "left"): ([10**9, 1], [1], "ab"),
    ("kronecker", "terms"): (10**12,),
    ("tucker", "ranks"): ([10**9, 1, 1], [1, 1]),
    ("tucker", "blocks"): (10**9,),
    ("sparse", "values"): (10**15, 0, 1.5, None),
    ("sparse", "gap_bits"): (99, 0),
    ("sparse", "storage"): ("load", None, "int8"),
    ("sparse", "structure"): ("pickle", None, ["sparse"]),
    ("sparse", "members"): (None, 3, [3], [{}], [{"module": 3}], [{"module": "a", "part": "all"}]),
    ("sparse", "shared"): ("yes", None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = make_model("bert", "BertForMaskedLM"), make_tokenizer("bert")
    result = compress(
        model, EVERY, tokenizer=tokenizer, calibration=None, modules="linears,word_embeddings", progress=False
    )
    return result.save(tmp_path_factory.mktemp("every") / "out")


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


def put(content, path, value):
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        content = content[key]
    content[last] = value


def test_what_the_package_writes_is_within_bounds(config):
    group_specs(config["compression"])
    check_sizes(config)
    found = {group["structure"] for group in config["compression"]["groups"].values()}
    assert found == {structure for structure, _ in HOSTILE}


def with_structure(compression, structure):
    return next(group for group in compression["groups"].values() if group["structure"] == structure)


@pytest.mark.parametrize(("structure", "field"), HOSTILE)
def test_fields_of_groups_have_types_and_bounds(config, structure, field):
    for value in HOSTILE[structure, field]:
        compression = json.loads(json.dumps(config["compression"]))
        put(with_structure(compression, structure), field, value)
        with pytest.raises(ValueError, match="`compression`") as caught:
            group_specs(compression)
        assert len(str(caught.value)) < 400
    compression = json.loads(json.dumps(config["compression"]))
    first = field.partition(".")[0]
    with_structure(compression, structure).pop(first)
    with nullcontext() if first == "integers" else pytest.raises(ValueError, match=first):
        group_specs(compression)


@pytest.mark.parametrize(
    ("structure", "changes"),
    [
        ("low_rank", {"latent": 2**20}),
        ("autoencoder", {"hidden": [2**20]}),
        ("residual", {"latent": 2**20}),
        ("kronecker", {"left": [2**20, 2**20]}),
        ("kronecker", {"terms": 2**20}),
        ("tucker", {"height": 2**20}),
        ("tucker", {"ranks": [1, 2**20, 1]}),
        ("sparse", {"values": 2**30}),
        ("trellis", {"run": 2**20}),
        ("trellis", {"outliers": 2**20}),
    ],
    ids=str,
)
def test_sizes_are_in_proportion_to_the_weight(config, structure, changes):
    group = with_structure(config["compression"], structure)
    with torch.device("meta"), pytest.raises(ValueError, match=r"do not fit a weight of \d+ rows"):
        LINEARS[structure](64, 32, weight_spec({**group, **changes}))


def test_a_group_of_columns_is_no_larger_than_a_row():
    """What is padded to whole groups must not grow with a number in a file."""
    group = {"structure": "quantized", "bits": 4, "group_size": 2**26, "storage": "float32"}
    layer = LINEARS["quantized"](64, 32, weight_spec(group))
    layer.reset_parameters(1.0)
    assert layer.group_size == 32 and layer.dense_weight().shape == (64, 32)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("compression.groups.word_embeddings.classes.0.state_bits", 27),
        ("compression.groups.query_0.integers.own", {"weight_of_mine": 4}),
        ("compression.rest", "load"),
        ("compression.groups", []),
        ("num_hidden_layers", 10**9),
        ("hidden_size", 2**40),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", math.nan),
        ("vocab_size", [100]),
        ("vocab_size", True),
        ("max_position_embeddings", -1),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_loading_refuses_numbers_beyond_bounds(folder, config, tmp_path, path, value):
    content = json.loads(json.dumps(config))
    put(content, path, value)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(content))
    named = "weight_of_mine" if "own" in path else path.rpartition(".")[2]
    with pytest.raises(Exception, match=named):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
