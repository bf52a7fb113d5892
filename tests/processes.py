"""Processes of Python that tests start: forks of one that has imported the slow libraries already, and nothing of ours.

That is what a fresh process has imported a few seconds after its start, whatever it does; see warm_server.py. Those that
are fresh in all else are started where a test says so.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile, mkdtemp

HERE = Path(__file__).parent
PYTHON = sys.executable


def start_warm_server(place: Path, environment: Mapping[str, str], *what: str) -> subprocess.Popen[str]:
    """Start one, with `python` and `hf-offline-compress` in the folder `place` as its forks; see `warm_variables`."""
    for name in ("python", "hf-offline-compress"):
        line = f'WARM_CALLED={name} exec "{PYTHON}" -SE "{HERE}/warm_client.py" "$@"'
        (place / name).write_text(f"#!/bin/sh\n{line}\n")
        (place / name).chmod(0o755)
    command = [PYTHON, str(HERE / "warm_server.py"), str(place / "socket"), *what]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    return server


def warm_variables(place: Path) -> dict[str, str]:
    """Return the environment that its forks need."""
    return {"WARM_SOCKET": str(place / "socket"), "WARM_PYTHON": str(place / "python")}


@cache
def warm(*what: str) -> dict[str, str]:
    """Return the environment of this process' own server, which ends with it."""
    place = Path(mkdtemp())
    server = start_warm_server(place, {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, *what)

    def end() -> None:
        server.kill()
        server.wait()
        rmtree(place)

    atexit.register(end)
    return warm_variables(place)


def run_python(
    *arguments: object, fresh: bool = False, bare: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` with what is added to the environment.

    A fork, unless it is to be fresh; a bare one has imported torch and other libraries, but not transformers.
    """
    own = [*map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    if fresh:
        command = [PYTHON, *own]
        return subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, check=False)
    env = {**env, **warm(*(["--bare"] if bare else [])), **environment}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(env["WARM_SOCKET"])
    with Path(os.devnull).open() as nothing, TemporaryFile() as out, TemporaryFile() as errors:
        request = json.dumps([own, str(Path.cwd()), env]).encode()
        socket.send_fds(connection, [request], [each.fileno() for each in (nothing, out, errors)])
        code = connection.recv(1)
        connection.close()
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(own, code[0] if code else -1, *texts)


def run_cli(*arguments: object, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own; see `run_python`."""
    return run_python("-m", "hf_offline_compress", *arguments, fresh=fresh, **environment)
