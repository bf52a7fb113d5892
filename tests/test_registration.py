"""Importing the package costs nothing, and AutoModel knows our models all the same, in whatever order things come."""

import ast
from pathlib import Path

import pytest
from common import make_model, make_tokenizer
from processes import run_python

import hf_offline_compress
from hf_offline_compress import compress, registration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    result = compress(make_model("bert", "BertForMaskedLM"), "svd", tokenizer=make_tokenizer("bert"), progress=False)
    return result.save(tmp_path_factory.mktemp("registered") / "bert")


def in_fresh_process(code, *arguments, bare=True):
    """Run it where neither transformers nor the package is imported; without `bare`, where nothing is."""
    run = run_python("-c", code, *arguments, fresh=not bare, bare=bare)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_imports_nothing_heavy():
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"}
    code = f"import sys, hf_offline_compress; print(sorted({heavy} & set(sys.modules)))"
    assert in_fresh_process(code, bare=False) == "[]\n"


ORDERS = {
    "package first": "import hf_offline_compress; from transformers import AutoModelForMaskedLM as A",
    "package last": "from transformers import AutoModelForMaskedLM as A; import hf_offline_compress",
    "between": "import transformers; import hf_offline_compress; A = transformers.AutoModelForMaskedLM",
    "inside a model's own import": "import hf_offline_compress; import transformers.models.bert.modeling_bert; "
    "from transformers import AutoModelForMaskedLM as A",
    "tokenizer first": "import sys, hf_offline_compress; from transformers import AutoTokenizer; "
    "AutoTokenizer.from_pretrained(sys.argv[1]); from transformers import AutoModelForMaskedLM as A",
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_in_whatever_order(order, folder):
    code = ORDERS[order] + (
        "\nimport sys; print(type(A.from_pretrained(sys.argv[1])).__name__)"
        "\nprint([name for name in sys.modules if name.startswith('transformers.models.') and '.modeling_' in name])"
    )
    found, imported = in_fresh_process(code, folder).splitlines()
    assert found == "CompressedBertForMaskedLM"
    assert "modeling_bert" in imported and not [t for t in ("roberta", "gpt2", "llama") if f"modeling_{t}'" in imported]


def test_a_tokenizer_without_a_class_of_its_own(folder, tmp_path):
    import json
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/tokenizer_config.json"
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "tokenizer_class"}
    file.write_text(json.dumps(content))
    code = (
        "import sys, hf_offline_compress; from transformers import AutoTokenizer; "
        "print(type(AutoTokenizer.from_pretrained(sys.argv[1])).__name__)"
    )
    assert in_fresh_process(code, tmp_path / "copy") == "BertTokenizer\n"


def test_public_names():
    for name in hf_offline_compress.__all__:
        assert getattr(hf_offline_compress, name) is not None
    assert hf_offline_compress.CompressedGPT2DoubleHeadsModel.__name__ == "CompressedGPT2DoubleHeadsModel"
    assert hf_offline_compress.CompressedRobertaConfig.model_type == "compressed_roberta"
    with pytest.raises(AttributeError, match="no attribute 'compresss'"):
        hf_offline_compress.compresss  # noqa: B018
    with pytest.raises(AttributeError):
        hf_offline_compress.CompressedNothing  # noqa: B018


def test_registering_twice_changes_nothing():
    from transformers import AutoConfig

    registration.register()
    registration.register()
    assert AutoConfig.for_model("compressed_bert").model_type == "compressed_bert"


@pytest.mark.parametrize("installed", ["4.57.1", "5.19.0", "6.0.0"])
def test_transformers_outside_the_supported_range(monkeypatch, installed):
    monkeypatch.setattr(registration, "version", lambda name: installed)
    with pytest.raises(ImportError, match=f"needs transformers>=5.20,<6; installed is {installed}"):
        registration.check_transformers()


def test_another_table_of_configs_still_works(monkeypatch):
    """Where transformers keeps its table otherwise, registration happens at once, by its public functions."""
    from types import SimpleNamespace

    called = []
    monkeypatch.setattr(registration, "register", lambda: called.append(True))
    registration._announce(SimpleNamespace(CONFIG_MAPPING=object()))
    assert called == [True]


def test_what_is_copied_into_folders_imports_nothing_of_the_package():
    for file in (Path(hf_offline_compress.__file__).parent / "runtime").glob("*_compressed.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert module.endswith("_compressed") if node.level == 1 else node.level == 0, file.name
                assert not module.startswith("hf_offline_compress"), file.name
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hf_offline_compress") for alias in node.names), file.name
