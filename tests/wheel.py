"""Run by `make test-wheel` in an environment that has the wheel alone: compress, save, load, show the card."""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import hf_offline_compress

FORBIDDEN = ("pytest", "datasets", "accelerate", "scikit-learn", "tensorly", "sentence-transformers")


def main() -> None:
    """Make a small model, compress it by the command line as installed, and load it with the package and without."""
    place = Path(hf_offline_compress.__file__)
    assert Path(sys.prefix) in place.parents, f"{place} is not what the wheel installed"
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    assert not installed & set(FORBIDDEN), f"more is installed than the wheel asks for: {installed & set(FORBIDDEN)}"
    with tempfile.TemporaryDirectory() as scratch:
        base, out = Path(scratch, "base"), Path(scratch, "small")
        save_base(base)
        command = Path(sys.prefix, "bin", "hf-offline-compress")
        said = run(command, "compress", base, out, "--recipe", "small")
        assert "whole model" in said, said
        assert "ratio" in run(command, "inspect", out)
        assert "the base" in run(command, "card", out, "--stdout") and (out / "README.md").is_file()
        assert "verified" in run(command, "verify", out)  # loads it with the package, and without
        model = transformers.AutoModel.from_pretrained(out).eval()
        assert type(model).__name__ == "CompressedBertModel", type(model)
        assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()
    print("the wheel compresses, saves, loads and shows its card")


def save_base(folder: Path) -> None:
    """Write a BERT of random weights, with a tokenizer of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.BertConfig(vocab_size=len(tokens), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)


def run(*command: object) -> str:
    """Run a command, and return what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
