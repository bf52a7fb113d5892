"""Files that somebody else has made: their numbers, patterns, links and lines are read within bounds."""

import json
import re
import time
import tracemalloc

import pytest
from common import make_tokenizer, save_base

from hf_offline_compress import CompressionError, Recipe, compress
from hf_offline_compress.artifact.sizes import outside_links
from hf_offline_compress.base.checkpoint import copy_companions, read_config
from hf_offline_compress.foundation.files import belongs_to
from hf_offline_compress.foundation.parsing import check_pattern, read_yaml
from hf_offline_compress.measure.texts import load_texts, make_batches
from hf_offline_compress.metrics.perplexity import _pieces, tokenized_lines
from hf_offline_compress.request.reading import load_recipe

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]", "within itself"),
        ("[" * 20_000, "nested too deep"),
        ("x" * (2**20 + 1), "1 MB"),
        ("a: [", "not valid YAML"),
    ],
    ids=["bomb", "itself", "deep", "long", "broken"],
)
def test_yaml_is_read_within_bounds(tmp_path, text, said):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    tracemalloc.start()
    with pytest.raises(CompressionError, match=said) as error:
        load_recipe(recipe)
    assert "mine.yaml" in str(error.value)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


def test_aliases_of_ordinary_yaml_are_read():
    assert read_yaml("a: &a [1, 2]\nb: *a", "this") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b",
        r"(\w+\.?)*x",
        r"(a|a)*b",
        r"((query|key)\.)+",
        r"(.+)\1",
        r".*.*.*.*.*x",
        "x" * 501,
        "(" * 400 + ")" * 400,
    ],
)
def test_patterns_that_may_take_forever_are_refused(pattern):
    started = time.perf_counter()
    with pytest.raises(CompressionError, match="regular expression"):
        check_pattern(pattern)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "pattern",
    [r".+", r"encoder\.layer\.\d+\..*", r"encoder\.layer\.(0|1[01])\.attention.*(query|key)", r"h\.[0-5]\..*"],
)
def test_ordinary_patterns_are_taken(pattern):
    check_pattern(pattern)
    assert Recipe("x", load_recipe("svd").rules, modules=(pattern,)).modules == (pattern,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", float("nan")),
        ("hidden_size", [64]),
        ("hidden_size", True),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 2**40),
        ("intermediate_size", 0),
        ("max_position_embeddings", -1),
    ],
)
def test_sizes_of_a_base_are_checked_before_anything_is_made(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 30, name: value}))
    with pytest.raises(CompressionError, match=re.escape(f"has `{name}`")):
        read_config(tmp_path)


def test_json_that_is_nested_too_deep(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(CompressionError, match=r"config\.json .* cannot be read"):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """A base whose licence, vocabulary and pooling are links to files outside of it."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    (outside / "pooling").mkdir()
    (outside / "pooling" / "config.json").write_text('{"secret": 1}')
    base = save_base(tmp_path_factory.mktemp("bases") / "base", "bert", "BertModel")
    (base / "LICENSE").symlink_to(outside / "secret")
    (base / "modules.json").write_text('[{"idx": 1, "name": "1", "path": "1_Pooling", "type": "x"}]')
    (base / "1_Pooling").symlink_to(outside / "pooling")
    return base


def test_links_of_a_base_are_not_followed_out_of_it(linked, tmp_path):
    result = compress(linked, "svd", calibration=None, progress=False)
    out = result.save(tmp_path / "out")
    assert not (out / "LICENSE").exists()
    assert not [file for file in out.rglob("*") if file.is_file() and "secret" in file.read_text("latin-1")]
    (out / "1_Pooling").mkdir(exist_ok=True)
    (out / "NOTICE").symlink_to(linked / "LICENSE")
    (out / "2_Dense").symlink_to(linked / "1_Pooling")
    assert outside_links(out) == ["2_Dense", "NOTICE"]


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_text("MIT")
    (snapshot / "LICENSE").symlink_to("../../blobs/1234")
    (snapshot / "NOTICE").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x")
    target = tmp_path / "target"
    target.mkdir()
    assert copy_companions(snapshot, target) == ["LICENSE"]
    assert belongs_to(snapshot, snapshot / "LICENSE") and not belongs_to(snapshot, snapshot / "NOTICE")


def test_one_long_line_takes_little_memory(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("the cat sat on a mat . " * 100_000 + "\n" + "the dog ran home . \n" * 100)
    text, tokenizer = load_texts(file), make_tokenizer("bert")
    given = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            given.extend(map(len, texts))
            return tokenizer(texts, **options)

    batches, record = make_batches(text, Counting(), masked=False, positions=40, seed=0)
    assert record.tokens >= 256 and batches
    assert len(tokenized_lines(text.texts, Counting(), block=40, min_tokens=2)) == 101
    assert max(given) < 10_000
    pieces = list(_pieces(text.texts[0]))
    assert len(pieces) > 5 and "".join(pieces) == text.texts[0]
    assert all(piece.startswith(" ") for piece in pieces[1:])
