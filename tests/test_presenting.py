"""Calibration text is read as the model reads texts in use: with its prompts, in its chat template, with its own tokens."""

import json
import logging

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer, save_base
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import XLMRobertaTokenizer

from hf_offline_compress import compress
from hf_offline_compress.base.texts import languages_of, prompts_of
from hf_offline_compress.measure.presenting import foreign_share, presented, warn_of_languages
from hf_offline_compress.measure.texts import CalibrationText, count_tokens, load_texts, make_batches
from hf_offline_compress.metrics.perplexity import asked_logits, masked_perplexity

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
E5 = ("query: ", "passage: ")


def text_of(texts, source="caller"):
    return CalibrationText(tuple(texts), source)


def test_prompts_are_put_before_texts_in_turn_and_never_twice():
    text = text_of(["one", "passage: two", "three"])
    shown = presented(text, make_tokenizer("bert"), prompts=E5, chat=False)
    assert shown.read == ("query: one", "passage: two", "query: three")
    assert (shown.texts, shown.sha256, shown.prompts) == (text.texts, text.sha256, E5)
    some = presented(text_of("abcd"), make_tokenizer("bert"), prompts=("ask: ", ""), chat=False)
    assert some.read == ("ask: a", "b", "ask: c", "d")


@pytest.mark.parametrize("prompts,chat", [((), False), ((), True), (("",), False)])
def test_without_prompts_and_template_texts_are_read_as_they_are(prompts, chat):
    text = text_of(TEXTS)
    assert presented(text, make_tokenizer("gpt2"), prompts=prompts, chat=chat) is text


def test_half_of_the_texts_are_chats():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = TEMPLATE
    words = [str(i) for i in range(20)]
    shown = presented(text_of([" ".join(words)] * 4), tokenizer, prompts=(), chat=True)
    chat = f"<user>{' '.join(words[:12])}</user><assistant>{' '.join(words[12:])}</assistant>"
    assert shown.read == (" ".join(words), chat) * 2 and shown.chat == 0.5
    assert presented(text_of(["short"] * 2), tokenizer, prompts=(), chat=True).read[1].count("short") == 2
    assert presented(text_of(TEXTS), tokenizer, prompts=(), chat=False).read == ()


@pytest.mark.parametrize("adds", [True, False])
def test_a_chat_begins_once(adds):
    """A template writes the token that begins a text, which some tokenizers put there too."""
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = f"{{{{ bos_token }}}}{TEMPLATE}"
    if adds:
        pair = ("<|endoftext|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [pair])
    shown = presented(text_of(TEXTS), tokenizer, prompts=(), chat=True)
    assert tokenizer(shown.read[1])["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_template_that_wants_other_turns_is_passed_over(caplog):
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = "{{ raise_exception('A system message must come first') }}"
    text = text_of(TEXTS)
    assert presented(text, tokenizer, prompts=(), chat=True) is text
    assert "A system message must come first" in caplog.text


def test_a_sentence_encoder_is_calibrated_with_its_prompts(tmp_path):
    base = save_base(tmp_path / "base", "bert", "BertModel")
    plain = compress(base, "gptq", calibration=TEXTS, progress=False)
    prompts = {"query": "moon sun ", "document": "sun moon ", "again": "moon sun "}
    (base / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    told = compress(base, "gptq", calibration=TEXTS, progress=False)
    without = sum(not text.startswith(tuple(prompts.values())) for text in TEXTS)
    assert (
        told.report.calibration["prompts"] == ("moon sun ", "sun moon ") and plain.report.calibration["prompts"] == ()
    )
    assert told.report.calibration["tokens"] == plain.report.calibration["tokens"] + 2 * without
    assert told.report.calibration["sha256"] == plain.report.calibration["sha256"]


@pytest.mark.parametrize(
    "content,expected",
    [
        (None, ()),
        ({"prompts": {"query": "", "document": ""}}, ()),
        ({"prompts": {"query": "query: ", "document": 3, "long": "x" * 1000}}, ("query: ",)),
        ({"prompts": {"query": "query: ", "document": ""}}, ("query: ", "")),
        ({"prompts": ["query: "]}, ()),
    ],
)
def test_prompts_of_a_base(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(content))
    assert prompts_of(tmp_path) == expected


@pytest.mark.parametrize(
    "card,expected",
    [
        ("---\nlanguage: en\n---\n", ("en",)),
        ("---\nlanguage:\n- de\n- no\n- code\n---\n", ("de", "no")),
        ("---\nlanguage: Multilingual\n---\ntext", ("multilingual",)),
        ("---\nlicense: mit\n---\n", ()),
        ("---\nlanguage: [\n---\n", ()),
        ("language: de", ()),
        (None, ()),
    ],
)
def test_languages_of_a_base(card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert languages_of(tmp_path) == expected


def many_languages():
    """Return a tokenizer of XLM-RoBERTa's kind, whose padding is token 1, and whose mask is the last."""
    words = [
        "the",
        "cat",
        "sat",
        "кот",
        "сидел",
        "猫",
        "坐",
        "γάτα",
        "چه",
        "est",
        "dog",
        "mat",
        "moon",
        "sun",
        "red",
        "blue",
    ]
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in words)]
    vocab += [(letter, -5.0) for letter in "абвгдежзиклмнопрстуфхцчшщэюя▁abcdefghijklmnopqrstuvwxyz."]
    return XLMRobertaTokenizer(vocab=[*vocab, ("<mask>", 0.0)])


@pytest.mark.parametrize(
    "source,languages,tokenizer,said",
    [
        ("bundled", ("en",), many_languages, None),
        ("bundled", ("en-gb",), many_languages, None),
        ("bundled", ("en", "de"), make_tokenizer, "names de;"),
        ("bundled", ("multilingual",), make_tokenizer, "names multilingual;"),
        ("bundled", (), make_tokenizer, None),
        ("bundled", (), many_languages, "tokenizer covers other languages"),
        ("mine.txt", ("de",), many_languages, None),
    ],
)
def test_english_text_for_other_languages_is_told_in_one_line(source, languages, tokenizer, said, caplog):
    made = many_languages() if tokenizer is many_languages else make_tokenizer("bert")
    with caplog.at_level(logging.WARNING, "hf_offline_compress"):
        warn_of_languages(text_of(TEXTS, source), languages, made)
    assert len(caplog.records) == (said is not None)
    assert said is None or (said in caplog.text and "--calibration" in caplog.text)


def test_foreign_share_counts_letters_alone():
    assert foreign_share(many_languages()) > 0.1
    assert foreign_share(make_tokenizer("gpt2")) == foreign_share(make_tokenizer("bert")) == 0
    assert foreign_share(Wordless()) == 0


class Wordless:
    """A tokenizer of numbers alone."""

    def __len__(self):
        return 10

    def batch_decode(self, batch):
        return [str(i) for (i,) in batch]


def test_a_bert_takes_the_tokens_of_another_familys_tokenizer(tmp_path):
    """Its config says that 0 is padding, as BERT's is; in calibration, evaluation and card what the tokenizer says counts."""
    tokenizer = many_languages()
    begin, pad, mask = 0, 1, len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (begin, pad, mask)
    model = make_model("bert", "BertForMaskedLM", vocab_size=len(tokenizer))
    assert model.config.pad_token_id == 0
    text = load_texts(TEXTS)
    for batch in make_batches(text, tokenizer, masked=True, positions=40, seed=0)[0]:
        hidden = batch.attention_mask == 0
        assert (batch.input_ids[hidden] == pad).all() and not (batch.input_ids[~hidden] == pad).any()
        assert (batch.input_ids[:, 0] == begin).all() and (batch.input_ids == mask).any()
    counts = count_tokens(text, tokenizer, masked=True, positions=40, rows=len(tokenizer)).tokens
    assert counts[pad] == 0 and counts[mask] > 0 and counts[begin] >= len(TEXTS)

    seen = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    true = [torch.tensor([begin, 4, 5, 6, 2]), torch.tensor([begin, 4, 2])]
    list(asked_logits(model, tokenizer, [(ids, ids == 4) for ids in true], masked=True))
    assert seen[0]["input_ids"].tolist() == [[begin, mask, 5, 6, 2], [begin, mask, 2, pad, pad]]
    assert masked_perplexity(model, tokenizer, TEXTS, min_tokens=1).perplexity > 1
    handle.remove()

    folder = compress(model, "gptq", calibration=TEXTS, tokenizer=tokenizer, progress=False).save(tmp_path / "small")
    saved = XLMRobertaTokenizer.from_pretrained(folder)
    assert (saved.bos_token_id, saved.pad_token_id, saved.mask_token_id) == (begin, pad, mask)
    assert isinstance(saved.backend_tokenizer, Tokenizer) and isinstance(saved.backend_tokenizer.model, models.Unigram)
    assert isinstance(saved.backend_tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer)
    card = (folder / "README.md").read_text()
    assert "[MASK]" not in card and "[PAD]" not in card
