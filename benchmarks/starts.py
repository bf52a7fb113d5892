"""Closed-form starts of Kronecker and Tucker against random starts of the same factors, and against their polished forms.

usage: python benchmarks/starts.py [--kinds key output word_embeddings] [--ratios 3 10] [--steps 300] [--presets kronecker]

Matrices of MiniLM, grouped as the presets do. `random` is the same tensors drawn at random, of the target's scale, and
trained on L2 by Adam on all rows at once, a cosine schedule, the better of several learning rates (each in units of the
factors' scale); its seconds are those of the better run alone. `polished` is the start trained further by the package, on
L2 and on 0.9091 · cosine distance + 0.0909 · RMSE. `loss` is that sum, `relative error` ‖W − Ŵ‖ / ‖W‖, both over all rows.
"""

import argparse
import math
import time
from dataclasses import replace
from typing import Any

import torch
from common import COSINE, L2, Table, decoded, distances, load_minilm, own_loss, problems
from torch import Tensor

from hf_offline_compress import Objective
from hf_offline_compress.plan.make import Group
from hf_offline_compress.request.reading import load_recipe
from hf_offline_compress.solvers import Factors, Problem, solve

TOLERANCE = 1e-4
COLUMNS = {
    "preset": "",
    "kind": "",
    "ratio": "",
    "variant": "",
    "numbers": ".0f",
    "relative error": ".5f",
    "cosine distance": ".5f",
    "loss": ".5f",
    "seconds": ".2f",
}


def rows_of(tensors: dict[str, Tensor], problem: Problem) -> Tensor:
    """Return the rows that factors of all members, stacked, stand for, [rows of all members, columns].

    Args:
        tensors: `left` [members, terms, a, c] and `right` [terms, b, d]; or `mixing` [members · blocks, r], `core`
            [r, s, t], `row_factor` [block rows, s] and `column_factor` [columns, t].
        problem: the matrices that they stand for.
    """
    members, (rows, columns) = len(problem.weights), problem.weights[0].shape
    if "left" in tensors:
        whole = torch.einsum("mtac,tbd->mabcd", tensors["left"], tensors["right"]).flatten(3, 4).flatten(1, 2)
    else:
        slices = torch.einsum("br,rst->bst", tensors["mixing"], tensors["core"])
        whole = (tensors["row_factor"] @ slices) @ tensors["column_factor"].T
        whole = whole.reshape(members, -1, columns)
    return whole[:, :rows, :columns].flatten(0, 1)


def stacked(factors: Factors) -> dict[str, Tensor]:
    """Return a group's factors as `rows_of` takes them."""
    own = {name: [member[name] for member in factors.members] for name in factors.members[0]}
    if not ("left" in own or "mixing" in own):
        raise SystemExit("A matrix alone has no third side: Tucker stores it as low rank, and its start is the best.")
    return {name: torch.cat(t) if name == "mixing" else torch.stack(t) for name, t in own.items()} | factors.decoder


def trained(start: dict[str, Tensor], problem: Problem, steps: int, rate: float, seed: int) -> Tensor:
    """Return the rows of factors like `start`, but from random numbers, after `steps` of Adam on L2."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([weight.float() for weight in problem.weights])
    values = {name: torch.randn(t.shape, generator=generator) for name, t in start.items()}
    # Equal shares of the scale that brings the rows to the target's.
    share = float(rows.norm() / rows_of(values, problem).norm()) ** (1 / len(values))
    values = {name: (value * share).requires_grad_() for name, value in values.items()}
    optimizer = torch.optim.Adam(values.values(), lr=rate * share, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (rows_of(values, problem) - rows).square().mean().sqrt().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return rows_of(values, problem)


def solutions(
    group: Group, problem: Problem, options: argparse.Namespace
) -> tuple[dict[str, tuple[Tensor, float]], int]:
    """Return for each variant its rows and seconds, and how many numbers it stores."""
    structure = problem.structure
    variants = {
        "start": replace(problem, structure=replace(structure, polish=0), objective=Objective(l2=1.0)),
        "polished, L2": replace(problem, objective=Objective(l2=1.0)),
        "polished, cosine + L2": replace(problem, objective=Objective(cosine=COSINE, l2=L2)),
    }
    found = {}
    for name, variant in variants.items():
        started = time.perf_counter()
        factors = solve(variant)
        found[name] = decoded(group, factors), time.perf_counter() - started
        if name == "start":
            start = stacked(factors)
    # What is trained from random numbers below is what the package's layers run.
    torch.testing.assert_close(rows_of(start, problem), found["start"][0], rtol=1e-3, atol=1e-4)
    rows = torch.cat([weight.float() for weight in problem.weights])
    runs = []
    for rate in options.rates:
        started = time.perf_counter()
        result = trained(start, problem, options.steps, rate, options.seed)
        runs.append((result, time.perf_counter() - started))
    found["random, L2"] = min(runs, key=lambda run: float((run[0] - rows).norm()))
    return found, sum(value.numel() for value in start.values())


def compared(
    model: Any, preset: str, kind: str, ratio: float, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return variant → columns of the table, over all groups of a kind."""
    gathered: dict[str, list[tuple[Tensor, float]]] = {}
    weights, numbers = [], 0
    for group, problem in problems(model, load_recipe(preset).override(modules=kind, ratio=ratio)):
        found, size = solutions(group, problem, options)
        for variant, result in found.items():
            gathered.setdefault(variant, []).append(result)
        weights.append(torch.cat([weight.float() for weight in problem.weights]))
        numbers += size
    scale = (sum(float(w.double().square().sum()) for w in weights) / sum(w.numel() for w in weights)) ** 0.5
    table = {}
    for variant in ("random, L2", "start", "polished, L2", "polished, cosine + L2"):
        distance, rmse = distances([rows for rows, _ in gathered[variant]], weights)
        table[variant] = {
            "numbers": numbers,
            "relative error": rmse / scale,
            "cosine distance": distance,
            "loss": own_loss(distance, rmse),
            "seconds": sum(seconds for _, seconds in gathered[variant]),
        }
    return table


def main() -> None:
    """Print a table, and whether what should be lower is lower everywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["kronecker", "tucker"], choices=["kronecker", "tucker"])
    parser.add_argument("--kinds", nargs="+", default=["key", "output", "word_embeddings"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[3.0, 10.0])
    parser.add_argument("--steps", type=int, default=300, help="of training from random numbers")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[0.05, 0.2], help="learning rates; the better one counts"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_minilm()
    print(f"MiniLM; random starts: {options.steps} steps, {torch.get_num_threads()} threads\n")
    table = Table(None, "starts", COLUMNS, ("preset", "kind", "ratio", "variant"))
    above: dict[str, list[str]] = {"start <= random": [], "polished <= start": []}
    for preset in options.presets:
        for kind in options.kinds:
            for ratio in options.ratios:
                found = compared(model, preset, kind, ratio, options)
                for variant, values in found.items():
                    table.add(preset=preset, kind=kind, ratio=f"{ratio:g}", variant=variant, **values)
                most, where = 1 + TOLERANCE, f"{preset} {kind} {ratio:g}"
                start = found["start"]
                if start["relative error"] > most * found["random, L2"]["relative error"]:
                    above["start <= random"].append(where)
                for variant, column in (("polished, L2", "relative error"), ("polished, cosine + L2", "loss")):
                    if found[variant][column] > most * start[column]:
                        above["polished <= start"].append(f"{where} ({variant})")
    print()
    for claim, exceptions in above.items():
        print(f"{claim}: {'everywhere' if not exceptions else 'NOT for ' + ', '.join(exceptions)}")


if __name__ == "__main__":
    main()
