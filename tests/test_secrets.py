"""Secrets and code in disguise: found in any file, by its bytes; not in weights and vocabularies."""

import gzip
import pickle
import random
import string
import tarfile
import zipfile

import numpy as np
import pytest

from hf_offline_compress import CompressionError
from hf_offline_compress.foundation.arguments import token_of
from hf_offline_compress.verifying import secrets
from hf_offline_compress.verifying.code import _pipeline_code
from hf_offline_compress.verifying.foreign import foreign_kind
from hf_offline_compress.verifying.secrets import secret_in


def letters(count, alphabet=string.ascii_letters + string.digits):
    return "".join(random.Random(count).choices(alphabet, k=count))


UPPER = string.ascii_uppercase + string.digits
# Made here, so that nobody's scanner takes this file for a leak.
KEYS = {
    "Hugging Face": "hf_" + letters(34),
    "Hugging Face, an organization": "api_org_" + letters(34),
    "Hugging Face, OAuth": "hf_oauth_" + letters(20) + "-_" + letters(20),
    "OpenAI": "sk-" + letters(48),
    "OpenAI, a project": "sk-proj-" + letters(60) + "_-" + letters(60),
    "OpenAI, an account": "sk-svcacct-" + letters(60),
    "AWS": "AKIA" + letters(16, UPPER),
    "AWS, for a while": "ASIA" + letters(16, UPPER),
    "Google": "AIza" + letters(33) + "-_",
    "GitHub": "ghp_" + letters(36),
    "GitHub, an application": "ghs_" + letters(36),
    "GitHub, fine-grained": "github_pat_" + letters(22) + "_" + letters(59),
    "GitLab": "glpat-" + letters(20),
    "Slack": "xoxb-" + letters(12, string.digits) + "-" + letters(12, string.digits) + "-" + letters(24),
    "Slack, a hook": "https://hooks.slack.com/services/T"
    + letters(8, UPPER)
    + "/B"
    + letters(9, UPPER)
    + "/"
    + letters(24),
    **{
        f"a private key{kind}": f"-----BEGIN {kind.strip()}{' ' * bool(kind)}PRIVATE KEY-----\n{letters(64)}\n"
        for kind in ("", " RSA", " EC", " OPENSSH", " ENCRYPTED")
    },
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le")


@pytest.mark.parametrize("kind", KEYS)
def test_keys_are_found_in_any_file_and_encoding(tmp_path, kind):
    file, key = tmp_path / "x.dat", KEYS[kind]
    wanted = "a private key" if kind.startswith("a private key") else f"token or key of {kind.partition(',')[0]}"
    for encoding in ENCODINGS:
        for text in (
            key,
            f"é key = '{key}'\n",
            f"中{key}中" if encoding.startswith("utf-16") else f'{{"a": "b\\n{key}"}}',
        ):
            file.write_bytes(text.encode(encoding))
            found = secret_in(file)
            assert found and wanted in found and key not in found, (encoding, text)
    file.write_bytes(bytes(range(256)) * 100 + key.encode() + bytes(range(256)))
    assert secret_in(file)
    file.write_text(f"no{key.replace('-----', '')}"[:15])
    assert not secret_in(file)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_token_in_use_is_found_whatever_it_looks_like(tmp_path, encoding):
    file, own = tmp_path / "secrets", "An-odd+token/of_mine"
    file.write_bytes(f"word{own}word".encode(encoding))
    assert secret_in(file, [own]) == "the access token that is in use"
    assert secret_in(file) is None


@pytest.mark.parametrize("offset", [-60, -20, -1, 0, 1])
def test_keys_are_found_where_chunks_meet(tmp_path, monkeypatch, offset):
    monkeypatch.setattr(secrets, "CHUNK", 40_000)
    (tmp_path / "x").write_bytes(b" " * (80_000 + offset) + KEYS["Hugging Face"].encode("utf-16-le") + b" " * 50_000)
    assert secret_in(tmp_path / "x")


def test_weights_and_vocabularies_hold_no_secrets(tmp_path):
    """Random bytes, small integers, words, merges, and base64 of both alphabets."""
    rng, random_words = np.random.default_rng(0), random.Random(0)
    starts = [form.start for form in secrets.FORMS]
    words = [
        "".join(random_words.choices(string.ascii_letters + "-_", k=random_words.randint(1, 15))) for _ in range(20_000)
    ]
    samples = {
        "random": rng.bytes(20_000_000),
        "integers": rng.integers(0, 128, 1_000_000).astype("<i2").tobytes(),
        "positions": np.arange(100_000, dtype="<i8").tobytes(),
        "words": "\n".join([*words, *starts, *(f"{start}{word}" for start in starts for word in words[:200])]).encode(),
        "base64": bytes(
            rng.choice(np.frombuffer((string.ascii_letters + string.digits + "-_").encode(), "u1"), 5_000_000)
        ),
        "texts": b"-----BEGIN CERTIFICATE-----\n-----BEGIN PUBLIC KEY-----\nrisk-averse task-specific hf_offline_compress",
    }
    for name, content in samples.items():
        (tmp_path / name).write_bytes(content)
        assert secret_in(tmp_path / name) is None, name


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def _tar(file, mode="w"):
    (file.parent / "inner").write_bytes(pickle.dumps(Evil()))
    with tarfile.open(file, mode) as archive:
        archive.add(file.parent / "inner", "data")


def _zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data", pickle.dumps(Evil()))


FOREIGN = {
    **{f"protocol {n}": (lambda f, n=n: f.write_bytes(pickle.dumps(Evil(), n)), "pickle") for n in range(6)},
    **{
        f"data, protocol {n}": (lambda f, n=n: f.write_bytes(pickle.dumps({"a": [1, "b"]}, n)), "pickle")
        for n in range(6)
    },
    "a large one": (lambda f: f.write_bytes(pickle.dumps([[i] for i in range(3_000)], 0)), "pickle"),
    "one with more behind": (lambda f: f.write_bytes(pickle.dumps(Evil(), 0) + b"more text"), "pickle"),
    "one that is cut off": (lambda f: f.write_bytes(pickle.dumps(Evil(), 0)[:-1]), "pickle"),
    "an old instance": (lambda f: f.write_bytes(b"(S'ran'\nibuiltins\nprint\n."), "pickle"),
    "HDF5": (lambda f: f.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "Keras"),
    "HDF5 behind a block": (lambda f: f.write_bytes(bytes(512) + b"\x89HDF\r\n\x1a\n" + bytes(100)), "Keras"),
    "tar": (_tar, "archive"),
    "tar.gz": (lambda f: _tar(f, "w:gz"), "archive"),
    "tar.xz": (lambda f: _tar(f, "w:xz"), "archive"),
    "zip": (_zip, "archive"),
    "gzip": (lambda f: f.write_bytes(gzip.compress(pickle.dumps(Evil()))), "archive"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_code_in_disguise_is_told_by_its_content(tmp_path, what, capsys):
    write, words = FOREIGN[what]
    for name in ("x.dat", "notes.txt", "x"):
        write(tmp_path / name)
        assert words in (foreign_kind(tmp_path / name) or "")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.h5", "MODEL.H5", "model.keras", "x.hdf5", "x.tar", "x.dill"])
def test_code_in_disguise_is_told_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert foreign_kind(tmp_path / name)


TEXTS = (
    b"",
    b".",
    b"test.\nand more",
    b"cat\ndog\nVienna\nRome\n",
    b"class Foo:\n    pass\n",
    b"(in case of doubt\nask\n",
    b"[PAD]\n[UNK]\nthe\n",
    b"I\nV\nX\n",
    "\n".join(f"V{i}" for i in range(2_000)).encode(),
    b"(c) 2024 me.\nAll rights reserved.\n",
    b"#version: 0.2\ni n\nt h\n",
    b"{}",
    b"\x0a\x0e\x0a\x05<unk>\x15" + bytes(3_000),
    bytes(5_000),
    b"Glad to see you.",
    b"%PDF-1.4 ...",
)


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_texts_are_no_code(tmp_path, index):
    (tmp_path / "vocab.txt").write_bytes(TEXTS[index])
    assert foreign_kind(tmp_path / "vocab.txt") is None


@pytest.mark.parametrize(
    "name,content,found",
    [
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Transformer"}, {"type": "evil.Module"}],
            ["evil.Module"],
        ),
        ("modules.json", [{"type": "sentence_transformers_x.Y"}], ["sentence_transformers_x.Y"]),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling"}], []),
        ("modules.json", ["x"], ["x"]),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, []),
        ("2_Dense/config.json", {"activation_function": "os.abort"}, ["os.abort"]),
        ("config.json", {"activation_function": "gelu_new"}, []),
        ("onnx/config.json", {"activation_function": "gelu_new"}, []),
        ("config.json", {"custom_pipelines": {"x": {"impl": "a.B"}}}, ["{'x': {'impl': 'a.B'}}"]),
    ],
)
def test_classes_of_others_in_configs(name, content, found):
    assert _pipeline_code(name, content) == found


def test_tokens_are_stripped_or_refused():
    token = KEYS["Hugging Face"]
    for given in (token, f"{token} ", f"\t{token}\r\n"):
        assert token_of(given) == token
    assert token_of(None) is None and token_of(True) is True
    for given in ("", " \n", f"{token[:9]} {token[9:]}", f"{token[:9]}\n{token[9:]}", token + "é", token + "\x07x"):
        with pytest.raises(CompressionError, match="The token for the Hub") as caught:
            token_of(given)
        assert token[3:9] not in str(caught.value)
