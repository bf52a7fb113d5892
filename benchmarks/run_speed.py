"""Latency and memory of a compressed model beside the dense one, however its weights are held, and what others do in int8.

usage: python benchmarks/run_speed.py [--folder FOLDER | --preset tiny --architecture BertModel] [--rounds 5] [--threads 2]
       [--variants dense cached int8 onnxruntime-int8 ...] [--shapes 1x16 1x128] [--only memory]
       python benchmarks/run_speed.py --folder FOLDER --only quality --text FILE [--variants cached int8]

Without a folder it is a BERT-base (or another architecture of that size) with random codes, made from its config alone:
bytes and speed do not depend on what the codes say. All variants are timed in one process, in turns, in another order each
time; a ratio is the median of the ratios to dense in each turn, so that a load on the machine that comes and goes falls on
all alike. Where it is heavy, `--threads 1 --cpu-time` measures processor time in place of time on the clock.
Files of the dense model for ONNX Runtime and OpenVINO are those of `benchmark`; `ours-onnx` is the folder, exported in int8.

Memory is counted, not sampled: every tensor that comes to be while weights are decoded, as long as it is there. A second
table has the resident memory of a fresh process for each variant, and what importing torch and transformers takes of it.
"""

import argparse
import csv
import importlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoTokenizer, BertConfig, GPT2Config, PreTrainedModel, RobertaConfig

from hf_offline_compress import export_folder
from hf_offline_compress.evaluate.alternatives import int8
from hf_offline_compress.evaluate.onnx_alternatives import RUNTIMES, dense_files, why_not
from hf_offline_compress.evaluate.onnx_model import OnnxModel
from hf_offline_compress.export.onnx.folder import generates
from hf_offline_compress.foundation.memory import peak_memory, resident_memory
from hf_offline_compress.plan.make import Group, make_plan
from hf_offline_compress.registration import register
from hf_offline_compress.request.reading import load_recipe
from hf_offline_compress.runtime.layers_compressed import CompressedLinear
from hf_offline_compress.runtime.modeling_compressed import compressed_class
from hf_offline_compress.runtime.weights_compressed import DecodedWeight
from hf_offline_compress.structures import Mixture, Trellis

OURS_ONNX = "ours-onnx"
VARIANTS = ("dense", "cached", "bounded", "on_the_fly", "int8", "torch-int8", *RUNTIMES, OURS_ONNX)
SHAPES = ("1x16", "1x128", "8x128", "32x128")
DECODERS = ("dense_weight", "row_block", "some_rows")
CONFIGS = {"Bert": BertConfig, "Roberta": RobertaConfig, "GPT2": GPT2Config}


def made(architecture: str, preset: str, folder: Path) -> None:
    """Write a compressed model of random codes, of the size of the architecture's base model."""
    config = next(made for name, made in CONFIGS.items() if architecture.startswith(name))()
    plan = make_plan(config.to_dict(), load_recipe(preset), architecture=architecture, dtype="float32")
    plan = plan.reformed({group.name: in_classes(group) for group in plan.groups})
    model_class = compressed_class(getattr(transformers, architecture))
    content = {name: value for name, value in config.to_dict().items() if name in vars(config)}
    for name in ("model_type", "transformers_version", "architectures", "_name_or_path"):
        content.pop(name, None)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**content, compression=plan.runtime()))
    for buffer in model.buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(256)
    model.save_pretrained(folder)


def in_classes(group: Group) -> Group:
    """Return a group as it usually is after allocation: rows of a trellis' embedding of words in classes of all rates."""
    structure = group.structure
    if not isinstance(structure, Trellis) or group.matrices[0].kind != "word_embeddings":
        return group
    streams = structure.streams(group.shape)
    few = streams // 12
    classes = (*((step, few) for step in (8, 7, 6, 5, 4, 3)), (2, streams - 6 * few))
    return replace(group, size=Mixture(classes))


def onnx_files(variants: Sequence[str], folder: Path, scratch: Path) -> dict[str, Path]:
    """Write what is run as ONNX files, and return it by its name; what is not installed is left out, and named."""
    found = {}
    config = json.loads((folder / "config.json").read_text())
    kinds = []
    for kind in [kind for kind in RUNTIMES if kind in variants]:
        if reason := why_not(kind, config):
            print(f"not measured: {kind}: {reason}")
        else:
            kinds.append(kind)
    if kinds:
        found |= dense_files(loaded("dense", folder, 0), scratch, kinds, cached=generates(config), token_types=False)
    if OURS_ONNX in variants:
        found[OURS_ONNX] = export_folder(folder, scratch / "ours", format="onnx") / "onnx/model_quantized.onnx"
    return found


def loaded(variant: str, folder: Path, bound: int, file: Path | None = None) -> Any:
    """Return the model in a folder, in float32, or a stock one of its shapes with random weights; or an ONNX file."""
    if file is not None:
        stock_config = AutoConfig.from_pretrained(folder)
        return OnnxModel(file, stock_config, "openvino" if variant.startswith("openvino") else "onnxruntime")
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    stock = getattr(transformers, architecture.removeprefix("Compressed"))
    if variant in ("dense", "torch-int8"):
        config = stock.config_class(**{k: v for k, v in config.items() if k not in ("model_type", "compression")})
        model = stock(config).eval()
        return int8(model) if variant == "torch-int8" else model
    model = compressed_class(stock).from_pretrained(folder, dtype=torch.float32).eval()
    model.set_decoding("cached" if variant == "bounded" else variant, bound if variant == "bounded" else None)
    return model


def tensor_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def inputs_for(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def seconds(model: PreTrainedModel, ids: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of a forward pass."""
    start = clock()
    with torch.no_grad():
        model(ids)
    return clock() - start


class Decoded(TorchDispatchMode):
    """Bytes of all tensors that were made while weights were decoded and are still there; `peak` is the most there were."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        before = {id(tensor) for tensor in args if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and id(result) not in before and not func.is_view:
            storage = result.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in all decoding of whatever model is run meanwhile."""
        owners = [cls for cls in _subclasses(DecodedWeight) if any(name in vars(cls) for name in DECODERS)]
        kept = {(cls, name): vars(cls)[name] for cls in owners for name in DECODERS if name in vars(cls)}
        for (cls, name), method in kept.items():
            setattr(cls, name, self._counted(method))
        try:
            yield
        finally:
            for (cls, name), method in kept.items():
                setattr(cls, name, method)

    def _counted(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            with self:
                return method(*args, **kwargs)

        return counted


def _subclasses(cls: type) -> list[type]:
    return [cls, *(found for child in cls.__subclasses__() for found in _subclasses(child))]


def resident() -> dict[str, float]:
    """Return the resident memory of this process in MB: now, and at its peak."""
    return {"VmRSS": resident_memory() / 1e6, "VmHWM": peak_memory() / 1e6}


def measure(variant: str, folder: Path, bound: int, file: Path | None) -> None:
    """Load a variant in this process, run it, and print its memory as JSON."""
    if file is not None:
        importlib.import_module("openvino" if variant.startswith("openvino") else "onnxruntime")
    found = {"imports": resident()["VmRSS"]}
    model = loaded(variant, folder, bound, file)
    ids = inputs_for(model, 1, 128)
    for _ in range(2):
        seconds(model, ids)
    print(json.dumps({**found, **resident()}))


def speed_table(models: dict[str, Any], shapes: Sequence[str], rounds: int, clock: Callable[[], float]) -> None:
    """Print milliseconds of the dense model, and the others' ratios to it."""
    order = random.Random(0)
    names = [name for name in models if name != "dense"]
    print("| batch | dense, ms | " + " | ".join(names) + " |\n|" + "---|" * (2 + len(names)))
    for batch, length in [map(int, shape.split("x")) for shape in shapes]:
        ids = inputs_for(models["dense"], batch, length)
        for model in models.values():
            seconds(model, ids)
        turns = []
        for _ in range(rounds * (5 if batch * length <= 128 else 1)):
            turn = order.sample(list(models), len(models))
            turns.append({name: seconds(models[name], ids, clock) for name in turn})
        cells = [f"{statistics.median(turn['dense'] for turn in turns) * 1000:.1f}"]
        for name in names:
            ratios = sorted(turn[name] / turn["dense"] for turn in turns)
            cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"| {batch} x {length} | {' | '.join(cells)} |", flush=True)


def memory_table(models: dict[str, Any], files: dict[str, Path], folder: Path, bound: int, threads: int) -> None:
    """Print bytes of each variant: counted, and resident in a process of its own, above the bare process."""
    dense = tensor_bytes(models["dense"])
    heads = (
        "variant",
        "tensors, MB",
        "decoded at the peak, MB",
        "together, of dense",
        "resident, MB",
        "of dense",
        "peak, MB",
    )
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    imports, resident_dense = [], 0.0
    for name, model in models.items():
        decoded = Decoded()
        if hasattr(model, "compressed_modules"):
            for module in model.compressed_modules().values():
                module._cache = None
            with decoded.watching():
                for _ in range(2):
                    seconds(model, inputs_for(model, 1, 128))
        command = [sys.executable, str(Path(__file__)), "--measure", name, "--folder", str(folder)]
        command += ["--bound", str(bound), "--threads", str(threads)]
        command += ["--file", str(files[name])] if name in files else []
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        facts = json.loads(run.stdout.splitlines()[-1])
        imports.append(facts["imports"])
        now, peak = facts["VmRSS"] - facts["imports"], facts["VmHWM"] - facts["imports"]
        resident_dense = now if name == "dense" else resident_dense
        stored = files[name].stat().st_size if name in files else tensor_bytes(model)
        print(
            f"| {name} | {stored / 1e6:.1f} | {decoded.peak / 1e6:.1f} | {(stored + decoded.peak) / dense:.1%} "
            f"| {now:.0f} | {now / resident_dense:.1%} | {peak:.0f} |",
            flush=True,
        )
    print(
        f"\nresident memory is that above {statistics.median(imports):.0f} MB, which are there before a model is loaded"
    )


def decoding_speed(model: PreTrainedModel, rounds: int, clock: Callable[[], float]) -> float:
    """Return how many weights of the linear layers are decoded in a second, in the best of some rounds."""
    layers = [layer for layer in model.compressed_modules().values() if isinstance(layer, DecodedWeight)]
    layers = [layer for layer in layers if isinstance(layer, CompressedLinear)]
    taken = []
    for _ in range(rounds):
        start = clock()
        with torch.no_grad():
            for layer in layers:
                layer.dense_weight()
        taken.append(clock() - start)
    return sum(layer.rows * layer.columns for layer in layers) / max(min(taken), 1e-9)


def agreement(models: dict[str, PreTrainedModel]) -> dict[str, float]:
    """Return the mean cosine of each token's hidden state to that of the weights as they are stored.

    Of the dense variants there is none, since their weights are others.
    """
    ids = inputs_for(models["cached"], 8, 64)
    found = {}
    for name, model in models.items():
        if hasattr(model, "compressed_modules") or name == OURS_ONNX:
            with torch.no_grad():
                found[name] = model(ids)[0].flatten(0, 1)
    expected = found["cached"]
    return {name: float(torch.cosine_similarity(own, expected).mean()) for name, own in found.items()}


def quality(models: dict[str, Any], folder: Path, text: Path) -> None:
    """Print perplexities of a language model on a text; of an encoder Spearman's correlation (x 100) on pairs, and agreement.

    Args:
        models: our variants.
        folder: of the compressed model, with its tokenizer.
        text: lines; or pairs of sentences with their similarities, as a CSV file.
    """
    from scipy.stats import spearmanr

    from hf_offline_compress.evaluate import sentence_embeddings
    from hf_offline_compress.metrics.agreement import agreement as of_embeddings
    from hf_offline_compress.metrics.perplexity import perplexity

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = None
    for name, model in models.items():
        if model.get_output_embeddings() is not None:
            found = perplexity(model, tokenizer, text.read_text("utf-8").splitlines(), block=256)
            print(f"{name}: perplexity {found.perplexity:.2f} on {found.tokens} tokens", flush=True)
            continue
        with text.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        embeddings = sentence_embeddings(model, tokenizer, [sentence for row in rows for sentence in row[:2]])
        cosines = torch.nn.functional.cosine_similarity(embeddings[0::2], embeddings[1::2])
        rank = 100 * spearmanr(cosines.numpy(), [float(row[2]) for row in rows]).statistic
        reference = embeddings if reference is None else reference
        shared = of_embeddings(embeddings, reference)
        print(f"{name}: Spearman {rank:.2f} on {len(rows)} pairs, agreement with the first {shared:.5f}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a compressed model; by default one is made of random codes")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--architecture", default="BertModel", help="a stock class of BERT, RoBERTa or GPT-2")
    parser.add_argument("--bound", type=int, default=100_000_000, help="bytes of decoded weights that `bounded` keeps")
    parser.add_argument("--rounds", type=int, default=5, help="turns; small batches take five times as many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread only")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="dense is always one")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="sequences x tokens")
    parser.add_argument("--only", choices=("speed", "memory", "quality"))
    parser.add_argument("--text", type=Path, help="what quality is measured on")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time also counts the time that threads wait for each other; add --threads 1")
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    register()
    if options.measure:
        measure(options.measure, options.folder, options.bound, options.file)
        return
    if options.only == "quality":
        ours = [name for name in ("cached", "on_the_fly", "int8") if name in options.variants]
        quality({name: loaded(name, options.folder, 0) for name in ours}, options.folder, options.text)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "made"
        if not options.folder:
            made(options.architecture, options.preset, folder)
        files = onnx_files(options.variants, folder, Path(scratch))
        wanted = ["dense", *(name for name in VARIANTS if name in options.variants and name != "dense")]
        wanted = [name for name in wanted if name in files or name not in (*RUNTIMES, OURS_ONNX)]
        models = {name: loaded(name, folder, options.bound, files.get(name)) for name in wanted}
        what = f"of random codes, preset {options.preset}" if not options.folder else folder.name
        print(
            f"{type(models['dense']).__name__} {what}; {options.threads} threads, bound {options.bound / 1e6:.0f} MB\n"
        )
        clock = time.process_time if options.cpu_time else time.perf_counter
        if options.only != "memory":
            speed_table(models, options.shapes, options.rounds, clock)
            if "cached" in models:
                shares = ", ".join(f"{name} {share:.5f}" for name, share in agreement(models).items())
                print(f"\nagreement with the weights as stored (mean cosine of hidden states): {shares}")
            if "on_the_fly" in models:
                speed = decoding_speed(models["on_the_fly"], options.rounds, clock)
                print(f"decoding: {speed / 1e9:.3f} thousand million weights a second", flush=True)
        if options.only != "speed":
            memory_table(models, files, folder, options.bound, options.threads)


if __name__ == "__main__":
    main()
