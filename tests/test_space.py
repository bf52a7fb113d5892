"""The Space in examples/space: it answers over HTTP, with the package and without it, and asks both models the same."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from common import save_base
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hf_offline_compress import compress
from hf_offline_compress.evaluate import sentence_embeddings

APP = Path(__file__).resolve().parents[1] / "examples/space/app.py"


@pytest.fixture(autouse=True)
def gradio():
    """Where it is not installed the tests are skipped, and say so; in CI they fail."""
    if importlib.util.find_spec("gradio") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no gradio: `make space-packages` installs it")


@contextmanager
def serving(base, compressed, **environment):
    """Start the app, and give its address."""
    command = [sys.executable, str(APP), "--base", str(base), "--compressed", str(compressed)]
    quiet = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    env = {**os.environ, **quiet, **environment}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if found := re.search(r"http://[\d.:]+", line):
                    yield found[0]
                    return
            pytest.fail("".join(said))
        finally:
            server.terminate()


def ask(address, *inputs):
    """Return what the page would show: the rows of its table, and a line of text."""
    call = f"{address}/gradio_api/call/compare"
    body, header = json.dumps({"data": inputs}).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(call, body, header), timeout=60) as response:
        event = json.load(response)["event_id"]
    with urlopen(f"{call}/{event}", timeout=60) as response:
        status, data = re.search(r"event: (\w+)\ndata: (.*)", response.read().decode()).groups()
    assert status == "complete", data
    table, text = json.loads(data)
    return table["data"], text


def made(folder, head):
    base = save_base(folder / "base", "bert", head)
    compress(base, "quantized", calibration=None, progress=False).save(folder / "small")
    return base, folder / "small"


def test_sentences_without_the_package(tmp_path):
    base, small = made(tmp_path, "BertModel")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/hf_offline_compress.py").write_text("raise ImportError('hidden')\n")
    home = str(tmp_path / "home")
    with serving(base, small, PYTHONPATH=str(tmp_path / "hidden"), HF_HOME=home, HF_MODULES_CACHE=home) as address:
        rows, text = ask(address, "the cat sat", "a dog ran home\nthe red sun")
    assert re.fullmatch(r"\d+ ms \(base\), \d+ ms \(compressed\)", text)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    for column, folder in ((1, base), (2, small)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for row in rows:
            first, second = sentence_embeddings(AutoModel.from_pretrained(folder), tokenizer, ["the cat sat", row[0]])
            assert row[column] == pytest.approx(float(first @ second), abs=2e-3)


def test_masks_with_the_package(tmp_path):
    base, small = made(tmp_path, "BertForMaskedLM")
    with serving(base, small) as address:
        rows, _ = ask(address, "the cat [MASK] on a mat")
    for place, folder in ((0, base), (2, small)):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(**tokenizer("the cat [MASK] on a mat", return_tensors="pt")).logits[0, 3]
        best = logits.softmax(dim=0).topk(5)
        assert [row[place + 1] for row in rows] == pytest.approx(best.values.tolist(), abs=2e-3)
        assert rows[0][place] == tokenizer.decode([best.indices[0]])
