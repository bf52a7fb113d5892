"""A base whose tensors stay in its files until they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: file, and its name in there."""

    file: str
    name: str


class Shards(Mapping[str, Tensor]):
    """Full name of a model's tensor → tensor, read from safetensors whenever nobody holds it; nobody may change it.

    Attributes:
        places: of all parameters; tied ones have the same.
    """

    def __init__(self, places: Mapping[str, Place], buffers: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Know where tensors lie, without reading any.

        Args:
            places: of all parameters.
            buffers: tensors of the model that are no parameters.
            dtype: that parameters are read in.
        """
        self.places, self._buffers, self._dtype = dict(places), dict(buffers), dtype
        self._held: WeakValueDictionary[Place, Tensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; a copy, so that the file's pages do not stay in memory."""
        if name in self._buffers:
            return self._buffers[name]
        place = self.places[name]
        if (held := self._held.get(place)) is None:
            with safe_open(place.file, framework="pt") as file:
                held = self._held[place] = file.get_tensor(place.name).to(self._dtype, copy=True)
        return held

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self.places or name in self._buffers

    def __iter__(self) -> Iterator[str]:
        """Give the names."""
        return iter((*self.places, *self._buffers))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.places) + len(self._buffers)


def shards_of(model: PreTrainedModel, dtype: torch.dtype) -> Shards:
    """Return where the tensors of a model lie that transformers has loaded with everything left on disk.

    accelerate's hooks are taken off the model: they would read a weight at each of its uses, where we read a layer once for
    all of the text.
    """
    from accelerate.hooks import remove_hook_from_module

    index: dict[str, Any] = {}
    for module in model.modules():
        loader = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if loader is not None:
            index |= loader.dataset.index
    remove_hook_from_module(model, recurse=True)
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places = {name: Place(i["safetensors_file"], i["weight_name"]) for name in state if (i := index.get(name))}
    buffers = {name: tensor for name, tensor in state.items() if name not in parameters}
    return Shards(places, buffers, dtype)
