"""Configurations of compressed models: the base's own, and the compression that its modules are built from."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .architectures_compressed import ARCHITECTURES, CLASS_PREFIX, TYPE_PREFIX, token_limit
from .bounds_compressed import check_decoding, check_sizes
from .specs_compressed import group_specs

FORMAT_VERSION = 5
OLDEST_VERSION = 4
MINIMUM_TRANSFORMERS = (5, 20)

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"Compressed models need transformers {'.'.join(map(str, MINIMUM_TRANSFORMERS))} or newer; "
        f"installed is {transformers.__version__}. `pip install -U transformers` gets it."
    )


def upgraded(compression: dict[str, Any]) -> dict[str, Any]:
    """Return the `compression` of an older format as the newest has it."""
    return {**compression, "format_version": FORMAT_VERSION, "absent": compression.get("absent", [])}


class CompressionConfigMixin:
    """Checks the field `compression`, which every configuration below has.

    `compression` is None (a dense model) or plain JSON: `format_version`, `decoding` ("cached": weights are decoded
    once; "on_the_fly": on every use; "int8": once, to bytes; "auto": "int8" where that is fast, else "cached"),
    `max_decoded_bytes` (optional: so many bytes of decoded weights are kept at most, others are decoded on every use),
    `absent` (modules of the base model that its checkpoint lacked) and `groups`, each with its structure, sizes, storage
    and member modules.
    """

    compression: Any
    model_type: Any
    to_dict: Any

    @property
    def token_limit(self) -> int | None:
        """How many tokens the model takes."""
        return token_limit(self.to_dict())

    def validate_compression(self) -> None:
        """Raise ValueError where this code cannot build what `compression` describes."""
        check_sizes(self)
        compression = self.compression
        if compression is None:
            return
        version = compression.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < OLDEST_VERSION:
            raise ValueError(
                f"The compression format {version!r} is not one that this code reads ({OLDEST_VERSION} to {FORMAT_VERSION}); "
                "compress the base again."
            )
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The compression format {version} is newer than what this code reads ({OLDEST_VERSION} to "
                f"{FORMAT_VERSION}); update hf-offline-compress."
            )
        if version < FORMAT_VERSION:
            self.compression = compression = upgraded(compression)
        absent, known = compression.get("absent"), ARCHITECTURES[self.model_type.removeprefix(TYPE_PREFIX)].optional
        if not isinstance(absent, list) or any(name not in known for name in absent):
            raise ValueError(
                f"`absent` is {absent!r}; it must be a list of what a checkpoint may lack: {', '.join(known)}."
            )
        group_specs(compression)
        check_decoding(compression.get("decoding"), compression.get("max_decoded_bytes"))


def config_class_of(model_type: str) -> type[PreTrainedConfig]:
    """Return the config class of a stock model type: the stock one with the field `compression`; made when first asked for.

    Raises:
        KeyError: there is no such architecture.
    """
    if model_type not in _MADE:
        stock = ARCHITECTURES[model_type].config
        namespace = {
            "__module__": __name__,
            "__qualname__": f"{CLASS_PREFIX}{stock}",
            "__doc__": f"`{stock}` with `compression`.",
            "__annotations__": {"compression": dict[str, Any] | None},
            "compression": None,
            "model_type": f"{TYPE_PREFIX}{model_type}",
        }
        bases = (CompressionConfigMixin, getattr(transformers, stock))
        _MADE[model_type] = strict(type(f"{CLASS_PREFIX}{stock}", bases, namespace))
    return _MADE[model_type]


_MADE: dict[str, type[PreTrainedConfig]] = {}


def __getattr__(name: str) -> Any:
    """Return a config class by its name, e.g. `CompressedBertConfig`."""
    for model_type, entry in ARCHITECTURES.items():
        if name == f"{CLASS_PREFIX}{entry.config}":
            return config_class_of(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
