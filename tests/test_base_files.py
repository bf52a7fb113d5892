"""Damaged and unusual bases: what transformers can load works; anything else is one sentence, before any work."""

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from common import TEXTS, save_base
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file
from test_damage import BAD_FILES, BAD_JSON, WEIGHTS, Damage, put, replaced, tensors, write
from transformers import AutoTokenizer

from hf_offline_compress import CompressionError, compress
from hf_offline_compress.base.checkpoint import (
    COMPANIONS,
    WANTED,
    load_model,
    load_tokenizer,
    read_config,
    resolve_base,
)
from hf_offline_compress.foundation.tensor_files import INDEX_FILE

LATIN = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncaf\u00e9\n".encode("latin-1")
POOLING = "1_Pooling/config.json"
DENSE = "2_Dense/pytorch_model.bin"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A sentence encoder, with its pipeline."""
    folder = save_base(tmp_path_factory.mktemp("bases") / "encoder", "bert", "BertModel")
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    (folder / POOLING).write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}))
    (folder / "2_Dense").mkdir()
    (folder / "LICENSE").write_text("Free to use.")
    torch.save({"linear.weight": torch.eye(32)}, folder / DENSE)
    return folder


@pytest.fixture
def base(encoder, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(encoder, tmp_path / "base")


def pickled(change=lambda state: state) -> Damage:
    """Keep the weights as a file of torch.save instead."""

    def damage(folder: Path) -> None:
        torch.save(change(load_file(folder / WEIGHTS)), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


def slow(tokenizer: str, **files: bytes) -> Damage:
    """Let the tokenizer be one of a class, with only these files; `__` stands for the dot in their names."""

    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer}))
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return damage


NORM, QUERY = "embeddings.LayerNorm.weight", "encoder.layer.0.attention.self.query.weight"
NO_SHARDS, NO_METADATA = b'{"metadata": {}, "weight_map": {}}', b'{"weight_map": {"a": "b"}}'
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", POOLING)
ABSENT = ("missing", "folder", "pipe", "dangling")  # counts as not there
DAMAGES: dict[str, tuple[str, Damage]] = {
    **{f"{WEIGHTS}: {kind}": (WEIGHTS, make(WEIGHTS)) for kind, make in BAD_FILES.items()},
    **{
        f"pytorch_model.bin: {kind}": ("pytorch_model.bin", both(pickled(), make("pytorch_model.bin")))
        for kind, make in BAD_FILES.items()
    },
    **{
        f"{name}: {kind}": (name.rpartition("/")[2], make(name))
        for name in JSON
        for kind, make in BAD_FILES.items()
        if kind not in ABSENT
    },
    **{
        f"{name}: {kind}": (name.rpartition("/")[2], write(name, content))
        for name in JSON
        for kind, content in BAD_JSON.items()
        if kind in ("latin-1", "null", "a text", "nested", "digits")
    },
    **{f"{DENSE}: {kind}": (DENSE, make(DENSE)) for kind, make in BAD_FILES.items() if kind not in ABSENT},
    **{f"LICENSE: {kind}": ("LICENSE", BAD_FILES[kind]("LICENSE")) for kind in ("LFS", "HTML")},
    "config.json: missing": ("config.json", BAD_FILES["missing"]("config.json")),
    "no model_type": ("config.json", both(put("config.json", "model_type", ...), put("config.json", "architectures", ...))),
    "model_type is a list": ("model_type", put("config.json", "model_type", ["bert"])),
    "architectures is a number": ("architectures", put("config.json", "architectures", 5)),
    "a norm of another shape": (NORM, tensors(lambda found: found.update({NORM: torch.ones(31)}))),
    "a width of another size": ("config.json", put("config.json", "intermediate_size", 48)),
    "names of another model": ("are named foo.", tensors(lambda found: renamed(found, "foo.{}".format))),
    "an index of nothing": (INDEX_FILE, both(replaced(WEIGHTS, lambda path: None), write(INDEX_FILE, NO_SHARDS))),
    "an index without metadata": (INDEX_FILE, both(replaced(WEIGHTS, lambda path: None), write(INDEX_FILE, NO_METADATA))),
    "a matrix missing": (QUERY, tensors(lambda found: found.pop(QUERY))),
    "a pickle of another object": ("weights", pickled(lambda state: Path("nowhere"))),
    "vocab.txt in latin-1": ("vocab.txt", slow("BertTokenizer", vocab__txt=LATIN)),
    "no vocabulary": ("vocab.txt", slow("BertTokenizer")),
    "a vocabulary of another class": ("spiece.model", slow("BertTokenizer", spiece__model=b"abc")),
    "no SentencePiece": ("spiece.model", slow("GPTSw3Tokenizer", spiece__model=b"abc")),
    "an unknown class": ("tokenizer_config.json", slow("NoSuchTokenizer", vocab__txt=b"a\n")),
}  # fmt: skip
ADVICE = (
    "Download (it|these files) again|Get what is missing|convert it|add one|pass |Save a model|has no config.json|save"
)


def refused(base):
    """Return what is said of a base that does not work; None if it does."""
    try:
        found = resolve_base(base)
        load_tokenizer(found)
        load_model(found, "BertModel", torch.float32)
    except CompressionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base(name, base):
    """One sentence that names the file, and says what would work."""
    file, damage = DAMAGES[name]
    damage(base)
    said = refused(base)
    assert said is not None
    assert file in said and "base" in said, said
    assert re.search(ADVICE, said) and "\n" not in said, said


def wrapped(state):
    """Names as DataParallel has them."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


def renamed(found, names):
    """Change names in place."""
    state = {names(name): found.pop(name) for name in sorted(found)}
    found.update(state)


def widened(found):
    found.update({name: tensor.double() for name, tensor in found.items()})


def into_inner_folder(folder: Path) -> None:
    """Move the model to where the first version of sentence-transformers had it; the root has a config of its own."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(inner / name)
    (folder / "config.json").write_text(json.dumps({"__version__": "0.3.0"}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "modules.json").write_text(json.dumps([{**MODULES[0], "path": "0_Transformer"}, *MODULES[1:]]))


CODES = {"vocab__txt": b"the 9\ncat 5\nsat 4\n", "bpe__codes": b"t h 9\nth e</w> 8\nc a 5\nca t</w> 5\n"}
UNUSUAL = {
    "names of DataParallel": tensors(lambda found: renamed(found, "module.{}".format)),
    "names of DataParallel, pickled": pickled(wrapped),
    "names of torch.compile": tensors(lambda found: renamed(found, "_orig_mod.module.{}".format)),
    "names of TensorFlow": tensors(
        lambda found: renamed(found, lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"))
    ),
    "double precision": both(tensors(widened), put("config.json", "dtype", "float64")),
    "pickled": pickled(),
    "no model_type": put("config.json", "model_type", ...),
    "a stale index beside the weights": write("model.safetensors.index.json", b'{"weight_map": {"a": "b"}}'),
    "0_Transformer": into_inner_folder,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_base_gives_what_the_usual_one_gives(name, encoder, base):
    wanted = load_model(resolve_base(encoder), "BertModel", torch.float32).state_dict()
    UNUSUAL[name](base)
    found = resolve_base(base)
    assert found.name == "base"
    state = load_model(found, "BertModel", torch.float32).state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert load_tokenizer(found).get_vocab() == AutoTokenizer.from_pretrained(encoder).get_vocab()


def test_the_pipeline_of_an_old_sentence_encoder_comes_along(base, tmp_path):
    """The model lies in the root afterwards, as it does today."""
    into_inner_folder(base)
    compress(base, "svd", progress=False).save(tmp_path / "small")
    assert json.loads((tmp_path / "small/modules.json").read_text()) == MODULES
    assert (tmp_path / "small" / POOLING).is_file() and not (tmp_path / "small/0_Transformer").exists()
    assert "license: apache-2.0" in (tmp_path / "small/README.md").read_text()


@pytest.mark.parametrize(
    "tokenizer,files,kept",
    [("PhobertTokenizer", CODES, {"bpe.codes", "vocab.txt"}), ("ByT5Tokenizer", {}, {"tokenizer_config.json"})],
)
def test_slow_tokenizers_come_along(tokenizer, files, kept, tmp_path):
    base = save_base(tmp_path / "base", "gpt2", "GPT2LMHeadModel", vocab_size=400)
    slow(tokenizer, **files)(base)
    compress(base, "svd", progress=False).save(tmp_path / "small")
    assert kept <= {file.name for file in (tmp_path / "small").iterdir()}
    wanted, found = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "small"))
    assert type(found).__name__ == tokenizer and found(TEXTS[0])["input_ids"] == wanted(TEXTS[0])["input_ids"]


def test_a_base_without_a_tokenizer_has_none(base):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    assert load_tokenizer(resolve_base(base)) is None


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("repository,name", [("models--me--tiny", "me/tiny"), ("models--tiny", "tiny")])
def test_a_folder_of_the_cache_is_named_by_its_repository(repository, name, encoder, tmp_path):
    folder = tmp_path / repository / "snapshots" / COMMIT
    shutil.copytree(encoder, folder)
    found = resolve_base(folder)
    assert (found.name, found.revision, found.folder) == (name, COMMIT, folder)


@pytest.mark.parametrize(
    "base,said",
    [
        ("", "not a Hub id"),
        ("a/b/c", "not a Hub id"),
        ("-a", "not a Hub id"),
        ("a--b", "not a Hub id"),
        ("a/b.git", "not a Hub id"),
        ("a\0b", "not a Hub id"),
        ("bärt", "not a Hub id"),
        ("a/" + "b" * 200, "not a Hub id"),
        ("x" * 5000, "not a Hub id"),
        ("https://huggingface.co/me/tiny/tree/main", "pass the repository's id, 'me/tiny'"),
        ("hf://me/tiny", "pass the repository's id, 'me/tiny'"),
        (__file__, "pass the folder that contains it"),
        ("me/tiny", "HF_HUB_OFFLINE is set: unset it"),
    ],
)
def test_what_is_no_base(base, said):
    with pytest.raises(CompressionError, match="(?s)^[^\n]*$") as raised:
        resolve_base(base)
    assert said in str(raised.value)


@pytest.fixture(params=["HF_HUB_OFFLINE", "no network"])
def cache(request, encoder, tmp_path, monkeypatch):
    """The Hub's cache with one repository in it, and no Hub."""
    repository = tmp_path / "cache/models--me--tiny"
    shutil.copytree(encoder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # The library that huggingface_hub speaks HTTP with has had several names.
    error = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    http = importlib.import_module(error.__module__.partition(".")[0])

    def nowhere(asked):
        raise http.ConnectError("no route", request=asked)

    if request.param == "no network":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(nowhere)))
    yield repository
    huggingface_hub.close_session()
    huggingface_hub.set_client_factory(default_client_factory)


def test_a_base_in_the_cache_needs_no_hub(cache):
    found = resolve_base("me/tiny")
    assert (found.name, found.revision) == ("me/tiny", COMMIT)
    assert load_model(found, "BertModel", torch.float32) and load_tokenizer(found)
    assert resolve_base("me/tiny", revision=COMMIT).folder == found.folder
    assert read_config("me/tiny")[0] == "me/tiny"


def test_the_old_layout_in_the_cache(cache):
    into_inner_folder(cache / "snapshots" / COMMIT)
    found = resolve_base("me/tiny")
    assert found.name == "me/tiny" and found.folder.name == "0_Transformer" and found.revision == COMMIT


def test_what_the_cache_lacks_is_said(cache, caplog):
    with pytest.raises(CompressionError, match=r"no repository of that name in the local cache; .*(unset it|connect)"):
        resolve_base("me/other")
    with pytest.raises(CompressionError, match=r"no repository of that name in the local cache|revision"):
        resolve_base("me/tiny", revision="old")
    (cache / "snapshots" / COMMIT / WEIGHTS).unlink()
    with pytest.raises(CompressionError, match=r"cache has 'me/tiny' without its weights; .*(unset it|connect)"):
        resolve_base("me/tiny")
    assert not caplog.records  # nothing of each try


def test_files_of_every_tokenizer_travel_along():
    """Whatever transformers has a tokenizer for."""
    files: set[str] = set()
    for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        names = re.search(r"^VOCAB_FILES_NAMES = ({.*?})", file.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for value in ast.literal_eval(names[1]).values() if names else ():
            files.update([value] if isinstance(value, str) else value)
    assert len(files) > 10 and files <= set(COMPANIONS)
    assert all(WANTED.fullmatch(file) for file in (*files, "additional_chat_templates/tool_use.jinja"))


@pytest.mark.parametrize("key,value", [("dtype", "float99"), ("compression", None)])
def test_odd_values_in_a_config(base, key, value):
    put("config.json", key, value)(base)
    if key == "dtype":
        with pytest.raises(CompressionError, match=r"The config.json of 'base' has the dtype 'float99'; pass dtype"):
            compress(base, "svd", progress=False)
    else:
        assert compress(base, "svd", progress=False).model.config.compression
