"""The structures: how a weight may be represented, and what that costs. Nothing here imports torch."""

from .autoencoder import Autoencoder, Training
from .base import INDEX_DTYPE, Shape, Structure
from .low_rank import LowRank

STRUCTURES: dict[str, type[Structure]] = {cls.name: cls for cls in (LowRank, Autoencoder)}

__all__ = ["INDEX_DTYPE", "STRUCTURES", "Autoencoder", "LowRank", "Shape", "Structure", "Training"]
