"""The one orchestrator: plan → statistics → solve each group → build → report."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .allocate.apply import offers_of
from .allocate.measured import Fit, Outcome, Round, allocated_and_solved
from .allocate.search import loss_judge, search_ratio, searched_on
from .architectures.families import family_of, objective_of
from .architectures.layout import ParameterLayout
from .architectures.stock import layout_of_model
from .artifact.building import build_model
from .artifact.report import GroupReport, Report, totals, versions
from .artifact.writing import save_folder
from .base.checkpoint import (
    BaseCheckpoint,
    clamp_length,
    load_model,
    load_tokenizer,
    open_model,
    pipeline_root,
    resolve_architecture,
    resolve_base,
)
from .base.given import check_base, check_tokenizer
from .base.shards import Shards
from .base.texts import languages_of, prompts_of
from .errors import BudgetTooSmallError, CompressionError, listing
from .foundation.arguments import real, seed_of, whole
from .foundation.files import read_json
from .foundation.memory import release_memory
from .foundation.options import chosen, documented
from .foundation.parsing import parse_bytes
from .foundation.preflight import check_decoding, check_room, existing, found_device
from .foundation.processes import ALONE, Processes, launched_processes
from .foundation.progress import stage
from .foundation.unfinished import UnfinishedRun
from .measure.collect import batches_in_the_end, course_of, divergence_from, mask_token_of, measure
from .measure.passes import LayerPasses
from .measure.presenting import presented, warn_of_languages
from .measure.statistics import Statistics
from .measure.texts import Batch, CalibrationRecord, CalibrationText, load_texts, warn_of_overlap
from .plan.groups import Plan
from .plan.make import make_plan
from .request.options import CompressionOptions
from .request.reading import load_recipe
from .request.recipe import DEFAULT_RECIPE, STORAGES, Recipe
from .solve.disk_space import bytes_beside
from .solve.groups import solve_groups, tell_of_slow_search
from .solve.in_order import solve_in_order
from .solve.judge import check_judged, perplexity_judge
from .solve.last_norm import fit_last_norm, may_have_last_norm
from .solve.limit import check_alone, check_enough, check_possible, tell_peak
from .solve.precision import check_held, tell, wider_tensors
from .solve.resuming import kept_statistics, unfinished_run
from .vocabulary import PrunedVocabulary, prune_vocabulary, vocabulary_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .hub.push import Pushed

Timed = TypeVar("Timed")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model and all that belongs to it.

    Attributes:
        model: the compressed model, in evaluation mode.
        tokenizer: of the base; None if it has none.
        report: what was done.
        source: the base's folder, from which companion files are carried along; None for a model in memory.
        run: intermediate results for resuming; deleted once the model is saved.
        processes: those that computed the result; the first one writes it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    report: Report
    source: Path | None = None
    run: UnfinishedRun | None = None
    processes: Processes = ALONE

    def __repr__(self) -> str:
        """Return one line; the report has the rest."""
        return f"CompressionResult({type(self.model).__name__}, {self.report!r})"

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        max_shard_size: str | int = "50GB",
        decoding: str | None = None,
    ) -> Path:
        """Write a finished, self-contained folder atomically, and return its path.

        Args:
            folder: where to; it must not exist yet, or be empty.
            overwrite: replace a folder that this package has written.
            max_shard_size: larger weights are split into files of this size.
            decoding: how weights are held when the folder is loaded: "cached" (the default), "on_the_fly", "int8" or
                "auto"; see the model's `set_decoding`.

        Raises:
            CompressionError: the folder is not empty, and `overwrite` is not given or it is not ours; or there is
                no such decoding.
        """
        from .card import renew_card

        check_decoding(decoding)
        if decoding is not None:
            self.model.config.compression["decoding"] = decoding

        base = pipeline_root(self.source) if self.source else None
        if not self.processes.is_main:
            self.processes.wait()
            return Path(folder)
        saved = save_folder(
            Path(folder),
            self.model,
            self.tokenizer,
            self.report,
            self.source,
            overwrite,
            max_shard_size,
            write_card=lambda old, new: renew_card(old, new, base),
            run=self.run,
        )
        self.processes.wait()
        return saved

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        max_shard_size: str | int = "50GB",
    ) -> Pushed:
        """Save to a temporary folder, verify it, and publish it on the Hub; see `push_folder`.

        Args:
            repo_id: "name" or "owner/name".
            private: make the repository private.
            revision: a branch; main by default.
            message: of the commit.
            create_pr: propose the commit as a pull request.
            token: by default the one that you are logged in with.
            max_shard_size: larger weights are split into files of this size.

        Raises:
            CompressionError: a check fails, or the Hub rejects it; the message says what was published.
        """
        from .hub.push import push_folder

        with tempfile.TemporaryDirectory() as scratch:
            name = repo_id.rpartition("/")[2]  # the title of the card
            folder = self.save(Path(scratch) / (name or "model"), max_shard_size=max_shard_size)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                message=message,
                create_pr=create_pr,
                token=token,
            )


@dataclass(frozen=True)
class _Request:
    """What is asked for, read and checked: the recipe with all overrides in it, the texts, and the options."""

    recipe: Recipe
    texts: CalibrationText | None
    validation: CalibrationText | None
    options: CompressionOptions


@dataclass(frozen=True)
class _Subject:
    """The model that is compressed; where it has a source, it is ours to take apart.

    Where there are shards, they have its weights, and the model has none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    dtype: str
    source: BaseCheckpoint | None = None
    plan: Plan | None = None
    vocabulary: dict[str, Any] | None = None
    shards: Shards | None = None


@documented(CompressionOptions)
def compress(
    base: str | Path | PreTrainedModel,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    options: CompressionOptions | None = None,
    **changes: Any,
) -> CompressionResult:
    """Return a smaller model that approximates `base`; nothing is fine-tuned, and `base` is not changed.

    Args:
        base: a Hub id, a local folder, or a stock model in memory.
        recipe: a preset's name, a YAML file, or a `Recipe`.
        options: all options below as one object, reusable across calls.
        **changes: any of these by name, overriding `options`.
        {options}

    Raises:
        CompressionError: the request cannot be met. Nothing has been written.
    """
    check_base(base)
    request = _request(recipe, chosen(CompressionOptions, options, changes))
    options, clock = request.options, _Clock()
    if isinstance(base, nn.Module):
        if options.max_memory is not None:
            raise CompressionError(
                "max_memory is for bases larger than memory, and this one is in memory; pass its folder, or leave it out."
            )
        model = _narrow_enough(base)
        dtype = _dtype_name(options.dtype or model.dtype)
        assert dtype is not None
        subject = _Subject(model, options.tokenizer, dtype)
        return _compressed(
            _pruned_in_memory(subject, request, clock) if request.recipe.vocabulary else subject, request, clock
        )

    with stage("finding the base"):
        source = resolve_base(base, revision=options.revision, token=options.token)
    architecture = resolve_architecture(source.config, options.auto_class)
    wanted = _dtype_name(options.dtype)
    stored = wanted or _checkpoint_dtype(source)
    tokenizer, config, vocabulary = options.tokenizer, source.config, None
    if request.recipe.vocabulary:
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code=options.trust_remote_code)
        generation = read_json(source.folder / "generation_config.json")
        vocabulary = _pruned(request, tokenizer, config, source.name, generation, source, clock)
        config = vocabulary.config(config)
    # The plan is made before the weights are read, so that what cannot be done is said at once.
    request, plan = _begun(request, partial(make_plan, config, architecture=architecture, dtype=wanted))
    _check_disk(plan, options)
    if request.validation and options.max_loss is None:
        check_judged(architecture)
    tokenizer = tokenizer or load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    with clock("load"), stage("loading the base"):
        held, shards = torch.float32 if wanted is None else getattr(torch, wanted), None
        if options.max_memory is None:
            model = load_model(source, architecture, held)
        else:
            model, shards = open_model(source, architecture, held)
    subject = _Subject(model, tokenizer, stored or plan.dtype, source, plan, shards=shards)
    return _compressed(_with(subject, vocabulary) if vocabulary else subject, request, clock)


def _request(recipe: str | Path | Recipe, options: CompressionOptions) -> _Request:
    """Return a request whose numbers, names and texts are known to be usable, whatever the base.

    Raises:
        CompressionError: something of it cannot be done.
    """
    check_tokenizer(options.tokenizer)
    options = replace(
        options,
        seed=seed_of(options.seed),
        batch_size=None if options.batch_size is None else whole(options.batch_size, "batch_size", 1),
        max_loss=None if options.max_loss is None else real(options.max_loss, "max_loss"),
        max_memory=None if options.max_memory is None else parse_bytes(options.max_memory),
    )
    if options.resume and options.target is None:
        raise CompressionError(
            "resume=True keeps what is worked out beside the result: pass target, where it will lie."
        )
    if options.device is not None:
        found_device(options.device)
    recipe = load_recipe(recipe).override(**options.overrides)
    if options.max_memory is not None:
        check_possible(recipe if options.calibration not in (None, "none") else recipe.without_calibration(), options)
    texts = load_texts(options.calibration) if recipe.calibrated else None
    if texts is None:
        recipe = recipe.without_calibration()
    for rule in recipe.rules:
        for structure in rule.structures:
            structure.require()
    validation = load_texts(options.validation, "validation")
    warn_of_overlap(texts, validation)
    if options.max_loss is not None:
        sizes = (options.ratio, options.total_ratio, options.max_bytes)
        texts, validation = searched_on(options.max_loss, recipe, texts, validation, sizes)
    return _Request(recipe, texts, validation, options)


def _begun(request: _Request, plan: Callable[[Recipe], Plan]) -> tuple[_Request, Plan]:
    """Return a request and its plan; a search for the size begins at the smallest one, where the recipe's own is smaller."""
    try:
        return request, plan(request.recipe)
    except BudgetTooSmallError as error:
        if request.options.max_loss is None:
            raise
        recipe = request.recipe.override(total_ratio=round(error.total_ratio * 0.999, 3))
        return replace(request, recipe=recipe), plan(recipe)


def _pruned(
    request: _Request,
    tokenizer: PreTrainedTokenizerBase | None,
    config: dict[str, Any],
    name: str,
    generation: dict[str, Any] | None,
    source: BaseCheckpoint | None,
    clock: _Clock,
) -> PrunedVocabulary:
    """Return the vocabulary that was asked for; what the model reads with its texts, as prompts, stays too."""
    asked = request.recipe.vocabulary
    assert asked is not None
    text = vocabulary_text(asked, tokenizer, source.folder if source else None)
    judged = {"calibration": request.texts, "validation": request.validation}
    with clock("vocabulary"), stage("pruning the vocabulary"):
        return prune_vocabulary(asked, text, tokenizer, config, name=name, generation=generation, judged=judged)


def _pruned_in_memory(subject: _Subject, request: _Request, clock: _Clock) -> _Subject:
    """Return a copy of a model in memory with the vocabulary that was asked for."""
    model = copy.deepcopy(subject.model)
    generation = getattr(model, "generation_config", None)
    values = generation.to_dict() if generation is not None else None
    name = Path(str(model.config.name_or_path or "a model in memory")).name
    found = _pruned(request, subject.tokenizer, model.config.to_dict(), name, values, None, clock)
    return _with(replace(subject, model=model), found)


def _with(subject: _Subject, vocabulary: PrunedVocabulary) -> _Subject:
    """Return a model of ours with another vocabulary."""
    record = {**vocabulary.record, "removed_parameters": vocabulary.apply(subject.model)}
    return replace(subject, tokenizer=vocabulary.tokenizer, vocabulary=record)


def _compressed(subject: _Subject, request: _Request, clock: _Clock) -> CompressionResult:
    """Return the compressed form of a model in memory; needs no network."""
    model, tokenizer, source, options = subject.model, subject.tokenizer, subject.source, request.options
    texts, validation, max_loss, progress = request.texts, request.validation, options.max_loss, options.progress
    processes = launched_processes(str(options.device) if options.device is not None else None)
    progress = progress and processes.is_main
    config = model.config.to_dict()
    layout, wider = layout_of_model(model), dict[str, str]()

    planned = partial(_planned, subject, layout, wider)
    request, plan = _begun(request, lambda recipe: planned(recipe, subject.plan))
    _check_disk(plan, options)
    texts = _texts_as_read(subject, request)
    passes = _passes(subject, plan, texts, options, processes)
    _check_finite(model, subject.shards or model.state_dict(), family_of(config).title)
    device = processes.device if processes.count > 1 else options.device
    with _measurable(model, device, ours=source is not None) as compute:
        state: Mapping[str, Tensor] = subject.shards or compute.state_dict()
        run = unfinished_run(options, compute, state, plan, texts, validation, tokenizer, processes)
        wider |= wider_tensors(plan, state)
        plan = planned(request.recipe, plan)
        if processes.is_main:
            tell_of_slow_search(plan, torch.device("cpu") if subject.shards else compute.device)

        how: dict[str, Any] = {"seed": options.seed, "batch_size": options.batch_size}

        def measured() -> tuple[Statistics, CalibrationRecord | None]:
            if texts is None:
                return Statistics(), None
            with clock("calibrate"):
                shared = {**how, "progress": progress, "processes": processes, "passes": passes}
                work = partial(measure, compute, plan, texts, tokenizer, **shared)
                return kept_statistics(run, work, processes, passes)

        statistics, record = measured()
        divergence = divergence_from(compute, plan, texts, tokenizer, **how)
        # Moments are dropped as they are used, to save memory, unless they are needed again.
        again = max_loss is not None or divergence is not None
        rounds: list[Round] = []
        shared: dict[str, Any] = {"processes": processes, "seed": options.seed}
        in_order = partial(
            solve_in_order,
            state=state,
            statistics=statistics,
            course=partial(course_of, compute, plan, texts, tokenizer, batch_size=options.batch_size, **shared),
            solve=partial(solve_groups, run=run, progress=False, **shared),
            progress=progress,
        )

        def solve(sized: Plan) -> Outcome:
            known = replace(statistics, input_moments=dict(statistics.input_moments)) if again else statistics
            check_held(sized, state)
            with clock("solve"):
                judged = validation if max_loss is None else None
                judge = perplexity_judge(compute, sized, tokenizer, judged) if judged else None
                kept: dict[str, Any] = {"seed": options.seed, "judge": judge, "run": run, "processes": processes}
                return solve_groups(sized, state, known, progress=progress, **kept)

        def solved(recipe: Recipe) -> tuple[Plan, PreTrainedModel, list[GroupReport]]:
            sized, offers = planned(recipe, plan), None
            if recipe.allocation == "by_gain":
                with clock("allocate"):
                    offers = offers_of(state, sized, statistics, progress, processes)
            coded = clock.around("in_order", in_order)
            fit = _fit_of_last_norm(compute, sized, texts, tokenizer, how)
            outcome = allocated_and_solved(
                sized, offers, divergence, solve, coded, fit and clock.around("last_norm", fit), processes
            )
            sized, (factors, reports, lost), rounds[:] = outcome
            if lost:  # rare: sizes must be found anew for the dtypes that hold these groups
                wider.update(lost)
                if not again:
                    statistics.input_moments = measured()[0].input_moments
                return solved(recipe)
            with clock("build"), stage("building the compressed model"):
                return sized, build_model(compute, state, sized, factors, source), reports

        search = None
        if max_loss is None:
            plan, built, reports = solved(request.recipe)
        else:
            assert validation is not None and tokenizer is not None
            with clock("search"):
                loss = loss_judge(compute, tokenizer, validation)
                judge = partial(_judged_by_main, processes, loss)
                (plan, built, reports), recipe, trials = search_ratio(
                    solved, request.recipe, plan, judge, max_loss, progress
                )
                request = replace(request, recipe=recipe)
            search = {"max_loss": max_loss, "trials": [asdict(trial) for trial in trials]}
        tell(plan)
    if options.max_memory is not None:
        built.set_decoding("on_the_fly")  # type: ignore[operator]  # decoded, it would be as large as the base
        tell_peak(int(options.max_memory))
    about = _about(subject, request) | {
        "dtype": plan.dtype,
        "calibration": record.to_dict() if record else None,
        "search": search,
        "rounds": [asdict(step) for step in rounds] or None,
        "groups": tuple(reports),
        "dense": plan.dense,
        "totals": totals(plan),
        "seconds": clock.seconds,
    }
    if tokenizer is not None:
        tokenizer = clamp_length(tokenizer, config)
    return CompressionResult(built, tokenizer, Report(**about), source.folder if source else None, run, processes)


def _check_disk(plan: Plan, options: CompressionOptions) -> None:
    """Raise CompressionError where the disk lacks space for the result, or for what is kept until it is saved."""
    target = None if options.target is None else Path(options.target)
    by_layers = options.max_memory is not None
    beside = bytes_beside(plan, target, resume=options.resume, by_layers=by_layers)
    if target is not None:  # the result of a search may have any size
        check_room(target, plan.file_bytes if options.max_loss is None else 0, beside)
    elif beside:
        check_room(Path(tempfile.gettempdir()), 0, beside)


def _passes(
    subject: _Subject, plan: Plan, texts: CalibrationText | None, options: CompressionOptions, processes: Processes
) -> LayerPasses | None:
    """Return how a model is run whose weights stay on disk; None for any other, or where no text is run.

    Raises:
        CompressionError: it cannot be done, or not within the memory that was allowed.
    """
    if subject.shards is None:
        return None
    check_alone(processes)
    scratch = existing(Path(options.target)) if options.target is not None else None
    passes = None
    if texts is not None:
        layout = plan.layout
        passes = LayerPasses(subject.model, subject.shards, layout.prefix, layout.matrices, scratch)
    assert isinstance(options.max_memory, int)
    check_enough(options.max_memory, plan, passes)
    return passes


def _planned(
    subject: _Subject, layout: ParameterLayout, wider: Mapping[str, str], recipe: Recipe, known: Plan | None
) -> Plan:
    """Return the plan for a recipe; the known one where it is just that."""
    if known and (known.recipe, known.layout, known.dtype) == (recipe, layout, subject.dtype) and known.wider == wider:
        return known
    config, name = subject.model.config.to_dict(), type(subject.model).__name__
    return make_plan(config, recipe, architecture=name, dtype=subject.dtype, wider=dict(wider), layout=layout)


def _texts_as_read(subject: _Subject, request: _Request) -> CalibrationText | None:
    """Return the calibration text as the model's users would pass it: with its prompts, or through its chat template.

    Raises:
        CompressionError: there is text, and no tokenizer.
    """
    texts, tokenizer, source = request.texts, subject.tokenizer, subject.source
    if (texts or request.validation) and tokenizer is None:
        raise CompressionError(
            "Calibration and validation need the model's tokenizer, and there is none; pass tokenizer=, or "
            "calibration=None and no validation to compress without data."
        )
    if texts is None:
        return None
    folder = pipeline_root(source.folder) if source else None
    warn_of_languages(texts, languages_of(folder) if folder else (), tokenizer)
    chat = objective_of(type(subject.model).__name__) == "causal"
    return presented(texts, tokenizer, prompts=prompts_of(folder) if folder else (), chat=chat)


def _about(subject: _Subject, request: _Request) -> dict[str, Any]:
    """Return what a report says of the base and the request."""
    model, source, options, validation = subject.model, subject.source, request.options, request.validation
    name = source.name if source else Path(str(model.config.name_or_path or "a model in memory")).name
    loaded = {"auto_class": options.auto_class, "dtype": _dtype_name(options.dtype), "batch_size": options.batch_size}
    return {
        "base": {
            "name": name,
            "revision": source.revision if source else None,
            "weight_bytes": source.weight_bytes if source else None,
        },
        "architecture": type(model).__name__,
        "recipe": request.recipe.to_dict(),
        "seed": options.seed,
        "validation": {"source": validation.source, "sha256": validation.sha256} if validation else None,
        "options": {key: value for key, value in loaded.items() if value is not None} if source else {},
        "versions": versions(),
        "vocabulary": subject.vocabulary,
    }


def _fit_of_last_norm(
    model: PreTrainedModel,
    plan: Plan,
    texts: CalibrationText | None,
    tokenizer: Any,
    how: Mapping[str, Any],
) -> Fit | None:
    """Return what fits the norm before the head (`fit_last_norm`); None without text or such a norm."""
    if texts is None or not may_have_last_norm(model, plan):
        return None

    def text(tokens: int) -> list[Batch]:
        try:
            return batches_in_the_end(model, plan, texts, tokenizer, tokens, **how)
        except CompressionError as error:  # nothing else has read this text, and the model can do without the fit
            logger.warning("The norm before the head stays as it is: %s", error)
            return []

    mask_token = mask_token_of(plan, tokenizer)
    fit = partial(fit_last_norm, model, text=text, mask_token=mask_token, seed=how["seed"])
    return stage("fitting the last norm")(fit)


def _judged_by_main(processes: Processes, judge: Callable[[Any], float], model: Any) -> float:
    """Return the loss of a model as the first process finds it, so that all go on with the same."""
    return processes.gather(judge(model))[0]


def _narrow_enough(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model in double precision in single; any other as it is."""
    return copy.deepcopy(model).float() if model.dtype == torch.float64 else model


@contextmanager
def _measurable(model: PreTrainedModel, device: str | torch.device | None, *, ours: bool) -> Iterator[PreTrainedModel]:
    """Put a model where it is computed, in evaluation mode, and leave it as it was, unless it is ours to take apart.

    Layers take sequences whole for the while: `chunk_size_feed_forward` cuts them to save memory in use, and what is
    measured are the inputs of all places.
    """
    home, was_training = next(model.parameters()).device, model.training
    chunked: list[tuple[Any, int]] = [
        (module, size) for module in model.modules() if (size := getattr(module, "chunk_size_feed_forward", 0))
    ]
    for module, _ in chunked:
        module.chunk_size_feed_forward = 0
    try:
        if home.type != "meta":  # or its weights are read where they are needed
            model.to(torch.device(device or home))  # type: ignore[arg-type]
        yield model.eval()
    finally:
        if not ours:
            model.to(home).train(was_training)  # type: ignore[arg-type]
            for module, size in chunked:
                module.chunk_size_feed_forward = size


def _check_finite(model: nn.Module, state: Mapping[str, Tensor], title: str) -> None:
    bad = [name for name, _ in model.named_parameters() if not torch.isfinite(state[name]).all()]
    if bad:
        raise CompressionError(
            f"The base has NaN or infinite values in {listing(bad[:3])}{' …' if len(bad) > 3 else ''}; "
            f"a {title} model with broken weights cannot be compressed. Save the model again, or pass another checkpoint."
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
    """Return the dtype to store in, the checkpoint's own or float32 for wider ones; None where its config says nothing."""
    dtype = source.config.get("dtype") or source.config.get("torch_dtype")
    if not dtype:
        return None
    name = str(dtype).removeprefix("torch.").replace("float64", "float32")
    if name not in STORAGES:
        raise CompressionError(
            f"The config.json of '{source.name}' has the dtype {dtype!r}; pass dtype, one of {listing(STORAGES)}."
        )
    return name


class _Clock:
    """Seconds a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        release_memory()
        spent = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        self.seconds[stage] = round(spent, 3)

    def around(self, stage: str, work: Callable[..., Timed]) -> Callable[..., Timed]:
        """Return the work as one that is timed."""

        def timed(*args: Any) -> Timed:
            with self(stage):
                return work(*args)

        return timed
