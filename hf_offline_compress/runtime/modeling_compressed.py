"""The compressed model classes: every head of every architecture, each the stock class with modules swapped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from .architectures_compressed import ARCHITECTURES, CLASS_PREFIX, TYPE_PREFIX
from .bounds_compressed import check_decoding
from .configuration_compressed import config_class_of
from .executing_compressed import why_not_int8
from .layers_compressed import FusedLinear, TiedHead
from .loading_compressed import check_loaded, current_compression, remember_groups, warn_of_precision
from .numbers_compressed import PackedNumbers
from .seen_compressed import forward_pass
from .storing_compressed import holding
from .structures_compressed import LinearDecoder
from .substitution_compressed import compressed_modules, relink, substitute
from .weights_compressed import CompressedWeight, WeightDecoder, seen_sources, set_decoding


class CompressedModelMixin:
    """What compressed models add to their stock class, which follows this one in their bases.

    Attributes:
        publish: verifies and publishes a model; set by the package, None without it.
    """

    publish: Any = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        """Make the model; some stock heads make their base model by `AutoModel`, which must know this exact config class."""
        known: Any = modeling_auto.MODEL_MAPPING
        if type(config) not in known:
            stock: Any = getattr(transformers, ARCHITECTURES[config.model_type.removeprefix(TYPE_PREFIX)].base)
            known.register(type(config), compressed_class(stock), exist_ok=True)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass; see the stock class. Whether kept weights are stale is looked at once, when it begins."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with forward_pass(self, lambda: seen_sources(self)):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def post_init(self: Any) -> None:
        """Swap the modules that the config names; stock classes call this at the end of their constructor."""
        for module in self.modules():
            # Inner models must be ours too, or their own initialisation skips our parameters.
            if isinstance(module, PreTrainedModel) and not isinstance(module, CompressedModelMixin):
                module.__class__ = compressed_class(type(module))
        if self.config.compression:
            for name in self.config.compression["absent"] if self.base_model is self else ():
                setattr(self, name, None)
            substitute(self, self.config.compression)
            remember_groups(self, self.config.compression)
        super().post_init()  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        decoding: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model; see the stock method.

        Args:
            args: those of the stock method.
            output_loading_info: as of the stock method.
            ignore_mismatched_sizes: as of the stock method.
            decoding: how weights are held, see `set_decoding`; by default as the folder says.
            kwargs: those of the stock method.

        Raises:
            ValueError: compressed weights are missing, too many, or of other shapes. The stock method would fill them at
                random and say so in a note. Or there is no such decoding here.
        """
        if decoding is not None:
            check_decoding(decoding, None)
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=ignore_mismatched_sizes, **kwargs
        )
        check_loaded(model, info, ignore_mismatched_sizes)
        warn_of_precision(model)
        if decoding is not None:
            model.set_decoding(decoding)
        return (model, info) if output_loading_info else model

    def _adjust_bias(self: Any, output_embeddings: nn.Module, input_embeddings: Any) -> None:
        """Fit a tied head's bias, which the stock method does by decoding its weight, twice, to count its rows."""
        if isinstance(output_embeddings, TiedHead):
            output_embeddings.fit_bias()
        else:
            super()._adjust_bias(output_embeddings, input_embeddings)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self: Any, module: nn.Module) -> None:
        """Initialise what the checkpoint lacks; see the stock class."""
        if isinstance(module, CompressedWeight | WeightDecoder):
            std = getattr(self.config, "initializer_range", 0.02)  # OPT has another name for it
            with init.guard_torch_init_functions():
                module.reset_parameters(std)
                module.fill_packed(std)
            if isinstance(module, LinearDecoder) and module.order is not None:
                init.copy_(module.order, torch.arange(len(module.order), dtype=module.order.dtype))
        elif isinstance(module, TiedHead):
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not isinstance(module, FusedLinear):
            with _shielded(module):
                super()._init_weights(module)  # type: ignore[misc]

    def compressed_modules(self: Any) -> dict[str, CompressedWeight]:
        """Return the compressed modules by name."""
        return compressed_modules(self)

    def set_decoding(self: Any, decoding: str, max_bytes: int | None = None) -> None:
        """Choose how decoded weights are held, for this model only: the choice is not saved.

        Args:
            decoding: "cached", decoded once, at the first forward pass (as fast and as large as the dense model);
                "on_the_fly", decoded at every use (slower; memory as on disk); "int8", once, to bytes with a scale for each
                row, which a CPU's integer kernels multiply (a quarter of the dense layers' memory, rounded; how fast depends on
                the CPU); "auto", "int8" on a CPU with VNNI or an ARM CPU, else "cached".
            max_bytes: with "cached", keep at most this many bytes of decoded weights, in order of first use, and decode the
                others at every use; by default all are kept.

        Raises:
            ValueError: the decoding is unknown or not available on this machine, or `max_bytes` is not a number of bytes, or
                does not go with it.
        """
        check_decoding(decoding, max_bytes)
        if decoding == "int8":
            for kind in sorted({parameter.device.type for parameter in self.parameters()}):
                if why := why_not_int8(kind):
                    raise ValueError(f"This model cannot be run this way: {why}")
        set_decoding(self.compressed_modules().values(), decoding, max_bytes)

    def forget_decoded(self: Any) -> None:
        """Drop all decoded weights, so that they are decoded anew at the next use.

        Needed after weights were changed in a way that torch does not track, by assigning to their `.data`.
        """
        for module in self.modules():
            if isinstance(module, PackedNumbers):
                module.forget()

    def _replicate_for_data_parallel(self: Any) -> Any:
        """Return a replica for `nn.DataParallel`, whose modules refer to the replica's own."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._forward_pre_hooks = replica._forward_pre_hooks.copy()
        replica.register_forward_pre_hook(_refer_to_own)  # its submodules are replicated after it
        return replica

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Change the vocabulary's size; see the stock method. New rows of a compressed embedding have the mean latents.

        Raises:
            NotImplementedError: embedding or head is compressed, and they are not tied.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embedding, CompressedWeight) and not isinstance(head, CompressedWeight):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)  # type: ignore[misc]
        if head is not None and not isinstance(head, TiedHead):
            raise NotImplementedError(
                "The vocabulary of a compressed model whose head is not tied to its embedding cannot be resized; "
                "resize the base model, then compress it."
            )
        rows = new_num_tokens or embedding.rows
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows == embedding.rows:
            return embedding
        embedding.resize(rows)
        self.config.vocab_size = rows
        if head is not None and head.bias is not None:
            bias = head.bias.data.new_zeros(rows)
            kept = min(rows, len(head.bias))
            bias[:kept] = head.bias.data[:kept]
            head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
            # In some families the bias has a second owner, the prediction head around the output matrix.
            for target, source in (self._tied_weights_keys or {}).items():
                if target.endswith(".bias"):
                    self.get_submodule(source.rpartition(".")[0]).bias = head.bias
        return embedding

    def save_pretrained(
        self: Any,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model and, next to it, the code that loads it where the package is not installed.

        Factors are stored in the dtype that the config's `storage` says, if that is narrower than the model's; numbers that
        it does not hold are stored wider.

        With `push_to_hub`, what `push_to_hub()` does follows. With another `state_dict` than the model's own nothing can be
        verified, so the folder is published as it is.
        """
        compressed, options = bool(self.config.compression), {}
        verified = compressed and push_to_hub and self.publish is not None and state_dict is None
        if verified:
            names = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
            options = {name: kwargs.pop(name) for name in names if name in kwargs}
            options |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
        if compressed:
            self.config.compression = current_compression(self)
            self.config.auto_map = auto_map(type(self.config))
        super().save_pretrained(  # type: ignore[misc]
            save_directory,
            is_main_process,
            self._narrowed(state_dict),
            push_to_hub=push_to_hub and not verified,
            **kwargs,
        )
        if not is_main_process:
            return
        if compressed:
            _add_code(Path(save_directory))
        if verified:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), **options)

    def _upload_modified_files(self: Any, working_dir: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Upload what the stock methods have saved, with the code; they call this before they have finished saving."""
        if self.config.compression:
            _add_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> str:
        """Publish the model with the code that loads it; options and result are those of the stock method.

        With the package installed, model and files are verified first, and a model card that it was loaded with goes along.

        Raises:
            CompressionError: with the package, a check fails or the Hub rejects the upload.
        """
        if self.config.compression is None or self.publish is None:
            return super().push_to_hub(repo_id, **options)  # type: ignore[misc]
        published: str = self.publish(repo_id, **options)
        return published

    def _narrowed(self: Any, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the state dict with all tensors in their storage dtypes; None if nothing needs a cast."""
        rest = getattr(torch, (self.config.compression or {}).get("rest") or "float32")
        narrow = {
            name: rest
            for name, tensor in self.state_dict().items()
            if tensor.is_floating_point() and rest.itemsize < tensor.dtype.itemsize
        }
        narrow |= {
            f"{name}.{key}": storage
            for name, module in self.named_modules()
            if isinstance(module, CompressedWeight | WeightDecoder)
            for key, tensor in module.factors().items()
            if (storage := getattr(torch, module.storage)).itemsize < tensor.dtype.itemsize or f"{name}.{key}" in narrow
        }
        if not narrow:
            return state_dict
        state = dict(self.state_dict() if state_dict is None else state_dict)
        cast: dict[tuple[int, torch.dtype], Tensor] = {}  # tied tensors must stay one
        for name in sorted(narrow.keys() & state.keys()):
            if state[name].device.type == "meta":
                raise NotImplementedError(
                    "A model with offloaded weights whose factors are stored narrower than they are held cannot be saved; "
                    "load it without offloading, or with dtype=torch.float16."
                )
            dtype = holding(state[name], narrow[name])
            key = (state[name].data_ptr(), dtype)
            state[name] = cast.setdefault(key, state[name].to(dtype))
        return state


def _add_code(folder: Path) -> None:
    """Copy the code that loads a model next to it, and remove the record of an earlier model."""
    for file in Path(__file__).parent.glob("*_compressed.py"):
        shutil.copyfile(file, folder / file.name)
    (folder / "verification.json").unlink(missing_ok=True)


def _refer_to_own(replica: Any, inputs: Any) -> None:
    """Let the modules of a replica refer to its own decoders and embedding, not to the original's."""
    relink(replica)


@contextmanager
def _shielded(module: nn.Module) -> Iterator[None]:
    """Let a stock class initialise a module without writing into decoded weights of its children."""
    children: list[Any] = [c for c in module.children() if isinstance(c, CompressedWeight | FusedLinear | TiedHead)]
    for child in children:
        child.__dict__["initializing"] = True
    try:
        yield
    finally:
        for child in children:
            del child.__dict__["initializing"]


_MADE: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def compressed_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the compressed class of a stock class; made when first asked for.

    Raises:
        KeyError: its architecture is not in the table.
    """
    if stock not in _MADE:
        config_class: Any = stock.config_class
        name = f"{CLASS_PREFIX}{stock.__name__}"
        namespace = {
            "config_class": config_class_of(config_class.model_type),
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"`{stock.__name__}` whose weights are kept compressed, as its config's `compression` describes.",
        }
        _MADE[stock] = type(name, (CompressedModelMixin, stock), namespace)
    return _MADE[stock]


def __getattr__(name: str) -> Any:
    """Return a compressed class by its name, e.g. `CompressedBertModel`; only its own family is imported from transformers."""
    stock = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        config_class: Any = stock.config_class
        if getattr(config_class, "model_type", None) in ARCHITECTURES:
            return compressed_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Return auto class name → compressed class, for every `AutoModel…` that has a stock class of the architecture."""
    model_type = config_class.model_type.removeprefix(TYPE_PREFIX)
    stem = ARCHITECTURES[model_type].base.removesuffix("Model")
    stock_config = getattr(transformers, ARCHITECTURES[model_type].config)
    found: dict[str, type[PreTrainedModel]] = {}
    for name in sorted(n for n in dir(modeling_auto) if n.startswith("AutoModel")):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        stock = mapping.get(stock_config, None) if mapping is not None else None
        for cls in stock if isinstance(stock, tuple | list) else [stock]:
            if cls is not None and cls.__name__.startswith(stem):
                found.setdefault(name, compressed_class(cls))
    return found


def auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Return the `auto_map` of a config: where the auto classes find our code in a saved folder."""
    models = {name: f"modeling_compressed.{cls.__name__}" for name, cls in auto_classes(config_class).items()}
    return {"AutoConfig": f"configuration_compressed.{config_class.__name__}", **models}
