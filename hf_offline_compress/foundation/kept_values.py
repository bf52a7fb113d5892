"""Plain values and tensors in one safetensors file: the tensors, and in its header what they are part of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VALUE = "value"


def save_value(file: Path, value: Any) -> None:
    """Write a value.

    Args:
        file: is replaced.
        value: None, numbers, texts, tensors, and lists, tuples, mappings and dataclasses of such.

    Raises:
        TypeError: something else is among it; an error in this package.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_plain(value, tensors))
    save_file(tensors, file, metadata={VALUE: plain})


def load_value(file: Path, classes: Iterable[type] = ()) -> Any:
    """Return a value that `save_value` has written, its tensors on the CPU; nothing in the file is executed.

    Args:
        file: to be read.
        classes: dataclasses that may be in it.

    Raises:
        KeyError: another class is in it, or it is no such file.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        known = {cls.__name__: cls for cls in classes}
        return _restored(json.loads(opened.metadata()[VALUE]), opened, known)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, with its tensors put among `tensors` by their number."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # Tensors that share memory are written each for itself.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(each, tensors) for each in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(key, tensors), _plain(each, tensors)] for key, each in value.items()]}
    if is_dataclass(value):
        own = {item.name: _plain(getattr(value, item.name), tensors) for item in fields(value)}
        return {"class": type(value).__name__, "fields": own}
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _restored(plain: Any, opened: Any, classes: Mapping[str, Any]) -> Any:
    if not isinstance(plain, dict):
        return plain

    def inner(each: Any) -> Any:
        return _restored(each, opened, classes)

    if "class" in plain:
        return classes[plain["class"]](**{name: inner(each) for name, each in plain["fields"].items()})
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return opened.get_tensor(content).clone()  # not a view of the file, which is removed
    if kind == "mapping":
        return {inner(key): inner(each) for key, each in content}
    found = [inner(each) for each in content]
    return tuple(found) if kind == "tuple" else found
