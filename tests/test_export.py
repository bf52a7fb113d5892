"""Back to stock: a dense checkpoint with the compressed model's outputs, in a process that knows nothing of us."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from common import CORE, ONE_EACH, TEXTS, error_of, make_model, make_tokenizer, outputs_of
from processes import run_cli, run_python
from safetensors import safe_open
from safetensors.torch import load_file

import hf_offline_compress
from hf_offline_compress import CompressionError, Grouping, Objective, Recipe, Rule, compress
from hf_offline_compress.architectures.families import is_language_model
from hf_offline_compress.export.dense import EXPORT_FILE, dense_model, export_folder
from hf_offline_compress.structures import Codebook, Kronecker, LowRank, Quantized

CALIBRATED = Objective(l2=1.0, calibrated=True)
ALL = ("linears", "word_embeddings")
RECIPES = {
    "low_rank": Recipe("low_rank", (Rule(LowRank(), CALIBRATED, ratio=2.0),), modules=(".+",)),
    "shared": Recipe("shared", (Rule(LowRank(), Objective(l2=1.0), Grouping(None), ratio=2.5),), modules=ALL),
    "quantized": Recipe("quantized", (Rule(Quantized(), ratio=3.0, storage="float16"),), modules=(".+",)),
    "codebook": Recipe("codebook", (Rule(Codebook(rounds=1), CALIBRATED, Grouping(None), ratio=5.0),), modules=ALL),
    "kronecker": Recipe("kronecker", (Rule(Kronecker(polish=0), ratio=2.0),), modules=("word_embeddings", "output")),
    # of GPT-2's fused layer, one part alone
    "one_part": Recipe("one_part", (Rule(LowRank(), ratio=2.0),), modules=("key",)),
}
CASES = [(t, h, "low_rank") for t, h in dict.fromkeys((*CORE, *ONE_EACH))]
# What decodes a matrix does not know its head: every other recipe on one head of each kind of layer.
CASES += [
    (t, h, r) for t, h in (("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel")) for r in RECIPES if r != "low_rank"
]
# Run where the package cannot be imported; loads every folder by the stock class that its config names.
LOADER = """
import sys
sys.modules["hf_offline_compress"] = None
from pathlib import Path
import json, torch, transformers
from inputs import inputs_for
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
outputs, facts = {}, {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    head = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, head).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        result = model.eval()(**inputs_for(head))
    outputs[folder.name] = torch.cat([v.float().flatten() for v in result.values() if isinstance(v, torch.Tensor)])
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    facts[folder.name] = {
        "problems": sorted([*info["missing_keys"], *info["unexpected_keys"]]),
        "module": type(model).__module__,
        "auto": type(transformers.AutoModel.from_pretrained(folder)).__name__,
        "tokens": transformers.AutoTokenizer.from_pretrained(folder)(sys.argv[3]).input_ids,
        "tied": None if output is None else output.weight is embedding.weight,
    }
torch.save(outputs, sys.argv[2] + "/outputs.pt")
Path(sys.argv[2], "facts.json").write_text(json.dumps(facts))
"""


def model_of(model_type, head, recipe):
    """Return a model; where no groups are shared by layers, one of a single layer."""
    return make_model(model_type, head, layers=3 if recipe in ("shared", "codebook") else 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Compress and export every case, and load all in one fresh process."""
    root, out = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("out")
    results = {}
    for model_type, head, recipe in CASES:
        result = compress(
            model_of(model_type, head, recipe),
            RECIPES[recipe],
            tokenizer=make_tokenizer(model_type),
            calibration=TEXTS,
            progress=False,
        )
        name = f"{head}-{recipe}"
        result.save(root / "small" / name)
        export_folder(root / "small" / name, root / "dense" / name)
        results[name] = result
    run = run_python("-c", LOADER, root / "dense", out, TEXTS[0], PYTHONPATH=str(Path(__file__).parent))
    assert run.returncode == 0, run.stderr[-3000:]
    return (
        root,
        results,
        json.loads((out / "facts.json").read_text()),
        torch.load(out / "outputs.pt", weights_only=True),
    )


@pytest.mark.parametrize("model_type,head,recipe", CASES)
def test_a_stock_model_says_the_same(exported, model_type, head, recipe):
    _, results, facts, outputs = exported
    name = f"{head}-{recipe}"
    expected = outputs_of(results[name].model, head)
    torch.testing.assert_close(outputs[name], expected, atol=1e-5, rtol=0)
    assert (outputs[name] - outputs_of(model_of(model_type, head, recipe), head)).abs().max() > 1e-3  # not the base's
    found = facts[name]
    assert found["problems"] == []
    assert found["module"] == "transformers.models.{0}.modeling_{0}".format(model_type.replace("-", "_"))
    assert not found["auto"].startswith("Compressed")
    assert found["tokens"] == results[name].tokenizer(TEXTS[0]).input_ids
    if is_language_model(head):
        assert found["tied"] is True


@pytest.mark.parametrize("model_type,head,recipe", CASES)
def test_nothing_of_ours_is_left(exported, model_type, head, recipe):
    folder = exported[0] / "dense" / f"{head}-{recipe}"
    config = (folder / "config.json").read_text()
    values = json.loads(config)
    assert values["model_type"] == model_type and values["architectures"] == [head]
    assert not [word for word in ("compress", "auto_map") if word in config.lower()]
    assert not list(folder.rglob("*.py"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}
    stock = model_of(model_type, head, recipe)
    aliases = set(stock.all_tied_weights_keys)  # what is tied is stored once
    assert stored == {name: list(p.shape) for name, p in stock.state_dict().items() if name in stored}
    assert set(stock.state_dict()) - set(stored) <= aliases
    private = (str(exported[0]), str(Path.home()))
    for file in folder.rglob("*"):
        assert not any(text.encode() in file.read_bytes() for text in private if len(text) > 5), file.name


@pytest.fixture(scope="module")
def small(exported):
    return exported[0] / "small" / "BertForMaskedLM-low_rank"


@pytest.mark.parametrize("untied", ["bert", "gpt2"])
def test_an_untied_head_is_decoded_too(untied, tmp_path):
    head = {"bert": "BertForMaskedLM", "gpt2": "GPT2LMHeadModel"}[untied]
    base = make_model(untied, head, tie_word_embeddings=False)
    result = compress(base, RECIPES["low_rank"], calibration=None, progress=False)
    result.save(tmp_path / "small")
    dense = dense_model(tmp_path / "small")
    assert dense.get_output_embeddings().weight is not dense.get_input_embeddings().weight
    torch.testing.assert_close(outputs_of(dense, head), outputs_of(result.model, head), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_decoded_in_float32_and_rounded_once(small, tmp_path, dtype):
    export_folder(small, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    exact = dense_model(small).state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(tensor, exact[name].to(tensor.dtype)) for name, tensor in stored.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert json.loads((tmp_path / "out" / EXPORT_FILE).read_text())["dtype"] == dtype


def test_a_model_saved_after_fine_tuning_is_exported(small, tmp_path):
    model = hf_offline_compress.CompressedBertForMaskedLM.from_pretrained(small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.01
    model.save_pretrained(tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "compression_report.json").exists()
    stock = transformers.BertForMaskedLM.from_pretrained(export_folder(tmp_path / "tuned", tmp_path / "dense"))
    torch.testing.assert_close(
        outputs_of(stock, "BertForMaskedLM"), outputs_of(model, "BertForMaskedLM"), atol=1e-5, rtol=0
    )


def test_companions_travel_along(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "small")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("the card of the compressed model")
    (folder / "optimizer.pt").write_text("private")
    out = export_folder(folder, tmp_path / "out")
    assert (out / "LICENSE").read_text() == "free"
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    names = {file.name for file in out.iterdir()}
    assert not names & {"README.md", "optimizer.pt", "evaluation.json"}


@pytest.mark.parametrize(
    "case,message",
    [
        ("no folder", "not a compressed folder"),
        ("dense", "not a compressed folder"),
        ("dtype", "The dtype 'int3' is not supported"),
        ("in use", "is not empty; pass another, or --overwrite"),
        ("not ours", "was not written by an export"),
        ("itself", "is, or lies in, the compressed one"),
        ("inside", "is, or lies in, the compressed one"),
        ("a file", "is a file"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(small, exported, tmp_path, case, message):
    folder, out, options = small, tmp_path / "out", {}
    if case == "no folder":
        folder = tmp_path / "nothing"
    elif case == "dense":
        folder = exported[0] / "dense" / small.name
    elif case == "dtype":
        options["dtype"] = "int3"
    elif case in ("in use", "not ours"):
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        options["overwrite"] = case == "not ours"
    elif case == "itself":
        out, options["overwrite"] = small, True
    elif case == "inside":
        out = small / "dense"
    elif case == "a file":
        out.write_text("mine")
    before = sorted(tmp_path.rglob("*")), sorted(small.rglob("*"))
    with pytest.raises(CompressionError, match=message):
        export_folder(folder, out, **options)
    assert (sorted(tmp_path.rglob("*")), sorted(small.rglob("*"))) == before


def test_a_failure_leaves_what_was_there(small, tmp_path, monkeypatch):
    out = export_folder(small, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("hf_offline_compress.export.dense.copy_companions", full)
    with pytest.raises(OSError, match="no space"):
        export_folder(small, out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(small, tmp_path):
    run = run_cli("export", small, tmp_path / "out", "--dtype", "float16", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["exported_from"] == small.name and found["architecture"] == "BertForMaskedLM"
    assert found["weight_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    again = run_cli("export", small, tmp_path / "out")
    assert again.returncode == 1 and error_of(again.stderr).startswith("error: The output folder") and not again.stdout
