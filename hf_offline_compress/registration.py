"""Registration with the Auto classes: complete, but only when it is needed.

Registering imports torch and the modeling module of a family, seconds that `--help` or `inspect` have no use for.
So the names of our model types are put into transformers' table of configs at once (or as soon as that table exists),
and the classes of a family follow when it is first asked for, by `AutoConfig`, `AutoModel…` or `AutoTokenizer`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import ItemsView, Sequence, ValuesView
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .runtime.architectures_compressed import ARCHITECTURES, MODEL_TYPES, TYPE_PREFIX

SUPPORTED_TRANSFORMERS = ((5, 20), (6, 0))
# Verifies and publishes a model; set by the package, since this layer may not import those above it.
publish: Any = None
_TABLE = "transformers.models.auto.configuration_auto"


def check_transformers() -> None:
    """Raise ImportError if the installed transformers is outside the supported range."""
    installed = version("transformers")
    low, high = SUPPORTED_TRANSFORMERS
    if not low <= tuple(int(part) for part in installed.split(".")[:2]) < high:
        raise ImportError(
            f"hf_offline_compress needs transformers>={low[0]}.{low[1]},<{high[0]}; installed is {installed}. "
            f"`pip install 'transformers>={low[0]}.{low[1]},<{high[0]}'` installs one."
        )


def register(model_type: str | None = None) -> None:
    """Register config, models and tokenizer of a stock model type with the Auto classes, by default of all.

    Doing it again changes nothing.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto import modeling_auto, tokenization_auto

    from .runtime import configuration_compressed, modeling_compressed

    modeling_compressed.CompressedModelMixin.publish = publish
    for name in ARCHITECTURES if model_type is None else (model_type,):
        if name in _REGISTERED:
            continue
        _REGISTERED.add(name)
        config_class = configuration_compressed.config_class_of(name)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto, model_class in modeling_compressed.auto_classes(config_class).items():
            getattr(modeling_auto, auto).register(config_class, model_class, exist_ok=True)
        stock = config_class.__mro__[2]
        if tokenizer_class := tokenization_auto.TOKENIZER_MAPPING.get(stock, None):
            chosen = next(cls for cls in reversed(_flat(tokenizer_class)) if cls is not None)
            AutoTokenizer.register(config_class, tokenizer_class=chosen, exist_ok=True)


_REGISTERED: set[str] = set()


def install() -> None:
    """Announce our model types to transformers, now or when it is imported."""
    if _TABLE in sys.modules and hasattr(sys.modules[_TABLE], "CONFIG_MAPPING"):
        _announce(sys.modules[_TABLE])
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _LazyConfigs(dict[str, Any]):
    """The table's registered configs, in which our entries are empty until one of them is read."""

    def __getitem__(self, key: str) -> Any:
        if key in MODEL_TYPES:
            register(key.removeprefix(TYPE_PREFIX))
        return super().__getitem__(key)

    def _configs(self) -> None:
        """Fill in the configs, without the models that they are of."""
        from .runtime.configuration_compressed import config_class_of

        for key in MODEL_TYPES:
            if dict.get(self, key) is None:
                self[key] = config_class_of(key.removeprefix(TYPE_PREFIX))

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._configs()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._configs()
        return super().items()


def _announce(table: ModuleType) -> None:
    mapping = table.CONFIG_MAPPING
    if isinstance(getattr(mapping, "_extra_content", None), dict):
        if not isinstance(mapping._extra_content, _LazyConfigs):
            mapping._extra_content = _LazyConfigs({**mapping._extra_content, **dict.fromkeys(MODEL_TYPES)})
    else:  # another transformers may keep its table otherwise: register at once, slower but public
        register()


class _TableFinder(MetaPathFinder):
    """Waits until transformers' config table is imported, adds our types to it, and removes itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the table's usual spec, with a loader that announces our types once the module has run."""
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _announce(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _flat(classes: Any) -> list[Any]:
    return list(classes) if isinstance(classes, tuple | list) else [classes]


def public(name: str) -> Any:
    """Return a compressed class by its name; importing one registers its family."""
    runtime = f"{__package__}.runtime"
    for module in ("configuration_compressed", "modeling_compressed"):
        found = getattr(importlib.import_module(f"{runtime}.{module}"), name, None)
        if found is not None:
            config_class = getattr(found, "config_class", found)
            if getattr(config_class, "model_type", None) in MODEL_TYPES:
                register(config_class.model_type.removeprefix(TYPE_PREFIX))
            return found
    raise AttributeError(name)
