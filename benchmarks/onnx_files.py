"""ONNX files of a compressed encoder beside ONNX Runtime's own of the dense base, and torch.

usage: python benchmarks/onnx_files.py FOLDER BASE LINES [--lines 400] [--rounds 5] [--threads 1] [--cpu-time]

FOLDER is a compressed encoder without a head, BASE the dense one, LINES a text. Files: ours in whole numbers and in float32,
the base's in float32, and that one by `quantize_dynamic`. A session is made in a fresh process, for its seconds and its
memory. Agreement is the mean cosine of sentence embeddings: of our files with the compressed model in torch, of the base's
with the base. Latency is measured in one process, in turns, in another order each time; a ratio is the median of the ratios
to quantize_dynamic in each turn, so that a load on the machine falls on all alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

SHAPES = ((1, 16), (1, 128), (8, 128))
OURS = ("ours int8", "ours float32")


def session_of(file: Path, threads: int) -> Any:
    """Return a session of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options)


def measure_session(file: Path) -> None:
    """Print what a session costs, in this fresh process: seconds of one thread, and MB at the peak and afterwards."""
    before, started = _memory("VmRSS"), time.process_time()
    session_of(file, 1)
    seconds = time.process_time() - started
    print(json.dumps({"seconds": seconds, "peak": _memory("VmHWM") - before, "held": _memory("VmRSS") - before}))


def _memory(field: str) -> float:
    """Return a field of this process's status in MB; what getrusage calls the peak is that of the process before, too."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def dense_files(base: Path, folder: Path) -> dict[str, Path]:
    """Write the base as stock files, float32 and int8, and return them."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    from hf_offline_compress.export.onnx.model import onnx_models, save

    model = AutoModel.from_pretrained(base, dtype="float32").eval()
    whole, whole_numbers = folder / "dense.onnx", folder / "dense-int8.onnx"
    save(onnx_models(model, model, ("float32",), opset=18, token_types=True)["float32"], whole)
    # As with ours, weights end where two products of a byte still fit into 16 bits.
    quantize_dynamic(whole, whole_numbers, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    return {"quantize_dynamic": whole_numbers, "dense float32": whole}


def embeddings(run: Callable[[dict[str, Any]], Any], batches: list[dict[str, Any]]) -> Any:
    """Return embeddings [texts, width] of unit length, by the mean over tokens."""
    parts = []
    for feeds in batches:
        mask = feeds["attention_mask"][..., None]
        mean = (run(feeds) * mask).sum(axis=1) / mask.sum(axis=1)
        parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(parts)


def main() -> None:
    """Read the arguments, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time in place of time on the clock")
    options = parser.parse_args()
    import torch
    from transformers import AutoModel, AutoTokenizer

    from hf_offline_compress import export_folder
    from hf_offline_compress.export.dense import dense_model

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    lines = [line for line in options.text.read_text("utf-8").splitlines() if line.strip()][: options.lines]
    batches = [
        dict(tokenizer(lines[i : i + 1], truncation=True, max_length=128, return_tensors="np"))
        for i in range(len(lines))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        out = export_folder(options.folder, Path(scratch) / "ours", format="onnx", weights="both")
        files = {"ours int8": out / "onnx/model_quantized.onnx", "ours float32": out / "onnx/model.onnx"}
        files |= dense_files(options.base, Path(scratch))
        stored = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
        models = {"ours": dense_model(options.folder), "dense": AutoModel.from_pretrained(options.base).eval()}

        def in_torch(model: Any) -> Callable[[dict[str, Any]], Any]:
            def run(feeds: dict[str, Any]) -> Any:
                with torch.inference_mode():
                    return model(**{k: torch.from_numpy(v) for k, v in feeds.items()})[0].numpy()

            return run

        def in_onnx(session: Any) -> Callable[[dict[str, Any]], Any]:
            names = [value.name for value in session.get_inputs()]
            return lambda feeds: session.run(["last_hidden_state"], {name: feeds[name] for name in names})[0]

        sessions = {name: in_onnx(session_of(file, options.threads)) for name, file in files.items()}
        said = {name: embeddings(in_torch(model), batches) for name, model in models.items()}
        print(f"weights of the folder: {stored / 1e6:.2f} MB; {len(lines)} lines\n")
        print("| file | MB | session, s | peak, MB | held, MB | agreement | agreement with the base |")
        print("|---|---|---|---|---|---|---|")
        for name, file in files.items():
            command = [sys.executable, "-c", f"import onnx_files as o; o.measure_session(o.Path({str(file)!r}))"]
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
            cost, found = json.loads(done.stdout), embeddings(sessions[name], batches)
            same, base = ((found * said[key]).sum(1).mean() for key in ("ours" if name in OURS else "dense", "dense"))
            size = file.stat().st_size / 1e6
            cells = (f"{size:.2f}", f"{cost['seconds']:.1f}", f"{cost['peak']:.0f}", f"{cost['held']:.0f}")
            print(f"| {name} | {' | '.join(cells)} | {same:.5f} | {base:.5f} |")
        latency({**sessions, "torch float32": in_torch(models["dense"])}, tokenizer, options)


def latency(runs: dict[str, Callable[[dict[str, Any]], Any]], tokenizer: Any, options: Any) -> None:
    """Print milliseconds, and ratios to quantize_dynamic, of each shape."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(
        "\n| file | " + " | ".join(f"{batch}×{tokens}" for batch, tokens in SHAPES) + " |\n|---|" + "---|" * len(SHAPES)
    )
    cells: dict[str, list[str]] = {name: [] for name in runs}
    for batch, tokens in SHAPES:
        ids = np.random.default_rng(0).integers(1000, min(20_000, len(tokenizer)), (batch, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.rounds + 1):
            for name in random.Random(turn).sample(list(runs), len(runs)):
                started = clock()
                for _ in range(3):
                    runs[name](feeds)
                if turn:  # the first one warms up
                    taken[name].append((clock() - started) / 3 * 1e3)
        for name, times in taken.items():
            ratios = [own / other for own, other in zip(times, taken["quantize_dynamic"], strict=True)]
            cells[name].append(f"{statistics.median(times):.1f} ms, {statistics.median(ratios):.2f}")
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
