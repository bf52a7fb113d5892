"""A compressed folder and its base: found, checked against each other, and loaded side by side.

The compressed model is loaded by this package's own classes. Code that came with the folder is never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.families import objective_of
from ..artifact.reading import REPORT_FILE, FolderContents, inspect_folder
from ..base.checkpoint import (
    TOKENIZER_FILES,
    UNWRAPPED,
    BaseCheckpoint,
    check_fit,
    clamp_length,
    drop_absent,
    load_tokenizer,
    quiet_transformers,
    resolve_base,
)
from ..base.files import check_base_texts
from ..errors import CompressionError, listing, refusing
from ..foundation.progress import stage
from ..runtime.architectures_compressed import architecture_of

# What must be equal in the configs of a base and of what was made from it.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_embd",
    "n_layer",
    "n_head",
    "position_embedding_type",
)


@dataclass(frozen=True)
class Pair:
    """A compressed folder and its base, not yet loaded.

    Attributes:
        folder: of the compressed model.
        contents: what is in it.
        base: the base checkpoint.
        architecture: stock class that both were saved from.
        tokenizer: of the compressed model; it pads, with the end token if need be.
        base_tokenizer: of the base; the same one, unless the compressed model's vocabulary was pruned.
        onnx: a file that was exported from the compressed model, to be evaluated in the place of its weights.
    """

    folder: Path
    contents: FolderContents
    base: BaseCheckpoint
    architecture: str
    tokenizer: Any
    base_tokenizer: Any
    onnx: Path | None = None

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each model, "base" and "compressed"."""
        return {"base": self.base_tokenizer, "compressed": self.tokenizer}

    @property
    def same_tokens(self) -> bool:
        """Whether both models have the same tokens."""
        return self.base_tokenizer is self.tokenizer

    def load_base(self, architecture: str | None = None, dtype: str = "float32", **options: Any) -> Any:
        """Return the base in evaluation mode, on the CPU; see `load`."""
        import transformers

        return load(getattr(transformers, architecture or self.architecture), self.base.folder, dtype, **options)

    def load_compressed(self, architecture: str | None = None, dtype: str = "float32", **options: Any) -> Any:
        """Return the compressed model in evaluation mode, on the CPU; see `load`."""
        import transformers

        from ..runtime.modeling_compressed import compressed_class

        stock = getattr(transformers, architecture or self.architecture)
        if self.onnx is not None:
            return self._load_onnx(stock)
        return load(compressed_class(stock), self.folder, dtype, **options)

    def _load_onnx(self, stock: Any) -> Any:
        """Return the ONNX file as a model, of a class that is named as the stock one, which evaluations go by."""
        from ..runtime.modeling_compressed import compressed_class
        from .onnx_model import OnnxModel

        assert self.onnx is not None
        config: Any = compressed_class(stock).config_class
        config = config.from_pretrained(self.folder)
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id
        with stage(f"loading {self.onnx.name}"):
            return type(stock.__name__, (OnnxModel,), {})(self.onnx, config).eval()


def load(model_class: Any, folder: Path, dtype: str, *, new_head: bool = False, **options: Any) -> Any:
    """Return a model in evaluation mode.

    Args:
        model_class: stock or compressed.
        folder: of the checkpoint.
        dtype: to hold it in.
        new_head: whether weights of a head may be missing, and are filled at random.
        **options: of `from_pretrained`, e.g. `num_labels`.

    Raises:
        CompressionError: weights are missing.
    """
    import torch

    what = f"'{folder.name}' does not load as {model_class.__name__} from its config.json and weights"
    advice = "Download it again, or make it again."
    options = {"ignore_mismatched_sizes": True, "key_mapping": UNWRAPPED, **options}  # what does not fit is named below
    with stage(f"loading {folder.name}"), quiet_transformers(), refusing(what, advice):
        model, info = model_class.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True, **options
        )
    prefix, entry = f"{model.base_model_prefix}.", architecture_of(model.config.model_type)
    check_fit(info, what, advice, prefix if new_head else "")
    missing = drop_absent(model, entry, info["missing_keys"]) if entry else sorted(info["missing_keys"])
    # A new head may use what the base lacks.
    new = tuple(f"{prefix}{part}." for part in (entry.optional if entry and new_head else ()))
    if damaged := [key for key in missing if key.startswith(prefix) and not key.startswith(new or "/")]:
        raise CompressionError(
            f"{what}: {listing(damaged[:3])}{' …' if len(damaged) > 3 else ''} are missing. {advice}"
        )
    if missing and not new_head:
        raise CompressionError(
            f"'{folder.name}' has no weights for {listing(missing[:3])}{' …' if len(missing) > 3 else ''} of "
            f"{model_class.__name__}; use a checkpoint with such a head, or train one with --fine-tune."
        )
    if model.config.pad_token_id is None:  # GPT-2's heads look for the last token that is no padding
        model.config.pad_token_id = model.config.eos_token_id
    return model.eval()


def find_pair(
    folder: str | Path, base: str | Path | None = None, *, revision: str | None = None, onnx: str | Path | None = None
) -> Pair:
    """Return a compressed folder with its base and their tokenizer.

    Args:
        folder: that this package has written.
        base: folder or Hub id; by default what the folder's report names, if that is on the Hub.
        revision: of a base on the Hub; by default what the report says.
        onnx: a file that was exported from the folder, to be evaluated in the place of its weights.

    Raises:
        CompressionError: there is no such folder or base, the base is another model, or there is no tokenizer.
    """
    contents = inspect_folder(folder)
    said = (contents.report or {}).get("base") or {}
    if base is None:
        # The last component of a local path has neither a commit nor an owner.
        if not said:
            raise CompressionError(
                f"'{contents.name}' has no {REPORT_FILE} to say what it was made from; pass its base with --base (base=)."
            )
        if not said.get("revision") and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(said["name"])):
            raise CompressionError(
                f"'{contents.name}' was made from '{said['name']}', which is not a Hub id; pass its folder with --base (base=)."
            )
        base = str(said["name"])
    if str(base) == said.get("name") and not Path(base).is_dir():
        revision = revision or said.get("revision")
    with stage("finding the base"):
        resolved = resolve_base(base, revision=revision)
    _check_sizes(contents, resolved)
    own = BaseCheckpoint(contents.name, Path(folder), contents.config, resolved.family)
    check_base_texts(own.folder, own.name, TOKENIZER_FILES)
    tokenizer = load_tokenizer(own) or load_tokenizer(resolved)
    if tokenizer is None:
        raise CompressionError(
            f"Neither '{contents.name}' nor '{resolved.name}' has a tokenizer; save one in either folder with save_pretrained."
        )
    sizes = [values.get("vocab_size") or 0 for values in (contents.config, resolved.config)]
    if sizes[0] >= sizes[1]:
        tokenizer = base_tokenizer = _asking(tokenizer, resolved.config)
    else:
        if (whole := load_tokenizer(resolved)) is None:
            raise CompressionError(
                f"The vocabulary of '{contents.name}' was pruned, and '{resolved.name}' has no tokenizer to be asked with; save "
                "its own in its folder with save_pretrained."
            )
        tokenizer, base_tokenizer = _asking(tokenizer, contents.config), _asking(whole, resolved.config)
    file = Path(onnx) if onnx is not None else None
    return Pair(Path(folder), contents, resolved, contents.architecture, tokenizer, base_tokenizer, file)


def _asking(tokenizer: Any, config: dict[str, Any]) -> Any:
    """Return the tokenizer, so that it pads with a token that the model has, behind the text."""
    vocabulary = config.get("vocab_size")
    if tokenizer.pad_token_id is None or (vocabulary and tokenizer.pad_token_id >= vocabulary):
        tokenizer.pad_token = tokenizer.eos_token
    # What is judged is placed by position: behind the last token there may be padding, before the first never.
    tokenizer.padding_side = "right"
    return clamp_length(tokenizer, config)


def language_model_kind(architecture: str) -> str | None:
    """Return "masked" or "causal" for a stock class with a language model's head that can be measured, else None."""
    kind = objective_of(architecture)
    return None if kind == "discriminative" else kind


def _check_sizes(contents: FolderContents, base: BaseCheckpoint) -> None:
    """Raise CompressionError if a folder cannot have been made from a base."""
    compressed = contents.config
    made_from = f" ('{contents.report['base']['name']}')" if contents.report else ""
    if compressed["model_type"] != f"compressed_{base.family.model_type}":
        raise CompressionError(
            f"'{base.name}' is {base.family.title}, and '{contents.name}' is a {compressed['model_type']}; pass the base that it "
            f"was made from{made_from}."
        )
    for name in SIZES:
        if name in compressed and name in base.config and compressed[name] != base.config[name]:
            raise CompressionError(
                f"'{base.name}' has {name} {base.config[name]!r} in its config.json, and '{contents.name}' has "
                f"{compressed[name]!r}; pass the base that it was made from{made_from}."
            )
