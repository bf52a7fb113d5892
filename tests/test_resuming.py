"""Runs that are cut and go on: the same bytes as uncut ones; and what a run refuses to go on with."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from common import TEXTS, content, error_of, save_inputs
from processes import run_cli, run_python

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
- {structure: quantized, objective: calibrated, ratio: 3}
"""
# A process that imports everything once, and forks one for each of its arguments: where that one is to be killed.
CUT = """
import os, signal, sys
import torch
from transformers.models.bert import modeling_bert
import hf_offline_compress.artifact.writing as writing
import hf_offline_compress.compressor as compressor
from hf_offline_compress.foundation.unfinished import UnfinishedRun

base, recipe, text, out, *cuts = sys.argv[1:]
torch.set_num_threads(1)

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def run(cut):
    put, measure, fsync, done = UnfinishedRun.put, compressor.measure, os.fsync, []
    def counted(run, name, value):
        if cut == f"within {len(done) + 1}":
            os.fsync = die  # the file is written, but not under its name
        put(run, name, value)
        done.append(name)
        if cut == f"after {len(done)}":
            die()
    def measured(*args, **options):
        print("measured", flush=True)
        return measure(*args, **options)
    UnfinishedRun.put, compressor.measure = counted, measured
    if cut == "build":
        compressor.build_model = die
    if cut == "save":
        writing.check_saved = die
    compressor.compress(base, recipe, calibration=text, target=out, resume=True, progress=False).save(out)
    print("put", *[name.partition("-")[0] for name in done], flush=True)

for cut in cuts:
    print(cut + ":", flush=True)
    if not (child := os.fork()):
        run(cut)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == (0 if cut == "never" else signal.SIGKILL), cut
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return base, recipe and text, as files."""
    return save_inputs(tmp_path_factory.mktemp("given"), RECIPE)


def launch(given, out, *cuts):
    run = run_python("-c", CUT, *given, out, *cuts)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_a_run_that_is_cut_at_every_stage_goes_on(given, tmp_path, monkeypatch):
    """Killed within and after the statistics, within and between solved groups, while building and while saving."""
    cuts = ("within 1", "after 1", "after 2", "within 2", "after 3", "build", "save", "never")
    told = launch(given, tmp_path / "cut", *cuts)
    assert told.count("measured") == 2  # the first was not kept
    assert told[-2:] == ["never:", "put"]  # all was there
    monkeypatch.setattr(UnfinishedRun, "put", None)  # and an uncut one keeps nothing
    base, recipe, text = given
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        compress(base, recipe, calibration=text, progress=False).save(tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".cut.partial-")}
    assert left == {"cut", "whole"}  # but for the folder that was being written, as after any kill


@pytest.fixture
def leftover(given, tmp_path):
    """Return the folder of an output that a run was cut for."""
    base, recipe, text = given
    out = tmp_path / "out"
    compress(base, recipe, calibration=text, target=out, resume=True, progress=False)  # and not saved
    return out


def test_another_run_does_not_go_on(given, leftover):
    base, recipe, text = given

    def again(base=base, recipe=recipe, text=text, **options):
        compress(base, recipe, calibration=text, target=leftover, resume=True, progress=False, **options)

    before = {path.name: path.stat().st_mtime_ns for path in leftover_of(leftover).iterdir()}
    for other, what in [
        ({"seed": 1}, "seed"),
        ({"ratio": 2.5}, "recipe"),
        ({"batch_size": 3}, "batch size"),
        ({"text": TEXTS[1:]}, "calibration text"),
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
            os._exit(7 if "still going on" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_digest_tells_numbers_types_and_borders_apart():
    one = torch.arange(6.0)
    values = [one, one.view(2, 3), one.half(), one + 1e-6, [one], "ab", ["a", "b"], ["ab"], {"a": one}, None, 0]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(one.view(2, 3).T.contiguous().T) == digest(one.view(2, 3))
    assert Path(place_of_unfinished(Path("x" * 250)).name).name == "x" * 60 + ".partial"
