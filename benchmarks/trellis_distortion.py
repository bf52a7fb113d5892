"""Mean squared error of trellis codes on standard normal numbers, at every rate: the constants of `structures.trellis`.

usage: python benchmarks/trellis_distortion.py [--state-bits 10] [--rows 1024] [--columns 256]

Beside it the bound that no code can beat (rate and distortion), and what rounding each number by itself reaches at best
(Lloyd-Max, Max 1960).
"""

import argparse

import torch

from hf_offline_compress.request.objective import Objective
from hf_offline_compress.solvers import Problem, solve
from hf_offline_compress.structures import Trellis
from hf_offline_compress.structures.trellis import DISTORTIONS, bits_a_weight

LLOYD_MAX = {1.0: 0.3634, 2.0: 0.1175, 3.0: 0.03454, 4.0: 0.009497, 5.0: 0.002499}


def main() -> None:
    """Print one line a rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-bits", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=256)
    arguments = parser.parse_args()
    weight = torch.randn(arguments.rows, arguments.columns, generator=torch.Generator().manual_seed(0))
    structure = Trellis(state_bits=arguments.state_bits, outliers=0.0)
    print("| bits a weight | measured | in use | bound | Lloyd-Max |\n|---|---|---|---|---|")
    for size in sorted(set(DISTORTIONS) - {0}):
        bits = bits_a_weight(size)
        factors = solve(Problem(structure, Objective(l2=1.0), size, (weight,)))
        scalar = f"{LLOYD_MAX[bits]:.4f}" if bits in LLOYD_MAX else ""
        error = factors.notes["error"] ** 2
        print(f"| {bits:g} | {error:.5f} | {DISTORTIONS[size]} | {4**-bits:.5f} | {scalar} |", flush=True)


if __name__ == "__main__":
    main()
