"""Vocabularies are pruned exactly: what is made of kept tokens stays as it was, in tokenizer, config and weights."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from common import WORDS, make_model, make_tokenizer
from processes import run_cli
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_offline_compress
from hf_offline_compress import CompressionError, load_recipe
from hf_offline_compress.evaluate import TextSettings
from hf_offline_compress.foundation.processes import ALONE
from hf_offline_compress.measure.texts import CalibrationText
from hf_offline_compress.metrics.perplexity import causal_perplexity
from hf_offline_compress.metrics.shared_units import byte_perplexity, shared_word_lines
from hf_offline_compress.request.vocabulary import vocabulary_of
from hf_offline_compress.vocabulary import prune_vocabulary
from hf_offline_compress.vocabulary.byte_bpe import ByteBPE
from hf_offline_compress.vocabulary.scripts import scripts_of
from hf_offline_compress.vocabulary.selection import covering_tokens, lasting_tokens, tokens_of_size
from hf_offline_compress.vocabulary.tokenizer_json import fixed_ids, numbered, pruned_tokenizer, token_model

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
STEMS = {
    "en": "the small house stands near an old river where children play and dogs run after birds through long green grass",
    "de": "das kleine Haus steht nahe einem alten Fluss während Kinder über große Wiesen laufen und Vögel schöner singen",
    "ru": "маленький дом стоит у старой реки где дети играют и собаки бегут за птицами через длинную зелёную траву",
    "zh": "小房子在老河边孩子们玩耍狗追着鸟跑过长长的绿草地天空很蓝太阳很大月亮很圆",
}


def lines(language, count=400, seed=0):
    """Return sentences of a language, with words that are made of others, and some marks."""
    generator = random.Random(f"{language}{seed}")
    stems = list(STEMS[language]) if language == "zh" else STEMS[language].split()
    join = "" if language == "zh" else " "
    found = []
    for _ in range(count):
        words = [generator.choice(stems) for _ in range(generator.randint(3, 14))]
        words = [w + generator.choice(stems).lower() if generator.random() < 0.3 else w for w in words]
        found.append(join.join(words).capitalize() + generator.choice([".", "!", "?", ", 1984.", " – so!"]))
    return found


def everything():
    return [line for language in STEMS for line in lines(language)]


def trained(kind):
    """Return a tokenizer of several languages, with special tokens of which one stands behind the others."""
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIALS[:4], show_progress=False)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=1500, special_tokens=SPECIALS[:4], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1500, special_tokens=SPECIALS[:4], initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(everything(), trainer)
    tokenizer.add_special_tokens(SPECIALS[4:])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["WordPiece", "Unigram", "BPE"])
def tokenizer(request):
    return trained(request.param)


def pruned(tokenizer, texts, coverage=1.0, size=None):
    """Return the pruned tokenizer and the ids that stayed."""
    content = json.loads(tokenizer.to_str())
    model, scripts = token_model(content, "base"), scripts_of(texts)
    counts = Counter(i for e in tokenizer.encode_batch(texts, add_special_tokens=False) for i in e.ids)
    lasting = lasting_tokens(model, fixed_ids(content), scripts)
    if size is None:
        kept = covering_tokens(model, counts, lasting, coverage)
    else:
        kept = tokens_of_size(model, counts, lasting, scripts, size)
    return Tokenizer.from_str(json.dumps(pruned_tokenizer(content, model, kept))), kept


def test_text_of_kept_tokens_is_cut_as_before(tokenizer):
    new, kept = pruned(tokenizer, lines("de"))
    numbers = numbered(kept)
    assert len(kept) < 0.7 * tokenizer.get_vocab_size()
    unseen = lines("de", 2000, seed=1) + [f"<mask> {line} </s>" for line in lines("de", 50, seed=2)]
    whole = 0
    for before, after in zip(tokenizer.encode_batch(unseen), new.encode_batch(unseen), strict=True):
        if set(before.ids) <= kept:
            whole += 1
            assert after.tokens == before.tokens
            assert after.ids == [numbers[i] for i in before.ids]
            assert after.offsets == before.offsets
    assert whole > 1000


def test_other_text_falls_back(tokenizer):
    new, kept = pruned(tokenizer, lines("en"))
    kind = json.loads(tokenizer.to_str())["model"]["type"]
    unknown = new.token_to_id("<unk>")
    for language in STEMS:
        texts = lines(language, 200, seed=3)
        found = [i for encoded in new.encode_batch(texts) for i in encoded.ids]
        assert set(found) <= set(range(len(kept)))
        before = sum(len(encoded.ids) for encoded in tokenizer.encode_batch(texts))
        if language == "de":
            assert len(found) > before
            assert found.count(unknown) < 0.1 * len(found)
        if kind == "BPE":
            assert unknown not in found
            assert [new.decode(e.ids).strip() for e in new.encode_batch(texts[:20])] == texts[:20]
        elif language in ("ru", "zh"):
            assert found.count(unknown) > 0.1 * len(found)


def test_special_tokens_keep_their_places(tokenizer):
    new, kept = pruned(tokenizer, lines("en"))
    numbers = numbered(kept)
    for token in SPECIALS:
        assert new.token_to_id(token) == numbers[tokenizer.token_to_id(token)]
    assert new.token_to_id("<mask>") == len(kept) - 1
    assert new.encode("a", "b").tokens[0] == "<s>"
    assert new.encode("a", "b").ids.count(new.token_to_id("</s>")) == 2


def test_less_coverage_keeps_fewer_tokens(tokenizer):
    texts = lines("en")
    counts = Counter(i for e in tokenizer.encode_batch(texts, add_special_tokens=False) for i in e.ids)
    sizes = []
    for coverage in (1.0, 0.99, 0.9):
        _, kept = pruned(tokenizer, texts, coverage)
        covered = sum(count for number, count in counts.items() if number in kept)
        assert covered >= coverage * counts.total()
        sizes.append(len(kept))
    assert sizes == sorted(set(sizes), reverse=True)


def test_a_size_is_met_and_filled_with_the_script(tokenizer):
    texts = lines("en", 30)
    size = len(pruned(tokenizer, texts)[1]) + 60
    new, kept = pruned(tokenizer, texts, size=size)
    assert size - 5 <= len(kept) <= size
    added = {token for token in new.get_vocab() if len(token) > 4} - {
        token for e in tokenizer.encode_batch(texts) for token in e.tokens
    }
    text_of = token_model(json.loads(tokenizer.to_str()), "base").text_of
    assert added
    assert not any("а" <= letter <= "я" for token in added for letter in text_of(token))
    with pytest.raises(CompressionError, match="too small"):
        pruned(tokenizer, texts, size=10)


def test_merges_stay_with_all_that_they_go_through():
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd", "bc", "abc", "dd"])}
    merges = ["a b", "c d", "ab cd", "b c", "ab c"]
    model = ByteBPE({"type": "BPE", "vocab": vocabulary, "merges": merges})
    names = {number: token for token, number in vocabulary.items()}
    assert {names[i] for i in model.parts("abcd")} == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert {names[i] for i in model.parts("abc")} == {"a", "b", "c", "ab", "abc"}
    assert model.parts("dd") == set()  # no merge leads there
    kept = {vocabulary[token] for token in "abcd"} | model.parts("abc")
    found = model.pruned(numbered(kept))
    assert found["merges"] == ["a b", "ab c"]
    assert sorted(found["vocab"].values()) == list(range(len(kept)))


def wrapped(tokenizer):
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), cls_token="<s>", sep_token="</s>", **names
    )


def prune(tokenizer, config, texts, **asked):
    text = CalibrationText(tuple(texts), "caller")
    return prune_vocabulary(vocabulary_of("bundled", **asked), text, tokenizer, config, name="base")


def save_base(folder, tokenizer, model_type="bert", head="BertForMaskedLM", **options):
    whole = wrapped(tokenizer)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    model = make_model(model_type, head, vocab_size=len(whole) + 3, **ids, **options)
    model.save_pretrained(folder)
    whole.save_pretrained(folder)
    (folder / "vocab.txt").write_text("left\nfrom\nanother\nformat\n")
    return model, whole


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("bert", "BertForMaskedLM"),
        ("roberta", "RobertaModel"),
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
    ],
)
def test_the_model_says_the_same_of_kept_tokens(tokenizer, model_type, head):
    whole = wrapped(tokenizer)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if model_type == "llama":
        ids["tie_word_embeddings"] = False
    model = make_model(model_type, head, vocab_size=len(whole) + 3, **ids)
    if model.can_generate():
        model.generation_config.suppress_tokens = [whole.get_vocab()["<mask>"], whole.get_vocab()["<unk>"]]
    found = prune(whole, model.config.to_dict(), lines("de"))
    text = lines("de", 4)
    before = whole(text, return_tensors="pt", padding=True, truncation=True, max_length=32)
    with torch.no_grad():
        wanted = model(input_ids=before["input_ids"], attention_mask=before["attention_mask"])[0]
    removed = found.apply(model)
    after = found.tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=32)
    with torch.no_grad():
        said = model(input_ids=after["input_ids"], attention_mask=after["attention_mask"])[0]
    if head != "RobertaModel":
        wanted = wanted[..., list(found.rows)]
    mask = before["attention_mask"].bool()
    assert torch.allclose(said[mask], wanted[mask], atol=1e-5)
    assert removed > 0
    assert model.config.vocab_size == len(found.rows) == len(found.tokenizer)
    assert model.config.pad_token_id == found.tokenizer.pad_token_id == 1
    if model.can_generate():
        assert model.generation_config.suppress_tokens == [len(found.rows) - 1, 3]
        assert model.generate(after["input_ids"], max_new_tokens=3, do_sample=False).max() < len(found.rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a base, what was made of it, and the result."""
    base, out = tmp_path_factory.mktemp("base") / "base", tmp_path_factory.mktemp("out") / "out"
    base.mkdir()
    save_base(base, trained("Unigram"))
    (base / "generation_config.json").write_text('{"suppress_tokens": [1400]}')
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
    )
    (base / "modules.json").write_text(json.dumps(MODULES))
    result = hf_offline_compress.compress(
        base, "svd", modules="all", vocabulary=lines("de"), validation=None, progress=False
    )
    result.save(out)
    return base, out, result


def test_a_folder_has_the_pruned_vocabulary_alone(folders):
    base, out, result = folders
    record = json.loads((out / "compression_report.json").read_text("utf-8"))["vocabulary"]
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModel.from_pretrained(out)
    config = AutoConfig.from_pretrained(out)
    assert len(tokenizer) == record["tokens"] == config.vocab_size < record["tokens_before"]
    assert record["rows_before"] == record["tokens_before"] + 3
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert not (out / "vocab.txt").exists()
    assert not (out / "generation_config.json").exists()
    text = lines("de", 3, seed=9)[0]
    whole = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize(text) == whole.tokenize(text)
    assert record["coverage_of"]["vocabulary"]["kept"] == 1.0
    assert record["coverage_of"]["vocabulary"]["growth"] == 1.0
    assert record["text"]["source"] == "caller"
    assert record["removed_parameters"] == (record["rows_before"] - record["rows"]) * 33  # a bias in the head
    card = (out / "README.md").read_text("utf-8")
    assert f"was pruned from {record['tokens_before']:,} tokens to {record['tokens']:,}" in card
    assert "--vocabulary TEXTS.txt" in card
    assert b"\n" not in (out / "tokenizer.json").read_bytes()
    stock = AutoModel.from_pretrained(base)
    assert stock.config.vocab_size == record["rows_before"]
    assert repr(result)


@pytest.mark.parametrize("form", ["checkpoint", "onnx"])
def test_exports_have_the_pruned_vocabulary_too(folders, tmp_path, form):
    base, out, _ = folders
    options = {"weights": "float32"} if form == "onnx" else {}
    exported = hf_offline_compress.export_folder(out, tmp_path / form, format=form, **options)
    before, after = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(exported)
    config = AutoConfig.from_pretrained(exported)
    assert (exported / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert config.model_type == "bert"
    assert config.vocab_size == len(after) == len(before)
    assert config.pad_token_id == after.pad_token_id
    assert json.loads((exported / "modules.json").read_text("utf-8")) == MODULES
    assert (exported / "1_Pooling" / "config.json").is_file()
    assert not (exported / "vocab.txt").exists()
    text = lines("de", 2, seed=9)
    feeds = after(text, return_tensors="pt", padding=True, truncation=True, max_length=32)
    with torch.no_grad():
        wanted = AutoModelForMaskedLM.from_pretrained(out)(**feeds).logits
    if form == "checkpoint":
        with torch.no_grad():
            said = AutoModelForMaskedLM.from_pretrained(exported)(**feeds).logits
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(exported / "onnx" / "model.onnx")
        names = [value.name for value in session.get_inputs()]
        said = torch.from_numpy(session.run(["logits"], {name: feeds[name].numpy() for name in names})[0])
        # It has no hidden states, and no predictions of the base's tokens: what can be measured is.
        asked = {
            "text": lines("de", 30, seed=5),
            "onnx": exported / "onnx/model.onnx",
            "write": False,
            "progress": False,
        }
        settings = TextSettings(min_tokens=5)
        (only,) = hf_offline_compress.evaluate_folder(out, base=base, text_settings=settings, **asked)
        assert [metric.name for metric in only.metrics] == ["perplexity per word"]
        with pytest.raises(
            CompressionError, match=r"Agreement .* cannot be measured: 'model.onnx' .* Choose perplexity"
        ):
            hf_offline_compress.evaluate_folder(out, base=base, measures=["agreement"], **asked)
    assert said.shape[-1] == len(after)
    assert torch.allclose(said, wanted, atol=1e-4)


def test_evaluations_compare_on_the_same_text(folders):
    base, out, _ = folders
    options = {"text_settings": TextSettings(min_tokens=5), "write": False, "progress": False}
    found = hf_offline_compress.evaluate_folder(out, base=base, text=lines("de", 30, seed=5), **options)
    by_name = {m.name: m for evaluation in found for m in evaluation.metrics}
    assert set(by_name) == {"perplexity per word", "cosine"}
    assert all(evaluation.settings["vocabularies"] == "different" for evaluation in found)
    assert by_name["perplexity per word"].base > 1
    with pytest.raises(CompressionError, match="was pruned"):
        hf_offline_compress.evaluate_folder(
            out, base=base, text=lines("de", 30, seed=5), measures=["pseudo_perplexity"], **options
        )


def test_perplexities_by_bytes_and_words_are_those_by_tokens():
    whole = wrapped(trained("BPE"))
    model = make_model("gpt2", "GPT2LMHeadModel", vocab_size=len(whole), bos_token_id=0, eos_token_id=2, pad_token_id=1)
    texts = lines("de", 20)
    options = {"block": 32, "stride": 16}
    plain = causal_perplexity(model, whole, texts, **options)
    found = byte_perplexity(model, whole, texts, **options, batch_size=4, progress=False, processes=ALONE)
    first = len(whole.decode(whole(texts[0], add_special_tokens=False)["input_ids"][:1]).encode())
    size = sum(len(text.encode()) + 1 for text in texts) - 1 - first
    assert found.tokens == size
    assert size * math.log(found.perplexity) == pytest.approx(plain.tokens * math.log(plain.perplexity), rel=1e-5)


def test_the_same_words_are_masked_whatever_their_tokens(tokenizer):
    whole = wrapped(tokenizer)
    small = prune(whole, {"model_type": "bert", "vocab_size": len(whole)}, lines("en")).tokenizer
    texts = lines("de", 40, seed=4)
    found, words = shared_word_lines(texts, [whole, small], seed=0, share=0.15, block=64, min_tokens=3)
    assert words > 30
    assert any(len(a) != len(b) for (a, _), (b, _) in zip(*found, strict=True))
    for (tokens, masked), (others, also) in zip(*found, strict=True):
        assert whole.decode(tokens[masked]).replace(" ", "") == small.decode(others[also]).replace(" ", "")


def test_a_model_in_memory_is_left_as_it_was():
    whole = wrapped(trained("WordPiece"))
    model = make_model("bert", "BertModel", vocab_size=len(whole), pad_token_id=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = hf_offline_compress.compress(
        model, "svd", modules="all", tokenizer=whole, vocabulary=lines("en"), vocabulary_size=700, progress=False
    )
    assert result.model.config.vocab_size == len(result.tokenizer) <= 700
    assert model.config.vocab_size == len(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_budgets_see_the_pruned_model(folders, tmp_path):
    base, _, _ = folders
    options = {"vocabulary": lines("en"), "vocabulary_size": 700, "calibration": None, "progress": False}
    result = hf_offline_compress.compress(base, "quantized", modules="all", total_ratio=3, **options)
    assert result.save(tmp_path / "out").is_dir()
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights <= result.report.totals["parameters"] * 4 / 3


def test_plan_and_compress_say_the_same(folders, tmp_path):
    base, _, _ = folders
    text = tmp_path / "kept.txt"
    text.write_text("\n".join(lines("en")), "utf-8")
    other = tmp_path / "other.txt"
    other.write_text("\n".join(lines("ru")), "utf-8")
    options = ["--recipe", "svd", "--vocabulary", text, "--vocabulary-coverage", 0.99, "--calibration", other]
    shown = json.loads(run_cli("plan", base, *options, "--json").stdout)
    assert shown["vocabulary"]["coverage"] == 0.99
    assert shown["vocabulary"]["text"]["source"] == "kept.txt"
    assert shown["recipe"]["vocabulary"] == {"text": "kept.txt", "coverage": 0.99}
    foreign = shown["vocabulary"]["coverage_of"]["calibration"]
    assert foreign["kept"] < 0.5
    assert foreign["unknown"] > 0.1
    result = hf_offline_compress.compress(
        base, "svd", vocabulary=text, vocabulary_coverage=0.99, calibration=None, progress=False
    )
    assert result.report.vocabulary["tokens"] == shown["vocabulary"]["tokens"]
    assert result.report.totals["stored_bytes"] == shown["total_stored_bytes"]


def test_what_cannot_be_pruned():
    whole = wrapped(trained("WordPiece"))
    config = make_model("bert", "BertModel", vocab_size=len(whole), pad_token_id=1).config.to_dict()
    with pytest.raises(CompressionError, match="does not know most of"):
        prune(whole, config, ["☃☃☃ ☃☃"])
    with pytest.raises(CompressionError, match="fewer than the 9,000 asked for"):
        prune(whole, config, lines("en"), size=9000)
    with pytest.raises(CompressionError, match="would stay"):
        prune(make_tokenizer("bert"), {**config, "vocab_size": 80}, all_words())
    with pytest.raises(CompressionError, match="no tokenizer"):
        prune(None, config, lines("en"))

    class Slow:
        is_fast = False

    with pytest.raises(CompressionError, match="no fast form"):
        prune(Slow(), config, lines("en"))
    levels = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(CompressionError, match="is a WordLevel"):
        prune(PreTrainedTokenizerFast(tokenizer_object=levels, unk_token="<unk>"), config, ["a"])


def all_words():
    """Return text that has all tokens of the small WordPiece tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [" ".join(WORDS), " ".join(letters), " ".join(f"{letter}{letters}" for letter in letters)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary_size": 5}, "needs the text"),
        ({"vocabulary": ["a"], "vocabulary_size": 5, "vocabulary_coverage": 0.5}, "either a size or a coverage"),
        ({"vocabulary": ["a"], "vocabulary_coverage": 1.5}, "above 0 and at most 1"),
        ({"vocabulary": [1]}, "must be texts"),
        ({"vocabulary": "none"}, "leave vocabulary out"),
        ({"vocabulary": ["a"], "vocabulary_size": 0}, "vocabulary_size"),
    ],
)
def test_wrong_options(changes, said):
    with pytest.raises(CompressionError, match=said):
        load_recipe("svd").override(**changes)


def test_recipes_name_their_vocabulary(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("vocabulary: {text: bundled, coverage: 0.999}\nrules: [{structure: low_rank}]\n")
    recipe = load_recipe(file)
    assert recipe.to_dict()["vocabulary"] == {"text": "bundled", "coverage": 0.999}
    assert recipe.override(vocabulary_size=9).to_dict()["vocabulary"] == {"text": "bundled", "size": 9}
    assert "vocabulary" not in load_recipe("svd").to_dict()
    file.write_text("vocabulary: {words: bundled}\nrules: [{structure: low_rank}]\n")
    with pytest.raises(CompressionError, match="unknown key 'words'"):
        load_recipe(file)
