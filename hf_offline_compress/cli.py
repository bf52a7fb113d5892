"""The command line: `hf-offline-compress compress | plan | inspect`. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import CompressionError
from .recipe import Recipe, Rule, load_recipe, preset_names, split_selectors
from .version import __version__

if TYPE_CHECKING:
    from .plan import Plan

HELP = {
    item.name: str(item.metadata["help"]) for cls in (Rule, Recipe) for item in fields(cls) if "help" in item.metadata
}

app = typer.Typer(
    help="Make BERT, RoBERTa and GPT-2 models several times smaller, offline; AutoModel loads the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="the model to compress: a Hub id or a local folder", show_default=False)
]
RecipeOption = Annotated[str, typer.Option(help=f"a preset ({', '.join(preset_names())}) or a YAML file")]
Ratio = Annotated[float | None, typer.Option(help=HELP["ratio"], show_default=False)]
Modules = Annotated[str | None, typer.Option(help=HELP["modules"] + "; with commas between", show_default=False)]
GroupingOption = Annotated[str | None, typer.Option(help=HELP["grouping"], show_default=False)]
Storage = Annotated[str | None, typer.Option(help=HELP["storage"], show_default=False)]
Allocation = Annotated[str | None, typer.Option(help=HELP["allocation"], show_default=False)]
Dtype = Annotated[
    str | None, typer.Option(help="dtype of the model; the checkpoint's if not given", show_default=False)
]
AutoClass = Annotated[
    str | None,
    typer.Option(help="class to load the base with; the one it was saved from if not given", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a base on the Hub", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print nothing but errors")]


def _version(asked: bool) -> None:
    if asked:
        print(f"hf-offline-compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    base: Base,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write", show_default=False)],
    recipe: RecipeOption = "calibrated-svd",
    ratio: Ratio = None,
    modules: Modules = None,
    grouping: GroupingOption = None,
    storage: Storage = None,
    allocation: Allocation = None,
    calibration: Annotated[
        str, typer.Option(help="text to calibrate on: bundled, none, a file with one text a line, or a data set's name")
    ] = "bundled",
    validation: Annotated[
        str | None,
        typer.Option(
            help="held-out text: what is trained keeps the step of lowest perplexity on it; a file or a data set's name",
            show_default=False,
        ),
    ] = None,
    auto_class: AutoClass = None,
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option(help="where to compute, e.g. cuda", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="calibration texts in one forward pass", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    revision: Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="split larger weights into files of this size")] = "50GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the base's tokenizer")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a folder that this command has written")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress BASE and write a folder that AutoModel loads."""

    def work() -> None:
        from .folder import check_target, inspect_folder

        check_target(out, overwrite)
        load_recipe(recipe)  # before torch is imported: a typing error is answered at once
        _calm(quiet)
        from .compressor import compress as run

        result = run(
            base,
            recipe,
            ratio=ratio,
            modules=split_selectors(modules),
            grouping=grouping,
            storage=storage,
            allocation=allocation,
            calibration=calibration,
            validation=validation,
            auto_class=auto_class,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=not quiet,
        )
        result.save(out, overwrite=overwrite, max_shard_size=max_shard_size)
        if as_json:
            _print_json(result.report.to_dict())
        elif not quiet:
            totals, written = result.report.totals, inspect_folder(out).weight_bytes
            print(
                f"{out}: {_mb(written)} of weights; the base would be {_mb(totals['parameters'] * 4)} in float32 "
                f"({totals['parameters'] * 4 / written:.2f} x smaller). "
                f"{len(result.report.groups)} groups compressed at ratio {totals['ratio']:.2f}."
            )

    _run(work, debug)


@app.command()
def plan(
    base: Base,
    recipe: RecipeOption = "calibrated-svd",
    ratio: Ratio = None,
    modules: Modules = None,
    grouping: GroupingOption = None,
    storage: Storage = None,
    allocation: Allocation = None,
    auto_class: AutoClass = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what compress would do, from the base's config alone."""

    def work() -> None:
        from .base import read_config, resolve_architecture
        from .plan import make_plan

        asked = load_recipe(recipe).override(
            modules=split_selectors(modules),
            ratio=ratio,
            grouping=grouping,
            storage=storage,
            allocation=allocation,
        )
        name, config = read_config(base, revision=revision)
        outcome = make_plan(config, asked, architecture=resolve_architecture(config, auto_class), dtype=dtype)
        if as_json:
            _print_json(_plan_json(name, outcome))
        else:
            _print_plan(name, outcome)

    _run(work, debug)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="a folder that compress has written", show_default=False)
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what is in a compressed folder: plan, bytes, recipe, base, versions."""

    def work() -> None:
        from .folder import inspect_folder

        contents = inspect_folder(folder)
        report = contents.report
        if as_json:
            _print_json(
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
            f"weights      {_mb(contents.weight_bytes)} on disk, {totals['parameters']:,} parameters; "
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
        _print_table(("group", "structure", "matrix", "bytes", "ratio", "error", "calibrated"), rows)
        _print_dense([(item["name"], item["parameters"], item["reason"]) for item in report["dense"]])

    _run(work, debug)


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-offline-compress")


def _run(work: Callable[[], None], debug: bool) -> None:
    """Do the work; an error is one line on stderr and exit code 1."""
    try:
        work()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CompressionError, ImportError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from error


def _calm(quiet: bool) -> None:
    """Keep transformers' own bars and notes out of the output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if quiet:
        logging.set_verbosity_error()


def _plan_json(name: str, outcome: Plan) -> dict[str, Any]:
    return {
        "base": name,
        "architecture": outcome.architecture,
        "dtype": outcome.dtype,
        "recipe": outcome.recipe.to_dict(),
        "allocation": outcome.recipe.allocation,
        "ratio": outcome.ratio,
        "total_ratio": outcome.total_ratio,
        "parameters": outcome.skeleton.total,
        "total_stored_bytes": outcome.total_stored_bytes,
        "groups": [
            {
                "name": group.name,
                "structure": group.structure.name,
                "size": group.size,
                "members": [matrix.name for matrix in group.matrices],
                "rows": group.rows,
                "columns": group.columns,
                "bytes_before": group.parameters * 4,
                "bytes_after": group.stored_bytes,
                "ratio": group.ratio,
                "storage": group.storage,
            }
            for group in outcome.groups
        ],
        "dense": [{"name": d.name, "parameters": d.parameters, "reason": d.reason} for d in outcome.dense],
    }


def _print_plan(name: str, outcome: Plan) -> None:
    print(f"{name} ({outcome.architecture}, {outcome.dtype}) with recipe {outcome.recipe.name}\n")
    rows = [
        (
            group.name,
            str(len(group.matrices)),
            f"{group.rows} x {group.columns}",
            group.structure.name,
            str(group.size),
            f"{group.parameters * 4:,}",
            f"{group.stored_bytes:,}",
            f"{group.ratio:.2f}",
        )
        for group in outcome.groups
    ]
    _print_table(("group", "matrices", "rows x columns", "structure", "size", "float32 bytes", "bytes", "ratio"), rows)
    if outcome.recipe.allocation == "by_gain":
        print(
            "\nThe sizes are those of a uniform allocation: what each group gains a byte is known only once it is measured"
        )
        print("on text. compress then moves bytes between the groups, within the ratio as a whole.")
    _print_dense([(item.name, item.parameters, item.reason) for item in outcome.dense])
    total = outcome.skeleton.total * 4
    print(
        f"\nchosen matrices: {_mb(outcome.parameters * 4)} -> {_mb(outcome.stored_bytes)} (ratio {outcome.ratio:.2f})"
        f"\nwhole model:     {_mb(total)} -> {_mb(outcome.total_stored_bytes)} (total ratio {outcome.total_ratio:.2f})"
    )


def _print_dense(items: list[tuple[str, int, str]]) -> None:
    """Print what stays dense, one line a reason."""
    print("\nstays dense:")
    for reason in dict.fromkeys(reason for _, _, reason in items):
        chosen = [(name, count) for name, count, why in items if why == reason]
        names = ", ".join(name for name, _ in chosen[:4]) + (f", … {len(chosen)} in all" if len(chosen) > 4 else "")
        print(f"  {names}: {sum(count for _, count in chosen):,} parameters; {reason}")


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
