"""Low rank at equal bytes: fewer numbers in half precision, or more of them as integers of few bits.

usage: python benchmarks/factor_storage.py --data FOLDER --mlm FOLDER [--out FOLDER]

The linear layers of MiniLM (agreement on sentences of STS-B dev) and of a masked language model (perplexity on test.txt).
Ratios count every stored byte, scales and zeros of integers too. With --out, a table (factor-storage.md and .csv) is
written after every row, and a later run adds what it lacks.
"""

import argparse
from pathlib import Path

from common import Table, masked_lm, minilm

from hf_offline_compress.request.reading import load_recipe

PRESETS = ("calibrated-svd", "allocated-svd")
RATIOS = (3, 6, 12)
STORAGES = ("float16", "int8", "int4")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mlm", type=Path, required=True, help="folder of a masked language model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    columns = {"model": "", "preset": "", "ratio": "", "storage": "", "bytes": ".0f", "measure": "", "value": ".4f"}
    table = Table(options.out, "factor-storage", columns, ("model", "preset", "ratio", "storage"))
    for subject in (minilm(options.data), masked_lm(options.mlm, options.data)):
        for preset in PRESETS:
            for ratio in RATIOS:
                for storage in STORAGES:
                    if table.has(subject.name, preset, str(ratio), storage):
                        continue
                    recipe = load_recipe(preset).override(storage=storage)
                    result = subject.compressed(recipe, ratio, "linears")
                    table.add(
                        model=subject.name,
                        preset=preset,
                        ratio=str(ratio),
                        storage=storage,
                        bytes=result.report.totals["compressed_stored_bytes"],
                        measure=subject.measure,
                        value=subject.judge(result.model),
                    )


if __name__ == "__main__":
    main()
