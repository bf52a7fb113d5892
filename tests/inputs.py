"""The batch that heads are tried on; imports nothing of the package, so that a process without it can use it."""

from __future__ import annotations

import torch

TEXT = "the cat sat on the red mat"


def inputs_for(head: str) -> dict[str, torch.Tensor]:
    """Return a small batch that a head takes."""
    ids = torch.tensor([[5, 9, 30, 41, 52, 60, 8, 2], [5, 33, 12, 60, 61, 7, 2, 2]])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    if "MultipleChoice" in head or "DoubleHeads" in head:
        return {"input_ids": torch.stack([ids, ids.flip(1)], dim=1), "attention_mask": torch.stack([mask, mask], dim=1)}
    return {"input_ids": ids, "attention_mask": mask}
