"""`inspect`: what is in a folder that compress has written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import AsJson, Debug, Folder, Quiet, app
from .output import megabytes, print_dense, print_field, print_json, print_table, print_text, run

if TYPE_CHECKING:
    from ..artifact.reading import FolderContents


@app.command()
def inspect(
    folder: Folder,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what is in a compressed folder: plan, bytes, recipe, base, versions."""

    def work() -> None:
        from ..artifact.reading import inspect_folder

        contents = inspect_folder(folder)
        if as_json:
            print_json(
                {
                    "folder": contents.name,
                    "weights": contents.weights,
                    "weight_bytes": contents.weight_bytes,
                    "folder_bytes": contents.folder_bytes,
                    "compression": contents.config["compression"],
                    "report": contents.report,
                }
            )
            return
        if quiet:
            return
        print(f"{contents.name}: {contents.config['architectures'][0]}")
        if contents.report:
            _print_report(contents, contents.report)
        else:
            _print_config(contents)

    run(work, debug, quiet)


def _print_report(contents: FolderContents, report: dict[str, Any]) -> None:
    from ..artifact.reading import note_on_errors

    totals, calibration = report["totals"], report["calibration"]
    revision = f" at {report['base']['revision']}" if report["base"]["revision"] else ""
    text = f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "none"
    print_field("base", [f"{report['base']['name']}{revision} ({report['architecture']})"])
    print_field("recipe", [report["recipe"]["name"], f"seed {report['seed']}"])
    print_field("calibration", [text])
    if report["validation"]:
        print_field("validation", [report["validation"]["source"]])
    print_field("decoding", [contents.config["compression"]["decoding"]])
    smaller = totals["parameters"] * 4 / contents.weight_bytes
    print_field(
        "weights",
        [
            f"{megabytes(contents.weight_bytes)} on disk",
            f"{smaller:.2f} x smaller than float32",
            f"{totals['parameters']:,} parameters",
        ],
    )
    _print_files(contents)
    print_field("versions", [f"{name} {number}" for name, number in report["versions"].items()])
    print()
    rows = [
        (
            group["name"],
            f"{group['structure']} {group['size']}",
            f"{group['stored_bytes']:,}",
            f"{group['ratio']:.2f}",
            f"{group['relative_error']:.3f}",
            "" if group["calibrated_error"] is None else f"{group['calibrated_error']:.3f}",
        )
        for group in report["groups"]
    ]
    print_table(("group", "structure", "bytes", "ratio", "error", "on text"), rows)
    print_text("error: relative error of the weights; on text: weighted by the calibration inputs.")
    if note := note_on_errors(report.get("rounds")):
        print_text(note)
    print_dense([(item["name"], item["parameters"], item["reason"]) for item in report["dense"]])


def _print_files(contents: FolderContents) -> None:
    """Print what all files take, and which of them are the largest beside the weights."""
    beside = sorted((size, name) for name, size in contents.files.items() if name not in contents.weights)
    largest = [f"{megabytes(size)} {name}" for size, name in reversed(beside[-2:])]
    print_field("all files", [f"{megabytes(contents.folder_bytes)} on disk", *largest])


def _print_config(contents: FolderContents) -> None:
    """Print what the config knows of a folder that was saved anew after it was compressed."""
    compression = contents.config["compression"]
    print_field("report", ["none: it was saved again after it was compressed"])
    print_field("base", [contents.architecture])
    print_field("decoding", [compression["decoding"]])
    print_field("weights", [f"{megabytes(contents.weight_bytes)} on disk"])
    _print_files(contents)
    print()
    rows = [
        (name, group["structure"], f"{len(group['members']):,}", group.get("storage", ""))
        for name, group in compression["groups"].items()
    ]
    print_table(("group", "structure", "matrices", "stored in"), rows)
