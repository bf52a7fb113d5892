"""The structures: how a weight may be represented, and what that costs. Nothing here imports torch."""

from .autoencoder import Autoencoder, Training
from .base import GroupShape, Mixture, Size, Structure, integer
from .codebook import Codebook
from .kronecker import Kronecker
from .low_rank import LowRank
from .quantized import Quantized
from .sparse import Sparse
from .storage import FLOATS, INTEGERS, ITEM_BYTES, Shape, Storage, Stored
from .trellis import Trellis
from .tucker import Tucker

STRUCTURES: dict[str, type[Structure]] = {
    cls.name: cls for cls in (LowRank, Autoencoder, Kronecker, Tucker, Sparse, Quantized, Codebook, Trellis)
}

__all__ = [
    "FLOATS",
    "INTEGERS",
    "ITEM_BYTES",
    "STRUCTURES",
    "Autoencoder",
    "Codebook",
    "GroupShape",
    "Kronecker",
    "LowRank",
    "Mixture",
    "Quantized",
    "Shape",
    "Size",
    "Sparse",
    "Storage",
    "Stored",
    "Structure",
    "Training",
    "Trellis",
    "Tucker",
    "integer",
]
