"""Bounds on what a config.json may ask for: it may be untrusted, and its numbers decide how much is computed."""

from collections.abc import Callable, Mapping
from typing import Any

MOST_LAYERS = 2**12
# The largest size of any dimension of a tensor.
MOST = 2**26
DECODINGS = ("cached", "on_the_fly", "int8", "auto")
STORAGES = ("float32", "float16", "bfloat16")
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


def whole(low: int, high: int) -> Field:
    """Return what an integer from `low` to `high` has to be."""
    return f"an integer from {low} to {high}", lambda value: is_whole(value, low, high)


def one_of(*names: str) -> Field:
    """Return what one of some names has to be."""
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


def wholes(least: int, most: int, each: Field) -> Field:
    """Return what a list of `least` to `most` values has to be, each of them a field."""
    count = str(least) if least == most else f"{least} to {most}"

    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and least <= len(value) <= most and all(map(each[1], value))

    return f"a list of {count}, each {each[0]}", fits


TRUTH: Field = ("true or false", lambda value: isinstance(value, bool))


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
            check({name: value}, {name: whole(0 if name in NONE_IS_FINE else 1, most)}, "The config")


def check(values: Any, fields: Mapping[Any, Field], label: str) -> None:
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
