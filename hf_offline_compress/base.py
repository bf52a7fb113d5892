"""The base checkpoint: a local folder or a Hub id, its config, its weights, and the files that travel along."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CompressionError, listing
from .families import Family, architecture_of, family_of
from .files import belongs_to
from .runtime.bounds_compressed import check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What users of a checkpoint rely on beside config and weights. A list of what is wanted, so that nothing else of a
# folder (optimizer states, logs, secrets) is ever published with the model.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
logger = logging.getLogger(__name__)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base, resolved.

    Attributes:
        name: how reports call it: a Hub id, or the last component of a local path.
        folder: where its files lie.
        config: the contents of config.json.
        family: what `families` knows of it.
        revision: commit on the Hub; None for a local folder.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    family: Family
    revision: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weight files: the safetensors, or the pickles where there are none."""
        found = [*self.folder.glob("model*.safetensors")] or [*self.folder.glob("pytorch_model*.bin")]
        return sum(file.stat().st_size for file in found)


def resolve_architecture(config: dict[str, Any], auto_class: str | None) -> str:
    """Return the stock class to load: the one that the config names, or the one behind an `AutoModel…`.

    Raises:
        CompressionError: there is no such auto class, or it has no class for this family.
    """
    family = family_of(config)
    if auto_class is None:
        return architecture_of(config, family)
    if auto_class in family.heads:
        return auto_class
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    mapping = getattr(getattr(modeling_auto, auto_class, None), "_model_mapping", None)
    config_class = type(AutoConfig.for_model(family.model_type))
    found = mapping.get(config_class, None) if mapping is not None else None
    if found is None:
        raise CompressionError(
            f"There is no '{auto_class}' for {family.title}; pass e.g. AutoModel, AutoModelForMaskedLM, or one of "
            f"{listing(family.heads)}."
        )
    return str((found[0] if isinstance(found, tuple | list) else found).__name__)


def read_config(
    base: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the name and the config.json of a base, without its weights.

    Raises:
        CompressionError: there is no such folder or repository, or its config cannot be read.
    """
    name, config = _named_config(base, revision, token)
    try:
        check_sizes(config)
    except ValueError as error:
        raise CompressionError(f"The config.json of '{name}' does not describe a model: {error}") from error
    return name, config


def _named_config(base: str | Path, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, Any]]:
    folder = Path(base)
    if folder.is_dir():
        return folder.resolve().name, _read_json(folder / "config.json", f"The folder '{base}'")
    _check_id(base)
    path = _from_hub(
        str(base), lambda hub: hub.hf_hub_download(str(base), "config.json", revision=revision, token=token)
    )
    return str(base), _read_json(Path(path), f"The repository '{base}'")


def resolve_base(base: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> BaseCheckpoint:
    """Return a base with all its files on this disk; from the Hub, only those that are needed are fetched.

    Raises:
        CompressionError: there is no such base, it cannot be compressed, or it has no weights.
    """
    name, config = read_config(base, revision=revision, token=token)
    family = family_of(config)
    folder, commit = Path(base), None
    if not folder.is_dir():

        def fetch(hub: Any) -> str:
            names = hub.list_repo_files(str(base), revision=revision, token=token)
            return str(hub.snapshot_download(str(base), revision=revision, token=token, allow_patterns=_wanted(names)))

        folder = Path(_from_hub(str(base), fetch))
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    if not any((folder / file).is_file() for file in (*SAFETENSORS, *PICKLES)):
        raise CompressionError(
            f"'{name}' has no weights: none of {listing((*SAFETENSORS, *PICKLES))} is there. "
            "Save a model with save_pretrained, or pass another base."
        )
    return BaseCheckpoint(name, folder, config, family, commit)


def load_model(base: BaseCheckpoint, architecture: str, dtype: Any) -> PreTrainedModel:
    """Return the stock model of a base in evaluation mode, on the CPU; no code of the checkpoint's own is run.

    Args:
        base: a resolved base.
        architecture: stock class name.
        dtype: torch dtype to hold it in.

    Raises:
        CompressionError: weights of the chosen architecture are missing.
    """
    import transformers

    stock = getattr(transformers, architecture)
    with quiet_transformers():
        model, info = stock.from_pretrained(base.folder, dtype=dtype, output_loading_info=True)
    # transformers itself only warns of what it has filled at random; a pooler is often left out and never used.
    missing = sorted(key for key in info["missing_keys"] if ".pooler." not in f".{key}")
    if missing:
        raise CompressionError(
            f"'{base.name}' has no weights for {listing(missing[:3])}{' …' if len(missing) > 3 else ''} of {architecture}; "
            f"pass the auto_class that it was saved from, e.g. auto_class='AutoModel'."
        )
    return model.eval()


def load_tokenizer(base: BaseCheckpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the base's tokenizer, or None if it has none."""
    from transformers import AutoTokenizer

    if not any((base.folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
    return clamp_length(tokenizer, base.config)


def clamp_length(tokenizer: Any, config: Any) -> Any:
    """Return the tokenizer, told how many positions the model has if it claims to know no limit."""
    values = config if isinstance(config, dict) else config.to_dict()
    positions = values.get("max_position_embeddings") or values.get("n_positions")
    if positions:
        if "roberta" in str(values.get("model_type")):
            positions -= (values.get("pad_token_id") or 0) + 1  # RoBERTa counts positions from behind the padding's
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what users rely on beside config and weights, into a folder where it is not yet; return the names.

    Weights of sentence-transformers' own modules that are pickled are stored as safetensors.
    """
    copied = []
    for name in COMPANIONS:
        if _is_own(source, source / name) and not (target / name).exists():
            _copy(source / name, target / name)
            copied.append(name)
    for folder in _module_folders(source):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for file in sorted((source / folder).iterdir()):
            if file.suffix in (".json", ".txt", ".safetensors") and _is_own(source, file):
                _copy(file, target / folder / file.name)
                copied.append(f"{folder}/{file.name}")
        pickled, stored = source / folder / "pytorch_model.bin", target / folder / "model.safetensors"
        if _is_own(source, pickled) and not stored.exists():
            _unpickle(pickled, stored)
            copied.append(f"{folder}/{stored.name}")
    return copied


def _is_own(source: Path, file: Path) -> bool:
    """Whether a file of a base is there, and is its own; a link to elsewhere on this disk is passed over, and said so."""
    if not file.is_file():
        return False
    if not belongs_to(source, file):
        logger.warning("'%s' of the base is a link to a file outside of it, and does not travel along.", file.name)
        return False
    return True


def _module_folders(source: Path) -> list[str]:
    """Return the folders of a sentence-transformers pipeline, as its modules.json names them."""
    if not (source / "modules.json").is_file():
        return []
    modules = _read_json(source / "modules.json", f"The folder '{source.name}'", list)
    paths = [str(module.get("path") or "") for module in modules if isinstance(module, dict)]
    return [path for path in paths if re.fullmatch(r"[\w-]+", path) and (source / path).is_dir()]


def _copy(source: Path, target: Path) -> None:
    """Copy a file; a JSON file without the places on disk that tokenizers like to remember."""
    if source.suffix != ".json":
        shutil.copyfile(source, target)
        return
    content = source.read_bytes()
    if re.search(rb'"_?name_or_path"', content):
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):  # whoever reads it will say so
            values = None
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key not in ("name_or_path", "_name_or_path")}
            content = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    target.write_bytes(content)


def _unpickle(source: Path, target: Path) -> None:
    """Store a file of pickled tensors as safetensors; `weights_only` refuses anything that is not a tensor."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(source, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target)


def _wanted(names: list[str]) -> list[str]:
    """Return the files of a repository that are needed: safetensors where there are any, else pickled weights.

    Its README is read for licence and languages alone.
    """
    weights = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    if not any(re.fullmatch(weights, name) for name in names):
        weights = r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"
    module = r"\d+_[\w-]+/[^/]+\.(json|txt|safetensors|bin)"
    return [
        name
        for name in names
        if name in ("config.json", "README.md", *COMPANIONS)
        or re.fullmatch(weights, name)
        or re.fullmatch(module, name)
    ]


def _check_id(base: str | Path) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)) or str(base).startswith((".", "/")):
        raise CompressionError(
            f"There is no folder '{base}', and it is no Hub id either (name or owner/name, e.g. bert-base-uncased)."
        )


def _from_hub(name: str, fetch: Any) -> str:
    """Call `fetch` with huggingface_hub, and turn its errors into sentences."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return str(fetch(huggingface_hub))
    except errors.GatedRepoError as error:
        raise CompressionError(f"'{name}' is gated: ask for access on its page, and pass a token.") from error
    except errors.RevisionNotFoundError as error:
        raise CompressionError(f"'{name}' has no such revision on the Hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise CompressionError(
            f"There is neither a folder nor a repository on the Hub named '{name}' (a private one needs a token)."
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise CompressionError(
                f"There is no folder '{name}', and the Hub cannot be reached for a repository of that name, "
                "which is not in the local cache either."
            ) from error
        raise CompressionError(f"'{name}' on the Hub has no config.json: it is no transformers checkpoint.") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CompressionError(
            f"'{name}' could not be fetched from the Hub: {' '.join(str(error).split())[:300]}"
        ) from error


def _read_json(path: Path, label: str, wanted: type = dict) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CompressionError(f"{label} has no {path.name}: it is no transformers checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CompressionError(f"{label} has a {path.name} that cannot be read: {error}. Get it again.") from error
    if not isinstance(content, wanted):
        raise CompressionError(f"{label} has a {path.name} that is not a JSON {wanted.__name__}. Get it again.")
    return content


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars and notes on loading; ours say what matters."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
