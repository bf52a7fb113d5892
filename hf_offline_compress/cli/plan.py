"""`plan`: what compress would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..recipe import DEFAULT_RECIPE, load_recipe, split_selectors
from .options import (
    Allocation,
    AsJson,
    AutoClass,
    Base,
    Debug,
    Dtype,
    GroupingOption,
    MaxBytes,
    Modules,
    Ratio,
    RecipeOption,
    Revision,
    Storage,
    TotalRatio,
    app,
)
from .output import megabytes, print_dense, print_json, print_table, run

if TYPE_CHECKING:
    from ..plan import Plan


@app.command()
def plan(
    base: Base,
    recipe: RecipeOption = DEFAULT_RECIPE,
    ratio: Ratio = None,
    modules: Modules = None,
    grouping: GroupingOption = None,
    storage: Storage = None,
    allocation: Allocation = None,
    total_ratio: TotalRatio = None,
    max_bytes: MaxBytes = None,
    auto_class: AutoClass = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what compress would do, from the base's config alone."""

    def work() -> None:
        from ..base import read_config, resolve_architecture
        from ..plan import make_plan

        asked = load_recipe(recipe).override(
            modules=split_selectors(modules),
            ratio=ratio,
            grouping=grouping,
            storage=storage,
            allocation=allocation,
            total_ratio=total_ratio,
            max_bytes=max_bytes,
        )
        name, config = read_config(base, revision=revision)
        outcome = make_plan(config, asked, architecture=resolve_architecture(config, auto_class), dtype=dtype)
        if as_json:
            print_json(_plan_json(name, outcome))
        else:
            _print_plan(name, outcome)

    run(work, debug)


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


def _print_plan(name: str, outcome: Plan) -> None:
    print(f"{name} ({outcome.architecture}, {outcome.dtype}) with recipe {outcome.recipe.name}\n")
    rows = [
        (
            group.name,
            str(len(group.matrices)),
            f"{group.rows} x {group.columns}",
            group.structure.name,
            str(group.shown_size),
            f"{group.parameters * 4:,}",
            f"{group.stored_bytes:,}",
            f"{group.ratio:.2f}",
        )
        for group in outcome.groups
    ]
    print_table(("group", "matrices", "rows x columns", "structure", "size", "float32 bytes", "bytes", "ratio"), rows)
    if outcome.recipe.allocation == "by_gain":
        print(
            "\nThe sizes are those of a uniform allocation: what each group gains a byte is known only once it is measured"
        )
        print("on text. compress then moves bytes between the groups, within the ratio as a whole.")
    print_dense([(item.name, item.parameters, item.reason) for item in outcome.dense])
    total = outcome.skeleton.total * 4
    chosen = f"{megabytes(outcome.parameters * 4)} -> {megabytes(outcome.stored_bytes)}"
    whole = f"{megabytes(total)} -> {megabytes(outcome.total_stored_bytes)}"
    print(f"\nchosen matrices: {chosen} (ratio {outcome.ratio:.2f})")
    print(f"whole model:     {whole} (total ratio {outcome.total_ratio:.2f})")
