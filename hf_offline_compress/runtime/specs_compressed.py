"""What a config.json says of groups, read once: typed, and within bounds, since it may come from strangers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .architectures_compressed import FUSED_PARTS
from .bounds_compressed import MOST, STORAGES, TRUTH, Field, check, one_of, whole, wholes

# Hidden units of a decoder, as a multiple of its columns.
MOST_HIDDEN = 64
MOST_CLASSES = 16
_SIZE = whole(1, MOST)
_ACTIVATION = one_of("leaky_relu", "relu", "gelu", "elu", "tanh", "sin", "none")


def _of(bounds: Field) -> Any:
    """Return a dataclass' field that is read from a mapping, within bounds."""
    return field(metadata={"bounds": bounds})


def _values(cls: type[Any], entry: Any, label: str) -> dict[str, Any]:
    """Return the values of all fields with bounds, checked; lists as tuples."""
    bounds = {each.name: each.metadata["bounds"] for each in fields(cls) if "bounds" in each.metadata}
    check(entry, bounds, label)
    return {name: tuple(entry[name]) if isinstance(entry[name], list) else entry[name] for name in bounds}


@dataclass(frozen=True, kw_only=True)
class IntegersSpec:
    """Factors that are packed as integers.

    Attributes:
        sharing: so many numbers share a scale.
        own: name of a member's tensor → bits.
        decoder: name of a decoder's tensor → bits.
    """

    sharing: int = _of(_SIZE)
    own: Mapping[str, int]
    decoder: Mapping[str, int]

    @classmethod
    def read(cls, entry: Any, label: str) -> "IntegersSpec":
        """Return what an entry says; see `weight_spec`."""
        values = _values(cls, entry, f"{label}, in `integers`,")
        for owner in ("own", "decoder"):
            bits = entry.get(owner)
            if not isinstance(bits, dict):
                raise ValueError(f"{label} needs `{owner}` in `integers`, a mapping of names to bits.")
            check(bits, dict.fromkeys(bits, whole(1, 15)), f"{label}, in `{owner}`,")
            values[owner] = dict(bits)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """What a compressed weight is built from: its structure, and the sizes of that.

    Attributes:
        storage: dtype of its numbers, as a name.
        integers: which of them are packed as integers; None for none.
    """

    structure: ClassVar[str]
    storage: str = _of(one_of(*STORAGES))
    integers: IntegersSpec | None = None

    @classmethod
    def read(cls, entry: Mapping[str, Any], label: str) -> "WeightSpec":
        """Return what an entry of this structure says; see `weight_spec`."""
        integers = IntegersSpec.read(entry["integers"], label) if "integers" in entry else None
        return cls(**_values(cls, entry, label), **cls.more(entry, label), integers=integers)

    @classmethod
    def more(cls, entry: Mapping[str, Any], label: str) -> dict[str, Any]:
        """Return the values of fields whose bounds depend on each other."""
        return {}

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether no size is larger than a weight [rows, columns] can need."""
        return True

    def check_fits(self, rows: int, columns: int) -> None:
        """Raise ValueError where `fits` is false: decoding would take far too much memory or time."""
        if not self.fits(rows, columns):
            raise ValueError(
                f"The sizes of a group of the structure '{self.structure}' do not fit a weight of {rows} rows and "
                f"{columns} columns: config.json does not match the model that it describes."
            )


@dataclass(frozen=True, kw_only=True)
class LowRankSpec(WeightSpec):
    """Latents, and one matrix as decoder."""

    structure = "low_rank"
    latent: int = _of(_SIZE)
    decoder_bias: bool = _of(TRUTH)
    identity_block: bool = _of(TRUTH)

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        return self.latent <= columns


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec(WeightSpec):
    """Latents, and a small network as decoder."""

    structure = "autoencoder"
    latent: int = _of(_SIZE)
    hidden: tuple[int, ...] = _of(wholes(0, 16, _SIZE))
    activation: str = _of(_ACTIVATION)
    output_activation: str = _of(_ACTIVATION)
    norms: bool = _of(TRUTH)

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        return self.latent <= columns and all(units <= MOST_HIDDEN * columns for units in self.hidden)


@dataclass(frozen=True, kw_only=True)
class ResidualSpec(WeightSpec):
    """Latents, and as decoder a matrix and a hidden layer on top of it."""

    structure = "residual"
    latent: int = _of(_SIZE)
    hidden: tuple[int] = _of(wholes(1, 1, _SIZE))
    activation: str = _of(_ACTIVATION)
    norms: bool = _of(TRUTH)

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        return self.latent <= columns and self.hidden[0] <= MOST_HIDDEN * columns


@dataclass(frozen=True, kw_only=True)
class KroneckerSpec(WeightSpec):
    """A sum of Kronecker products."""

    structure = "kronecker"
    terms: int = _of(_SIZE)
    left: tuple[int, int] = _of(wholes(2, 2, _SIZE))
    right: tuple[int, int] = _of(wholes(2, 2, _SIZE))

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        return (
            rows <= self.left[0] * self.right[0] < 2 * rows
            and columns <= self.left[1] * self.right[1] < 2 * columns
            and self.terms <= math.prod(self.right)
        )


@dataclass(frozen=True, kw_only=True)
class TuckerSpec(WeightSpec):
    """Stacked slices of a tensor in Tucker form."""

    structure = "tucker"
    blocks: int = _of(_SIZE)
    height: int = _of(_SIZE)
    ranks: tuple[int, int, int] = _of(wholes(3, 3, _SIZE))

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        fitting = rows <= self.blocks * self.height < 2 * rows
        return fitting and self.ranks[1] <= self.height and self.ranks[2] <= columns


@dataclass(frozen=True, kw_only=True)
class SparseSpec(WeightSpec):
    """Values, and the gaps between them; without bits for gaps, the zeros are stored too, and `values` is None."""

    structure = "sparse"
    gap_bits: int = _of(whole(0, 16))
    values: int | None

    @classmethod
    def more(cls, entry: Mapping[str, Any], label: str) -> dict[str, Any]:
        """See the base class."""
        if "values" not in entry or (entry["values"] is None) != (entry["gap_bits"] == 0):
            raise ValueError(f"{label} needs `values`, with bits of gaps between them, or null with none.")
        if entry["values"] is not None:
            check(entry, {"values": whole(1, 2**40)}, label)
        return {"values": entry["values"]}

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        return (self.values or 1) <= rows * columns


@dataclass(frozen=True, kw_only=True)
class QuantizedSpec(WeightSpec):
    """Codes of a few bits, with a scale and a zero for each part of a row."""

    structure = "quantized"
    bits: int = _of(whole(1, 8))
    group_size: int = _of(_SIZE)


@dataclass(frozen=True, kw_only=True)
class CodebookSpec(WeightSpec):
    """Codes into tables of sub-vectors."""

    structure = "codebook"
    bits: int = _of(whole(1, 12))
    width: int = _of(whole(1, 64))
    books: int = _of(whole(1, 16))


@dataclass(frozen=True, kw_only=True)
class ClassSpec:
    """Streams of a trellis of one rate; each class has its own codes and a computed table."""

    streams: int = _of(_SIZE)
    width: int = _of(whole(1, 2))
    bits: int = _of(whole(1, 8))
    state_bits: int = _of(whole(1, 14))


@dataclass(frozen=True, kw_only=True)
class TrellisSpec(WeightSpec):
    """Streams of overlapping codes, and outliers."""

    structure = "trellis"
    run: int = _of(_SIZE)
    outliers: int = _of(whole(0, MOST))
    classes: tuple[ClassSpec, ...]

    @classmethod
    def more(cls, entry: Mapping[str, Any], label: str) -> dict[str, Any]:
        """See the base class."""
        given = entry.get("classes")
        if not isinstance(given, list | tuple) or not 1 <= len(given) <= MOST_CLASSES:
            raise ValueError(f"{label} has `classes` that are not a list of 1 to {MOST_CLASSES}.")
        own = f"A class of {label[0].lower()}{label[1:]}"
        classes = tuple(ClassSpec(**_values(ClassSpec, each, own)) for each in given)
        for each in classes:
            if (each.width == 1 and each.bits not in (5, 6)) or each.state_bits < each.bits:
                raise ValueError(
                    f"{label} has codes of {each.bits} bits in states of {each.state_bits}, for which there is no table."
                )
        return {"classes": classes}

    def fits(self, rows: int, columns: int) -> bool:
        """See the base class."""
        streams = sum(each.streams for each in self.classes)
        return self.outliers <= rows * columns and self.run <= rows and streams == math.ceil(rows / self.run)


SPECS: dict[str, type[WeightSpec]] = {
    cls.structure: cls
    for cls in (
        LowRankSpec,
        AutoencoderSpec,
        ResidualSpec,
        KroneckerSpec,
        TuckerSpec,
        SparseSpec,
        QuantizedSpec,
        CodebookSpec,
        TrellisSpec,
    )
}


@dataclass(frozen=True)
class Member:
    """A module whose weight is in a group.

    Attributes:
        module: its name, from the base model; from the model itself for one in a head.
        part: which part of a fused module; None for all of it.
        head: whether it lies in a head.
    """

    module: str
    part: str | None = None
    head: bool = False

    @classmethod
    def read(cls, entry: Any, label: str) -> "Member":
        """Return what an entry says; see `weight_spec`."""
        name: Field = ("a name", lambda value: isinstance(value, str) and len(value) < 1000)
        check(entry, {"module": name}, f"A member of {label[0].lower()}{label[1:]}")
        optional = {"head": TRUTH, "part": one_of(*FUSED_PARTS)}
        given = {key: entry[key] for key in optional if key in entry}
        check(given, {key: optional[key] for key in given}, label)
        return cls(entry["module"], **given)


@dataclass(frozen=True)
class GroupSpec:
    """Weights that are compressed together.

    Attributes:
        weight: what each of them is built from.
        shared: whether they have one decoder.
        members: where they are.
    """

    weight: WeightSpec
    shared: bool
    members: tuple[Member, ...]


def weight_spec(entry: Any, label: str = "The group of `compression`") -> WeightSpec:
    """Return what an entry says of a weight, checked as far as that does not depend on the model.

    Args:
        entry: plain JSON; what else it says is left alone.
        label: how messages begin.

    Raises:
        ValueError: a field is missing, of the wrong type, or out of bounds; the message names it.
    """
    check(entry, {"structure": one_of(*SPECS)}, label)
    return SPECS[entry["structure"]].read(entry, label)


def group_specs(compression: Mapping[str, Any]) -> dict[str, GroupSpec]:
    """Return the groups of a config's `compression` by their names, checked; see `weight_spec`.

    Raises:
        ValueError: a field is missing, of the wrong type, or out of bounds; the message names it.
    """
    groups = compression.get("groups")
    if not isinstance(groups, dict):
        raise ValueError("`compression` needs `groups`, a mapping of names to groups.")
    rest = compression.get("rest")
    if rest is not None:
        check({"rest": rest}, {"rest": one_of(*STORAGES)}, "`compression`")
    found = {}
    for name, entry in groups.items():
        label = f"The group '{str(name)[:80]}' of `compression`"
        weight = weight_spec(entry, label)
        listed: Field = ("a list", lambda value: isinstance(value, list | tuple))
        check(entry, {"shared": TRUTH, "members": listed}, label)
        members = tuple(Member.read(member, label) for member in entry["members"])
        found[name] = GroupSpec(weight, entry["shared"], members)
    return found
