"""`verify`: does a folder load in a clean environment, and is it fit to be published?"""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AsJson, Debug, Folder, Quiet, app
from .output import print_json, run

TrustFolder = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the folder's code even if it is not this package's")
]


@app.command()
def verify(
    folder: Folder,
    trust_remote_code: TrustFolder = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a compressed folder before it is published; exit code 1 if a check fails."""

    def work() -> None:
        from ..verifying import verify_folder

        verification = verify_folder(folder, trust_remote_code=trust_remote_code)
        if as_json:
            print_json(verification.to_dict())
        elif not quiet:
            width = max(len(check.name) for check in verification.checks)
            for check in verification.checks:
                print(f"{check.status.ljust(7)}  {check.name.ljust(width)}  {check.sentence}")
            failed, all_of_them = len(verification.failed), len(verification.checks)
            print(f"\n{verification.folder}: {f'{failed} of {all_of_them} checks failed' if failed else 'verified'}")
        if not verification.passed:
            raise typer.Exit(1)

    run(work, debug, quiet)
