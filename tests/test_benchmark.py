"""The benchmark: every model in a process of its own, all in turn; bytes, memory and times that belong together."""

import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from common import make_model, outputs_of, save_base
from processes import run_cli
from safetensors.torch import load_file
from torch import nn

from hf_offline_compress import CompressionError, Recipe, Rule, compress, export_folder
from hf_offline_compress.cli.benchmark import _print as print_benchmark
from hf_offline_compress.evaluate import benchmarking, onnx_alternatives
from hf_offline_compress.evaluate.alternatives import int8, tensor_bytes, with_linear_layers
from hf_offline_compress.evaluate.benchmark_worker import Held
from hf_offline_compress.evaluate.benchmarking import NAMES, Cell, benchmark_folder
from hf_offline_compress.evaluate.onnx_alternatives import RUNTIMES
from hf_offline_compress.evaluate.records import read_evaluations, write_evaluations
from hf_offline_compress.structures import Kronecker

MODELS = [
    ("bert", "BertForMaskedLM"),
    ("roberta", "RobertaForSequenceClassification"),
    ("gpt2", "GPT2LMHeadModel"),
]
DECODED = Recipe("decoded", (Rule(Kronecker(polish=0), ratio=2.0),), modules=("linears",))


def compressed(tmp_path, model_type="bert", head="BertForMaskedLM", recipe="svd"):
    base = save_base(tmp_path / "base", model_type, head)
    options = {} if isinstance(recipe, Recipe) else {"ratio": 2, "modules": "linears"}
    compress(base, recipe, calibration=None, progress=False, **options).save(tmp_path / "small")
    return tmp_path / "small", base


@pytest.mark.parametrize("model_type,head", MODELS)
def test_int8_keeps_the_outputs_close_and_needs_a_quarter_of_the_linear_layers(model_type, head):
    model = make_model(model_type, head)
    expected, before = outputs_of(model, head), tensor_bytes(model)
    linear = with_linear_layers(model)
    torch.testing.assert_close(outputs_of(linear, head), expected, atol=1e-5, rtol=1e-5)
    inside = [module for module in linear.modules() if isinstance(module, nn.Linear)]
    assert not any("Conv1D" in type(module).__name__ for module in linear.modules()) and len(inside) >= 12
    embeddings = linear.get_input_embeddings().weight
    tied = [module for module in inside if module.weight.data_ptr() == embeddings.data_ptr()]
    saved = sum(module.weight.nbytes * 3 // 4 for module in inside if module not in tied)
    added = sum(module.weight.numel() for module in tied)  # the int8 copy of a tied head
    quantized = int8(linear)
    found = outputs_of(quantized, head)
    assert not torch.equal(found, expected)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95
    # GPT-2's tied output matrix has no bias; BERT's has one, which was counted before too.
    assert tensor_bytes(quantized) == pytest.approx(before - saved + added, rel=0.02)


def test_bytes_of_tensors_are_those_of_a_file(tmp_path):
    model = make_model("bert", "BertForMaskedLM").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert tensor_bytes(model) == sum(tensor.nbytes for tensor in stored.values())


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("decoded"), recipe=DECODED)


@pytest.mark.parametrize("kind", ["base", "bfloat16", "int8", "compressed", "on_the_fly", "ours-int8"])
def test_what_a_process_holds(decoded, kind):
    folder, base = decoded
    ours = kind in benchmarking.OURS
    held = Held(kind, str(folder if ours else base), "BertForMaskedLM", "cpu", None, 0)
    assert held.prepare()["threads"] == torch.get_num_threads()
    loaded = held.load()
    assert loaded["seconds"] > 0 and loaded["decodes"] is ours
    assert held.forward(2, 9)["ms"] > 0
    assert held.model.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    (inputs,) = held.batches.values()
    assert inputs["input_ids"].shape == (2, 9)
    memory = held.memory()
    assert memory["peak"] >= memory["now"] >= 0
    cached = [getattr(module, "_cache", None) is not None for module in held.model.modules()]
    assert any(cached) is (kind in ("compressed", "ours-int8"))


def test_latencies_are_medians_with_quartiles():
    times = [5.0, 1.0, 4.0, 2.0, 30.0]
    found = benchmarking._latency(Cell(4, 8), times)
    assert (found["batch"], found["length"]) == (4, 8)
    assert (found["median_ms"], found["low_ms"], found["high_ms"]) == (4.0, 2.0, 5.0)
    assert found["tokens_per_second"] == 4 * 8 / 0.004
    assert benchmarking._latency(Cell(1, 1), [3.0])["high_ms"] == 3.0


class Scripted:
    """Stands for a process; tells in which order it was asked."""

    asked: ClassVar[list] = []

    def __init__(self, name):
        self.name, self.threads = name, 1

    def ask(self, do, **options):
        if do == "forward":
            self.asked.append((self.name, options["batch"]))
            return {"ms": len(self.asked)}
        return {"seconds": len(self.asked), "tensor_bytes": 7, "peak": 3, "now": 2, "decodes": True}


def test_models_take_turns():
    Scripted.asked = []
    workers = {name: Scripted(name) for name in ("base", "bfloat16", "compressed")}
    found = benchmarking._measure(workers, [Cell(1, 4), Cell(2, 4)], 3, False, {"base": 100})
    turns = [Scripted.asked[i : i + 3] for i in range(0, len(Scripted.asked), 3)]
    assert len(turns) == 2 * (benchmarking.WARM_UP + 3)
    assert all({name for name, _ in turn} == set(workers) and len({b for _, b in turn}) == 1 for turn in turns)
    assert {turn[0][0] for turn in turns} == set(workers)
    base, bfloat16, _ = found
    assert base["disk_bytes"] == 100 and bfloat16["disk_bytes"] == 7  # the one file that is there, the other's tensors
    assert base["memory_bytes"] == 3 and base["loaded_bytes"] == 2
    # The scripted process answers with the number of the question: base is asked 1st, 2nd and 3rd in rounds 0 to 2.
    numbers = [benchmarking.WARM_UP * 3 + place for place in (1, 6, 8)]
    assert base["latency"][0]["median_ms"] == statistics.median(numbers)


def test_a_benchmark_as_a_user_types_it(tmp_path):
    folder, base = compressed(tmp_path, "gpt2", "GPT2LMHeadModel", DECODED)
    write_evaluations(folder, benchmark={"models": []})
    run = run_cli(
        "benchmark",
        folder,
        "--base",
        base,
        "--batch",
        "1,3",
        "--length",
        "16",
        "--models",
        "base,compressed",
        "--repeats",
        2,
        "--json",
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)["benchmark"]
    assert result == read_evaluations(folder)["benchmark"]
    assert [model["name"] for model in result["models"]] == ["base", "compressed"]
    models = {model["name"]: model for model in result["models"]}
    assert models["base"]["disk_bytes"] == (base / "model.safetensors").stat().st_size
    assert models["compressed"]["disk_bytes"] == (folder / "model.safetensors").stat().st_size
    assert models["compressed"]["disk_bytes"] < models["base"]["disk_bytes"]
    for model in models.values():
        assert [(cell["batch"], cell["length"]) for cell in model["latency"]] == [(1, 16), (3, 16)]
        assert model["load_seconds"] > 0 and model["memory_bytes"] > 0
        for cell in model["latency"]:
            assert 0 < cell["low_ms"] <= cell["median_ms"] <= cell["high_ms"]
    assert result["device"] == "cpu" and result["threads"] == 1 and result["repeats"] == 2
    assert "starting" in run.stderr and str(tmp_path) not in (folder / "evaluation.json").read_text()


def test_files_of_onnx_are_rows_like_any_other(tmp_path):
    """Those of the base are made for it and are gone afterwards; one that was exported is given."""
    pytest.importorskip("onnxruntime")
    folder, base = compressed(tmp_path, recipe=DECODED)
    file = export_folder(folder, tmp_path / "out", format="onnx", weights="float32") / "onnx/model.onnx"
    options = {"batches": [1], "lengths": [8], "repeats": 1, "progress": False, "write": False}
    kinds = ["base", "compressed", *RUNTIMES]
    result = benchmark_folder(folder, base=base, models=kinds, onnx=file, **options)
    models = {model["name"]: model for model in result["models"]}
    missing = [] if find_spec("openvino") else ["int8 (OpenVINO)"]
    assert [item["name"] for item in result["unavailable"]] == missing
    ours, whole, integers = "compressed, ONNX Runtime", "float32 (ONNX Runtime)", "int8 (ONNX Runtime)"
    assert set(models) | set(missing) == {"base", "compressed", ours, whole, integers, "int8 (OpenVINO)"}
    agreements = {name: model["agreement"] for name, model in models.items()}
    assert agreements["base"] == pytest.approx(1) == agreements[whole]
    assert agreements[ours] == pytest.approx(agreements["compressed"], abs=1e-5) and agreements[ours] < 0.9999
    assert 0.99 < agreements[integers] < 0.999999
    assert models[ours]["disk_bytes"] == file.stat().st_size
    assert models[integers]["disk_bytes"] < models[whole]["disk_bytes"]
    assert all(model["latency"][0]["median_ms"] > 0 for model in models.values())
    with pytest.raises(CompressionError, match="There is no file"):
        benchmark_folder(folder, base=base, onnx=tmp_path / "none.onnx", **options)


def test_a_base_that_no_onnx_file_holds_is_named(monkeypatch, tmp_path):
    """And nothing is made; a file that is given needs the CPU."""
    monkeypatch.setattr(onnx_alternatives, "LARGEST", 1000)
    monkeypatch.setattr(benchmarking, "why_not", lambda kind, config: None)
    monkeypatch.setattr(benchmarking, "dense_files", None)
    model = make_model("bert", "BertForMaskedLM")
    pair = SimpleNamespace(
        onnx=None,
        contents=SimpleNamespace(config={"architectures": ["BertForMaskedLM"], "model_type": "bert"}),
        tokenizer=SimpleNamespace(model_input_names=["input_ids"]),
        load_base=lambda: model,
    )
    files, missing = benchmarking._onnx_files(pair, ["base", *RUNTIMES], "cpu", tmp_path)
    assert not files and len(missing) == len(RUNTIMES) and "an ONNX file has at most" in missing[0]["reason"]
    with pytest.raises(CompressionError, match="Nothing can be measured: float32 .ONNX Runtime.: an ONNX file has"):
        benchmarking._onnx_files(pair, list(RUNTIMES), "cpu", tmp_path)
    pair.onnx = tmp_path / "model.onnx"
    with pytest.raises(CompressionError, match="on the CPU, not on cuda"):
        benchmarking._onnx_files(pair, [], "cuda", tmp_path)


@pytest.mark.parametrize("fails_at", ["load", "forward"])
def test_models_that_cannot_be_measured(monkeypatch, fails_at):
    class Worker(Scripted):
        def wait_until_ready(self):
            pass

        def close(self):
            closed.append(self.name)

        def ask(self, do, **options):
            if do == fails_at and self.name.startswith("int8"):
                raise CompressionError("no kernels")
            return {**super().ask(do, **options), "decodes": False}

    closed = []
    monkeypatch.setattr(benchmarking, "Worker", lambda name, settings: Worker(name))
    monkeypatch.setattr(benchmarking, "_warm", lambda pair: None)
    pair = SimpleNamespace(folder=Path(), base=SimpleNamespace(folder=Path()), architecture="BertModel")
    workers, unavailable = benchmarking._start(pair, list(benchmarking.MODELS), "cpu", None, 0, False, {}, Cell(1, 4))
    assert list(workers) == ["base", "bfloat16", "compressed"]
    assert unavailable[0]["name"] == "int8 (torch dynamic)"
    assert [item["reason"][:17] for item in unavailable] == ["no kernels", "nothing is decode", "nothing is decode"]
    assert closed == ["int8 (torch dynamic)", "compressed, on the fly", "compressed, int8"]
    workers, unavailable = benchmarking._start(pair, ["int8", "base"], "cuda", None, 0, False, {}, Cell(1, 4))
    assert "CPU only" in unavailable[0]["reason"]


def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    worker = benchmarking.Worker("base", {})
    with pytest.raises(CompressionError, match="measures 'base' ended with code 1"):
        worker.wait_until_ready()
    worker.close()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"batches": [0]}, "The batch must be at least 1, not 0"),
        ({"lengths": []}, "The length must be at least 1, not nothing"),
        ({"repeats": 0}, "The repeats must be at least 1"),
        ({"lengths": [16, 64]}, "A length of 64 tokens was asked for, and 'small' takes 40"),
        ({"models": ["base", "smaller"]}, "The model 'smaller' cannot be measured; known: base, bfloat16, int8"),
        ({"device": "nowhere"}, "There is no device 'nowhere'"),
        ({"base": None}, "was made from 'base', which is not a Hub id; pass its folder with --base"),
    ],
)
def test_wrong_requests(tmp_path, options, message):
    folder, base = compressed(tmp_path)
    with pytest.raises(CompressionError, match=message):
        benchmark_folder(folder, **{"base": base, "lengths": [16], "progress": False, **options})
    assert not (folder / "evaluation.json").exists()


def test_numbers_on_the_command_line(tmp_path):
    run = run_cli("benchmark", tmp_path, "--batch", "1,2²")
    assert run.returncode == 1 and "--batch takes integers separated by commas" in run.stderr


def test_names_are_printed_whole(capsys):
    times = {"median_ms": 1234.5, "low_ms": 1200.1, "high_ms": 1300.2, "tokens_per_second": 12345.6}
    numbers = {
        "disk_bytes": 10**9,
        "load_seconds": 12.3,
        "loaded_bytes": 10**9,
        "memory_bytes": 10**9,
        "agreement": 1.0,
    }
    latency = [{"batch": batch, "length": 128, **times} for batch in (1, 8, 32)]
    models = [{"name": name, "latency": latency, **numbers} for name in NAMES.values()]
    print_benchmark({"device": "cpu", "threads": 2, "repeats": 9, "models": models, "unavailable": []})
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(shown.count(f"\n{name}  ") == 4 for name in NAMES.values())
