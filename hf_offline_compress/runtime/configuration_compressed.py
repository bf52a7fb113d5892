"""Configurations of compressed models: the base's own, and the compression that its modules are built from."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import BertConfig, GPT2Config, RobertaConfig

from .bounds_compressed import check_groups, check_sizes

FORMAT_VERSION = 4
DECODINGS = ("cached", "on_the_fly")
MINIMUM_TRANSFORMERS = (5, 20)

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"Compressed models need transformers {'.'.join(map(str, MINIMUM_TRANSFORMERS))} or newer; "
        f"installed is {transformers.__version__}. `pip install -U transformers` gets it."
    )


def check_decoding(decoding: Any, max_bytes: Any) -> None:
    """Raise ValueError where there is no such decoding, or its bound is no number of bytes."""
    if decoding not in DECODINGS:
        raise ValueError(f"`decoding` is {decoding!r}; it must be one of {', '.join(DECODINGS)}.")
    if max_bytes is None:
        return
    if decoding != "cached":
        raise ValueError(f"`max_bytes` bounds what is kept decoded, and with {decoding!r} nothing is; use 'cached'.")
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
        raise ValueError(f"`max_bytes` is {max_bytes!r}; it must be a whole number of bytes, 0 or more.")


class CompressionConfigMixin:
    """Checks the field `compression`, which every configuration below has.

    `compression` is None (a dense model) or plain JSON: `format_version`, `decoding` ("cached": weights are decoded
    once; "on_the_fly": on every use), `max_decoded_bytes` (optional: so many bytes of decoded weights are kept at most,
    others are decoded on every use) and `groups`, each with its structure, sizes, storage and member modules.
    """

    compression: Any

    def validate_compression(self) -> None:
        """Raise ValueError where this code cannot build what `compression` describes."""
        check_sizes(self)
        compression = self.compression
        if compression is None:
            return
        version = compression.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"The compression format {version!r} is not the one this code reads ({FORMAT_VERSION}); "
                "update hf-offline-compress."
            )
        check_groups(compression)
        check_decoding(compression.get("decoding"), compression.get("max_decoded_bytes"))


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
