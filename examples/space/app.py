"""A page that asks a model and its compressed form the same, side by side: similar sentences, or words behind a mask.

usage: python app.py [--base BASE] [--compressed COMPRESSED] [--port 7860]

Both are Hub ids or folders; by default the environment variables BASE_MODEL and COMPRESSED_MODEL, which a Space sets in its
settings. The compressed model is loaded by the package hf_offline_compress where it is installed, else by the code in its own
repository: name only a repository that you trust. A masked language model fills masks, any other is asked for embeddings.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

try:
    import hf_offline_compress  # noqa: F401  (makes the Auto classes know compressed models)

    TRUST = False
except ImportError:
    TRUST = True

FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "*.py"]
FILLS = 5
LENGTH = 256  # tokens of a text
SENTENCES = """A man plays an instrument.
A dog runs across the field.
Someone is making music on the street.
The committee meets again in autumn."""


class Side:
    """A model, its tokenizer, and its size on disk in megabytes."""

    @torch.inference_mode()
    def __init__(self, name: str, trust: bool) -> None:
        """Load a Hub id or a folder."""
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=FILES))
        config = json.loads((folder / "config.json").read_text("utf-8"))
        architecture = (config.get("architectures") or [""])[0]
        self.fills = architecture.endswith("ForMaskedLM")
        self.megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        loader = AutoModelForMaskedLM if self.fills else AutoModel
        self.model = loader.from_pretrained(folder, trust_remote_code=trust).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        self.model(**self.tokenizer("warm", return_tensors="pt"))  # weights are decoded at their first use

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """Return the mean of the last hidden states over each text's tokens, of length 1: [texts, width]."""
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        hidden = self.model(**encoded)[0]
        mask = encoded["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    @torch.inference_mode()
    def fill(self, text: str) -> list[tuple[str, float]]:
        """Return the likeliest tokens at the first mask, and their probabilities."""
        encoded = self.tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        places = (encoded["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()
        if not len(places):
            raise gr.Error(f"Write {self.tokenizer.mask_token} where a word is missing.")
        best = self.model(**encoded).logits[0, places[0, 0]].softmax(dim=0).topk(FILLS)
        words = [self.tokenizer.decode([token]).strip() for token in best.indices.tolist()]
        return list(zip(words, best.values.tolist(), strict=True))


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """Return what a function returns, and the milliseconds that it took."""
    started = time.perf_counter()
    return work(), 1000 * (time.perf_counter() - started)


def page(base: Side, compressed: Side) -> gr.Blocks:
    """Return the page of two models."""
    sides = (base, compressed)

    def ask(work: Callable[[Side], object]) -> tuple[list[object], str]:
        answers, times = zip(*(timed(lambda side=side: work(side)) for side in sides), strict=True)
        return list(answers), f"{times[0]:.0f} ms (base), {times[1]:.0f} ms (compressed)"

    def similar(sentence: str, others: str) -> tuple[list[list[str | float]], str]:
        lines = [line.strip() for line in others.splitlines() if line.strip()]
        if not sentence.strip() or not lines:
            raise gr.Error("Write a sentence, and at least one to compare it with.")
        vectors, took = ask(lambda side: side.embed([sentence, *lines]))
        first, second = ((each[0] @ each[1:].T).tolist() for each in vectors)
        rows = [[line, round(a, 3), round(b, 3)] for line, a, b in zip(lines, first, second, strict=True)]
        return sorted(rows, key=lambda row: -row[1]), took

    def filled(text: str) -> tuple[list[list[str | float]], str]:
        words, took = ask(lambda side: side.fill(text))
        return [[a, round(p, 3), b, round(q, 3)] for (a, p), (b, q) in zip(*words, strict=True)], took

    with gr.Blocks(title="Base and compressed model") as blocks:
        gr.Markdown(
            f"# Base and compressed model\n{base.megabytes:.1f} MB of weights against {compressed.megabytes:.1f} MB, "
            f"{base.megabytes / compressed.megabytes:.1f} times smaller."
        )
        if base.fills:
            mask = base.tokenizer.mask_token
            inputs = [gr.Textbox(f"The capital of France is {mask}.", label=f"Text with {mask}")]
            headers = ["base", "probability", "compressed", "probability "]
            asked = filled
        else:
            inputs = [
                gr.Textbox("A man plays the guitar.", label="Sentence"),
                gr.Textbox(SENTENCES, label="Compare with, one per line", lines=4),
            ]
            headers = ["sentence", "base", "compressed"]
            asked = similar
        button = gr.Button("Compare", variant="primary")
        widths = ["46%", "24%", "30%"] if not base.fills else ["25%"] * 4
        label = "Cosine" if not base.fills else "Likeliest"
        outputs = [gr.Dataframe(headers=headers, label=label, column_widths=widths, wrap=True), gr.Markdown()]
        gr.on([button.click, inputs[0].submit], asked, inputs, outputs, api_name="compare")
        blocks.load(asked, inputs, outputs, api_visibility="private")
    return blocks


def main() -> None:
    """Load both models and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=os.environ.get("BASE_MODEL"))
    parser.add_argument("--compressed", default=os.environ.get("COMPRESSED_MODEL"))
    parser.add_argument("--port", type=int, default=None)
    options = parser.parse_args()
    if not options.base or not options.compressed:
        parser.error("name both models: --base and --compressed, or BASE_MODEL and COMPRESSED_MODEL")
    blocks = page(Side(options.base, trust=False), Side(options.compressed, trust=TRUST))
    # Fonts of the visitor's own system: no request to a font server.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks.launch(server_port=options.port, theme=theme, footer_links=[])


if __name__ == "__main__":
    main()
