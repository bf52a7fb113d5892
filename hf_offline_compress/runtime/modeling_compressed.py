"""The compressed model classes: every head of BERT, RoBERTa and GPT-2, each the stock class with modules swapped."""

import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto

from .configuration_compressed import (
    CompressedBertConfig,
    CompressedGPT2Config,
    CompressedRobertaConfig,
    check_decoding,
)
from .layers_compressed import TiedHead
from .numbers_compressed import PackedNumbers
from .storing_compressed import holding
from .structures_compressed import LinearDecoder
from .substitution_compressed import compressed_modules, relink, substitute
from .weights_compressed import CompressedWeight, WeightDecoder, set_decoding

_STOCK_NAMES: dict[type[PreTrainedConfig], str] = {
    CompressedBertConfig: """BertModel BertForPreTraining BertForMaskedLM BertLMHeadModel BertForNextSentencePrediction
        BertForSequenceClassification BertForMultipleChoice BertForTokenClassification BertForQuestionAnswering""",
    CompressedRobertaConfig: """RobertaModel RobertaForMaskedLM RobertaForCausalLM RobertaForSequenceClassification
        RobertaForMultipleChoice RobertaForTokenClassification RobertaForQuestionAnswering""",
    CompressedGPT2Config: """GPT2Model GPT2LMHeadModel GPT2DoubleHeadsModel GPT2ForSequenceClassification
        GPT2ForTokenClassification GPT2ForQuestionAnswering""",
}


class CompressedModelMixin:
    """What compressed models do beyond their stock class, which stands behind this one in their bases."""

    def post_init(self: Any) -> None:
        """Swap the modules that the config names; stock classes call this at the end of their constructor."""
        base = self.base_model
        if base is not self and type(base) in _COMPRESSED:
            # The base model inside a head must be ours too, or its own initialisation passes over our parameters.
            base.__class__ = _COMPRESSED[type(base)]
        if self.config.compression:
            substitute(self, self.config.compression)
        super().post_init()  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self: Any, module: nn.Module) -> None:
        """Fill what the checkpoint did not; see the stock class."""
        if isinstance(module, CompressedWeight | WeightDecoder):
            with init.guard_torch_init_functions():
                module.reset_parameters(self.config.initializer_range)
                module.fill_packed(self.config.initializer_range)
            if isinstance(module, LinearDecoder) and module.order is not None:
                init.copy_(module.order, torch.arange(len(module.order), dtype=module.order.dtype))
        elif isinstance(module, TiedHead):
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not isinstance(getattr(module, "c_proj", None), CompressedWeight):
            # GPT-2 would fill `c_proj.weight`, which is decoded where c_proj is compressed.
            super()._init_weights(module)  # type: ignore[misc]

    def compressed_modules(self: Any) -> dict[str, CompressedWeight]:
        """Return the compressed modules by name."""
        return compressed_modules(self)

    def set_decoding(self: Any, decoding: str, max_bytes: int | None = None) -> None:
        """Choose when weights are decoded, where a structure has to decode them at all.

        Args:
            decoding: "cached", once, at the first forward pass (fast; memory as of the dense model); or "on_the_fly", at
                every use (slower; memory as on disk). Saved with the config.
            max_bytes: with "cached", keep decoded weights of so many bytes in all, first come, first kept, and decode the
                others at every use; by default all are kept. Saved with the config.

        Raises:
            ValueError: there is no such decoding, or `max_bytes` is no number of bytes, or does not go with it.
        """
        check_decoding(decoding, max_bytes)
        if self.config.compression:
            self.config.compression["decoding"] = decoding
            self.config.compression.pop("max_decoded_bytes", None)
            if max_bytes is not None:
                self.config.compression["max_decoded_bytes"] = max_bytes
        set_decoding(self.compressed_modules().values(), decoding, max_bytes)

    def forget_decoded(self: Any) -> None:
        """Drop all decoded weights, so that they are decoded anew at the next use.

        Needed after weights were changed in a way that torch does not count, by assigning to their `.data`.
        """
        for module in self.modules():
            if isinstance(module, PackedNumbers):
                module.forget()

    def _replicate_for_data_parallel(self: Any) -> Any:
        """Return a replica for `nn.DataParallel`, in which references between modules lead to the replica's own."""
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
            # The bias has a second owner, the prediction head around the output matrix.
            owner = self.get_submodule(
                next(s for t, s in self._tied_weights_keys.items() if t.endswith("bias")).rpartition(".")[0]
            )
            owner.bias = head.bias
        return embedding

    def save_pretrained(
        self: Any,
        save_directory: str | PathLike[str],
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model and, next to it, the code that loads it where the package is not installed.

        Factors are stored in the dtype that the config's `storage` says, if that is narrower than the model's; numbers that
        it does not hold are stored wider.
        """
        if self.config.compression:
            self.config.auto_map = auto_map(type(self.config))
        super().save_pretrained(  # type: ignore[misc]
            save_directory, *args, state_dict=self._narrowed(state_dict), **kwargs
        )
        if self.config.compression:
            for file in Path(__file__).parent.glob("*_compressed.py"):
                shutil.copyfile(file, Path(save_directory) / file.name)
            # What was recorded of the model that was saved here before is not true of this one.
            (Path(save_directory) / "verification.json").unlink(missing_ok=True)

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> str:
        """Publish the model with the code that loads it; options and result are those of the stock method.

        With the package installed, model and files are verified first, and a model card that it was loaded with goes along.

        Raises:
            CompressionError: with the package, where a check fails or the Hub does not take it.
        """
        if self.config.compression is None:
            return super().push_to_hub(repo_id, **options)  # type: ignore[misc]
        try:
            from hf_offline_compress.hub import push_model
        except ImportError:  # only its code is here
            return super().push_to_hub(repo_id, **options)  # type: ignore[misc]
        return push_model(self, repo_id, **options)

    def _narrowed(self: Any, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the state dict with factors and all else in their storage dtypes; None where nothing is to be cast."""
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


def _refer_to_own(replica: Any, inputs: Any) -> None:
    """Let the modules of a replica refer to its own decoders and embedding, not to the original's."""
    relink(replica)


def _compressed(stock: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Make the compressed class of a stock class."""
    name = f"Compressed{stock.__name__}"
    namespace = {
        "config_class": config_class,
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"`{stock.__name__}` whose weights are kept compressed, as its config's `compression` describes.",
    }
    return type(name, (CompressedModelMixin, stock), namespace)


# stock class → ours
_COMPRESSED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    getattr(transformers, name): _compressed(getattr(transformers, name), config_class)
    for config_class, names in _STOCK_NAMES.items()
    for name in names.split()
}
globals().update({cls.__name__: cls for cls in _COMPRESSED.values()})
__all__ = [cls.__name__ for cls in _COMPRESSED.values()]


def compressed_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the compressed class of a stock class; KeyError if it has none."""
    return _COMPRESSED[stock]


def auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Return auto class name → compressed class, for every `AutoModel…` that has the stock class."""
    stock_config = next(cls for cls in config_class.__mro__ if cls.__module__.startswith("transformers.models."))
    found: dict[str, type[PreTrainedModel]] = {}
    for name in sorted(n for n in dir(modeling_auto) if n.startswith("AutoModel")):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        stock = mapping.get(stock_config, None) if mapping is not None else None
        for cls in stock if isinstance(stock, tuple | list) else [stock]:
            if cls in _COMPRESSED:
                found.setdefault(name, _COMPRESSED[cls])
    return found


def auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Return the `auto_map` of a config: where the auto classes find our code in a saved folder."""
    models = {name: f"modeling_compressed.{cls.__name__}" for name, cls in auto_classes(config_class).items()}
    return {"AutoConfig": f"configuration_compressed.{config_class.__name__}", **models}
