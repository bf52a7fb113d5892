"""A BERT encoder as a GGUF file, quantized by the package gguf as llama.cpp's own converter would."""

from __future__ import annotations

import json
from pathlib import Path

# The names of llama.cpp for BERT's parameters: of the model, and of a layer.
MODEL = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def write_gguf(base: Path, file: Path, quantization: str) -> None:
    """Write a BERT with mean pooling and a WordPiece tokenizer.

    Args:
        base: a folder with model.safetensors and a fast tokenizer.
        file: to be written.
        quantization: a type that gguf can write, as "Q8_0", of word embeddings and linear layers. As in llama.cpp, all
            else stays as it is: position and token type embeddings, biases and norms.

    Raises:
        ImportError: gguf is not installed.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    config = json.loads((base / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(file, "bert")
    writer.add_name(base.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    add_tokenizer(writer, AutoTokenizer.from_pretrained(base), config["vocab_size"])
    kind = gguf.GGMLQuantizationType[quantization]
    for name, values in load_file(base / "model.safetensors").items():
        own = name_of(name, config["num_hidden_layers"])
        if own is None:  # the pooler, or the numbers of positions
            continue
        values = values.astype(np.float32)
        if own == "token_embd.weight" or (own.startswith("blk.") and values.ndim == 2):
            writer.add_tensor(own, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_of(name: str, layers: int) -> str | None:
    """Return a parameter's name in GGUF, if it has one."""
    name = name.removeprefix("bert.")
    module, _, suffix = name.rpartition(".")
    if module in MODEL:
        return f"{MODEL[module]}.{suffix}"
    for i in range(layers):
        own = module.removeprefix(f"encoder.layer.{i}.")
        if own != module and own in LAYER:
            return f"blk.{i}.{LAYER[own]}.{suffix}"
    return None


def add_tokenizer(writer, tokenizer, size: int) -> None:
    """Add the tokens of WordPiece, as llama.cpp wants them: a mark before each that begins a word, none before others."""
    import gguf

    tokens, kinds = [], []
    for token in tokenizer.convert_ids_to_tokens(list(range(size))):
        special = token in tokenizer.all_special_tokens
        kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL)
        tokens.append(token if special else token[2:] if token.startswith("##") else "\u2581" + token)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.cls_token_id)
    writer.add_eos_token_id(tokenizer.sep_token_id)
    writer.add_sep_token_id(tokenizer.sep_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_mask_token_id(tokenizer.mask_token_id)
