"""`presets`: the recipes that come with the package, a line each."""

from __future__ import annotations

import re
import textwrap

from ..request.reading import load_recipe, preset_names
from ..request.recipe import DEFAULT_RECIPE, Recipe
from .options import AsJson, Debug, Quiet, app
from .output import WIDTH, print_json, print_text, run


@app.command()
def presets(as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the presets: the ratio of each, whether it is calibrated on text, and what it does."""

    def work() -> None:
        recipes = sorted(map(load_recipe, preset_names()), key=lambda recipe: (not recipe.budget, _ratio(recipe)))
        if as_json:
            print_json({"default": DEFAULT_RECIPE, "presets": {recipe.name: recipe.to_dict() for recipe in recipes}})
        elif not quiet:
            print(_line("preset", "ratio", "text", "what it does"))
            for recipe in recipes:
                total = " all" if recipe.budget else ""
                text = "yes" if recipe.calibrated else "no"
                print(_line(recipe.name, f"{_ratio(recipe):g}{total}", text, recipe.description))
            print()
            print_text(
                "ratio: of the whole model if marked all, else of linear layers and word embeddings. text: whether "
                f"calibrated on text, by default the package's own. The default preset is {DEFAULT_RECIPE}."
            )

    run(work, debug, quiet)


def _line(name: str, ratio: str, text: str, description: str) -> str:
    first = re.split(r" - |[.:;] ", description, maxsplit=1)[0].rstrip(".")
    head = f"{name:<15} {ratio:<6} {text:<4} "
    return head + textwrap.shorten(first, WIDTH - len(head), placeholder=" …")


def _ratio(recipe: Recipe) -> float:
    """Return the ratio that a preset asks for."""
    if recipe.budget:
        return float(recipe.budget.total_ratio or 0)
    return next(rule.ratio for rule in recipe.rules if rule.structures)
