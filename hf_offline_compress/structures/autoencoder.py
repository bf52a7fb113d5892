"""Autoencoder: each row of a weight matrix becomes a latent, which a linear or non-linear decoder turns back."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from ..errors import CompressionError, listing
from .base import GroupShape, Stored, Structure

ACTIVATIONS = ("leaky_relu", "relu", "gelu", "elu", "tanh", "none")


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained: Adam, a learning rate that falls by steps, the best epoch kept.

    Attributes:
        epochs: passes over the rows with the loss as it is annealed.
        final_epochs: passes after those, in which the annealed exponent stays constant.
        batch_size: rows a step.
        learning_rate: of Adam, at the start.
        decay: factor on the learning rate every `decay_epochs` epochs.
        decay_epochs: see `decay`.
    """

    epochs: int = 20
    final_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    decay: float = 0.8
    decay_epochs: int = 10

    def __post_init__(self) -> None:
        """Reject settings that no training could run with."""
        for name in ("epochs", "batch_size", "decay_epochs"):
            if getattr(self, name) < 1:
                raise CompressionError(f"training.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.final_epochs < 0:
            raise CompressionError(f"training.final_epochs is {self.final_epochs}; it must be at least 0.")
        for name in ("learning_rate", "decay"):
            if not getattr(self, name) > 0:
                raise CompressionError(f"training.{name} is {getattr(self, name)}; it must be above 0.")


@dataclass(frozen=True)
class Autoencoder(Structure):
    """The papers' autoencoders (arXiv 2106.08181 for the linear, 2302.04045 for the non-linear one).

    The encoder is thrown away after training. A *linear* decoder is stored as low rank: with row norms,
    ŵᵢ = sᵢ(D zᵢ + b) = [sᵢ zᵢ, sᵢ] [D, b]ᵀ has rank `size` + 1 and the very bytes of latents, norms, D and b.

    Attributes:
        decoder: "linear" or "nonlinear".
        encoder_widths: hidden widths of the non-linear encoder, as multiples of the latent width.
        decoder_widths: hidden widths of the non-linear decoder, likewise.
        activation: between the layers, and after every layer of the encoder.
        output_activation: after the last layer of the decoder.
        norms: rescale every decoded row to the norm of the row it stands for (norm enforcement).
        training: see `Training`.
    """

    name: ClassVar[str] = "autoencoder"
    title: ClassVar[str] = "Autoencoder"
    reference: ClassVar[str] = "Banaei et al., Revisiting Offline Compression, arXiv 2302.04045"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "cosine", "l1", "importance", "parameter_wise")
    unit: ClassVar[str] = "latent width"

    decoder: str = "nonlinear"
    encoder_widths: tuple[float, ...] = (8, 4)
    decoder_widths: tuple[float, ...] = (2, 4)
    activation: str = "leaky_relu"
    output_activation: str = "tanh"
    norms: bool = True
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        """Reject unknown names and widths."""
        if self.decoder not in ("linear", "nonlinear"):
            raise CompressionError(f"The decoder '{self.decoder}' is unknown; known are linear, nonlinear.")
        for name in ("activation", "output_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise CompressionError(f"The {name} '{getattr(self, name)}' is unknown; known: {listing(ACTIVATIONS)}.")
        for name in ("encoder_widths", "decoder_widths"):
            if any(width <= 0 for width in getattr(self, name)):
                raise CompressionError(f"{name} is {list(getattr(self, name))}; every width must be above 0.")

    def hidden(self, size: int) -> list[int]:
        """Return the hidden widths of the decoder at a latent width of `size`."""
        return [max(1, round(width * size)) for width in self.decoder_widths]

    def member_tensors(self, size: int, shape: GroupShape) -> dict[str, Stored]:
        """Return latents and norms of one member, as they are stored; see the base class."""
        if self.decoder == "linear":
            return {"latents": Stored((shape.rows, size + self.norms))}
        return {"latents": Stored((shape.rows, size))} | ({"norms": Stored((shape.rows,))} if self.norms else {})

    def decoder_tensors(self, size: int, shape: GroupShape) -> dict[str, Stored]:
        """Return weights and biases of the decoder, as they are stored; see the base class."""
        columns = shape.columns
        if self.decoder == "linear":
            if self.norms:
                return {"weight": Stored((columns, size + 1))}
            return {"weight": Stored((columns, size)), "bias": Stored((columns,))}
        widths = [size, *self.hidden(size), columns]
        tensors: dict[str, Stored] = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            tensors |= {f"layers.{i}.weight": Stored((outputs, inputs)), f"layers.{i}.bias": Stored((outputs,))}
        return tensors

    def limit(self, shape: GroupShape) -> int:
        """Return the largest latent width worth having; see the base class."""
        return max(1, min(shape.all_rows, shape.columns) - (self.decoder == "linear" and self.norms))

    def runtime(self, size: int, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        if self.decoder == "linear":
            return {
                "structure": "low_rank",
                "latent": size + self.norms,
                "decoder_bias": not self.norms,
                "identity_block": False,
            }
        return {
            "structure": "autoencoder",
            "latent": size,
            "hidden": self.hidden(size),
            "activation": self.activation,
            "output_activation": self.output_activation,
            "norms": self.norms,
        }
