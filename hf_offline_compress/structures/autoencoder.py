"""Autoencoder: each row of a weight matrix becomes a latent, which a linear or non-linear decoder turns back."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from ..errors import CompressionError, listing
from .base import GroupShape, Size, Structure, integer
from .storage import Stored

ACTIVATIONS = ("leaky_relu", "relu", "gelu", "elu", "tanh", "sin", "none")
DECODERS = ("linear", "nonlinear", "residual")
METHODS = ("latents", "epochs")


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained.

    Attributes:
        method: "latents": no encoder, latents and decoder are trained themselves, many rows at a time, from the closed
            form. "epochs": the papers' way, an encoder and small batches. Either way Adam, and the best that was seen is
            kept.
        epochs: passes over the rows with the loss as it is annealed; 0, for "latents", as many as rows of this number need.
        final_epochs: of "epochs", passes after those, in which the annealed exponent stays constant.
        batch_size: rows a step; 0, for "latents", as many as are best.
        learning_rate: of "epochs", at the start; that of "latents" follows from the size of its numbers.
        decay: of "epochs", factor on the learning rate every `decay_epochs` epochs.
        decay_epochs: see `decay`.
    """

    method: str = "latents"
    epochs: int = 0
    final_epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 1e-3
    decay: float = 0.8
    decay_epochs: int = 10

    def __post_init__(self) -> None:
        """Reject settings that no training could run with."""
        if self.method not in METHODS:
            raise CompressionError(f"training.method is '{self.method}'; known are {listing(METHODS)}.")
        least = 1 if self.method == "epochs" else 0
        for name, minimum in (("epochs", least), ("batch_size", least), ("final_epochs", 0), ("decay_epochs", 1)):
            if getattr(self, name) < minimum:
                raise CompressionError(f"training.{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.method == "latents":
            others = ("final_epochs", "learning_rate", "decay", "decay_epochs")
            if given := [
                name for name in others if getattr(self, name) != type(self).__dataclass_fields__[name].default
            ]:
                raise CompressionError(f"training.{given[0]} is of the method 'epochs'; 'latents' does not use it.")
        for name in ("learning_rate", "decay"):
            if not getattr(self, name) > 0:
                raise CompressionError(f"training.{name} is {getattr(self, name)}; it must be above 0.")


@dataclass(frozen=True)
class Autoencoder(Structure):
    """Autoencoders of rows: the papers' (arXiv 2106.08181 linear, 2302.04045 non-linear), and a residual one.

    An encoder, if there is one, is thrown away after training. A *linear* decoder is stored as low rank: with row norms,
    ŵᵢ = sᵢ(D zᵢ + b) = [sᵢ zᵢ, sᵢ] [D, b]ᵀ has rank `size` + 1 and the very bytes of latents, norms, D and b.
    A *residual* decoder is ŵ = D z + V φ(U z + u): the linear one, and a hidden layer on top of it. With φ a sine of high
    frequency (as in random Fourier features) each latent number encodes more than one direction.

    Attributes:
        decoder: "linear", "nonlinear" or "residual".
        encoder_widths: hidden widths of the non-linear encoder, as multiples of the latent width.
        decoder_widths: hidden widths of the decoder, likewise; a residual decoder has one, or by default as many units as
            measured best for matrices of that shape.
        activation: between the layers, and after every layer of the encoder.
        output_activation: of a non-linear decoder, after the last layer.
        norms: scale every decoded row, such that it has the norm of the row it stands for (norm enforcement), or where the
            loss has an L2 term the length that is closest.
        training: see `Training`.
    """

    name: ClassVar[str] = "autoencoder"
    title: ClassVar[str] = "Autoencoder"
    reference: ClassVar[str] = "Banaei et al., Revisiting Offline Compression, arXiv 2302.04045"
    objectives: ClassVar[tuple[str, ...]] = ("l2", "cosine", "l1", "calibrated", "importance", "parameter_wise")
    unit: ClassVar[str] = "latent width"

    decoder: str = "residual"
    encoder_widths: tuple[float, ...] = (8, 4)
    decoder_widths: tuple[float, ...] = ()
    activation: str = "sin"
    output_activation: str = "none"
    norms: bool = True
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        """Reject unknown names, widths, and combinations that do not exist."""
        if self.decoder not in DECODERS:
            raise CompressionError(f"The decoder '{self.decoder}' is unknown; known are {listing(DECODERS)}.")
        for name in ("activation", "output_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise CompressionError(f"The {name} '{getattr(self, name)}' is unknown; known: {listing(ACTIVATIONS)}.")
        for name in ("encoder_widths", "decoder_widths"):
            if any(width <= 0 for width in getattr(self, name)):
                raise CompressionError(f"{name} is {list(getattr(self, name))}; every width must be above 0.")
        if self.decoder == "residual" and (len(self.decoder_widths) > 1 or self.output_activation != "none"):
            raise CompressionError("A residual decoder has one hidden layer, and no activation at its output.")
        if self.decoder == "nonlinear" and self.training.method != "epochs":
            raise CompressionError(
                "A nonlinear decoder is trained with an encoder: training needs method: epochs, with epochs and batch_size. "
                "Only a residual decoder is trained on its latents."
            )
        if self.decoder == "residual" and self.training.method != "latents":
            raise CompressionError("A residual decoder has no encoder: training needs method: latents.")

    def solvable(self) -> tuple[str, ...]:
        """Return the objectives that there are with these options; see the base class."""
        if self.training.method == "epochs":
            return tuple(term for term in self.objectives if term != "calibrated")
        return self.objectives

    def hidden(self, size: int, shape: GroupShape) -> list[int]:
        """Return the hidden widths of the decoder at a latent width of `size`."""
        if self.decoder == "residual" and not self.decoder_widths:
            # A unit costs columns, a latent rows + columns: the more rows, the more units. Measured on BERT's matrices.
            widest = 1.6 * (shape.all_rows / shape.columns) ** 0.35 * (10 * size / shape.columns) ** 0.15
            units = round(min(6.0, max(1.0, widest)) * size)
            return [max(1, min(units, shape.columns - size))]
        return [max(1, round(width * size)) for width in self.decoder_widths]

    def member_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return latents and norms or scales of one member, as they are stored; see the base class."""
        size = integer(size)
        if self.decoder == "linear":
            return {"latents": Stored((shape.rows, size + self.norms))}
        own = {"latents": Stored((shape.rows, size))}
        if self.norms:
            own["scales" if self.decoder == "residual" else "norms"] = Stored((shape.rows,))
        return own

    def decoder_tensors(self, size: Size, shape: GroupShape) -> dict[str, Stored]:
        """Return weights and biases of the decoder, as they are stored; see the base class."""
        size = integer(size)
        columns = shape.columns
        if self.decoder == "linear":
            if self.norms:
                return {"weight": Stored((columns, size + 1))}
            return {"weight": Stored((columns, size)), "bias": Stored((columns,))}
        if self.decoder == "residual":
            (units,) = self.hidden(size, shape)
            return {
                "linear.weight": Stored((columns, size)),
                "hidden.weight": Stored((units, size)),
                "hidden.bias": Stored((units,)),
                "output.weight": Stored((columns, units)),
            }
        widths = [size, *self.hidden(size, shape), columns]
        tensors: dict[str, Stored] = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            tensors |= {f"layers.{i}.weight": Stored((outputs, inputs)), f"layers.{i}.bias": Stored((outputs,))}
        return tensors

    def limit(self, shape: GroupShape) -> int:
        """Return the largest latent width worth having; see the base class."""
        return max(1, min(shape.all_rows, shape.columns) - (self.decoder == "linear" and self.norms))

    def runtime(self, size: Size, shape: GroupShape) -> dict[str, Any]:
        """Return what the runtime layer is built from; see the base class."""
        size = integer(size)
        if self.decoder == "linear":
            return {
                "structure": "low_rank",
                "latent": size + self.norms,
                "decoder_bias": not self.norms,
                "identity_block": False,
            }
        common = {
            "latent": size,
            "hidden": self.hidden(size, shape),
            "activation": self.activation,
            "norms": self.norms,
        }
        if self.decoder == "residual":
            return {"structure": "residual", **common}
        return {"structure": "autoencoder", **common, "output_activation": self.output_activation}
