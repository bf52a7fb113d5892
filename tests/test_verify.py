"""Verification: what was recorded is what is loaded, and the folder holds nothing that must not be published."""

import json
import os
import pickle
import shutil
import socket

import pytest
import torch
from common import HEADS, error_of, make_model, make_tokenizer, save_base
from processes import PYTHON, run_cli
from safetensors.torch import load_file, save_file

import hf_offline_compress
from hf_offline_compress import CompressionError, verify_folder
from hf_offline_compress.artifact import probe
from hf_offline_compress.verifying import check_files
from hf_offline_compress.verifying.loading import load_checks

SECRET = "hf_" + "aB3" * 11


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base") / "tiny", "bert", "BertForMaskedLM")
    return hf_offline_compress.compress(base, "svd", calibration=None, progress=False)


@pytest.fixture(scope="module")
def finished(result, tmp_path_factory):
    folder = result.save(tmp_path_factory.mktemp("finished") / "öut+ (1)::")  # a name that remote code has too
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: me/tiny\n---\n# Small\n")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def named(verification, *names):
    return [check for check in verification.checks if check.name in names]


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("model_type,head", HEADS)
def test_every_head_can_be_probed(model_type, head):
    model = make_model(model_type, head)
    inputs = probe.probe_inputs(model.config, head)
    outputs = probe.probe_outputs(model.train(), inputs)
    assert model.training
    assert json.loads(json.dumps(inputs)) == inputs
    assert all(None not in digest["values"] for digest in outputs.values()) and outputs
    assert probe.difference(outputs, probe.probe_outputs(model.eval(), inputs)) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert probe.difference(outputs, probe.probe_outputs(model, inputs)) > 1e-3


def test_a_model_without_padding_is_probed_with_one_sequence():
    model = make_model("gpt2", "GPT2ForSequenceClassification")
    model.config.pad_token_id = None
    inputs = probe.probe_inputs(model.config, "GPT2ForSequenceClassification")
    assert len(inputs["input_ids"]) == 1 and probe.probe_outputs(model, inputs)


def test_the_record_is_of_the_model_in_memory(result, finished):
    record = json.loads((finished / "verification.json").read_text())
    assert record["class"] == "CompressedBertForMaskedLM" and record["dtype"] == "float32"
    assert record["compressed_modules"] == len(result.model.compressed_modules()) > 10
    assert record["weights"]["model.safetensors"]["bytes"] == (finished / "model.safetensors").stat().st_size
    with torch.no_grad():
        logits = result.model(**{name: torch.tensor(value) for name, value in record["inputs"].items()}).logits
    assert record["outputs"]["logits"]["shape"] == list(logits.shape)
    assert record["outputs"]["logits"]["values"][0] == pytest.approx(float(logits.flatten()[0]), rel=1e-6)
    decoding = hf_offline_compress.compress(
        make_model("bert", "BertModel"),
        "ae",
        ratio=3,
        calibration=None,
        tokenizer=make_tokenizer("bert"),
        progress=False,
    ).model
    probe.probe_outputs(decoding, record["inputs"])
    assert all(module._cache is None for module in decoding.compressed_modules().values() if hasattr(module, "_cache"))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"storage": "float16"}], ids=str)
def test_records_of_narrow_numbers(result, tmp_path, options):
    model = make_model("roberta", "RobertaForSequenceClassification")
    made = hf_offline_compress.compress(model, "svd", ratio=4, calibration=None, progress=False, **options)
    folder = made.save(tmp_path / "out")
    record = json.loads((folder / "verification.json").read_text())
    assert record["dtype"] == options.get("dtype", "float32")
    found = probe.load_in_clean_process(folder, trust=False, inputs=record["inputs"])
    assert probe.difference(record["outputs"], found["outputs"]) < 1e-6
    made.model.save_pretrained(folder)
    assert not (folder / "verification.json").exists()


def test_differences():
    one = {"logits": {"shape": [2, 2], "root_mean_square": 2.0, "values": [1.0, 2.0]}}
    assert probe.difference(one, one) == 0
    off = {"logits": {**one["logits"], "values": [1.0, 2.5]}}
    assert probe.difference(one, off) == 0.25
    for other in ({}, {"other": one["logits"]}, {"logits": {**one["logits"], "shape": [4]}}):
        assert probe.difference(one, other) == float("inf")
    assert probe.difference(one, {"logits": {**one["logits"], "values": [1.0, None]}}) == float("inf")
    assert probe.difference(one, {"logits": {**one["logits"], "values": [1.0]}}) == float("inf")


def test_the_command_verifies_what_compress_has_written(finished):
    run = run_cli("verify", finished, "--json", HF_TOKEN=SECRET, WARM_PYTHON=PYTHON)  # which starts two fresh ones
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert found["passed"] and found["folder"] == finished.name
    assert {check["status"] for check in found["checks"]} == {"passed"}
    sentences = {check["name"]: check["sentence"] for check in found["checks"]}
    for mode in ("with", "without"):
        assert "CompressedBertForMaskedLM with 19 compressed modules" in sentences[f"loading {mode} the package"]
        assert "Equal to the outputs that were recorded" in sentences[f"outputs {mode} the package"]


def test_a_folder_without_a_record_is_verified_as_far_as_it_can_be(forked, tmp_path):
    """One of a head that no auto class has, written through save_pretrained."""
    model = make_model("gpt2", "GPT2DoubleHeadsModel")
    compressed = hf_offline_compress.compress(model, "svd", calibration=None, progress=False).model
    compressed.save_pretrained(tmp_path / "plain")
    verification = verify_folder(tmp_path / "plain")
    assert verification.passed, verification.failed
    status = {check.name: check.status for check in verification.checks}
    assert [name for name, value in status.items() if value == "skipped"] == [
        "card",
        "record",
        "weights",
        "outputs with the package",
    ]
    assert "those with the package" in named(verification, "outputs without the package")[0].sentence


def test_code_that_is_not_ours_is_run_only_if_that_is_asked_for(forked, folder, tmp_path, monkeypatch):
    """And it sees no token. A missing key fails, in whatever way it is loaded."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with (folder / "layers_compressed.py").open("a") as file:
        file.write("\nimport os, huggingface_hub\nfrom pathlib import Path\n")
        file.write(
            f"Path({str(tmp_path / 'ran')!r}).write_text(repr([os.getenv('HF_TOKEN'), huggingface_hub.get_token()]))\n"
        )
    state = load_file(folder / "model.safetensors")
    state.pop("cls.predictions.transform.dense.weight", None)
    save_file(dict(list(state.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "verification.json").unlink()
    verification = verify_folder(folder)
    assert not (tmp_path / "ran").exists()
    assert [check.name for check in verification.failed] == ["code", "loading with the package"]
    assert "layers_compressed.py is not the code of hf-offline-compress" in verification.failed[0].sentence
    assert "missing keys" in verification.failed[1].sentence
    without = named(verification, "loading without the package")[0]
    assert without.status == "skipped" and "--trust-remote-code" in without.sentence
    trusted = verify_folder(folder, trust_remote_code=True)
    assert (tmp_path / "ran").read_text() == "[None, None]"
    assert {"loading with the package", "loading without the package"} <= {check.name for check in trusted.failed}


def test_other_outputs_and_numbers_of_modules_than_recorded(forked, folder):
    record = json.loads((folder / "verification.json").read_text())
    record["outputs"]["logits"]["values"][3] += 0.1
    record["compressed_modules"] += 1
    loading, outputs = load_checks(folder, record, run_code=False)[:2]
    assert loading.status == outputs.status == "failed"
    assert "19 compressed modules, and 20 when it was saved" in loading.sentence
    assert "off by" in outputs.sentence


def flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


HOME = "/home/anna/models"
TAMPERED = {
    "other weights": (lambda f: flip(f / "model.safetensors"), "weights", "not the recorded content"),
    "cut weights": (
        lambda f: os.truncate(f / "model.safetensors", 60_000),
        "weights",
        "60,000 bytes, and",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights", "no weights"),
    "more weights": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "extra.safetensors"),
        "weights",
        "extra.safetensors is not among",
    ),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
        "formats",
        "is not a safetensors file",
    ),
    "a pickle": (lambda f: torch.save({}, f / "optimizer.pt"), "formats", "optimizer.pt is a pickle"),
    "a pickle by content": (lambda f: torch.save({}, f / "scheduler"), "formats", "scheduler is a pickle"),
    "an old pickle": (lambda f: (f / "x").write_bytes(b"\x80\x04\x95."), "formats", "x is a pickle"),
    "a pickle of text": (lambda f: (f / "x.txt").write_bytes(pickle.dumps({}, 0)), "formats", "x.txt is a pickle"),
    "a model of Keras": (lambda f: (f / "tf_model.h5").write_bytes(b""), "formats", "tf_model.h5 is a model of Keras"),
    "an archive": (lambda f: shutil.make_archive(f / "x", "tar", f, "config.json"), "formats", "x.tar is an archive"),
    "JSON in UTF-16": (lambda f: (f / "a.json").write_text("{}", "utf-16"), "formats", "a.json cannot be read"),
    "a module's code": (
        lambda f: (f / "modules.json").write_text('[{"type": "you.Module"}]'),
        "code",
        "modules.json refers to other code, 'you.Module'",
    ),
    "a token in UTF-16": (lambda f: (f / "x.dat").write_text(SECRET, "utf-16"), "tokens", "x.dat holds"),
    "a private key": (lambda f: (f / "id_rsa").write_text(f"{'-' * 5}BEGIN PRIVATE KEY{'-' * 5}"), "tokens", "id_rsa"),
    "broken JSON": (lambda f: (f / "evaluation.json").write_text("{"), "formats", "evaluation.json cannot be read"),
    "a token in a config": (lambda f: edit(f / "config.json", token=SECRET), "tokens", "config.json holds"),
    "a token in a card": (lambda f: (f / "NOTES.md").write_text(f"Use {SECRET}."), "tokens", "NOTES.md holds"),
    "a token in a vocabulary": (lambda f: (f / "vocab.txt").write_text(SECRET), "tokens", "vocab.txt holds"),
    "a path in JSON": (lambda f: edit(f / "config.json", _name_or_path=HOME), "paths", f"the absolute path '{HOME}'"),
    "any path in JSON": (lambda f: edit(f / "a.json", data=["/some/where/x.txt"]), "paths", "'/some/where/x.txt'"),
    "a path in a text": (lambda f: (f / "NOTES.md").write_text("See /tmp/x/y."), "paths", "NOTES.md holds"),
    "a path on Windows": (lambda f: edit(f / "a.json", data=r"C:\Users\anna"), "paths", "a.json holds"),
    "a path in weights": (
        lambda f: save_file({}, f / "b.safetensors", metadata={"from": HOME}),
        "paths",
        "b.safetensors holds",
    ),
    "a damaged record": (lambda f: (f / "verification.json").write_text("[]"), "record", "it is damaged"),
    "a newer record": (lambda f: edit(f / "verification.json", format_version=9), "record", "format version 9"),
    "a card that is no YAML": (
        lambda f: (f / "README.md").write_text("---\na: [\n---\n"),
        "card",
        "cannot be read as a model card",
    ),
    "a card without metadata": (lambda f: (f / "README.md").write_text("# Small\n"), "card", "has no metadata"),
    "a card of a local base": (
        lambda f: (f / "README.md").write_text("---\nbase_model: ./a/b\n---\n"),
        "card",
        "'base_model' must be a Hub id",
    ),
    "a card with wrong types": (
        lambda f: (f / "README.md").write_text("---\ntags: 3\n---\n"),
        "card",
        "'tags' must be",
    ),
    "a card with wrong results": (
        lambda f: (f / "README.md").write_text("---\nmodel-index:\n- name: a\n  results: [{task: 1}]\n---\n"),
        "card",
        "cannot be read as a model card",
    ),
    "other code": (lambda f: (f / "setup.py").write_text(""), "code", "setup.py is not part of"),
    "changed code": (lambda f: (f / "weights_compressed.py").write_text(""), "code", "is not the code of"),
    "missing code": (lambda f: (f / "packing_compressed.py").unlink(), "code", "packing_compressed.py is missing"),
    "code from elsewhere": (
        lambda f: edit(f / "config.json", auto_map={"AutoModel": "you/x--modeling.Evil"}),
        "code",
        "config.json refers to other code, 'you/x--modeling.Evil'",
    ),
    "a tokenizer's code": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
        "code",
        "tokenizer_config.json refers to other code",
    ),
    "no auto_map": (lambda f: edit(f / "config.json", auto_map=None), "code", "has no auto_map"),
    "a link": (lambda f: (f / "link.json").symlink_to(f.parent / "secret.json"), "files", "link.json is a link"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_has_been_tampered_with_is_found(folder, what):
    (folder.parent / "secret.json").write_text("{}")
    tamper, name, words = TAMPERED[what]
    tamper(folder)
    failed = {check.name: check.sentence for check in check_files(folder).failed}
    assert words in failed.pop(name)
    assert failed.keys() <= {"weights", "formats"}, "only what was tampered with fails"
    assert SECRET not in str(failed)


def test_nothing_is_loaded_where_there_are_pickles(folder):
    torch.save({}, folder / "pytorch_model.bin")
    verification = verify_folder(folder)
    assert [check.name for check in verification.failed] == ["formats"]
    assert "was not loaded" in named(verification, "loading")[0].sentence


def test_names_of_the_machine_are_found(folder, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "annas-box-7.local")
    monkeypatch.setenv("LOGNAME", "annasmith")
    edit(folder / "evaluation.json", note="measured on annas-box-7")
    assert "evaluation.json holds this machine's host name" in check_files(folder).failed[0].sentence
    edit(folder / "evaluation.json", note="annasmith@gpu")
    assert "evaluation.json holds this machine's user name" in check_files(folder).failed[0].sentence
    edit(folder / "evaluation.json", note="annasmith/tiny-bert is the base")
    assert check_files(folder).passed


def test_what_is_no_fault_is_not_taken_for_one(folder):
    (folder / "vocab.txt").write_text("/home\n/home/anna/x\n[PAD]\n")
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "/home/anna/x"}})
    edit(
        folder / "a.json", text=["and/or", "/", "1/2", "https://example.org/home/x", "encoder/layer", "a / b", "TCP/IP"]
    )
    text = "---\nlicense: mit\n---\nSee https://example.org/tmp/x, [here](docs/a.md) and hf_offline_compress; 4 / 5.\n"
    (folder / "README.md").write_text(text)
    (folder / ".cache").mkdir()
    (folder / ".cache/x.pt").write_bytes(b"")
    (folder / "model.bin.partial").write_bytes(b"")
    (folder / ".env").write_text(SECRET)
    verification = check_files(folder)
    assert verification.passed, verification.failed


def test_what_push_leaves_out_is_named(folder):
    torch.save({"hub_token": SECRET}, folder / "training_args.bin")
    (folder / "notes.txt").write_text("Mine.")
    verification = check_files(folder)
    assert verification.passed, verification.failed
    assert "left out unless included: notes.txt." in verification.checks[0].sentence


def test_what_is_no_folder_of_ours(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(CompressionError, match="is not a compressed folder"):
            verify_folder(place)
    run = run_cli("verify", tmp_path)
    assert run.returncode == 1 and len(error_of(run.stderr).splitlines()) == 1


def test_the_command_fails_if_a_check_does(folder):
    edit(folder / "config.json", note="/some/where")
    torch.save({}, folder / "optimizer.pt")
    run = run_cli("verify", folder)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "failed   formats" in run.stdout and "failed   paths" in run.stdout and "2 of 10 checks failed" in run.stdout
