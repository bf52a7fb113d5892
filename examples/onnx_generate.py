"""Text from a prompt by an exported ONNX file: onnxruntime, tokenizers and numpy, no torch.

usage: python examples/onnx_generate.py FOLDER PROMPT [--tokens 40]

FOLDER was written by `hf-offline-compress export COMPRESSED FOLDER --format onnx` from a causal language model.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Generator:
    """An exported causal language model that always takes the most probable token."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer, and make a session, which decodes the weights."""
        files = [folder / "onnx" / name for name in ("model_quantized.onnx", "model.onnx")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise SystemExit(f"{folder} has no onnx/model_quantized.onnx and no onnx/model.onnx")
        self.session = onnxruntime.InferenceSession(file)
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        if "past_key_values.0.key" not in self.inputs:
            raise SystemExit(f"{file} has no cache: it is no causal language model")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ends = json.loads((folder / "config.json").read_text("utf-8")).get("eos_token_id")
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """Yield up to `count` tokens that follow a prompt, until the text ends."""
        past = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values.")
        }
        new, seen = prompt, 0
        for _ in range(count):
            seen += len(new)
            feeds = {
                "input_ids": np.array([new], np.int64),
                "attention_mask": np.ones((1, seen), np.int64),
                "position_ids": np.arange(seen - len(new), seen, dtype=np.int64)[None],
                **past,
            }
            found = self.session.run(self.outputs, {name: feeds[name] for name in self.inputs})
            values = dict(zip(self.outputs, found, strict=True))
            past = {name: values[name.replace("past_key_values", "present")] for name in past}
            token = int(values["logits"][0, -1].argmax())
            if token in self.ends:
                return
            yield token
            new = [token]


def main() -> None:
    """Read the arguments, and print what follows the prompt as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    generator = Generator(options.folder)
    ids = generator.tokenizer.encode(options.prompt).ids
    shown = generator.tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for token in generator.tokens(ids, options.tokens):
        ids.append(token)
        text = generator.tokenizer.decode(ids)
        if text.endswith("\ufffd"):
            continue  # a character of several tokens is not whole yet
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    main()
