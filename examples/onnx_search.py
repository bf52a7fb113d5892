"""Semantic search over the lines of a text by an exported ONNX file: onnxruntime, tokenizers and numpy, no torch.

usage: python examples/onnx_search.py FOLDER TEXT QUERY [--top 5]

FOLDER was written by `hf-offline-compress export COMPRESSED FOLDER --format onnx`.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

BATCH = 16
LONGEST = 256  # tokens of a line


class Encoder:
    """An exported encoder: mean of the last hidden states, of length 1."""

    def __init__(self, folder: Path, output: str = "last_hidden_state") -> None:
        """Load the tokenizer, and make a session, which decodes the weights."""
        files = [folder / "onnx" / name for name in ("model_quantized.onnx", "model.onnx")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise SystemExit(f"{folder} has no onnx/model_quantized.onnx and no onnx/model.onnx")
        self.session = onnxruntime.InferenceSession(file)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.output = output
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding()

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return embeddings [texts, width]."""
        parts = []
        for start in range(0, len(texts), BATCH):
            encoded = self.tokenizer.encode_batch(texts[start : start + BATCH])
            mask = np.array([line.attention_mask for line in encoded], np.int64)
            feeds = {
                "input_ids": np.array([line.ids for line in encoded], np.int64),
                "attention_mask": mask,
                "token_type_ids": np.array([line.type_ids for line in encoded], np.int64),
            }
            (hidden,) = self.session.run([self.output], {name: feeds[name] for name in self.inputs})
            means = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
            parts.append(means / np.linalg.norm(means, axis=1, keepdims=True))
        return np.concatenate(parts)


def main() -> None:
    """Read the arguments, and print the lines that are nearest to the query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("query")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--output", default="last_hidden_state", help="output of the model that is averaged")
    options = parser.parse_args()
    lines = [line.strip() for line in options.text.read_text("utf-8").splitlines() if line.strip()]
    encoder = Encoder(options.folder, options.output)
    likeness = encoder.embed(lines) @ encoder.embed([options.query])[0]
    for place in np.argsort(-likeness)[: options.top]:
        print(f"{likeness[place]:.3f}  {lines[place]}")


if __name__ == "__main__":
    main()
