"""Causal models as ONNX files with a cache: what torch says of a prompt, of the tokens after it, and of padded rows."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import HEADS, make_model, make_tokenizer
from test_onnx_families import RECIPE, distance, in_integers, session_of

from hf_offline_compress import compress, export_folder
from hf_offline_compress.architectures.families import FAMILIES, objective_of
from hf_offline_compress.export.dense import stock_model
from hf_offline_compress.export.onnx.model import onnx_models

CAUSAL = {mt: head for mt, head in HEADS if FAMILIES[mt].entry.causal and objective_of(head) == "causal"}
# Fused and transposed layers; rotary positions and grouped heads; local attention; positions with an offset; sliding windows;
# biases of queries; norms of heads; layers fused into one matrix.
TRIED = ("gpt2", "llama", "gpt_neo", "opt", "mistral", "qwen2", "qwen3", "phi3")
LAYERS = {"gpt_neo": 2}  # whose second one is local

PROMPTS = np.array([[5, 9, 30, 41, 52, 60, 8], [0, 0, 12, 60, 61, 7, 9]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
AFTER = (np.array([[11], [13]]), np.array([[17, 2], [19, 3]]))


class InOnnx:
    """A file, and the keys and values so far."""

    def __init__(self, session):
        self.session = session
        inputs = self.session.get_inputs()
        self.names = [value.name for value in inputs]
        self.past = {
            value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
            for value in inputs
            if value.name.startswith("past_key_values.")
        }

    def __call__(self, ids, mask, positions):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.past}
        found = self.session.run(None, {name: feeds[name] for name in self.names})
        names = [value.name for value in self.session.get_outputs()]
        self.past = {
            name.replace("present.", "past_key_values."): value
            for name, value in zip(names[1:], found[1:], strict=True)
        }
        assert names[0] == "logits"
        return found[0]


class InTorch:
    """A model, and its cache so far."""

    def __init__(self, model):
        self.model, self.past = model, None

    def __call__(self, ids, mask, positions):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        with torch.no_grad():
            out = self.model(**tensors, past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return out.logits.numpy()


def said(model):
    """Return the logits of the prompts, of a token after them, and of two more; of padding, none."""
    mask, parts = MASK, []
    for ids in (PROMPTS, *AFTER):
        if parts:
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        parts.append(model(ids, mask, positions)[mask[:, -ids.shape[1] :] == 1])
    return np.concatenate(parts)


@cache
def exported(model_type):
    base = make_model(model_type, CAUSAL[model_type], layers=LAYERS.get(model_type, 1))
    model = compress(base, RECIPE, tokenizer=make_tokenizer(model_type), progress=False).model.eval()
    stock = stock_model(model)
    return model, stock, onnx_models(model, stock, ("float32", "int8"), opset=18, cached=True)


@pytest.mark.parametrize("model_type", list(CAUSAL) if os.environ.get("EVERY_ONNX_HEAD") else TRIED)
def test_a_file_reads_a_prompt_and_goes_on_from_it(model_type):
    model, stock, files = exported(model_type)
    expected = said(InTorch(model))
    np.testing.assert_allclose(said(InOnnx(session_of(files["float32"]))), expected, atol=1e-4)
    found = said(InOnnx(session_of(files["int8"])))
    assert distance(found, said(InTorch(in_integers(stock, parts=2)))) < 5e-3
    assert distance(found, expected) > 1e-4  # really of integers


def test_inputs_and_outputs_are_named_as_loaders_ask_for_them():
    graph = exported("llama")[2]["int8"].graph
    shapes = {value.name: [str(axis) for axis in value.shape] for value in [*graph.inputs, *graph.outputs]}
    new, cache_axes = ["batch_size", "sequence_length"], ["batch_size", "2", "past_sequence_length", "8"]
    assert shapes == {
        "input_ids": new,
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": new,
        "past_key_values.0.key": cache_axes,
        "past_key_values.0.value": cache_axes,
        "logits": [*new, shapes["logits"][2]],
        "present.0.key": ["batch_size", "2", "total_sequence_length", "8"],
        "present.0.value": ["batch_size", "2", "total_sequence_length", "8"],
    }


def test_the_example_needs_no_torch_and_says_what_torch_generates(tmp_path):
    base = make_model("llama", "LlamaForCausalLM", layers=1)
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    result = compress(base, RECIPE, tokenizer=tokenizer, progress=False)
    result.save(tmp_path / "small")
    export_folder(tmp_path / "small", tmp_path / "out", format="onnx", weights="float32")
    assert (tmp_path / "out/generation_config.json").is_file()
    # where transformers.js looks for it, which else says nothing and asks the model without
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == tokenizer.chat_template
    prompt = "the cat sat on"
    block = "import sys, runpy; sys.modules['torch'] = sys.modules['transformers'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", block + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    example = Path(__file__).parent.parent / "examples/onnx_generate.py"
    done = subprocess.run(
        [*command, example, tmp_path / "out", prompt, "--tokens", "12"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    feeds = tokenizer(prompt, return_tensors="pt")
    ids = result.model.eval().generate(
        feeds["input_ids"], attention_mask=feeds["attention_mask"], max_new_tokens=12, do_sample=False
    )
    said_by_torch = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert done.stdout == said_by_torch + "\n" and len(said_by_torch) > len(prompt)
