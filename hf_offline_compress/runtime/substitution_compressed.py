"""The one place where modules of a stock model are swapped for compressed ones."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures_compressed import architecture_of, part_rows, within_layer
from .layers_compressed import EMBEDDINGS, LINEARS, CompressedEmbedding, CompressedLinear, FusedLinear, TiedHead
from .specs_compressed import Member, WeightSpec, group_specs
from .weights_compressed import CompressedWeight, set_decoding

DECODERS = "compression_decoders"


def substitute(model: PreTrainedModel, compression: dict[str, Any]) -> None:
    """Swap the modules that `compression` names, in place; nothing is computed, so it works on the meta device.

    Names are relative to the base model, or for members with `head` to the model itself. Members of heads that this
    model does not have are skipped: the same folder serves all heads.

    Args:
        model: a stock model of a supported family, with or without a head.
        compression: the config's field; see `CompressionConfigMixin`.

    Raises:
        ValueError: a module of the base model is missing, or cannot be compressed.
    """
    base = model.base_model
    entry = architecture_of(model.config.model_type)
    optional = entry.optional if entry else ()
    decoders: dict[str, nn.Module] = {}
    # Sorted, as a saved config.json is: the order of parameters must not depend on where the config came from.
    for name, group in sorted(group_specs(compression).items()):
        for member in group.members:
            root = model if member.head else base
            module = _find(root, member.module)
            if module is None or isinstance(module, CompressedWeight):
                if module is None and not member.head and member.module.split(".")[0] not in optional:
                    raise ValueError(
                        f"{type(model).__name__} has no module '{member.module}', which is compressed in this checkpoint: a "
                        "compressed model has the layers and sizes that it was compressed with. Load it as it is, drop layers in "
                        "memory, and save it."
                    )
                continue
            if member.part and not isinstance(module, FusedLinear):
                module = _split(module, _parts(model, member.module), model.config)
                _put(root, member.module, module)
            if isinstance(module, FusedLinear) and (member.part is None or member.part not in module):
                raise ValueError(
                    f"The module '{member.module}' has the parts {', '.join(module)}, and not {member.part}."
                )
            if isinstance(_part(module, member), CompressedWeight):
                continue  # the base model was made by an auto class, and so is compressed already
            if member.head and not group.weight.fits(*_shape(module)):
                continue  # a head of another size is a new one
            if group.shared and name not in decoders:
                decoder_class = LINEARS[group.weight.structure].decoder_class
                decoders[name] = decoder_class.make(group.weight, _shape(_part(module, member))[1])
            _swap(root, member, module, group.weight, decoders.get(name))
    if decoders:
        setattr(base, DECODERS, nn.ModuleDict(decoders))
        for weight in compressed_modules(model).values():
            shared = weight.__dict__.get("_shared_decoder")
            weight.__dict__["_decoder_name"] = next((n for n, decoder in decoders.items() if decoder is shared), None)
    decoding, max_bytes = compression["decoding"], compression.get("max_decoded_bytes")
    set_decoding(compressed_modules(model).values(), decoding, max_bytes, asked=False)
    _tie(model)


def relink(model: PreTrainedModel) -> None:
    """Point unregistered references at this model's own modules, after it was copied module by module."""
    embedding, base = model.get_input_embeddings(), model.base_model
    for module in model.modules():
        if (name := module.__dict__.get("_decoder_name")) is not None:
            module.__dict__["_shared_decoder"] = getattr(base, DECODERS)[name]
        if isinstance(module, TiedHead):
            module.refer_to(embedding)


def compressed_modules(model: nn.Module) -> dict[str, CompressedWeight]:
    """Return the compressed modules of a model by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedWeight)}


def _find(root: nn.Module, path: str) -> nn.Module | None:
    module: Any = root
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (rows, columns) of a module's weight."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear | CompressedLinear):
        return module.out_features, module.in_features
    raise ValueError(f"A {type(module).__name__} cannot be compressed.")


def _swap(root: nn.Module, member: Member, module: nn.Module, spec: WeightSpec, decoder: nn.Module | None) -> None:
    """Replace one member by a compressed module."""
    part = _part(module, member)
    rows, columns = _shape(part)
    new: nn.Module
    if isinstance(module, nn.Embedding):
        new = EMBEDDINGS[spec.structure](rows, columns, spec, decoder, padding_idx=module.padding_idx)
    else:
        bias = getattr(part, "bias", None) is not None
        new = LINEARS[spec.structure](rows, columns, spec, decoder, bias=bias)
    if isinstance(module, FusedLinear):
        assert member.part is not None
        module[member.part] = new
    else:
        _put(root, member.module, new)


def _part(module: Any, member: Member) -> nn.Module:
    """Return a fused module's part that a member names, or the module itself."""
    part: nn.Module = module[member.part] if isinstance(module, FusedLinear) and member.part is not None else module
    return part


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _parts(model: PreTrainedModel, path: str) -> tuple[str, ...]:
    """Return the kinds of a fused module's parts, in the order of its outputs.

    Raises:
        ValueError: the architecture has no such module.
    """
    entry = architecture_of(model.config.model_type)
    kinds = entry.kinds.get(within_layer(path)) if entry else None
    if not isinstance(kinds, tuple):
        raise ValueError(f"{type(model).__name__} has no fused module '{path}'.")
    return kinds


def _split(module: nn.Module, parts: tuple[str, ...], config: Any) -> FusedLinear:
    """Return a fused layer's parts as linear layers of their own, still empty."""
    rows, columns = _shape(module)
    bias = getattr(module, "bias", None) is not None
    heads = config.num_attention_heads
    sizes = part_rows(parts, rows, heads, getattr(config, "num_key_value_heads", None) or heads)
    return FusedLinear({part: nn.Linear(columns, size, bias=bias) for part, size in sizes.items()})


def _tie(model: PreTrainedModel) -> None:
    """Give a tied head the compressed embedding, and drop the tie of the weight that it replaces."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, CompressedEmbedding) or head is None or not model.config.tie_word_embeddings:
        return
    if not isinstance(head, TiedHead):
        model.set_output_embeddings(TiedHead(embedding, getattr(head, "bias", None)))
    ties = model._tied_weights_keys or {}
    model._tied_weights_keys = {target: source for target, source in ties.items() if not target.endswith(".weight")}
