"""Speed, memory and bytes of a compressed folder beside its base and simple alternatives.

Every model runs in a fresh process, so that its memory is measured separately. All keep running and are timed in turn,
round after round: whatever slows the machine down for a while slows all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import CompressionError, listing
from ..export.onnx.folder import generates
from ..foundation.arguments import seed_of
from ..foundation.processes import launched_processes
from ..foundation.progress import bar, stage
from ..measure.texts import load_texts
from .onnx_alternatives import RUNTIMES, dense_files, too_large, why_not
from .onnx_model import check_onnx
from .pair import Pair, find_pair
from .records import check_writable, library_versions, saving, write_evaluations

LOADS = 3
WARM_UP = 2
# What a process holds → how results name it
MODELS = {
    "base": "base",
    "bfloat16": "bfloat16",
    "int8": "int8 (torch dynamic)",
    "compressed": "compressed",
    "on_the_fly": "compressed, on the fly",
    "ours-int8": "compressed, int8",
    "onnxruntime-float32": "float32 (ONNX Runtime)",
    "onnxruntime-int8": "int8 (ONNX Runtime)",
    "openvino-int8": "int8 (OpenVINO)",
}
# A file that was exported from the folder, which is measured where one is given.
EXPORTED = "ours-onnx"
NAMES = {**MODELS, EXPORTED: "compressed, ONNX Runtime"}
# Those that run the folder, and how each holds its weights.
OURS = {"compressed": "cached", "on_the_fly": "on_the_fly", "ours-int8": "int8"}
# Tokens of the package's own text by which models are compared with the base.
COMPARED = (4, 64)


@dataclass(frozen=True)
class Cell:
    """One batch size at one length."""

    batch: int
    length: int


class Worker:
    """A process that holds one model; see `benchmark_worker`."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        """Start the process, and do not wait for it; `settings` are those of `benchmark_worker.Held`."""
        self.name = name
        command = [sys.executable, "-m", f"{__package__}.benchmark_worker"]
        # The process must find this very package, and may have been started from anywhere.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        self.process = subprocess.Popen(  # noqa: S603 (our own module)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.threads = 0
        self._send(settings)

    def wait_until_ready(self) -> None:
        """Return when the process has imported all that it needs.

        Raises:
            CompressionError: it could not.
        """
        self.threads = int(self._receive()["threads"])

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Return the process's answer.

        Raises:
            CompressionError: the process cannot do it, or is gone.
        """
        self._send({"do": do, **options})
        return self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # that it is gone shows when its answer does not come
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise CompressionError(
                f"The process that measures '{self.name}' ended with code {code}, usually for lack of memory; pass a "
                "smaller --batch or --length."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CompressionError(f"'{self.name}' cannot be measured: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing; it has nothing to lose."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self.process.wait()


def benchmark_folder(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    batches: Sequence[int] = (1, 32),
    lengths: Sequence[int] = (128,),
    models: Sequence[str] = tuple(MODELS),
    repeats: int = 9,
    threads: int | None = None,
    device: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    onnx: str | Path | None = None,
    write: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a compressed folder, its base, and the base in other forms; put the result into evaluation.json.

    All compute in float32 except bfloat16 and int8. Measured: one forward pass over random tokens, loading from a warm
    cache, memory, and agreement with the base's outputs on some of the package's own text. ONNX files of the base
    are made temporarily if the packages for them are installed: in float32, and in int8 by ONNX
    Runtime's `quantize_dynamic`, which OpenVINO runs too.

    Args:
        folder: that this package has written.
        base: folder or Hub id of the base; by default what the folder's report names, if that is on the Hub.
        batches: sequences in one pass.
        lengths: tokens of each; every batch is measured at every length.
        models: what is measured, of `MODELS`: base, bfloat16, int8, compressed, on_the_fly, ours-int8, onnxruntime-float32,
            onnxruntime-int8, openvino-int8.
        repeats: rounds over all models, after two that do not count.
        threads: of the CPU; torch's own choice by default.
        device: where to compute; by default the CPU.
        seed: of the tokens.
        revision: of a base on the Hub.
        onnx: a file that was exported from the folder, measured as one more.
        write: put the result into evaluation.json.
        progress: show progress bars.

    Returns:
        Plain JSON, see `docs/evaluating.md`: of every model the bytes on disk, the median seconds of loading, the memory
        and, for each batch and length, the median and quartiles of latency; `agreement`, the mean cosine of the outputs at
        each token with the base's, if that is measured too and has the same tokens.

    Raises:
        CompressionError: the request cannot be met. Nothing has been written.
        UnsavedError: the result cannot be saved; the error has it.
    """
    for name, values in {"batch": batches, "length": lengths, "repeats": [repeats], "threads": [threads or 1]}.items():
        if not values or any(value < 1 for value in values):
            raise CompressionError(f"The {name} must be at least 1, not {', '.join(map(str, values)) or 'nothing'}.")
    for name in models or ["nothing"]:
        if name not in MODELS:
            raise CompressionError(f"The model '{name}' cannot be measured; known: {listing(MODELS)}.")
    where = launched_processes(device)
    if where.count > 1:
        raise CompressionError("A benchmark measures one model at a time; run it without accelerate launch.")
    seed = seed_of(seed)
    check_onnx(onnx, fine_tune=False, dtype="float32")
    pair = find_pair(folder, base, revision=revision, onnx=onnx)
    positions = int(pair.tokenizer.model_max_length)
    if max(lengths) > positions:
        raise CompressionError(
            f"A length of {max(lengths)} tokens was asked for, and '{pair.contents.name}' takes {positions}; pass shorter ones."
        )
    if write:
        check_writable(pair.folder)
    cells = [Cell(batch, length) for length in dict.fromkeys(lengths) for batch in dict.fromkeys(batches)]
    with TemporaryDirectory() as scratch:
        files, missing = _onnx_files(pair, models, str(where.device), Path(scratch))
        smallest = min(cells, key=lambda cell: cell.batch * cell.length)
        workers, unavailable = _start(pair, models, str(where.device), threads, seed, progress, files, smallest)
        try:
            measured = _measure(workers, cells, repeats, progress, _disk_bytes(pair))
            used_threads = next(iter(workers.values())).threads
            if "base" in workers and pair.same_tokens:
                for each, found in zip(measured, _agreements(workers, pair, Path(scratch)), strict=True):
                    each["agreement"] = found
        finally:
            for worker in workers.values():
                worker.close()
    result = {
        "device": str(where.device),
        "threads": used_threads,
        "versions": library_versions(),
        "seed": seed,
        "repeats": repeats,
        "dtype": "float32",
        "memory_kind": (
            "CUDA memory allocated" if str(where.device).startswith("cuda") else "resident memory of the process"
        )
        + " above that before loading: at the peak (memory_bytes), loaded and after one pass (loaded_bytes)",
        "models": measured,
        "unavailable": [*unavailable, *missing],
    }
    if write:
        with saving(result):
            write_evaluations(pair.folder, benchmark=result)
    return result


def _onnx_files(
    pair: Pair, models: Sequence[str], device: str, scratch: Path
) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """Return the ONNX files that are measured by their kinds, made if they are the base's; and what cannot be, and why."""
    on_cpu = device.startswith("cpu")
    if pair.onnx is not None and not on_cpu:
        raise CompressionError(f"An ONNX file is measured on the CPU, not on {device}; leave --device out, or --onnx.")
    files: dict[str, Path] = {} if pair.onnx is None else {EXPORTED: pair.onnx}
    reasons = {
        kind: why_not(kind, pair.contents.config) if on_cpu else "ONNX files are measured on the CPU only"
        for kind in RUNTIMES
        if kind in models
    }
    made = [kind for kind, reason in reasons.items() if reason is None]
    if made:
        with stage("making ONNX files of the base"):
            cached = generates(pair.contents.config)
            token_types = not cached and "token_type_ids" in pair.tokenizer.model_input_names
            base = pair.load_base()
            if reason := too_large(base):
                reasons |= dict.fromkeys(made, reason)
            else:
                files |= dense_files(base, scratch, made, cached=cached, token_types=token_types)
    missing = [{"name": NAMES[kind], "reason": reason} for kind, reason in reasons.items() if reason is not None]
    if not files and reasons.keys() == set(models):
        raise CompressionError(f"Nothing can be measured: {missing[0]['name']}: {missing[0]['reason']}.")
    return files, missing


def _agreements(workers: dict[str, Worker], pair: Pair, scratch: Path) -> list[float]:
    """Return the mean cosine of each model's outputs to the base's, on some of the package's own text."""
    batch, length = COMPARED
    length = min(length, int(pair.tokenizer.model_max_length))
    text = load_texts("bundled")
    assert text is not None
    ids: list[int] = []
    for line in text.texts:
        ids += pair.tokenizer(line, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        if len(ids) >= batch * length:
            break
    rows = [ids[start : start + length] for start in range(0, min(len(ids), batch * length) - length + 1, length)]
    file = str(scratch / "base.npy")
    found: dict[str, float] = {}
    for kind in sorted(workers, key=lambda kind: kind != "base"):
        found[kind] = float(workers[kind].ask("agree", ids=rows, file=file, write=kind == "base")["agreement"])
    return [found[kind] for kind in workers]


def _start(
    pair: Pair,
    models: Sequence[str],
    device: str,
    threads: int | None,
    seed: int,
    progress: bool,
    files: Mapping[str, Path],
    smallest: Cell,
) -> tuple[dict[str, Worker], list[dict[str, str]]]:
    """Start a process for every model, load it and run it once; return them, and what is not available and why."""
    unavailable: list[dict[str, str]] = []
    workers: dict[str, Worker] = {}
    _warm(pair)
    try:
        for kind, name in NAMES.items():
            if kind not in files and (kind not in models or kind in RUNTIMES):
                continue
            ours = kind in OURS or kind == EXPORTED
            settings = {
                "kind": kind,
                "folder": str((pair.folder if ours else pair.base.folder).resolve()),
                "architecture": pair.architecture,
                "device": device,
                "threads": threads,
                "seed": seed,
                "file": str(files[kind].resolve()) if kind in files else None,
            }
            if kind in ("int8", "ours-int8") and not device.startswith("cpu"):
                unavailable.append({"name": name, "reason": "integer kernels run on the CPU only"})
            else:
                workers[kind] = Worker(name, settings)  # they import side by side
        for kind in bar(list(workers), "starting", "model", progress):
            workers[kind].wait_until_ready()
        for kind in list(workers):
            if reason := _missing(workers[kind], kind, smallest):
                workers.pop(kind).close()
                unavailable.append({"name": NAMES[kind], "reason": reason})
        if not workers:
            raise CompressionError(f"Nothing can be measured: {unavailable[0]['name']}: {unavailable[0]['reason']}.")
    except BaseException:
        for worker in workers.values():
            worker.close()
        raise
    return workers, unavailable


def _missing(worker: Worker, kind: str, smallest: Cell) -> str | None:
    """Load a worker's model and run it once; return why there is nothing to measure, or None."""
    try:
        loaded = worker.ask("load")
        worker.ask("forward", batch=smallest.batch, length=smallest.length)
    except CompressionError as error:
        if kind not in ("int8", "ours-int8", *RUNTIMES):
            raise
        return str(error)
    if kind in ("on_the_fly", "ours-int8") and not loaded["decodes"]:
        return "nothing is decoded, all weights are applied as they are stored"
    return None


def _measure(
    workers: dict[str, Worker], cells: Sequence[Cell], repeats: int, progress: bool, disk: dict[str, int]
) -> list[dict[str, Any]]:
    loaded = {name: worker.ask("memory")["now"] for name, worker in workers.items()}
    times: dict[str, dict[Cell, list[float]]] = {name: {cell: [] for cell in cells} for name in workers}
    for cell in cells:
        for turn in bar(range(-WARM_UP, repeats), f"{cell.batch} x {cell.length}", "round", progress):
            # Each round begins with another model, so that none is always behind the same one.
            names = [*workers][turn % len(workers) :] + [*workers][: turn % len(workers)]
            for name in names:
                spent = workers[name].ask("forward", batch=cell.batch, length=cell.length)["ms"]
                if turn >= 0:
                    times[name][cell].append(spent)
    memory = {name: worker.ask("memory")["peak"] for name, worker in workers.items()}
    loads: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    with stage("loading each model again, to time it"):
        for _ in range(LOADS):
            for name, worker in workers.items():
                loads[name].append(worker.ask("load"))
    return [
        {
            "name": NAMES[name],
            "disk_bytes": disk.get(name, loads[name][0]["tensor_bytes"]),
            "load_seconds": statistics.median(load["seconds"] for load in loads[name]),
            "memory_bytes": memory[name],
            "loaded_bytes": loaded[name],
            "latency": [_latency(cell, times[name][cell]) for cell in cells],
        }
        for name in workers
    ]


def _latency(cell: Cell, milliseconds: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles of times, and the tokens in a second at the median."""
    median = statistics.median(milliseconds)
    low, _, high = statistics.quantiles(milliseconds, method="inclusive") if len(milliseconds) > 1 else [median] * 3
    return {
        "batch": cell.batch,
        "length": cell.length,
        "median_ms": round(median, 3),
        "low_ms": round(low, 3),
        "high_ms": round(high, 3),
        "tokens_per_second": round(cell.batch * cell.length / median * 1000, 1),
    }


def _disk_bytes(pair: Pair) -> dict[str, int]:
    """Return the bytes of the weight files that there are; the alternatives to the base are never stored."""
    ours = sum(file.stat().st_size for file in pair.folder.glob("*.safetensors"))
    return {
        "base": sum(file.stat().st_size for file in _weight_files(pair.base.folder)),
        **dict.fromkeys(OURS, ours),
    }


def _weight_files(folder: Path) -> list[Path]:
    return list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))


def _warm(pair: Pair) -> None:
    """Read all weights once, so that no model is loaded from a cold disk and others from memory."""
    for file in [*_weight_files(pair.base.folder), *pair.folder.glob("*.safetensors")]:
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
