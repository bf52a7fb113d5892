"""Numbers stored in a narrower dtype than they are held in: which dtypes can represent them."""

import torch
from torch import Tensor

# Rounding may change a row by this share of its norm, twice what bfloat16 does to one number.
CLOSE = 2.0**-8
# Rows whose numbers are below this share of the largest one are negligible.
NOTHING = 1e-12


def holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether rounding a tensor to a dtype leaves each of its rows finite and close."""
    if tensor.dtype == dtype or not tensor.numel():
        return True
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        return False
    rows = tensor.detach().float().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else tensor.numel())
    peaks = rows.abs().amax(dim=1, keepdim=True)
    used = (peaks > NOTHING * peaks.max()).squeeze(1)
    rows, peaks = rows[used], peaks[used]
    # Squares of very small numbers would be zero: rows are divided by their largest number first.
    lost = ((rounded.detach().float().view(-1, rows.shape[1])[used] - rows) / peaks).norm(dim=1)
    return bool((lost <= CLOSE * (rows / peaks).norm(dim=1)).all())


def holding(tensor: Tensor, narrow: torch.dtype) -> torch.dtype:
    """Return the dtype to store a tensor in: `narrow`, or bfloat16, if that can represent it, else its own.

    A dtype that represents it exactly is preferred, so that a tensor is not rounded a second time.
    """
    if narrow.itemsize >= tensor.dtype.itemsize:
        return tensor.dtype
    candidates = dict.fromkeys((narrow, torch.bfloat16))
    for dtype in candidates:
        if tensor.to(dtype).to(tensor.dtype).equal(tensor):
            return dtype
    return next((dtype for dtype in candidates if holds(tensor, dtype)), tensor.dtype)
