"""Perplexity: that of a naive loop, whatever the batch; whole words masked; each token counted once."""

import math

import pytest
import torch
from common import TEXTS, WORDS, make_model, make_tokenizer
from torch.nn import functional as F

from hf_offline_compress import CompressionError, compress
from hf_offline_compress.metrics import perplexity as module
from hf_offline_compress.metrics.perplexity import causal_perplexity, masked_lines, masked_perplexity, perplexity

MASKED = [("bert", "BertForMaskedLM"), ("bert", "BertForPreTraining"), ("roberta", "RobertaForMaskedLM")]
CAUSAL = [("gpt2", "GPT2LMHeadModel"), ("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM")]
# Words that tokenizers cut in pieces, so that whole words differ from tokens.
LINES = [
    f"{text} zebra {WORDS[i % 18]} quixotic {text} = ostrich = {' '.join(WORDS[: i % 11])}"
    for i, text in enumerate(TEXTS)
]


def lines_of(tokenizer, texts=LINES, **options):
    return masked_lines(texts, tokenizer, **{"seed": 0, "share": 0.15, "block": 38, "min_tokens": 20, **options})


@pytest.mark.parametrize("model_type,head", MASKED)
def test_masked_as_a_naive_loop_says(model_type, head):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    result = perplexity(model, tokenizer, LINES, batch_size=7)
    losses = []
    for true, asked in lines_of(tokenizer, block=38 if model_type == "roberta" else 40):  # the models' positions
        for place in asked.nonzero()[:, 0].tolist():
            ids = torch.where(asked, tokenizer.mask_token_id, true)
            with torch.no_grad():
                output = model(input_ids=ids[None])
            losses.append(F.cross_entropy(output[0][0, place], true[place]).item())
    assert result.tokens == len(losses) and result.lines == len(LINES)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_words_are_masked_as_a_whole(model_type):
    tokenizer = make_tokenizer(model_type)
    lines = lines_of(tokenizer, block=100)
    pieces = 0
    for line, (true, asked) in zip(LINES, lines, strict=True):
        cleaned = " ".join(word for word in line.split() if word != "=")
        encoded = tokenizer(cleaned)
        assert encoded["input_ids"] == true.tolist()
        words = encoded.word_ids()
        assert not any(asked[i] for i, word in enumerate(words) if word is None)
        for word in set(words) - {None}:
            tokens = [bool(asked[i]) for i in range(len(words)) if words[i] == word]
            assert all(tokens) or not any(tokens)
            pieces += len(tokens) > 1 and all(tokens)
        assert 1 <= asked.sum() <= max(round(0.15 * (len(true) - 2)), 14)
    assert pieces > 5
    masked, tokens = sum(int(asked.sum()) for _, asked in lines), sum(len(true) - 2 for true, _ in lines)
    assert 0.11 < masked / tokens < 0.18


def test_masks_depend_on_text_and_seed_only():
    tokenizer = make_tokenizer("bert")
    first, again, other = lines_of(tokenizer), lines_of(tokenizer, LINES[:9]), lines_of(tokenizer, seed=1)
    assert all(a.equal(b) and x.equal(y) for (a, x), (b, y) in zip(first, again, strict=False))
    assert not all(x.equal(y) for (_, x), (_, y) in zip(first, other, strict=True))
    model = make_model("bert", "BertForMaskedLM")
    same = {masked_perplexity(model, tokenizer, LINES).perplexity for _ in range(2)}
    assert len(same) == 1 and masked_perplexity(model, tokenizer, LINES, seed=1).perplexity not in same


def test_lines_that_are_kept():
    tokenizer = make_tokenizer("bert")
    long, short = " ".join(["cat"] * 20), " ".join(["cat"] * 19)
    kept = lines_of(tokenizer, [f"= cat =\n{long}\n\n{short} =", f"{short}\r\n{long} dog ="])
    assert [len(true) for true, _ in kept] == [22, 23]
    assert [len(true) for true, _ in lines_of(tokenizer, [f"{long} {long}"], block=12, min_tokens=20)] == [12]


def test_unknown_words_are_not_asked_for():
    tokenizer = make_tokenizer("bert")
    line = " ".join(["cat", "§"] * 15)
    ((true, asked),) = lines_of(tokenizer, [line], share=1.0)
    assert asked.sum() == 15 and not asked[true == tokenizer.unk_token_id].any()


@pytest.mark.parametrize("model_type,head", CAUSAL)
@pytest.mark.parametrize("block,stride", [(24, 7), (1024, None), (16, 1), (2, 1)])
def test_causal_as_a_naive_loop_says(model_type, head, block, stride):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    texts = TEXTS[:8]
    result = perplexity(model, tokenizer, [*texts, " "], block=block, stride=stride, batch_size=3)
    between = {"bert": tokenizer.sep_token_id}.get(model_type, tokenizer.eos_token_id)
    ids = []
    for text in texts:
        ids += [between, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor(ids[1:])
    block = min(block, 38 if model_type == "roberta" else 40)
    stride = stride or block // 2
    losses = []
    for place in range(1, len(ids)):
        begin = max(0, math.ceil((place + 1 - block) / stride)) * stride  # the first window that has it
        with torch.no_grad():
            logits = model(input_ids=ids[None, begin:place]).logits[0, -1]
        losses.append(F.cross_entropy(logits, ids[place]).item())
    assert result.tokens == len(ids) - 1 == len(losses) and result.lines == 8
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("model_type,head", [MASKED[0], MASKED[2], CAUSAL[0]])
def test_batches_do_not_matter(model_type, head, monkeypatch):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    results = [perplexity(model, tokenizer, LINES, batch_size=size) for size in (1, 5, 64)]
    largest = 0

    def watch(module, args, output):
        nonlocal largest
        largest = max(largest, output[0].numel() * 4)

    model.register_forward_hook(watch)
    limit = 40 * model.config.vocab_size * 4 * 3  # three sequences of full length
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    monkeypatch.setattr(module, "PLACES_AT_ONCE", 3)
    results.append(perplexity(model, tokenizer, LINES, batch_size=64))
    assert 0 < largest <= limit
    assert len({result.tokens for result in results}) == 1
    for result in results:
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-5)


@pytest.mark.parametrize("model_type,head", [*MASKED, *CAUSAL])
def test_compressed_models_answer_the_same_questions(model_type, head):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    small = compress(model, "svd", ratio=3, calibration=None, tokenizer=tokenizer, progress=False).model
    base, compressed = (perplexity(m, tokenizer, LINES) for m in (model, small))
    assert type(small) is not type(model) and base.perplexity != compressed.perplexity
    assert (base.tokens, base.lines) == (compressed.tokens, compressed.lines)


def test_the_model_is_left_as_it_was():
    model = make_model("gpt2", "GPT2LMHeadModel").train()
    causal_perplexity(model, make_tokenizer("gpt2"), TEXTS[0])
    assert model.training and all(module.training for module in model.modules())


def test_hopeless_models_have_infinite_perplexity():
    model = make_model("gpt2", "GPT2LMHeadModel")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e6)
    assert causal_perplexity(model, make_tokenizer("gpt2"), TEXTS).perplexity == math.inf


@pytest.mark.parametrize(
    "model_type,head,texts", [("bert", "BertForMaskedLM", TEXTS[:5]), ("bert", "BertForMaskedLM", [])]
)
def test_texts_without_long_lines(model_type, head, texts):
    with pytest.raises(CompressionError, match=f"None of the {len(texts)} lines of the text has 20 tokens"):
        perplexity(make_model(model_type, head), make_tokenizer(model_type), texts)


@pytest.mark.parametrize("texts", [[], ["", "  "], ["."]])
def test_texts_without_two_tokens(texts):
    with pytest.raises(CompressionError, match=r"The text has [01] tokens"):
        perplexity(make_model("gpt2", "GPT2LMHeadModel"), make_tokenizer("gpt2"), texts)


@pytest.mark.parametrize(
    "model_type,head",
    [("bert", "BertModel"), ("gpt2", "GPT2DoubleHeadsModel"), ("roberta", "RobertaForSequenceClassification")],
)
def test_models_without_a_language_head(model_type, head):
    model, tokenizer = make_model(model_type, head), make_tokenizer(model_type)
    for measure in (perplexity, masked_perplexity, causal_perplexity):
        with pytest.raises(CompressionError, match=f"Perplexity needs a language model, and {head} has no"):
            measure(model, tokenizer, LINES)


def test_the_wrong_measure():
    masked, causal = make_model("bert", "BertForMaskedLM"), make_model("gpt2", "GPT2LMHeadModel")
    with pytest.raises(CompressionError, match="use causal_perplexity"):
        masked_perplexity(causal, make_tokenizer("gpt2"), LINES)
    with pytest.raises(CompressionError, match="use masked_perplexity"):
        causal_perplexity(masked, make_tokenizer("bert"), LINES)
    with pytest.raises(CompressionError, match="already sees the next token"):
        perplexity(make_model("bert", "BertLMHeadModel", is_decoder=False), make_tokenizer("bert"), LINES)


def test_wrong_settings():
    masked, causal = make_model("bert", "BertForMaskedLM"), make_model("gpt2", "GPT2LMHeadModel")
    with pytest.raises(CompressionError, match="share of masked tokens must be above 0"):
        perplexity(masked, make_tokenizer("bert"), LINES, share=0.0)
    with pytest.raises(CompressionError, match="no mask token"):
        perplexity(masked, make_tokenizer("gpt2"), LINES)
    for stride in (0, 40, 512):
        with pytest.raises(CompressionError, match=f"below the window's 40 tokens, not {stride}"):
            perplexity(causal, make_tokenizer("gpt2"), LINES, stride=stride)
