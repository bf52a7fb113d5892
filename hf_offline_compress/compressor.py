"""The one orchestrator: plan → statistics → solve each group → build → report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .allocation import Choices, allocate
from .base import (
    BaseCheckpoint,
    clamp_length,
    load_model,
    load_tokenizer,
    resolve_architecture,
    resolve_base,
)
from .building import build_model, named_tensors, reconstructed, rounded_factors
from .calibration import Statistics, collect
from .calibration_text import CalibrationRecord, CalibrationText, load_texts, make_batches
from .errors import CompressionError, listing
from .families import family_of
from .folder import save_folder
from .plan import FLOAT32, Plan, make_plan
from .recipe import STORAGES, Recipe, load_recipe
from .report import GroupReport, Report, group_report, totals, versions
from .sensitivity import measure_sensitivity
from .solvers import expected_errors, solve
from .weighting import problem_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASKED_HEADS = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model and all that belongs to it.

    Attributes:
        model: the compressed model, in evaluation mode.
        tokenizer: of the base; None if it has none.
        report: what was done.
        source: the base's folder, from which companion files are carried along; None for a model in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    report: Report
    source: Path | None = None

    def save(self, folder: str | Path, *, overwrite: bool = False, max_shard_size: str | int = "50GB") -> Path:
        """Write a finished, self-contained folder, whole or not at all, and return its path.

        Args:
            folder: where to; it must not exist yet, or be empty.
            overwrite: replace a folder that this package has written.
            max_shard_size: larger weights are split into files of this size.

        Raises:
            CompressionError: the folder holds something, and `overwrite` is not given or it is none of ours.
        """
        return save_folder(
            Path(folder), self.model, self.tokenizer, self.report, self.source, overwrite, max_shard_size
        )


def compress(
    base: str | Path | PreTrainedModel,
    recipe: str | Path | Recipe = "calibrated-svd",
    *,
    ratio: float | None = None,
    modules: str | Sequence[str] | None = None,
    grouping: str | None = None,
    storage: str | None = None,
    allocation: str | None = None,
    calibration: str | Path | Sequence[str] | None = "bundled",
    tokenizer: PreTrainedTokenizerBase | None = None,
    auto_class: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CompressionResult:
    """Return a smaller model that does nearly what `base` does; nothing is fine-tuned, and `base` is left as it is.

    Args:
        base: a Hub id, a local folder, or a stock model in memory.
        recipe: a preset's name, a YAML file, or a `Recipe`; the keywords below override it.
        ratio: 4 bytes × parameters of the chosen matrices, over the bytes stored for them.
        modules: kinds, shorthands, or regular expressions that match whole module names.
        grouping: "separated", "concatenated" or "blocks:N".
        storage: dtype of the stored factors, "float32", "float16" or "bfloat16".
        allocation: "uniform", every group at the ratio; or "by_gain", all together, each as large as pays most.
        calibration: "bundled", texts, a file with one text a line, a data set's name, or None for no data.
        tokenizer: of the base, if that is a model in memory.
        auto_class: which class to load the base with, e.g. "AutoModelForMaskedLM"; by default the one it was saved from.
        dtype: what the base is loaded and computed in, and what the result has. By default it is computed in float32,
            and the result has the checkpoint's dtype.
        device: where it is computed, e.g. "cuda"; by default on the CPU, or where a model in memory lies.
        batch_size: calibration texts in one forward pass.
        seed: of everything random.
        revision: of a base on the Hub.
        token: for a base on the Hub; by default the one you are logged in with.
        trust_remote_code: run code that comes with the base's tokenizer. The model is always a stock class.
        progress: show progress bars.

    Raises:
        CompressionError: something in the request cannot be done. Nothing has been written.
    """
    recipe = load_recipe(recipe).override(
        modules=modules, ratio=ratio, grouping=grouping, storage=storage, allocation=allocation
    )
    texts = load_texts(calibration) if recipe.calibrated else None
    if texts is None:
        recipe = recipe.without_calibration()
    clock = _Clock()
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress, "clock": clock}
    if isinstance(base, nn.Module):
        return compress_model(base, recipe, texts, tokenizer=tokenizer, dtype=dtype, device=device, **options)

    source = resolve_base(base, revision=revision, token=token)
    architecture = resolve_architecture(source.config, auto_class)
    wanted = _dtype_name(dtype)
    # The plan is made before the weights are read, so that what cannot be done is said at once.
    make_plan(source.config, recipe, architecture=architecture, dtype=wanted)
    tokenizer = tokenizer or load_tokenizer(source, trust_remote_code=trust_remote_code)
    with clock("load"):
        model = load_model(source, architecture, torch.float32 if wanted is None else getattr(torch, wanted))
    return compress_model(
        model,
        recipe,
        texts,
        tokenizer=tokenizer,
        dtype=wanted or _checkpoint_dtype(source),
        device=device,
        source=source,
        **options,
    )


def compress_model(
    model: PreTrainedModel,
    recipe: Recipe,
    texts: CalibrationText | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    source: BaseCheckpoint | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    clock: _Clock | None = None,
) -> CompressionResult:
    """Return the compressed form of a model in memory; needs no network. See `compress`.

    Args:
        model: a stock model; if it has a `source`, it is ours to take apart.
        recipe: with all overrides in it.
        texts: calibration text; None makes every objective data-free.
        tokenizer: needed if there is text.
        dtype: of the result; by default the model's.
        device: where it is computed.
        source: where the model was loaded from, if it was.
        batch_size: texts in one forward pass.
        seed: of everything random.
        progress: show progress bars.
        clock: measures the stages.
    """
    clock = clock or _Clock()
    if texts is None:
        recipe = recipe.without_calibration()
    config = model.config.to_dict()
    family = family_of(config)
    architecture = type(model).__name__
    plan = make_plan(config, recipe, architecture=architecture, dtype=_dtype_name(dtype or model.dtype))
    if texts is not None and tokenizer is None:
        raise CompressionError(
            "Calibration needs the model's tokenizer, and there is none; pass tokenizer=, or calibration=None for a "
            "data-free compression."
        )
    home = next(model.parameters()).device
    device = torch.device(device or home)
    _check_finite(model, family.title)
    compute = model.to(device)  # type: ignore[arg-type]
    was_training = model.training
    compute.eval()

    try:
        statistics, record = Statistics(), None
        if texts is not None:
            with clock("calibrate"):
                statistics, record = _calibrate(compute, plan, texts, tokenizer, seed, batch_size, progress)
        if recipe.allocation == "by_gain":
            with clock("allocate"):
                plan = _allocated(compute, plan, statistics, progress)
        with clock("solve"):
            factors, reports = _solve_groups(compute, plan, statistics, seed, progress)
        with clock("build"):
            built = build_model(compute, plan, factors, source)
    finally:
        if source is None:
            model.to(home).train(was_training)  # type: ignore[arg-type]
    name = source.name if source else Path(str(model.config.name_or_path or "a model in memory")).name
    report = Report(
        base={"name": name, "revision": source.revision if source else None},
        architecture=architecture,
        recipe=recipe.to_dict(),
        seed=seed,
        dtype=plan.dtype,
        calibration=record.to_dict() if record else None,
        groups=tuple(reports),
        dense=plan.dense,
        totals=totals(plan),
        seconds=clock.seconds,
        versions=versions(),
    )
    if tokenizer is not None:
        tokenizer = clamp_length(tokenizer, config)
    return CompressionResult(built, tokenizer, report, source.folder if source else None)


def _calibrate(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText,
    tokenizer: Any,
    seed: int,
    batch_size: int | None,
    progress: bool,
) -> tuple[Statistics, CalibrationRecord]:
    config = model.config.to_dict()
    batches, record = make_batches(
        texts,
        tokenizer,
        masked=plan.architecture.endswith(MASKED_HEADS),
        positions=clamp_length(tokenizer, config).model_max_length,
        seed=seed,
        batch_size=batch_size,
    )
    wanted = [m for group in plan.groups if group.rule.objective.calibrated for m in group.matrices]
    statistics = collect(
        model,
        wanted,
        batches,
        tied=plan.skeleton.tied and plan.recipe.sensitive,
        progress=lambda items: tqdm(items, desc="calibrating", unit="batch", disable=not progress),
    )
    if plan.recipe.sensitive:
        asked = [m for group in plan.groups if group.rule.objective.sensitive for m in group.matrices]
        words = [m for m in plan.skeleton.matrices if m.kind == "word_embeddings"]
        # Positions are added to words: what is said of an error in one holds for the other.
        measured = [m for m in asked if not m.embedding] + (words if any(m.embedding for m in asked) else [])
        statistics.sensitivity = measure_sensitivity(
            model,
            measured,
            batches,
            mask_token=tokenizer.mask_token_id if record.masked else None,
            seed=seed,
            progress=lambda items: tqdm(items, desc="sensitivity", unit="batch", disable=not progress),
        )
        if silent := [m.name for m in measured if m.name not in statistics.sensitivity.output_moments]:
            raise CompressionError(
                f"The output of {plan.architecture} on plain text does not depend on {listing(silent[:3])}, so the objective "
                "'sensitive' says nothing of it; leave it out of `modules`, or give it a rule with another objective."
            )
    return statistics, record


def _allocated(model: PreTrainedModel, plan: Plan, statistics: Statistics, progress: bool) -> Plan:
    """Return the plan with the bytes that its groups have in all given to those that gain most from them."""
    state = model.state_dict()
    choices = []
    for group in tqdm(plan.groups, desc="allocating", unit="group", disable=not progress):
        problem = problem_of(group, state, plan.skeleton.prefix, statistics)
        candidates = range(1, group.structure.limit(sum(group.rows), group.columns) + 1)
        costs = [float(replace(group, size=size).stored_bytes) for size in candidates]
        dense = group.parameters * STORAGES[plan.dtype]
        costs = [cost for cost in costs if cost < dense]  # they grow with size: what is left is a beginning
        errors = expected_errors(problem).cpu()[1 : len(costs) + 1]
        choices.append(Choices(errors, torch.tensor(costs, dtype=torch.float64)))
    budget = sum(group.parameters * FLOAT32 / group.rule.ratio for group in plan.groups)
    chosen = allocate(choices, budget)
    return plan.resized({group.name: i + 1 for group, i in zip(plan.groups, chosen, strict=True)})


def _solve_groups(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, seed: int, progress: bool
) -> tuple[dict[str, Tensor], list[GroupReport]]:
    """Return the tensors that stand for all groups, by full name and in storage dtype, and a report of each."""
    state = model.state_dict()
    prefix = plan.skeleton.prefix
    tensors: dict[str, Tensor] = {}
    reports: dict[str, GroupReport] = {}
    # Embeddings, which need the most room, come last: by then the moments of all layers have been dropped.
    order = sorted(enumerate(plan.groups), key=lambda item: item[1].matrices[0].embedding)
    last_use = {m.inputs: group.name for _, group in order for m in group.matrices}
    with tqdm(total=len(plan.groups), desc="compressing", unit="group", disable=not progress) as bar:
        for index, group in order:
            started, before = time.perf_counter(), bar.n

            def step(share: float, before: float = before) -> None:
                bar.update(before + share - bar.n)

            problem = replace(problem_of(group, state, prefix, statistics), seed=seed + index, progress=step)
            solved = solve(problem)
            stored = rounded_factors(group, solved, plan.dtype)
            tensors |= named_tensors(group, stored, prefix)
            reports[group.name] = group_report(
                group,
                problem,
                list(reconstructed(group, stored)),
                seconds=time.perf_counter() - started,
                notes=solved.notes,
            )
            for matrix in group.matrices:  # moments of wide layers are large: each is dropped after its last use
                if last_use[matrix.inputs] == group.name:
                    statistics.input_moments.pop(matrix.inputs, None)
            step(1.0)
    return tensors, [reports[group.name] for group in plan.groups]


def _check_finite(model: nn.Module, title: str) -> None:
    bad = [name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if bad:
        raise CompressionError(
            f"The base has NaN or infinite values in {listing(bad[:3])}{' …' if len(bad) > 3 else ''}; "
            f"a {title} model with broken weights cannot be compressed. Save it again, or pass another checkpoint."
        )


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Return a dtype's plain name.

    Raises:
        CompressionError: it is no dtype that a model can be stored in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in STORAGES:
        raise CompressionError(f"The dtype '{name}' is not supported; supported are {listing(STORAGES)}.")
    return name


def _checkpoint_dtype(source: BaseCheckpoint) -> str | None:
    """Return the dtype that the checkpoint was saved in, as its config says; None where it says nothing."""
    dtype = source.config.get("dtype") or source.config.get("torch_dtype")
    return str(dtype) if dtype else None


class _Clock:
    """Seconds a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)
