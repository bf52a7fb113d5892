"""Damaged folders under every command that takes one: works, or is one sentence that says what and what would help."""

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import TEXTS, save_base
from safetensors.torch import load_file, save_file
from typer.main import get_command

import hf_offline_compress.evaluate.benchmarking as benchmarking
import hf_offline_compress.verifying.loading as loading
from hf_offline_compress import CompressionError, compress, export_folder, inspect_folder, write_card
from hf_offline_compress.artifact.probe import load_in_clean_process
from hf_offline_compress.cli import app
from hf_offline_compress.evaluate.benchmark_worker import Held, failure
from hf_offline_compress.evaluate.records import Data, Evaluation, metric, write_evaluations

WEIGHTS, CONFIG, REPORT = "model.safetensors", "config.json", "compression_report.json"
EVALUATION, RECORD, CARD = "evaluation.json", "verification.json", "README.md"
Damage = Callable[[Path], None]
COMMAND = get_command(app)


def write(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, length: int) -> Damage:
    """Keep so many bytes of a file; with a negative number, drop so many."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:length])

    return damage


def replaced(name: str, make: Callable[[Path], Any]) -> Damage:
    """Put something else into a file's place; without it, the file is only removed."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def put(name: str, *steps: Any) -> Damage:
    """Change a value in a JSON file: the way to it, then the value; `...` removes it."""
    *way, last, value = steps

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        place = content
        for step in way:
            place = place[next(iter(place)) if step == "*" else step]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        (folder / name).write_text(json.dumps(content))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors of the weight file, which stays one."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def first(found: dict[str, torch.Tensor], part: str = "") -> str:
    return next(name for name in sorted(found) if part in name)


def header(content: bytes, length: int | None = None) -> Damage:
    return write(WEIGHTS, struct.pack("<Q", len(content) if length is None else length) + content)


BAD_FILES: dict[str, Callable[[str], Damage]] = {
    "missing": lambda name: replaced(name, lambda path: None),
    "empty": lambda name: write(name, b""),
    "binary": lambda name: write(name, bytes(range(256)) * 4),
    "half": lambda name: lambda folder: cut(name, (folder / name).stat().st_size // 2)(folder),
    "LFS": lambda name: write(name, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"),
    "HTML": lambda name: write(name, b"<!DOCTYPE html><html><body>404</body></html>"),
    "folder": lambda name: replaced(name, Path.mkdir),
    "pipe": lambda name: replaced(name, os.mkfifo),
    "dangling": lambda name: replaced(name, lambda path: path.symlink_to("nowhere")),
}
BAD_JSON = {
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "a list": b"[]",
    "null": b"null",
    "a text": b'"text"',
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
    "no fields": b"{}",
}
WRONG: dict[str, tuple[Any, ...]] = {
    CONFIG: (
        ("model_type", "bert"),
        ("model_type", ["compressed_bert"]),
        ("model_type", "compressed_gpt2"),
        ("architectures", ...),
        ("architectures", []),
        ("architectures", "CompressedBertModel"),
        ("architectures", [5]),
        ("architectures", ["CompressedNothing"]),
        ("architectures", ["CompressedGPT2Model"]),
        ("compression", ...),
        ("compression", None),
        ("compression", []),
        ("compression", {}),
        ("compression", "decoding", ...),
        ("compression", "decoding", "never"),
        ("compression", "format_version", 99),
        ("compression", "format_version", "4"),
        ("compression", "groups", []),
        ("compression", "groups", {}),
        ("compression", "groups", "*", []),
        ("compression", "groups", "*", {}),
        ("compression", "groups", "*", "structure", "wavelets"),
        ("compression", "groups", "*", "structure", 5),
        ("compression", "groups", "*", "members", {}),
        ("compression", "groups", "*", "members", [{}]),
        ("compression", "groups", "*", "members", [5]),
        ("compression", "groups", "*", "members", 0, "module", "no.such.module"),
        ("compression", "groups", "*", "members", 0, "module", 5),
        ("hidden_size", "32"),
        ("hidden_size", -1),
        ("hidden_size", 31),
        ("hidden_size", float("nan")),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 32.5),
        ("num_attention_heads", 0),
        ("vocab_size", [1]),
        ("vocab_size", 10),
        ("max_position_embeddings", "many"),
        ("dtype", "float99"),
        ("dtype", 16),
        ("pad_token_id", "x"),
        ("id2label", [1]),
        ("auto_map", []),
        ("auto_map", ...),
    ),
    REPORT: (
        *((key, ...) for key in ("base", "architecture", "recipe", "groups", "dense", "totals", "versions")),
        ("base", "tiny"),
        ("base", "name", None),
        ("base", "revision", 5),
        ("architecture", 5),
        ("architecture", "BertForNothing"),
        ("recipe", []),
        ("recipe", "name", 5),
        ("recipe", "rules", 5),
        ("calibration", "bundled"),
        ("validation", []),
        ("groups", {}),
        ("groups", [5]),
        ("groups", 0, "rows", "many"),
        ("groups", 0, "rows", ...),
        ("groups", 0, "stored_bytes", None),
        ("groups", 0, "relative_error", "small"),
        ("groups", 0, "relative_error", float("nan")),
        ("groups", 0, "members", 5),
        ("dense", [5]),
        ("dense", 5),
        ("totals", []),
        ("totals", "parameters", "many"),
        ("totals", "parameters", 0),
        ("versions", []),
        ("seed", []),
        ("options", []),
        ("search", 5),
    ),
    EVALUATION: (
        ("format_version", 99),
        ("format_version", ...),
        ("evaluations", {}),
        ("evaluations", [5]),
        ("evaluations", 0, "id", ...),
        ("evaluations", 0, "id", 5),
        ("evaluations", 0, "metrics", None),
        ("evaluations", 0, "metrics", [5]),
        ("evaluations", 0, "metrics", 0, "base", "half"),
        ("evaluations", 0, "data", ...),
        ("evaluations", 0, "data", "name", None),
        ("evaluations", 0, "settings", []),
        ("evaluations", 0, "task", "fill-mask"),
        ("benchmark", []),
        ("benchmark", {}),
        ("benchmark", "models", None),
        ("benchmark", "models", [5]),
        ("benchmark", "models", 0, "latency", 5),
        ("benchmark", "models", 0, "latency", 0, "median_ms", "long"),
    ),
    RECORD: (
        ("format_version", 99),
        ("class", 5),
        ("class", ...),
        ("dtype", []),
        ("compressed_modules", "some"),
        ("weights", []),
        ("weights", "*", 5),
        ("weights", "*", "bytes", "many"),
        ("inputs", []),
        ("inputs", "input_ids", [["x"]]),
        ("outputs", []),
        ("outputs", "*", 5),
        ("outputs", "*", "values", ["x"]),
        ("outputs", "*", "root_mean_square", "x"),
        ("outputs", "*", "shape", None),
    ),
    "tokenizer_config.json": (
        ("tokenizer_class", "NoSuchTokenizer"),
        ("tokenizer_class", 5),
        ("model_max_length", "x"),
    ),
}
DAMAGES: dict[str, tuple[str, Damage]] = {}
for _name in (WEIGHTS, CONFIG, REPORT, EVALUATION, RECORD, CARD, "tokenizer.json", "tokenizer_config.json"):
    for _kind, _make in BAD_FILES.items():
        DAMAGES[f"{_name}: {_kind}"] = _name, _make(_name)
    for _kind, _content in BAD_JSON.items() if _name.endswith(".json") else ():
        DAMAGES[f"{_name}: {_kind}"] = _name, write(_name, _content)
for _name, _changes in WRONG.items():
    for _steps in _changes:
        _value = "no" if _steps[-1] is ... else repr(_steps[-1])
        DAMAGES[f"{_name}: {'.'.join(map(str, _steps[:-1]))}: {_value}"] = _name, put(_name, *_steps)
for _kind, _damage in {
    "last bytes cut": cut(WEIGHTS, -7),
    "bytes added": lambda folder: (folder / WEIGHTS).open("ab").write(b"more") and None,
    "header longer than the file": header(b"{}", 10**6),
    "header of 2**63 bytes": header(b"{}", 2**63),
    "header no JSON": header(b"{a: 1}"),
    "header a list": header(b"[]"),
    "header without offsets": header(b'{"a": {}}'),
    "header of other sizes": header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}' + b"    "),
    "no tensors": tensors(dict.clear),
    "a factor missing": tensors(lambda found: found.pop(first(found, "self.key.latents"))),
    "a norm missing": tensors(lambda found: found.pop(first(found, "LayerNorm"))),
    "a factor of another shape": tensors(
        lambda found: found.update({(name := first(found, "self.key.latents")): found[name][:-1].clone()})
    ),
    "a norm of another shape": tensors(
        lambda found: found.update({(name := first(found, "LayerNorm")): found[name][:-1].clone()})
    ),
    "another dtype": tensors(
        lambda found: found.update({(name := first(found, "self.key.latents")): found[name].to(torch.complex64)})
    ),
    "renamed": tensors(lambda found: found.update({"other": found.pop(first(found, "self.key.latents"))})),
    "NaN": tensors(lambda found: found[first(found, "self.key.latents")].fill_(float("nan"))),
    "an index without shards": write("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
}.items():
    DAMAGES[f"{WEIGHTS}: {_kind}"] = WEIGHTS, _damage
for _kind, _content in {
    "open metadata": b"---\nlicense: mit\n",
    "no YAML": b"---\n{]\n---\ntext",
    "metadata a list": b"---\n- mit\n---\ntext",
    "metadata of odd types": b"---\nlicense: [mit]\nlanguage: 5\nbase_model: {}\n---\n",
    "anchors": b"---\na: &a [1]\nb: *c\n---\n",
}.items():
    for _marks in ("", "<!-- your notes: begin --><!-- your notes: end -->"):
        DAMAGES[f"{CARD}: {_kind}{', ours' if _marks else ''}"] = CARD, write(CARD, _content + _marks.encode())
for _name in ("generation_config.json", "modules.json", "special_tokens_map.json", "vocab.txt"):
    DAMAGES[f"{_name}: HTML"] = _name, write(_name, b"<html>")
    DAMAGES[f"{_name}: a text"] = _name, write(_name, b'"text"')
    DAMAGES[f"{_name}: binary"] = _name, write(_name, bytes(range(256)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-bert", "bert", "BertForMaskedLM")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "small"
    compress(base, "svd", ratio=2.0, calibration=TEXTS, progress=False, modules="key,word_embeddings").save(folder)
    data = Data("mine.txt", 5, sha256="0" * 64)
    found = Evaluation(
        "agreement-mine",
        {"type": "fill-mask", "name": "agreement"},
        data,
        {"seed": 0, "dtype": "float32"},
        (metric("agreement", "higher", 1.0, 0.9),),
        {"base": 1.0, "compressed": 1.0},
    )
    latency = {"batch": 1, "length": 8, "median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "tokens_per_second": 8.0}
    models = [
        {
            "name": name,
            "disk_bytes": 10,
            "load_seconds": 0.1,
            "memory_bytes": 10,
            "loaded_bytes": 10,
            "latency": [latency],
        }
        for name in ("base", "compressed")
    ]
    write_evaluations(
        folder,
        [found],
        {
            "device": "cpu",
            "threads": 1,
            "versions": {},
            "seed": 0,
            "repeats": 1,
            "dtype": "float32",
            "memory_kind": "resident",
            "models": models,
            "unavailable": [],
        },
    )
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "mine.txt"
    file.write_text("\n".join(" ".join(TEXTS[i : i + 8]) for i in range(0, 24, 8)))
    return file


class Inline:
    """A worker of the benchmark, in this process."""

    threads = 1

    def __init__(self, name, settings):
        self.name, self.held = name, Held(**settings)

    def wait_until_ready(self):
        """Nothing is imported."""

    def ask(self, do, **options):
        try:
            return getattr(self.held, do)(**options)
        except Exception as error:
            raise CompressionError(f"'{self.name}' cannot be measured: {failure(error)}") from error

    def close(self):
        """Nothing runs."""


@pytest.fixture
def in_process(monkeypatch):
    """Let what verify and benchmark do in processes of their own happen in this one."""

    def load(folder, modes):
        try:
            found = load_in_clean_process(folder, trust=False, inputs=None)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        return dict.fromkeys(modes, found)

    monkeypatch.setattr(loading, "_load", load)
    monkeypatch.setattr(benchmarking, "Worker", Inline)
    monkeypatch.setattr(benchmarking, "_measure", lambda *_: [])


def arguments(command, folder, base, text, out):
    """Return the command line of a command on a folder."""
    options = {
        "export": (out,),
        "evaluate": ("--base", base, "--text", text, "--limit", 1, "--measure", "agreement"),
        "benchmark": ("--base", base, "--models", "compressed", "--length", 8, "--json"),
    }
    return [str(argument) for argument in (command, folder, *options.get(command, ()))]


# Which commands read which files: what must be in them when they fail. All but `verify` stop at the first.
READERS = {
    WEIGHTS: ("inspect", "verify", "export", "evaluate", "benchmark"),
    CONFIG: ("inspect", "verify", "export"),
    REPORT: ("inspect", "card"),
    EVALUATION: ("card", "evaluate"),
    RECORD: ("verify",),
    CARD: ("card", "verify"),
    "tokenizer.json": ("evaluate", "export"),
    "tokenizer_config.json": ("evaluate", "export"),
}
NAMED = {WEIGHTS: "model.safetensors|weights", "tokenizer_config.json": "tokenizer"}
ADVICE = "[Gg]et |[Dd]ownload it|Delete it|[Dd]elete|compress |[Ss]ave it|move it away|Fix it|pass |make it again|export needs"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder(name, whole, base, text, in_process, tmp_path, capsys):
    """No command ends in a traceback; what fails names the file, and says what would work."""
    file, damage = DAMAGES[name]
    shutil.copytree(whole, tmp_path / "small")
    damage(tmp_path / "small")
    for command in READERS.get(file, ("export",)):
        code = COMMAND.main(
            arguments(command, tmp_path / "small", base, text, tmp_path / "dense"), standalone_mode=False
        )
        said, errors = capsys.readouterr()
        assert "unforeseen" not in errors, (command, errors)
        if not code:
            assert errors.count("error:") == 0
        elif command == "verify":
            assert re.search(NAMED.get(file, re.escape(file)), said + errors), said + errors
        else:
            assert errors.count("error:") == 1 and re.search(NAMED.get(file, re.escape(file)), errors), (
                command,
                errors,
            )
            assert re.search(ADVICE, errors), (command, errors)
            assert not (tmp_path / "dense").exists()


# What must not pass, with the command that has to see it; the rest of the damages may be harmless.
FATAL = [
    *(("inspect", f"{CONFIG}: {kind}") for kind in (*BAD_FILES, *BAD_JSON)),
    *(("inspect", f"{REPORT}: {kind}") for kind in (*BAD_FILES, *BAD_JSON) if kind != "missing"),
    *(("inspect", f"{WEIGHTS}: {kind}") for kind in BAD_FILES),
    *(("card", f"{EVALUATION}: {kind}") for kind in (*BAD_FILES, *BAD_JSON) if kind != "missing"),
    *(("inspect", name) for name in DAMAGES if name.startswith(f"{WEIGHTS}: header")),
    *(("export", f"{WEIGHTS}: {kind}") for kind in ("a factor missing", "a norm missing", "a norm of another shape")),
    *(("export", f"{WEIGHTS}: {kind}") for kind in ("a factor of another shape", "renamed", "another dtype")),
]


@pytest.mark.parametrize("command,name", FATAL)
def test_what_must_not_pass(command, name, whole, base, text, tmp_path):
    shutil.copytree(whole, tmp_path / "small")
    DAMAGES[name][1](tmp_path / "small")
    with pytest.raises(CompressionError):
        if command == "export":
            export_folder(tmp_path / "small", tmp_path / "dense")
        elif command == "card":
            write_card(tmp_path / "small")
        else:
            inspect_folder(tmp_path / "small")


def test_an_undamaged_folder(whole, base, text, in_process, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "small")
    for command in ("inspect", "card", "verify", "export", "evaluate", "benchmark"):
        code = COMMAND.main(
            arguments(command, tmp_path / "small", base, text, tmp_path / "dense"), standalone_mode=False
        )
        assert not code, capsys.readouterr()


def test_a_full_disk_keeps_the_numbers_of_evaluate(whole, base, text, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(whole, tmp_path / "small")
    monkeypatch.setattr("hf_offline_compress.foundation.files.tempfile.mkstemp", full)
    given = arguments("evaluate", tmp_path / "small", base, text, None)
    assert COMMAND.main([*given, "--quiet"], standalone_mode=False) == 1
    said, errors = capsys.readouterr()
    assert "agreement" in said and "added to" not in said
    assert re.search("numbers were not added to evaluation.json: There is no space left .*; free some", errors)
