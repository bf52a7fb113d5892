"""The page in examples/browser, driven in headless Chromium: what it finds is what Python finds."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import torch
from common import WORDS, make_model, make_tokenizer

from hf_offline_compress import Recipe, Rule, compress, export_folder
from hf_offline_compress.structures import Trellis

PAGE = Path(__file__).resolve().parents[1] / "examples/browser"
SERVE = PAGE / "serve.py"


def lines_and_queries():
    """Return 200 lines, and 20 queries that each lack a word of one of them."""
    source = random.Random(0)
    lines = sorted({" ".join(source.choices(WORDS, k=source.randint(6, 14))) for _ in range(220)})[:200]
    queries = [line.rsplit(" ", 1)[0] for line in source.sample(lines, 20)]
    return lines, queries


@contextmanager
def serving(models, *options):
    """Serve the page and a folder of models, and give the address."""
    command = [sys.executable, str(SERVE), str(models), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def chromium():
    """The browser's program. Where something is missing the tests are skipped, and say so; in CI they fail."""
    programs = {name: shutil.which(name) for name in ("node", "chromium")}
    missing = [name for name, place in programs.items() if not place]
    if not (PAGE / "node_modules/playwright-core").is_dir():
        missing.append("examples/browser/node_modules (npm ci --ignore-scripts)")
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"no {', no '.join(missing)}, which .ci/run installs")
    if missing:
        pytest.skip(f"no {', no '.join(missing)}")
    return programs["chromium"]


@pytest.fixture(scope="module")
def drive(chromium):
    def run(address, *steps):
        command = ["node", str(PAGE / "drive.mjs"), chromium, address]
        done = subprocess.run(
            command, input=json.dumps(steps), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.stdout, done.stderr
        result = json.loads(done.stdout)
        assert done.returncode == 0 and not result["console"], result["console"]
        here = urlsplit(address).netloc
        others = [each for each in result["requests"] if urlsplit(each).netloc not in (here, "")]
        assert not others
        return result["answers"]

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a small sentence encoder, compressed and exported; with the compressed model itself."""
    pytest.importorskip("onnxruntime")
    home = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer("bert")
    tokenizer.model_max_length = 128
    base = make_model("bert", "BertModel", layers=1, hidden_size=64, max_position_embeddings=128)
    recipe = Recipe("trellis", (Rule(Trellis(state_bits=8), ratio=5.0),), modules=(".+",))
    result = compress(base, recipe, tokenizer=tokenizer, calibration=None, progress=False)
    result.save(home / "small")
    export_folder(home / "small", home / "models/tiny", format="onnx", weights="both")
    return home / "models", result.model, tokenizer


@torch.no_grad()
def embeddings(model, tokenizer, texts):
    """Return mean-pooled embeddings of unit length [texts, hidden]."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    states = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))


@pytest.fixture(scope="module", params=[True, False], ids=["threads", "no-threads"])
def visit(request, drive, models):
    """What a page shows of the model, with and without the headers that allow threads."""
    lines, queries = lines_and_queries()
    steps = {
        "isolated": ("isolated",),
        "hits": ("texts", "#hits .line"),
        "cells": ("texts", "#files td"),
        "rows": ("rows",),
        "compared": ("compare", queries[:2]),
    }
    begin = [("open",), ("fill", "#text", "\n".join(lines)), ("fill", "#query", queries[0])]
    begin += [("click", "#search-form button"), ("idle",)]
    with serving(models[0], *(() if request.param else ("--no-threads",))) as address:
        answers = drive(f"{address}?query=", *begin, *steps.values(), *(("search", query) for query in queries))
    given = answers[len(begin) :]
    return {**dict(zip(steps, given, strict=False)), "threads": request.param, "found": given[len(steps) :]}


def test_the_page_finds_what_python_finds(visit, models):
    """And it asks nobody but its own server, and says nothing on the console."""
    _, model, tokenizer = models
    lines, queries = lines_and_queries()
    expected = embeddings(model, tokenizer, lines)
    assert visit["isolated"] is visit["threads"]
    assert len(visit["rows"]) == len(lines) == 200
    assert (torch.tensor(visit["rows"]) * expected).sum(1).min() >= 0.99
    first = (embeddings(model, tokenizer, queries) @ expected.T).argmax(1).tolist()
    assert [each["hits"][0]["place"] for each in visit["found"]] == first and len(first) == 20
    assert visit["hits"][0] == lines[first[0]]


def test_the_page_shows_what_each_file_costs(visit):
    name, *figures = visit["cells"][:5]
    assert name == "model_quantized.onnx"
    assert all(re.fullmatch(r"[\d.]+ (MB|s|ms)", figure) for figure in figures), figures
    assert [each["file"] for each in visit["compared"]] == ["model_quantized.onnx", "model.onnx"]
    assert all(each["query"] > 0 and each["load"] > 0 and each["memory"] > 0 for each in visit["compared"])
    assert visit["compared"][1]["relative"] == 1
    quantized, dense = (each["agreement"] for each in visit["compared"])
    assert quantized >= 0.99 and dense == pytest.approx(1, abs=1e-5)


def test_both_ways_to_unpack_say_the_same(drive, models):
    """Before the session, which is what the page does unless told otherwise, and by it, in one page and by its address."""
    lines, queries = lines_and_queries()
    search = [("fill", "#text", "\n".join(lines[:20])), ("fill", "#query", queries[0])]
    search += [("click", "#search-form button"), ("idle",)]
    asked = [("rows",), ("compare", queries[:1])]
    with serving(models[0]) as address:
        answers = drive(
            address,
            *(("open", "?query=&threads=1"), *search, *asked),
            *(("click", "#unpack"), ("idle",), *asked),
            *(("open", "?query=&threads=1&unpack=no"), *search, ("rows",)),
        )
    rows = [each for each in answers if isinstance(each, list) and len(each) == 20]
    compared = [each for each in answers if isinstance(each, list) and len(each) == 2]
    assert rows[0] == rows[1] == rows[2]
    # of each file: how many weights were unpacked before
    assert [[each["parts"] > 0 for each in files] for files in compared] == [[True, True], [False, False]]


def write_counter(folder):
    """Write a chat model without weights: its next token is the number of tokens that its cache holds."""
    from onnx import TensorProto, helper, save

    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }} so {% endfor %}"
    shapes = {"past_key_values": ["batch_size", 1, "past", 4], "present": ["batch_size", 1, "total", 4]}
    inputs = {"input_ids": ["batch_size", "new"], "attention_mask": ["batch_size", "total"]}
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in inputs.items()]
    past, present = (
        [helper.make_tensor_value_info(f"{name}.0.{part}", TensorProto.FLOAT, shape) for part in ("key", "value")]
        for name, shape in shapes.items()
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "new", len(tokenizer)])
    constants = [
        helper.make_tensor("rows", TensorProto.FLOAT, [len(tokenizer), 4], [0.0] * 4 * len(tokenizer)),
        helper.make_tensor("depth", TensorProto.INT64, [], [len(tokenizer)]),
        helper.make_tensor("off_on", TensorProto.FLOAT, [2], [0, 1]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("nothing", TensorProto.INT64, [], [0]),
    ]
    nodes = [
        helper.make_node("Gather", ["rows", "input_ids"], ["states"]),
        helper.make_node("Unsqueeze", ["states", "one"], ["heads"]),
        *(
            helper.make_node("Concat", [f"past_key_values.0.{part}", "heads"], [f"present.0.{part}"], axis=2)
            for part in ("key", "value")
        ),
        helper.make_node("Shape", ["present.0.key"], ["total"], start=2, end=3),
        helper.make_node("Mul", ["input_ids", "nothing"], ["zeros"]),
        helper.make_node("Add", ["zeros", "total"], ["next"]),
        helper.make_node("OneHot", ["next", "depth", "off_on"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "counter", [*ids, *past], [logits, *present], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "onnx").mkdir(parents=True)
    save(model, folder / "onnx/model_quantized.onnx")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 4}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 0, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("most", [8, 1])
def test_the_second_tab_answers(drive, tmp_path, most):
    """By a cache that grows from call to call, and with the words as they come."""
    pytest.importorskip("onnx")
    tokenizer = write_counter(tmp_path / "counter")
    question = "the cat sat on the mat"
    begin = len(tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=True)["input_ids"])
    assert begin > len(tokenizer(question)["input_ids"])
    expected = tokenizer.decode(range(begin, begin + most))
    with serving(tmp_path) as address:
        *_, said, bubbles, status, process = drive(
            address,
            ("open",),
            ("click", "#chat-tab"),
            ("say", question, most),
            ("texts", ".bubble"),
            ("texts", "#chat-status"),
            ("process",),
        )
    assert said["text"] == expected and said["tokens"] == most
    assert bubbles == [question, expected] and process > said["memory"] > 0 and said["load"] > 0
    shown = r"MB · loaded in [\d.]+ s · .* 8 tokens, the first after .*, then [\d.]+ tokens a second$"
    if most == 1:  # of which there is no speed
        assert said["rate"] is None
        shown = r"MB · loaded in [\d.]+ s · .* 1 token, the first after [\d.]+ s$"
    else:
        assert said["rate"] > 0
    assert re.search(shown, status[0])


def write_model(folder, config, files=("model_quantized",), **others):
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / f"onnx/{name}.onnx").write_bytes(b"12345")
    for name, content in others.items():
        place = folder / f"{name.replace('__', '/')}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content))


def test_the_server_lists_models(tmp_path):
    pooling = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}}
    options = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write_model(
        tmp_path / "encoder",
        {"architectures": ["BertModel"]},
        files=("model_int8", "model_quantized"),
        modules=pooling,
        config_sentence_transformers=prompts,
        **{"1_Pooling__config": options},
    )
    write_model(
        tmp_path / "talker",
        {"architectures": ["LlamaForCausalLM"]},
        onnx__config={"architectures": ["GPT2LMHeadModel"]},
    )
    write_model(tmp_path / "nothing", {"architectures": ["BertModel"]}, files=())
    (tmp_path / "file.txt").touch()
    done = subprocess.run([sys.executable, SERVE, tmp_path, "--index"], capture_output=True, text=True, check=True)
    encoder, talker = json.loads(done.stdout)
    assert (encoder["task"], encoder["pooling"], encoder["prompts"]) == ("search", "cls", ["query: ", "passage: "])
    assert encoder["files"] == [
        {"file": "model_quantized.onnx", "dtype": "q8", "bytes": 5},
        {"file": "model_int8.onnx", "dtype": "int8", "bytes": 5},
    ]
    assert (talker["name"], talker["task"], talker["config"]) == ("talker", "chat", "onnx/config.json")


@pytest.mark.skipif(
    not (PAGE / "node_modules").is_dir(), reason="no examples/browser/node_modules (npm ci --ignore-scripts)"
)
def test_the_server_gives_away_nothing_else(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    with serving(tmp_path / "models") as address:
        with urlopen(f"{address}models/index.json") as answer:
            assert json.load(answer) == []
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        for path in ("models/../secret.txt", "models/%2e%2e/secret.txt", "models//../secret.txt", "../../README.md"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"{address}{path}")
    with serving(tmp_path / "models", "--no-threads") as address, urlopen(address) as answer:
        assert "Cross-Origin-Embedder-Policy" not in answer.headers


def test_a_folder_that_is_not_there_is_named(tmp_path):
    done = subprocess.run([sys.executable, SERVE, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "none is no folder" in done.stderr and "Traceback" not in done.stderr
