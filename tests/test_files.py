"""Where folders are written: onto nothing else, whole or not at all, whoever comes between."""

import errno
import os
import socket
import stat
import tempfile

import pytest
from safetensors import SafetensorError

from hf_offline_compress import CompressionError
from hf_offline_compress.foundation.files import check_target, keep_others, whole_folder, write_whole


def ours(folder):
    return (folder / "ours").is_file()


def check(target, overwrite=False, inputs=()):
    check_target(target, overwrite, ours, "this package", inputs)


def write(target, text, overwrite=False, between=None):
    with whole_folder(target, ours if overwrite else None) as partial:
        (partial / "ours").write_text(text)
        if between:
            between()


def node(folder, kind):
    """Return a node of some kind in a folder; all of them are made here."""
    path = folder / "out"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        os.chdir(folder)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("out")
    elif kind == "a file":
        path.write_text("mine")
    elif kind == "a broken link":
        path.symlink_to(folder / "nowhere")
    elif "Symlink loop" in kind:
        path.symlink_to(path)
    elif kind == "a link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    return path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["a named pipe", "a socket", "a file", "a broken link", "(Too many levels|Symlink loop)", "a link to a pipe"],
)
def test_what_is_no_folder_is_refused(tmp_path, monkeypatch, kind, overwrite):
    monkeypatch.chdir(tmp_path)
    target = node(tmp_path, kind)
    before = {path: path.lstat().st_mode for path in tmp_path.iterdir()}
    message = "a named pipe" if kind == "a link to a pipe" else kind
    with pytest.raises(CompressionError, match=f"The output folder '.*out' .*{message}.*(pass a|pass another)"):
        check(target, overwrite)
    if kind != "a broken link":
        with pytest.raises((CompressionError, OSError, RuntimeError)):
            write(target, "new", overwrite)
    assert {path: path.lstat().st_mode for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "name,message",
    [
        ("n" * 300, "is too long: 300 bytes, where 255"),
        ("file/out", "'.*file' is (no|not a) folder"),
        (".", "is the current folder, .*; pass a folder in it"),
        ("nul\0", "cannot be written: "),
        ("caf\udce9", "is not valid UTF-8"),
        ("gone/../out", "leads through 'gone', which does not exist"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here" if name == "." else tmp_path)
    with pytest.raises(CompressionError, match=message):
        check(type(tmp_path)(name))


def test_a_parent_that_is_closed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(CompressionError, match="you may not write to"):
        check(tmp_path / "a/b")


def test_long_names_links_and_empty_folders_are_written(tmp_path):
    for target in (tmp_path / ("n" * 255), tmp_path / "a/b/c", tmp_path / "empty"):
        if target.name == "empty":
            target.mkdir()
        check(target)
        write(target, "new")
        assert (target / "ours").read_text() == "new"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in ("one", "two"):
        check(tmp_path / "link", overwrite=text == "two")
        write(tmp_path / "link", text, overwrite=text == "two")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real/ours").read_text() == text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["a folder", "a file", "a named pipe", "a broken link"])
def test_what_comes_between_stays(tmp_path, kind, overwrite):
    target = tmp_path / "out"

    def between():
        if kind == "a folder":
            target.mkdir()
            (target / "mine").write_text("mine")
        else:
            node(tmp_path, kind)

    with pytest.raises(CompressionError, match="created the output folder 'out' .*Pass another"):
        write(target, "new", overwrite, between)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kind != "a folder" or (target / "mine").read_text() == "mine"
    assert stat.S_IFMT(target.lstat().st_mode) != stat.S_IFREG or target.read_text() == "mine"


def test_of_two_runs_one_is_refused(tmp_path):
    with pytest.raises(CompressionError, match="Another process created"):
        write(tmp_path / "out", "first", between=lambda: write(tmp_path / "out", "second"))
    assert (tmp_path / "out/ours").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("inside", [".", "base", "deep/base"])
def test_an_input_in_the_output_is_refused(tmp_path, inside):
    out = tmp_path / "out"
    (out / inside).mkdir(parents=True)
    (out / "ours").write_text("")
    (tmp_path / "link").symlink_to(out)
    for target, source in ((out, out / inside), (tmp_path / "link", out / inside), (out, tmp_path / "link" / inside)):
        with pytest.raises(CompressionError, match="lies in, the output folder .* pass another output folder"):
            check(target, True, [source])
    check(out, True, [tmp_path, "name/on-the-hub"])


def test_what_is_not_ours_is_kept(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / ".git/objects").mkdir(parents=True)
    new.mkdir()
    for name in ("ours", "run.sh", ".git/objects/a", "both"):
        (old / name).write_text("old")
    (old / "run.sh").chmod(0o700)
    (old / "link").symlink_to("run.sh")
    os.mkfifo(old / "pipe")
    (new / "both").write_text("new")
    keep_others(old, new, lambda name: name == "ours")
    assert not (new / "ours").exists() and (new / "both").read_text() == "new"
    assert (new / ".git/objects/a").read_text() == "old" and (new / "link").readlink().name == "run.sh"
    assert stat.S_IMODE((new / "run.sh").stat().st_mode) == 0o700


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_sentence_and_nothing_is_left(tmp_path, error):
    def between():
        raise error

    with pytest.raises(CompressionError, match="no space left to write '.*out'.*free some"):
        write(tmp_path / "a/out", "new", between=between)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_files_is_one_sentence(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CompressionError, match="no space left to write '.*notes.json'"):
            write_whole(tmp_path / "notes.json", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["writing", "putting"])
def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch, moment):
    def stop(*_):
        raise KeyboardInterrupt

    write(tmp_path / "out", "old")
    if moment == "putting":
        path = type(tmp_path)
        rename = path.rename
        monkeypatch.setattr(
            path, "rename", lambda a, b: stop() if ".partial-" in a.name and not b.exists() else rename(a, b)
        )
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new", True, stop if moment == "writing" else None)
    assert (tmp_path / "out/ours").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(CompressionError, match=r"card\.md' cannot be written: its folder may not be written to"):
        write_whole(tmp_path / "card.md", "text")
