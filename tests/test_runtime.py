"""Compressed models in use: dtypes, devices and offloading, shards, generation, training, resizing, pipelines."""

import copy
import json

import pytest
import torch
import transformers
from common import TEXTS, make_model, make_tokenizer, nonlinear, outputs_of
from inputs import inputs_for
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_offline_compress import Grouping, Objective, Recipe, Rule, compress
from hf_offline_compress.runtime import loading_compressed
from hf_offline_compress.structures import Autoencoder, Kronecker, LowRank, Quantized, Sparse, Training, Tucker

FEW = Training(epochs=3)
COSINE = Objective(cosine=1.0)
SHARED_AE = Rule(nonlinear(), COSINE, Grouping(None), ratio=1.5)
SHARED_RESIDUAL = Rule(Autoencoder(training=FEW), COSINE, Grouping(None), ratio=1.5)
SHARED_LOW_RANK = Rule(LowRank(), grouping=Grouping(None), ratio=2.0)
SHARED_TUCKER = Rule(Tucker(polish=0), grouping=Grouping(None), ratio=2.0)
# A sparse matrix and a quantized one have no decoder, so Kronecker, which has, stands beside them.
MIXED = (
    Rule(Sparse(), modules=("attention",), ratio=2.0),
    Rule(Kronecker(polish=0), grouping=Grouping(None), modules=("feed_forward",), ratio=2.0),
    Rule(Quantized(), ratio=4.0),
)
RECIPES = {
    "autoencoder": Recipe("ae", (SHARED_AE,)),
    "residual": Recipe("residual", (SHARED_RESIDUAL,)),
    "low_rank": Recipe("lr", (SHARED_LOW_RANK,)),
    "tucker": Recipe("tucker", (SHARED_TUCKER,), modules=("linears",)),
    "mixed": Recipe("mixed", MIXED),
}
FACTORS = ("latents", "norms", "left", "mixing", "values", "scales", "minima")
LMS = [("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM"), ("gpt2", "GPT2LMHeadModel")]
# RoBERTa has BERT's layers: what is asked of it is its own positions and head.
OF = {"bert": RECIPES, "gpt2": RECIPES, "roberta": ("mixed",)}
AUTO = {
    "BertForMaskedLM": AutoModelForMaskedLM,
    "RobertaForMaskedLM": AutoModelForMaskedLM,
    "GPT2LMHeadModel": AutoModelForCausalLM,
}


def made(model_type, head, recipe):
    return compress(make_model(model_type, head), RECIPES[recipe], tokenizer=make_tokenizer(model_type), progress=False)


@pytest.fixture(
    scope="module", params=[(*lm, r) for lm in LMS for r in RECIPES if r in OF[lm[0]]], ids=lambda p: f"{p[1]}-{p[2]}"
)
def saved(request, tmp_path_factory):
    model_type, head, recipe = request.param
    result = made(model_type, head, recipe)
    folder = result.save(tmp_path_factory.mktemp("runtime") / f"{head}-{recipe}")
    return folder, head, result


def layers_of(model):
    base = model.base_model
    return (base.h if hasattr(base, "h") else base.encoder.layer), ("h" if hasattr(base, "h") else "encoder.layer")


def test_bfloat16(saved, monkeypatch):
    folder, head, result = saved
    told = []
    monkeypatch.setattr(loading_compressed.logger, "warning_once", told.append)
    model = AUTO[head].from_pretrained(folder, dtype=torch.bfloat16)
    exact = result.model.compressed_modules()
    errors = [
        float((module.dense_weight().float() - (weight := exact[name].dense_weight())).norm() / weight.norm())
        for name, module in model.compressed_modules().items()
    ]
    assert told or max(errors) < 0.01
    assert len(told) == folder.name.endswith(("autoencoder", "residual"))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    expected = outputs_of(copy.deepcopy(result.model).to(torch.bfloat16), head)
    torch.testing.assert_close(outputs_of(model, head), expected, atol=1e-5, rtol=0)


def test_shards(saved, tmp_path):
    _, head, result = saved
    result.save(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    model = AUTO[head].from_pretrained(tmp_path / "shards")
    torch.testing.assert_close(outputs_of(model, head), outputs_of(result.model, head), atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoders", ["cpu", "disk"])
def test_a_layer_and_the_shared_decoders_on_disk(saved, tmp_path, decoders):
    folder, head, result = saved
    layers, path = layers_of(result.model)
    prefix = result.model.base_model_prefix
    top = {name for name, _ in result.model.named_children() if name != prefix}
    inside = {name for name, _ in result.model.base_model.named_children() if name != path.split(".")[0]}
    device_map = dict.fromkeys([*top, *(f"{prefix}.{name}" for name in inside)], "cpu")
    device_map |= {f"{prefix}.{path}.{i}": "disk" if i == 1 else "cpu" for i in range(len(layers))}
    device_map[f"{prefix}.compression_decoders"] = decoders
    model = AUTO[head].from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.device.type == "meta" for p in model.parameters())
    for _ in range(2):
        torch.testing.assert_close(outputs_of(model, head), outputs_of(result.model, head), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    again = AUTO[head].from_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs_of(again, head), outputs_of(result.model, head), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_maps_by_name(saved, device_map):
    folder, head, result = saved
    model = AUTO[head].from_pretrained(folder, device_map=device_map)
    torch.testing.assert_close(outputs_of(model, head), outputs_of(result.model, head), atol=1e-5, rtol=0)


def test_a_resaved_folder_stands_on_its_own(saved, tmp_path):
    folder, head, _ = saved
    AUTO[head].from_pretrained(folder).save_pretrained(tmp_path / "again")
    files = {file.name for file in (tmp_path / "again").iterdir()}
    assert {
        "modeling_compressed.py",
        "layers_compressed.py",
        "configuration_compressed.py",
        "substitution_compressed.py",
    } <= files
    assert (tmp_path / "again/model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["auto_map"] == second["auto_map"] and first["compression"] == second["compression"]
    assert f"modeling_compressed.Compressed{head}" in first["auto_map"].values()


def test_copies_keep_their_own_decoders(saved):
    _, head, result = saved
    duplicate = copy.deepcopy(result.model)
    expected = outputs_of(result.model, head)
    with torch.no_grad():
        for parameter in result.model.base_model.compression_decoders.parameters():
            parameter.mul_(1.7)
        changed = outputs_of(result.model, head)
        for parameter in result.model.base_model.compression_decoders.parameters():
            parameter.div_(1.7)
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(outputs_of(duplicate, head), expected)


def test_decoding_modes_agree_and_are_not_saved(saved, tmp_path):
    folder, head, _ = saved
    model = AUTO[head].from_pretrained(folder)
    cached = outputs_of(model, head)
    model.set_decoding("on_the_fly")
    torch.testing.assert_close(outputs_of(model, head), cached, atol=1e-5, rtol=0)
    assert not any(getattr(module, "_cache", None) for module in model.compressed_modules().values())
    model.save_pretrained(tmp_path / "fly")
    again = AUTO[head].from_pretrained(tmp_path / "fly")
    assert {module.decoding for module in again.compressed_modules().values()} == {"cached"}
    again = AUTO[head].from_pretrained(tmp_path / "fly", decoding="on_the_fly")
    assert {module.decoding for module in again.compressed_modules().values()} == {"on_the_fly"}
    with pytest.raises(ValueError, match="cached, on_the_fly"):
        model.set_decoding("sometimes")


def test_one_training_step_reaches_every_factor(saved):
    folder, head, _ = saved
    model = AUTO[head].from_pretrained(folder).train()
    before = outputs_of(model, head)
    model.train()
    inputs = inputs_for(head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in FACTORS or ("decoder" in name and "pooler" not in name):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    optimizer.step()
    after = outputs_of(model, head)
    assert not torch.allclose(before, after)
    model.set_decoding("on_the_fly")
    torch.testing.assert_close(outputs_of(model, head), after, atol=1e-5, rtol=0)


def test_gradient_checkpointing(saved):
    folder, head, _ = saved
    model = AUTO[head].from_pretrained(folder).train()
    model.gradient_checkpointing_enable()
    inputs = inputs_for(head)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.base_model.compression_decoders.parameters())


@pytest.mark.parametrize("size,multiple", [(400, None), (401, 8), (60, None)])
def test_resizing_the_vocabulary(saved, tmp_path, size, multiple):
    folder, head, _ = saved
    model = AUTO[head].from_pretrained(folder)
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        rows = model.config.vocab_size
        assert rows == (size if multiple is None else 408)
        after = model(ids).logits
    shared = min(rows, before.shape[-1])
    assert after.shape[-1] == rows
    torch.testing.assert_close(after[..., :shared], before[..., :shared], atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "resized")
    again, info = AUTO[head].from_pretrained(tmp_path / "resized", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, after, atol=1e-5, rtol=0)


def test_other_heads_and_the_body_load_from_the_same_folder(saved):
    folder, head, result = saved
    body = AutoModel.from_pretrained(folder)
    ids = inputs_for(head)
    with torch.no_grad():
        hidden = body.eval()(**ids)[0]
        torch.testing.assert_close(hidden, result.model.base_model(**ids)[0], atol=1e-5, rtol=0)
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert all(torch.isfinite(p).all() for p in other.parameters())
    assert len(other.compressed_modules()) == len(result.model.compressed_modules())


def test_a_model_from_its_config_alone_is_finite(saved):
    folder, head, _ = saved
    model = AUTO[head].from_config(transformers.AutoConfig.from_pretrained(folder))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(outputs_of(model, head)).all()
    assert all(module.dense_weight().std() > 0 for module in model.compressed_modules().values())


# Every structure is compiled as a layer in test_layers.py; here are what is applied as it is, in a tied head as well, shared
# decoders, fused layers, and positions that depend on padding.
@pytest.mark.parametrize(
    "model_type,recipe", [("bert", "low_rank"), ("bert", "autoencoder"), ("gpt2", "mixed"), ("roberta", "mixed")]
)
def test_compiled_in_one_graph(model_type, recipe):
    torch.compiler.reset()  # graphs of other models count against its limit
    head = dict(LMS)[model_type]
    model = made(model_type, head, recipe).model.eval()
    layers, _ = layers_of(model)
    del layers[1:]  # all are alike
    inputs = inputs_for(head)
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache(recipe, cache):
    model = made("gpt2", "GPT2LMHeadModel", recipe).model
    ids = torch.tensor([[5, 9, 30]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(ids, **options, **({"cache_implementation": cache} if cache else {}))
    assert with_cache.equal(model.generate(ids, use_cache=False, **options))
    assert with_cache.shape == (1, 11)


def test_pipelines(tmp_path):
    folder = made("bert", "BertForMaskedLM", "low_rank").save(tmp_path / "mlm")
    found = transformers.pipeline("fill-mask", model=str(folder))("the cat [MASK] home")
    assert len(found) == 5 and all(0 <= item["score"] <= 1 for item in found)
    folder = made("gpt2", "GPT2LMHeadModel", "low_rank").save(tmp_path / "lm")
    (text,) = transformers.pipeline("text-generation", model=str(folder))("the cat", max_new_tokens=3, do_sample=False)
    assert text["generated_text"].startswith("the cat")


def test_trainer_saves_and_resumes(tmp_path):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    result = made("bert", "BertForMaskedLM", "autoencoder")
    tokenizer = make_tokenizer("bert")
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS[:8]]
    collate = DataCollatorForLanguageModeling(tokenizer, seed=0)

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)

    trainer(result.model, 2).train()
    resumed = AutoModelForMaskedLM.from_pretrained(tmp_path / "run/checkpoint-2")
    torch.testing.assert_close(outputs_of(resumed, "BertForMaskedLM"), outputs_of(result.model, "BertForMaskedLM"))
    run = trainer(resumed, 4)
    run.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert run.state.global_step == 4


def test_configs_from_another_format_are_refused(saved, tmp_path):
    folder, _, _ = saved
    config = json.loads((folder / "config.json").read_text())
    config["compression"]["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"format 99 is newer than what this code reads"):
        transformers.AutoConfig.from_pretrained(tmp_path)
