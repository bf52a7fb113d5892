"""Which source a matrix of a stock graph has, by what stands in its place in the compressed model."""

from __future__ import annotations

from typing import Any

from .autoencoder import Autoencoder, Residual
from .codebook import Codebook
from .graph import GraphBuilder
from .kronecker import Kronecker
from .low_rank import LowRank
from .quantized import Quantized
from .source import Dense, Fused, Source
from .sparse import Sparse
from .trellis import Trellis
from .tucker import Tucker

# structure, as a config names it → source
SOURCES: dict[str, type[Source]] = {
    "low_rank": LowRank,
    "autoencoder": Autoencoder,
    "residual": Residual,
    "kronecker": Kronecker,
    "tucker": Tucker,
    "sparse": Sparse,
    "quantized": Quantized,
    "codebook": Codebook,
    "trellis": Trellis,
}


def source_of(graph: GraphBuilder, module: Any, transposed: bool) -> Source:
    """Return what a matrix is made from.

    Args:
        graph: the graph.
        module: what stands in its place in the compressed model.
        transposed: whether a module that is not compressed keeps it as [in, out].
    """
    from ...runtime.layers_compressed import FusedLinear, TiedHead
    from ...runtime.structures_compressed import WEIGHTS
    from ...runtime.weights_compressed import CompressedWeight

    if isinstance(module, TiedHead):
        module = module.__dict__["_embedding"]
    if isinstance(module, FusedLinear):
        return Fused(graph, [source_of(graph, part, False) for part in module.values()])
    if isinstance(module, CompressedWeight):
        structure = next(name for name, kind in WEIGHTS.items() if isinstance(module, kind))
        return SOURCES[structure](graph, module)
    return Dense(graph, module.weight.T if transposed else module.weight)
