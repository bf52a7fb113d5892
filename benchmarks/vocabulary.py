"""A vocabulary pruned to the tokens of a text: tokens, bytes, and quality beside the whole one.

usage: python benchmarks/vocabulary.py --data FOLDER (--encoder FOLDER | --causal FOLDER) [--text FILE | --languages en de]
           [--prefix "query: "] [--coverages 1 0.9999] [--sizes 60000] [--recipes small tiny] [--max-bytes 10MB]
           [--folder-bytes 15MB] [--unpruned] [--effort fast] [--pairs N] [--judged en de] [--lines N] [--out FOLDER]

--data holds stsb-LANGUAGE-train.csv, whose sentences are the text of the vocabulary and of the calibration unless --text
is given ("bundled", or a file with one text a line), and stsb-LANGUAGE-dev.csv, on whose pairs a sentence encoder with
mean pooling is judged (Spearman correlation x 100). A causal language model is judged by its perplexity per byte of
test.txt, and by its greedy answers to three prompts where it has a chat template. Every coverage and size is a row as
pruned alone, and one for each recipe and each size in bytes, of the weights or of the whole folder; with --unpruned the
same recipes without pruning too. Bytes of a pruned model are those of its float32 weights and of tokenizer.json as it is
written; of a compressed one, of its weight files and of the whole folder. With --out, rows and compressed folders stay
there and are not made again.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Table
from real_models import LANGUAGES, PROMPTS, WINDOW, answers, folder_bytes, pairs
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_offline_compress
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.foundation.parsing import parse_bytes
from hf_offline_compress.foundation.processes import ALONE
from hf_offline_compress.measure.texts import CalibrationText
from hf_offline_compress.metrics.shared_units import byte_perplexity
from hf_offline_compress.request.vocabulary import vocabulary_of
from hf_offline_compress.vocabulary import PrunedVocabulary, prune_vocabulary, vocabulary_text

# Of a folder: code, config, report, card and settings of the tokenizer.
BESIDE_TOKENIZER = 350_000


@dataclass(frozen=True)
class Subject:
    """A model whose vocabulary is pruned.

    Attributes:
        base: its folder.
        head: the Auto class that loads it.
        columns: what it is judged by → format.
        judge: model, tokenizer → values of the columns.
    """

    base: Path
    head: Any
    columns: dict[str, str]
    judge: Callable[[Any, Any], dict[str, float]]

    def load(self, folder: Path) -> Any:
        """Return the model in a folder, in float32."""
        return self.head.from_pretrained(folder, dtype=torch.float32).eval()


def encoder(base: Path, data: Path, prefix: str, count: int, languages: list[str]) -> Subject:
    """Return a sentence encoder, judged by Spearman correlations by language."""

    def judge(model: Any, tokenizer: Any) -> dict[str, float]:
        values = {}
        for language in languages:
            rows = pairs(data / f"stsb-{language}-dev.csv", count)
            found = sentence_embeddings(model, tokenizer, [prefix + text for row in rows for text in row[:2]])
            similar = torch.nn.functional.cosine_similarity(found[0::2], found[1::2])
            values[language] = 100 * float(spearmanr(similar.numpy(), [row[2] for row in rows]).statistic)
        return values

    return Subject(base, AutoModel, dict.fromkeys(languages, ".2f"), judge)


def causal(base: Path, data: Path, lines: int) -> Subject:
    """Return a causal language model, judged by its perplexity per byte."""
    texts = (data / "test.txt").read_text("utf-8").splitlines()[:lines]
    windows = {"block": WINDOW, "stride": WINDOW // 2}

    def judge(model: Any, tokenizer: Any) -> dict[str, float]:
        if tokenizer.chat_template:
            for prompt, answer in zip(PROMPTS, answers(model, tokenizer)[0], strict=True):
                print(f"> {prompt}\n- {' '.join(answer.split())}")
        settings = {"batch_size": 8, "progress": False, "processes": ALONE}
        return {"perplexity per byte": byte_perplexity(model, tokenizer, texts, **windows, **settings).perplexity}

    return Subject(base, AutoModelForCausalLM, {"perplexity per byte": ".4f"}, judge)


def sentences(data: Path, languages: list[str], prefix: str) -> list[str]:
    """Return the training sentences of some languages."""
    found = []
    for language in languages:
        with (data / f"stsb-{language}-train.csv").open(encoding="utf-8", newline="") as file:
            found += [prefix + text for row in csv.reader(file) for text in row[:2]]
    return found


def pruned(subject: Subject, text: CalibrationText, way: dict[str, Any], tokenizer: Any) -> PrunedVocabulary:
    """Return the vocabulary that stays."""
    config = AutoConfig.from_pretrained(subject.base).to_dict()
    asked = vocabulary_of("bundled", **way)
    generation: dict[str, Any] = {}
    if (subject.base / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(subject.base).to_dict()
    return prune_vocabulary(asked, text, tokenizer, config, name=subject.base.name, generation=generation)


def arguments() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    subjects = parser.add_mutually_exclusive_group(required=True)
    subjects.add_argument("--encoder", type=Path)
    subjects.add_argument("--causal", type=Path)
    parser.add_argument("--text", default=None)
    parser.add_argument("--languages", nargs="*", default=["en"])
    parser.add_argument("--prefix", default="", help="before each sentence")
    parser.add_argument("--coverages", nargs="*", type=float, default=[])
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--max-bytes", nargs="*", default=[], help="budgets of the recipe tiny")
    parser.add_argument("--folder-bytes", nargs="*", default=[], help="the same, of the whole folder of a pruned model")
    parser.add_argument("--unpruned", action="store_true")
    parser.add_argument("--effort")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--lines", type=int, default=300, help="of test.txt")
    parser.add_argument("--judged", nargs="*", default=[*LANGUAGES], help="languages of the pairs")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def requests(options: argparse.Namespace, tokenizer_bytes: int | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what is compressed of each vocabulary: label, recipe, budget.

    Args:
        options: the arguments.
        tokenizer_bytes: of the pruned tokenizer.json; None for a vocabulary that is whole.
    """
    found: list[tuple[str, str, dict[str, Any]]] = [(recipe, recipe, {}) for recipe in options.recipes]
    found += [(f"tiny {size}", "tiny", {"max_bytes": size}) for size in options.max_bytes]
    if tokenizer_bytes is not None:
        for size in options.folder_bytes:
            weights = parse_bytes(size) - tokenizer_bytes - BESIDE_TOKENIZER
            found.append((f"tiny, folder {size}", "tiny", {"max_bytes": weights}))
    return found


def main() -> None:
    """Print the table."""
    options = arguments()
    if options.encoder:
        subject = encoder(options.encoder, options.data, options.prefix, options.pairs, options.judged)
    else:
        subject = causal(options.causal, options.data, options.lines)
    columns = {"vocabulary": "", "recipe": "", "tokens": ",.0f"}
    columns |= {"weights MB": ".2f", "beside MB": ".2f", "folder MB": ".2f"}
    keys = ("vocabulary", "recipe")
    table = Table(options.out, "vocabulary", columns | subject.columns, keys)
    text: Any = options.text or sentences(options.data, options.languages, options.prefix)
    ways: list[dict[str, Any]] = [{"coverage": value} for value in options.coverages]
    ways += [{"size": value} for value in options.sizes]

    def row(model: Any, tokenizer: Any, vocabulary: str, recipe: str, sizes: dict[str, float]) -> None:
        values: dict[str, Any] = {"vocabulary": vocabulary, "recipe": recipe, "tokens": len(tokenizer), **sizes}
        beside = sizes["folder MB"] - sizes["weights MB"]
        table.add(**values, **{"beside MB": beside}, **subject.judge(model, tokenizer))

    def compressed(vocabulary: str, asked: dict[str, Any], out: Path, tokenizer_bytes: int | None) -> None:
        for label, recipe, size in requests(options, tokenizer_bytes):
            if table.has(vocabulary, label):
                continue
            folder = out / f"{vocabulary}-{label}".replace(", ", "-").replace(" ", "-")
            if not folder.exists():
                given = {"calibration": text, "effort": options.effort, "progress": False, **size, **asked}
                hf_offline_compress.compress(subject.base, recipe, **given).save(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            row(subject.load(folder), tokenizer, vocabulary, label, folder_bytes(folder))

    tokenizer = AutoTokenizer.from_pretrained(subject.base)
    if not table.has("whole", "dense"):
        row(subject.load(subject.base), tokenizer, "whole", "dense", folder_bytes(subject.base))
    kept_text = vocabulary_text(vocabulary_of(text), tokenizer, subject.base)
    with TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        for way in ways:
            label = " ".join(
                f"{key} {value:g}" if key == "coverage" else f"{key} {value}" for key, value in way.items()
            )
            found = pruned(subject, kept_text, way, tokenizer)
            if not table.has(label, "dense"):
                model = subject.load(subject.base)
                weights = folder_bytes(subject.base)["weights MB"] - found.apply(model) * 4 / 1e6
                sizes = {"weights MB": weights, "folder MB": weights + found.record["tokenizer_bytes"] / 1e6}
                row(model, found.tokenizer, label, "dense", sizes)
                del model
            asked = {"vocabulary": text, **{f"vocabulary_{key}": value for key, value in way.items()}}
            compressed(label, asked, out, found.record["tokenizer_bytes"])
        if options.unpruned:
            compressed("whole", {}, out, None)


if __name__ == "__main__":
    main()
