"""What an error at a layer's output does to the model's own output, to second order: the Gauss-Newton metric.

For a model f and an error δ at some layer's output, the model's output changes by J δ. For hidden states that is measured
in squared length; for logits, as divergence between the predicted distributions, whose second-order form is the Fisher
matrix F = diag(p) − p pᵀ. Either way the expected change is δᵀ G δ with G = E[g gᵀ], where g is the gradient of ⟨v, f⟩ with
v of covariance 1, or F: no labels are needed (Martens & Grosse, ICML 2015). F has the root (1 − √p √pᵀ) diag(√p). Normal
vectors times it vary far less than gradients at drawn labels, which are huge if an unlikely label is drawn.

Inputs of a layer matter where errors at its outputs do: their moments weigh each token by its squared gradient (GuidedQuant,
ICML 2025), those of a tied head by the trace of F. Few tokens then have most of the weight, so that the plain moments count
as some more tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.families import objective_of
from ..architectures.layout import Matrix
from ..foundation.processes import ALONE, Processes
from ..plan.make import SEVERAL_INPUTS
from .passes import Passes, Run, removed
from .sharing import Sums
from .statistics import CHOICES, Sensitivity
from .texts import Batch

# A backward pass keeps every layer's activations: few tokens at a time, and a part of the text, are enough.
TOKENS_AT_ONCE = 256
PART = 2
# Plain moments of inputs count as so many tokens beside those weighted by gradients.
PLAIN_TOKENS = 2048


def measure_sensitivity(
    model: nn.Module,
    matrices: Iterable[Matrix],
    batches: Sequence[Batch],
    *,
    mask_token: int | None,
    seed: int,
    squares: Collection[str] = (),
    input_moments: MutableMapping[str, Tensor] | None = None,
    plain: Collection[str] = (),
    processes: Processes = ALONE,
    passes: Passes | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Sensitivity:
    """Return the sensitivity of the model's output to errors at the outputs of the given matrices.

    The model's output is its logits where it has any, else its last hidden states.

    Matrices that the model's output does not depend on have no moments in what is returned.

    Args:
        model: stock model in evaluation mode; its parameters get no gradients.
        matrices: those whose outputs are asked for; of embeddings, only the word embeddings.
        batches: token ids with attention masks.
        mask_token: of a masked language model, whose loss lies at the masked places only; None otherwise.
        seed: of the drawn directions.
        squares: names of the matrices of which only the diagonal is wanted, which takes much less memory.
        input_moments: of the inputs of layers and of a tied head (`Matrix.inputs`); these are weighted anew, in place.
        plain: names of those that stay as they are.
        processes: that share the parts of the batches.
        passes: how the model is run; through all of it at once by default.
        progress: wraps the parts of the batches, e.g. in a progress bar.
    """
    wanted, passes = list(matrices), passes or Passes(model)
    sums = Sums(processes)
    moments, single = passes.store("output_moments"), passes.store("output_squares")
    base: Any = model.base_model
    inputs = _Inputs(model, sums, wanted, {} if input_moments is None else input_moments, plain)
    gradients = _Gradients(sums, squares, inputs)
    by_module: dict[tuple[str, bool], list[Matrix]] = {}
    for matrix in wanted:
        by_module.setdefault((matrix.module, matrix.in_base), []).append(matrix)
    handles = [base.get_input_embeddings().register_forward_hook(_as_leaf)]
    handles += [
        (base if in_base else model).get_submodule(module).register_forward_hook(gradients.of(parts))
        for (module, in_base), parts in by_module.items()
    ]
    handles += inputs.handles
    pooled = any(matrix.kind == "pooler" for matrix in wanted)
    headed = has_logits(model) or (type(model).__name__.endswith(CHOICES) and any(not m.in_base for m in wanted))
    portions = _portions(batches)
    # A seed for each portion, so that no portion depends on earlier draws.
    seeds = torch.randint(2**31, (len(portions),), generator=torch.Generator().manual_seed(seed)).tolist()
    device = passes.device

    def enter(batch: Batch) -> None:
        gradients.mask = batch.attention_mask.bool().to(device)

    def run(place: int, batch: Batch) -> None:
        ids, own = batch.input_ids.to(device), batch.attention_mask.bool().to(device)
        places = batch.places(mask_token).to(device)
        generator = torch.Generator().manual_seed(seeds[place])
        loss, traces = _probe(model, ids, own, places, generator, headed, pooled)
        loss.backward()
        sums.count("tokens", int(own.sum()))
        sums.count("curvature", float(traces.sum()))
        if len(traces):
            inputs.add_head(own, places, traces)

    def done() -> None:
        inputs.done()
        for name in list(sums.tensors):
            kept = single if name in squares else moments
            kept[name] = sums.tensors.pop(name).div_(max(1, sums.numbers.get("tokens", 0)))

    with removed(handles), torch.enable_grad(), _frozen(model):
        if processes.count > 1:  # a process may have no part of the text
            inputs.begin_all()
        passes.go(Run(portions, sums, run, enter, done, "sensitivity", backward=True, progress=progress))
    tokens, curvature = sums.numbers.get("tokens", 0), sums.numbers.get("curvature", 0.0)
    return Sensitivity(moments, single, curvature / max(1, tokens))


class _Gradients:
    """Hooks that sum moments of gradients at outputs.

    Attributes:
        mask: which places of the current portion hold tokens, [sequences, length].
    """

    def __init__(self, sums: Sums, squares: Collection[str], inputs: _Inputs) -> None:
        self.mask: Tensor | None = None
        self._sums, self._squares, self._inputs = sums, squares, inputs

    def of(self, parts: Sequence[Matrix]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """Return the hook of a module, which is one matrix, or several fused."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # relative positions do not depend on the words
                output = output.detach().requires_grad_()

            def backward(gradient: Tensor) -> None:
                for m in parts:
                    self._add(m, gradient[..., m.start : m.start + m.rows] if m.part else gradient, args)

            output.register_hook(backward)
            return output

        return hook

    def _add(self, matrix: Matrix, gradient: Tensor, given: Sequence[Any]) -> None:
        mask = self.mask
        if mask is not None and gradient.shape[:-1] != mask.shape:
            mask = None  # relative positions are not positions in the text, and poolers have none
        flat = (gradient.reshape(-1, gradient.shape[-1]) if mask is None else gradient[mask]).float()
        if mask is not None and not matrix.embedding:
            self._inputs.add(matrix.inputs, given[0], mask, flat.square().sum(dim=1))
        if matrix.name in self._squares:
            self._sums.add(matrix.name, flat.square().sum(dim=0))
        else:
            self._sums.add_gram(matrix.name, flat)


class _Inputs:
    """Moments of the inputs of layers, weighted by the gradients at the outputs of all matrices that share them.

    Weights are of mean 1 in every portion, so that no portion outweighs the others. Sums begin with the plain moments, and
    lie where those lay.

    Attributes:
        handles: of hooks, to be removed.
    """

    def __init__(
        self,
        model: Any,
        sums: Sums,
        matrices: Sequence[Matrix],
        moments: MutableMapping[str, Tensor],
        plain: Collection[str],
    ) -> None:
        self._sums, self._moments = sums, moments
        weighted = [matrix for matrix in matrices if matrix.inputs in moments and matrix.inputs not in plain]
        self._sharing = Counter(matrix.inputs for matrix in weighted)
        # An embedding has inputs where a head is tied to it.
        self._of_head = next((matrix.inputs for matrix in weighted if matrix.embedding), None)
        self._at_head: Tensor | None = None
        self.handles = []
        if self._of_head is not None:
            self.handles.append(model.get_output_embeddings().register_forward_pre_hook(self._keep))

    def _keep(self, module: nn.Module, args: Any) -> None:
        self._at_head = args[0].detach()

    def add_head(self, mask: Tensor, places: Tensor, traces: Tensor) -> None:
        """Add what the head saw last; its inputs matter at the places of the loss, as its traces [places] say."""
        if self._of_head is not None and self._at_head is not None:
            weights = traces.new_zeros(mask.shape)
            weights[places] = traces
            self.add(self._of_head, self._at_head, mask, weights[mask])
        self._at_head = None

    def begin_all(self) -> None:
        """Begin all sums."""
        for name in self._sharing:
            self._begin(name)

    def add(self, name: str, given: Tensor, mask: Tensor, weights: Tensor) -> None:
        """Add inputs of one of the matrices that share them.

        Args:
            name: of the inputs.
            given: those of a portion [sequences, length, columns].
            mask: which of its places hold tokens.
            weights: of these tokens [tokens].
        """
        if not self._sharing[name] or not weights.sum() > 0:
            return
        self._begin(name)
        x = given.detach()[mask].float()
        shares = weights / (weights.mean() * self._sharing[name])
        self._sums.add_gram(_summed(name), x * shares.sqrt()[:, None])
        self._sums.count(_summed(name), len(x) / self._sharing[name])

    def done(self) -> None:
        """Put sums that are complete where the plain moments lay."""
        for name in self._sharing:
            if (total := self._sums.tensors.pop(_summed(name), None)) is not None:
                self._moments[name] = total.div_(self._sums.numbers.get(_summed(name), 0.0) + PLAIN_TOKENS)

    def _begin(self, name: str) -> None:
        if _summed(name) not in self._sums.tensors:
            self._sums.tensors[_summed(name)] = self._moments.pop(name).mul_(PLAIN_TOKENS)


def _summed(name: str) -> str:
    """Return the name of the sum of an input's moments, which may have the name of a matrix."""
    return f"inputs of {name}"


def _probe(
    model: nn.Module, ids: Tensor, mask: Tensor, places: Tensor, generator: torch.Generator, headed: bool, pooled: bool
) -> tuple[Tensor, Tensor]:
    """Return a scalar whose gradient is the probe's, and E[Σ g²] at the logits of each place [places], if there are any."""
    if headed:
        if type(model).__name__.endswith(CHOICES):  # the texts are choices of one question
            ids, mask = ids[None], mask[None]
        output = model(input_ids=ids, attention_mask=mask.long())
        loss, traces = ids.new_zeros((), dtype=torch.float32), ids.new_zeros(0, dtype=torch.float32)
        discriminative = objective_of(type(model).__name__) == "discriminative"
        for name, logits in output.items():
            if not name.endswith("logits"):
                continue
            if discriminative:  # one number a token: whether it was replaced
                told = logits[places].float()
                spread = (told.detach().sigmoid() * (-told.detach()).sigmoid()).sqrt()
                loss = loss + (told * spread * torch.randn(told.shape, generator=generator).to(told)).sum()
                continue
            per_token = logits.dim() == 3
            chosen = (logits[places] if per_token else logits).float()
            if chosen.shape[-1] == 1:  # a regression: the squared error's curvature is constant
                loss = loss + (chosen * torch.randn(chosen.shape, generator=generator).to(chosen)).sum()
                continue
            roots = chosen.detach().softmax(dim=-1).sqrt()
            drawn = torch.randn(roots.shape, generator=generator).to(roots)
            direction = roots * (drawn - roots * (roots * drawn).sum(dim=-1, keepdim=True))
            loss = loss + (chosen * direction).sum()
            if per_token:
                traces = 1 - roots.pow(4).sum(dim=-1)  # of F
        return loss, traces
    base: Any = model.base_model
    output = base(input_ids=ids, attention_mask=mask.long())
    hidden = output[0]
    loss = (hidden * torch.randn(hidden.shape, generator=generator).to(hidden))[mask].sum()
    if pooled:  # the pooler is run only on request
        summary = output.pooler_output
        loss = loss + (summary * torch.randn(summary.shape, generator=generator).to(summary)).sum()
    return loss, hidden.new_zeros(0)


def has_logits(model: nn.Module) -> bool:
    """Whether the model has logits on plain batches: a head, but not one that chooses between several inputs."""
    return model.base_model is not model and not type(model).__name__.endswith(SEVERAL_INPUTS)


def _as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Make gradients start at the word embeddings, since no parameter requires any."""
    return output.detach().requires_grad_()


def _portions(batches: Sequence[Batch]) -> list[Batch]:
    """Return one in `PART` tokens in portions of about `TOKENS_AT_ONCE`, spread evenly over lengths."""
    portions = [
        Batch(ids, mask)
        for batch in batches
        for at_once in [max(1, TOKENS_AT_ONCE // batch.input_ids.shape[1])]
        for ids, mask in zip(batch.input_ids.split(at_once), batch.attention_mask.split(at_once), strict=True)
    ]
    return portions[::PART]


@contextmanager
def _frozen(model: nn.Module) -> Any:
    """Turn off the gradients of all parameters for a while."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
