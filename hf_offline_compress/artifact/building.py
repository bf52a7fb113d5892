"""Factors → model: rounded to their storage, under their planned names, in the class that AutoModel would make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..architectures.layout import Matrix
from ..base.checkpoint import BaseCheckpoint, quiet_transformers
from ..plan.groups import Group, Plan
from ..solvers import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of a base's config that belong to the base alone.
_NOT_INHERITED = (
    "model_type",
    "transformers_version",
    "architectures",
    "_name_or_path",
    "auto_map",
    "quantization_config",
    "compression",
    "dtype",
    "torch_dtype",
)


def rounded_factors(group: Group, factors: Factors, dtype: str) -> Factors:
    """Return the factors, numbers in the dtype that they are stored in and then the model's, on the CPU."""

    def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        storage, held = getattr(torch, group.storage.dtype), getattr(torch, dtype)
        return {
            name: (tensor.to(storage).to(held) if tensor.is_floating_point() else tensor).cpu().contiguous()
            for name, tensor in tensors.items()
        }

    return Factors(tuple(rounded(member) for member in factors.members), rounded(factors.decoder), factors.notes)


def named_tensors(group: Group, factors: Factors, prefix: str) -> dict[str, Tensor]:
    """Return the factors by the full names that the plan has for them.

    Raises:
        RuntimeError: solver and structure disagree on what is stored; an error in this package.
    """
    named: dict[str, Tensor] = {}
    expected = [(group.decoder_tensors(prefix), factors.decoder)]
    expected += [
        (group.member_tensors(matrix, prefix), own) for matrix, own in zip(group.matrices, factors.members, strict=True)
    ]
    for shapes, tensors in expected:
        by_leaf = {full: tensor for full in shapes for leaf, tensor in tensors.items() if full.endswith(f".{leaf}")}
        planned = {name: tensor.shape for name, tensor in shapes.items()}
        if {name: tuple(tensor.shape) for name, tensor in by_leaf.items()} != planned or len(tensors) != len(planned):
            raise RuntimeError(
                f"The solver of '{group.structure.name}' returned tensors other than planned: {planned}."
            )
        named |= by_leaf
    return named


def factors_among(group: Group, tensors: Mapping[str, Tensor], prefix: str) -> Factors:
    """Return a group's factors, among tensors by the full names that the plan has for them; see `named_tensors`."""

    def taken(leaves: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Tensor]:
        return {leaf: tensors[name] for leaf, name in zip(leaves, full, strict=True)}

    structure, size, shape = group.structure, group.size, group.shape
    own = group.storage.kept(structure.member_tensors(size, shape))
    shared = group.storage.kept(structure.decoder_tensors(size, shape))
    members = tuple(taken(own, group.member_tensors(matrix, prefix)) for matrix in group.matrices)
    return Factors(members, taken(shared, group.decoder_tensors(prefix)))


def reconstructed(group: Group, factors: Factors) -> Iterator[Tensor]:
    """Give what each member's factors stand for, [rows, columns], by the very layers that will be run."""
    from ..runtime.layers_compressed import LINEARS
    from ..runtime.specs_compressed import weight_spec

    spec = weight_spec(group.runtime())
    layer_class = LINEARS[spec.structure]
    for matrix, own in zip(group.matrices, factors.members, strict=True):
        layer = layer_class(matrix.rows, matrix.columns, spec)
        layer.load_state_dict(
            own | {f"decoder.{name}": tensor for name, tensor in factors.decoder.items()}, assign=True
        )
        with torch.no_grad():  # not around the yield: it would hold for whoever asks, and stay if nobody asks again
            weight = _decoded(layer)
        yield weight


def weights_among(groups: Iterable[Group], tensors: Mapping[str, Tensor], prefix: str) -> list[tuple[Matrix, Tensor]]:
    """Return each matrix of some groups and the weight [rows, columns] that stands for it; see `factors_among`."""
    return [
        pair
        for group in groups
        for pair in zip(group.matrices, reconstructed(group, factors_among(group, tensors, prefix)), strict=True)
    ]


def _decoded(layer: Any) -> Tensor:
    """Return a layer's weight; a large one is decoded in blocks of rows, since decoding takes several times as much memory."""
    if not hasattr(layer, "row_blocks"):
        weight: Tensor = layer.dense_weight()
        return weight
    whole: Tensor | None = None
    for start, block in layer.row_blocks():
        if len(block) == layer.rows:
            return cast(Tensor, block)
        if whole is None:
            whole = block.new_empty(layer.rows, layer.columns)
        whole[start : start + len(block)] = block
    assert whole is not None
    return whole


def build_model(
    model: PreTrainedModel,
    base: Mapping[str, Tensor],
    plan: Plan,
    factors: dict[str, Tensor],
    source: BaseCheckpoint | None,
) -> PreTrainedModel:
    """Return the compressed model: the class and constructor that AutoModel uses, untouched weights, and the factors.

    Args:
        model: the base, whose weights need not be there.
        base: its tensors.
        plan: what has become of them.
        factors: what stands for the groups, by full name.
        source: where the base comes from, if it has a name.
    """
    from ..registration import register
    from ..runtime.modeling_compressed import compressed_class

    register(plan.model_type)
    target: Any = compressed_class(type(model))
    inherited = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_INHERITED}
    if model.get_output_embeddings() is not None:
        inherited["tie_word_embeddings"] = plan.layout.tied
    config = target.config_class(**inherited, compression=plan.runtime())
    config.architectures = [target.__name__]
    if source is not None:
        config.name_or_path = source.name
    rest = _untouched(model, base, plan)
    if plan.rest != plan.dtype:  # what is used now is what will be loaded
        wider = {t.data_ptr(): plan.wider[name] for name, t in rest.items() if name in plan.wider}  # tied ones alike
        rest = {
            name: t.to(getattr(torch, wider.get(t.data_ptr(), plan.rest))).to(t.dtype) if t.is_floating_point() else t
            for name, t in rest.items()
        }
    state = rest | factors
    dtype = getattr(torch, plan.dtype)
    with quiet_transformers():
        built, info = target.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    problems = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if problems:
        raise RuntimeError(f"The compressed model does not take the weights made for it: {problems}.")
    built.config.name_or_path = ""
    if getattr(model, "generation_config", None) is not None and built.can_generate():
        built.generation_config = model.generation_config
    return built.eval()


def _untouched(model: PreTrainedModel, base: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Return the base's tensors under the names that they have in the compressed model, without what was compressed.

    Those that are not needed are not asked for, which may mean reading them.
    """
    prefix = plan.layout.prefix
    compressed = [matrix for group in plan.groups for matrix in group.matrices]
    fused = plan.layout.fused_with(compressed)
    gone = {f"{matrix.full_module(prefix)}.weight" for matrix in (*fused, *compressed)}
    gone |= {f"{matrix.full_module(prefix)}.bias" for matrix in fused}
    words = f"{prefix}{plan.layout.word_embeddings}.weight"
    if plan.layout.tied and words in gone:
        gone |= {target for target, origin in (model._tied_weights_keys or {}).items() if origin == words}
    state = {name: base[name].cpu() for name in base if name not in gone}
    for matrix in fused:
        if matrix not in compressed:
            state[f"{matrix.full_name(prefix)}.weight"] = matrix.dense(base, prefix).cpu().contiguous()
        if matrix.bias:
            state[f"{matrix.full_name(prefix)}.bias"] = matrix.dense_bias(base, prefix).cpu().clone()
    return state
