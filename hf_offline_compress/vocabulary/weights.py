"""A model with some rows of its vocabulary: embeddings, heads and their biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..architectures.stock import empty_model
from ..errors import CompressionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def keep_rows(model: PreTrainedModel, rows: Sequence[int], changes: Mapping[str, Any]) -> int:
    """Keep some rows of every parameter with one row per token, in place; return the number of removed parameters.

    What has a row for each token is what has another shape in the stock model of a smaller vocabulary, so no names need to
    be known, and what is tied stays tied.

    Args:
        model: stock.
        rows: of the vocabulary, in their new order.
        changes: of its config, `vocab_size` apart.

    Raises:
        CompressionError: the model has rows for tokens that its config does not explain.
    """
    before = model.config.vocab_size
    config = copy.deepcopy(model.config)
    for key, value in {**changes, "vocab_size": len(rows)}.items():
        setattr(config, key, value)
    wanted = {name: p.shape for name, p in empty_model(type(model), config).named_parameters(remove_duplicate=False)}
    index = torch.tensor(rows)
    pruned: dict[int, nn.Parameter] = {}
    removed = 0
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        shape = wanted.get(name, parameter.shape)
        if shape == parameter.shape:
            continue
        if (before, *shape[1:]) != tuple(parameter.shape) or shape[0] != len(rows):
            raise CompressionError(
                f"The model's '{name}' has the shape {list(parameter.shape)}, and its config describes {before:,} tokens; "
                "correct its config (vocab_size, num_labels, …), then prune its vocabulary."
            )
        if id(parameter) not in pruned:
            kept = parameter[index.to(parameter.device)].clone()
            pruned[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            removed += parameter.numel() - kept.numel()
        module = model.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], pruned[id(parameter)])
        _tell(module, before, len(rows))
    words: Any = model.get_input_embeddings()
    if getattr(words, "padding_idx", None) is not None:
        words.padding_idx = config.pad_token_id
    for key, value in {**changes, "vocab_size": len(rows)}.items():
        setattr(model.config, key, value)
    for module in model.modules():  # linear layers and embeddings may be as wide by chance
        if not isinstance(module, nn.Linear | nn.Embedding):
            _tell(module, before, len(rows))
    return removed


def _tell(module: nn.Module, before: int, after: int) -> None:
    """Update the vocabulary size that a module stores."""
    sized = ("num_embeddings", "out_features") if isinstance(module, nn.Linear | nn.Embedding) else ("vocab_size",)
    for name in sized:
        if getattr(module, name, None) == before:
            setattr(module, name, after)
