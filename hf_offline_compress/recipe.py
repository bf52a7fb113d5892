"""What the user asks for: frozen dataclasses, read from and written to YAML, and all their validation.

A recipe selects matrices (`modules`) and has rules; the first rule whose own `modules` include a matrix says what
becomes of it. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .arguments import real
from .errors import CompressionError, listing
from .families import KINDS, SHORTHANDS, Matrix
from .parsing import MOST_YAML_BYTES, check_pattern, read_yaml
from .structures import FLOATS, INTEGERS, STRUCTURES, Structure

STORAGES = FLOATS
FACTOR_STORAGES = (*FLOATS, *INTEGERS)
IMPORTANCES = ("none", "fisher", "l1_sensitivity")
NORMALIZATIONS = ("sum", "power", "log")
DEFAULT_MODULES = ("linears", "word_embeddings")
# The smallest preset that stays within 1 % of the dense model wherever it was measured: see the README.
DEFAULT_RECIPE = "small"


@dataclass(frozen=True)
class Objective:
    """What "close" means.

    For an autoencoder the loss is cosine · CD + l2 · RMSE + l1 · L1α (arXiv 2302.04045), where CD is the mean over rows
    of 1 − cos(ŵ, w) and L1α the mean of |ŵ − w|^α with α annealed from 1 to 0.1. For closed forms it is L2 alone.

    Attributes:
        cosine: weight of the direction's distance.
        l2: weight of the root mean squared error.
        l1: weight of the annealed L1 term.
        calibrated: weigh errors by what the layer really sees: for a linear layer the second moments of its inputs,
            for an embedding how often each token occurs.
        sensitive: weigh errors also by what they do to the model's own output, to second order (Gauss-Newton): the
            second moments of the gradients at the layer's outputs. Needs `calibrated`.
        importance: weigh rows by gradients of the predicted probability of correct tokens (arXiv 2302.04045): "fisher",
            their squares; "l1_sensitivity", their absolute values; "none". Needs a head to take gradients from.
        parameter_wise: weigh every parameter by itself, and not rows. Only errors of single parameters can be: L2 and L1.
        normalization: what becomes of the rows' weights where an autoencoder's loss is multiplied by them, before they
            are divided by their mean in a batch: "sum", nothing; "power", their square root; "log", log(1 + w / mean w).
    """

    cosine: float = 0.0
    l2: float = 0.0
    l1: float = 0.0
    calibrated: bool = False
    sensitive: bool = False
    importance: str = "none"
    parameter_wise: bool = False
    normalization: str = "sum"

    def __post_init__(self) -> None:
        """Reject a loss that is nothing, or rewards an error."""
        terms = (self.cosine, self.l2, self.l1)
        if min(terms) < 0 or sum(terms) <= 0:
            raise CompressionError(
                f"The objective's weights are cosine={self.cosine}, l2={self.l2}, l1={self.l1}; "
                "none may be negative and at least one must be above 0."
            )
        if self.sensitive and not self.calibrated:
            raise CompressionError(
                "An objective that is sensitive must be calibrated too: both are measured on the text."
            )
        for name, known in (("importance", IMPORTANCES), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise CompressionError(f"The {name} '{getattr(self, name)}' is unknown; known are {listing(known)}.")
        if self.calibrated and self.importance != "none":
            raise CompressionError(
                "An objective is either calibrated, or weighted by an importance: both say how much errors count."
            )
        if self.parameter_wise and self.importance == "none":
            raise CompressionError("parameter_wise needs an importance, fisher or l1_sensitivity.")
        if self.parameter_wise and self.cosine:
            raise CompressionError(
                "Weights of single parameters do not go with a cosine loss, which knows only whole rows; use l2 or l1, "
                "or leave parameter_wise out."
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what is asked for, as `Structure.objectives` lists them."""
        asked = [name for name in ("cosine", "l2", "l1", "calibrated", "sensitive") if getattr(self, name)]
        if self.importance != "none":
            asked.append("parameter_wise" if self.parameter_wise else "importance")
        return tuple(asked)

    def without_data(self) -> Objective:
        """Return the objective for when there is no text."""
        return replace(self, calibrated=False, sensitive=False, importance="none", parameter_wise=False)


OBJECTIVES = {
    "l2": Objective(l2=1.0),
    "calibrated": Objective(l2=1.0, calibrated=True),
    "sensitive": Objective(l2=1.0, calibrated=True, sensitive=True),
    "fisher": Objective(l2=1.0, importance="fisher"),
    "l1_sensitivity": Objective(l2=1.0, importance="l1_sensitivity"),
}
ALLOCATIONS = ("uniform", "by_gain")


@dataclass(frozen=True)
class Grouping:
    """Which matrices of a kind are compressed together: `layers` neighbouring layers; None for all of them."""

    layers: int | None = 1

    @classmethod
    def parse(cls, text: object) -> Grouping:
        """Read "separated", "concatenated" or "blocks:N".

        Raises:
            CompressionError: the text is none of these.
        """
        if text in ("separated", "concatenated"):
            return cls(1 if text == "separated" else None)
        if (match := re.fullmatch(r"blocks:(\d+)", str(text))) and int(match[1]) > 0:
            return cls(int(match[1]))
        raise CompressionError(
            f"The grouping '{text}' is unknown; known are separated, concatenated, and blocks:N for N neighbouring layers."
        )

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return {1: "separated", None: "concatenated"}.get(self.layers, f"blocks:{self.layers}")


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Budget:
    """How large all weights together may be, with everything in their files; one of the two.

    Attributes:
        total_ratio: 4 bytes × all parameters of the base, over the bytes of all weight files.
        max_bytes: bytes of all weight files.
    """

    total_ratio: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Reject two budgets, none, and those that nothing fits into."""
        if (self.total_ratio is None) == (self.max_bytes is None):
            raise CompressionError("A budget is either a total_ratio or max_bytes; give one of them.")
        if self.total_ratio is not None and not self.total_ratio > 1:
            raise CompressionError(
                f"The total_ratio {self.total_ratio} would not make anything smaller; it must be above 1."
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise CompressionError(f"max_bytes is {self.max_bytes}; it must be above 0, e.g. 6MB.")

    def allowed(self, parameters: int) -> int:
        """Return how many bytes the weight files of a model with so many parameters may have."""
        return self.max_bytes if self.max_bytes is not None else int(parameters * 4 / float(self.total_ratio or 1))

    def __str__(self) -> str:
        """Return the budget as it is asked for."""
        return f"total ratio {self.total_ratio:g}" if self.total_ratio else f"{self.max_bytes:,} bytes"


def parse_bytes(value: object) -> int:
    """Return bytes, from a whole number or a text such as "6MB" (of 10⁶ bytes) or "500 kB".

    Raises:
        CompressionError: it is neither.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[bB]?)\s*", str(value))
    if not match or match[2].lower() not in UNITS:
        raise CompressionError(f"The size {value!r} is unknown; give bytes, or a number with kB, MB or GB, e.g. 6MB.")
    return int(float(match[1]) * UNITS[match[2].lower()])


@dataclass(frozen=True)
class Rule:
    """What becomes of the matrices that it names."""

    structure: Structure | None = field(metadata={"help": "structure and its options; `dense` leaves them as they are"})
    objective: Objective = field(default=OBJECTIVES["l2"], metadata={"help": "what close means"})
    grouping: Grouping = field(
        default=Grouping(), metadata={"help": "separated, concatenated (a kind over all layers) or blocks:N (layers)"}
    )
    ratio: float = field(
        default=2.0, metadata={"help": "4 bytes x parameters of the chosen matrices, over the bytes stored for them"}
    )
    storage: str | None = field(
        default=None,
        metadata={"help": f"how factors are stored: {listing(FACTOR_STORAGES)}; the model's dtype if not given"},
    )
    modules: tuple[str, ...] = field(
        default=("all",), metadata={"help": "kinds, shorthands, or regular expressions that match whole module names"}
    )
    alternatives: tuple[Structure, ...] = field(
        default=(), metadata={"help": "structures that a group may have instead, if it gains more from the same bytes"}
    )
    storages: tuple[str, ...] = field(
        default=(), metadata={"help": "storages that a group may have instead, if it gains more from the same bytes"}
    )

    @property
    def structures(self) -> tuple[Structure, ...]:
        """All structures that a group may have; none where it stays dense."""
        return (self.structure, *self.alternatives) if self.structure else ()

    def __post_init__(self) -> None:
        """Reject what cannot be done, whatever the model."""
        if not self.ratio > 1:
            raise CompressionError(f"The ratio {self.ratio} would not make anything smaller; it must be above 1.")
        for storage in (self.storage, *self.storages):
            if storage is not None and storage not in FACTOR_STORAGES:
                raise CompressionError(f"The storage '{storage}' is unknown; known are {listing(FACTOR_STORAGES)}.")
        _check_selectors(self.modules)
        if (self.alternatives or self.storages) and not self.structure:
            raise CompressionError("A rule that leaves matrices dense has no alternatives; name a structure.")
        whole = [storage for storage in self.storages if storage in INTEGERS]
        if whole and (unknown := [s.title.lower() for s in self.structures if not s.known_rounding]):
            raise CompressionError(
                f"What {listing(whole)} would add to errors is not known beforehand of {unknown[0]} with these options; "
                "leave these storages out. (Of low rank it is known without an identity block.)"
            )
        for structure in self.structures:
            if not structure.shares and self.grouping.layers != 1:
                raise CompressionError(
                    f"The grouping '{self.grouping}' does not go with the structure '{structure.name}', which has nothing "
                    "that several matrices could share; use separated."
                )
            if unfit := [term for term in self.objective.terms if term not in structure.solvable()]:
                raise CompressionError(
                    f"The structure '{structure.name}' cannot be solved for {listing(unfit)}; "
                    f"its objectives are {listing(structure.solvable())}."
                )


@dataclass(frozen=True)
class Recipe:
    """A named set of choices; see docs/recipes.md."""

    name: str
    rules: tuple[Rule, ...]
    modules: tuple[str, ...] = field(
        default=DEFAULT_MODULES,
        metadata={
            "help": "which matrices to compress: kinds, shorthands, or regular expressions that match whole module names"
        },
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "who gets the bytes: uniform, every group at the ratio; or by_gain, all groups together at the ratio, "
            "each as large as pays most"
        },
    )
    budget: Budget | None = field(
        default=None, metadata={"help": "how large all weight files together may be; instead of the rules' ratios"}
    )
    rest: str | None = field(
        default=None,
        metadata={"help": f"dtype that all else is stored in: {listing(STORAGES)}; the model's if not given"},
    )
    description: str = ""
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject an empty recipe, unknown kinds, and an allocation that nothing could be measured for."""
        _check_selectors(self.modules)
        if self.allocation not in ALLOCATIONS:
            raise CompressionError(f"The allocation '{self.allocation}' is unknown; known are {listing(ALLOCATIONS)}.")
        if self.rest is not None and self.rest not in STORAGES:
            raise CompressionError(f"The storage '{self.rest}' is unknown; known are {listing(STORAGES)}.")
        if self.allocation != "by_gain" and any(rule.alternatives or rule.storages for rule in self.rules):
            raise CompressionError(
                "Alternatives and storages are chosen among by what they gain, for which the allocation must be 'by_gain'."
            )
        if self.allocation == "by_gain" and any(not s.known_gains for rule in self.rules for s in rule.structures):
            known = listing([name for name, structure in STRUCTURES.items() if structure.known_gains])
            raise CompressionError(
                f"The allocation 'by_gain' needs structures whose errors are known beforehand: {known}."
            )
        if self.allocation == "by_gain" and any(r.structure and not r.objective.sensitive for r in self.rules):
            raise CompressionError(
                "The allocation 'by_gain' needs the objective 'sensitive': only then do errors of different layers compare."
            )
        if not any(rule.structure for rule in self.rules):
            raise CompressionError(f"The recipe '{self.name}' has no rule that compresses anything.")

    @property
    def calibrated(self) -> bool:
        """Whether any rule wants calibration text."""
        return any(
            rule.objective.calibrated or rule.objective.importance != "none" for rule in self.rules if rule.structure
        )

    @property
    def sensitive(self) -> bool:
        """Whether any rule wants gradients on calibration text."""
        return any(rule.objective.sensitive for rule in self.rules if rule.structure)

    def override(
        self,
        *,
        modules: object = None,
        ratio: float | None = None,
        grouping: object = None,
        storage: str | None = None,
        allocation: str | None = None,
        total_ratio: float | None = None,
        max_bytes: int | str | None = None,
    ) -> Recipe:
        """Return the recipe with what is not None replaced, in every rule that compresses.

        A ratio takes the place of a budget for all weights, and the other way round.

        Raises:
            CompressionError: a value is not one that the field takes, or there are several budgets.
        """
        changes: dict[str, Any] = {}
        sizes = {"ratio": ratio, "total_ratio": total_ratio, "max_bytes": max_bytes}
        if len(asked := [name for name, value in sizes.items() if value is not None]) > 1:
            raise CompressionError(f"{listing(asked)} were given; they exclude each other, so give one.")
        budget = self.budget
        if ratio is not None:
            changes["ratio"], budget = real(ratio, "ratio"), None
        elif asked:
            budget = _budget({asked[0]: sizes[asked[0]]}, "The request")
        if grouping is not None:
            changes["grouping"] = grouping if isinstance(grouping, Grouping) else Grouping.parse(grouping)
        if storage is not None:
            changes |= {"storage": storage, "storages": ()}
        if allocation == "uniform":
            changes |= {"alternatives": (), "storages": ()}
        return replace(
            self,
            rules=tuple(replace(rule, **changes) if rule.structure else rule for rule in self.rules),
            modules=self.modules if modules is None else _names(modules, "modules"),
            allocation=self.allocation if allocation is None else allocation,
            budget=budget,
        )

    def without_calibration(self) -> Recipe:
        """Return the recipe for when there is no text: every objective becomes its data-free self, allocated uniformly."""
        return replace(
            self,
            allocation="uniform",
            rules=tuple(
                replace(rule, objective=rule.objective.without_data(), alternatives=(), storages=())
                for rule in self.rules
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON, in the form that `recipe_from_dict` reads."""
        return {
            "name": self.name,
            "description": self.description,
            "references": list(self.references),
            "modules": list(self.modules),
            "allocation": self.allocation,
            "budget": {key: value for key, value in asdict(self.budget).items() if value} if self.budget else None,
            "rest": self.rest,
            "rules": [
                {
                    "modules": list(rule.modules),
                    "structure": _plain(rule.structure.describe()) if rule.structure else "dense",
                    "alternatives": [_plain(structure.describe()) for structure in rule.alternatives],
                    "objective": asdict(rule.objective),
                    "grouping": str(rule.grouping),
                    "ratio": rule.ratio,
                    "storage": rule.storage,
                    "storages": list(rule.storages),
                }
                for rule in self.rules
            ],
        }


def matches(matrix: Matrix, selectors: tuple[str, ...]) -> bool:
    """Return whether kinds, shorthands or regular expressions name the matrix."""
    for selector in selectors:
        if selector in SHORTHANDS or selector in KINDS:
            if matrix.kind in SHORTHANDS.get(selector, (selector,)):
                return True
        elif re.fullmatch(selector, matrix.name):
            return True
    return False


def preset_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    folder = files(__package__) / "recipes"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """Return a preset by its name, or the recipe in a YAML file; a `Recipe` is returned as it is.

    Raises:
        CompressionError: there is no such preset or file, or the file is not a recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in preset_names():
        text, label = (files(__package__) / "recipes" / f"{recipe}.yaml").read_text("utf-8"), str(recipe)
    elif Path(recipe).is_file():
        text, label = _read(Path(recipe)), Path(recipe).name
    else:
        raise CompressionError(
            f"There is no recipe '{recipe}': it is neither a YAML file nor a preset; presets are {listing(preset_names())}."
        )
    return recipe_from_dict(read_yaml(text, f"The recipe file '{label}'"), label)


def _read(file: Path) -> str:
    """Return the beginning of a recipe file, up to what is more than one can have."""
    try:
        with file.open("rb") as stream:
            return stream.read(MOST_YAML_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressionError(f"The recipe file '{file.name}' cannot be read as UTF-8 text: {error}.") from error


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
        modules=_names(content.get("modules", DEFAULT_MODULES), "modules"),
        allocation=str(content.get("allocation", "uniform")),
        budget=_budget(content["budget"], f"The recipe '{label}'") if content.get("budget") else None,
        rest=content.get("rest"),
        description=str(content.get("description", "")),
        references=_names(content.get("references", ()), "references"),
    )


def _rule(content: object, label: str) -> Rule:
    content = _mapping(content, label, Rule)
    if "structure" not in content:
        raise CompressionError(f"{label} names no structure; known are {listing(STRUCTURES)}, and dense.")
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
            values[key] = _names(values[key], key)
    if "ratio" in values:
        values["ratio"] = real(values["ratio"], "ratio")
    return Rule(**values)


def _budget(content: object, label: str) -> Budget:
    values = _mapping(content, f"{label}'s budget", Budget)
    if values.get("max_bytes") is not None:
        values["max_bytes"] = parse_bytes(values["max_bytes"])
    if values.get("total_ratio") is not None:
        values["total_ratio"] = real(values["total_ratio"], "total_ratio")
    return Budget(**values)


def _structure(content: object, label: str) -> Structure | None:
    options = dict(content) if isinstance(content, Mapping) else {"name": content}
    name = options.pop("name", None)
    if name == "dense" and not options:
        return None
    if name not in STRUCTURES:
        raise CompressionError(
            f"{label} asks for the structure '{name}', which is unknown; known are {listing(STRUCTURES)}, and dense."
        )
    return _build(STRUCTURES[str(name)], options, f"The structure '{name}'")


def _alternatives(content: object, label: str) -> tuple[Structure, ...]:
    if not isinstance(content, list | tuple):
        raise CompressionError(f"{label} has `alternatives`: {content!r}, which is not a list of structures.")
    found = [_structure(item, label) for item in content]
    if None in found:
        raise CompressionError(f"{label} names dense as an alternative; a budget for everything allows that anyway.")
    return tuple(structure for structure in found if structure)


def _objective(content: object, label: str) -> Objective:
    if isinstance(content, str):
        if content not in OBJECTIVES:
            raise CompressionError(
                f"{label} asks for the objective '{content}', which is unknown; known are {listing(OBJECTIVES)}, or a "
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


_TYPES = {int: "a whole number", bool: "true or false", str: "a name"}


def _mapping(content: object, label: str, cls: Any) -> dict[str, Any]:
    """Return content if it is a mapping whose keys are fields of the dataclass."""
    if not isinstance(content, Mapping):
        raise CompressionError(f"{label} is not a mapping of keys to values.")
    known = [item.name for item in fields(cls)] + (["name"] if cls in STRUCTURES.values() else [])
    if unknown := [key for key in content if key not in known]:
        raise CompressionError(f"{label} has the unknown key '{unknown[0]}'; known keys are {listing(known)}.")
    return {str(key): value for key, value in content.items()}


def split_selectors(text: str | None) -> tuple[str, ...] | None:
    """Return the selectors of a text with commas between them; commas inside brackets belong to an expression."""
    return None if text is None else tuple(part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text))


def _names(content: object, label: str) -> tuple[str, ...]:
    """Return a tuple of names from a list, or from one text (`modules` may have commas in it)."""
    names = content
    if isinstance(names, str):
        names = split_selectors(names) if label == "modules" else [names]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CompressionError(f"`{label}` must be a name or a list of names, not {content!r}.")
    return tuple(name.strip() for name in names if name.strip())


def _plain(value: Any) -> Any:
    """Return nested tuples as lists, so that what is compared with JSON is what JSON gives back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_selectors(selectors: tuple[str, ...]) -> None:
    """Raise unless every selector is a kind, a shorthand, or plausibly a regular expression."""
    if not selectors:
        raise CompressionError("`modules` is empty; name at least one kind.")
    for selector in selectors:
        if selector in KINDS or selector in SHORTHANDS:
            continue
        if re.fullmatch(r"\w+", selector):
            raise CompressionError(
                f"The kind of modules '{selector}' is unknown; known are {listing((*KINDS, *SHORTHANDS))}, "
                r"or a regular expression that matches whole module names, e.g. 'encoder\.layer\.[0-5]\..*'."
            )
        check_pattern(selector)
