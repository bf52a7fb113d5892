"""What the command line does with errors that nobody foresaw, with signals, and with a disk that is full."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import typer

import hf_offline_compress.evaluate.benchmarking as benchmarking
import hf_offline_compress.verifying.loading as loading
from hf_offline_compress import CompressionError
from hf_offline_compress.cli.output import run
from hf_offline_compress.errors import UnsavedError
from hf_offline_compress.evaluate.records import metric, read_evaluations, saving, write_evaluations
from hf_offline_compress.foundation.files import whole_folder


def outcome(work, capsys, debug=False):
    """Return exit code and stderr of some work as a command."""
    with pytest.raises(typer.Exit) as info:
        run(work, debug)
    return info.value.exit_code, capsys.readouterr().err


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error,message",
    [
        (CompressionError("No.\n Pass another."), "error: No. Pass another."),
        (KeyError("rows"), "error: Unexpected error (KeyError: 'rows'); --debug shows where."),
        (AssertionError(), "error: Unexpected error (AssertionError); --debug shows where."),
        (RecursionError("deep"), "error: Unexpected error (RecursionError: deep); --debug shows where."),
        (PermissionError(errno.EACCES, "Permission denied", "some/file"), "error: Permission denied: 'some/file'"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "error: There is no space left on the disk"),
        (MemoryError(), "error: There is not enough memory; pass a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA"), "error: There is not enough memory; pass a smaller --batch-size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_is_one_line(capsys, error, message):
    code, said = outcome(failing(error), capsys)
    assert code == 1 and said.startswith(message) and said.count("\n") == 1
    code, said = outcome(failing(error), capsys, debug=True)
    assert code == 1 and said.startswith("Traceback") and message in said


@pytest.mark.parametrize("code", [0, 1, 3])
def test_exit_codes_of_commands_pass(capsys, code):
    assert outcome(failing(typer.Exit(code)), capsys) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_leaves_nothing(capsys, tmp_path, number):
    def work():
        with whole_folder(tmp_path / "deep/out") as partial:
            (partial / "file").write_text("half")
            os.kill(os.getpid(), number)

    found = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored
    try:
        assert outcome(work, capsys) == (128 + number, "ended; nothing was written\n")
        assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, found)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(lambda: os.kill(os.getpid(), signal.SIGHUP), debug=False)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_end_ends_the_processes_of_verify(capsys, tmp_path, monkeypatch):
    started = sleepers(monkeypatch)
    loads = lambda: loading._load(tmp_path, (loading.WITH, loading.WITHOUT))  # noqa: E731
    assert cut_short(loads, started, 2, capsys) == 128 + signal.SIGTERM


def test_a_signal_to_end_ends_the_processes_of_benchmark(capsys, tmp_path, monkeypatch):
    started = sleepers(monkeypatch)
    monkeypatch.setattr(benchmarking, "_warm", lambda pair: None)
    pair = type("Pair", (), {"folder": tmp_path, "architecture": "GPT2Model"})
    pair.base = pair
    cell = benchmarking.Cell(1, 4)
    starts = lambda: benchmarking._start(pair, ("base", "compressed"), "cpu", None, 0, False, {}, cell)  # noqa: E731
    assert cut_short(starts, started, 2, capsys) == 128 + signal.SIGTERM


def sleepers(monkeypatch):
    """Let every process that is started sleep instead; return the list of them."""
    started, popen = [], subprocess.Popen

    def start(_, **options):
        process = popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], **{**options, "env": None})
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def cut_short(work, started, count, capsys):
    def end():
        until = time.monotonic() + 30
        while len(started) < count and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Timer(0.2, end).start()
    code, _ = outcome(work, capsys)
    assert len(started) == count and all(process.returncode is not None for process in started)
    return code


def test_numbers_are_not_lost_where_they_cannot_be_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_offline_compress.foundation.files.tempfile.mkstemp", full)
    with (
        pytest.raises(
            UnsavedError, match=r"not added to evaluation.json: There is no space left .*; free some"
        ) as info,
        saving([metric("accuracy", "higher", 0.5, 0.4)]),
    ):
        write_evaluations(tmp_path)
    assert info.value.result[0].compressed == 0.4 and list(tmp_path.iterdir()) == []
    assert read_evaluations(tmp_path)["evaluations"] == []
