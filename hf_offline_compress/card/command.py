"""The command that reproduces the folder, derived from the report."""

from __future__ import annotations

import inspect
import re
import shlex
from typing import Any

import yaml

from ..errors import CompressionError
from ..request.reading import load_recipe, preset_names, recipe_from_dict
from ..request.recipe import Recipe
from ..request.selectors import split_selectors
from .inputs import CardInputs

RECIPE_FILE = "recipe.yaml"
TEXTS = "TEXTS.txt"
BUDGETS = ("total_ratio", "max_bytes")
VOCABULARY = {"vocabulary": "text", "vocabulary_size": "size", "vocabulary_coverage": "coverage"}


def reproduction(inputs: CardInputs, base_model: str | None) -> tuple[str, str | None]:
    """Return the command, and the YAML of its recipe; None where a preset and options say it all.

    Args:
        inputs: what the card is written from.
        base_model: the base's Hub id, if it is known.
    """
    report = inputs.report
    options = _preset_options(report)
    text = None
    if options is None:
        options = {"recipe": RECIPE_FILE}
        text = yaml.safe_dump(_short(report["recipe"]), sort_keys=False, allow_unicode=True, width=100)
    options |= _request(report)
    if "max_loss" in options:  # the budget was found, not asked for
        options = {key: value for key, value in options.items() if key not in BUDGETS}
    name = base_model or inputs.base_name
    base = name if re.fullmatch(r"[\w./-]+", name) else "BASE"
    lines = [f"hf-offline-compress compress {shlex.quote(base)} {shlex.quote(inputs.name)}"]
    lines += [f"--{option.replace('_', '-')} {shlex.quote(value)}" for option, value in options.items()]
    return " \\\n  ".join(lines), text


def _preset_options(report: dict[str, Any]) -> dict[str, str] | None:
    """Return the preset and the options that make the recipe out of it; None if there are none."""
    name = report["recipe"]["name"]
    if name not in preset_names():
        return None
    try:
        wanted, preset = recipe_from_dict(report["recipe"]), load_recipe(name)
        changes = {
            key: value
            for key in inspect.signature(Recipe.override).parameters
            if key != "self" and (value := _changed(key, preset, wanted)) is not None
        }
        found = preset.override(**changes)
        options = {key: _plain(value) for key, value in changes.items()}
        if found.calibrated and not wanted.calibrated:
            found, options["calibration"] = found.without_calibration(), "none"
            options.pop("allocation", None)
    except CompressionError:
        return None
    if "modules" in options and split_selectors(options["modules"]) != wanted.modules:
        return None
    if options.get("vocabulary") == "caller":
        options["vocabulary"] = TEXTS
    return {"recipe": name, **options} if _settings(found) == _settings(wanted) else None


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe does: a preset is the same one where only its description was reworded."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("description", "references")}


def _changed(key: str, preset: Recipe, wanted: Recipe) -> Any:
    """Return a recipe's value of an option where it is not the preset's; None where it is, or where rules differ in it."""
    if key in BUDGETS:
        if wanted.budget is None or wanted.budget == preset.budget:
            return None
        return getattr(wanted.budget, key)
    if key in VOCABULARY:
        if wanted.vocabulary is None or wanted.vocabulary == preset.vocabulary:
            return None
        return getattr(wanted.vocabulary, VOCABULARY[key])
    if hasattr(wanted, key):
        return None if getattr(wanted, key) == getattr(preset, key) else getattr(wanted, key)
    values = [getattr(rule, key) for rule in wanted.rules if rule.structure]
    if values == [getattr(rule, key) for rule in preset.rules if rule.structure]:
        return None
    return values[0] if all(value == values[0] for value in values) else None


def _request(report: dict[str, Any]) -> dict[str, str]:
    """Return what else was asked for: revision, class, dtype, texts, seed."""
    asked = {key: value for key, value in (report.get("options") or {}).items() if value is not None}
    options: dict[str, Any] = {}
    if report["base"].get("revision"):
        options["revision"] = report["base"]["revision"]
    if "options" in report:
        options |= {key: asked[key] for key in ("auto_class", "dtype", "batch_size") if key in asked}
    else:  # what was asked for is not known, but this gives the same
        options["auto_class"] = report["architecture"]
        if report["dtype"] == "float32":
            options["dtype"] = "float32"
    search = report.get("search")
    if search:
        options["max_loss"] = search["max_loss"]
    for purpose in ("calibration", "validation"):
        record = report.get(purpose)
        # What was held out from the calibration text will be so again.
        if record and record["source"] != "bundled" and not (search and record["source"].startswith("held out")):
            options[purpose] = TEXTS if record["source"] == "caller" else record["source"]
    options["seed"] = report["seed"]
    return {key: str(value) for key, value in options.items()}


def _short(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without what says nothing: empty texts, empty lists, values that are not given."""
    found = {key: value for key, value in recipe.items() if value not in ("", [], None)}
    found["rules"] = [{key: value for key, value in rule.items() if value is not None} for rule in recipe["rules"]]
    return found


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
