"""The layout of a model: its parameters and matrices, read off the stock model, built without weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import initialization
from transformers.pytorch_utils import Conv1D

from ..errors import CompressionError, listing, refusing
from ..runtime.architectures_compressed import Architecture, part_rows, within_layer
from .families import SAME_INPUTS, family_of
from .layout import Matrix, ParameterLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def layout_of_config(config: Mapping[str, Any], architecture: str, absent: Sequence[str] = ()) -> ParameterLayout:
    """Return the layout of a stock class under a config.json.

    Args:
        config: the contents of the base's config.json.
        architecture: name of the stock class.
        absent: optional modules of the base model that its checkpoint lacks.

    Raises:
        CompressionError: the architecture is not supported, or the config does not describe a model of this class.
    """
    family = family_of(config)
    family.check_owns(architecture)
    entry = family.entry
    import transformers

    what = f"The config.json does not describe a {architecture} that transformers can build"
    with refusing(what, "Correct it, or download it again."):
        values = getattr(transformers, entry.config).from_dict(dict(config))
        return _layout(entry, empty_model(getattr(transformers, architecture), values), tuple(absent))


def layout_of_model(model: PreTrainedModel) -> ParameterLayout:
    """Return the layout of a model in memory; ties and missing parts are its own, whatever its config says.

    Raises:
        CompressionError: its tensors have other shapes than its config says, or its architecture is not supported.
    """
    family = family_of(model.config.to_dict())
    name = type(model).__name__
    family.check_owns(name)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = ties_words(model)
    base: Any = model.base_model
    empty = empty_model(type(model), config)
    absent = tuple(
        part
        for part in family.entry.optional
        if getattr(base, part, None) is None and getattr(empty.base_model, part, None) is not None
    )
    if absent:
        logger.warning("The base has no %s; neither will the compressed model.", listing(absent))
    layout = _layout(family.entry, empty, absent)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in layout.parameters.items():
        if name not in shapes:
            raise CompressionError(
                f"The model has no '{name}', which its config describes; load it as it was saved, or correct its config."
            )
        if shapes[name] != shape:
            raise CompressionError(
                f"The model's '{name}' has the shape {list(shapes[name])}, and its config describes {list(shape)}; "
                "correct its config (num_labels, vocab_size, …), then compress it."
            )
    return layout


def ties_words(model: PreTrainedModel) -> bool:
    """Return whether a model's output matrix is its word embeddings; without one, what its config says."""
    words: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return bool(getattr(model.config, "tie_word_embeddings", True))
    return head.weight is words.weight


def empty_model(stock: Any, config: Any) -> PreTrainedModel:
    """Return a stock model without weights."""
    with torch.device("meta"), initialization.no_init_weights():
        model: PreTrainedModel = stock(config)
    return model


def _layout(entry: Architecture, model: PreTrainedModel, absent: tuple[str, ...]) -> ParameterLayout:
    base: Any = model.base_model
    for part in absent:
        setattr(base, part, None)
    tied = set(model.all_tied_weights_keys)
    names = {id(module): name for name, module in model.named_modules()}
    prefix = "" if base is model else f"{names[id(base)]}."
    words = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    output = names.get(id(model.get_output_embeddings()))
    layout = ParameterLayout(prefix, words, tied=f"{output}.weight" in tied, absent=absent)
    layout.parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied}
    layers: dict[str, int] = {}
    known = {kind for kind in entry.kinds.values() if isinstance(kind, str)}
    for name, module in base.named_modules():
        tail = within_layer(name)
        kind = "word_embeddings" if name == words else entry.kinds.get(tail)
        if kind is None or type(module) not in (nn.Linear, nn.Embedding, Conv1D):
            continue
        layer = layers.setdefault(name.removesuffix(tail), len(layers)) if tail != name else None
        parts = (kind,) if isinstance(kind, str) else kind
        beside = next((kinds for kinds in SAME_INPUTS if kind in kinds and known.issuperset(kinds)), None)
        inputs = name.rpartition(".")[0] if beside else name
        layout.matrices += _matrices(name, module, parts, layer, model.config, inputs)
    for name, module in model.named_modules() if prefix else ():
        if type(module) in (nn.Linear, Conv1D) and not name.startswith(prefix) and f"{name}.weight" not in tied:
            layout.matrices += _matrices(name, module, ("head",), None, model.config, None, in_base=False)
    return layout


def _matrices(
    name: str,
    module: nn.Module,
    kinds: tuple[str, ...],
    layer: int | None,
    config: Any,
    inputs: str | None,
    *,
    in_base: bool = True,
) -> Iterator[Matrix]:
    """Give the matrices of a module: one, or one for each part of a fused one."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    if isinstance(module, Conv1D):
        rows, columns = columns, rows
    heads = getattr(config, "num_attention_heads", 1)
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = part_rows(kinds, rows, heads, key_value_heads) if len(kinds) > 1 else {kinds[0]: rows}
    start = 0
    for kind, size in sizes.items():
        yield Matrix(
            module=name,
            kind=kind,
            layer=layer,
            rows=size,
            columns=columns,
            inputs=inputs or name,
            in_base=in_base,
            embedding=isinstance(module, nn.Embedding),
            bias=getattr(module, "bias", None) is not None,
            transposed=isinstance(module, Conv1D),
            part=kind if len(sizes) > 1 else None,
            heads={"query": heads, "key": key_value_heads, "value": key_value_heads}.get(kind, 1),
            start=start,
        )
        start += size
