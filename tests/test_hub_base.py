"""A base on the Hub works as a folder does; only what is needed is fetched."""

import json

import pytest
import torch
from common import error_of, save_base
from loopback_hub import COMMIT, loopback_hub
from processes import run_cli
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny = save_base(root / "tiny", "bert", "BertForMaskedLM")
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "flax_model.msgpack").write_bytes(b"other weights")
    (tiny / "notes").mkdir()
    (tiny / "notes/secret.txt").write_text("not for users")
    empty = root / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing")
    with loopback_hub({"me/tiny": tiny, "me/empty": empty, "me/gated": tiny}, gated=("me/gated",)) as (url, requests):
        yield tiny, url, requests


def online(hub, home, *arguments):
    environment = {"HF_ENDPOINT": hub[1], "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return run_cli(*arguments, **environment, HF_HUB_DISABLE_TELEMETRY="1", HF_TOKEN="hf_secret")


def test_compress_from_the_hub(hub, tmp_path):
    hub[2].clear()
    run = online(hub, tmp_path / "home", "compress", "me/tiny", tmp_path / "out", "--recipe", "svd", "--quiet")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out/compression_report.json").read_text())
    size = (hub[0] / "model.safetensors").stat().st_size
    assert report["base"] == {"name": "me/tiny", "revision": COMMIT, "weight_bytes": size}
    fetched = {request.rpartition("/")[2] for request in hub[2] if request.startswith("GET") and "/resolve/" in request}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "flax_model.msgpack", "secret.txt"}
    local = run_cli("compress", hub[0], tmp_path / "local", "--recipe", "svd", "--quiet")
    assert local.returncode == 0
    assert (tmp_path / "local/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert not any(b"hf_secret" in f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())


def test_plan_from_the_hub_fetches_the_config_alone(hub, tmp_path):
    hub[2].clear()
    run = online(hub, tmp_path / "home", "plan", "me/tiny", "--recipe", "svd", "--json")
    assert json.loads(run.stdout)["base"] == "me/tiny"
    assert {request.rpartition("/")[2] for request in hub[2] if "/resolve/" in request} == {"config.json"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("me/nothing",), "neither a folder nor a repository on the Hub named 'me/nothing'"),
        (("me/empty",), "'me/empty' on the Hub has no config.json"),
        (("me/gated",), "'me/gated' is gated"),
        (("me/tiny", "--revision", "old"), "'me/tiny' does not have this revision"),
        (("one/two/three",), "no folder 'one/two/three', and it is not a Hub id"),
    ],
)
def test_what_the_hub_refuses(hub, tmp_path, arguments, message):
    run = online(hub, tmp_path / "home", "plan", *arguments)
    assert run.returncode == 1 and message in run.stderr and len(error_of(run.stderr).splitlines()) == 1, run.stderr
