"""A vocabulary pruned to the tokens of some languages: tokens, bytes, and quality beside the whole one, language by language.

usage: python benchmarks/vocabulary.py --data FOLDER --encoder FOLDER [--text FILE | --languages en de] [--prefix "query: "]
           [--coverages 1 0.9999] [--sizes 60000] [--recipes tiny] [--max-bytes 10MB] [--unpruned]
           [--pairs N] [--judged en de] [--out FOLDER]

--data holds stsb-LANGUAGE-train.csv, whose sentences are the text of the vocabulary and of the calibration unless --text
is given, and stsb-LANGUAGE-dev.csv, on whose pairs a sentence encoder with mean pooling is judged (Spearman correlation
x 100). Every coverage and size is a row as pruned alone, and one for each recipe and each size in bytes; with --unpruned
the same recipes without pruning too. Bytes of a pruned model are those of its float32 weights and of tokenizer.json as it
is written; of a compressed one, of its weight files and of the whole folder.
"""

import argparse
import csv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Table
from real_models import LANGUAGES, folder_bytes, pairs
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModel, AutoTokenizer

import hf_offline_compress
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.measure.texts import load_texts
from hf_offline_compress.request.vocabulary import vocabulary_of
from hf_offline_compress.vocabulary import prune_vocabulary


def sentences(data: Path, languages: list[str], prefix: str) -> list[str]:
    """Return the training sentences of some languages."""
    found = []
    for language in languages:
        with (data / f"stsb-{language}-train.csv").open(encoding="utf-8", newline="") as file:
            found += [prefix + text for row in csv.reader(file) for text in row[:2]]
    return found


def judged(model: Any, tokenizer: Any, data: Path, prefix: str, count: int, languages: list[str]) -> dict[str, float]:
    """Return Spearman correlations by language."""
    values = {}
    for language in languages:
        rows = pairs(data / f"stsb-{language}-dev.csv")[:count]
        found = sentence_embeddings(model, tokenizer, [prefix + text for row in rows for text in row[:2]])
        similar = torch.nn.functional.cosine_similarity(found[0::2], found[1::2])
        values[language] = 100 * float(spearmanr(similar.numpy(), [row[2] for row in rows]).statistic)
    return values


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--text", default=None)
    parser.add_argument("--languages", nargs="*", default=["en"])
    parser.add_argument("--prefix", default="", help="before each sentence")
    parser.add_argument("--coverages", nargs="*", type=float, default=[1.0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--max-bytes", nargs="*", default=[], help="budgets of the recipe tiny")
    parser.add_argument("--unpruned", action="store_true")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--judged", nargs="*", default=[*LANGUAGES], help="languages of the pairs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    columns = {
        "vocabulary": "",
        "recipe": "",
        "tokens": ",",
        "weights MB": ".2f",
        "beside MB": ".2f",
        "folder MB": ".2f",
    }
    table = Table(None, "vocabulary", columns | dict.fromkeys(options.judged, ".2f"), ("vocabulary", "recipe"))
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    config = AutoConfig.from_pretrained(options.encoder).to_dict()
    text: Any = options.text or sentences(options.data, options.languages, options.prefix)
    ways: list[dict[str, Any]] = [{"coverage": value} for value in options.coverages]
    ways += [{"size": value} for value in options.sizes]

    def row(model: Any, tokenizer: Any, vocabulary: str, recipe: str, sizes: dict[str, float]) -> None:
        beside = sizes["folder MB"] - sizes["weights MB"]
        scores = judged(model, tokenizer, options.data, options.prefix, options.pairs, options.judged)
        values: dict[str, Any] = {"vocabulary": vocabulary, "recipe": recipe, "tokens": len(tokenizer)}
        table.add(**values, **sizes, **{"beside MB": beside}, **scores)

    def compressed(vocabulary: str, asked: dict[str, Any], out: Path) -> None:
        requests: list[tuple[str, dict[str, Any]]] = [(recipe, {}) for recipe in options.recipes]
        requests += [("tiny", {"max_bytes": size}) for size in options.max_bytes]
        for recipe, size in requests:
            name = "-".join([vocabulary.replace(" ", "-"), recipe, *size.values()])
            if not (out / name).exists():
                calibration = text if isinstance(text, str) else text[:: max(1, len(text) // 4000)]
                result = hf_offline_compress.compress(
                    options.encoder, recipe, calibration=calibration, progress=False, **size, **asked
                )
                result.save(out / name)
            model = AutoModel.from_pretrained(out / name, dtype=torch.float32).eval()
            label = " ".join([recipe, *size.values()])
            row(model, AutoTokenizer.from_pretrained(out / name), vocabulary, label, folder_bytes(out / name))

    dense = AutoModel.from_pretrained(options.encoder, dtype=torch.float32).eval()
    row(dense, tokenizer, "whole", "dense", folder_bytes(options.encoder))
    del dense
    kept_text = load_texts(text, "vocabulary text")
    assert kept_text is not None
    with TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        for way in ways:
            label = " ".join(f"{key} {value:g}" for key, value in way.items())
            found = prune_vocabulary(vocabulary_of("bundled", **way), kept_text, tokenizer, config, name="base")
            model = AutoModel.from_pretrained(options.encoder, dtype=torch.float32).eval()
            weights = folder_bytes(options.encoder)["weights MB"] - found.apply(model) * 4 / 1e6
            sizes = {"weights MB": weights, "folder MB": weights + found.record["tokenizer_bytes"] / 1e6}
            row(model, found.tokenizer, label, "dense", sizes)
            del model
            asked = {"vocabulary": text, **{f"vocabulary_{key}": value for key, value in way.items()}}
            compressed(label, asked, out)
        if options.unpruned:
            compressed("whole", {}, out)


if __name__ == "__main__":
    main()
