"""Model + text → the statistics that groups need, mainly second moments of linear layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.layout import Matrix
from ..foundation.processes import ALONE, Processes
from .passes import Passes, Run, forwards_replaced, removed
from .sharing import Sums
from .statistics import CHOICES, Statistics
from .texts import Batch


@torch.no_grad()
def collect(
    model: nn.Module,
    matrices: Iterable[Matrix],
    batches: Sequence[Batch],
    *,
    tied: bool = False,
    processes: Processes = ALONE,
    passes: Passes | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Statistics:
    """Run the batches through the model and return the statistics of the given matrices.

    Inputs that several matrices share are measured once. Moments are summed in float32, in which a forward pass is
    computed as well.

    Args:
        model: stock model of a supported family, in evaluation mode.
        matrices: those whose statistics are wanted.
        batches: token ids with attention masks; padding is left out of everything.
        tied: also measure the inputs of the output embeddings, as moments of the word embeddings.
        processes: that share the batches.
        passes: how the model is run; through all of it at once by default.
        progress: wraps the batches, e.g. in a progress bar.
    """
    wanted, passes = list(matrices), passes or Passes(model)
    statistics = Statistics(input_moments=passes.store("input_moments"))
    base: Any = model.base_model
    sums = Sums(processes)
    mask: Tensor | None = None

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not passes.counting:
                return
            x = args[0]
            # [sequences, length, columns] → [tokens, columns]; poolers and classifiers see [sequences, columns]
            # and relative positions are not positions in the text
            x = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            sums.add_gram(name, x.float())
            sums.count(name, len(x))

        return hook

    handles = []
    for name, matrix in {m.inputs: m for m in wanted if not m.embedding}.items():
        root = base if matrix.in_base else model
        handles.append(root.get_submodule(matrix.module).register_forward_pre_hook(observe(name)))
    words = next((matrix for matrix in wanted if matrix.embedding and matrix.kind == "word_embeddings"), None)
    head = tied and words is not None and model.get_output_embeddings() is not None  # type: ignore[operator]
    if head and words is not None:
        handles.append(model.get_output_embeddings().register_forward_pre_hook(observe(words.inputs)))  # type: ignore[operator]
    device = passes.device
    # A head is run only if its own inputs are wanted, and even then its logits are not needed.
    runner = model if head or any(not matrix.in_base for matrix in wanted) else base

    def enter(batch: Batch) -> None:
        nonlocal mask
        mask = batch.attention_mask.bool().to(device)

    def run(place: int, batch: Batch) -> None:
        ids, attended = batch.input_ids.to(device), batch.attention_mask.to(device)
        if runner is model and type(model).__name__.endswith(CHOICES):  # the texts are choices of one question
            ids, attended = ids[None], attended[None]
        runner(input_ids=ids, attention_mask=attended)

    def done() -> None:
        for name in list(sums.tensors):
            statistics.input_moments[name] = sums.tensors.pop(name).div_(max(1, sums.numbers[name]))

    with removed(handles), _without_logits(model):
        passes.go(Run(batches if handles else (), sums, run, enter, done, "inputs", progress=progress))
    return statistics


@contextmanager
def _without_logits(model: Any) -> Iterator[None]:
    """Let output embeddings return one zero per token temporarily: full logits take memory and time."""
    outputs = model.get_output_embeddings()
    if outputs is None:
        yield
        return
    with forwards_replaced([outputs], lambda index, hidden: hidden.new_zeros(*hidden.shape[:-1], 1)):
        yield
