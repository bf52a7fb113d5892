"""Configurations of compressed models: the base's own, and the compression that its modules are built from."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import BertConfig, GPT2Config, RobertaConfig

FORMAT_VERSION = 1
DECODINGS = ("cached", "on_the_fly")
MINIMUM_TRANSFORMERS = (5, 20)

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"Compressed models need transformers {'.'.join(map(str, MINIMUM_TRANSFORMERS))} or newer; "
        f"installed is {transformers.__version__}. `pip install -U transformers` gets it."
    )


class CompressionConfigMixin:
    """Checks the field `compression`, which every configuration below has.

    `compression` is None (a dense model) or plain JSON: `format_version`, `decoding` ("cached": weights are decoded
    once; "on_the_fly": on every use) and `groups`, each with its structure, sizes, storage and member modules.
    """

    compression: Any

    def validate_compression(self) -> None:
        """Raise ValueError where this code cannot build what `compression` describes."""
        compression = self.compression
        if compression is None:
            return
        version = compression.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"The compression format {version!r} is not the one this code reads ({FORMAT_VERSION}); "
                "update hf-offline-compress."
            )
        if not isinstance(compression.get("groups"), dict):
            raise ValueError("`compression` needs `groups`, a mapping of names to groups.")
        if compression.get("decoding") not in DECODINGS:
            raise ValueError(
                f"`decoding` is {compression.get('decoding')!r}; it must be one of {', '.join(DECODINGS)}."
            )


@strict
class CompressedBertConfig(CompressionConfigMixin, BertConfig):
    """`BertConfig` with `compression`."""

    model_type = "compressed_bert"
    compression: dict[str, Any] | None = None


@strict
class CompressedRobertaConfig(CompressionConfigMixin, RobertaConfig):
    """`RobertaConfig` with `compression`."""

    model_type = "compressed_roberta"
    compression: dict[str, Any] | None = None


@strict
class CompressedGPT2Config(CompressionConfigMixin, GPT2Config):
    """`GPT2Config` with `compression`."""

    model_type = "compressed_gpt2"
    compression: dict[str, Any] | None = None
