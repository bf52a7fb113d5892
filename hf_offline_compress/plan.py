"""Recipe + base config → plan: which matrices form groups, how large each is stored, what stays dense and why.

A plan needs no weights and no torch: it is the dry run, and what `compress` then does to the letter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from .errors import CompressionError, listing
from .families import KINDS, SHORTHANDS, Matrix, Skeleton, architecture_of, family_of
from .recipe import STORAGES, Recipe, Rule, matches
from .structures import INTEGERS, ITEM_BYTES, GroupShape, Shape, Size, Storage, Stored, Structure

FORMAT_VERSION = 5
DECODERS = "compression_decoders"
FLOAT32 = 4
# Heads that predict only from several inputs at once.
SEVERAL_INPUTS = ("MultipleChoice", "DoubleHeadsModel")
_TOO_SMALL = "would not shrink"
# What safetensors files call dtypes. Tensors lie there by their dtypes, the last of these first, and then by their names.
DTYPES = {"uint8": "U8", "int16": "I16", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Between these the ratio is looked for at which everything together fits into a budget.
RATIOS = (1.0, 4096.0)


@dataclass(frozen=True)
class Group:
    """Matrices that are compressed together.

    Attributes:
        name: unique in the plan; also the name of the decoder that its members share.
        rule: the recipe's rule that made it.
        matrices: the members, of one kind and one number of columns.
        size: rank, latent width, or whatever the structure counts.
        storage: how its numbers are kept.
    """

    name: str
    rule: Rule
    matrices: tuple[Matrix, ...]
    size: Size
    storage: Storage

    @property
    def structure(self) -> Structure:
        """The structure of the rule."""
        assert self.rule.structure is not None
        return self.rule.structure

    @property
    def shape(self) -> GroupShape:
        """What sizes depend on."""
        return shape_of(self.matrices)

    @property
    def rows(self) -> int:
        """Rows of all members together."""
        return self.shape.all_rows

    @property
    def columns(self) -> int:
        """Columns of every member."""
        return self.shape.columns

    @property
    def parameters(self) -> int:
        """Number of weights that the group stands for."""
        return self.shape.parameters

    @property
    def stored_bytes(self) -> int:
        """Bytes that are stored for the group."""
        return self.structure.stored_bytes(self.size, self.shape, self.storage)

    @property
    def shown_size(self) -> float:
        """The size as reports have it."""
        return self.structure.shown(self.size, self.shape)

    @property
    def ratio(self) -> float:
        """4 bytes × parameters, over the bytes stored."""
        return self.parameters * FLOAT32 / self.stored_bytes

    @property
    def shared(self) -> bool:
        """Whether the decoder belongs to several members and lies in the base model."""
        return len(self.matrices) > 1

    def runtime(self) -> dict[str, Any]:
        """Return what the runtime layers are built from, as plain JSON."""
        tensors = [of(self.size, self.shape) for of in (self.structure.member_tensors, self.structure.decoder_tensors)]
        return {**self.structure.runtime(self.size, self.shape), **self.storage.runtime(*tensors)}

    def member_tensors(self, matrix: Matrix, prefix: str) -> dict[str, Stored]:
        """Return the tensors of one member's own, by full name."""
        at = matrix.full_name(prefix)
        own = self.storage.kept(self.structure.member_tensors(self.size, self.shape))
        return {f"{at}.{name}": tensor for name, tensor in own.items()}

    def decoder_tensors(self, prefix: str) -> dict[str, Stored]:
        """Return the tensors that decode the members, by full name."""
        only = self.matrices[0]
        at = f"{prefix}{DECODERS}.{self.name}" if self.shared else f"{only.full_name(prefix)}.decoder"
        tensors = self.storage.kept(self.structure.decoder_tensors(self.size, self.shape))
        return {f"{at}.{name}": tensor for name, tensor in tensors.items()}


def shape_of(matrices: tuple[Matrix, ...]) -> GroupShape:
    """Return the shape of a group of these matrices.

    Raises:
        CompressionError: they are not of one shape.
    """
    first = matrices[0]
    for other in matrices[1:]:
        if (other.rows, other.columns) != (first.rows, first.columns):
            raise CompressionError(
                f"{first.name} [{first.rows}, {first.columns}] and {other.name} [{other.rows}, {other.columns}] are not of "
                "one shape, so they cannot be compressed together; use the grouping separated."
            )
    return GroupShape(len(matrices), first.rows, first.columns, first.heads, first.embedding)


@dataclass(frozen=True)
class Dense:
    """Parameters that stay as they are, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What becomes of every parameter of a model.

    Attributes:
        model_type: of the base, e.g. "bert".
        architecture: stock class of the base.
        dtype: of the model, and so of what stays dense.
        recipe: what was asked for.
        skeleton: all parameters of the base.
        groups: what is compressed.
        dense: what is not.
        rest: dtype that all else is stored in.
        wider: names of groups, and full names of tensors of all else, whose numbers the planned dtype does not hold → the
            dtype that they have instead.
    """

    model_type: str
    architecture: str
    dtype: str
    recipe: Recipe
    skeleton: Skeleton
    groups: tuple[Group, ...]
    dense: tuple[Dense, ...]
    rest: str
    wider: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line."""
        return (
            f"<Plan: {self.architecture} with recipe {self.recipe.name}, {len(self.groups)} groups, "
            f"{self.file_bytes / 1e6:.2f} MB>"
        )

    @property
    def parameters(self) -> int:
        """Number of weights in the chosen matrices."""
        return sum(group.parameters for group in self.groups)

    @property
    def stored_bytes(self) -> int:
        """Bytes stored for the chosen matrices."""
        return sum(group.stored_bytes for group in self.groups)

    @property
    def ratio(self) -> float:
        """4 bytes × the chosen matrices' parameters, over the bytes stored for them."""
        return self.parameters * FLOAT32 / self.stored_bytes

    @property
    def total_stored_bytes(self) -> int:
        """Bytes of all tensors of the compressed model, without file headers."""
        dense = sum(prod(shape) * STORAGES[dtype] for shape, dtype in self.rest_tensors().values())
        return self.stored_bytes + dense

    @property
    def file_bytes(self) -> int:
        """Bytes of the one weight file, its header included, as the safetensors library writes it."""
        tensors = self.tensors() | self.rest_tensors()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
        itemsizes = STORAGES | ITEM_BYTES
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-ranks[item[1][1]], item[0])):
            start, end = end, end + prod(shape) * itemsizes[dtype]
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        length = len(json.dumps(header, separators=(",", ":")))
        return 8 + length + -length % 8 + end

    def rest_tensors(self) -> dict[str, tuple[Shape, str]]:
        """Return full name → shape and dtype of every tensor that is stored for all else; parts of fused layers apart."""
        chosen = [matrix for group in self.groups for matrix in group.matrices]
        prefix = self.skeleton.prefix
        gone = {f"{matrix.full_module(prefix)}.weight" for matrix in chosen}
        rest = {name: shape for name, shape in self.skeleton.parameters.items() if name not in gone}
        for matrix in self.skeleton.fused_with(chosen):
            if matrix.bias:
                rest.pop(f"{matrix.full_module(prefix)}.bias", None)
                rest[f"{matrix.full_name(prefix)}.bias"] = (matrix.rows,)
            if matrix not in chosen:
                rest[f"{matrix.full_name(prefix)}.weight"] = (matrix.rows, matrix.columns)
        return {name: (shape, self.wider.get(name, self.rest)) for name, shape in rest.items()}

    def dense_bytes(self, matrices: tuple[Matrix, ...]) -> int:
        """Return how many bytes matrices take that stay dense."""
        names = [f"{m.full_name(self.skeleton.prefix)}.weight" for m in matrices]
        return sum(
            m.rows * m.columns * STORAGES[self.wider.get(name, self.rest)]
            for m, name in zip(matrices, names, strict=True)
        )

    @property
    def total_ratio(self) -> float:
        """4 bytes × all parameters of the base, over the bytes of all tensors of the compressed model."""
        return self.skeleton.total * FLOAT32 / self.total_stored_bytes

    def tensors(self) -> dict[str, tuple[Shape, str]]:
        """Return full name → shape and dtype of every tensor that is stored for the chosen matrices."""
        names: dict[str, tuple[Shape, str]] = {}
        for group in self.groups:
            stored = group.decoder_tensors(self.skeleton.prefix)
            for matrix in group.matrices:
                stored |= group.member_tensors(matrix, self.skeleton.prefix)
            names |= {name: (tensor.shape, tensor.dtype or group.storage.dtype) for name, tensor in stored.items()}
        return names

    def storage(self, name: str | None, group: str) -> Storage:
        """Return a group's storage by the name that a recipe has for it; without one, that of all else."""
        # Scales are few beside what they scale, but not so few that half precision would not pay.
        storage = Storage.named(name or self.rest, "float16" if self.dtype == "float32" else self.dtype)
        return replace(storage, dtype=self.wider[group]) if group in self.wider else storage

    def forms(self, group: Group) -> list[Group]:
        """Return a group in every structure and storage, and at every whole size, that its rule allows."""
        rule, forms = group.rule, []
        for structure in (s for s in rule.structures if group.shape.rows >= s.least_rows):
            sizes = range(structure.minimum, structure.limit(group.shape) + 1)
            for name in (rule.storage, *rule.storages):
                own = replace(rule, structure=structure, alternatives=(), storage=name, storages=())
                variant = replace(group, rule=own, storage=self.storage(name, group.name))
                forms += [replace(variant, size=size) for size in sizes]
        return forms

    def reformed(self, forms: Mapping[str, Group | None]) -> Plan:
        """Return the plan with other forms of its groups, by name; None leaves a group's matrices dense."""
        kept = tuple(form for group in self.groups if (form := forms.get(group.name, group)) is not None)
        dense = [
            Dense(matrix.name, matrix.rows * matrix.columns, "gains most by staying dense")
            for group in self.groups
            if forms.get(group.name, group) is None
            for matrix in group.matrices
        ]
        *others, everything_else = self.dense
        return replace(self, groups=kept, dense=(*others, *dense, everything_else))

    def runtime(self) -> dict[str, Any]:
        """Return the plan as the config carries it: plain JSON, all that the runtime needs to build the modules."""
        groups = {}
        for group in self.groups:
            members = []
            for matrix in group.matrices:
                member: dict[str, Any] = {"module": matrix.module}
                if matrix.part:
                    member["part"] = matrix.part
                if not matrix.in_base:
                    member["head"] = True
                members.append(member)
            groups[group.name] = {
                **group.runtime(),
                "shared": group.shared,
                "members": members,
            }
        return {
            "format_version": FORMAT_VERSION,
            "decoding": "cached",
            "rest": self.rest,
            "absent": list(self.skeleton.absent),
            "groups": groups,
        }


def make_plan(
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    wider: Mapping[str, str] | None = None,
    skeleton: Skeleton | None = None,
) -> Plan:
    """Return what `recipe` makes of the model that `config` describes.

    Args:
        config: the contents of the base's config.json.
        recipe: what is asked for.
        architecture: stock class of the base; by default the one that the config names.
        dtype: of the compressed model; by default the config's, and float32 where that says nothing.
        wider: what needs a wider dtype than planned, known once the weights are; see `Plan`.
        skeleton: of the base, where the model is at hand; by default that of the config.

    Raises:
        CompressionError: the architecture is not supported, nothing matches, or nothing would shrink.
    """
    family = family_of(config)
    architecture = architecture or architecture_of(config, family)
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = (dtype or own.replace("float64", "float32")).removeprefix("torch.")
    if dtype not in STORAGES:
        raise CompressionError(f"The dtype '{dtype}' is not supported; supported are {listing(STORAGES)}.")
    skeleton = skeleton or family.skeleton(config, architecture)
    _check_matches(recipe, skeleton, architecture)
    _check_ratios(recipe, dtype)
    _check_importance(recipe, architecture, family.base_class)

    grouped, dense = _grouped(recipe, skeleton)
    for rule, matrices in grouped:
        for structure in rule.structures:
            structure.check(shape_of(matrices))
    # Numbers that a float32 model's tensors have beyond half precision say little, where all else is kept in few bits.
    rest = recipe.rest or ("float16" if recipe.budget and dtype == "float32" else dtype)
    draft = Plan(family.model_type, architecture, dtype, recipe, skeleton, (), (), rest, wider or {})
    if recipe.budget:
        return _within_budget(draft, grouped, dense)
    return _sized_plan(draft, grouped, dense, None)


def _sized_plan(
    draft: Plan, grouped: Sequence[tuple[Rule, tuple[Matrix, ...]]], dense: Sequence[Dense], ratio: float | None
) -> Plan:
    """Return the draft with each group as large as its rule's ratio allows, or one ratio for all.

    Where there is one for all, groups that would be too small have their smallest size.

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
        raise CompressionError(f"Nothing would shrink: {closest.name} {closest.reason}. Ask for another ratio.")
    total = draft.skeleton.total
    dense += [Dense(name, prod(shape), "is of no kind") for name, shape in draft.skeleton.unknown.items()]
    rest = total - sum(group.parameters for group in groups) - sum(item.parameters for item in dense)
    dense.append(Dense("everything else", rest, "norms and biases"))
    return replace(draft, groups=tuple(groups), dense=tuple(dense))


def _within_budget(draft: Plan, grouped: Sequence[tuple[Rule, tuple[Matrix, ...]]], dense: Sequence[Dense]) -> Plan:
    """Return the plan at the one ratio for all groups at which it is largest within the budget.

    Raises:
        CompressionError: it is too large even with every group at its smallest.
    """
    budget = draft.recipe.budget
    assert budget is not None
    allowed = budget.allowed(draft.skeleton.total)
    low, high = RATIOS
    smallest = _sized_plan(draft, grouped, dense, high)
    if smallest.file_bytes > allowed:
        least, ratio = smallest.file_bytes, draft.skeleton.total * FLOAT32 / smallest.file_bytes
        raise CompressionError(
            f"The budget of {budget} ({allowed:,} bytes) cannot be kept: with every chosen matrix at its smallest the weights "
            f"have {least:,} bytes (total ratio {ratio:.1f}). Ask for no less, or choose more modules."
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


def _check_matches(recipe: Recipe, skeleton: Skeleton, architecture: str) -> None:
    """Raise if a selector that the user wrote names no matrix of this model."""
    # A rule may be for kinds that some architectures do not have, such as position embeddings.
    ruled = {name for rule in recipe.rules for name in rule.modules} - {*KINDS, *SHORTHANDS}
    for selector in {*recipe.modules} | ruled:
        if not any(matches(matrix, (selector,)) for matrix in skeleton.matrices):
            present = listing(dict.fromkeys(matrix.kind for matrix in skeleton.matrices))
            raise CompressionError(f"'{selector}' matches no weight matrix of this {architecture}; it has {present}.")


def _check_ratios(recipe: Recipe, dtype: str) -> None:
    """Raise if a ratio is no more than what the model's own dtype already gives."""
    own = FLOAT32 / STORAGES[dtype]
    if recipe.rest not in (None, dtype) and dtype != "float32":
        raise CompressionError(
            f"All else cannot be stored in {recipe.rest}: the model is in {dtype}, and a loaded model has one dtype. "
            "Leave `rest` out, or pass dtype='float32'."
        )
    for rule in recipe.rules:
        if rule.structure and rule.ratio <= own and not recipe.budget:
            raise CompressionError(
                f"Nothing would shrink at ratio {rule.ratio:g}: ratios count from float32, and the model, stored in {dtype}, "
                f"is at {own:g} already. Ask for more, e.g. ratio {2 * own:g}."
            )
        others = [s for s in (rule.storage, *rule.storages) if s not in (None, dtype, *INTEGERS)]
        if rule.structure and others and dtype != "float32":
            raise CompressionError(
                f"The storage '{others[0]}' does not go with a model in {dtype}: a loaded model has one dtype. "
                "Leave the storage out, or pass dtype='float32'."
            )


def _check_importance(recipe: Recipe, architecture: str, base_class: str) -> None:
    """Raise if gradients of predictions are asked for where nothing is predicted."""
    asked = [r.objective.importance for r in recipe.rules if r.structure and r.objective.importance != "none"]
    if asked and (architecture == base_class or architecture.endswith(SEVERAL_INPUTS)):
        raise no_head(asked[0], architecture)


def no_head(importance: str, architecture: str) -> CompressionError:
    """Return the error that a stock class predicts nothing that the importance could be taken from."""
    return CompressionError(
        f"The importance '{importance}' needs a language model's head or a task's, and {architecture} has none that "
        "predicts on plain text; pass a checkpoint with such a head, choose one with auto_class, or take another objective."
    )


def _grouped(recipe: Recipe, skeleton: Skeleton) -> tuple[list[tuple[Rule, tuple[Matrix, ...]]], list[Dense]]:
    """Return the matrices that rules apply to, in the groups that the rules ask for, and what stays dense."""
    dense: list[Dense] = []
    found: dict[tuple[Any, ...], list[Matrix]] = {}
    for matrix in skeleton.matrices:
        index = next((i for i, rule in enumerate(recipe.rules) if matches(matrix, rule.modules)), None)
        rule = recipe.rules[index] if index is not None else None
        if not matches(matrix, recipe.modules) or rule is None or rule.structure is None:
            reason = "was left out by a rule" if rule and rule.structure is None else "was not chosen"
            dense.append(Dense(matrix.name, matrix.rows * matrix.columns, reason))
            continue
        layers = rule.grouping.layers
        # What lies outside the layers has no neighbours of its kind and shape: it is a group by itself.
        block = matrix.name if matrix.layer is None else (matrix.layer // layers if layers else 0)
        found.setdefault((index, matrix.kind, block), []).append(matrix)
    return [(recipe.rules[key[0]], tuple(matrices)) for key, matrices in found.items()], dense


def _sized(rule: Rule, matrices: tuple[Matrix, ...], draft: Plan, ratio: float | None) -> Group | str:
    """Return the largest group within the rule's ratio, or the reason for which the matrices stay dense.

    With a `ratio` for all groups, what is too large for it at its smallest gets that.
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
