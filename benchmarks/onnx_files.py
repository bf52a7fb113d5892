"""ONNX files of a compressed model beside ONNX Runtime's own of the dense base, and torch.

usage: python benchmarks/onnx_files.py FOLDER BASE LINES [--lines 400] [--stsb FOLDER] [--rounds 5] [--threads 1] [--cpu-time]
                                                     [--sessions]

FOLDER is a compressed encoder without a head or a causal language model, BASE the dense one, LINES a text. Files: ours in
integers and in float32, the base's in float32, and that one by `quantize_dynamic`. A session is made in a fresh process,
for its seconds and its memory; ours is also unpacked before (`unpack_onnx`), in a process of its own. With --sessions that is
all, for ours alone.

Of an encoder: agreement is the mean cosine of sentence embeddings on LINES, of our files with the compressed model in torch,
of the base's with the base; with --stsb, Spearman's correlation (x 100) on --pairs of each stsb-LANGUAGE-dev.csv. Latency is
measured in one process, in turns, in another order each time; a ratio is the median of the ratios to quantize_dynamic in each
turn, so that a load on the machine falls on all alike.

Of a causal model: perplexity on LINES, the share of places at which the most probable token is that of the model in torch, and
tokens a second of greedy text with a cache, in turns.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from hf_offline_compress.foundation.memory import peak_memory, resident_memory

SHAPES = ((1, 16), (1, 128), (8, 128))
KINDS = ("onnxruntime-int8", "onnxruntime-float32")
WINDOW, ANSWER = 256, 48
PROMPT = "The sea is"


def session_of(file: Path, threads: int) -> Any:
    """Return a session of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options)


def measure_session(file: Path) -> None:
    """Print what a session costs, in this fresh process: seconds of one thread, and MB at the peak and afterwards."""
    before, started = resident_memory() / 1e6, time.process_time()
    session = session_of(file, 1)
    seconds = time.process_time() - started
    cost = {"seconds": seconds, "peak": peak_memory() / 1e6 - before, "held": resident_memory() / 1e6 - before}
    _run_once(session)
    print(json.dumps({**cost, "used": resident_memory() / 1e6 - before}))


def measure_unpacking(source: Path, target: Path) -> None:
    """Print what unpacking a file costs, in this fresh process: seconds of one thread, and MB at the peak and afterwards."""
    import onnx  # noqa: F401 # not part of what is measured, as little as onnxruntime

    from hf_offline_compress import unpack_onnx

    before, started = resident_memory() / 1e6, time.process_time()
    unpack_onnx(source, target)
    seconds = time.process_time() - started
    peak, held = peak_memory() / 1e6 - before, resident_memory() / 1e6 - before
    print(json.dumps({"seconds": seconds, "peak": peak, "held": held}))


def _run_once(session: Any) -> None:
    """Run a session on 16 tokens."""
    ids = np.full((1, 16), 100, np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds["position_ids"] = np.arange(16, dtype=np.int64)[None]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    session.run(None, {name: feeds[name] if name in feeds else _empty(shape) for name, shape in inputs.items()})


def _empty(shape: list[Any]) -> Any:
    """Return a cache of no tokens."""
    return np.zeros((1, shape[1], 0, shape[3]), np.float32)


def embeddings(run: Callable[[dict[str, Any]], Any], tokenizer: Any, texts: list[str]) -> Any:
    """Return embeddings [texts, width] of unit length, by the mean over tokens."""
    parts = []
    for text in texts:
        feeds = dict(tokenizer([text], truncation=True, max_length=128, return_tensors="np"))
        feeds.setdefault("token_type_ids", np.zeros_like(feeds["input_ids"]))
        mask = feeds["attention_mask"][..., None]
        mean = (run(feeds) * mask).sum(axis=1) / mask.sum(axis=1)
        parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(parts)


def in_torch(model: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a function from inputs to hidden states, by torch."""
    import inspect

    import torch

    taken = inspect.signature(model.forward).parameters

    def run(feeds: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return model(**{k: torch.from_numpy(v) for k, v in feeds.items() if k in taken})[0].numpy()

    return run


def in_onnx(session: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a function from inputs to hidden states, by ONNX Runtime."""
    names = [value.name for value in session.get_inputs()]
    return lambda feeds: session.run(["last_hidden_state"], {name: feeds[name] for name in names})[0]


def spearman(run: Callable[[dict[str, Any]], Any], tokenizer: Any, options: Any) -> Iterator[float]:
    """Yield Spearman's correlation (x 100) of cosines on pairs of STS-B dev, language by language."""
    from scipy.stats import spearmanr

    for language in options.languages if options.stsb else ():
        with (options.stsb / f"stsb-{language}-dev.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[: options.pairs]
        found = embeddings(run, tokenizer, [options.prefix + text for row in rows for text in row[:2]])
        cosines = (found[0::2] * found[1::2]).sum(1)
        yield 100 * float(spearmanr(cosines, [float(row[2]) for row in rows]).statistic)


def session_costs(files: dict[str, Path], scratch: Path) -> None:
    """Print bytes, and what a session costs in a process of its own; of ours also unpacked before, into a folder."""
    print("| file | MB | session, s | peak, MB | held, MB | after a run, MB |\n|---|---|---|---|---|---|")
    for name, file in files.items():
        _row(name, file, f"measure_session(o.Path({str(file)!r}))")
        if name.startswith("ours"):
            target = scratch / f"unpacked-{file.name}"
            target.unlink(missing_ok=True)
            _row(f"{name}: unpacking", target, f"measure_unpacking(o.Path({str(file)!r}), o.Path({str(target)!r}))")
            _row(f"{name}, unpacked", target, f"measure_session(o.Path({str(target)!r}))")


def _row(name: str, file: Path, call: str) -> None:
    """Print what a call of this module costs in a fresh process, beside the size of a file that is there by then."""
    command = [sys.executable, "-c", f"import onnx_files as o; o.{call}"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    cost = json.loads(done.stdout)
    size, used = file.stat().st_size / 1e6, f"{cost['used']:.0f}" if "used" in cost else ""
    cells = (f"{cost['seconds']:.2f}", f"{cost['peak']:.0f}", f"{cost['held']:.0f}", used)
    print(f"| {name} | {size:.2f} | {' | '.join(cells)} |", flush=True)


def of_encoder(files: dict[str, Path], models: dict[str, Any], tokenizer: Any, options: Any, lines: list[str]) -> None:
    """Print how near an encoder's files come, and how fast they are."""
    torch_runs = {name: in_torch(model) for name, model in models.items()}
    said = {name: embeddings(run, tokenizer, lines) for name, run in torch_runs.items()}
    sessions = {name: in_onnx(session_of(file, options.threads)) for name, file in files.items()}
    languages = options.languages if options.stsb else []
    print("\n| file | agreement | agreement with the base | " + " | ".join(languages) + " |")
    print("|---|---|---|" + "---|" * max(1, len(languages)))
    for name, run in sessions.items():
        found = embeddings(run, tokenizer, lines)
        own = said["ours" if name.startswith("ours") else "dense"]
        same, base = ((found * other).sum(1).mean() for other in (own, said["dense"]))
        values = [f"{value:.2f}" for value in spearman(run, tokenizer, options)]
        print(f"| {name} | {same:.5f} | {base:.5f} | {' | '.join(values)} |", flush=True)
    latency({**sessions, "dense in torch": torch_runs["dense"]}, tokenizer, options)


def latency(runs: dict[str, Callable[[dict[str, Any]], Any]], tokenizer: Any, options: Any) -> None:
    """Print milliseconds, and ratios to quantize_dynamic, of each shape."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    shapes = " | ".join(f"{batch}×{tokens}" for batch, tokens in SHAPES)
    print(f"\n| file | {shapes} |\n|---|{'---|' * len(SHAPES)}")
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
            ratios = sorted(own / other for own, other in zip(times, taken["quantize_dynamic"], strict=True))
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells[name].append(f"{statistics.median(times):.1f} ms, {spread}")
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


def generated(session: Any, ids: list[int], count: int) -> list[int]:
    """Return the tokens that follow others, always the most probable one, with a cache."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    past = {name: _empty(shape) for name, shape in shapes.items() if name.startswith("past_key_values.")}
    new, found = ids, list(ids)
    for _ in range(count):
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(found)), np.int64), **past}
        feeds["position_ids"] = np.arange(len(found) - len(new), len(found))[None]
        values = dict(zip(outputs, session.run(None, {name: feeds[name] for name in shapes}), strict=True))
        past = {name: values[name.replace("past_key_values", "present")] for name in past}
        new = [int(values["logits"][0, -1].argmax())]
        found += new
    return found[len(ids) :]


def of_causal_model(
    files: dict[str, Path], models: dict[str, Any], tokenizer: Any, options: Any, lines: list[str]
) -> None:
    """Print how near a causal model's files come, and how fast they generate, one at a time: they are large."""
    import torch

    from hf_offline_compress.evaluate.onnx_model import OnnxModel
    from hf_offline_compress.metrics.perplexity import causal_perplexity

    window = torch.tensor([tokenizer("\n".join(lines))["input_ids"][:WINDOW]])
    own: dict[str, Any] = {}
    print("\n| file | perplexity | first choice as in torch | tokens a second |\n|---|---|---|---|")
    dense = models["dense"]
    # Perplexity goes by the name of a model's class.
    called = type(type(dense).__name__, (OnnxModel,), {})
    config = dense.config
    del dense
    for name in [*(f"{name} in torch" for name in models), *files]:
        kind = "ours" if name.startswith("ours") else "dense"
        model = called(files[name], config).eval() if name in files else models.pop(kind)
        value = causal_perplexity(model, tokenizer, lines, block=WINDOW, stride=WINDOW // 2).perplexity
        with torch.inference_mode():
            first = model(input_ids=window).logits[0].argmax(-1)
        same = (first == own.setdefault(kind, first)).float().mean()
        speed = ""
        if name in files:
            ids = tokenizer(PROMPT)["input_ids"]
            generated(model.session, ids, 4)
            clock = time.process_time if options.cpu_time else time.perf_counter
            started = clock()
            generated(model.session, ids, ANSWER)
            speed = f"{ANSWER / (clock() - started):.1f}"
        print(f"| {name} | {value:.2f} | {same:.3f} | {speed} |", flush=True)
        del model
        gc.collect()


def main() -> None:
    """Read the arguments, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument(
        "--stsb", type=Path, help="a folder with stsb-LANGUAGE-dev.csv: sentence 1, sentence 2, similarity"
    )
    parser.add_argument("--languages", nargs="+", default=["en"])
    parser.add_argument("--pairs", type=int, help="of each language; all if not given")
    parser.add_argument("--prefix", default="", help="before each sentence of STS-B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time in place of time on the clock")
    parser.add_argument("--keep", type=Path, help="a folder where the files stay; those that are there are used")
    parser.add_argument("--sessions", action="store_true", help="only what sessions of ours cost")
    options = parser.parse_args()
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from hf_offline_compress import export_folder
    from hf_offline_compress.evaluate.onnx_alternatives import dense_files
    from hf_offline_compress.export.dense import dense_model

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    lines = [line for line in options.text.read_text("utf-8").splitlines() if line.strip()][: options.lines]
    (architecture,) = AutoConfig.from_pretrained(options.base).architectures
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    with tempfile.TemporaryDirectory() as scratch:
        place = (options.keep or Path(scratch)).resolve()
        place.mkdir(exist_ok=True)
        out = place / "ours"
        if not out.exists():
            export_folder(options.folder, out, format="onnx", weights="both")
        files = {"ours int8": out / "onnx/model_quantized.onnx", "ours float32": out / "onnx/model.onnx"}
        if options.sessions:
            session_costs(files, place)
            return
        dense = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(options.base, dtype="float32").eval()
        made = dict(zip(KINDS, (place / "dense-int8.onnx", place / "dense.onnx"), strict=True))
        if not all(file.exists() for file in made.values()):
            made = dense_files(dense, place, KINDS, cached=causal, token_types=not causal)
        files |= dict(zip(("quantize_dynamic", "dense float32"), map(made.get, KINDS), strict=True))
        stored = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
        print(f"weights of the folder: {stored / 1e6:.2f} MB; {len(lines)} lines, {options.threads} threads\n")
        session_costs(files, place)
        models = {"ours": dense_model(options.folder), "dense": dense}
        (of_causal_model if causal else of_encoder)(files, models, tokenizer, options, lines)


if __name__ == "__main__":
    main()
