"""Registration with the Auto classes: complete, but only when it is needed.

Registering imports torch and the modeling modules of three families, seconds that `--help` or `plan` have no use for.
So the names of our model types are put into transformers' table of configs at once (or as soon as that table exists),
and the classes behind them follow when one is first asked for, by `AutoConfig`, `AutoModel…` or `AutoTokenizer`.
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

MODEL_TYPES = ("compressed_bert", "compressed_roberta", "compressed_gpt2")
SUPPORTED_TRANSFORMERS = ((5, 20), (6, 0))
_TABLE = "transformers.models.auto.configuration_auto"


def check_transformers() -> None:
    """Raise ImportError if the installed transformers is outside the supported range."""
    installed = version("transformers")
    low, high = SUPPORTED_TRANSFORMERS
    if not low <= tuple(int(part) for part in installed.split(".")[:2]) < high:
        raise ImportError(
            f"hf_offline_compress needs transformers>={low[0]}.{low[1]},<{high[0]}; installed is {installed}. "
            f"`pip install 'transformers>={low[0]}.{low[1]},<{high[0]}'` gets one that works."
        )


def register() -> None:
    """Register configs, models and tokenizers with the Auto classes; doing it again changes nothing."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto import modeling_auto, tokenization_auto

    from .runtime import configuration_compressed, modeling_compressed

    for config_class in (
        configuration_compressed.CompressedBertConfig,
        configuration_compressed.CompressedRobertaConfig,
        configuration_compressed.CompressedGPT2Config,
    ):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for name, model_class in modeling_compressed.auto_classes(config_class).items():
            getattr(modeling_auto, name).register(config_class, model_class, exist_ok=True)
        stock = config_class.__mro__[2]
        if tokenizer_class := tokenization_auto.TOKENIZER_MAPPING.get(stock, None):
            chosen = next(cls for cls in reversed(_flat(tokenizer_class)) if cls is not None)
            AutoTokenizer.register(config_class, tokenizer_class=chosen, exist_ok=True)


def install() -> None:
    """Announce our model types to transformers, now or when it is imported."""
    if _TABLE in sys.modules and hasattr(sys.modules[_TABLE], "CONFIG_MAPPING"):
        _announce(sys.modules[_TABLE])
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


class _LazyConfigs(dict[str, Any]):
    """The table's registered configs, in which our entries are empty until one of them is read."""

    def _resolve(self) -> None:
        if any(dict.get(self, name) is None for name in MODEL_TYPES):
            register()

    def __getitem__(self, key: str) -> Any:
        if key in MODEL_TYPES:
            self._resolve()
        return super().__getitem__(key)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._resolve()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._resolve()
        return super().items()


def _announce(table: ModuleType) -> None:
    mapping = table.CONFIG_MAPPING
    if isinstance(getattr(mapping, "_extra_content", None), dict):
        if not isinstance(mapping._extra_content, _LazyConfigs):
            mapping._extra_content = _LazyConfigs({**mapping._extra_content, **dict.fromkeys(MODEL_TYPES)})
    else:  # another transformers may keep its table otherwise: register at once, slower but public
        register()


class _TableFinder(MetaPathFinder):
    """Waits for transformers' table of configs to be imported, announces our types in it, and goes away."""

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
    """Return a compressed class by its name; importing one registers all."""
    register()
    runtime = f"{__package__}.runtime"
    for module in ("modeling_compressed", "configuration_compressed"):
        if hasattr(found := importlib.import_module(f"{runtime}.{module}"), name):
            return getattr(found, name)
    raise AttributeError(name)
