"""Compressed weights in the place of linear layers, embeddings and tied heads."""

from typing import Any

import torch
from torch import Tensor, nn

from .structures_compressed import WEIGHTS
from .weights_compressed import CompressedWeight, nothing_to_fill


class CompressedLinear(CompressedWeight):
    """A compressed weight in the place of `nn.Linear` or GPT-2's `Conv1D`."""

    @property
    def in_features(self) -> int:
        """Number of inputs, as `nn.Linear` has it."""
        return self.columns

    @property
    def out_features(self) -> int:
        """Number of outputs, as `nn.Linear` has it."""
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Ŵᵀ + bias, [..., in_features] → [..., out_features]."""
        return self.project(x)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.columns}, {self.rows}, bias={self.bias is not None}"


class CompressedEmbedding(CompressedWeight):
    """A compressed weight in the place of `nn.Embedding`."""

    @property
    def num_embeddings(self) -> int:
        """Number of rows, as `nn.Embedding` has it."""
        return self.rows

    @property
    def embedding_dim(self) -> int:
        """Width of a row, as `nn.Embedding` has it."""
        return self.columns

    def forward(self, inputs: Tensor, as_logits: bool = False) -> Tensor:
        """Return the rows of token ids [...] → [..., width].

        With `as_logits`, `inputs` are hidden states [..., width], and their products with all rows are returned,
        [..., tokens]: what a tied language-model head does.
        """
        return self.project(inputs) if as_logits else self.lookup(inputs)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.rows}, {self.columns}"


def _layers(kind: type[CompressedWeight]) -> dict[str, Any]:
    """Return structure → its weight as a layer of a kind, e.g. `LowRankLinear`."""
    name = kind.__name__.removeprefix("Compressed")
    made = {}
    for structure, weight in WEIGHTS.items():
        title = weight.__name__.removesuffix("Weight") + name
        made[structure] = type(
            title, (weight, kind), {"__module__": __name__, "__doc__": f"{weight.__doc__} As {kind.__doc__}"}
        )
    return made


LINEARS: dict[str, type[CompressedLinear]] = _layers(CompressedLinear)
EMBEDDINGS: dict[str, type[CompressedEmbedding]] = _layers(CompressedEmbedding)
globals().update({cls.__name__: cls for cls in (*LINEARS.values(), *EMBEDDINGS.values())})


class FusedLinear(nn.ModuleDict):
    """Linear layers on the same input, outputs concatenated: GPT-2's c_attn, split into its parts."""

    @property
    def weight(self) -> Tensor:
        """The dense weights of all parts, stacked; see `CompressedWeight.weight`."""
        parts: list[Any] = list(self.values())
        if "initializing" in self.__dict__:
            return nothing_to_fill(sum(part.out_features for part in parts), parts[0].in_features)
        weights: Any = [part.weight for part in parts]
        return torch.cat(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all parts, [..., in] → [..., sum of outs]."""
        return torch.cat([part(x) for part in self.values()], dim=-1)


class TiedHead(nn.Module):
    """A language-model head that uses the compressed input embedding; it holds only the bias."""

    def __init__(self, embedding: CompressedEmbedding, bias: nn.Parameter | None) -> None:
        """Make a head on `embedding`, which the base model owns."""
        super().__init__()
        self.refer_to(embedding)
        self.bias = bias

    def refer_to(self, embedding: Any) -> None:
        """Use an embedding that the base model owns: the reference is unregistered."""
        self.__dict__["_embedding"] = embedding

    @property
    def weight(self) -> Tensor:
        """The embedding's dense weight; see `CompressedWeight.weight`."""
        embedding: CompressedEmbedding = self.__dict__["_embedding"]
        if "initializing" in self.__dict__:
            return nothing_to_fill(embedding.rows, embedding.columns)
        return embedding.weight

    def fit_bias(self) -> None:
        """Give the bias as many numbers as the embedding has rows, new ones of 0."""
        if self.bias is not None:
            more = self.__dict__["_embedding"].rows - self.bias.shape[0]
            self.bias.data = nn.functional.pad(self.bias.data, (0, more))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, [..., width] → [..., tokens]."""
        logits: Tensor = self.__dict__["_embedding"](hidden, as_logits=True)
        return logits if self.bias is None else logits + self.bias
