"""Compressed folders under accelerate and in other libraries' hands: too little memory, dtypes, pipelines, encoders."""

import json

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from common import TEXTS, make_model, make_tokenizer, nonlinear, outputs_of, save_base
from processes import run_python
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForTokenClassification

from hf_offline_compress import Grouping, Objective, Recipe, Rule, compress
from hf_offline_compress.structures import Codebook, LowRank, Quantized

COSINE = Objective(cosine=1.0)
RECIPES = {
    "low_rank": Recipe("shared", (Rule(LowRank(), grouping=Grouping(None), ratio=2.0),)),
    "autoencoder": Recipe("decoded", (Rule(nonlinear(), COSINE, Grouping(None), ratio=1.5),)),
    "quantized": Recipe("packed", (Rule(Quantized(), ratio=4.0),)),
    "codebook": Recipe("tables", (Rule(Codebook(), ratio=4.0),), modules=("linears",)),
}
LMS = {
    "BertForMaskedLM": ("bert", AutoModelForMaskedLM),
    "RobertaForMaskedLM": ("roberta", AutoModelForMaskedLM),
    "GPT2LMHeadModel": ("gpt2", AutoModelForCausalLM),
}
CASES = [
    ("BertForMaskedLM", "low_rank"),
    ("BertForMaskedLM", "quantized"),
    ("RobertaForMaskedLM", "autoencoder"),
    ("GPT2LMHeadModel", "autoencoder"),
    ("GPT2LMHeadModel", "codebook"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return head, recipe → folder, model in memory."""
    known = {}

    def make(head, recipe, **options):
        key = (head, recipe, *options.items())
        if key not in known:
            model_type, _ = LMS[head]
            folder = tmp_path_factory.mktemp("accelerated")
            base = save_base(folder / "base", model_type, head)
            result = compress(base, RECIPES[recipe], calibration=None, progress=False)
            known[key] = (result.save(folder / "small", **options), result.model)
        return known[key]

    return make


def bytes_of(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))  # what is tied counts once


@pytest.mark.parametrize("head,recipe", CASES)
@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_auto_offloads_to_disk_what_has_no_room(saved, tmp_path, head, recipe, shard):
    folder, expected = saved(head, recipe, max_shard_size=shard)
    model = LMS[head][1].from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": int(0.7 * bytes_of(expected))},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in model.hf_device_map.values() and "cpu" in model.hf_device_map.values()
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert offloaded
    for _ in range(2):  # what is fetched from disk for a pass is dropped after it
        torch.testing.assert_close(outputs_of(model, head), outputs_of(expected, head), atol=1e-5, rtol=0)
    again = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert set(offloaded) <= again


def test_what_is_placed_as_a_whole_is_a_layer(saved):
    _, model = saved("BertForMaskedLM", "low_rank")
    places = infer_auto_device_map(model, {"cpu": int(0.7 * bytes_of(model)), "disk": 10**9})
    assert model._no_split_modules  # the stock class's, which know compressed layers as well
    assert not any(name.endswith((".left", ".latents")) for name in places)


@pytest.mark.parametrize("head,recipe", CASES)
def test_float16(saved, head, recipe):
    folder, expected = saved(head, recipe)
    model = LMS[head][1].from_pretrained(folder, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    found, wanted = outputs_of(model, head), outputs_of(expected, head)
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.99
    assert AutoModel.from_pretrained(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("recipe", ["low_rank", "quantized"])
def test_fill_mask_says_what_the_model_says(saved, recipe):
    folder, model = saved("BertForMaskedLM", recipe)
    fill = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    found = fill("the cat [MASK] home .", top_k=3)
    tokenizer = make_tokenizer("bert")
    encoded = tokenizer("the cat [MASK] home .", return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits[0, encoded["input_ids"][0].tolist().index(tokenizer.mask_token_id)]
    values, ids = logits.softmax(-1).topk(3)
    assert [item["token"] for item in found] == ids.tolist()
    assert [item["score"] for item in found] == pytest.approx(values.tolist(), rel=1e-4)


def test_text_generation_says_what_the_model_says(saved):
    folder, model = saved("GPT2LMHeadModel", "autoencoder")
    options = {"max_new_tokens": 6, "do_sample": False}
    generate = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    tokenizer = make_tokenizer("gpt2")
    ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, pad_token_id=0, **options)[0], skip_special_tokens=True)
    assert generate("the cat sat", **options) == [{"generated_text": expected}]


def test_features_are_the_bodys_states(saved):
    folder, model = saved("RobertaForMaskedLM", "autoencoder")
    (found,) = transformers.pipeline("feature-extraction", model=str(folder), device="cpu")(TEXTS[0])
    with torch.no_grad():
        expected = model.base_model(**make_tokenizer("roberta")(TEXTS[0], return_tensors="pt"))[0][0]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def test_a_pipeline_of_an_offloaded_model(saved, tmp_path):
    folder, expected = saved("BertForMaskedLM", "quantized")
    options = {"max_memory": {"cpu": int(0.7 * bytes_of(expected))}, "offload_folder": tmp_path / "offload"}
    fill = transformers.pipeline("fill-mask", model=str(folder), device_map="auto", model_kwargs=options)
    whole = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    assert "disk" in fill.model.hf_device_map.values()
    for one, two in zip(fill("the [MASK] sat"), whole("the [MASK] sat"), strict=True):
        assert one["token"] == two["token"] and one["score"] == pytest.approx(two["score"], rel=1e-4)


def test_accelerate_prepares_a_model_for_training(saved):
    from accelerate import Accelerator

    folder, _ = saved("BertForMaskedLM", "low_rank")
    accelerator = Accelerator(cpu=True)
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor([[5, 9, 30, 41]])
    before = model(input_ids=ids, labels=ids % 3).loss
    accelerator.backward(before)
    optimizer.step()
    assert model.eval()(input_ids=ids, labels=ids % 3).loss < before


ENCODE = """
import json, sys
import hf_offline_compress
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
found = model.encode(json.loads(sys.argv[2]), batch_size=2)
print(json.dumps([type(model[0].model).__name__, [type(part).__name__ for part in model], found.tolist()]))
"""


def test_a_sentence_encoder_stays_one(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    make_model("bert", "BertModel").save_pretrained(tmp_path / "body")
    make_tokenizer("bert").save_pretrained(tmp_path / "body")
    body = Transformer(str(tmp_path / "body"))
    SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu").save(str(tmp_path / "base"))
    result = compress(tmp_path / "base", RECIPES["low_rank"], calibration=None, progress=False)
    folder = result.save(tmp_path / "small")
    run = run_python("-c", ENCODE, folder, json.dumps(TEXTS[:5]))
    assert run.returncode == 0, run.stderr[-2000:]
    name, parts, found = json.loads(run.stdout.splitlines()[-1])
    assert name == "CompressedBertModel" and parts == ["Transformer", "Pooling", "Normalize"]
    tokenizer = make_tokenizer("bert")
    for text, embedding in zip(TEXTS[:5], found, strict=True):
        with torch.no_grad():
            pooled = result.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(pooled, dim=0)
        torch.testing.assert_close(torch.tensor(embedding), expected, atol=1e-5, rtol=0)
