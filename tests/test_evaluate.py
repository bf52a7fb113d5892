"""Evaluation: every number as a naive loop or a hand has it, base beside compressed, files of every form, one record."""

import csv
import inspect
import itertools
import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from common import TEXTS, WORDS, error_of, make_model, make_tokenizer, save_base
from processes import run_cli, run_python
from scipy.stats import spearmanr
from torch.nn import functional as F

from hf_offline_compress import CompressionError, compress
from hf_offline_compress.architectures.families import family_of
from hf_offline_compress.base.checkpoint import BaseCheckpoint
from hf_offline_compress.evaluate import (
    EvaluationOptions,
    TextSettings,
    classification,
    evaluate_folder,
    pair,
    records,
    sentence_embeddings,
)
from hf_offline_compress.evaluate.question_answering import answers, best_span, make_windows, training_features
from hf_offline_compress.evaluate.task_data import Example, load_splits, load_training
from hf_offline_compress.evaluate.tasks import TASKS, TaskSettings, find_task
from hf_offline_compress.foundation.processes import Processes
from hf_offline_compress.metrics.agreement import agreement
from hf_offline_compress.metrics.perplexity import masked_lines, masked_perplexity
from hf_offline_compress.metrics.predictions import class_agreement, language_agreement
from hf_offline_compress.metrics.pseudo_perplexity import pseudo_perplexity
from hf_offline_compress.metrics.scores import METRICS, normalized, score, squad_scores

LINES = [f"{text} zebra {WORDS[i % 18]} {text} ostrich" for i, text in enumerate(TEXTS[:12])]
HEADS = {
    "masked": ("bert", "BertForMaskedLM"),
    "causal": ("gpt2", "GPT2LMHeadModel"),
    "body": ("roberta", "RobertaModel"),
    "classifier": ("bert", "BertForSequenceClassification"),
    "regressor": ("bert", "BertForSequenceClassification"),
    "gpt2 classifier": ("gpt2", "GPT2ForSequenceClassification"),
    "reader": ("bert", "BertForQuestionAnswering"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return kind → (compressed folder, base folder), made when first asked for."""
    known = {}

    def make(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("evaluated")
            labels = {"num_labels": 1} if kind == "regressor" else {}
            base = save_base(folder / "base", *HEADS[kind], **labels)
            result = compress(base, "svd", ratio=3, modules="linears", calibration=None, progress=False)
            known[kind] = (result.save(folder / "small"), base)
        return known[kind]

    return make


@pytest.fixture
def clean(made):
    """The same, with no evaluation in the folder."""

    def make(kind):
        folder, base = made(kind)
        (folder / "evaluation.json").unlink(missing_ok=True)
        return folder, base

    return make


def evaluated(clean, kind, **options):
    folder, base = clean(kind)
    return evaluate_folder(folder, **{"base": base, "progress": False, **options})


def numbers(evaluation):
    return {metric.name: (metric.base, metric.compressed) for metric in evaluation.metrics}


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def both(made, kind):
    """Return tokenizer, base and compressed model."""
    found = pair.find_pair(*made(kind))
    return found.tokenizer, found.load_base(), found.load_compressed()


# Texts


@pytest.mark.parametrize("model_type,head", [HEADS["masked"], ("roberta", "RobertaForMaskedLM")])
def test_pseudo_perplexity_as_a_naive_loop_says(model_type, head):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    losses = []
    for line in LINES[:5]:
        ids = torch.tensor(tokenizer(line, truncation=True, max_length=30)["input_ids"])
        for place in range(1, len(ids) - 1):
            asked = ids.clone()
            asked[place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(input_ids=asked[None]).logits
            losses.append(F.cross_entropy(logits[0, place], ids[place]).item())
    found = pseudo_perplexity(model, tokenizer, LINES[:5], block=30, batch_size=7)
    assert (found.tokens, found.lines) == (len(losses), 5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    with pytest.raises(CompressionError, match="not a masked language model"):
        pseudo_perplexity(make_model("gpt2", "GPT2LMHeadModel"), make_tokenizer("gpt2"), LINES)


def test_agreement_of_masked_predictions_as_a_naive_loop_says(made):
    tokenizer, base, small = both(made, "masked")
    divergences, equal = [], []
    for true, asked in masked_lines(LINES, tokenizer, seed=3, share=0.3, block=32, min_tokens=20):
        ids = torch.where(asked, tokenizer.mask_token_id, true)[None]
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, asked].softmax(-1) for model in (base, small))
        divergences += (p * (p / q).log()).sum(-1).tolist()
        equal += (p.argmax(-1) == q.argmax(-1)).tolist()
    options = {"masked": True, "seed": 3, "share": 0.3, "block": 32, "batch_size": 5}
    found = language_agreement(base, small, tokenizer, LINES, **options)
    assert found.places == len(equal) and 0 < found.top_1 < 1
    assert found.kl_divergence == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found.top_1 == pytest.approx(sum(equal) / len(equal))
    same = language_agreement(base, base, tokenizer, LINES, **options)
    assert (same.kl_divergence, same.top_1) == (pytest.approx(0, abs=1e-9), 1.0)
    swapped = language_agreement(small, base, tokenizer, LINES, **options)
    assert swapped.kl_divergence != pytest.approx(found.kl_divergence, rel=1e-3)  # it is no distance


def test_agreement_of_causal_predictions_as_a_naive_loop_says(made):
    tokenizer, base, small = both(made, "causal")
    ids = torch.tensor(tokenizer(LINES[0])["input_ids"][:38])[None]
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0, :-1].softmax(-1) for model in (base, small))
    found = language_agreement(base, small, tokenizer, [tokenizer.decode(ids[0])], masked=False)
    assert found.places == ids.shape[1] - 1
    assert found.kl_divergence == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)


def test_agreement_of_classes_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    found = class_agreement(p.log() + 3, q.log())
    assert found.kl_divergence == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, rel=1e-6)
    assert (found.top_1, found.places) == (0.5, 2)


@pytest.mark.parametrize("kind", ["masked", "causal", "body", "classifier"])
def test_a_text(clean, made, kind):
    found = evaluated(clean, kind, text=LINES, limit=7)
    expected = {"masked": ["masked_perplexity:caller"], "causal": ["causal_perplexity:caller"]}.get(kind, [])
    assert [item.id for item in found] == [*expected, "agreement:caller"]
    tokenizer, base, small = both(made, kind)
    length = found[-1].settings["max_length"]
    embeddings = [sentence_embeddings(model, tokenizer, LINES[:7], max_length=length) for model in (base, small)]
    last = numbers(found[-1])
    assert last["cosine"] == (1.0, pytest.approx(agreement(*embeddings), rel=1e-6))
    assert set(last) == ({"cosine"} if kind == "body" else {"cosine", "kl_divergence", "top_1_agreement"})
    if kind == "masked":
        values = [masked_perplexity(model, tokenizer, LINES[:7], seed=0).perplexity for model in (base, small)]
        assert numbers(found[0])["perplexity"] == pytest.approx(tuple(values))
        assert found[0].settings["seed"] == 0 and found[0].data.examples == 7
    if kind == "causal":
        assert found[0].settings["block"] == 40 and found[0].settings["stride"] == 20
        assert found[0].data.examples == 7


def test_measures_and_settings(clean):
    settings = TextSettings(share=0.5, block=24, min_tokens=10)
    options = {"text": LINES, "measures": ["pseudo_perplexity", "perplexity"], "text_settings": settings, "seed": 5}
    pseudo, masked = evaluated(clean, "masked", **options)
    assert pseudo.id == "pseudo_perplexity:caller" and "seed" not in pseudo.settings
    kept = {name: masked.settings[name] for name in ("seed", "share", "block", "min_tokens")}
    assert kept == {"seed": 5, "share": 0.5, "block": 24, "min_tokens": 10}
    other = evaluated(clean, "masked", **{**options, "seed": 6})
    assert numbers(other[0]) == numbers(pseudo) and numbers(other[1]) != numbers(masked)


def test_options_in_one_object_are_what_keywords_are(clean):
    folder, base = clean("body")
    asked = EvaluationOptions(base=base, text=LINES[:2], limit=1, write=False, progress=False)
    (one,) = evaluate_folder(folder, asked)
    (two,) = evaluate_folder(folder, base=base, text=LINES[:2], limit=1, write=False, progress=False)
    assert (one.id, one.settings, one.metrics) == (two.id, two.settings, two.metrics) and one.data.examples == 1
    (more,) = evaluate_folder(folder, asked, limit=2)
    assert more.data.examples == 2 and asked.limit == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'texts'; known are base, onnx, text"):
        evaluate_folder(folder, texts=LINES)
    keywords = inspect.signature(evaluate_folder).parameters
    assert {field.name for field in fields(EvaluationOptions)} == set(keywords) - {"folder", "options"}
    assert "train_data: the same as `data`" in evaluate_folder.__doc__


# Metrics


def test_metrics_by_hand():
    labels, given = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]  # 2 right of 3, 1 wrong of 5
    found = score(["accuracy", "f1", "matthews_correlation"], labels, given)
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews_correlation"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]
    dx, dy = [a - 2.5 for a in x], [b - 4.0 for b in y]
    product = sum(a * b for a, b in zip(dx, dy, strict=True))
    length = math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))
    assert score(["pearson"], x, y)["pearson"] == pytest.approx(product / length)
    assert score(["spearman"], x, y)["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(score(["spearman"], x, [1.0] * 4)["spearman"])
    assert all(metric in METRICS for task in TASKS.values() if task.labels for metric in task.metrics)


def test_answers_are_compared_as_squads_script_does():
    assert normalized("  The Cat's, an  apple!") == "cats apple"
    found = squad_scores(["the cat sat", "a dog", "moon", ""], [["cat sat", "no"], ["red dog ran"], ["sun"], ["sun"]])
    # "dog" has 1 of 1 words right, and finds 1 of 3: F1 = 2 · 1 · ⅓ / (1 + ⅓)
    assert found == {"exact_match": 1 / 4, "f1": pytest.approx((1 + 0.5 + 0 + 0) / 4)}


def test_numbers_that_json_does_not_have(clean, tmp_path):
    record = records.metric("perplexity", "lower", math.inf, math.nan)
    assert (record.base, record.compressed) == (None, None)


# Data


def test_the_tasks_are_glue_and_squad():
    assert set(TASKS) == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", "squad"}
    papers = TaskSettings().for_task(TASKS["sst2"], 512)
    assert (papers.learning_rate, papers.batch_size, papers.length, papers.epochs) == (2e-5, 32, 128, 3)
    squad = TaskSettings().for_task(TASKS["squad"], 512)
    assert (squad.learning_rate, squad.length, squad.stride, squad.epochs) == (3e-5, 384, 128, 3)
    assert TaskSettings(length=64).for_task(TASKS["sst2"], 40).length == 40
    with pytest.raises(CompressionError, match=r"learning_rate of a task must be above 0, not -1\.0"):
        TaskSettings(learning_rate=-1.0).for_task(TASKS["sst2"], 512)
    with pytest.raises(CompressionError, match="no task 'glue'; known: cola, sst2"):
        find_task("glue")


SENTIMENT = [("a good sun", 1), ("a red, bad moon", 0)]


@pytest.mark.parametrize(
    "name,content,columns",
    [
        ("header.csv", 'label,text\n1,a good sun\n0,"a red, bad moon"\n', None),
        ("other.csv", 'id,Sentence,Label\n7,a good sun,1\n8,"a red, bad moon",0\n', None),
        ("named.csv", 'mood,words\npositive,a good sun\nNegative,"a red, bad moon"\n', ["words", "mood"]),
        ("bare.csv", 'a good sun,1\n"a red, bad moon",0\n', None),
        ("numbered.csv", '9,1,a good sun\n9,0,"a red, bad moon"\n', ["3", "2"]),
        ("tabs.tsv", "sentence\tlabel\na good sun\t1\na red, bad moon\t0\n", None),
        ("list.json", json.dumps([{"text": t, "label": n} for t, n in SENTIMENT]), None),
        ("data.json", json.dumps({"data": [{"text": t, "label": n} for t, n in SENTIMENT]}), None),
        ("lines.jsonl", "\n".join(json.dumps({"text": t, "label": n}) for t, n in SENTIMENT), None),
    ],
)
def test_files_of_every_form(tmp_path, name, content, columns):
    (tmp_path / name).write_text(content)
    (split,) = load_splits(TASKS["sst2"], tmp_path / name, columns, None)
    assert [(example.texts, example.label) for example in split.examples] == [((t,), n) for t, n in SENTIMENT]
    assert split.data.name == name and split.data.examples == 2 and len(split.data.sha256) == 64
    (first,) = load_splits(TASKS["sst2"], tmp_path / name, columns, 1)
    assert len(first.examples) == first.data.examples == 1 and first.data.sha256 == split.data.sha256


@pytest.mark.parametrize("name", ["rows.tsv", "rows.jsonl"])
def test_quotation_marks_and_what_else_ends_a_line_are_characters(tmp_path, name):
    texts = ['"a cat', "the sun\u2028shines", 'a "moon"', 'a dog"']
    rows = [
        f"{t}\t1" if name.endswith("tsv") else json.dumps({"text": t, "label": 1}, ensure_ascii=False) for t in texts
    ]
    (tmp_path / name).write_text("\n".join(["text\tlabel", *rows] if name.endswith("tsv") else rows), "utf-8")
    (split,) = load_splits(TASKS["sst2"], tmp_path / name, None, None)
    assert [example.texts for example in split.examples] == [(text,) for text in texts]


def test_texts_are_texts(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a \ud83d cat", "label": 1}]))
    (split,) = load_splits(TASKS["sst2"], path, None, None)
    assert split.examples[0].texts == ("a \ufffd cat",)
    path.write_text(json.dumps([{"text": None, "label": 1}]))
    with pytest.raises(
        CompressionError, match="'rows.json' has an example whose text is None; every text must be a string"
    ):
        load_splits(TASKS["sst2"], path, None, None)
    path.write_text(json.dumps([{"sentence1": "a", "sentence2": "b", "score": "inf"}]))
    with pytest.raises(CompressionError, match="has the label 'inf', and stsb needs a number"):
        load_splits(TASKS["stsb"], path, None, None)


def test_a_file_of_pairs_without_a_header(tmp_path):
    path = write_csv(tmp_path / "sts.csv", [("a cat", "a dog", "2.5"), ("sun", "moon", "0.0")])
    (split,) = load_splits(TASKS["stsb"], path, None, None)
    assert [(e.texts, e.label) for e in split.examples] == [(("a cat", "a dog"), 2.5), (("sun", "moon"), 0.0)]


@pytest.mark.parametrize(
    "name,content,columns,message",
    [
        ("none.csv", None, None, "There is no data file"),
        ("a.txt", "x", None, "must be one of .csv, .tsv, .json, .jsonl"),
        ("a.csv", "", None, "has no example"),
        ("a.csv", "text,label\n", None, "has no example"),
        ("a.csv", "text,label\na,1,2\n", None, "Row 2 of 'a.csv' has 3 cells, and the first has 2"),
        ("a.csv", "text,label\nsun,2\n", None, "has the label '2', and sst2 needs one of negative, positive"),
        ("a.csv", "text,mood\nsun,1\n", None, "has the columns text,mood, and sst2 needs sentence and label; name"),
        ("a.csv", "text,mood\nsun,1\n", ["text"], "The columns 'text' do not fit 'a.csv', which has text,mood"),
        ("a.csv", "text,mood\nsun,1\n", ["text", "label"], "The columns 'text,label' do not fit"),
        ("a.csv", b"text,label\n\xff,1\n", None, "cannot be read as csv"),
        ("a.json", "{", None, "cannot be read as json"),
        ("a.json", '{"rows": []}', None, "cannot be read as json"),
    ],
)
def test_files_that_do_not_do(tmp_path, name, content, columns, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CompressionError, match=message):
        load_splits(TASKS["sst2"], tmp_path / name, columns, None)


CONTEXT = "the red cat sat on a mat . the blue dog ran home over hills ."
QUESTIONS = [("who sat ?", ["red cat", "the red cat"]), ("who ran ?", ["blue dog"]), ("where ?", ["a mat"])]


def nested(path):
    asked = [
        {"id": str(i), "question": q, "answers": [{"text": t, "answer_start": CONTEXT.index(t)} for t in known]}
        for i, (q, known) in enumerate(QUESTIONS)
    ]
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]}))
    return path


def test_questions_of_every_form(tmp_path):
    (split,) = load_splits(TASKS["squad"], nested(tmp_path / "squad.json"), None, None)
    starts = [tuple(CONTEXT.index(text) for text in known) for _, known in QUESTIONS]
    assert [e.texts for e in split.examples] == [(question, CONTEXT) for question, _ in QUESTIONS]
    assert [(list(e.answers), e.starts) for e in split.examples] == [
        (known, at) for (_, known), at in zip(QUESTIONS, starts, strict=True)
    ]
    rows = [("question", "context", "answer"), *((question, CONTEXT, known[0]) for question, known in QUESTIONS)]
    (split,) = load_splits(TASKS["squad"], write_csv(tmp_path / "a.csv", rows), None, None)
    assert [example.starts for example in split.examples] == [at[:1] for at in starts]
    write_csv(tmp_path / "b.csv", [rows[0], ("who ?", CONTEXT, "zebra")])
    with pytest.raises(CompressionError, match="answer that is not in its context"):
        load_splits(TASKS["squad"], tmp_path / "b.csv", None, None)


def hub(monkeypatch, tables):
    """Let `datasets.load_dataset` find tables by split; return what it was asked for."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if split not in tables:
            raise FileNotFoundError(f"no {split}")
        table = datasets.Dataset.from_list(tables[split])
        table.info.download_checksums = {f"hf://datasets/{name}@{'a1' * 20}/{split}.parquet": {}}
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


QUESTION = '[{"question": "q", "context": "c", "answers": %s}]'


@pytest.mark.parametrize(
    "task,name,content",
    [
        *(
            (task, "x.json", text)
            for task in ("sst2", "squad")
            for text in ("", "5", "[5]", "[[1]]", "{}", '{"data": 5}')
        ),
        *(("sst2", "x.json", text) for text in ("[" * 100_000, '{"a": ' + "1" * 5000 + "}")),
        *(("sst2", "x.jsonl", text) for text in ("null", "5", '{"sentence": "a", "label": 1}\n5')),
        *(("sst2", "x.csv", text) for text in ("\0", "<!DOCTYPE html>", "sentence,label\n" + "x" * 200_000 + ",1")),
        ("sst2", "x.json", '[{"sentence": "a", "label": 1}, {"sentence": "b"}]'),
        *(("squad", "x.json", QUESTION % a) for a in ("5", "null", '"{x"', '{"text": 5}', '[{"text": "c"}]')),
        ("squad", "x.json", QUESTION % '{"text": ["c"], "answer_start": ["x"]}'),
    ],
)
def test_damaged_data_files_are_named(tmp_path, task, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressionError, match=rf"(?s)^(?=.*'{name}')[^\n]*(pass|needs|name them)"):
        load_splits(TASKS[task], tmp_path / name, None, None)


def test_data_sets_on_the_hub(monkeypatch):
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": i % 3, "idx": i} for i in range(5)]
    asked = hub(monkeypatch, {"validation_matched": rows, "validation_mismatched": rows[::-1], "train": rows})
    first, second = load_splits(TASKS["mnli"], None, None, 4)
    assert [e.label for e in first.examples] == [0, 1, 2, 0] and second.examples[0].texts == ("p4", "h")
    assert (first.suffix, second.suffix) == (" (matched)", " (mismatched)")
    assert (first.data.name, first.data.config, first.data.split) == ("nyu-mll/glue", "mnli", "validation_matched")
    assert first.data.revision == "a1" * 20 and first.data.sha256 is None
    assert load_training(TASKS["mnli"], None, None, None).data.examples == 5
    assert asked[-1] == ("nyu-mll/glue", "mnli", "train")
    with pytest.raises(CompressionError, match="'nyu-mll/glue rte validation' could not be loaded; pass a local file"):
        load_splits(TASKS["rte"], None, None, None)


# Tasks as models are


def one_by_one(model, tokenizer, texts):
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("kind", ["classifier", "gpt2 classifier"])
def test_classifiers_as_a_naive_loop_has_them(clean, made, tmp_path, kind):
    rows = [(text, i % 2) for i, text in enumerate(TEXTS[:11])]
    path = write_csv(tmp_path / "mood.csv", [("sentence", "label"), *rows])
    (found,) = evaluated(clean, kind, task="sst2", data=path, batch_size=4)
    tokenizer, *models = both(made, kind)
    expected = []
    for model in models:
        logits = one_by_one(model, tokenizer, [(text,) for text, _ in rows])
        expected.append((logits.argmax(1) == torch.tensor([label for _, label in rows])).float().mean().item())
        batched = classification.classifier_logits(model, tokenizer, [(text,) for text, _ in rows], batch_size=4)
        torch.testing.assert_close(batched, logits, atol=1e-5, rtol=1e-4)
    assert numbers(found) == {"accuracy": tuple(map(pytest.approx, expected))}
    assert (found.id, found.task["type"], found.settings["method"]) == (
        "sst2:mood.csv",
        "text-classification",
        "head",
    )


def test_labels_are_matched_by_their_names():
    def order(task, *labels):
        config = SimpleNamespace(num_labels=len(labels), id2label=dict(enumerate(labels)))
        return classification.class_order(TASKS[task], config, "some")

    assert order("mnli", "CONTRADICTION", "NEUTRAL", "ENTAILMENT") == [2, 1, 0]
    assert order("sst2", "POS", "NEG") == [1, 0] and order("sst2", "LABEL_0", "LABEL_1") == [0, 1]
    assert order("stsb", "LABEL_0") == [0]
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    assert classification.predictions(TASKS["mnli"], logits, [2, 1, 0]) == [2, 1]
    assert classification.predictions(TASKS["stsb"], torch.tensor([[2.5], [1.0]]), [0]) == [2.5, 1.0]
    for task, labels in [("sst2", ("a", "b")), ("sst2", ("LABEL_0",)), ("mnli", ("LABEL_0", "LABEL_1"))]:
        with pytest.raises(
            CompressionError, match=f"predicts .*, and {task} needs .*; pass another task, or --fine-tune"
        ):
            order(task, *labels)


def pairs_file(path):
    return write_csv(path, [(TEXTS[i], TEXTS[3 * i + 1], i % 6) for i in range(14)])


def test_similarity_of_sentence_embeddings_as_a_naive_loop_has_it(clean, made, tmp_path):
    (found,) = evaluated(clean, "body", task="stsb", data=pairs_file(tmp_path / "sts.csv"), batch_size=3)
    tokenizer, *models = both(made, "body")
    expected = []
    for model in models:
        cosines = []
        for i in range(14):
            pooled = []
            for text in (TEXTS[i], TEXTS[3 * i + 1]):
                with torch.no_grad():
                    pooled.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
            cosines.append(F.cosine_similarity(*pooled, dim=0).item())
        expected.append(spearmanr([i % 6 for i in range(14)], cosines).statistic)
    assert numbers(found)["spearman"] == tuple(pytest.approx(value) for value in expected)
    assert (found.task["type"], found.settings["method"]) == ("sentence-similarity", "embeddings")


def test_similarity_by_a_head(clean, made, tmp_path):
    (found,) = evaluated(clean, "regressor", task="stsb", data=pairs_file(tmp_path / "sts.csv"))
    tokenizer, base, _ = both(made, "regressor")
    given = one_by_one(base, tokenizer, [(TEXTS[i], TEXTS[3 * i + 1]) for i in range(14)])[:, 0]
    assert numbers(found)["spearman"][0] == pytest.approx(spearmanr([i % 6 for i in range(14)], given).statistic)
    assert found.settings["method"] == "head"


def test_both_parts_of_mnli(clean, monkeypatch):
    # Nothing of this network can tell three classes, so the head is refused by name.
    rows = [{"premise": TEXTS[i], "hypothesis": TEXTS[i + 1], "label": i % 3} for i in range(6)]
    hub(monkeypatch, {"validation_matched": rows, "validation_mismatched": rows[:4], "train": rows})
    with pytest.raises(CompressionError, match="predicts label_0, label_1, and mnli needs entailment"):
        evaluated(clean, "classifier", task="mnli")
    settings = TaskSettings(epochs=1.0, limit=4)
    (found,) = evaluated(clean, "classifier", task="mnli", fine_tune=True, task_settings=settings)
    assert list(numbers(found)) == ["accuracy (matched)", "accuracy (mismatched)"]
    assert found.id == "mnli:fine-tuned:nyu-mll/glue" and found.settings["training"]["examples"] == 4


# Questions


class Oracle:
    """Stands for a reader that knows where the answer's words stand, and nothing else."""

    def __init__(self, tokenizer, wanted):
        self.tokenizer, self.wanted, self.device, self.training = tokenizer, wanted, torch.device("cpu"), False

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, input_ids, attention_mask, **_):
        starts, ends = torch.zeros(2, *input_ids.shape)
        for row, ids in enumerate(input_ids.tolist()):
            for answer in self.wanted:
                pieces = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
                for i in range(len(ids)):
                    if ids[i : i + len(pieces)] == pieces:
                        starts[row, i] += 5
                        ends[row, i + len(pieces) - 1] += 5
        return SimpleNamespace(start_logits=starts, end_logits=ends)


def long_example():
    context = " ".join(["the sun"] * 30 + ["red cat"] + ["a hills"] * 25)
    return Example(("who sat ?", context), 0, ("red cat",), (context.index("red"),))


def test_windows_cover_the_context_and_overlap():
    tokenizer, example = make_tokenizer("bert"), long_example()
    windows = make_windows([example, Example(("who ?", CONTEXT), 0, ("cat",), (8,))], tokenizer, length=32, stride=8)
    of_first = [window for window in windows if window.example == 0]
    assert len(of_first) > 2 and windows[-1].example == 1
    assert all(len(window.inputs["input_ids"]) <= 32 for window in windows)
    places = [[span for span in window.spans if span] for window in of_first]
    assert {span for spans in places for span in spans} == set(
        tokenizer(example.texts[1], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    )
    assert all(a[-8:] == b[:8] for a, b in itertools.pairwise(places))
    with pytest.raises(CompressionError, match="Windows of 12 tokens with a stride of 8 have no room"):
        make_windows([example], tokenizer, length=12, stride=8)


def test_training_marks_the_answer():
    tokenizer, example = make_tokenizer("bert"), long_example()
    windows = make_windows([example], tokenizer, length=32, stride=8)
    marked = []
    for feature in training_features([example], windows):
        chosen = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
        marked.append(tokenizer.decode(chosen))
    assert set(marked) == {"red cat", "[CLS]"}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_the_best_span_of_all_windows(model_type):
    tokenizer = make_tokenizer(model_type)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    reader = Oracle(tokenizer, ["red cat", " red cat"])
    other = Example(("who ?", "a red cat sat"), 0, ("red cat",), (2,))
    for size in (1, 3):
        found = answers(reader, tokenizer, [long_example(), other], length=40, stride=8, batch_size=size)
        assert found == ["red cat", "red cat"]


def test_spans_that_are_none():
    spans = [None, (0, 3), (4, 7), (8, 11), None]
    starts, ends = torch.tensor([9.0, 0.0, 0.0, 5.0, 9.0]), torch.tensor([9.0, 4.0, 1.0, 0.0, 9.0])
    # The likeliest start is behind the likeliest end, and the question is no answer: 5 + 0 beats 0 + 4.
    assert best_span(starts, ends, spans) == (5.0, (8, 11))
    assert best_span(starts, ends, [None] * 5)[1] == (0, 0)
    far = [(i, i + 1) for i in range(64)]
    edge = torch.zeros(64)
    edge[0] = 3
    last = torch.zeros(64)
    last[63] = 3
    assert best_span(edge, last, far)[0] == 3.0  # together they would be longer than any answer


def test_questions_put_to_models(clean, tmp_path):
    settings = TaskSettings(length=36, stride=6)
    options = {"task": "squad", "data": nested(tmp_path / "squad.json"), "task_settings": settings}
    (found,) = evaluated(clean, "reader", **options)
    assert set(numbers(found)) == {"exact_match", "f1"} and found.task["type"] == "question-answering"
    assert found.settings["stride"] == 6 and found.data.examples == 3


# Fine-tuning


def test_fine_tuning_learns(clean, tmp_path):
    rows = [
        (f"{('red', 'blue')[i % 2]} {TEXTS[i].replace('red', 'sun').replace('blue', 'sun')}", i % 2) for i in range(48)
    ]
    train = write_csv(tmp_path / "train.csv", [("text", "label"), *rows[:32]])
    data = write_csv(tmp_path / "dev.csv", [("text", "label"), *rows[32:]])
    settings = TaskSettings(learning_rate=3e-3, epochs=8.0, batch_size=8, length=24)
    options = {"task": "sst2", "data": data, "train_data": train, "fine_tune": True, "task_settings": settings}
    (found,) = evaluated(clean, "masked", **options)
    assert all(value >= 0.9 for value in numbers(found)["accuracy"])
    tuned = found.settings["fine_tuning"]
    assert (tuned["learning_rate"], tuned["epochs"], found.settings["training"]["name"]) == (3e-3, 8.0, "train.csv")
    assert found.id == "sst2:fine-tuned:dev.csv" and found.settings["seed"] == 0
    (again,) = evaluated(clean, "masked", **options)
    assert numbers(again) == numbers(found)
    assert not (tmp_path / "trainer_output").exists()


def test_fine_tuned_readers_and_regressors(clean, tmp_path):
    settings = TaskSettings(learning_rate=5e-3, epochs=30.0, batch_size=4, length=36, stride=6)
    data = nested(tmp_path / "squad.json")
    options = {"task": "squad", "data": data, "train_data": data, "fine_tune": True, "task_settings": settings}
    (found,) = evaluated(clean, "masked", **options)
    assert min(numbers(found)["f1"]) > 0.6  # three questions learnt by heart
    data = pairs_file(tmp_path / "sts.csv")
    settings = TaskSettings(learning_rate=3e-3, epochs=30.0, batch_size=7)
    options |= {"task": "stsb", "data": data, "train_data": data, "task_settings": settings}
    (found,) = evaluated(clean, "causal", **options)
    assert min(numbers(found)["pearson"]) > 0.8


def test_base_and_compressed_model_begin_with_the_same_head(made):
    from transformers import set_seed

    found = pair.find_pair(*made("masked"))
    heads = []
    for loader in (found.load_base, found.load_compressed):
        set_seed(3)
        heads.append(loader("BertForSequenceClassification", new_head=True, num_labels=3).classifier.weight)
    torch.testing.assert_close(*heads)


# The record


def test_evaluations_are_added_and_replaced(clean, tmp_path):
    folder, _ = clean("classifier")
    data = write_csv(tmp_path / "mood.csv", [("text", "label"), *((text, i % 2) for i, text in enumerate(TEXTS[:8]))])
    evaluated(clean, "classifier", text=LINES, task="sst2", data=data)
    first = json.loads((folder / "evaluation.json").read_text())
    assert first["format_version"] == 1 and first["benchmark"] is None
    assert [item["id"] for item in first["evaluations"]] == ["agreement:caller", "sst2:mood.csv"]
    records.write_evaluations(folder, benchmark={"models": []})
    evaluate_folder(folder, base=folder.parent / "base", task="sst2", data=data, limit=3, progress=False)
    second = json.loads((folder / "evaluation.json").read_text())
    assert second["benchmark"] == {"models": []} and second["evaluations"][0] == first["evaluations"][0]
    assert [item["data"]["examples"] for item in second["evaluations"]] == [12, 3]
    assert set(second["evaluations"][1]) == {"id", "task", "data", "settings", "metrics", "seconds", "versions"}
    assert str(tmp_path) not in (folder / "evaluation.json").read_text()
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_a_record_that_cannot_be_read_is_kept(clean):
    folder, base = clean("body")
    for content, message in [("{", "cannot be read"), ('{"format_version": 9, "evaluations": []}', "has format 9")]:
        (folder / "evaluation.json").write_text(content)
        with pytest.raises(CompressionError, match=message):
            evaluate_folder(folder, base=base, text=LINES, progress=False)
        assert (folder / "evaluation.json").read_text() == content


def test_code_in_the_folder_is_not_run(clean):
    folder, _ = clean("masked")
    code = folder / "modeling_compressed.py"
    kept = code.read_text()
    code.write_text("raise SystemExit('run')\n")
    try:
        assert evaluated(clean, "masked", text=LINES)
    finally:
        code.write_text(kept)


@pytest.mark.parametrize(
    "kind,options,message",
    [
        ("body", {}, "nothing to evaluate on; pass --text"),
        ("body", {"text": LINES, "data": "a.csv"}, "belong to a task; name it with --task"),
        ("body", {"text": LINES, "fine_tune": True}, "belong to a task"),
        ("body", {"text": LINES, "dtype": "int8"}, "dtype 'int8' is not one of float32"),
        ("body", {"text": LINES, "limit": 0}, "limit must be at least 1"),
        ("body", {"text": LINES, "base": None}, "'small' was made from 'base', which is not a Hub id; pass its folder"),
        ("body", {"text": LINES, "measures": ["speed"]}, "no measure 'speed'; known: perplexity"),
        ("body", {"text": LINES, "measures": ["perplexity"]}, "needs a language model, and RobertaModel is none"),
        ("causal", {"text": LINES, "measures": ["pseudo_perplexity"]}, "needs a masked language model, and GPT2LM"),
        ("masked", {"text": ["short"]}, "None of the 1 lines"),
        ("body", {"text": "nowhere.txt"}, "There is no evaluation text file 'nowhere.txt'"),
        ("body", {"text": "none"}, "cannot be 'none'"),
        ("body", {"task": "sst3"}, r"There is no task 'sst3'; known: .*squad, nanobeir\[:SET\]"),
        ("body", {"task": "sst2", "data": "x.csv"}, "is a RobertaModel, and sst2 needs a model ForSequenceClass"),
        ("classifier", {"task": "sst2", "data": "x.csv"}, "There is no data file 'x.csv'"),
        ("classifier", {"task": "squad", "data": "x.json"}, "squad needs a model ForQuestionAnswering"),
        ("body", {"task": "sst2", "data": "x.csv", "fine_tune": True}, "needs --train-data"),
        ("body", {"task": "sst2", "train_data": "x.csv"}, "Training data without --fine-tune"),
        ("body", {"task": "stsb", "fine_tune": True, "dtype": "bfloat16"}, "done in float32, not bfloat16"),
        ("body", {"text": LINES, "device": "cuda"}, "There is no device 'cuda' here"),
    ],
)
def test_wrong_requests(clean, kind, options, message):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(CompressionError, match=message):
        evaluated(clean, kind, **options)
    assert not (clean(kind)[0] / "evaluation.json").exists()


def test_another_model_is_no_base(made, tmp_path):
    folder, _ = made("body")
    with pytest.raises(CompressionError, match="is BERT, and 'small' is a compressed_roberta"):
        pair.find_pair(folder, made("masked")[1])
    other = save_base(tmp_path / "other", "roberta", "RobertaModel", num_hidden_layers=2)
    with pytest.raises(CompressionError, match="'other' has num_hidden_layers 2 in its config.json, and 'small' has 3"):
        pair.find_pair(folder, other)
    with pytest.raises(CompressionError, match="not a compressed folder"):
        pair.find_pair(other, folder)


def test_a_base_on_the_hub_is_found_by_the_report(made, monkeypatch):
    folder, base = made("body")
    report = json.loads((folder / "compression_report.json").read_text())
    asked = []

    def resolve(name, revision=None):
        asked.append((name, revision))
        config = json.loads((base / "config.json").read_text())
        return BaseCheckpoint(name, base, config, family_of(config))

    monkeypatch.setattr(pair, "resolve_base", resolve)
    contents = pair.inspect_folder(folder)
    for name, revision in [("me/base", None), ("base", "c0" * 20)]:
        changed = {**report, "base": {"name": name, "revision": revision}}
        monkeypatch.setattr(pair, "inspect_folder", lambda _, r=changed: replace(contents, report=r))
        pair.find_pair(folder)
        pair.find_pair(folder, revision="main")
        assert asked == [(name, revision), (name, "main")]
        asked.clear()


def test_missing_libraries_are_named_before_any_work(clean, monkeypatch):
    from hf_offline_compress.metrics import scores as metrics

    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(
        CompressionError, match="needs scikit-learn, which is not installed; the extra 'evaluate' has it"
    ):
        evaluated(clean, "classifier", task="sst2", data="x.csv")


# Processes and the command line


def test_processes_share_batches(monkeypatch):
    import accelerate.utils

    everyone = []
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: everyone[0] + mine)
    everyone.append([[(1, "b"), (3, "d")]])
    done = []
    found = Processes(0, 2).map(lambda item: done.append(item) or item, ["a", "b", "c", "d", "e"])
    assert done == ["a", "c", "e"] and found == ["a", "b", "c", "d", "e"]


def test_as_a_user_types_it(clean, tmp_path):
    folder, base = clean("masked")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    run = run_cli("evaluate", folder, "--base", base, "--text", tmp_path / "lines.txt", "--limit", 6)
    assert run.returncode == 0, run.stderr
    entries = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    assert [item["id"] for item in entries] == ["masked_perplexity:lines.txt", "agreement:lines.txt"]
    base_value, compressed_value = (entries[0]["metrics"][0][name] for name in ("base", "compressed"))
    shown = run.stdout.splitlines()[1].split()
    assert shown[:2] == ["masked_perplexity:lines.txt", "perplexity"] and shown[-1] == "lower"
    assert float(shown[2].replace(",", "")) == pytest.approx(base_value, rel=1e-3)
    assert float(shown[3].replace(",", "")) == pytest.approx(compressed_value, rel=1e-3)
    assert "perplexity: 100%" in run.stderr
    for wrong, message in [
        (["--epochs", 2], "Settings of training belong to --fine-tune"),
        (["--measure", "speed"], "no measure 'speed'"),
    ]:
        failed = run_cli("evaluate", folder, "--base", base, "--text", tmp_path / "lines.txt", *wrong)
        assert failed.returncode == 1 and message in failed.stderr and len(error_of(failed.stderr).splitlines()) == 1


def test_several_processes_find_the_same_as_one(clean, tmp_path):
    folder, base = clean("masked")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    options = {"text": tmp_path / "lines.txt", "batch_size": 3}
    alone = evaluate_folder(folder, base=base, progress=False, **options)
    (folder / "evaluation.json").unlink()
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--module", "hf_offline_compress", "evaluate", str(folder)]
    launch += ["--base", str(base), "--text", str(options["text"]), "--batch-size", "3", "--json", "--quiet"]
    run = run_python(*launch, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr[-2000:]
    printed = json.loads(run.stdout)["evaluations"]  # by one process only
    assert printed == json.loads((folder / "evaluation.json").read_text())["evaluations"]
    for one, two in zip(alone, printed, strict=True):
        assert one.to_dict()["settings"] == two["settings"] and one.to_dict()["data"] == two["data"]
        for first, second in zip(one.to_dict()["metrics"], two["metrics"], strict=True):
            assert first == {**second, "compressed": pytest.approx(second["compressed"], rel=1e-6)} | {
                "base": pytest.approx(second["base"], rel=1e-6)
            }
