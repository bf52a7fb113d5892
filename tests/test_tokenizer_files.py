"""A tokenizer is written without white space, and what a folder takes beside its weights is told."""

import json

import pytest
from common import TEXTS, make_tokenizer, save_base
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_offline_compress import compress
from hf_offline_compress.artifact.reading import inspect_folder
from hf_offline_compress.cli import app
from hf_offline_compress.foundation import tokenizer_files
from hf_offline_compress.foundation.tokenizer_files import compact_tokenizer

ODD = ["the cat", "Élan, ½ \t naïve 猫 🙂", "a  b\n", ""]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny", "roberta", "RobertaModel")


@pytest.fixture(scope="module")
def out(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "small"
    return compress(base, "svd", calibration=None, progress=False).save(folder)


def test_a_saved_tokenizer_has_no_white_space_and_gives_the_same_tokens(base, out):
    before, after = ((folder / "tokenizer.json").read_text("utf-8") for folder in (base, out))
    assert len(after) < 0.7 * len(before) and "\n" not in after
    assert json.loads(after)["model"] == json.loads(before)["model"]
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
    for text in (*ODD, *TEXTS):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_other_kinds_of_tokenizers_stay_what_they_are(model_type, tmp_path):
    make_tokenizer(model_type).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    before, size = Tokenizer.from_file(str(file)).to_str(), file.stat().st_size
    compact_tokenizer(tmp_path)
    assert Tokenizer.from_file(str(file)).to_str() == before and file.stat().st_size < size


@pytest.mark.parametrize("what", ["no JSON", "no tokenizer", "half a letter", "another tokenizer"])
def test_a_tokenizer_that_would_change_is_kept(what, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    make_tokenizer("bert").save_pretrained(tmp_path)
    text = file.read_text("utf-8")
    if what == "another tokenizer":
        compact = tokenizer_files.without_spaces
        monkeypatch.setattr(tokenizer_files, "without_spaces", lambda text: compact(text).replace('"cat"', '"cap"'))
    else:
        cat = text.replace('"cat"', '"\\ud800"', 1)
        text = {"no JSON": "{ ", "no tokenizer": '{ "a": 1 }', "half a letter": cat}[what]
        file.write_text(text, "utf-8")
    compact_tokenizer(tmp_path)
    assert file.read_text("utf-8") == text


def test_bytes_beside_the_weights_are_told(base, out):
    """By plan beforehand, and by summary, report, inspect and card as they are on disk."""
    told = CliRunner().invoke(app, ["plan", str(base), "--recipe", "svd", "--json", "--quiet"])
    beside = json.loads(told.stdout)["beside_bytes"]
    contents = inspect_folder(out)
    files = {f.relative_to(out).as_posix(): f.stat().st_size for f in out.rglob("*") if f.is_file()}
    assert contents.folder_bytes == sum(files.values())
    code = sum(size for name, size in files.items() if name.endswith("_compressed.py"))
    loaders = {"README.md", "compression_report.json", "verification.json"}
    assert contents.report["totals"]["folder_bytes"] == sum(s for n, s in files.items() if n not in loaders)
    # A new config is all that plan does not know of.
    settings = (base / "tokenizer_config.json").stat().st_size
    assert beside == code + settings + files["tokenizer.json"]
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert f"{contents.folder_bytes / 1e6:.2f} MB on disk" in shown
    whole = (sum(files.values()) - files["README.md"]) / 1e6
    assert f"All files together, tokenizer and code included, take {whole:.2f} MB." in (out / "README.md").read_text()
