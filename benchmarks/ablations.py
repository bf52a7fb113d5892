"""What each choice in the preset `ae` is worth: one choice varied at a time, everything else as the preset has it.

usage: python benchmarks/ablations.py --data FOLDER --model mlm --mlm FOLDER [--kinds key] [--out FOLDER]
       python benchmarks/ablations.py --data FOLDER --model minilm --blocks objective norms --ratios 10 --out FOLDER

--data holds stsb-en-train.csv and stsb-en-dev.csv for MiniLM, calibration.txt and test.txt for the masked language model.
With --out, ablations.md, ablations.csv and ablations.png are written; a later run adds what they lack, and draws the figure
anew. Remove them to begin anew.

`loss` is 0.9091 · cosine distance + 0.0909 · RMSE over all rows, whatever a variant minimises; `value` is agreement (MiniLM,
the higher the better) or perplexity (masked language model, the lower the better) with only these kinds replaced. `svd`
stands beside each block. Importances need predictions, and so the masked language model.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Subject, Table, distances, masked_lm, minilm, own_loss

from hf_offline_compress import Objective, Recipe, Rule
from hf_offline_compress.request.reading import load_recipe
from hf_offline_compress.request.recipe import Grouping

Change = Callable[[Rule], Rule]
DENSE, PLAIN = "dense", "svd"
COLUMNS = {
    "model": "",
    "kinds": "",
    "block": "",
    "variant": "",
    "asked": "",
    "ratio": ".2f",
    "loss": ".5f",
    "cosine distance": ".5f",
    "RMSE": ".6f",
    "measure": "",
    "value": ".5g",
    "seconds": ".1f",
}
QUICK_EPOCHS = 3


def objective(**weights: Any) -> Change:
    """Return what gives a rule this objective and no other."""
    return lambda rule: replace(rule, objective=Objective(**weights))


def structure(**options: Any) -> Change:
    """Return what replaces options of a rule's structure."""
    return lambda rule: replace(rule, structure=replace(rule.structure, **options))


def grouping(text: str) -> Change:
    """Return what gives a rule this grouping."""
    return lambda rule: replace(rule, grouping=Grouping.parse(text))


def important(**options: Any) -> Change:
    """Return what adds an importance to a rule's objective."""
    return lambda rule: replace(rule, objective=replace(rule.objective, **options))


def same(rule: Rule) -> Rule:
    """Return the rule as it is."""
    return rule


BLOCKS: dict[str, dict[str, Change]] = {
    "objective": {
        "cosine + L2 (ae)": same,
        "cosine": objective(cosine=1.0),
        "L2": objective(l2=1.0),
        "cosine + annealed L1": objective(cosine=0.1995, l1=0.0025),
    },
    "decoder": {
        "residual, sin (ae)": same,
        "linear": structure(decoder="linear"),
        "residual, gelu": structure(activation="gelu"),
        "residual, tanh": structure(activation="tanh"),
    },
    "hidden width": {
        "by shape (ae)": same,
        **{f"{width} × latent": structure(decoder_widths=(width,)) for width in (1, 2, 4, 8)},
    },
    "norms": {"norms (ae)": same, "no norms": structure(norms=False)},
    "grouping": {
        "concatenated": grouping("concatenated"),
        "blocks:3": grouping("blocks:3"),
        "blocks:2": grouping("blocks:2"),
        "separated": grouping("separated"),
    },
    "importance": {
        "none (ae)": same,
        **{
            f"{kind}, {how}": important(importance=kind, normalization=how)
            for kind in ("fisher", "l1_sensitivity")
            for how in ("sum", "power", "log")
        },
    },
    "parameters, L2": {
        "none": objective(l2=1.0),
        **{
            f"{kind}, {'parameters' if single else 'rows'}": objective(l2=1.0, importance=kind, parameter_wise=single)
            for kind in ("fisher", "l1_sensitivity")
            for single in (False, True)
        },
    },
}
WITH_HEAD = ("importance", "parameters, L2")
QUICK_BLOCKS = ("objective", "norms")


def measured(subject: Subject, recipe: Recipe, kinds: list[str], ratio: float) -> dict[str, Any]:
    """Return what a recipe makes of some kinds of a model's matrices, all replaced together."""
    result = subject.compressed(recipe, ratio, kinds)
    weights = [weight for kind in kinds for weight in subject.matrices(subject.model, kind)]
    rebuilt = [weight for kind in kinds for weight in subject.matrices(result.model, kind)]
    distance, rmse = distances(rebuilt, weights)
    return {
        "ratio": result.report.totals["ratio"],
        "loss": own_loss(distance, rmse),
        "cosine distance": distance,
        "RMSE": rmse,
        "value": subject.judge(result.model),
        "seconds": result.report.seconds["solve"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel a block: ratio against agreement or perplexity, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

    blocks = [block for block in BLOCKS if any(row["block"] == block for row in rows)]
    across = min(3, len(blocks))
    down = -(-len(blocks) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4.6 * across, 3.5 * down), squeeze=False, sharey=True)
    dense = next((row["value"] for row in rows if row["block"] == DENSE), None)
    ratios = sorted({float(row["asked"]) for row in rows if row["block"] != DENSE})
    measure = rows[0]["measure"]
    colors = pyplot.get_cmap("tab10")
    for axis, block in zip(axes.flat, blocks, strict=False):
        for index, variant in enumerate([PLAIN, *BLOCKS[block]]):
            found = [
                row for row in rows if row["variant"] == variant and row["block"] == (PLAIN if not index else block)
            ]
            points = sorted((float(row["asked"]), row["value"]) for row in found)
            if points:
                style = {"color": "0.5", "linestyle": "--"} if variant == PLAIN else {"color": colors(index - 1)}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=variant, **style)
        if dense is not None:
            axis.axhline(dense, color="0.75", linewidth=1, label=DENSE)
        axis.set_xscale("log")
        axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.xaxis.set_minor_locator(NullLocator())
        if measure == "perplexity":
            axis.set_yscale("log")
            # Less than a decade has hardly a tick of its own.
            axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(block, fontsize=11, loc="left")
        axis.set_xlabel("ratio")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[:, 0]:
        axis.set_ylabel(measure)
    for axis in list(axes.flat)[len(blocks) :]:
        axis.set_visible(False)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['kinds']}: one choice of `ae` varied at a time", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parsed() -> argparse.Namespace:
    """Return the options, with what --quick and the model make of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=("minilm", "mlm"), default="mlm")
    parser.add_argument("--mlm", type=Path, help="folder of the masked language model")
    parser.add_argument("--kinds", nargs="+", default=["key"])
    parser.add_argument("--ratios", nargs="+", type=float, default=None, help="3 10 25 if not given")
    parser.add_argument("--blocks", nargs="+", choices=tuple(BLOCKS), default=None, help="all if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="few epochs, blocks, and texts, to try the script out")
    options = parser.parse_args()
    if options.model == "mlm" and not options.mlm:
        parser.error("the masked language model needs --mlm FOLDER")
    options.ratios = options.ratios or ([10.0] if options.quick else [3.0, 10.0, 25.0])
    asked = options.blocks or (QUICK_BLOCKS if options.quick else tuple(BLOCKS))
    options.blocks = [block for block in asked if options.model == "mlm" or block not in WITH_HEAD]
    if len(options.blocks) < len(asked):
        print(f"left out, for they need a head that predicts: {', '.join(b for b in asked if b in WITH_HEAD)}\n")
    return options


def main() -> None:
    """Print a table."""
    options = parsed()
    few = {"judged": 60 if options.model == "minilm" else 10} if options.quick else {}
    data, folder = options.data, options.mlm
    subject = minilm(data, **few) if options.model == "minilm" else masked_lm(folder, data, **few)
    stem = "ablations-quick" if options.quick else "ablations"
    table = Table(options.out, stem, COLUMNS, ("model", "kinds", "block", "variant", "asked"))
    fixed = {"model": subject.name, "kinds": ", ".join(options.kinds), "measure": subject.measure}
    base = load_recipe("ae")
    (rule,) = base.rules
    if options.quick:
        rule = structure(training=replace(rule.structure.training, epochs=QUICK_EPOCHS))(rule)
    # One recipe may stand in several blocks: it is solved once.
    known: dict[tuple[Recipe, float], dict[str, Any]] = {}

    def add(block: str, variant: str, recipe: Recipe, ratio: float) -> None:
        if table.has(fixed["model"], fixed["kinds"], block, variant, f"{ratio:g}"):
            return
        if (recipe, ratio) not in known:
            known[recipe, ratio] = measured(subject, recipe, options.kinds, ratio)
        table.add(**fixed, block=block, variant=variant, asked=f"{ratio:g}", **known[recipe, ratio])

    if not table.has(fixed["model"], fixed["kinds"], DENSE, DENSE, "1"):
        table.add(**fixed, block=DENSE, variant=DENSE, asked="1", ratio=1.0, value=subject.judge(subject.model))
    for ratio in options.ratios:
        add(PLAIN, PLAIN, load_recipe(PLAIN), ratio)
    for block in options.blocks:
        for variant, change in BLOCKS[block].items():
            for ratio in options.ratios:
                add(block, variant, replace(base, rules=(change(rule),)), ratio)
    if options.out:
        rows = [row for row in table.rows.values() if all(row[k] == v for k, v in fixed.items())]
        draw(rows, options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
