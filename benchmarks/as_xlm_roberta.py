"""A BERT body with XLM-RoBERTa's tokenizer, such as multilingual-e5-small, saved as the XLM-RoBERTa that it equals.

usage: python benchmarks/as_xlm_roberta.py BASE OUT

All weights keep their names; positions move by two, since XLM-RoBERTa counts them from behind its padding token, 1. Both
forms give the same outputs, so `real_models.py --encoder` can judge them as two architectures of one model.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import BertModel, XLMRobertaConfig, XLMRobertaModel

SHIFT = 2
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "type_vocab_size",
)
POSITIONS = "embeddings.position_embeddings.weight"


def main() -> None:
    """Read the one folder and write the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    bert = BertModel.from_pretrained(options.base, dtype=torch.float32, add_pooling_layer=False)
    sizes = {name: getattr(bert.config, name) for name in (*SIZES, "layer_norm_eps")}
    positions = bert.config.max_position_embeddings + SHIFT
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    model = XLMRobertaModel(
        XLMRobertaConfig(**sizes, **tokens, max_position_embeddings=positions), add_pooling_layer=False
    )
    state = bert.state_dict()
    state[POSITIONS] = torch.cat([torch.zeros(SHIFT, bert.config.hidden_size), state[POSITIONS]])
    model.load_state_dict(state)
    model.save_pretrained(options.out)
    for file in options.base.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (shutil.copytree if file.is_dir() else shutil.copy)(file, options.out / file.name)


if __name__ == "__main__":
    main()
