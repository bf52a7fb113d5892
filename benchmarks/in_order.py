"""What it brings to code layers again in the order of the data: one recipe with and without, on the same text.

usage: python benchmarks/in_order.py --data FOLDER [--mlm FOLDER] [--causal FOLDER] [--models mlm] [--recipe tiny] [--sizes 6.25]
           [--efforts default best]

The models, the texts and the loss are those of `seeds.py --prefer validation`. `change` is that of the mean loss, `+-` the
standard error of the differences line by line, both in percent of the loss without; `seconds` are of the whole compression.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from seeds import compressed, judged_language_model, judged_minilm, put

from hf_offline_compress.request.effort import EFFORTS
from hf_offline_compress.request.reading import load_recipe

COLUMNS = ("model", "recipe", "percent", "effort", "without", "with", "change %", "+-", "seconds", "and")


def main() -> None:
    """Print a row a model, size and effort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mlm", type=Path)
    parser.add_argument("--causal", type=Path)
    parser.add_argument("--by-line", action="store_true", help="causal: every line by itself, not windows of all")
    parser.add_argument("--models", nargs="+", choices=("minilm", "mlm", "causal"), default=["minilm"])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--sizes", nargs="+", type=float, default=[6.25], help="percent of the float32 bytes")
    parser.add_argument("--efforts", nargs="+", choices=("default", "best"), default=["best"])
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in ("mlm", "causal"):
        if name in options.models and not getattr(options, name):
            parser.error(f"--models {name} needs --{name} FOLDER")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in options.models:
        if name == "minilm":
            subject = judged_minilm(options.data, True, options.lines)
        else:
            masked, by_line = name == "mlm", options.by_line
            folder = options.mlm if masked else options.causal
            subject = judged_language_model(folder, options.data, True, options.lines, masked, by_line)
        for size in options.sizes:
            recipe = load_recipe(options.recipe).override(total_ratio=100 / size)
            for effort in options.efforts:
                losses, seconds, known = [], [], EFFORTS[effort]
                for tokens in (0, known.in_order):
                    EFFORTS[effort] = replace(known, in_order=tokens)
                    found, spent = compressed(subject, recipe, effort=effort)
                    seconds.append(spent)
                    losses.append(subject.judge(found)[0])
                mean = float(losses[0].mean())
                differences = losses[1] - losses[0]
                change, error = float(differences.mean()), float(differences.std() / len(differences) ** 0.5)
                told = (mean, float(losses[1].mean()), 100 * change / mean, 100 * error / mean, *seconds)
                put(options.out, (name, recipe.name, size, effort, *told))


if __name__ == "__main__":
    main()
