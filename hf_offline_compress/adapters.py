"""LoRA adapters on compressed linear layers, by `peft`: their codes stay frozen, and the adapters are trained."""

from __future__ import annotations

from typing import Any

from .errors import CompressionError, needs_extra


def lora_config(**options: Any) -> Any:
    """Return a `peft.LoraConfig` that also finds the compressed linear layers of a model.

    Args:
        options: those of `LoraConfig`: `r`, `target_modules`, …

    Raises:
        CompressionError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise CompressionError(needs_extra("An adapter", "peft", "adapters")) from error
    from .runtime.layers_compressed import LINEARS

    class CompressedLora(Linear):
        """A compressed linear layer with adapters beside it."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """Refuse: there is no dense weight that an adapter could be added to."""
            raise CompressionError(
                "An adapter cannot be merged into compressed weights, which are codes; keep it beside the model, or export "
                "the model to a dense checkpoint and merge it there."
            )

    config = LoraConfig(**options)
    config._register_custom_module(dict.fromkeys(LINEARS.values(), CompressedLora))
    return config
