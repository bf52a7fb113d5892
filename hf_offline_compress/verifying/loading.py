"""A folder is loaded in two fresh processes, with the package and without it, and must be what was recorded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..artifact import probe
from ..artifact.record import TOLERANCES
from .checks import Check, outcome

WITH, WITHOUT = "with", "without"


def load_checks(folder: Path, record: dict[str, Any] | None, *, run_code: bool) -> list[Check]:
    """Return the checks of loading: classes, keys, number of compressed modules, outputs.

    Args:
        folder: a compressed folder.
        record: as it was saved; without one, the two processes are compared with each other.
        run_code: run the folder's own code, in the process without the package.
    """
    modes = (WITH, WITHOUT) if run_code else (WITH,)
    found = _load(folder, modes)
    checks = []
    for mode in modes:
        checks.append(_loading_check(f"loading {mode} the package", found[mode], record))
        checks.append(_outputs_check(mode, found, record))
    if not run_code:
        reason = "The folder's code was not run, because it is not this package's; --trust-remote-code runs it."
        checks.append(Check(f"loading {WITHOUT} the package", "skipped", reason))
    return checks


def _load(folder: Path, modes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Load a folder in a process for each mode, all at once; return what each found."""
    with tempfile.TemporaryDirectory() as scratch:
        outs = {mode: Path(scratch) / f"{mode}.json" for mode in modes}
        processes: dict[str, subprocess.Popen[str]] = {}
        found = {}
        try:
            for mode, out in outs.items():
                processes[mode] = subprocess.Popen(  # noqa: S603 -- our own interpreter and program
                    [sys.executable, "-P", probe.__file__, str(folder.resolve()), str(out), mode],
                    cwd=scratch,
                    env=_environment(Path(scratch)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                )
            for mode, process in processes.items():
                _, errors = process.communicate()
                if outs[mode].is_file():
                    found[mode] = json.loads(outs[mode].read_text("utf-8"))
                else:
                    last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                    found[mode] = {"error": f"the process ended: {last[0]}"}
        finally:
            for process in processes.values():  # still there if this was cut short
                process.kill()
                process.wait()
    return found


def _environment(home: Path) -> dict[str, str]:
    """Return an environment without a network, without tokens, and with no code left from other runs."""
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
    package = Path(probe.__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _loading_check(name: str, found: dict[str, Any], record: dict[str, Any] | None) -> Check:
    if "error" in found:
        return Check(
            name, "failed", f"It does not load from its config.json, weights and tokenizer: {found['error'][:300]}."
        )
    problems = [
        f"{len(found[kind])} {kind} keys, such as {found[kind][0]}" for kind in ("missing", "unexpected") if found[kind]
    ]
    count = found["compressed_modules"]
    if not count:
        problems.append("none of its modules is compressed")
    if record and count != record["compressed_modules"]:
        problems.append(f"{count} compressed modules, and {record['compressed_modules']} when it was saved")
    if record and found["class"] != record["class"]:
        problems.append(f"it loads as {found['class']}, and was saved as {record['class']}")
    tokenizer = f", and a {found['tokenizer']}" if found["tokenizer"] else ""
    fine = f"{found['class']} with {count} compressed modules, no missing and no unexpected key{tokenizer}."
    return outcome(name, problems, fine)


def _outputs_check(mode: str, found: dict[str, dict[str, Any]], record: dict[str, Any] | None) -> Check:
    name = f"outputs {mode} the package"
    mine = found[mode].get("outputs")
    if mine is None:
        return Check(name, "skipped", "It did not load.")
    if any(None in (digest["root_mean_square"], *digest["values"]) for digest in mine.values()):
        return Check(name, "failed", "The outputs contain NaN or infinite values.")
    if record is not None:
        error, limit = probe.difference(record["outputs"], mine), TOLERANCES.get(record["dtype"], 1e-3)
        reference = "the outputs that were recorded when it was saved"
    else:
        other = found.get(WITH, {}).get("outputs") if mode == WITHOUT else None
        if other is None:
            return Check(name, "skipped", "No outputs were recorded when it was saved, so there is nothing to compare.")
        error, limit, reference = probe.difference(other, mine), TOLERANCES["float32"], "those with the package"
    if error <= limit:
        return Check(name, "passed", f"Equal to {reference} (relative error {error:.1e}).")
    far = "of other names or shapes" if math.isinf(error) else f"off by {error:.1e} of their size"
    return Check(name, "failed", f"They differ from {reference}: {far}, where {limit:.0e} is allowed.")
