"""Retrieval: nDCG is scikit-learn's, a set is read as BEIR writes it, and base and compressed model answer alike."""

import json

import pytest
import torch
from common import save_base
from sklearn.metrics import ndcg_score
from transformers import AutoTokenizer

from hf_offline_compress import CompressionError, compress, evaluate_folder
from hf_offline_compress.artifact.reading import read_evaluation
from hf_offline_compress.evaluate import retrieval
from hf_offline_compress.evaluate.records import Data
from hf_offline_compress.evaluate.retrieval import RetrievalSet, ndcg

TEXTS = ["the cat sat on the mat", "prices of grain fell again", "a train to the coast", "she opened the window"]


def test_ndcg_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 30, generator=generator)
    grades = (torch.rand(6, 30, generator=generator) > 0.6) * torch.randint(1, 4, (6, 30), generator=generator)
    names = [str(i) for i in range(30)]
    relevant = {str(q): {d: float(g) for d, g in zip(names, row, strict=True) if g} for q, row in enumerate(grades)}
    judged = RetrievalSet(dict.fromkeys(names, ""), dict.fromkeys(relevant, ""), relevant, Data("x", 6))
    assert ndcg(scores, judged) == pytest.approx(ndcg_score(grades.numpy(), scores.numpy(), k=10))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("retrieval") / "base", "bert", "BertModel")
    prompts = {"query": "query: ", "passage": "passage: "}
    (base / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    folder = base.parent / "small"
    compress(base, "svd", calibration=None, ratio=2, progress=False).save(folder)
    return base, folder


@pytest.fixture
def beir(tmp_path):
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(TEXTS[:3])]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\nq2\td2\t0\n")
    return tmp_path


def test_base_and_compressed_model_search_the_same_documents(pair, beir):
    base, folder = pair
    (found,) = evaluate_folder(folder, base=base, task="nanobeir", data=beir, progress=False)
    own, mixed = found.metrics
    assert found.data.examples == 2  # the third query has no relevant document
    assert own.name == "ndcg_at_10" and 0 < own.compressed <= 1 and own.base == mixed.base
    assert found.settings["prompts"] == ["query: ", "passage: "]
    assert read_evaluation(folder)["evaluations"][0]["id"] == f"nanobeir:{beir.name}"


def test_a_base_searches_by_its_own_tokens(pair, beir, tmp_path, monkeypatch):
    base, folder = pair
    words = ["the moon and the cat"] * 50 + ["red hills"] * 10
    compress(base, "svd", calibration=None, ratio=2, vocabulary=words, vocabulary_size=64, progress=False).save(
        pruned := tmp_path / "pruned"
    )
    asked = {"base": base, "task": "nanobeir", "data": beir, "write": False, "progress": False}
    (whole,), (found,) = (evaluate_folder(each, **asked) for each in (folder, pruned))
    assert [metric.base for metric in found.metrics] == [metric.base for metric in whole.metrics]
    assert found.metrics[0].compressed != whole.metrics[0].compressed
    asked_with, embed = [], retrieval._embed
    monkeypatch.setattr(retrieval, "_embed", lambda *args: asked_with.append(len(args[1])) or embed(*args))
    evaluate_folder(pruned, **asked)
    assert asked_with == [len(AutoTokenizer.from_pretrained(each)) for each in (base, pruned)]
    assert asked_with[0] > asked_with[1]


def test_lines_of_json_end_where_they_end(pair, beir):
    base, folder = pair
    asked = {"base": base, "task": "nanobeir", "data": beir, "write": False, "progress": False}
    (before,) = evaluate_folder(folder, **asked)
    lines = (beir / "corpus.jsonl").read_text().splitlines()
    (beir / "corpus.jsonl").write_text("\n".join([*lines[:-1], " ", lines[-1][:-2] + '\u2028"}']) + "\n", "utf-8")
    (after,) = evaluate_folder(folder, **asked)
    assert after.metrics == before.metrics
    halves = [line.replace('"title": ""', '"title": "half \\ud800"') for line in lines]
    (beir / "corpus.jsonl").write_text("\n".join(halves))
    (found,) = evaluate_folder(folder, **asked)
    assert found.data.examples == before.data.examples and "ud800" in halves[0]
    (beir / "corpus.jsonl").write_text("\n".join([*lines, '{"_id": "d99", "text": null}']))
    with pytest.raises(CompressionError, match="has an example whose text is None"):
        evaluate_folder(folder, **asked)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"task": "nanobeir:Nothing"}, "NanoBEIR has no set 'Nothing'; known: ArguAna"),
        ({"task": "nanobeir", "data": "nowhere"}, "has no corpus.jsonl"),
        ({"task": "nanobeir", "fine_tune": True}, "Retrieval is not trained"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(pair, options, message):
    base, folder = pair
    with pytest.raises(CompressionError, match=message):
        evaluate_folder(folder, base=base, progress=False, **options)


@pytest.mark.parametrize("damage", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_damaged_sets_are_one_sentence(pair, beir, damage):
    base, folder = pair
    (beir / damage).write_text("{")
    with pytest.raises(CompressionError, match="cannot be read as a BEIR set|has no query"):
        evaluate_folder(folder, base=base, task="nanobeir", data=beir, progress=False)
