"""Classification on embeddings: the draws, the classifier, files and data sets, and what cannot be classified."""

import csv
import json

import numpy as np
import pytest
import torch
from common import save_pair
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from hf_offline_compress import CompressionError, evaluate_folder
from hf_offline_compress.artifact.reading import read_evaluation
from hf_offline_compress.evaluate import TaskSettings
from hf_offline_compress.evaluate.linear_probe import DRAWS, classification_prompt, draws, probe
from hf_offline_compress.metrics.agreement import sentence_embeddings

ANIMALS = ["the cat sat on the mat", "a dog ran home", "the dog and the cat", "a cat walks over hills", "the dog sat"]
SKY = ["the sun is red", "blue moon over hills", "the moon and the sun", "a red moon", "the blue sun ran over hills"]
ROWS = [*((text, "animal") for text in ANIMALS), *((text, "sky") for text in SKY)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("classes"))


def write(path, rows, header=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_draws_are_balanced_distinct_and_seeded():
    labels = [text for text, count in (("a", 30), ("b", 12), ("c", 3)) for _ in range(count)]
    found = draws(labels, 8, seed=5)
    assert len(found) == DRAWS and len({tuple(sorted(each)) for each in found}) == DRAWS
    for each in found:
        assert len(set(each)) == len(each)
        assert [sum(labels[i] == name for i in each) for name in "abc"] == [8, 8, 3]
    assert draws(labels, 8, seed=5) == found != draws(labels, 8, seed=6)


def test_accuracy_is_that_of_a_classifier_trained_by_hand():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, 6, generator=generator)
    labels = [f"class {i}" for i in (embeddings[:, 0] > 0).int().tolist()]
    rows = [[0, 3, 5, 7, 11, 13], list(range(20))]
    found = probe(embeddings, embeddings, rows, labels[:20], labels[20:])
    right = []
    for chosen in rows:
        own = LogisticRegression().fit(embeddings[chosen].numpy(), [labels[i] for i in chosen])
        right.append(np.mean(own.predict(embeddings[20:].numpy()) == labels[20:]))
    assert found["accuracy"] == pytest.approx(np.mean(right)) and 0.5 < found["accuracy"] < 1
    assert np.isnan(probe(embeddings * torch.nan, embeddings, rows, labels[:20], labels[20:])["accuracy"])


def test_base_and_compressed_model_on_files(pair, tmp_path):
    base, folder = pair
    train, test = write(tmp_path / "train.csv", ROWS), write(tmp_path / "test.csv", ROWS[::2])
    settings = TaskSettings(limit=5)  # all of each class, so that every draw is the same training set
    files = {"data": test, "train_data": train}
    (found,) = evaluate_folder(
        folder, base=base, task="classification", task_settings=settings, progress=False, **files
    )
    by_name = {each.name: each for each in found.metrics}
    expected = {}
    for name, where in (("base", base), ("compressed", folder)):
        tokenizer = AutoTokenizer.from_pretrained(where)
        vectors = sentence_embeddings(AutoModel.from_pretrained(where), tokenizer, [t for t, _ in ROWS]).numpy()
        labels = [label for _, label in ROWS]
        right = LogisticRegression().fit(vectors, labels).predict(vectors[::2]) == labels[::2]
        expected[name] = np.mean(right)
    accuracy = by_name["accuracy"]
    assert (accuracy.base, accuracy.compressed) == pytest.approx((expected["base"], expected["compressed"]))
    assert by_name["accuracy (classifier of the base)"].base == accuracy.base
    assert found.settings["per_class"] == 5 and found.settings["training"]["examples"] == len(ROWS)
    assert found.settings["training"]["name"] == "train.csv"
    assert read_evaluation(folder)["evaluations"][-1]["id"] == "classification:test.csv"


def test_a_data_set_on_the_hub(pair, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": t, "label": int(c == "sky"), "label_text": c} for t, c in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    base, folder = pair
    options = {"base": base, "progress": False, "write": False}
    (found,) = evaluate_folder(folder, task="classification:amazon_counterfactual", limit=3, **options)
    assert asked == [("mteb/amazon_counterfactual", "en", "train"), ("mteb/amazon_counterfactual", "en", "test")]
    assert found.settings["per_class"] == 32 and found.data.examples == 3
    evaluate_folder(folder, task="classification:someone/moods:fr", **options)
    assert asked[2:] == [("someone/moods", "fr", "train"), ("someone/moods", "fr", "test")]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"data": "test.csv"}, "needs texts to train on and to test on"),
        ({"task": "classification:emotion", "data": "test.csv"}, "takes no files"),
        ({"task": "classification:nothing"}, "There is no classification set 'nothing'; known: amazon_counterfactual"),
        ({"data": "test.csv", "train_data": "nowhere.csv"}, "There is no data file"),
        ({"data": "test.csv", "train_data": "one.csv"}, "has the class 'animal' alone"),
        ({"data": "other.csv", "train_data": "test.csv"}, "'other.csv' has the class 'ship', and the training data"),
        ({"data": "test.csv", "train_data": "gaps.csv"}, "Example 2 of 'gaps.csv' has no text or no label"),
        ({"data": "test.csv", "train_data": "nulls.json"}, "'nulls.json' has an example whose text is None"),
        ({"data": "test.csv", "train_data": "test.csv", "columns": ["text"]}, "do not fit"),
        ({"data": "test.csv", "train_data": "test.csv", "fine_tune": True}, "trains a classifier on embeddings"),
        ({"data": "test.csv", "train_data": "test.csv", "task_settings": TaskSettings(limit=-1)}, "must be above 0"),
    ],
)
def test_what_cannot_be_classified_is_one_sentence(pair, tmp_path, monkeypatch, options, message):
    base, folder = pair
    before = (folder / "evaluation.json").read_bytes() if (folder / "evaluation.json").exists() else None
    write(tmp_path / "test.csv", ROWS)
    write(tmp_path / "one.csv", ROWS[:5])
    write(tmp_path / "other.csv", [("a red ship", "ship")])
    write(tmp_path / "gaps.csv", [ROWS[0], ("", "sky")])
    (tmp_path / "nulls.json").write_text(json.dumps([{"text": None, "label": "sky"}, {"text": "a", "label": "animal"}]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressionError, match=message):
        evaluate_folder(folder, base=base, progress=False, **{"task": "classification", **options})
    assert ((folder / "evaluation.json").read_bytes() if before else None) == before


def test_the_prompt_is_the_bases_own(tmp_path):
    assert classification_prompt(tmp_path) == ""
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"Classification": "task: ", "query": "query: "}, "default_prompt_name": "query"}'
    )
    assert classification_prompt(tmp_path) == "task: "
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    )
    assert classification_prompt(tmp_path) == "query: "
