"""`push`: verify a folder and publish it on the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AsJson, Debug, Folder, Quiet, app
from .output import print_json, run
from .verify import TrustFolder


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="name or owner/name on the Hub", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    revision: Annotated[
        str | None, typer.Option(help="branch, created if missing; main if not given", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="commit message", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request instead of committing")] = False,
    token: Annotated[
        str | None,
        typer.Option(
            help="access token; prefer `hf auth login` or HF_TOKEN, which other users cannot see",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="a file to publish that is not part of the model; repeatable", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustFolder = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify FOLDER as `verify` does, and publish it as one commit."""

    def work() -> None:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        from ..hub.push import push_folder

        if quiet or as_json:
            disable_progress_bars()
        pushed = push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            create_pr=create_pr,
            token=token,
            trust_remote_code=trust_remote_code,
            include=include or (),
        )
        if as_json:
            print_json(pushed.to_dict())
        elif not quiet:
            for remark in pushed.remarks:
                print(f"note: {remark}")
            if pushed.pull_request:
                print(f"{len(pushed.files)} files verified; pull request: {pushed.pull_request}")
            elif pushed.changed:
                print(f"{len(pushed.files)} files verified and published on '{pushed.revision}': {pushed.url}")
            else:
                print(f"'{pushed.repo_id}' is already up to date: {pushed.url}")

    run(work, debug, quiet)
