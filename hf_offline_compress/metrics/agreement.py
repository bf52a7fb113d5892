"""Agreement of sentence embeddings: how similar are a compressed encoder's and its base's?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.checkpoint import clamp_length
from ..foundation.processes import ALONE, Processes
from ..measure.texts import cut, padding_of


@torch.inference_mode()
def sentence_embeddings(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 128,
    progress: bool = False,
    processes: Processes = ALONE,
) -> Tensor:
    """Return the mean of the last hidden states over each text's tokens, of unit length, [texts, width], float32.

    Texts are cut at `max_length` tokens. The body of a model with a head is used.

    Args:
        model: stock or compressed.
        tokenizer: the model's.
        texts: at least one for an embedding.
        batch_size: texts in one forward pass.
        max_length: tokens of a text, at most.
        progress: show a progress bar.
        processes: that share the work.
    """
    base = model.base_model.eval()
    limit = min(max_length, clamp_length(tokenizer, model.config).model_max_length)

    def embed(chosen: list[int]) -> Tensor:
        encoded = tokenizer(
            [cut(texts[i], limit) for i in chosen], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(base.device)
        # A tokenizer may have a padding token that the model lacks.
        padding = padding_of(tokenizer, model.config.vocab_size)
        ids = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, padding)
        hidden = base(input_ids=ids, attention_mask=encoded["attention_mask"])[0].float()
        mask = encoded["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1).cpu()

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: less padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = processes.map(embed, batches, desc="embeddings", progress=progress)
    if not found:
        return torch.empty(0, 0)
    embeddings = torch.empty(len(texts), found[0].shape[1])
    embeddings[torch.tensor(order)] = torch.cat(found)
    return embeddings


def agreement(embeddings: Tensor, reference: Tensor) -> float:
    """Return the mean cosine between the rows of two sets of unit-length embeddings, both [texts, width]."""
    return float((embeddings * reference).sum(dim=1).mean())
