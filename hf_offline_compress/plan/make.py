"""Recipe + base config → plan: which matrices form groups, how large each is stored, what stays dense and why.

A plan needs no weights and no torch: it is the dry run, and what `compress` starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ..architectures.families import KINDS, SHORTHANDS, architecture_of, family_of
from ..architectures.layout import Matrix, ParameterLayout
from ..errors import BudgetTooSmallError, CompressionError, listing
from ..request.recipe import STORAGES, Recipe, Rule
from ..request.selectors import matches
from ..structures import INTEGERS
from .groups import FLOAT32, Dense, Group, Plan, shape_of

# Heads that predict only from several inputs at once.
SEVERAL_INPUTS = ("MultipleChoice", "DoubleHeadsModel")
_TOO_SMALL = "would not shrink"
# Bounds of the search for the one ratio at which everything fits into a budget.
RATIOS = (1.0, 4096.0)


def make_plan(
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    wider: Mapping[str, str] | None = None,
    layout: ParameterLayout | None = None,
) -> Plan:
    """Return the plan of `recipe` for the model that `config` describes.

    Args:
        config: the contents of the base's config.json.
        recipe: what is asked for.
        architecture: stock class of the base; by default the one that the config names.
        dtype: of the compressed model; by default the config's, or float32 if it names none.
        wider: what needs a wider dtype than planned, known once the weights are; see `Plan`.
        layout: of the base, where the model is at hand; by default that of the config.

    Raises:
        CompressionError: the architecture is not supported, nothing matches, or nothing would shrink.
    """
    family = family_of(config)
    architecture = architecture or architecture_of(config, family)
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = (dtype or own.replace("float64", "float32")).removeprefix("torch.")
    if dtype not in STORAGES:
        raise CompressionError(f"The dtype '{dtype}' is not supported; supported are {listing(STORAGES)}.")
    if layout is None:
        from ..architectures.stock import layout_of_config  # which imports torch

        layout = layout_of_config(config, architecture)
    _check_matches(recipe, layout, architecture)
    _check_ratios(recipe, dtype)
    _check_importance(recipe, architecture, family.base_class)

    grouped, dense = _grouped(recipe, layout)
    for rule, matrices in grouped:
        for structure in rule.structures:
            structure.check(shape_of(matrices))
    # What half precision loses of the other tensors is negligible if most weights are kept in few bits.
    rest = recipe.rest or ("float16" if recipe.budget and dtype == "float32" else dtype)
    draft = Plan(family.model_type, architecture, dtype, recipe, layout, (), (), rest, wider or {})
    if recipe.budget:
        return _within_budget(draft, grouped, dense)
    return _sized_plan(draft, grouped, dense, None)


def _sized_plan(
    draft: Plan, grouped: Sequence[tuple[Rule, tuple[Matrix, ...]]], dense: Sequence[Dense], ratio: float | None
) -> Plan:
    """Return the draft with each group as large as its rule's ratio allows, or one ratio for all.

    With one ratio for all, groups that would be too small get their smallest size.

    Raises:
        CompressionError: nothing would shrink.
    """
    groups: list[Group] = []
    dense = list(dense)
    for rule, matrices in grouped:
        group = _sized(rule, matrices, draft, ratio)
        if isinstance(group, Group):
            groups.append(group)
        else:
            dense += [Dense(matrix.name, matrix.rows * matrix.columns, group) for matrix in matrices]
    if not groups:
        closest = next((item for item in dense if item.reason.startswith(_TOO_SMALL)), dense[0])
        raise CompressionError(f"Nothing would shrink: {closest.name} {closest.reason}. Pass another ratio.")
    total = draft.layout.total
    dense += [Dense(name, prod(shape), "is of no kind") for name, shape in draft.layout.unknown.items()]
    rest = total - sum(group.parameters for group in groups) - sum(item.parameters for item in dense)
    dense.append(Dense("everything else", rest, "norms and biases"))
    return replace(draft, groups=tuple(groups), dense=tuple(dense))


def _within_budget(draft: Plan, grouped: Sequence[tuple[Rule, tuple[Matrix, ...]]], dense: Sequence[Dense]) -> Plan:
    """Return the plan at the one ratio for all groups at which it is largest within the budget.

    Raises:
        BudgetTooSmallError: it is too large even with every group at its smallest.
    """
    budget = draft.recipe.budget
    assert budget is not None
    allowed = budget.allowed(draft.layout.total)
    low, high = RATIOS
    smallest = _sized_plan(draft, grouped, dense, high)
    if smallest.file_bytes > allowed:
        least, ratio = smallest.file_bytes, draft.layout.total * FLOAT32 / smallest.file_bytes
        raise BudgetTooSmallError(
            f"The budget of {budget} ({allowed:,} bytes) is too small: with every chosen matrix at its smallest, the weights "
            f"take {least:,} bytes (total ratio {ratio:.1f}). Ask for at least that, or choose more modules.",
            ratio,
        )
    best = smallest
    for _ in range(40):
        middle = (low * high) ** 0.5
        plan = _sized_plan(draft, grouped, dense, middle)
        if plan.file_bytes <= allowed:
            best, high = plan, middle
        else:
            low = middle
    return best


def _check_matches(recipe: Recipe, layout: ParameterLayout, architecture: str) -> None:
    """Raise if a selector that the user wrote names no matrix of this model."""
    # A rule may be for kinds that some architectures do not have, such as position embeddings.
    ruled = {name for rule in recipe.rules for name in rule.modules} - {*KINDS, *SHORTHANDS}
    for selector in {*recipe.modules} | ruled:
        if not any(matches(matrix, (selector,)) for matrix in layout.matrices):
            present = listing(dict.fromkeys(matrix.kind for matrix in layout.matrices))
            raise CompressionError(f"'{selector}' matches no weight matrix of this {architecture}; it has {present}.")


def _check_ratios(recipe: Recipe, dtype: str) -> None:
    """Raise if a ratio is no more than what the model's own dtype already gives."""
    own = FLOAT32 / STORAGES[dtype]
    if recipe.rest not in (None, dtype) and dtype != "float32":
        raise CompressionError(
            f"The rest cannot be stored in {recipe.rest}: the model is in {dtype}, and a loaded model has one dtype. "
            "Leave `rest` out, or pass dtype='float32'."
        )
    for rule in recipe.rules:
        if rule.structure and rule.ratio <= own and not recipe.budget:
            raise CompressionError(
                f"Nothing would shrink at ratio {rule.ratio:g}: ratios count from float32, and the model, stored in {dtype}, "
                f"is at {own:g} already. Ask for a larger one, e.g. ratio {2 * own:g}."
            )
        others = [s for s in (rule.storage, *rule.storages) if s not in (None, dtype, *INTEGERS)]
        if rule.structure and others and dtype != "float32":
            raise CompressionError(
                f"The storage '{others[0]}' does not fit a model in {dtype}: a loaded model has one dtype. "
                f"Ask for the storage '{dtype}' or for integers, or pass dtype='float32'."
            )


def _check_importance(recipe: Recipe, architecture: str, base_class: str) -> None:
    """Raise if an importance is asked for and the model predicts nothing."""
    asked = [r.objective.importance for r in recipe.rules if r.structure and r.objective.importance != "none"]
    if asked and (architecture == base_class or architecture.endswith(SEVERAL_INPUTS)):
        raise no_head(asked[0], architecture)


def no_head(importance: str, architecture: str) -> CompressionError:
    """Return the error for a stock class that predicts nothing to take an importance from."""
    return CompressionError(
        f"The importance '{importance}' needs a language model's head or a task's, and {architecture} has none that "
        "predicts on plain text; pass a checkpoint with such a head, choose one with auto_class, or take another objective."
    )


def _grouped(recipe: Recipe, layout: ParameterLayout) -> tuple[list[tuple[Rule, tuple[Matrix, ...]]], list[Dense]]:
    """Return the matrices that rules apply to, in the groups that the rules ask for, and what stays dense."""
    dense: list[Dense] = []
    found: dict[tuple[Any, ...], list[Matrix]] = {}
    for matrix in layout.matrices:
        index = next((i for i, rule in enumerate(recipe.rules) if matches(matrix, rule.modules)), None)
        rule = recipe.rules[index] if index is not None else None
        if not matches(matrix, recipe.modules) or rule is None or rule.structure is None:
            reason = "was left out by a rule" if rule and rule.structure is None else "was not chosen"
            dense.append(Dense(matrix.name, matrix.rows * matrix.columns, reason))
            continue
        layers = rule.grouping.layers
        # Matrices outside the layers have no others of their kind and shape: each is a group of its own.
        block = matrix.name if matrix.layer is None else (matrix.layer // layers if layers else 0)
        found.setdefault((index, matrix.kind, block), []).append(matrix)
    return [(recipe.rules[key[0]], tuple(matrices)) for key, matrices in found.items()], dense


def _sized(rule: Rule, matrices: tuple[Matrix, ...], draft: Plan, ratio: float | None) -> Group | str:
    """Return the largest group within the rule's ratio, or the reason for which the matrices stay dense.

    With a `ratio` for all groups, groups that are too large for it even at their smallest size get that size.
    """
    structure = rule.structure
    assert structure is not None
    storage, shape = draft.storage(rule.storage, _name(matrices)), shape_of(matrices)
    if shape.rows < structure.least_rows:
        return f"{_TOO_SMALL}: a {structure.title.lower()} needs {structure.least_rows} rows"
    dense = draft.dense_bytes(matrices)
    size = structure.fit(shape, int(shape.parameters * FLOAT32 / (ratio or rule.ratio)), storage)
    if ratio is None and size == 0:
        return (
            f"{_TOO_SMALL}: even the smallest {structure.title.lower()} ({structure.unit} {structure.minimum}) is larger "
            f"than ratio {rule.ratio:g} allows"
        )
    if ratio is not None:
        size = max(size, structure.minimum)
        if structure.stored_bytes(size, shape, storage) >= dense:
            size = structure.fit(shape, dense - 1, storage)
        if size == 0:
            return f"{_TOO_SMALL}: even the smallest {structure.title.lower()} is larger than the matrix itself"
    return Group(_name(matrices), rule, matrices, size, storage)


def _name(matrices: tuple[Matrix, ...]) -> str:
    first, last = matrices[0], matrices[-1]
    if first.layer is None:
        several = first.kind in ("head", "embedding_projection")
        return f"{first.kind}_{first.module.replace('.', '_')}" if several else first.kind
    return f"{first.kind}_{first.layer}" if len(matrices) == 1 else f"{first.kind}_{first.layer}_{last.layer}"
