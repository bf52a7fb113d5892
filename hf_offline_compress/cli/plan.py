"""`plan`: what compress would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..request.options import OVERRIDES, CompressionOptions
from ..request.reading import load_recipe
from ..request.recipe import DEFAULT_RECIPE
from ..request.selectors import split_selectors
from .options import NOTHING_ELSE, AsJson, Base, Debug, Quiet, RecipeOption, app, takes
from .output import megabytes, print_dense, print_json, print_table, print_text, run
from .summary import print_vocabulary

if TYPE_CHECKING:
    from ..plan.groups import Plan
    from ..request.vocabulary import Vocabulary


# What a plan depends on of all that a compression is asked for.
PLANNED = (*OVERRIDES, "calibration", "validation", "auto_class", "dtype", "revision")


@app.command()
@takes(CompressionOptions, PLANNED)
def plan(
    base: Base,
    recipe: RecipeOption = DEFAULT_RECIPE,
    options: CompressionOptions = NOTHING_ELSE,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what compress would do, from the base's config alone."""

    def work() -> None:
        from ..base.checkpoint import companion_bytes, read_config, resolve_architecture
        from ..foundation.progress import stage
        from ..plan.make import make_plan

        changes = options.overrides | {"modules": split_selectors(options.modules)}
        asked = load_recipe(recipe).override(**changes)
        with stage("finding the base", at_once=False):
            name, config = read_config(base, revision=options.revision)
        record: dict[str, Any] | None = None
        if asked.vocabulary is not None:
            with stage("pruning the vocabulary"):
                config, record = _pruned(base, asked.vocabulary, options)
        with stage("importing the model's classes", at_once=False):
            outcome = make_plan(
                config,
                asked,
                architecture=resolve_architecture(config, options.auto_class),
                dtype=str(options.dtype) if options.dtype else None,
            )
        companions = companion_bytes(base, pruned=record is not None)
        beside = None if companions is None else companions + _code_bytes() + (record or {}).get("tokenizer_bytes", 0)
        if as_json:
            print_json(
                {**_plan_json(name, outcome), "beside_bytes": beside, **({"vocabulary": record} if record else {})}
            )
        elif not quiet:
            _print_plan(name, outcome, beside)
            if record:
                print_vocabulary(record)

    run(work, debug, quiet)


def _code_bytes() -> int:
    """Return the bytes of the code that travels with every model."""
    from .. import runtime

    return sum(file.stat().st_size for file in Path(str(runtime.__file__)).parent.glob("*_compressed.py"))


def _pruned(base: str, asked: Vocabulary, options: CompressionOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config with a pruned vocabulary, and the record of what was pruned."""
    from ..base.checkpoint import load_tokenizer, resolve_tokenizer
    from ..foundation.files import read_json
    from ..measure.texts import load_texts
    from ..vocabulary import prune_vocabulary, vocabulary_text

    judged = {
        "calibration": load_texts(options.calibration),
        "validation": load_texts(options.validation, "validation"),
    }
    source = resolve_tokenizer(base, revision=options.revision)
    tokenizer = load_tokenizer(source)
    text = vocabulary_text(asked, tokenizer, source.folder)
    generation = read_json(source.folder / "generation_config.json")
    found = prune_vocabulary(
        asked, text, tokenizer, source.config, name=source.name, generation=generation, judged=judged
    )
    return found.config(source.config), found.record


def _plan_json(name: str, outcome: Plan) -> dict[str, Any]:
    return {
        "base": name,
        "architecture": outcome.architecture,
        "dtype": outcome.dtype,
        "recipe": outcome.recipe.to_dict(),
        "allocation": outcome.recipe.allocation,
        "ratio": outcome.ratio,
        "total_ratio": outcome.total_ratio,
        "parameters": outcome.layout.total,
        "total_stored_bytes": outcome.total_stored_bytes,
        "groups": [
            {
                "name": group.name,
                "structure": group.structure.name,
                "size": group.shown_size,
                "members": [matrix.name for matrix in group.matrices],
                "rows": group.rows,
                "columns": group.columns,
                "bytes_before": group.parameters * 4,
                "bytes_after": group.stored_bytes,
                "ratio": group.ratio,
                "storage": str(group.storage),
            }
            for group in outcome.groups
        ],
        "dense": [{"name": d.name, "parameters": d.parameters, "reason": d.reason} for d in outcome.dense],
    }


def _print_plan(name: str, outcome: Plan, beside: int | None) -> None:
    print_text(f"{name} ({outcome.architecture}, {outcome.dtype}) with recipe {outcome.recipe.name}")
    print()
    rows = [
        (
            group.name if len(group.matrices) == 1 else f"{group.name}, {len(group.matrices)} matrices",
            f"{group.rows} x {group.columns}",
            group.structure.name,
            str(group.shown_size),
            f"{group.stored_bytes:,}",
            f"{group.ratio:.2f}",
        )
        for group in outcome.groups
    ]
    print_table(("group", "rows x columns", "structure", "size", "bytes", "ratio"), rows)
    units = {group.structure.name: group.structure.unit for group in outcome.groups}
    print()
    print_text(f"size: {', '.join(f'{unit} ({structure})' for structure, unit in units.items())}.")
    print_text("ratio: bytes in float32, over the bytes here.")
    print_dense([(item.name, item.parameters, item.reason) for item in outcome.dense])
    total = outcome.layout.total * 4
    by_gain = outcome.recipe.allocation == "by_gain"
    print(f"\nchosen matrices  {megabytes(outcome.parameters * 4)} -> {_chosen(outcome, by_gain)}")
    print(f"whole model      {megabytes(total)} -> {_whole(outcome, by_gain)}")
    if beside is not None:
        print(f"beside weights   {megabytes(beside)} of tokenizer, code and other files")
    if by_gain:
        print()
        print_text(
            "The sizes above are a starting point: compress measures on text what each group gains per byte, moves "
            f"bytes between groups{', and fills the budget' if outcome.recipe.budget else ''}."
        )


def _chosen(outcome: Plan, by_gain: bool) -> str:
    """Return what compress will write for the matrices that were chosen."""
    if by_gain and outcome.recipe.budget:
        return "within what the budget leaves"
    if by_gain:  # it spends all that the ratios allow
        allowed = sum(group.parameters * 4 / group.rule.ratio for group in outcome.groups)
        return f"at most {megabytes(allowed)}"
    return f"{megabytes(outcome.stored_bytes)} (ratio {outcome.ratio:.2f})"


def _whole(outcome: Plan, by_gain: bool) -> str:
    """Return what compress will write in all: exactly, or what it will not exceed."""
    total, budget = outcome.layout.total, outcome.recipe.budget
    if by_gain and budget:
        allowed = budget.allowed(total)
        return f"at most {megabytes(allowed)} (total ratio {total * 4 / allowed:.2f})"
    size = outcome.file_bytes
    if by_gain:
        size += int(sum(group.parameters * 4 / group.rule.ratio for group in outcome.groups)) - outcome.stored_bytes
    return f"{'at most ' if by_gain else ''}{megabytes(size)} (total ratio {total * 4 / size:.2f})"
