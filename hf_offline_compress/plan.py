"""Recipe + base config → plan: which matrices form groups, how large each is stored, what stays dense and why.

A plan needs no weights and no torch: it is the dry run, and what `compress` then does to the letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import CompressionError, listing
from .families import Matrix, Skeleton, architecture_of, family_of
from .recipe import STORAGES, Recipe, Rule, matches
from .structures import GroupShape, Shape, Stored, Structure

FORMAT_VERSION = 1
DECODERS = "compression_decoders"
FLOAT32 = 4
# Heads that predict only from several inputs at once.
SEVERAL_INPUTS = ("MultipleChoice", "DoubleHeadsModel")
_TOO_SMALL = "would not shrink"


@dataclass(frozen=True)
class Group:
    """Matrices that are compressed together.

    Attributes:
        name: unique in the plan; also the name of the decoder that its members share.
        rule: the recipe's rule that made it.
        matrices: the members, of one kind and one number of columns.
        size: rank, latent width, or whatever the structure counts.
        storage: dtype of the stored numbers.
    """

    name: str
    rule: Rule
    matrices: tuple[Matrix, ...]
    size: int
    storage: str

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
        return self.structure.stored_bytes(self.size, self.shape, STORAGES[self.storage])

    @property
    def ratio(self) -> float:
        """4 bytes × parameters, over the bytes stored."""
        return self.parameters * FLOAT32 / self.stored_bytes

    @property
    def shared(self) -> bool:
        """Whether the decoder belongs to several members and lies in the base model."""
        return len(self.matrices) > 1

    def member_tensors(self, matrix: Matrix, prefix: str) -> dict[str, Stored]:
        """Return the tensors of one member's own, by full name."""
        at = f"{prefix if matrix.in_base else ''}{matrix.name}"
        own = self.structure.member_tensors(self.size, self.shape)
        return {f"{at}.{name}": tensor for name, tensor in own.items()}

    def decoder_tensors(self, prefix: str) -> dict[str, Stored]:
        """Return the tensors that decode the members, by full name."""
        only = self.matrices[0]
        at = (
            f"{prefix}{DECODERS}.{self.name}" if self.shared else f"{prefix if only.in_base else ''}{only.name}.decoder"
        )
        tensors = self.structure.decoder_tensors(self.size, self.shape)
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
    """

    model_type: str
    architecture: str
    dtype: str
    recipe: Recipe
    skeleton: Skeleton
    groups: tuple[Group, ...]
    dense: tuple[Dense, ...]

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
        dense = self.skeleton.total - self.parameters
        return self.stored_bytes + dense * STORAGES[self.dtype]

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
            names |= {name: (tensor.shape, tensor.dtype or group.storage) for name, tensor in stored.items()}
        return names

    def resized(self, sizes: Mapping[str, int]) -> Plan:
        """Return the plan with other sizes of its groups, by name."""
        return replace(self, groups=tuple(replace(group, size=sizes[group.name]) for group in self.groups))

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
                **group.structure.runtime(group.size, group.shape),
                "storage": group.storage,
                "shared": group.shared,
                "members": members,
            }
        return {"format_version": FORMAT_VERSION, "decoding": "cached", "groups": groups}


def make_plan(
    config: Mapping[str, Any], recipe: Recipe, *, architecture: str | None = None, dtype: str | None = None
) -> Plan:
    """Return what `recipe` makes of the model that `config` describes.

    Args:
        config: the contents of the base's config.json.
        recipe: what is asked for.
        architecture: stock class of the base; by default the one that the config names.
        dtype: of the compressed model; by default the config's, and float32 where that says nothing.

    Raises:
        CompressionError: the architecture is not supported, nothing matches, or nothing would shrink.
    """
    family = family_of(config)
    architecture = architecture or architecture_of(config, family)
    dtype = str(dtype or config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in STORAGES:
        raise CompressionError(f"The dtype '{dtype}' is not supported; supported are {listing(STORAGES)}.")
    skeleton = family.skeleton(config, architecture)
    _check_matches(recipe, skeleton, architecture)
    _check_ratios(recipe, dtype)
    _check_importance(recipe, architecture, family.base_class)

    groups: list[Group] = []
    dense: list[Dense] = []
    for rule, matrices in _grouped(recipe, skeleton, dense):
        group = _sized(rule, matrices, dtype)
        if isinstance(group, Group):
            groups.append(group)
        else:
            dense += [Dense(matrix.name, matrix.rows * matrix.columns, group) for matrix in matrices]
    if not groups:
        closest = next((item for item in dense if item.reason.startswith(_TOO_SMALL)), dense[0])
        raise CompressionError(f"Nothing would shrink: {closest.name} {closest.reason}. Ask for another ratio.")
    rest = skeleton.total - sum(group.parameters for group in groups) - sum(item.parameters for item in dense)
    dense.append(Dense("everything else", rest, "norms, biases and other parameters of no kind"))
    return Plan(family.model_type, architecture, dtype, recipe, skeleton, tuple(groups), tuple(dense))


def _check_matches(recipe: Recipe, skeleton: Skeleton, architecture: str) -> None:
    """Raise if a selector that the user wrote names no matrix of this model."""
    for selector in {*recipe.modules, *(name for rule in recipe.rules for name in rule.modules)}:
        if not any(matches(matrix, (selector,)) for matrix in skeleton.matrices):
            present = listing(dict.fromkeys(matrix.kind for matrix in skeleton.matrices))
            raise CompressionError(f"'{selector}' matches no weight matrix of this {architecture}; it has {present}.")


def _check_ratios(recipe: Recipe, dtype: str) -> None:
    """Raise if a ratio is no more than what the model's own dtype already gives."""
    own = FLOAT32 / STORAGES[dtype]
    for rule in recipe.rules:
        if rule.structure and rule.ratio <= own:
            raise CompressionError(
                f"Nothing would shrink at ratio {rule.ratio:g}: ratios count from float32, and the model, stored in {dtype}, "
                f"is at {own:g} already. Ask for more, e.g. ratio {2 * own:g}."
            )
        if rule.structure and rule.storage not in (None, dtype) and dtype != "float32":
            raise CompressionError(
                f"The storage '{rule.storage}' does not go with a model in {dtype}: a loaded model has one dtype. "
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


def _grouped(recipe: Recipe, skeleton: Skeleton, dense: list[Dense]) -> list[tuple[Rule, tuple[Matrix, ...]]]:
    """Return the matrices that rules apply to, in the groups that the rules ask for; the others go to `dense`."""
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
    return [(recipe.rules[key[0]], tuple(matrices)) for key, matrices in found.items()]


def _sized(rule: Rule, matrices: tuple[Matrix, ...], dtype: str) -> Group | str:
    """Return the largest group within the rule's budget, or the reason for which the matrices stay dense."""
    structure = rule.structure
    assert structure is not None
    storage, shape = rule.storage or dtype, shape_of(matrices)
    structure.check(shape)
    size = structure.fit(shape, int(shape.parameters * FLOAT32 / rule.ratio), STORAGES[storage])
    if size == 0:
        return (
            f"{_TOO_SMALL}: even the smallest {structure.title.lower()} ({structure.unit} {structure.minimum}) is larger "
            f"than ratio {rule.ratio:g} allows"
        )
    return Group(_name(matrices), rule, matrices, size, storage)


def _name(matrices: tuple[Matrix, ...]) -> str:
    first, last = matrices[0], matrices[-1]
    if first.layer is None:
        return first.kind if first.kind != "head" else f"head_{first.module.replace('.', '_')}"
    return f"{first.kind}_{first.layer}" if len(matrices) == 1 else f"{first.kind}_{first.layer}_{last.layer}"
