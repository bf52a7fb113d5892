"""Calibration text and statistics: what is counted, what is left out, what is shared."""

import re

import pytest
import torch
from common import CORE, ONE_EACH, TEXTS, make_model, make_tokenizer

from hf_offline_compress import CompressionError, Objective, Recipe, Rule, compress, make_plan
from hf_offline_compress.architectures.stock import layout_of_config
from hf_offline_compress.measure.collect import measure
from hf_offline_compress.measure.inputs import collect
from hf_offline_compress.measure.sensitivity import PLAIN_TOKENS, measure_sensitivity
from hf_offline_compress.measure.statistics import Statistics
from hf_offline_compress.measure.texts import TOKENS, Batch, count_tokens, load_texts, make_batches, warn_of_overlap
from hf_offline_compress.solve.problems import LEAST_OFTEN, _position_shares
from hf_offline_compress.structures import LowRank


def matrices_of(model, *kinds):
    config = model.config.to_dict()
    layout = layout_of_config(config, type(model).__name__)
    return [m for m in layout.matrices if not kinds or m.kind in kinds]


def test_bundled_text():
    text = load_texts("bundled")
    assert len(text.texts) >= 400 and text.source == "bundled"
    assert all(20 <= len(passage.split()) <= 100 for passage in text.texts)
    assert len(set(text.texts)) == len(text.texts)
    assert len({word for passage in text.texts for word in passage.lower().split()}) > 5000


def test_sources(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("one\n\n  two  \n")
    text = load_texts(file)
    assert text.texts == ("one", "two") and text.source == "lines.txt"
    assert load_texts(["one", "two"]).sha256 == text.sha256
    assert load_texts(["one", "\ud800two \ud83d\ude00"]).texts == (
        "one",
        "\ufffdtwo \U0001f600",
    )  # halves of characters
    assert load_texts(None) is None and load_texts("none") is None


@pytest.mark.parametrize(
    "what,message", [([1, 2], "list of strings"), ([], "no usable line"), ("a/b.txt", "no calibration file")]
)
def test_sources_that_are_none(what, message):
    with pytest.raises(CompressionError, match=message):
        load_texts(what)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CompressionError, match=r"'empty.txt' has no usable line"):
        load_texts(tmp_path / "empty.txt")
    with pytest.raises(CompressionError, match=r"'binary.txt' is not UTF-8"):
        load_texts(str(tmp_path / "binary.txt"))


def test_data_sets(tmp_path, monkeypatch):
    import datasets

    made = datasets.Dataset.from_dict({"label": [0, 1], "sentence": ["a cat", "a dog"]})

    def load(name, config, split, streaming):
        assert (name, config, split, streaming) == ("me/pets", "small", "test", True)
        return made.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = load_texts("me/pets:small:test")
    assert text.texts == ("a cat", "a dog") and text.source == "me/pets:small:test"
    with pytest.raises(CompressionError, match="no data set of that name could be loaded"):
        load_texts("me/plants")


def test_masks_and_padding():
    batches, record = make_batches(
        load_texts(TEXTS), make_tokenizer("bert"), masked=True, positions=40, seed=0, batch_size=8
    )
    tokenizer = make_tokenizer("bert")
    ids = torch.cat([b.input_ids[b.attention_mask.bool()] for b in batches])
    assert record.tokens == len(ids) and record.texts == len(TEXTS)
    masked = ids == tokenizer.mask_token_id
    words = ~torch.isin(ids, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
    assert 0.08 < masked.sum() / words.sum() < 0.25
    assert (ids == tokenizer.cls_token_id).sum() == len(TEXTS)
    plain, record = make_batches(load_texts(TEXTS), make_tokenizer("bert"), masked=False, positions=40, seed=0)
    assert not any((b.input_ids == tokenizer.mask_token_id).any() for b in plain) and record.masked == 0


def test_size_and_seed():
    tokenizer = make_tokenizer("gpt2")
    text = load_texts("bundled")
    first, record = make_batches(text, tokenizer, masked=False, positions=40, seed=1)
    second, _ = make_batches(text, tokenizer, masked=False, positions=40, seed=1)
    other, _ = make_batches(text, tokenizer, masked=False, positions=40, seed=2)
    assert TOKENS <= record.tokens < TOKENS + 40
    assert all(a.input_ids.equal(b.input_ids) for a, b in zip(first, second, strict=True))
    assert not all(
        a.input_ids.shape == b.input_ids.shape and a.input_ids.equal(b.input_ids)
        for a, b in zip(first, other, strict=False)
    )


@pytest.mark.parametrize(
    "model_type,head",
    [c for c in dict.fromkeys((*CORE, *ONE_EACH)) if "Choice" not in c[1] and "DoubleHeads" not in c[1]],
)
def test_moments_are_those_of_the_inputs(model_type, head):
    model = make_model(model_type, head)
    ids = torch.randint(5, 60, (4, 10))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    wanted = [m for m in matrices_of(model) if not m.embedding]
    statistics = collect(model, wanted, [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])])
    assert set(statistics.input_moments) == {m.inputs for m in wanted}
    seen = {}
    for matrix in wanted:
        root = model.base_model if matrix.in_base else model
        root.get_submodule(matrix.module).register_forward_pre_hook(
            lambda module, args, name=matrix.inputs: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for name, moments in statistics.input_moments.items():
        x = seen[name][mask.bool()] if seen[name].dim() == 3 else seen[name]
        torch.testing.assert_close(moments, x.T @ x / len(x), atol=1e-4, rtol=1e-4)


def test_what_shares_inputs_is_measured_once():
    assert len({m.inputs for m in matrices_of(make_model("bert", "BertModel"), "query", "key", "value")}) == 3
    assert len({m.inputs for m in matrices_of(make_model("gpt2", "GPT2Model"), "query", "key", "value")}) == 3


@pytest.mark.parametrize("masked", [False, True])
def test_token_counts_are_of_all_texts(masked):
    tokenizer, texts = make_tokenizer("bert"), [*TEXTS, *(text.upper() for text in TEXTS)] * 200
    counts = count_tokens(load_texts(texts), tokenizer, masked=masked, positions=12, rows=90)
    windows = tokenizer(texts, truncation=True, max_length=12, return_overflowing_tokens=True)["input_ids"]
    ids = torch.tensor([i for window in windows for i in window])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    expected = torch.bincount(ids, 1 - 0.15 * masked * (~special).double(), minlength=90)
    expected[tokenizer.mask_token_id] += 0.15 * masked * (~special).sum()
    torch.testing.assert_close(counts.tokens, expected)
    assert len(ids) > TOKENS
    lengths = torch.tensor([len(sequence) for sequence in tokenizer(texts)["input_ids"]])
    assert counts.places.tolist() == [int((lengths > place).sum()) for place in range(int(lengths.max()))]


def test_long_lines_are_cut_into_windows_and_not_truncated():
    tokenizer = make_tokenizer("bert")
    words = [token for token in tokenizer.get_vocab() if token.isalpha()][:20]
    line = " ".join(words * 900)  # of far more characters than are tokenized at once
    batches, record = make_batches(load_texts([line]), tokenizer, masked=False, positions=40, seed=0)
    assert record.texts > 100 and all(batch.input_ids.shape[1] <= 40 for batch in batches)
    counts = count_tokens(load_texts([line]), tokenizer, masked=False, positions=40, rows=len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(words)
    assert counts.tokens[ids].tolist() == [900.0] * 20
    assert len(counts.places) == len(tokenizer(line)["input_ids"])


@pytest.mark.parametrize("rows,positions", [(40, 40), (42, 40), (40, None)])
def test_positions_count_by_how_many_texts_reach_them(rows, positions):
    statistics = Statistics(place_counts=torch.tensor([100.0, 100.0, 50.0]).double(), positions=positions)
    first = rows - (positions or rows)
    shares = _position_shares(rows, statistics)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[first]) == float(shares[first + 1]) > float(shares[first + 2]) > float(shares[-1]) > 0
    least = LEAST_OFTEN / (1 + LEAST_OFTEN) * float(shares[first])  # longer texts than were seen must stay readable
    assert shares[first + 3 :].tolist() == pytest.approx([least] * (rows - first - 3))


def test_words_that_are_compressed_are_counted_and_recorded():
    texts = [text for text in TEXTS for _ in range(900)]
    for modules, counted in (("word_embeddings", True), ("query", False)):
        result = compress(
            make_model("bert", "BertModel"),
            "calibrated-svd",
            modules=modules,
            calibration=texts,
            tokenizer=make_tokenizer("bert"),
            progress=False,
        )
        record = result.report.calibration
        assert (record["counted"] > record["tokens"] > 0) if counted else record["counted"] == 0


def test_no_hook_stays():
    model = make_model("bert", "BertModel")
    collect(model, matrices_of(model), [Batch(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_texts_as_long_as_the_model_is_wide():
    """A pooler sees [sequences, width], which then looks like [sequences, length]."""
    model = make_model("bert", "BertModel")
    ids = torch.randint(5, 60, (4, model.config.hidden_size))
    batch = Batch(ids, torch.ones_like(ids))
    (pooler,) = (matrix for matrix in matrices_of(model) if matrix.kind == "pooler")
    moments = collect(model, [pooler], [batch]).input_moments[pooler.inputs]
    with torch.no_grad():
        first = model(input_ids=ids).last_hidden_state[:, 0]
    torch.testing.assert_close(moments, first.T @ first / len(first), atol=1e-4, rtol=1e-4)
    sensitivity = measure_sensitivity(model, [pooler], [batch], mask_token=None, seed=0)
    assert sensitivity.output_moments[pooler.name].shape == moments.shape


def test_texts_may_be_a_generator():
    assert load_texts(text for text in ("one", "two")).texts == ("one", "two")


@pytest.mark.parametrize("model_type,masked", [("bert", True), ("gpt2", False)])
@pytest.mark.parametrize("texts", [["the cat sat"], ["dog"] * 40, TEXTS[:3]])
def test_too_little_text(texts, model_type, masked):
    with pytest.raises(CompressionError, match=r"has \d+ tokens, and needs 256 at least.*pass more text"):
        make_batches(load_texts(texts), make_tokenizer(model_type), masked=masked, positions=40, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_token_is_always_masked(seed):
    tokenizer = make_tokenizer("bert")
    batches, _ = make_batches(
        load_texts(["cat"] * 150 + ["dog"] * 150), tokenizer, masked=True, positions=40, seed=seed, batch_size=1
    )
    assert all((batch.input_ids == tokenizer.mask_token_id).any() for batch in batches)


@pytest.mark.parametrize(
    "texts,model_type,message",
    [
        (TEXTS, "bert", r"has only \d+ tokens: below 4,000"),
        (["cat " * 30] * 20, "bert", "is one line over and over"),
        (["cat " * 30, "cat " * 31] * 10, "bert", "is mostly one word, 'cat'"),
        (["[SEP] [CLS] " * 10, "[SEP] [SEP]"] * 20, "bert", "is mostly special tokens"),
        (["<|endoftext|>" * 20, "<|endoftext|>" * 9] * 20, "gpt2", "is mostly special tokens"),
        ([f'{{"id": {i}, "text": "{text}"}}' for i, text in enumerate(TEXTS)], "bert", "looks like JSON lines"),
        ([f"{i},{text},yes" for i, text in enumerate(TEXTS)], "bert", r"looks like a table \(CSV\)"),
        ([f"{i}\t{text}" for i, text in enumerate(TEXTS)], "bert", r"looks like a table \(CSV\)"),
    ],
)
def test_text_that_is_hardly_one(texts, model_type, message, caplog):
    text = load_texts(texts)
    make_batches(text, make_tokenizer(model_type), masked=model_type == "bert", positions=40, seed=0)
    assert any(re.search(message, line) for line in caplog.messages), caplog.messages


def test_text_that_is_one(caplog):
    load_texts("bundled")
    load_texts(list(load_texts("bundled").texts))
    assert not caplog.messages


def test_validation_text_that_was_calibrated_on(caplog):
    texts = load_texts(TEXTS)
    warn_of_overlap(texts, load_texts(["another cat", *TEXTS[:3]], "validation"))
    assert "is part of the calibration text" in caplog.text
    caplog.clear()
    warn_of_overlap(texts, load_texts(["another cat", TEXTS[0], "and one more"], "validation"))
    assert not caplog.messages


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2Model"])
def test_a_padding_token_that_only_the_tokenizer_has(head, tmp_path):
    """As GPT-2's usually is: it is for padding alone, and no row of the embedding is needed for it."""
    model, tokenizer = make_model("gpt2", head), make_tokenizer("gpt2")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.config.pad_token_id = tokenizer.pad_token_id
    assert tokenizer.pad_token_id == model.config.vocab_size
    texts = [*TEXTS, "the cat sat on a mat . " * 3]
    result = compress(model, "balanced", max_loss=0.9, calibration=texts, tokenizer=tokenizer, progress=False)
    result.save(tmp_path / "out")
    with pytest.raises(CompressionError, match=r"tokens .* that the model does not have.*'\[PAD\]' is number"):
        compress(model, calibration=[text + " [PAD]" for text in TEXTS], tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("model_type,head", [("bert", "BertForPreTraining"), ("gpt2", "GPT2LMHeadModel")])
def test_logits_are_not_computed_for_the_inputs_of_a_tied_head(model_type, head):
    model = make_model(model_type, head).eval()
    outputs, seen, widths = model.get_output_embeddings(), [], []
    batch = Batch(torch.randint(5, 40, (3, 7)), torch.ones(3, 7, dtype=torch.long))
    with torch.no_grad():
        handle = outputs.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    outputs.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    words = matrices_of(model, "word_embeddings")
    moments = collect(model, words, [batch], tied=True).input_moments[words[0].inputs]
    assert widths == [1]
    torch.testing.assert_close(moments, seen[0].T @ seen[0] / 21, rtol=1e-4, atol=1e-6)
    again = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert torch.equal(again[0], expected[0]) and widths[1] == model.config.vocab_size


def test_inputs_weigh_as_the_gradients_at_all_outputs_that_share_them():
    model = make_model("bert", "BertForMaskedLM")
    wanted = [m for m in matrices_of(model, "query", "key", "output", "word_embeddings") if m.layer in (1, None)]
    ids, mask = torch.randint(5, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    ids[:, ::3], mask[1, 7:] = 4, 0
    batches = [Batch(ids, mask), Batch(ids.flip(0), mask)]  # one portion each, of which the first is used
    plain = collect(model, wanted, batches, tied=True).input_moments
    seen = {}

    def watch(name):
        def hook(module, args, output):
            def backward(gradient):
                seen[name] = args[0].detach(), gradient

            output.register_hook(backward)

        return hook

    def at_head(module, args, logits):
        p = logits.detach().softmax(dim=-1)
        seen[words.name] = args[0].detach(), (ids == 4)[..., None] * (1 - p.square().sum(dim=-1, keepdim=True)).sqrt()

    (words,) = (m for m in wanted if m.embedding)
    handles = [model.base_model.get_submodule(m.module).register_forward_hook(watch(m.name)) for m in wanted[1:]]
    handles.append(model.get_output_embeddings().register_forward_hook(at_head))
    moments = {name: moment.clone() for name, moment in plain.items()}
    measure_sensitivity(model, wanted, batches, mask_token=4, seed=0, input_moments=moments)
    for handle in handles:
        handle.remove()
    mask = mask.bool()
    for name in moments:
        sharing = [m for m in wanted if m.inputs == name]
        total = PLAIN_TOKENS * plain[name]
        for matrix in sharing:
            x, gradient = seen[matrix.name]
            weights = gradient[mask].square().sum(dim=1)
            total += torch.einsum("t,ti,tj->ij", weights / weights.mean(), x[mask], x[mask]) / len(sharing)
        torch.testing.assert_close(moments[name], total / (PLAIN_TOKENS + mask.sum()))
    assert {m.inputs for m in wanted} == moments.keys() and len(moments) == 3 and wanted[0] is words


def test_what_is_calibrated_alone_sees_the_inputs_as_they_are():
    """Also where the inputs are those of a matrix whose objective is sensitive."""
    model = make_model("bert", "BertForMaskedLM", layers=1)
    calibrated, sensitive = (Objective(l2=1.0, calibrated=True, sensitive=each) for each in (False, True))
    found = []
    for objective in (calibrated, sensitive):
        rules = (Rule(LowRank(), objective, modules=("query", "output")), Rule(LowRank(), calibrated, modules=("key",)))
        plan = make_plan(model.config.to_dict(), Recipe("x", rules, modules=("query", "key", "output")))
        options = {"seed": 0, "batch_size": None, "progress": False}
        found.append(measure(model, plan, load_texts(TEXTS), make_tokenizer("bert"), **options)[0].input_moments)
    same = {name: torch.equal(moment, found[1][name]) for name, moment in found[0].items()}
    assert len(same) == 2 and sorted(same.values()) == [False, True]
    assert same[next(m.inputs for m in plan.layout.matrices if m.kind == "key")]
