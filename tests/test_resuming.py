"""Runs that are cut and go on: the same bytes as uncut ones; and what a run refuses to go on with."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from common import TEXTS, content, error_of, save_inputs
from processes import run_cli, run_python
from safetensors.torch import load_file, save_file

from hf_offline_compress import CompressionError, compress, compressor
from hf_offline_compress.cli import app
from hf_offline_compress.foundation.kept_values import load_value, save_value
from hf_offline_compress.foundation.unfinished import RUN_FILE, UnfinishedRun, digest, leftover_of, place_of_unfinished
from hf_offline_compress.solve.resuming import Solved

RECIPE = """
name: mine
modules: [all]
rules:
- {modules: [query, key], structure: low_rank, objective: sensitive, ratio: 2}
- {modules: [word_embeddings], structure: trellis, objective: sensitive, ratio: 8}
- {modules: [intermediate], structure: quantized, objective: sensitive, ratio: 3}
- {structure: quantized, objective: calibrated, ratio: 3}
"""
# Steps of the pass forward through the three layers of the base, and of that forward and back.
STEPS = (1 + 3 + 1) + (1 + 3 + 1 + 3 + 1)
# Batches of matrices that are solved together.
BATCHES = 12
# A process that imports everything once, and forks one for each of its arguments: where that one is to be killed, and with
# how much memory it runs.
CUT = """
import os, signal, sys
import torch
from transformers.models.bert import modeling_bert
import hf_offline_compress.artifact.writing as writing
import hf_offline_compress.compressor as compressor
from hf_offline_compress.foundation.spilled import Spilled
from hf_offline_compress.foundation.unfinished import UnfinishedRun

base, recipe, text, out, *cuts = sys.argv[1:]
torch.set_num_threads(1)

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def run(cut, max_memory):
    put, spill, done, spilled = UnfinishedRun.put, Spilled.__setitem__, [], []
    def counted(run, name, value):
        if cut == f"within {len(done) + 1}":
            os.fsync = die  # the file is written, but not under its name
        put(run, name, value)
        done.append(name)
        print(name.partition("-")[0], flush=True)
        if cut == f"after {len(done)}":
            die()
    def written(store, key, tensor):
        spill(store, key, tensor)
        spilled.append(key)
        if cut == f"spilled {len(spilled)}":
            store._file.flush()
            die()
    UnfinishedRun.put, Spilled.__setitem__ = counted, written
    if cut == "build":
        compressor.build_model = die
    if cut == "save":
        writing.check_saved = die
    options = {"calibration": text, "target": out, "resume": True, "max_memory": max_memory, "progress": False}
    compressor.compress(base, recipe, **options).save(out)

for given in cuts:
    print(given + ":", flush=True)
    cut, _, max_memory = given.partition(" with ")
    if not (child := os.fork()):
        run(cut, max_memory or None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == (0 if cut == "never" else signal.SIGKILL), cut
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return base, recipe and text, as files."""
    return save_inputs(tmp_path_factory.mktemp("given"), RECIPE)


@pytest.fixture(scope="module")
def uncut(given, tmp_path_factory):
    """Return the bytes that an uncut run gives, with the base in memory; it keeps nothing."""
    base, recipe, text = given
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("uncut") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(UnfinishedRun, "put", None)
        try:
            torch.set_num_threads(1)
            compress(base, recipe, calibration=text, progress=False).save(out)
        finally:
            torch.set_num_threads(threads)
    assert [path.name for path in out.parent.iterdir()] == ["whole"]
    return content(out)


@pytest.mark.parametrize(
    ("cuts", "kept"),
    [
        (
            ("within 1", "after 1", "after 2", "within 2", "after 3", "build", "save", "never"),
            {"statistics": 1},
        ),
        (  # within and after every step of what is measured layer by layer
            (
                "spilled 2 with 8GB",
                *(f"{cut} with 8GB" for _ in range(STEPS) for cut in ("within 1", "after 1")),
                *(f"{cut} with 8GB" for cut in ("within 1", "after 2", "within 2", "build", "save", "never")),
            ),
            {"measuring": STEPS},
        ),
        (  # in either way what the other one has solved
            ("after 6 with 8GB", "after 2", "after 9 with 9GB", "never"),
            {"measuring": STEPS, "statistics": 1},
        ),
    ],
    ids=["whole", "by layers", "both"],
)
def test_a_run_that_is_cut_at_every_stage_goes_on(cuts, kept, given, uncut, tmp_path):
    """Killed within and after the statistics, within and between solved groups, while building and while saving."""
    run = run_python("-c", CUT, *given, tmp_path / "cut", *cuts)
    assert run.returncode == 0, run.stderr[-3000:]
    told = Counter(line for line in run.stdout.splitlines() if not line.endswith(":"))
    assert content(tmp_path / "cut") == uncut
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".cut.partial-")}
    assert left == {"cut"}  # but for the folder that was being written, as after any kill
    assert told == {**kept, "solved": BATCHES}  # nothing twice


@pytest.fixture(params=[None, "8GB"], ids=["whole", "by layers"])
def max_memory(request):
    """Return how much memory a run may have."""
    return request.param


@pytest.fixture
def leftover(given, max_memory, tmp_path):
    """Return the folder of an output that a run was cut for."""
    base, recipe, text = given
    options = {"target": tmp_path / "out", "resume": True, "max_memory": max_memory, "progress": False}
    compress(base, recipe, calibration=text, **options)  # and not saved
    return tmp_path / "out"


def test_another_run_does_not_go_on(given, leftover, max_memory, tmp_path):
    base, recipe, text = given

    def again(base=base, recipe=recipe, text=text, **options):
        options = {"target": leftover, "resume": True, "max_memory": max_memory, "progress": False, **options}
        compress(base, recipe, calibration=text, **options)

    changed = load_file(base / "model.safetensors")
    next(iter(changed.values())).view(-1)[0] += 1
    other_base = shutil.copytree(base, tmp_path / "base")
    save_file(changed, other_base / "model.safetensors", metadata={"format": "pt"})

    before = {path.name: path.stat().st_mtime_ns for path in leftover_of(leftover).iterdir()}
    for other, what in [
        ({"seed": 1}, "seed"),
        ({"ratio": 2.5}, "recipe"),
        ({"batch_size": 3}, "batch size"),
        ({"text": TEXTS[1:]}, "calibration text"),
        ({"base": other_base}, "base"),
    ]:
        with pytest.raises(CompressionError, match=rf"^'out\.partial' holds an unfinished run with another '?{what}"):
            again(**other)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(CompressionError, match="number of threads"):
            again()
    finally:
        torch.set_num_threads(threads)
    names = {path.name: path.stat().st_mtime_ns for path in leftover_of(leftover).iterdir()}
    assert {name for name in names if name != "lock"} == {name for name in before if name != "lock"}
    again()  # as it was


def test_a_leftover_is_named_and_replaced_only_when_told(given, leftover):
    base, recipe, text = given
    command = ("compress", base, leftover, "--recipe", recipe, "--calibration", text, "--quiet")
    run = run_cli(*command)
    said = error_of(run.stderr)
    assert run.returncode == 1 and "'out.partial'" in said and "--resume" in said and "--overwrite" in said
    assert leftover_of(leftover) and not leftover.exists()
    result = compress(base, recipe, calibration=text, progress=False)
    with pytest.raises(CompressionError, match="--overwrite"):
        result.save(leftover)
    result.save(leftover, overwrite=True)
    assert not leftover_of(leftover) and [path.name for path in leftover.parent.iterdir()] == ["out"]


def test_what_is_kept_is_named_when_a_run_is_ended(given, tmp_path, monkeypatch, capsys):
    base, recipe, text = map(str, given)
    monkeypatch.setattr(compressor, "build_model", lambda *args: os.kill(os.getpid(), signal.SIGTERM))

    def ended(*more):
        command = ["compress", base, str(tmp_path / "out"), "--recipe", recipe, "--calibration", text, "--quiet", *more]
        with pytest.raises(SystemExit) as info:
            app(command)
        assert info.value.code == 128 + signal.SIGTERM
        return capsys.readouterr().err.splitlines()[-1]

    assert ended() == "ended; nothing was written" and list(tmp_path.iterdir()) == []  # as without
    assert ended("--resume") == "ended; the same command goes on from 'out.partial'"
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_resuming_needs_a_target(given):
    with pytest.raises(CompressionError, match="pass target"):
        compress(given[0], resume=True)


def test_what_is_not_ours_stays(tmp_path):
    place = place_of_unfinished(tmp_path / "out")
    place.mkdir()
    UnfinishedRun(tmp_path / "out").open({})  # an empty folder: a run that was cut before its first file
    for path in place.iterdir():
        path.unlink()
    (place / "notes.txt").write_text("mine")
    assert leftover_of(tmp_path / "out") is None
    with pytest.raises(CompressionError, match="holds something else"):
        UnfinishedRun(tmp_path / "out").open({})
    (place / RUN_FILE).write_text(json.dumps({"format": "another"}))
    with pytest.raises(CompressionError, match="holds something else"):
        UnfinishedRun(tmp_path / "out").open({})
    assert (place / "notes.txt").read_text() == "mine"


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    numbers = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    given = Solved({"a": numbers.T, "b": numbers, "c": torch.tensor(True)}, (), {"x": "bfloat16"})
    values = {("fisher", True): [given, None, 1.5, "text", (1, ("two",))], 3: float("inf")}
    save_value(tmp_path / "kept", values)
    found = load_value(tmp_path / "kept", [Solved])
    assert digest(found[3], found["fisher", True][1:]) == digest(values[3], values["fisher", True][1:])
    assert isinstance(found["fisher", True][4], tuple) and found["fisher", True][0].reports == ()
    assert all(torch.equal(tensor, given.tensors[name]) for name, tensor in found["fisher", True][0].tensors.items())
    assert found["fisher", True][0].tensors["b"].dtype == torch.float64
    with pytest.raises(KeyError):
        load_value(tmp_path / "kept")  # a class that is not expected is not looked up
    with pytest.raises(TypeError, match="Path cannot be kept"):
        save_value(tmp_path / "kept", [Path()])


def test_two_runs_do_not_share_a_folder(tmp_path):
    UnfinishedRun(tmp_path / "out").open({})
    run = UnfinishedRun(tmp_path / "out")
    run.open({})
    if not (child := os.fork()):
        try:
            UnfinishedRun(tmp_path / "out").open({})
        except CompressionError as error:
            os._exit(7 if "still running" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_digest_tells_numbers_types_and_borders_apart():
    one = torch.arange(6.0)
    values = [one, one.view(2, 3), one.half(), one + 1e-6, [one], "ab", ["a", "b"], ["ab"], {"a": one}, None, 0]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(one.view(2, 3).T.contiguous().T) == digest(one.view(2, 3))
    assert Path(place_of_unfinished(Path("x" * 250)).name).name == "x" * 60 + ".partial"
