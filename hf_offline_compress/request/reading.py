"""Recipes from YAML files, presets and plain JSON; every error names the file and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import CompressionError, listing
from ..foundation.arguments import real
from ..foundation.parsing import MOST_YAML_BYTES, read_yaml
from ..structures import STRUCTURES, Structure
from .budget import Budget, budget_of
from .objective import OBJECTIVES, Objective
from .recipe import DEFAULT_MODULES, Grouping, Recipe, Rule
from .selectors import names_of
from .vocabulary import Vocabulary, vocabulary_of


def preset_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    folder = files(__package__) / "presets"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """Return a preset by its name, or the recipe in a YAML file; a `Recipe` is returned as it is.

    Raises:
        CompressionError: there is no such preset or file, or the file is not a recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in preset_names():
        text, label = (files(__package__) / "presets" / f"{recipe}.yaml").read_text("utf-8"), str(recipe)
    elif Path(recipe).is_file():
        text, label = _read(Path(recipe)), Path(recipe).name
    else:
        raise CompressionError(
            f"There is no recipe '{recipe}': it is neither a YAML file nor a preset; presets are {listing(preset_names())}."
        )
    return recipe_from_dict(read_yaml(text, f"The recipe file '{label}'"), label)


def recipe_from_dict(content: object, label: str = "recipe") -> Recipe:
    """Return the recipe that plain JSON or YAML content describes; `label` names it in errors.

    Raises:
        CompressionError: a key is unknown, or a value is not one that its field takes.
    """
    content = _mapping(content, f"The recipe '{label}'", Recipe)
    rules = content.get("rules")
    if not isinstance(rules, list) or not rules:
        raise CompressionError(f"The recipe '{label}' needs `rules`, a list with at least one rule.")
    return Recipe(
        name=str(content.get("name", Path(label).stem)),
        rules=tuple(_rule(rule, f"Rule {i} of the recipe '{label}'") for i, rule in enumerate(rules, 1)),
        modules=names_of(content.get("modules", DEFAULT_MODULES), "modules"),
        allocation=str(content.get("allocation", "uniform")),
        budget=budget_of(**_mapping(content["budget"], f"The recipe '{label}'s budget", Budget))
        if content.get("budget")
        else None,
        effort=str(content.get("effort", "default")),
        rest=content.get("rest"),
        vocabulary=_vocabulary(content["vocabulary"], f"The recipe '{label}'") if content.get("vocabulary") else None,
        description=str(content.get("description", "")),
        references=names_of(content.get("references", ()), "references"),
    )


def _vocabulary(content: object, label: str) -> Vocabulary:
    """Return what a recipe says of the vocabulary: a text, or a mapping with one."""
    if not isinstance(content, Mapping):
        return vocabulary_of(content)
    return vocabulary_of(**_mapping(content, f"{label}'s vocabulary", Vocabulary))


def _read(file: Path) -> str:
    """Return the beginning of a recipe file, up to what is more than one can have."""
    try:
        with file.open("rb") as stream:
            return stream.read(MOST_YAML_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressionError(f"The recipe file '{file.name}' cannot be read as UTF-8 text: {error}.") from error


def _rule(content: object, label: str) -> Rule:
    content = _mapping(content, label, Rule)
    if "structure" not in content:
        raise CompressionError(f"{label} has no structure; known are {listing(STRUCTURES)}, and dense.")
    values = dict(content)
    values["structure"] = _structure(values["structure"], label)
    if "alternatives" in values:
        values["alternatives"] = _alternatives(values["alternatives"], label)
    if "objective" in values:
        values["objective"] = _objective(values["objective"], label)
    if "grouping" in values:
        values["grouping"] = Grouping.parse(values["grouping"])
    for key in ("modules", "storages"):
        if key in values:
            values[key] = names_of(values[key], key)
    if "ratio" in values:
        values["ratio"] = real(values["ratio"], "ratio")
    return Rule(**values)


def _structure(content: object, label: str) -> Structure | None:
    options = dict(content) if isinstance(content, Mapping) else {"name": content}
    name = options.pop("name", None)
    if name == "dense" and not options:
        return None
    if name not in STRUCTURES:
        raise CompressionError(
            f"{label} has the structure '{name}', which is unknown; known are {listing(STRUCTURES)}, and dense."
        )
    return _build(STRUCTURES[str(name)], options, f"The structure '{name}'")


def _alternatives(content: object, label: str) -> tuple[Structure, ...]:
    if not isinstance(content, list | tuple):
        raise CompressionError(f"{label} has `alternatives`: {content!r}, which is not a list of structures.")
    found = [_structure(item, label) for item in content]
    if None in found:
        raise CompressionError(
            f"{label} names dense as an alternative; a budget for the whole model allows that anyway."
        )
    return tuple(structure for structure in found if structure)


def _objective(content: object, label: str) -> Objective:
    if isinstance(content, str):
        if content not in OBJECTIVES:
            raise CompressionError(
                f"{label} has the objective '{content}', which is unknown; known are {listing(OBJECTIVES)}, or a "
                "mapping with weights for cosine, l2, l1."
            )
        return OBJECTIVES[content]
    return _build(
        Objective, _mapping(content, f"The objective of {label[0].lower()}{label[1:]}", Objective), "The objective"
    )


def _build(cls: Any, options: Mapping[str, Any], label: str) -> Any:
    """Make a frozen dataclass from plain values: lists become tuples, mappings nested dataclasses, types are checked."""
    options = _mapping(options, label, cls)
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in options.items():
        wanted = hints[name]
        if is_dataclass(wanted):
            values[name] = _build(wanted, value, f"{label}'s {name}")
        elif get_args(wanted):
            values[name] = tuple(real(item, name) for item in (value if isinstance(value, list | tuple) else [value]))
        elif wanted is float:
            values[name] = real(value, name)
        elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise CompressionError(f"{label} has {name}: {value!r}, which is not {_TYPES[wanted]}.")
        else:
            values[name] = value
    return cls(**values)


_TYPES = {int: "an integer", bool: "true or false", str: "a name"}


def _mapping(content: object, label: str, cls: Any) -> dict[str, Any]:
    """Return content if it is a mapping whose keys are fields of the dataclass."""
    if not isinstance(content, Mapping):
        raise CompressionError(f"{label} is not a mapping of keys to values.")
    known = [item.name for item in fields(cls)] + (["name"] if cls in STRUCTURES.values() else [])
    if unknown := [key for key in content if key not in known]:
        raise CompressionError(f"{label} has the unknown key '{unknown[0]}'; known keys are {listing(known)}.")
    return {str(key): value for key, value in content.items()}
