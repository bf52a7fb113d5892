"""A bound on memory: what cannot be done within it, how much a compression needs, and how much it took."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import prod

import torch

from ..errors import CompressionError
from ..foundation.memory import peak_memory, resident_memory
from ..foundation.processes import Processes
from ..measure.passes import LayerPasses
from ..plan.groups import FLOAT32, Group, Plan
from ..request.effort import EFFORTS
from ..request.options import CompressionOptions
from ..request.recipe import Recipe
from ..structures import Shape
from .groups import METRICS_AT_ONCE, WEIGHTS_AT_ONCE

logger = logging.getLogger(__name__)
# Times that the numbers of a group that is solved are held at once, as they are, as they become, and on the way; by the
# structure, as measured of large embeddings.
COPIES = {"quantized": 4.0, "trellis": 5.5}
ALL_OTHERS = 8.0
# Bytes a number of a metric while it is factorized, in double precision; and how often the metrics of a batch are held.
FACTORIZED, OF_METRICS = 40, 3
# Times that a layer's are, with the activations of one portion of the text.
LAYER_COPIES = 3
# What small tensors, and memory that is freed but not given back, take beside.
BESIDE = 400_000_000


def check_possible(recipe: Recipe, options: CompressionOptions) -> None:
    """Raise CompressionError where a request needs all of the model at once.

    Args:
        recipe: with all overrides in it.
        options: of the call, with `max_memory`.
    """
    effort = EFFORTS[recipe.effort]
    quick = [name for name, each in EFFORTS.items() if not each.rounds]
    if recipe.calibrated and recipe.allocation == "by_gain" and effort.rounds:
        raise CompressionError(
            f"max_memory (--max-memory) and effort '{recipe.effort}' cannot be combined: it measures the model's loss, "
            f"several times. Pass effort='{quick[0]}' (--effort {quick[0]})."
        )
    others = {
        "max_loss (--max-loss)": options.max_loss is not None,
        "validation text (--validation)": options.validation is not None,
        "a smaller vocabulary": recipe.vocabulary is not None,
        "an objective with an importance": any(rule.objective.importance != "none" for rule in recipe.rules),
        f"the device '{options.device}'": options.device is not None and torch.device(options.device).type != "cpu",
    }
    for what in (name for name, asked in others.items() if asked):
        raise CompressionError(f"max_memory (--max-memory) and {what} cannot be combined; leave one of them out.")


def check_alone(processes: Processes) -> None:
    """Raise CompressionError where several processes share the work."""
    if processes.count > 1:
        raise CompressionError(
            "max_memory (--max-memory) is for one process; start it without accelerate launch, or leave it out."
        )


def check_enough(limit: int, plan: Plan, passes: LayerPasses | None) -> None:
    """Raise CompressionError where a compression is expected to need more memory than it may have.

    Args:
        limit: bytes that this process may have resident.
        plan: of what is to be done, before sizes are allocated.
        passes: through the model's layers; None where no text is run.
    """
    needed = needed_memory(plan, passes)
    if needed > limit:
        raise CompressionError(
            f"max_memory (--max-memory) is {limit / 1e9:.2f} GB, but recipe '{plan.recipe.name}' needs about "
            f"{needed / 1e9:.2f} GB, of which {resident_memory() / 1e9:.2f} GB are taken already; pass {_rounded_up(needed)}."
        )


def needed_memory(plan: Plan, passes: LayerPasses | None) -> int:
    """Return about how many bytes this process will have resident at its peak; see `check_enough`."""
    shapes = plan.layout.parameters
    stages = [plan.total_stored_bytes, *map(_solving, plan.groups)]
    if passes:
        layer = max(_bytes(own, shapes) for own in passes.of_layers)
        # Embeddings and heads are there together with the largest of the layers' statistics, or by themselves.
        stages += [LAYER_COPIES * layer, _bytes(passes.outside, shapes) + LAYER_COPIES * layer]
    return resident_memory() + plan.total_stored_bytes + max(stages) + BESIDE


def _solving(group: Group) -> int:
    """Return about how many bytes it takes to solve a group, with those that are solved with it."""
    copies = COPIES.get(group.structure.name, ALL_OTHERS) * FLOAT32 * max(group.parameters, WEIGHTS_AT_ONCE)
    if not group.rule.objective.calibrated:
        return int(copies)
    square, embedding = group.columns**2, group.matrices[0].embedding
    return (
        int(copies)
        + FACTORIZED * square
        + OF_METRICS * FLOAT32 * (square if embedding else max(square, METRICS_AT_ONCE))
    )


def tell_peak(limit: int) -> None:
    """Warn where this process has had more memory than it was to have."""
    if (peak := peak_memory()) > limit:
        logger.warning(
            "Memory reached %.2f GB, more than the max_memory of %.2f GB; the result is valid.", peak / 1e9, limit / 1e9
        )


def _bytes(names: list[str], shapes: Mapping[str, Shape]) -> int:
    """Return the bytes of parameters in float32; tied ones, which the layout has once, count once."""
    return sum(prod(shapes[name]) for name in names if name in shapes) * FLOAT32


def _rounded_up(number: int) -> str:
    """Return bytes as an option takes them, a tenth of a GB at least more than asked for."""
    return f"{(number // 100_000_000 + 2) / 10:.1f}GB"
