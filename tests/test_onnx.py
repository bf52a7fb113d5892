"""ONNX files as a user gets them: small, equal to the compressed model, in the layout that loaders look for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from common import TEXTS, error_of, make_model, make_tokenizer, save_base
from inputs import inputs_for
from processes import run_cli
from transformers import AutoConfig

from hf_offline_compress import CompressionError, Recipe, Rule, compress, export_folder, write_card
from hf_offline_compress.artifact.reading import is_part
from hf_offline_compress.artifact.record import weight_files
from hf_offline_compress.card.snippets import with_model_id
from hf_offline_compress.evaluate import TextSettings
from hf_offline_compress.evaluate.evaluation import evaluate_folder
from hf_offline_compress.export.onnx.folder import _written, check_head
from hf_offline_compress.structures import LowRank, Quantized, Trellis
from hf_offline_compress.verifying import check_files

RECIPE = Recipe(
    "mixed",
    (
        Rule(Trellis(run=16), modules=("word_embeddings", "query", "intermediate"), ratio=8.0),
        Rule(LowRank(), modules=("key", "output"), ratio=2.0),
        Rule(Quantized(), ratio=4.0),
    ),
    modules=("word_embeddings", "linears"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a compressed encoder's folder, what it was exported to, and the compressed model."""
    root = tmp_path_factory.mktemp("onnx")
    base = make_model("bert", "BertForMaskedLM", layers=1)
    result = compress(base, RECIPE, tokenizer=make_tokenizer("bert"), calibration=TEXTS, progress=False)
    result.save(root / "small")
    export_folder(root / "small", root / "out", format="onnx", weights="both")
    return root / "small", root / "out", result.model.eval()


def run(file, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options).run(["logits"], feeds)[0]


def feeds_of(rows, tokens):
    ids = inputs_for("BertForMaskedLM")["input_ids"].repeat(2, 2)[:rows, :tokens]
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("rows,tokens", [(1, 5), (3, 11)])
def test_onnx_runtime_says_what_the_compressed_model_says(folders, rows, tokens):
    _, out, model = folders
    feeds = feeds_of(rows, tokens)
    with torch.no_grad():
        expected = model(**feeds).logits.numpy()
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    np.testing.assert_allclose(run(out / "onnx/model.onnx", arrays), expected, atol=1e-4)
    rounded = run(out / "onnx/model_quantized.onnx", arrays)
    error = np.linalg.norm(rounded - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1  # really of integers, and no worse than that


def test_nothing_is_written_decoded(folders):
    small, out, _ = folders
    stored = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    for file in out.rglob("*.onnx"):
        assert file.stat().st_size <= 1.04 * stored + 150_000
        model = onnx.load(file)
        onnx.checker.check_model(model)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
        floats = [value for value in model.graph.initializer if value.data_type == onnx.TensorProto.FLOAT]
        # of at most two columns: the tables of trellis codes
        assert max(np.prod(value.dims) for value in floats if not value.dims or value.dims[-1] > 2) < 32 * 64


def test_layout(folders):
    small, out, _ = folders
    assert {str(file.relative_to(out)) for file in out.rglob("*.onnx")} == {
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
    }
    assert AutoConfig.from_pretrained(out).model_type == "bert"
    assert (out / "tokenizer.json").is_file() and not list(out.rglob("*.py")) and not list(out.rglob("*.safetensors"))
    record = json.loads((out / "export.json").read_text())
    assert record["architecture"] == "BertForMaskedLM" and record["opset"] == 18
    for file in out.rglob("*"):
        assert not file.is_file() or str(small.parent).encode() not in file.read_bytes()


@pytest.mark.parametrize(
    "options,sentence",
    [
        (("--format", "gguf"), "The format 'gguf' is unknown; known: checkpoint, onnx."),
        (("--format", "onnx", "--weights", "int4"), "The weights 'int4' are not known; known are int8, float32, both."),
        (("--format", "onnx", "--opset", "11"), "The opset 11 is not supported; supported are 18 to 23."),
        (("--format", "onnx", "--dtype", "float16"), "The format 'onnx' has no dtype"),
        (("--weights", "int8"), "The format 'checkpoint' has no weights"),
    ],
)
def test_wrong_options_are_one_sentence(folders, tmp_path, options, sentence):
    values = dict(zip([name.removeprefix("--") for name in options[::2]], options[1::2], strict=True))
    values = {name: int(value) if name == "opset" else value for name, value in values.items()}
    with pytest.raises(CompressionError) as caught:
        export_folder(folders[0], tmp_path / "out", **values)
    assert sentence in str(caught.value) and not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(folders):
    done = run_cli("export", folders[0], folders[1], "--format", "onnx")
    assert done.returncode == 1 and "is not empty" in error_of(done.stderr)


def test_a_missing_package_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_offline_compress.export.onnx.folder.find_spec", lambda name: None if name == "onnx" else 1)
    with pytest.raises(CompressionError, match="needs onnx, which is not installed; the extra 'onnx' has it"):
        export_folder(folders[0], tmp_path / "out", format="onnx")


@pytest.mark.parametrize(
    "model_type,head,options,reason",
    [
        ("gpt2", "GPT2Model", {}, "is a causal model without its language head"),
        ("llama", "LlamaForSequenceClassification", {}, "is a causal model without its language head"),
        ("gpt2", "GPT2LMHeadModel", {"add_cross_attention": True}, "attends to another model's outputs"),
        ("bert", "BertLMHeadModel", {"is_decoder": True}, "is an encoder that was made a decoder"),
        ("roberta", "RobertaForCausalLM", {}, "is an encoder that was made a decoder"),
    ],
)
def test_heads_without_a_file_are_refused(model_type, head, options, reason):
    config = {"model_type": f"compressed_{model_type}", "architectures": [f"Compressed{head}"], **options}
    with pytest.raises(CompressionError, match=f"^{head} {reason}.*; export it with --format checkpoint.$"):
        check_head(config)


def test_a_refused_head_leaves_nothing(tmp_path):
    base = make_model("gpt2", "GPT2Model", layers=1)
    recipe = Recipe("q", (Rule(Quantized(), ratio=4.0),), modules=("linears",))
    compress(base, recipe, tokenizer=make_tokenizer("gpt2"), progress=False).save(tmp_path / "small")
    with pytest.raises(CompressionError, match="GPT2Model is a causal model"):
        export_folder(tmp_path / "small", tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_the_search_example_needs_no_torch(folders, tmp_path):
    example = Path(__file__).parent.parent / "examples/onnx_search.py"
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS[:20]))
    block = "import sys, runpy; sys.modules['torch'] = sys.modules['transformers'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", block + "runpy.run_path(sys.argv[0], run_name='__main__')", str(example)]
    arguments = [str(folders[1]), str(tmp_path / "lines.txt"), TEXTS[7], "--output", "logits"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert TEXTS[7] in done.stdout.splitlines()[0]


def onnx_problem(folder):
    """Return what `verify` says of the ONNX files in a folder that it finds changed."""
    found = next(check for check in check_files(folder).checks if check.name == "onnx")
    assert found.status == "failed"
    return found.sentence


def as_exported(small, folder):
    """Copy a compressed folder, and put stand-ins of an export into it, recorded as the export records them."""
    shutil.copytree(small, folder)
    onnx = folder / "onnx"
    onnx.mkdir()
    (onnx / "config.json").write_text('{"model_type": "gpt2", "activation_function": "gelu_new"}')
    (onnx / "model.onnx").write_bytes(b"\x08\x0a")
    (onnx / "export.json").write_text(json.dumps({"weights": weight_files(folder), "files": _written(onnx)}))
    return folder


def test_what_was_changed_beside_onnx_files_is_found(folders, tmp_path):
    folder = as_exported(folders[0], tmp_path / "small")
    checks = {check.name: check.status for check in check_files(folder).checks}
    assert checks["onnx"] == checks["code"] == "passed"  # the stock name of an activation is no code
    (folder / "onnx/model.onnx").unlink()
    assert "onnx/model.onnx is missing" in onnx_problem(folder)  # what is left would be published
    (folder / "onnx/model.onnx").symlink_to("nowhere")
    assert "onnx/model.onnx is missing" in onnx_problem(folder)
    (folder / "onnx/config.json").write_text("{}")
    assert "onnx/config.json is not what was exported" in onnx_problem(folder)


def test_an_export_into_the_folder_stays_in_it_and_keeps_own_files(folders, tmp_path):
    folder = as_exported(folders[0], tmp_path / "small")
    (folder / "onnx/notes.md").write_text("own")
    export_folder(folder, format="onnx", into_folder=True, overwrite=True)
    assert (folder / "onnx/notes.md").read_text() == "own" and not (folder / "onnx/model.onnx").exists()
    shutil.move(folder / "onnx", tmp_path / "elsewhere")
    (folder / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CompressionError, match="'onnx' in '.*' is a link"):
        export_folder(folder, format="onnx", into_folder=True, overwrite=True)


def test_files_in_the_compressed_folder_itself(folders, tmp_path, monkeypatch):
    folder = tmp_path / "small"
    shutil.copytree(folders[0], folder)
    assert export_folder(folder, format="onnx", into_folder=True) == folder / "onnx"
    names = sorted(file.name for file in (folder / "onnx").iterdir())
    assert names == ["config.json", "export.json", "model_quantized.onnx"] and all(is_part(f"onnx/{n}") for n in names)
    assert AutoConfig.from_pretrained(folder / "onnx").model_type == "bert"
    assert AutoConfig.from_pretrained(folder).model_type == "compressed_bert"
    checks = {check.name: check.status for check in check_files(folder).checks}
    assert checks["onnx"] == checks["files"] == checks["weights"] == "passed"
    with pytest.raises(CompressionError, match="is not empty"):
        export_folder(folder, format="onnx", into_folder=True)

    write_card(folder)
    card = with_model_id((folder / "README.md").read_text(), "small")
    block, page = re.search(r"## ONNX\n.*?```python\n(.*?)```.*?```js\n(.*?)```", card, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(block, values)
    assert values["outputs"][0].shape[::2] == (1, values["outputs"][0].shape[2])
    assert 'model_id = "small"' in page and 'pipeline("fill-mask", model_id, { config, dtype: "q8" })' in page

    (folder / "onnx/model_quantized.onnx").write_bytes(b"\x08\x0a")
    assert "onnx/model_quantized.onnx is not what was exported" in onnx_problem(folder)


@pytest.mark.parametrize(
    "out,options,sentence",
    [
        (None, {"format": "onnx"}, "neither was given"),
        ("out", {"format": "onnx", "into_folder": True}, "both were given"),
        (None, {"into_folder": True}, "The format 'checkpoint' does not go into the compressed folder"),
    ],
)
def test_an_export_has_one_place(folders, tmp_path, out, options, sentence):
    with pytest.raises(CompressionError, match=sentence):
        export_folder(folders[0], tmp_path / out if out else None, **options)


def test_a_file_is_evaluated_beside_the_base(folders, tmp_path):
    small, out, _ = folders
    folder, base = tmp_path / "small", tmp_path / "base"
    shutil.copytree(small, folder)
    save_base(base, "bert", "BertForMaskedLM", layers=1)
    options = {"base": base, "text": TEXTS[:20], "progress": False, "text_settings": TextSettings(min_tokens=2)}
    weights = evaluate_folder(folder, **options)
    exact = evaluate_folder(folder, onnx=out / "onnx/model.onnx", **options)
    rounded = evaluate_folder(folder, onnx=out / "onnx/model_quantized.onnx", **options)
    for by_weights, by_file, by_int8 in zip(weights, exact, rounded, strict=True):
        assert by_file.id == f"{by_weights.id}:model.onnx" and by_file.settings["onnx"] == "model.onnx"
        numbers = {metric.name: metric.compressed for metric in by_weights.metrics}
        for metric in by_file.metrics:  # this file has a head, and no hidden states to compare
            assert metric.compressed == pytest.approx(numbers[metric.name], rel=1e-4, abs=1e-6)
        assert any(m.compressed != n.compressed for m, n in zip(by_file.metrics, by_int8.metrics, strict=True))
    assert {metric.name for item in exact for metric in item.metrics} == {
        "perplexity",
        "kl_divergence",
        "top_1_agreement",
    }
    stored = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    assert len(stored) == 3 * len(weights)


@pytest.mark.parametrize(
    "options,sentence",
    [
        ({"onnx": "nowhere.onnx"}, "There is no file 'nowhere.onnx'"),
        ({"onnx": __file__, "dtype": "bfloat16"}, "computes as it was exported, not in bfloat16"),
        ({"onnx": __file__}, "ONNX Runtime does not load 'test_onnx.py'"),
    ],
)
def test_files_that_cannot_be_evaluated(folders, tmp_path, options, sentence):
    save_base(tmp_path / "base", "bert", "BertForMaskedLM", layers=1)
    with pytest.raises(CompressionError, match=sentence):
        evaluate_folder(folders[0], base=tmp_path / "base", text=TEXTS[:20], progress=False, write=False, **options)
