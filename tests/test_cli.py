"""The command line, as a user types it: one process a call; the first of them has imported nothing yet."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from common import TEXTS, error_of, save_base
from processes import run_cli

from hf_offline_compress import load_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "tiny-gpt2", "gpt2", "GPT2LMHeadModel")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "mine.txt"
    file.write_text("\n".join(TEXTS))
    return file


@pytest.fixture(scope="module")
def compressed(base, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "small"
    return out, run_cli(
        "compress",
        base,
        out,
        "--recipe",
        "calibrated-svd",
        "--ratio",
        3,
        "--calibration",
        text,
        "--seed",
        4,
        "--modules",
        "linears,word_embeddings",
        fresh=True,
    )


def test_compress_says_what_it_did(compressed):
    out, run = compressed
    assert run.returncode == 0, run.stderr
    assert "x smaller" in run.stdout and str(out) in run.stdout
    assert "compressing" in run.stderr and "calibrating" in run.stderr
    assert "Loading weights" not in run.stderr


def test_inspect(compressed):
    out, _ = compressed
    run = run_cli("inspect", out)
    assert run.returncode == 0, run.stderr
    for expected in (
        "CompressedGPT2LMHeadModel",
        "tiny-gpt2",
        "calibrated-svd, seed 4",
        "mine.txt",
        "query_0",
        "stays dense",
        "transformers 5",
    ):
        assert expected in run.stdout, expected
    content = json.loads(run_cli("inspect", out, "--json").stdout)
    assert content["weight_bytes"] == (out / "model.safetensors").stat().st_size
    assert content["report"]["recipe"]["rules"][0]["ratio"] == 3
    assert content["compression"]["groups"]["word_embeddings"]["structure"] == "low_rank"


def test_names_that_the_output_cannot_show_are_escaped(compressed, tmp_path):
    out = shutil.copytree(compressed[0], tmp_path / "日本")
    old = {"fresh": True, "PYTHONIOENCODING": "ascii"}
    shown, content = (run_cli("inspect", out, *options, **old) for options in ((), ("--json",)))
    assert (shown.returncode, shown.stderr) == (0, "") and "\\u65e5" in shown.stdout
    assert json.loads(content.stdout)["folder"] == "日本"


def test_plan_needs_no_weights(base, tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/config.json").write_bytes((base / "config.json").read_bytes())
    run = run_cli("plan", tmp_path / "only", "--recipe", "calibrated-svd", "--ratio", 3)
    assert run.returncode == 0, run.stderr
    assert (
        "query_0" in run.stdout
        and "wpe: 1,280 parameters; was not chosen" in run.stdout
        and "total ratio" in run.stdout
    )


def test_inspect_needs_no_torch(compressed):
    code = (
        "import sys; sys.argv = ['x', 'inspect', sys.argv[1]]\n"
        "from hf_offline_compress.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(compressed[0])], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['x', 'evaluate', '--help']\n"
        "from hf_offline_compress.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "--measure" in run.stdout, run.stderr


def test_plan_as_json_is_what_compress_does(base, compressed):
    planned = json.loads(run_cli("plan", base, "--recipe", "calibrated-svd", "--ratio", 3, "--json").stdout)
    report = json.loads((compressed[0] / "compression_report.json").read_text())
    assert {g["name"]: (g["size"], g["bytes_after"]) for g in planned["groups"]} == {
        g["name"]: (g["size"], g["stored_bytes"]) for g in report["groups"]
    }
    assert planned["total_stored_bytes"] == report["totals"]["stored_bytes"]


def test_quiet_and_json(base, tmp_path):
    run = run_cli("compress", base, tmp_path / "a", "--total-ratio", 4, "--calibration", "none", "--quiet")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    run = run_cli("compress", base, tmp_path / "b", "--recipe", "svd", "--storage", "float16", "--ratio", 5, "--json")
    report = json.loads(run.stdout)
    assert report["recipe"]["name"] == "svd" and report["calibration"] is None
    assert {group["storage"] for group in report["groups"]} == {"float16"}


def test_budgets(base, text, tmp_path):
    """Of all weights: planned and kept, in bytes; or searched for, for a loss, with every trial told."""
    planned = json.loads(run_cli("plan", base, "--recipe", "balanced", "--max-bytes", "60kB", "--json").stdout)
    assert planned["recipe"]["budget"] == {"max_bytes": 60_000} and planned["total_stored_bytes"] < 60_000
    common = ("--recipe", "balanced", "--calibration", text)
    run = run_cli("compress", base, tmp_path / "a", *common, "--max-bytes", "60kB", "--quiet")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert 0.9 * 60_000 < (tmp_path / "a/model.safetensors").stat().st_size <= 60_000
    run = run_cli("compress", base, tmp_path / "b", *common, "--max-loss", "0.2")
    assert run.returncode == 0 and run.stderr.count("total ratio") + run.stdout.count("total ratio") > 1, run.stderr
    search = json.loads((tmp_path / "b/compression_report.json").read_text())["search"]
    assert search["max_loss"] == 0.2 and min(trial["loss"] for trial in search["trials"]) <= 0.2


def test_a_recipe_file(base, tmp_path):
    import yaml

    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({**load_recipe("svd").to_dict(), "name": "mine", "modules": ["key"]})
    )
    run = run_cli("plan", base, "--recipe", tmp_path / "mine.yaml", "--json")
    assert [g["members"] for g in json.loads(run.stdout)["groups"]] == [[f"h.{i}.attn.c_attn.key"] for i in range(3)]


def test_overwrite(base, tmp_path):
    arguments = ("compress", base, tmp_path / "out", "--recipe", "svd", "--quiet")
    assert run_cli(*arguments).returncode == 0
    before = (tmp_path / "out/model.safetensors").read_bytes()
    refused = run_cli(*arguments, "--ratio", 4)
    assert refused.returncode == 1 and "is not empty; pass another, or --overwrite" in refused.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    done = run_cli(*arguments, "--ratio", 4, "--overwrite")  # whose card is renewed
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "out/model.safetensors").read_bytes()) < len(before)


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (("plan", "{base}", "--recipe", "wavelets"), 1, "error: There is no recipe 'wavelets'"),
        (("plan", "./absent"), 1, "error: There is no folder './absent'"),
        (("plan", "{base}", "--modules", "heads"), 1, "error: The kind of modules 'heads' is unknown"),
        (("plan", "{base}", "--ratio", "0.5"), 1, "error: The ratio 0.5 would not make the model smaller"),
        (("plan", "{base}", "--grouping", "piles"), 1, "error: The grouping 'piles' is unknown"),
        (("inspect", "{base}"), 1, "is not a compressed folder"),
        (
            ("compress", "{base}", "{out}", "--calibration", "absent.txt"),
            1,
            "error: There is no calibration file 'absent.txt'",
        ),
        (("compress", "{base}", "{out}", "--ratio", "1e9"), 1, "error: Nothing would shrink"),
        (("compress", "{base}", "{out}", "--dtype", "int9"), 1, "error: The dtype 'int9' is not supported"),
        (("plan", "{base}", "--max-bytes", "6 apples"), 1, "error: The size '6 apples' is unknown"),
        (("plan", "{base}", "--total-ratio", "500"), 1, "error: The budget of total ratio 500"),
        (("plan", "{base}", "--ratio", "3", "--max-bytes", "1MB"), 1, "exclude each other"),
        (("compress", "{base}", "{out}", "--recipe", "svd", "--max-loss", "0.1"), 1, "the recipe 'svd' has none"),
        (("compress", "{base}"), 2, "Missing argument 'OUT'"),
        (("compress", "{base}", "{out}", "--ratio", "big"), 2, "Invalid value for '--ratio'"),
        (("shrink", "{base}"), 2, "No such command 'shrink'"),
    ],
)
def test_errors_are_one_line(base, tmp_path, arguments, code, message):
    filled = [argument.format(base=base, out=tmp_path / "out") for argument in arguments]
    run = run_cli(*filled)
    assert run.returncode == code and message in run.stderr
    assert "Traceback" not in run.stderr and run.stdout == ""
    assert code != 1 or len(error_of(run.stderr).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough(base):
    command = f'"{sys.executable}" -m hf_offline_compress plan "{base}" --recipe svd | head -1'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.stdout.startswith("tiny-gpt2") and "Error" not in run.stderr


def test_debug_shows_the_traceback(base):
    assert "Traceback" in run_cli("plan", base, "--recipe", "wavelets", "--debug").stderr


def test_help_names_every_choice():
    run = run_cli("compress", "--help")
    for expected in ("allocated-svd", "blocks:N", "bundled", "--overwrite", "--allocation"):
        assert expected in run.stdout
    assert run_cli("--version").stdout.startswith("hf-offline-compress 0.")


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_run_cut_short_leaves_nothing_that_looks_finished(forked, base, tmp_path, kill):
    """The run waits in the middle of saving; a killed one may leave a hidden partial folder, never the target."""
    code = (
        "import os, signal, sys, time, hf_offline_compress.artifact.writing as f\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which is ignored in a shell's background
        "def wait(*args, **options): print(os.getpid(), flush=True); time.sleep(60)\n"
        "f.copy_companions = wait\n"
        "sys.argv = ['x', 'compress', *sys.argv[1:], '--recipe', 'svd', '--quiet']\n"
        "from hf_offline_compress.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(base), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = int(process.stdout.readline())
    time.sleep(0.1)
    os.kill(running, kill)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    if kill == signal.SIGINT:
        assert errors.strip() == "interrupted; nothing was written" and list(tmp_path.iterdir()) == []
    assert run_cli("compress", base, tmp_path / "out", "--recipe", "svd", "--quiet").returncode == 0
