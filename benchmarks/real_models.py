"""A multilingual sentence encoder and a chat model, compressed and saved: bytes, quality beside dense, speed, answers.

usage: python benchmarks/real_models.py --data FOLDER --encoder FOLDER [--recipes tiny] [--effort fast] [--out FOLDER]
       python benchmarks/real_models.py --data FOLDER --chat FOLDER [--recipes small tiny] [--effort fast] [--out FOLDER]

--data holds stsb-LANGUAGE-dev.csv (sentence 1, sentence 2, similarity), multilingual.txt (calibration) and test.txt.
--encoder is a sentence encoder with mean pooling, judged by Spearman correlation (x 100) of cosines on the first 400 pairs
of STS-B dev, language by language, with the bundled English calibration text and with multilingual.txt. --chat is a causal
language model, judged by perplexity on test.txt and by its greedy answers to three prompts. With --out, compressed folders
stay there, and are not made again. Bytes are those of all *.safetensors, and those of the whole folder.
"""

import argparse
import csv
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Table
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_offline_compress
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.metrics.agreement import agreement
from hf_offline_compress.metrics.perplexity import causal_perplexity

LANGUAGES = ("en", "de", "fr", "es", "zh")
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
)
PAIRS, ANSWER, LINES, WINDOW = 400, 48, 300, 256


def pairs(path: Path, count: int = PAIRS) -> list[tuple[str, str, float]]:
    """Return the first `count` pairs of an STS-B file, with their similarities."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(first, second, float(score)) for first, second, score in csv.reader(file)][:count]


def judged_encoder(
    model: Any, tokenizer: Any, data: Path, prefix: str, reference: dict[str, Any]
) -> dict[str, float | str]:
    """Return Spearman correlations by language, and the mean cosine with `reference`, which is filled if it is empty."""
    values: dict[str, float | str] = {}
    cosines = []
    for language in LANGUAGES:
        rows = pairs(data / f"stsb-{language}-dev.csv")
        texts = [prefix + text for row in rows for text in row[:2]]
        found = sentence_embeddings(model, tokenizer, texts)
        cosines.append(agreement(found, reference.setdefault(language, found)))
        similar = torch.nn.functional.cosine_similarity(found[0::2], found[1::2])
        values[language] = 100 * float(spearmanr(similar.numpy(), [row[2] for row in rows]).statistic)
    return {**values, "agreement": sum(cosines) / len(cosines)}


def folder_bytes(folder: Path) -> dict[str, float]:
    """Return megabytes of the weights and of all files."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    return {"weights MB": weights / 1e6, "folder MB": sum(file.stat().st_size for file in files) / 1e6}


def made(base: Path, folder: Path, recipe: str, calibration: str, effort: str | None) -> float:
    """Compress `base` into `folder`, unless it is there, and return the seconds that it took."""
    if not folder.exists():
        started = time.perf_counter()
        hf_offline_compress.compress(base, recipe, calibration=calibration, effort=effort, progress=False).save(folder)
        return time.perf_counter() - started
    return float(sum(json.loads((folder / "compression_report.json").read_text("utf-8"))["seconds"].values()))


def encoder(base: Path, data: Path, recipes: list[str], out: Path, prefix: str, effort: str | None) -> None:
    """Print the table of an encoder."""
    columns = {"model": "", "calibration": "", "weights MB": ".2f", "folder MB": ".2f"}
    columns |= dict.fromkeys(LANGUAGES, ".2f") | {"agreement": ".4f", "seconds": ".0f"}
    table = Table(None, "encoder", columns, ("model", "calibration"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    reference: dict[str, Any] = {}
    dense = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    table.add(model="dense", **folder_bytes(base), **judged_encoder(dense, tokenizer, data, prefix, reference))
    del dense
    for recipe in recipes:
        for label, calibration in (("bundled", "bundled"), ("multilingual", str(data / "multilingual.txt"))):
            folder = out / "-".join(filter(None, (base.name, recipe, effort, label)))
            seconds = made(base, folder, recipe, calibration, effort)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
            judged = judged_encoder(model, AutoTokenizer.from_pretrained(folder), data, prefix, reference)
            table.add(model=recipe, calibration=label, **folder_bytes(folder), **judged, seconds=seconds)


def answers(model: Any, tokenizer: Any) -> tuple[list[str], float]:
    """Return greedy answers to the prompts, and tokens a second."""
    texts, tokens, started = [], 0, 0.0
    for number, prompt in enumerate((PROMPTS[0], *PROMPTS)):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        begun = time.perf_counter()
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        if number:  # the first one warms up
            started += time.perf_counter() - begun
            tokens += output.shape[1] - inputs["input_ids"].shape[1]
            texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts, tokens / started


def chat(base: Path, data: Path, recipes: list[str], out: Path, effort: str | None) -> None:
    """Print the table of a chat model, and its answers."""
    columns = {"model": "", "weights MB": ".2f", "folder MB": ".2f", "perplexity": ".3f", "tokens/s": ".1f"}
    table = Table(None, "chat", columns | {"seconds": ".0f"}, ("model",))
    lines = (data / "test.txt").read_text("utf-8").splitlines()[:LINES]
    said = {}
    for name in ("dense", *recipes):
        folder = base if name == "dense" else out / "-".join(filter(None, (base.name, name, effort)))
        seconds: float | str = "" if name == "dense" else made(base, folder, name, "bundled", effort)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        said[name], speed = answers(model, tokenizer)
        value = causal_perplexity(model, tokenizer, lines, block=WINDOW, stride=WINDOW // 2).perplexity
        table.add(model=name, **folder_bytes(folder), perplexity=value, **{"tokens/s": speed}, seconds=seconds)
        del model
    for number, prompt in enumerate(PROMPTS):
        print(f"\n> {prompt}")
        for name, texts in said.items():
            print(f"- {name}: {' '.join(texts[number].split())}")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--prefix", default="query: ", help="before each sentence that is embedded")
    parser.add_argument("--chat", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["tiny"])
    parser.add_argument("--effort")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        if options.encoder:
            encoder(options.encoder, options.data, options.recipes, out, options.prefix, options.effort)
        if options.chat:
            chat(options.chat, options.data, options.recipes, out, options.effort)


if __name__ == "__main__":
    main()
