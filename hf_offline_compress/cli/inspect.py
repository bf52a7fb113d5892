"""`inspect`: what is in a folder that compress has written."""

from __future__ import annotations

from .options import AsJson, Debug, Folder, app
from .output import megabytes, print_dense, print_json, print_table, run


@app.command()
def inspect(
    folder: Folder,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what is in a compressed folder: plan, bytes, recipe, base, versions."""

    def work() -> None:
        from ..folder import inspect_folder

        contents = inspect_folder(folder)
        report = contents.report
        if as_json:
            print_json(
                {
                    "folder": contents.name,
                    "weights": contents.weights,
                    "weight_bytes": contents.weight_bytes,
                    "compression": contents.config["compression"],
                    "report": report,
                }
            )
            return
        totals, calibration = report["totals"], report["calibration"]
        revision = f" at {report['base']['revision']}" if report["base"]["revision"] else ""
        text = f"{calibration['tokens']:,} tokens of {calibration['source']}" if calibration else "none"
        print(f"{contents.name}: {contents.config['architectures'][0]}")
        print(f"base         {report['base']['name']}{revision} ({report['architecture']})")
        print(f"recipe       {report['recipe']['name']}, seed {report['seed']}")
        print(f"calibration  {text}")
        if report["validation"]:
            print(f"validation   {report['validation']['source']}")
        print(f"decoding     {contents.config['compression']['decoding']}")
        print(
            f"weights      {megabytes(contents.weight_bytes)} on disk, {totals['parameters']:,} parameters; "
            f"{totals['parameters'] * 4 / contents.weight_bytes:.2f} x smaller than float32"
        )
        print(f"versions     {', '.join(f'{name} {number}' for name, number in report['versions'].items())}\n")
        rows = [
            (
                group["name"],
                f"{group['structure']} {group['size']}",
                f"{group['rows']} x {group['columns']}",
                f"{group['stored_bytes']:,}",
                f"{group['ratio']:.2f}",
                f"{group['relative_error']:.3f}",
                "" if group["calibrated_error"] is None else f"{group['calibrated_error']:.3f}",
            )
            for group in report["groups"]
        ]
        print_table(("group", "structure", "matrix", "bytes", "ratio", "error", "calibrated"), rows)
        print_dense([(item["name"], item["parameters"], item["reason"]) for item in report["dense"]])

    run(work, debug)
