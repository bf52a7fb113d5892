"""The preset `ae` against `paper-r`, the papers' own training, on the same matrices: loss and seconds; SVD beside them.

usage: python benchmarks/autoencoder_speed.py [--kinds key] [--ratios 3 10] [--repeats 2]

All store at most the same bytes, and group matrices in the same way. Only solving is timed: matrices in, factors out. The
two take turns, with a seed for each turn; seconds are the median of the turns. The loss is 0.9091 · cosine distance +
0.0909 · RMSE over all rows, from the stored factors; that of `ae` is "as low" if its worst turn is no worse than the best
one of `paper-r`.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from common import Table, decoded, distances, load_minilm, own_loss, problems

from hf_offline_compress.request.reading import load_recipe
from hf_offline_compress.solvers import solve

OURS, PAPERS, PLAIN = "ae", "paper-r", "svd"
SHARE = 0.1
COLUMNS = {
    "kind": "",
    "ratio": "",
    "preset": "",
    "bytes": ".0f",
    "cosine distance": ".5f",
    "RMSE": ".6f",
    "loss": ".5f",
    "worst loss": ".5f",
    "seconds": ".2f",
    "of paper-r": ".3f",
}


def solved(model: Any, preset: str, kind: str, ratio: float, grouping: str, seed: int) -> dict[str, float]:
    """Return bytes, errors and seconds of one solution."""
    recipe = load_recipe(preset).override(modules=kind, ratio=ratio, grouping=grouping)
    rebuilt, weights = [], []
    seconds, size = 0.0, 0
    for index, (group, problem) in enumerate(problems(model, recipe)):
        problem = replace(problem, seed=seed + index)
        started = time.perf_counter()
        factors = solve(problem)
        seconds += time.perf_counter() - started
        rebuilt.append(decoded(group, factors))
        weights.append(torch.cat(list(problem.weights)))
        size += group.stored_bytes
    distance, rmse = distances(rebuilt, weights)
    return {
        "bytes": size,
        "cosine distance": distance,
        "RMSE": rmse,
        "loss": own_loss(distance, rmse),
        "seconds": seconds,
    }


def main() -> None:
    """Print a table, and whether `ae` is as good in a tenth of the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["key"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[3.0, 10.0])
    parser.add_argument("--grouping", default="concatenated")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_minilm()
    print(f"MiniLM, {options.grouping}, {options.threads} threads, {options.repeats} turns\n")
    table = Table(None, "autoencoder_speed", COLUMNS, ("kind", "ratio", "preset"))
    verdicts = []
    for kind in options.kinds:
        for ratio in options.ratios:
            turns: dict[str, list[dict[str, float]]] = {PLAIN: [], OURS: [], PAPERS: []}
            for seed in range(options.repeats):
                for preset, found in turns.items():
                    found.append(solved(model, preset, kind, ratio, options.grouping, seed))
            seconds = {p: statistics.median(turn["seconds"] for turn in found) for p, found in turns.items()}
            for preset, found in turns.items():
                means = {name: statistics.mean(turn[name] for turn in found) for name in found[0]}
                table.add(
                    kind=kind,
                    ratio=f"{ratio:g}",
                    preset=preset,
                    **means
                    | {
                        "seconds": seconds[preset],
                        "of paper-r": seconds[preset] / seconds[PAPERS],
                        "worst loss": max(turn["loss"] for turn in found),
                    },
                )
            low = max(t["loss"] for t in turns[OURS]) <= min(t["loss"] for t in turns[PAPERS])
            fast = seconds[OURS] <= SHARE * seconds[PAPERS]
            verdicts.append(
                f"{kind}, ratio {ratio:g}: loss of {OURS} {'as low as' if low else 'HIGHER than'} that of {PAPERS}; "
                f"time {'at most' if fast else 'MORE than'} a tenth of it"
            )
    print("\n" + "\n".join(verdicts))


if __name__ == "__main__":
    main()
