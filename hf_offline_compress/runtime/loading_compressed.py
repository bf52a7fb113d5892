"""Checks of a loaded model against its config, and the config's `compression` brought up to date when it is saved."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .structures_compressed import AutoencoderWeight, ResidualWeight
from .substitution_compressed import DECODERS, compressed_modules
from .weights_compressed import CompressedWeight

logger = logging.get_logger(__name__)

# A member of a group: module, part of a fused module, and whether it lies in a head.
Place = tuple[str, str | None, bool]


def check_loaded(model: Any, info: Mapping[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Raise ValueError if compressed weights of a model were not in its checkpoint.

    Transformers fills what is missing at random and only warns, which is right for a new head, and wrong for a weight of
    which a part is missing. A head of another size is replaced by a new dense one, if that was asked for.

    Args:
        model: just loaded.
        info: the loading info of `from_pretrained`.
        ignore_mismatched_sizes: whether it was asked for.

    Raises:
        ValueError: the config describes no compressed model, or tensors are missing, unexpected, or of other shapes.
    """
    if model.config.compression is None:
        raise ValueError(
            f"The config.json describes no compression (`compression` is null), so there is no {type(model).__name__} to be "
            "loaded: get the folder again, or load a dense checkpoint by its stock class."
        )
    modules = compressed_modules(model)
    mismatched = {str(entry[0]) for entry in info["mismatched_keys"]}
    prefix = base_prefix(model)
    anew = {name for key in mismatched if (name := _owner(key, modules)) and not name.startswith(prefix)}
    anew = anew if ignore_mismatched_sizes and prefix else set()
    wrong = {
        label: [key for key in sorted(keys) if _belongs(key, modules, prefix) and _owner(key, modules) not in anew]
        for label, keys in (
            ("lacks", info["missing_keys"]),
            ("has too many tensors:", info["unexpected_keys"]),
            ("has tensors of other shapes:", mismatched),
        )
    }
    for label, keys in wrong.items():
        if keys:
            raise ValueError(
                f"The checkpoint {label} {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}, so the compressed weights "
                "cannot be read: it is damaged, or does not belong to its config.json. Get the folder again."
            )
    heads = [m["module"] for g in model.config.compression["groups"].values() for m in g["members"] if m.get("head")]
    left = [head for head in heads if any(key.startswith(f"{head}.") for key in info["unexpected_keys"])]
    if prefix and not ignore_mismatched_sizes and (left := [name for name in left if _has(model, name)]):
        raise ValueError(
            f"The head '{left[0]}' of the checkpoint is of another size than this model's; pass ignore_mismatched_sizes=True to "
            "have it made anew, dense, and train it."
        )
    for name in anew:
        _make_dense(model, name, modules[name])
    if anew or left:
        model.config.compression = current_compression(model)


def warn_of_precision(model: Any) -> None:
    """Warn where a model was loaded in fewer digits than its decoders can do with.

    What an autoencoder decodes is a sum of larger numbers, and so is what its activations are computed of: factors rounded to
    the eight digits of bfloat16 give weights that are off by several percent, other structures by a fraction of one.
    """
    narrow = [
        module
        for module in compressed_modules(model).values()
        if isinstance(module, (AutoencoderWeight, ResidualWeight)) and module.storage != "bfloat16"
    ]
    if model.dtype == torch.bfloat16 and narrow:
        logger.warning_once(
            "Autoencoders that are loaded in bfloat16 decode to weights that are off by several percent. Load the model in "
            "float16 or float32, or use a dense checkpoint of it, as `export` writes, in bfloat16."
        )


def base_prefix(model: Any) -> str:
    """Return the prefix of the base model's modules; empty if the model is a base model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def remember_groups(model: Any, compression: Mapping[str, Any]) -> None:
    """Record on every compressed module which group it belongs to, so that it is known wherever the module is moved."""
    places = {place: name for name, group in compression["groups"].items() for place in map(_place, group["members"])}
    for name, module in compressed_modules(model).items():
        for place in _places(model, name):
            if place in places:
                module.__dict__["_group"] = places[place]


def current_compression(model: Any) -> dict[str, Any]:
    """Return the config's `compression` for the compressed modules that the model has now.

    Layers may have been dropped or moved since it was loaded, and a base model lacks the heads of its folder.
    Decoders that no module uses any more are removed from the model.
    """
    compression: dict[str, Any] = model.config.compression
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in compression["groups"]}
    for name, module in compressed_modules(model).items():
        group = module.__dict__.get("_group")
        if group in found:
            known = {_place(member) for member in compression["groups"][group]["members"]}
            here = _places(model, name)
            module_name, part, head = next((place for place in here if place in known), here[0])
            member = {"module": module_name, **({"part": part} if part else {}), **({"head": True} if head else {})}
            found[group].append(member)
    if all(_same(found[name], group["members"]) for name, group in compression["groups"].items()):
        return compression
    changed = deepcopy(compression)
    for name, members in found.items():
        if members:
            changed["groups"][name]["members"] = members
        else:
            del changed["groups"][name]
            decoders = getattr(model.base_model, DECODERS, {})
            if name in decoders:
                del decoders[name]
    return changed


def _same(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]) -> bool:
    return set(map(_place, first)) == set(map(_place, second))


def _place(member: Mapping[str, Any]) -> Place:
    return str(member["module"]), member.get("part"), bool(member.get("head"))


def _places(model: Any, name: str) -> list[Place]:
    """Return the names that a module may have as a member: as a whole, or as a part of a fused module."""
    prefix = base_prefix(model)
    head = not name.startswith(prefix)
    path = name if head else name.removeprefix(prefix)
    parent, _, part = path.rpartition(".")
    whole, fused = (path, None, head), (parent, part, head)
    is_part = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleDict)
    return [fused] if is_part else [whole]


def _owner(key: str, modules: Mapping[str, CompressedWeight]) -> str | None:
    """Return the name of the compressed module that a tensor belongs to."""
    parts = key.split(".")
    return next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in modules), None)


def _belongs(key: str, modules: Mapping[str, CompressedWeight], prefix: str) -> bool:
    """Whether a tensor belongs to a compressed module of the model, or to a decoder that such modules share."""
    return _owner(key, modules) is not None or key.removeprefix(prefix).startswith(f"{DECODERS}.")


def _has(model: Any, name: str) -> bool:
    return any(name == other for other, _ in model.named_modules())


def _make_dense(model: Any, name: str, module: Any) -> None:
    """Replace a compressed layer by a dense one, initialised like a new head."""
    like = next(tensor for tensor in module.parameters() if tensor.is_floating_point())
    dense = nn.Linear(module.columns, module.rows, bias=module.bias is not None, device=like.device, dtype=like.dtype)
    model._init_weights(dense)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, dense)
