"""What the user asks for: frozen dataclasses, read from and written to YAML, and all their validation.

A recipe selects matrices (`modules`) and has rules; the first rule whose own `modules` include a matrix says what
becomes of it. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import CompressionError, listing
from ..foundation.arguments import real
from ..structures import FLOATS, INTEGERS, STRUCTURES, Structure
from .budget import Budget, budget_of
from .effort import EFFORTS
from .objective import OBJECTIVES, Objective
from .selectors import check_selectors, names_of
from .vocabulary import Vocabulary, vocabulary_of

STORAGES = FLOATS
FACTOR_STORAGES = (*FLOATS, *INTEGERS)
DEFAULT_MODULES = ("linears", "word_embeddings")
# The smallest preset that stays within 1 % of the dense model wherever it was measured: see the README.
DEFAULT_RECIPE = "small"


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


@dataclass(frozen=True)
class Rule:
    """How the selected matrices are compressed."""

    structure: Structure | None = field(metadata={"help": "structure and its options; `dense` leaves them as they are"})
    objective: Objective = field(default=OBJECTIVES["l2"], metadata={"help": "error measure"})
    grouping: Grouping = field(
        default=Grouping(), metadata={"help": "separated, concatenated (a kind over all layers) or blocks:N (layers)"}
    )
    ratio: float = field(
        default=2.0, metadata={"help": "4 bytes x parameters of the chosen matrices, over the bytes stored for them"}
    )
    storage: str | None = field(
        default=None,
        metadata={"help": f"how factors are stored: {listing(FACTOR_STORAGES)}; as the rest if not given"},
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
            raise CompressionError(f"The ratio {self.ratio} would not make the model smaller; it must be above 1.")
        for storage in (self.storage, *self.storages):
            if storage is not None and storage not in FACTOR_STORAGES:
                raise CompressionError(f"The storage '{storage}' is unknown; known are {listing(FACTOR_STORAGES)}.")
        check_selectors(self.modules)
        if (self.alternatives or self.storages) and not self.structure:
            raise CompressionError("A rule that leaves matrices dense has no alternatives; name a structure.")
        whole = [storage for storage in self.storages if storage in INTEGERS]
        if whole and (unknown := [s.title.lower() for s in self.structures if not s.known_rounding]):
            raise CompressionError(
                f"The error that {listing(whole)} would add is not known in advance for {unknown[0]} here; "
                "leave these storages out. (For low_rank it is known without an identity block.)"
            )
        for structure in self.structures:
            if not structure.shares and self.grouping.layers != 1:
                raise CompressionError(
                    f"The grouping '{self.grouping}' cannot be used with the structure '{structure.name}', which "
                    "has nothing to share between matrices; use separated."
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
            "help": "how bytes are distributed: uniform, every group at the ratio; or by_gain, all groups together at the ratio, "
            "each sized for the least total error"
        },
    )
    budget: Budget | None = field(
        default=None, metadata={"help": "how large all weight files together may be; instead of the rules' ratios"}
    )
    effort: str = field(
        default="default",
        metadata={
            "help": "fast: bytes follow predicted losses; default: they are allocated again after measuring, and layers are "
            "coded in order; best: the same with more text, several times"
        },
    )
    rest: str | None = field(
        default=None,
        metadata={
            "help": f"dtype of everything that is not compressed: {listing(STORAGES)}; the model's if not given, with a "
            "budget float16 for float32"
        },
    )
    vocabulary: Vocabulary | None = field(
        default=None,
        metadata={
            "help": "prune the tokens that do not occur in this text: bundled, a file with one text per line, or a dataset name"
        },
    )
    description: str = ""
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject an empty recipe, unknown kinds, and an allocation that nothing could be measured for."""
        check_selectors(self.modules)
        if self.allocation not in ALLOCATIONS:
            raise CompressionError(f"The allocation '{self.allocation}' is unknown; known are {listing(ALLOCATIONS)}.")
        if self.effort not in EFFORTS:
            raise CompressionError(f"The effort '{self.effort}' is unknown; known are {listing(EFFORTS)}.")
        if self.rest is not None and self.rest not in STORAGES:
            raise CompressionError(f"The storage '{self.rest}' is unknown; known are {listing(STORAGES)}.")
        if self.allocation != "by_gain" and any(rule.alternatives or rule.storages for rule in self.rules):
            raise CompressionError("Alternatives and storages are chosen by gain, so the allocation must be 'by_gain'.")
        if self.allocation == "by_gain" and any(not s.known_gains for rule in self.rules for s in rule.structures):
            known = listing([name for name, structure in STRUCTURES.items() if structure.known_gains])
            raise CompressionError(
                f"The allocation 'by_gain' needs structures whose errors are known beforehand: {known}."
            )
        if self.allocation == "by_gain" and any(r.structure and not r.objective.sensitive for r in self.rules):
            raise CompressionError(
                "The allocation 'by_gain' needs the objective 'sensitive': only then are errors of different layers comparable."
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
        vocabulary: object = None,
        vocabulary_size: int | None = None,
        vocabulary_coverage: float | None = None,
        effort: str | None = None,
    ) -> Recipe:
        """Return the recipe with what is not None replaced, in every rule that compresses.

        A ratio takes the place of a budget for all weights, and the other way round; a vocabulary's size that of a coverage.

        Raises:
            CompressionError: a value is not one that the field takes, or there are several budgets.
        """
        changes: dict[str, Any] = {}
        sizes = {"ratio": ratio, "total_ratio": total_ratio, "max_bytes": max_bytes}
        if len(asked := [name for name, value in sizes.items() if value is not None]) > 1:
            raise CompressionError(f"{listing(asked)} were given; they exclude each other, so give only one.")
        budget = self.budget
        if ratio is not None:
            changes["ratio"], budget = real(ratio, "ratio"), None
        elif asked:
            budget = budget_of(**{asked[0]: sizes[asked[0]]})
        if grouping is not None:
            changes["grouping"] = grouping if isinstance(grouping, Grouping) else Grouping.parse(grouping)
        if storage is not None:
            changes |= {"storage": storage, "storages": ()}
        if allocation == "uniform":
            changes |= {"alternatives": (), "storages": ()}
        return replace(
            self,
            rules=tuple(replace(rule, **changes) if rule.structure else rule for rule in self.rules),
            modules=self.modules if modules is None else names_of(modules, "modules"),
            allocation=self.allocation if allocation is None else allocation,
            budget=budget,
            vocabulary=self._vocabulary(vocabulary, vocabulary_size, vocabulary_coverage),
            effort=self.effort if effort is None else effort,
        )

    def _vocabulary(self, text: object, size: object, coverage: object) -> Vocabulary | None:
        """Return what is asked of the vocabulary, with what is not None replaced."""
        if text is None and size is None and coverage is None:
            return self.vocabulary
        own = self.vocabulary
        if own is not None and size is None and coverage is None:
            size, coverage = own.size, own.coverage
        return vocabulary_of(own.text if own is not None and text is None else text, size, coverage)

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
            "effort": self.effort,
            "rest": self.rest,
            **({"vocabulary": self.vocabulary.to_dict()} if self.vocabulary else {}),
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


def _plain(value: Any) -> Any:
    """Return nested tuples as lists, so that what is compared with JSON is what JSON gives back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
