"""What a resumable run keeps: its statistics, its solved groups, and all that these depend on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..artifact.report import GroupReport, versions
from ..foundation.processes import ALONE, Processes
from ..foundation.unfinished import UnfinishedRun, digest, remembered
from ..measure import statistics as measured
from ..measure.passes import LayerPasses
from ..measure.statistics import Statistics
from ..measure.texts import CalibrationRecord, CalibrationText
from ..plan.groups import Group, Plan
from ..request.options import CompressionOptions
from ..solvers import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATISTICS = "statistics"
# Fields of a problem that its digest leaves out.
CALLED = ("progress", "judge")
Measured = tuple[Statistics, CalibrationRecord | None]


@dataclass(frozen=True)
class Solved:
    """What became of groups that were solved together.

    Attributes:
        tensors: by full name, in storage dtype.
        reports: of each group.
        wider: names of groups whose storage does not hold their numbers, with the dtypes that do.
    """

    tensors: dict[str, Tensor]
    reports: tuple[GroupReport, ...]
    wider: dict[str, str]


def unfinished_run(
    options: CompressionOptions,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    plan: Plan,
    texts: CalibrationText | None,
    validation: CalibrationText | None,
    tokenizer: Any,
    processes: Processes = ALONE,
) -> UnfinishedRun | None:
    """Return a run that begins, or goes on where one with the same base, request and circumstances was cut.

    None where nothing is to be kept.

    Args:
        options: of the call.
        model: the base, whose weights need not be there.
        state: its tensors, where they are computed.
        plan: what is to become of it, before sizes are allocated.
        texts: to calibrate on, as the model reads them.
        validation: to judge by.
        tokenizer: of the base, or None.
        processes: that share the run; they keep what they find in one folder.

    Raises:
        CompressionError: see `UnfinishedRun.open`.
    """
    if not options.resume or options.target is None:
        return None
    run = UnfinishedRun(Path(options.target))
    if not processes.is_main:
        processes.wait()
        return run
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    run.open(
        {
            "recipe": plan.recipe.to_dict(),
            "base": digest(type(model).__name__, _plain(config), state),
            "calibration text": texts.sha256 if texts else None,
            "validation text": validation.sha256 if validation else None,
            "tokenizer": _digest_of_tokenizer(tokenizer),
            "seed": options.seed,
            "batch size": options.batch_size,
            "loss allowed": options.max_loss,
            "dtype": plan.dtype,
            "device": str(next(iter(state.values())).device),
            "version": {**versions(), "numpy": version("numpy"), "code": _digest_of_code()},
            "number of threads": torch.get_num_threads(),
            "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        }
    )
    processes.wait()
    return run


def kept_statistics(
    run: UnfinishedRun | None,
    measure: Callable[[], Measured],
    processes: Processes = ALONE,
    passes: LayerPasses | None = None,
) -> Measured:
    """Return the statistics that a run has kept, or measure them and keep them; layer by layer where `passes` go so."""
    if run is None:
        return measure()
    if passes is not None:
        passes.keep_in(run)
        return measure()
    classes: list[Any] = [cls for cls in vars(measured).values() if is_dataclass(cls)]
    found = run.get(STATISTICS, [*classes, CalibrationRecord])
    if not all(processes.gather(found is not None)):  # they are measured together, or not at all
        found = measure()
        if processes.is_main:
            run.put(STATISTICS, found)
    return found


def kept_solution(
    run: UnfinishedRun | None, groups: Sequence[Group], problems: Sequence[Problem], solve: Callable[[], Solved]
) -> Solved:
    """Return what a run has kept of these groups, or solve them and keep it.

    They are identified by a digest of everything that the solver is given, however the problems were made:
    another weight, moment, size or storage is another problem.
    """
    if run is None:
        return solve()
    of_each = [
        (repr(group), [(f.name, getattr(problem, f.name)) for f in fields(problem) if f.name not in CALLED])
        for group, problem in zip(groups, problems, strict=True)
    ]
    return remembered(run, f"solved-{digest(of_each)[:32]}", solve, [Solved, GroupReport])


def _plain(value: Any) -> Any:
    """Return a value whose `repr` is the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else str(value)


def _digest_of_tokenizer(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return digest(type(tokenizer).__name__, known, str(tokenizer.special_tokens_map), tokenizer.model_max_length)


def _digest_of_code() -> str:
    """Return a digest of this package: between two commits the version may be the same."""
    root = Path(__file__).parents[1]
    return digest([(str(file.relative_to(root)), file.read_bytes()) for file in sorted(root.rglob("*.py"))])
