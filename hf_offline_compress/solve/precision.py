"""Tensors and groups whose values a planned dtype cannot represent, and the wider dtypes that they are kept in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..artifact.building import reconstructed, rounded_factors
from ..errors import CompressionError, listing
from ..plan.groups import Group, Plan
from ..runtime.storing_compressed import holding, holds
from ..solvers import Factors

# What stands for a weight may change by this share of it when its factors are rounded.
CLOSE = 2.0**-6
logger = logging.getLogger(__name__)


def wider_tensors(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return full name → dtype of the base's tensors that the plan's dtype for all else does not hold.

    Those that are to be compressed are among them, since they may stay dense after all; so are the parts of fused layers.

    Args:
        plan: in which all else is stored in one dtype.
        state: the base's tensors.

    Raises:
        CompressionError: the model's own dtype does not hold what stays dense.
    """
    if plan.rest == plan.dtype:
        check_held(plan, state)
        return {}
    held, narrow, wider = getattr(torch, plan.dtype), getattr(torch, plan.rest), {}
    for name in plan.layout.parameters:
        dtype = holding(state[name].to(held), narrow)
        if dtype != narrow:
            wider[name] = str(dtype).removeprefix("torch.")
    for matrix in plan.layout.matrices:
        at = matrix.full_module(plan.layout.prefix)
        for leaf in ("weight", "bias") if matrix.part else ():
            if f"{at}.{leaf}" in wider:
                wider[f"{matrix.full_name(plan.layout.prefix)}.{leaf}"] = wider[f"{at}.{leaf}"]
    return wider


def check_held(plan: Plan, state: Mapping[str, Tensor]) -> None:
    """Raise CompressionError where the model's own dtype does not hold what stays dense."""
    dtype = getattr(torch, plan.dtype)
    if lost := [name for name in plan.rest_tensors() if name in state and not holds(state[name], dtype)]:
        raise _not_held(lost, plan.dtype)


def wider_storage(group: Group, dtype: str, factors: Factors, rounded: Callable[[Group], Factors]) -> str | None:
    """Return the dtype that a group's numbers need, where that of its storage does not hold them; None where it does.

    Args:
        group: as planned.
        dtype: of the model.
        factors: as the solver gave them, or as integers with scales.
        rounded: gives them for another storage of the group.

    Raises:
        CompressionError: they are not finite, or the model's own dtype does not hold them.
    """
    for tensor in _tensors(factors):
        if not tensor.isfinite().all():
            raise CompressionError(
                f"Solving '{group.name}' ({group.structure.name}) gave NaN or infinite values. More calibration text, another "
                "structure, or leaving it out of `modules` may help."
            )
    narrow = getattr(torch, group.storage.dtype)
    # A factor is judged as a whole, as its group is: rows of (nearly) nothing say nothing there.
    if all(holds(tensor.flatten(), narrow) for tensor in _tensors(factors)):
        return None
    if group.storage.dtype == dtype:
        raise _not_held([group.name], dtype)
    for name in ("bfloat16", "float32"):
        form = replace(group, storage=replace(group.storage, dtype=name))
        found = rounded(form)
        pairs = zip(
            reconstructed(form, rounded_factors(form, found, "float32")),
            reconstructed(
                form, rounded_factors(replace(form, storage=replace(form.storage, dtype="float32")), found, "float32")
            ),
            strict=True,
        )
        if name != group.storage.dtype and all((a - b).norm() <= CLOSE * b.norm() for a, b in pairs):
            return name
    return "float32"


def tell(plan: Plan) -> None:
    """Log what is kept in another dtype than the rest of its kind."""
    there = {*plan.rest_tensors(), *(group.name for group in plan.groups)}
    wider = {name: dtype for name, dtype in plan.wider.items() if name in there}
    for dtype in sorted(set(wider.values())):
        names = [name for name, kept in wider.items() if kept == dtype]
        logger.warning(
            "Kept in %s, since half precision cannot represent their values: %s%s.",
            dtype,
            listing(names[:3]),
            f" and {len(names) - 3} more" if len(names) > 3 else "",
        )


def _tensors(factors: Factors) -> Iterator[Tensor]:
    for tensors in (*factors.members, factors.decoder):
        yield from (tensor for tensor in tensors.values() if tensor.is_floating_point())


def _not_held(names: list[str], dtype: str) -> CompressionError:
    return CompressionError(
        f"{dtype} cannot represent the values of {listing(names[:3])}{' …' if len(names) > 3 else ''}: they are too large or too "
        "small. Pass dtype='float32' (--dtype float32)."
    )
