"""Bounds on what a config.json may ask for: it may be untrusted, and its numbers decide how much is computed."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .architectures_compressed import FUSED_PARTS

MOST_LAYERS = 2**12
# The largest size of any dimension of a tensor.
MOST = 2**26
DECODINGS = ("cached", "on_the_fly", "int8", "auto")
STORAGES = ("float32", "float16", "bfloat16")
# Hidden units of a decoder, as a multiple of its columns.
MOST_HIDDEN = 64
# Fields of a stock config that set a model's size, under the names that different families use.
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
SIZES = (
    *LAYERS,
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "word_embed_proj_dim",
    "n_embd",
    "d_model",
    "dim",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "n_head",
    "n_heads",
    "intermediate_size",
    "ffn_dim",
    "hidden_dim",
    "n_inner",
    "max_position_embeddings",
    "n_positions",
    "type_vocab_size",
    "num_labels",
)
NONE_IS_FINE = ("type_vocab_size", "num_labels")

# A field: a description of its valid values, and the test for them.
Field = tuple[str, Callable[[Any], bool]]


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer from `low` to `high`; true and 2.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Field:
    return f"an integer from {low} to {high}", lambda value: is_whole(value, low, high)


def _one_of(*names: str) -> Field:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


def _wholes(least: int, most: int, each: Field) -> Field:
    count = str(least) if least == most else f"{least} to {most}"

    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and least <= len(value) <= most and all(map(each[1], value))

    return f"a list of {count}, each {each[0]}", fits


_TRUTH: Field = ("true or false", lambda value: isinstance(value, bool))
_SIZE = _whole(1, MOST)
_CODE = {"streams": _SIZE, "width": _whole(1, 2), "bits": _whole(1, 8), "state_bits": _whole(1, 14)}
_ACTIVATION = _one_of("leaky_relu", "relu", "gelu", "elu", "tanh", "sin", "none")
_STRUCTURES: dict[str, dict[str, Field]] = {
    "low_rank": {"latent": _SIZE, "decoder_bias": _TRUTH, "identity_block": _TRUTH},
    "autoencoder": {
        "latent": _SIZE,
        "hidden": _wholes(0, 16, _SIZE),
        "activation": _ACTIVATION,
        "output_activation": _ACTIVATION,
        "norms": _TRUTH,
    },
    "residual": {"latent": _SIZE, "hidden": _wholes(1, 1, _SIZE), "activation": _ACTIVATION, "norms": _TRUTH},
    "kronecker": {"terms": _SIZE, "left": _wholes(2, 2, _SIZE), "right": _wholes(2, 2, _SIZE)},
    "tucker": {"blocks": _SIZE, "height": _SIZE, "ranks": _wholes(3, 3, _SIZE)},
    "sparse": {"gap_bits": _whole(0, 16)},
    "quantized": {"bits": _whole(1, 8), "group_size": _SIZE},
    "codebook": {"bits": _whole(1, 12), "width": _whole(1, 64), "books": _whole(1, 16)},
    "trellis": {"run": _SIZE, "outliers": _whole(0, MOST)},
}
_GROUP: dict[str, Field] = {
    "structure": _one_of(*_STRUCTURES),
    "storage": _one_of(*STORAGES),
    "shared": _TRUTH,
    "members": ("a list", lambda value: isinstance(value, list | tuple)),
}
_MEMBER: dict[str, Field] = {"module": ("a name", lambda value: isinstance(value, str) and len(value) < 1000)}
_MEMBER_OPTIONS: dict[str, Field] = {"head": _TRUTH, "part": _one_of(*FUSED_PARTS)}


def check_sizes(values: Mapping[str, Any] | Any) -> None:
    """Check the sizes in a model's config, which decide how many layers are built and how large they are.

    Args:
        values: the fields of a config, or the config itself. Missing fields and None are not checked.

    Raises:
        ValueError: one is not an integer, or out of bounds.
    """
    for name in SIZES:
        value = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        if value is not None:
            most = MOST_LAYERS if name in LAYERS else MOST
            _check({name: value}, {name: _whole(0 if name in NONE_IS_FINE else 1, most)}, "The config")


def check_groups(compression: Mapping[str, Any]) -> None:
    """Check types and bounds of the groups in `compression`, as far as they do not depend on the model.

    Raises:
        ValueError: a field is missing, of the wrong type, or out of bounds; the message names it.
    """
    groups = compression.get("groups")
    if not isinstance(groups, dict):
        raise ValueError("`compression` needs `groups`, a mapping of names to groups.")
    rest = compression.get("rest")
    if rest is not None:
        _check({"rest": rest}, {"rest": _one_of(*STORAGES)}, "`compression`")
    for name, group in groups.items():
        label = f"The group '{str(name)[:80]}' of `compression`"
        _check(group, _GROUP, label)
        _check(group, _STRUCTURES[group["structure"]], label)
        for member in group["members"]:
            _check(member, _MEMBER, f"A member of {label[0].lower()}{label[1:]}")
            given = {key: member[key] for key in _MEMBER_OPTIONS if key in member}
            _check(given, {key: _MEMBER_OPTIONS[key] for key in given}, label)
        if group["structure"] == "trellis":
            _check_classes(group.get("classes"), label)
        if group["structure"] == "sparse":
            _check_values(group, label)
        if "integers" in group:
            _check_integers(group["integers"], label)


def fits(group: Mapping[str, Any], rows: int, columns: int) -> bool:
    """Whether a group's sizes are consistent with a weight [rows, columns]."""
    try:
        check_group(group, rows, columns)
    except ValueError:
        return False
    return True


def check_group(group: Mapping[str, Any], rows: int, columns: int) -> None:
    """Check that a group's sizes are no larger than a weight [rows, columns] can need.

    Args:
        group: one that `check_groups` has passed.
        rows: of the weight.
        columns: of the weight.

    Raises:
        ValueError: decoding would take far too much memory or time.
    """
    tests = {
        "low_rank": lambda: group["latent"] <= columns,
        "autoencoder": lambda: group["latent"] <= columns and all(h <= MOST_HIDDEN * columns for h in group["hidden"]),
        "residual": lambda: group["latent"] <= columns and group["hidden"][0] <= MOST_HIDDEN * columns,
        "kronecker": lambda: (
            rows <= group["left"][0] * group["right"][0] < 2 * rows
            and columns <= group["left"][1] * group["right"][1] < 2 * columns
            and group["terms"] <= math.prod(group["right"])
        ),
        "tucker": lambda: (
            rows <= group["blocks"] * group["height"] < 2 * rows
            and group["ranks"][1] <= group["height"]
            and group["ranks"][2] <= columns
        ),
        "sparse": lambda: (group["values"] or 1) <= rows * columns,
        "trellis": lambda: (
            group["outliers"] <= rows * columns
            and group["run"] <= rows
            and sum(entry["streams"] for entry in group["classes"]) == math.ceil(rows / group["run"])
        ),
    }.get(group["structure"], lambda: True)
    if not tests():
        raise ValueError(
            f"The sizes of a group of the structure '{group['structure']}' do not fit a weight of {rows} rows and "
            f"{columns} columns: config.json does not match the model that it describes."
        )


def _check_classes(classes: Any, label: str) -> None:
    """Check the row classes of a trellis; each has its own codes and a computed table."""
    if not isinstance(classes, list | tuple) or not 1 <= len(classes) <= 16:
        raise ValueError(f"{label} has `classes` that are not a list of 1 to 16.")
    for entry in classes:
        _check(entry, _CODE, f"A class of {label[0].lower()}{label[1:]}")
        single, bits, state = entry["width"] == 1, entry["bits"], entry["state_bits"]
        if (single and bits not in (5, 6)) or state < bits:
            raise ValueError(f"{label} has codes of {bits} bits in states of {state}, for which there is no table.")


def _check_values(group: Mapping[str, Any], label: str) -> None:
    """Check the number of values of a sparse weight: None where its zeros are stored too."""
    if "values" not in group or (group["values"] is None) != (group["gap_bits"] == 0):
        raise ValueError(f"{label} needs `values`, with bits of gaps between them, or null with none.")
    if group["values"] is not None:
        _check(group, {"values": _whole(1, 2**40)}, label)


def _check_integers(integers: Any, label: str) -> None:
    """Check the factors that are packed as integers: the bits of each, and the group size."""
    _check(integers, {"sharing": _SIZE}, f"{label}, in `integers`,")
    for owner in ("own", "decoder"):
        bits = integers.get(owner)
        if not isinstance(bits, dict):
            raise ValueError(f"{label} needs `{owner}` in `integers`, a mapping of names to bits.")
        _check(bits, dict.fromkeys(bits, _whole(1, 15)), f"{label}, in `{owner}`,")


def _check(values: Any, fields: Mapping[Any, Field], label: str) -> None:
    """Raise ValueError unless `values` is a mapping with all fields, each of them valid."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{label} is not a mapping of names to values.")
    for name, (wanted, fits) in fields.items():
        if name not in values:
            raise ValueError(f"{label} lacks `{name}`, {wanted}.")
        if not fits(values[name]):
            raise ValueError(f"{label} has `{str(name)[:80]}`: {str(values[name])[:60]}; it must be {wanted}.")


def check_decoding(decoding: Any, max_bytes: Any) -> None:
    """Raise ValueError if the decoding is unknown, or its bound is not a number of bytes."""
    if decoding not in DECODINGS:
        raise ValueError(f"`decoding` is {decoding!r}; it must be one of {', '.join(DECODINGS)}.")
    if max_bytes is None:
        return
    if decoding != "cached":
        raise ValueError(
            f"`max_bytes` limits the weights kept decoded in floating point, and {decoding!r} keeps none; use 'cached'."
        )
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
        raise ValueError(f"`max_bytes` is {max_bytes!r}; it must be an integer number of bytes, 0 or more.")
