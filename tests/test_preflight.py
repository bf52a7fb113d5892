"""What can be known to fail is said before any work; what goes wrong beside the model does not lose it."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from common import TEXTS, error_of, make_model, make_tokenizer, save_base
from typer.testing import CliRunner

import hf_offline_compress.artifact.writing as folders
import hf_offline_compress.compressor as compressor
from hf_offline_compress import CompressionError, compress, inspect_folder, make_plan, write_card
from hf_offline_compress.cli import app


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-bert", "bert", "BertForMaskedLM")


@pytest.fixture(scope="module")
def result(base):
    return compress(base, "svd", calibration=None, progress=False)


def run(*arguments):
    return CliRunner().invoke(app, ["compress", *map(str, arguments), "--recipe", "svd", "--quiet"])


@pytest.mark.parametrize(
    "out,options,message",
    [
        ("x" * 256, (), "is too long: 256 bytes, where 255 are allowed"),
        (".", (), r"'\.' is not empty; pass another"),
        ("a file/out", (), "is not a folder; pass another"),
        ("out", ("--max-shard-size", "1"), "max_shard_size is '1', which would put every tensor in its own file"),
        ("out", ("--max-shard-size", "big"), "The size 'big' is unknown"),
        ("out", ("--device", "xyz"), "There is no device 'xyz' here; there is cpu.*Leave --device"),
        ("out", ("--device", "mps"), "There is no device 'mps' here"),
        ("out", ("--device", "meta"), "There is no device 'meta' here"),
        ("out", ("--device", "cuda:63"), "There is no device 'cuda:63' here"),
        ("out", ("--seed", 2**64), "`seed` must be an integer from 0 to"),
        ("out", ("--seed", -1), "`seed` must be an integer from 0 to"),
    ],
)
def test_before_any_work(base, tmp_path, monkeypatch, out, options, message):
    (tmp_path / "a file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compressor, "load_model", None)  # no weights are read
    before = sorted(tmp_path.rglob("*"))
    outcome = run(base, out, *options)
    assert outcome.exit_code == 1 and len(error_of(outcome.stderr).splitlines()) == 1
    assert re.search(message, outcome.stderr), outcome.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_room_is_looked_for_before_any_work(base, result, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_100))
    with pytest.raises(CompressionError, match=r"needs 2.1 MB, and its disk has 2.0 MB free"):
        result.save(tmp_path / "out")
    monkeypatch.setattr(compressor, "load_model", None)
    assert "its disk has 2.0 MB free" in run(base, tmp_path / "new" / "out").stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a{b}c", "{options}", "{0}", "100% {x!r}"])
def test_names_are_text(result, tmp_path, name):
    card = (result.save(tmp_path / name) / "README.md").read_text()
    assert f'AutoModelForMaskedLM.from_pretrained("{name}")' in card
    assert f'AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)' in card


@pytest.mark.parametrize("accessory", ["renew_card", "copy_companions", "report"])
def test_an_accessory_that_fails_loses_no_model(result, tmp_path, monkeypatch, caplog, accessory):
    def fail(*args, **options):
        raise ZeroDivisionError("of no interest")

    if accessory == "report":
        monkeypatch.setattr(type(result.report), "to_dict", fail)
    elif accessory == "copy_companions":
        monkeypatch.setattr(folders, accessory, fail)
    else:
        monkeypatch.setattr("hf_offline_compress.card.renew_card", fail)
    out = result.save(tmp_path / "out")
    assert type(result.model).from_pretrained(out).compressed_modules()
    assert "ZeroDivisionError: of no interest" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_numbers_that_are_none_in_a_card(result, tmp_path):
    out = result.save(tmp_path / "out")
    report = json.loads((out / "compression_report.json").read_text())
    report["groups"][0] |= {"relative_error": float("nan"), "ratio": float("inf"), "calibrated_error": float("nan")}
    (out / "compression_report.json").write_text(json.dumps(report))
    assert "–" in write_card(out).read_text()


def dynamically_quantized():
    return torch.ao.quantization.quantize_dynamic(make_model("bert", "BertModel"), {torch.nn.Linear})


class Pipeline:
    def __init__(self):
        self.model = make_model("bert", "BertModel")


def adapted():
    model = make_model("bert", "BertModel")
    model.peft_config = {}
    return model


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: torch.nn.DataParallel(make_model("bert", "BertModel")), r"DataParallel cannot.*pass.*`model\.module`"),
        (lambda: torch.compile(make_model("bert", "BertModel")), r"`model\._orig_mod`"),
        (adapted, r"merge them into the model first, `model = model\.merge_and_unload\(\)`"),
        (dynamically_quantized, "BertModel is quantized already; pass the original model"),
        (Pipeline, r"A Pipeline cannot.*such as its `\.model`"),
        (lambda: torch.nn.Linear(2, 2), "A Linear cannot be compressed; pass a Hub id"),
        (lambda: None, "A NoneType cannot be compressed"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_base(make, message):
    with pytest.raises(CompressionError, match=message):
        compress(make(), "svd")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tokenizer": "bert-base-uncased"}, "`tokenizer` must be a transformers tokenizer, not a str"),
        ({"ratio": "4"}, "`ratio` must be a number, not '4'"),
        ({"batch_size": 0}, "`batch_size` must be an integer of 1 or more, not 0"),
        ({"seed": 1.5}, "`seed` must be an integer"),
        ({"calibration": 5, "recipe": "fwsvd"}, "must be texts: .* this is a int"),
        ({"calibration": [b"text"], "recipe": "fwsvd"}, "holds what is no string"),
    ],
)
def test_arguments_of_other_types(base, options, message):
    with pytest.raises(CompressionError, match=message):
        compress(base, options.pop("recipe", "svd"), progress=False, **options)


def test_numbers_of_numpy_and_texts_of_a_generator(base, tmp_path):
    options = {"batch_size": np.int32(4), "seed": np.uint8(3), "progress": False}
    given = compress(base, "calibrated-svd", ratio=np.float32(2.5), calibration=(t for t in TEXTS), **options)
    plain = compress(base, "calibrated-svd", ratio=2.5, calibration=TEXTS, batch_size=4, seed=3, progress=False)
    assert given.report.recipe == plain.report.recipe and given.report.groups[0].size == plain.report.groups[0].size
    assert json.loads((given.save(tmp_path / "out") / "compression_report.json").read_text())["seed"] == 3
    assert (
        make_plan(
            given.model.config.to_dict() | {"model_type": "bert", "compression": None},
            compressor.load_recipe("small").override(max_bytes=np.int64(60_000)),
            architecture="BertForMaskedLM",
        ).file_bytes
        <= 60_000
    )


def test_bases_in_double_precision(base, tmp_path):
    model = make_model("bert", "BertForMaskedLM").double()
    model.save_pretrained(tmp_path / "double")
    make_tokenizer("bert").save_pretrained(tmp_path / "double")
    plain = compress(base, "svd", calibration=None, progress=False).model.state_dict()
    for given in (tmp_path / "double", model):
        found = compress(given, "svd", calibration=None, progress=False).model
        assert found.dtype == torch.float32
        assert all(tensor.equal(plain[name]) for name, tensor in found.state_dict().items())
    assert model.dtype == torch.float64


def test_what_a_notebook_shows_is_short(result, tmp_path):
    plan = make_plan(
        make_model("bert", "BertModel").config.to_dict(), compressor.load_recipe("svd"), architecture="BertModel"
    )
    shown = [repr(each) for each in (result, result.report, plan, inspect_folder(result.save(tmp_path / "out")))]
    assert all(len(text) < 250 and "\n" not in text for text in shown), shown
    assert "CompressedBertForMaskedLM" in shown[0] and "tiny-bert" in shown[1] and "svd" in shown[2]
