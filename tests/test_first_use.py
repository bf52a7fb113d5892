"""What a new user meets: progress updates, tables of 80 columns, help, completion, and what to do next."""

import json
import re
import time
from types import SimpleNamespace

import pytest
from common import save_base
from typer.testing import CliRunner

import hf_offline_compress
from hf_offline_compress import CompressionError, compress
from hf_offline_compress.cli import app
from hf_offline_compress.foundation import progress
from hf_offline_compress.request.reading import preset_names
from hf_offline_compress.solve import groups as solving

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
WIDE = {"hidden_size": 48, "intermediate_size": 1536, "vocab_size": 30_522, "num_hidden_layers": 12}


def invoke(*arguments, code=0):
    run = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="hf-offline-compress")
    assert run.exit_code == code, (run.output, run.exception)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "a-model-with-a-name", "bert", "BertForMaskedLM", **WIDE)


@pytest.fixture(scope="module")
def out(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "small"
    run = invoke("compress", base, folder, "--recipe", "quantized", "--modules", "all", "--storage", "float16")
    return SimpleNamespace(folder=folder, printed=run.stdout, told=run.stderr)


def lines(text):
    return [line for line in text.splitlines() if "/" not in line]  # paths of this machine are as long as they are


def test_everything_fits_80_columns(base, out):
    shown = [invoke("plan", base, "--recipe", name).stdout for name in ("svd", "ae", "tiny")]
    shown += [invoke("inspect", out.folder).stdout, invoke("presets").stdout, out.printed]
    shown += [invoke(*command, "-h").stdout for command in ([], *([name] for name in COMMANDS))]
    assert max(len(line) for text in shown for line in lines(text)) <= 80


def test_compress_ends_with_a_table_and_the_next_command(base, out):
    written = (out.folder / "model.safetensors").stat().st_size
    assert out.printed.split()[:5] == ["bytes", "ratio", "seconds", "expected", "loss"]
    rows = re.findall(r"^([a-z_ ]+?) {2,}([\d,]+) +([\d.]+) *([\d.]+)? *([\d.]+%)?$", out.printed, re.MULTILINE)
    sizes = {name: int(size.replace(",", "")) for name, size, *_ in rows}
    assert {"word_embeddings", "query", "intermediate", "everything else"} < sizes.keys()
    assert sizes.pop("whole model") == written == sum(sizes.values())
    assert all(loss for name, *_, loss in rows if name not in ("everything else", "whole model"))
    assert f"hf-offline-compress evaluate {out.folder}" in out.printed and f"--base {base}" in out.printed


@pytest.mark.parametrize(
    "options,said",
    [
        (("--recipe", "tiny", "--max-bytes", "800kB"), "at most 0.80 MB"),
        (("--recipe", "allocated-svd"), "at most"),
        (("--recipe", "svd"), "MB (total ratio"),
    ],
)
def test_plan_says_what_compress_will_write_and_what_a_size_is(base, options, said):
    printed = invoke("plan", base, *options).stdout
    (whole,) = (line for line in printed.splitlines() if line.startswith("whole model"))
    assert said in whole and ("at most" in whole) == ("at most" in said)
    unit = "bits a weight (trellis)" if "tiny" in options else "rank (low_rank)"
    assert unit in next(line for line in printed.splitlines() if line.startswith("size: "))


def test_presets_are_listed_in_one_line_each():
    header, *printed = invoke("presets").stdout.split("\n\n")[0].splitlines()
    assert header.startswith("preset") and sorted(line.split()[0] for line in printed) == sorted(preset_names())
    assert json.loads(invoke("presets", "--json").stdout)["presets"].keys() == set(preset_names())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_quiet_and_has_short_help(command):
    assert invoke(command, "-h").stdout == invoke(command, "--help").stdout
    assert "--quiet" in invoke(command, "-h").stdout


def test_quiet_commands_print_nothing(base, out):
    for arguments in (("plan", base), ("inspect", out.folder), ("card", out.folder), ("presets",)):
        assert invoke(*arguments, "--quiet").output == ""


def test_shells_can_complete():
    assert "--show-completion" in invoke("-h").stdout
    environment = {
        "_HF_OFFLINE_COMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": "hf-offline-compress plan model --recipe cal",
        "COMP_CWORD": "4",
    }
    run = CliRunner().invoke(app, [], prog_name="hf-offline-compress", env=environment)
    assert run.output.split() == ["calibrated-ae", "calibrated-svd"]


def test_public_names_are_listed_and_there():
    assert dir(hf_offline_compress) == sorted(hf_offline_compress.__all__)
    assert all(getattr(hf_offline_compress, name) is not None for name in dir(hf_offline_compress))
    assert "evaluate_folder" in dir(hf_offline_compress)


SLOW = {
    "plan": ("hf_offline_compress.base.checkpoint.read_config", ("plan", "x")),
    "compress": ("hf_offline_compress.compressor.compress", ("compress", "{base}", "{tmp}/o")),
    "inspect": ("hf_offline_compress.artifact.reading.inspect_folder", ("inspect", "x")),
    "evaluate": ("hf_offline_compress.evaluate.evaluation.evaluate_folder", ("evaluate", "x", "--text", "x")),
    "benchmark": ("hf_offline_compress.evaluate.benchmarking.benchmark_folder", ("benchmark", "x")),
    "card": ("hf_offline_compress.card.write_card", ("card", "x")),
    "verify": ("hf_offline_compress.verifying.verify_folder", ("verify", "x")),
    "push": ("hf_offline_compress.hub.push.push_folder", ("push", "x", "me/x")),
    "export": ("hf_offline_compress.export.exporting.check_export", ("export", "x", "{tmp}/o")),
    "presets": ("hf_offline_compress.cli.presets.print_json", ("presets", "--json")),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("quiet", [False, True], ids=["told", "quiet"])
def test_no_command_works_in_silence(base, tmp_path, monkeypatch, command, quiet):
    """Whatever takes long: something is said soon, and again after every few seconds (here much less)."""
    monkeypatch.setattr(progress, "FIRST", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setenv("TERM", "dumb")

    def slow(*_args, **_options):
        time.sleep(0.25)
        raise CompressionError("It was slow.")

    target, arguments = SLOW[command]
    monkeypatch.setattr(target, slow)
    filled = [argument.format(base=base, tmp=tmp_path) for argument in arguments]
    told = invoke(*filled, *(["--quiet"] if quiet else []), code=1).stderr
    signs = [line for line in told.splitlines() if line.startswith(("working: ", "finding the base: "))]
    assert not signs if quiet else len(signs) >= 3
    assert told.endswith("error: It was slow.\n")


def test_signs_of_life_name_the_stage_and_redraw_bars(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with progress.showing(True), progress.alive():
        with progress.stage("loading the base"):
            time.sleep(0.1)
        bar = progress.bar(None, "compressing", "group", True, total=4)
        drawn = []
        monkeypatch.setattr(bar, "refresh", lambda: drawn.append(bar.n))
        time.sleep(0.1)
        bar.close()
    said = capsys.readouterr().err
    assert said.startswith("loading the base\n") and "loading the base: 0 s\n" in said
    assert len(drawn) >= 3 and set(drawn) == {0}


def test_stages_of_compressing_are_told(out):
    for stage in (
        "importing torch and transformers",
        "finding the base",
        "loading the base",
        "saving small",
        "loading the saved model",
    ):
        assert f"\n{stage}" in f"\n{out.told}", stage


def test_bars_count_whole_groups(base, monkeypatch):
    """Groups that are solved together move the bar as one, by as many whole groups as are done."""
    moved = []
    make = progress.bar

    def watched(*arguments, **options):
        shown = make(*arguments, **options)
        update = shown.update
        monkeypatch.setattr(shown, "update", lambda by: (moved.append(by), update(by)), raising=False)
        return shown

    monkeypatch.setattr(solving, "progress_bar", watched)
    compress(base, "svd", modules="linears", calibration=None, ratio=4, progress=False)
    assert moved and all(isinstance(by, int) for by in moved)
