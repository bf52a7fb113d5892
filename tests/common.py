"""Tiny models of every family and head, tokenizers for them, and helpers that several tests use."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from inputs import inputs_for
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, RobertaTokenizer

from hf_offline_compress import compress
from hf_offline_compress.architectures.families import FAMILIES, objective_of
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
# Every head of a family with linear and of one with transposed, fused layers; and one head of each family.
CORE = [(model_type, head) for model_type, head in HEADS if model_type in ("bert", "gpt2")]
ONE_EACH = list(dict(HEADS).items())
# By the names that configs have for it; each takes those that it knows.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 40),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "window_size": 4,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
}
# Of a width that is not the layers', so that what lies between is there as well.
NARROW_WORDS = {
    **dict.fromkeys(("electra", "albert", "deberta-v2"), "embedding_size"),
    "opt": "word_embed_proj_dim",
}


def tiny_sizes(model_type: str, layers: int = 3) -> dict[str, Any]:
    """Return the options of a family's config that make it tiny."""
    depth = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), layers)
    patterns = {"attention_types": [[[("global", "local")[i % 2] for i in range(layers)], 1]]}
    known = {f.name for f in fields(getattr(transformers, FAMILIES[model_type].entry.config))}
    sizes = {name: value for name, value in {**TINY, **depth, **patterns}.items() if name in known}
    return {**sizes, NARROW_WORDS[model_type]: 24} if model_type in NARROW_WORDS else sizes


def make_tokenizer(model_type: str) -> Any:
    """Return a small tokenizer of the family's kind."""
    entry = FAMILIES[model_type].entry
    if not entry.causal and not entry.positions_from_padding:
        letters = "abcdefghijklmnopqrstuvwxyz"
        tokens = [*BERT_SPECIALS, *letters, *(f"##{c}" for c in letters), *WORDS]
        return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>"] if entry.causal else ROBERTA_SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    content = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in content["merges"]]
    return (GPT2Tokenizer if entry.causal else RobertaTokenizer)(vocab=content["vocab"], merges=merges)


def make_model(model_type: str, head: str, seed: int = 0, layers: int = 3, **overrides: Any) -> Any:
    """Return a randomly initialised stock model, of weights larger than usual so that errors show."""
    tokenizer = make_tokenizer(model_type)
    entry = FAMILIES[model_type].entry
    options = {**tiny_sizes(model_type, layers), "vocab_size": len(tokenizer)}
    if entry.causal:
        options |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    elif entry.positions_from_padding:
        options |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    else:
        options |= {"pad_token_id": 0}
    if not entry.causal and objective_of(head) == "causal":
        options["is_decoder"] = True
    config = getattr(transformers, entry.config)
    options |= overrides
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


def save_inputs(folder, recipe):
    """Save a masked BERT, a recipe and a text into a folder, and return them as the command line takes them."""
    save_base(folder / "base", "bert", "BertForMaskedLM")
    (folder / "mine.yaml").write_text(recipe)
    (folder / "text.txt").write_text("\n".join(TEXTS))
    return folder / "base", folder / "mine.yaml", folder / "text.txt"


def save_pair(folder):
    """Save a BERT and its SVD into a folder that is made, and return both."""
    base = save_base(folder / "base", "bert", "BertModel")
    compress(base, "svd", calibration=None, ratio=2, progress=False).save(folder / "small")
    return base, folder / "small"


def content(folder):
    """Return the bytes of a folder's weights and config."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}


@torch.no_grad()
def outputs_of(model: Any, head: str) -> torch.Tensor:
    """Return all float outputs of a model on `inputs_for(head)`, flat."""
    result = model.eval()(**inputs_for(head))
    parts = [value for value in result.values() if isinstance(value, torch.Tensor)]
    return torch.cat([part.float().flatten() for part in parts])


def error_of(stderr: str) -> str:
    """Return what stderr ends with: the error, without the stages that were told before it."""
    return stderr[stderr.index("error: ") :].strip()
