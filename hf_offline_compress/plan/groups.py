"""Groups of matrices with their sizes, and the plan: what each parameter becomes, in exact bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..architectures.layout import Matrix, ParameterLayout
from ..errors import CompressionError
from ..request.recipe import STORAGES, Recipe, Rule
from ..structures import ITEM_BYTES, GroupShape, Shape, Size, Storage, Stored, Structure

FORMAT_VERSION = 5

DECODERS = "compression_decoders"

FLOAT32 = 4

# Names of dtypes in safetensors files, which order tensors by dtype, the last of these first, and then by name.
DTYPES = {"uint8": "U8", "int16": "I16", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Group:
    """Matrices that are compressed together.

    Attributes:
        name: unique in the plan; also the name of the decoder that its members share.
        rule: the recipe's rule that made it.
        matrices: the members, of one kind and one number of columns.
        size: rank, latent width, or whatever the structure counts.
        storage: how its numbers are stored.
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
        """The size as shown in reports."""
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
        """Return one member's own tensors, by full name."""
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
    """What each parameter of a model becomes.

    Attributes:
        model_type: of the base, e.g. "bert".
        architecture: stock class of the base.
        dtype: of the model, and so of what stays dense.
        recipe: what was asked for.
        layout: all parameters of the base.
        groups: what is compressed.
        dense: what is not.
        rest: dtype that all else is stored in.
        wider: names of groups, and full names of tensors of all else, whose values the planned dtype cannot
            represent → the dtype that is used instead.
    """

    model_type: str
    architecture: str
    dtype: str
    recipe: Recipe
    layout: ParameterLayout
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
        """Return full name → shape and dtype of every other tensor that is stored; fused layers by parts."""
        chosen = [matrix for group in self.groups for matrix in group.matrices]
        prefix = self.layout.prefix
        gone = {f"{matrix.full_module(prefix)}.weight" for matrix in chosen}
        rest = {name: shape for name, shape in self.layout.parameters.items() if name not in gone}
        for matrix in self.layout.fused_with(chosen):
            if matrix.bias:
                rest.pop(f"{matrix.full_module(prefix)}.bias", None)
                rest[f"{matrix.full_name(prefix)}.bias"] = (matrix.rows,)
            if matrix not in chosen:
                rest[f"{matrix.full_name(prefix)}.weight"] = (matrix.rows, matrix.columns)
        return {name: (shape, self.wider.get(name, self.rest)) for name, shape in rest.items()}

    def dense_bytes(self, matrices: tuple[Matrix, ...]) -> int:
        """Return how many bytes matrices take that stay dense."""
        names = [f"{m.full_name(self.layout.prefix)}.weight" for m in matrices]
        return sum(
            m.rows * m.columns * STORAGES[self.wider.get(name, self.rest)]
            for m, name in zip(matrices, names, strict=True)
        )

    @property
    def total_ratio(self) -> float:
        """4 bytes × all parameters of the base, over the bytes of all tensors of the compressed model."""
        return self.layout.total * FLOAT32 / self.total_stored_bytes

    def tensors(self) -> dict[str, tuple[Shape, str]]:
        """Return full name → shape and dtype of every tensor that is stored for the chosen matrices."""
        names: dict[str, tuple[Shape, str]] = {}
        for group in self.groups:
            stored = group.decoder_tensors(self.layout.prefix)
            for matrix in group.matrices:
                stored |= group.member_tensors(matrix, self.layout.prefix)
            names |= {name: (tensor.shape, tensor.dtype or group.storage.dtype) for name, tensor in stored.items()}
        return names

    def storage(self, name: str | None, group: str) -> Storage:
        """Return a group's storage by the name that a recipe has for it; without one, that of all else."""
        # There are few scales, but enough for half precision to save bytes.
        storage = Storage.named(name or self.rest, "float16" if self.dtype == "float32" else self.dtype)
        return replace(storage, dtype=self.wider[group]) if group in self.wider else storage

    def forms(self, group: Group) -> list[Group]:
        """Return a group in every structure and storage, and at every integer size, that its rule allows."""
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
            Dense(matrix.name, matrix.rows * matrix.columns, "loses least when left dense")
            for group in self.groups
            if forms.get(group.name, group) is None
            for matrix in group.matrices
        ]
        *others, everything_else = self.dense
        return replace(self, groups=kept, dense=(*others, *dense, everything_else))

    def runtime(self) -> dict[str, Any]:
        """Return the plan as the config stores it: plain JSON with all that the runtime needs to build the modules."""
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
            "absent": list(self.layout.absent),
            "groups": groups,
        }
