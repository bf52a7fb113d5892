"""Tiny models of every family and head, tokenizers for them, and helpers that several tests use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from inputs import inputs_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, RobertaTokenizer

from hf_offline_compress.families import FAMILIES
from hf_offline_compress.structures import Autoencoder, Training

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ran",
    "home",
    ".",
    "red",
    "blue",
    "sun",
    "moon",
    "walks",
    "over",
    "hills",
]
TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(6 + i % 9)) for i in range(60)]
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

QUICK = Training("epochs", epochs=2, batch_size=64)


def nonlinear(**changes: Any) -> Autoencoder:
    """Return the non-linear autoencoder of arXiv 2302.04045, trained for two epochs if not told otherwise."""
    options: dict[str, Any] = {"activation": "leaky_relu", "output_activation": "tanh", "training": QUICK, **changes}
    return Autoencoder(decoder="nonlinear", decoder_widths=(2, 4), **options)


HEADS = [(family.model_type, head) for family in FAMILIES.values() for head in family.heads]
SIZES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40},
}
SIZES["roberta"] = SIZES["bert"]


def make_tokenizer(model_type: str) -> Any:
    """Return a small tokenizer of the family's kind."""
    if model_type == "bert":
        letters = "abcdefghijklmnopqrstuvwxyz"
        tokens = [*BERT_SPECIALS, *letters, *(f"##{c}" for c in letters), *WORDS]
        return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ROBERTA_SPECIALS if model_type == "roberta" else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    content = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in content["merges"]]
    return (RobertaTokenizer if model_type == "roberta" else GPT2Tokenizer)(vocab=content["vocab"], merges=merges)


def make_model(model_type: str, head: str, seed: int = 0, **overrides: Any) -> Any:
    """Return a randomly initialised stock model, of weights larger than usual so that errors show."""
    tokenizer = make_tokenizer(model_type)
    options = {**SIZES[model_type], "vocab_size": len(tokenizer), **overrides}
    if model_type == "bert":
        options.setdefault("is_decoder", head == "BertLMHeadModel")
    if model_type == "roberta":
        options |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        options.setdefault("is_decoder", head == "RobertaForCausalLM")
    if model_type == "gpt2":
        options |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, {"bert": "BertConfig", "roberta": "RobertaConfig", "gpt2": "GPT2Config"}[model_type])
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.08 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def save_base(folder: Path, model_type: str, head: str, **overrides: Any) -> Path:
    """Write a base checkpoint with tokenizer, and return its folder."""
    make_model(model_type, head, **overrides).save_pretrained(folder)
    make_tokenizer(model_type).save_pretrained(folder)
    return folder


@torch.no_grad()
def outputs_of(model: Any, head: str) -> torch.Tensor:
    """Return all float outputs of a model on `inputs_for(head)`, flat."""
    result = model.eval()(**inputs_for(head))
    parts = [value for value in result.values() if isinstance(value, torch.Tensor)]
    return torch.cat([part.float().flatten() for part in parts])


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    command = [sys.executable, "-m", "hf_offline_compress", *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, check=False)


def error_of(stderr: str) -> str:
    """Return what stderr ends with: the error, without the stages that were told before it."""
    return stderr[stderr.index("error: ") :].strip()
