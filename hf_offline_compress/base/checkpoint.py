"""The base checkpoint: a local folder or a Hub id, its config, its weights, and the files that travel along."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.families import FAMILIES, Family, architecture_of, family_of
from ..errors import CompressionError, listing, needs_extra, refusing
from ..foundation.arguments import token_of
from ..foundation.files import belongs_to
from ..foundation.schemas import TEXT, mismatch
from ..foundation.tokenizer_files import TOKENIZER_FILE, without_spaces
from ..runtime.architectures_compressed import Architecture, token_limit
from ..runtime.bounds_compressed import check_sizes
from .downloading import MODULE, cached_name, check_id, fetch_file, fetch_files
from .files import SAFETENSORS, check_base_texts, check_base_weights, check_module_weights, read_base_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .shards import Shards

# All that transformers' tokenizers read, fast, slow, and of SentencePiece.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "entity_vocab.json",
    "target_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
    "vocab-src.json",
    "vocab-tgt.json",
    "tekken.json",
    "tiktoken.model",
)
# What users of a checkpoint rely on beside config and weights. A list of what is wanted, so that nothing else of a
# folder (optimizer states, logs, secrets) is ever published with the model.
COMPANIONS = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# Files that number the tokens, and so are of one vocabulary alone.
NUMBERED = ("generation_config.json", *(file for file in TOKENIZER_FILES if file != "special_tokens_map.json"))
logger = logging.getLogger(__name__)
WEIGHTS = r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?"
# Of a repository; its README is read for licence and languages alone. A module's folder may hold the model itself.
WANTED = re.compile(
    rf"({MODULE}/)?({WEIGHTS}|{'|'.join(map(re.escape, ('config.json', 'README.md', *COMPANIONS)))})"
    rf"|{MODULE}/[^/]+\.(json|txt|safetensors|bin)|additional_chat_templates/[^/]+\.jinja"
)
TOKENIZER_WANTED = re.compile(
    rf"({MODULE}/)?({'|'.join(map(re.escape, ('generation_config.json', *TOKENIZER_FILES)))})"
)
ADVICE = "Download it again, or save the model again with save_pretrained."
UNWRAPPED = {r"^((module|_orig_mod)\.)+": ""}  # what DataParallel and torch.compile put before the names of weights


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
    found = _locate(base, revision, token_of(token))
    return found.name, found.config


@dataclass(frozen=True)
class _Located:
    """What is known of a base before its weights: how it is called, its config, and in which of its folders that lies."""

    name: str
    config: dict[str, Any]
    inner: str
    commit: str | None


def _locate(base: str | Path, revision: str | None, token: str | bool | None) -> _Located:
    folder = _folder(base)
    if folder is None:
        name, commit = str(base), None
    else:
        name, commit = cached_name(folder) or (folder.resolve().name, None)

    def find(file: str) -> Path | None:
        if folder is None:
            return fetch_file(name, file, revision, token)
        return folder / file if (folder / file).is_file() else None

    file, inner = find("config.json"), ""
    config = read_base_json(file, name) if file else {}
    if not config.get("model_type") and (inner_file := _inner_config(find, name)):
        config, inner = read_base_json(inner_file, name), inner_file.parent.name
    elif file is None:
        where = f"The folder '{base}'" if folder else f"'{name}' on the Hub"
        raise CompressionError(f"{where} has no config.json: it is not a transformers checkpoint.")
    try:
        check_sizes(config)
    except ValueError as error:
        raise CompressionError(f"The config.json of '{name}' does not describe a model: {error}") from error
    return _Located(name, _typed(config, name), inner, commit)


def _folder(base: str | Path) -> Path | None:
    """Return a base's folder; None where it can only be a repository."""
    try:
        if str(base) and Path(base).is_dir():
            return Path(base)
    except (OSError, ValueError):  # names that are too long, or no names
        pass
    check_id(str(base))
    return None


def _inner_config(find: Callable[[str], Path | None], name: str) -> Path | None:
    """Return the config.json of the model's own folder, e.g. 0_Transformer, in sentence-transformers' first version."""
    file = find("modules.json")
    modules = read_base_json(file, name, list) if file else []
    path = str(modules[0].get("path") or "") if modules and isinstance(modules[0], dict) else ""
    return find(f"{path}/config.json") if re.fullmatch(MODULE, path) else None


def _typed(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a config with a model_type; where it has none, that of its architecture."""
    if problem := mismatch(config, {"model_type?": TEXT, "architectures?": ([str], None)}):
        raise CompressionError(f"The config.json of '{name}' cannot be used: {problem}. {ADVICE}")
    if config.get("model_type"):
        return config
    first = next(iter(config.get("architectures") or []), None)
    for model_type, family in FAMILIES.items():
        if first and family.owns(first):
            return {**config, "model_type": model_type}
    raise CompressionError(
        f"The config.json of '{name}' has no model_type, and no known class among its architectures to infer it from; add one "
        f'to it, e.g. "model_type": "{next(iter(FAMILIES))}".'
    )


def resolve_base(base: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> BaseCheckpoint:
    """Return a base with all its files on this disk; from the Hub, only those that are needed are fetched.

    Raises:
        CompressionError: there is no such base, it cannot be compressed, it has no weights, or its files are damaged.
    """
    found = _locate(base, revision, token := token_of(token))
    family = family_of(found.config)
    folder, commit = _folder(base), found.commit
    if folder is None:
        folder = fetch_files(found.name, WANTED, revision, token)
        commit = (cached_name(folder) or (None, None))[1]
    check_base_texts(folder, found.name, COMPANIONS)
    check_base_weights(folder / found.inner, found.name)
    for each in _module_folders(folder):
        check_base_texts(folder / each, found.name, [*COMPANIONS, "config.json"])
        check_module_weights(folder / each, found.name)
    return BaseCheckpoint(found.name, folder / found.inner, found.config, family, commit)


def resolve_tokenizer(
    base: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> BaseCheckpoint:
    """Return a base with the files of its tokenizer on this disk, and without its weights; see `resolve_base`."""
    found = _locate(base, revision, token := token_of(token))
    folder = _folder(base)
    if folder is None:
        folder = fetch_files(found.name, TOKENIZER_WANTED, revision, token)
    check_base_texts(folder / found.inner, found.name, TOKENIZER_FILES)
    return BaseCheckpoint(found.name, folder / found.inner, found.config, family_of(found.config), found.commit)


def load_model(base: BaseCheckpoint, architecture: str, dtype: Any) -> PreTrainedModel:
    """Return the stock model of a base in evaluation mode, on the CPU; no code of the checkpoint's own is run.

    Args:
        base: a resolved base.
        architecture: stock class name.
        dtype: torch dtype to hold it in.

    Raises:
        CompressionError: weights of the chosen architecture are missing.
    """
    return _stock_model(base, architecture, dtype)


def open_model(base: BaseCheckpoint, architecture: str, dtype: Any) -> tuple[PreTrainedModel, Shards]:
    """Return the stock model of a base without weights, and what reads them from its files as they are needed.

    Args:
        base: a resolved base.
        architecture: stock class name.
        dtype: torch dtype to read in.

    Raises:
        CompressionError: see `load_model`; or the weights are pickled, stored in another form than the model has them in, or
            accelerate is not installed.
    """
    from .shards import shards_of

    if find_spec("accelerate") is None:
        raise CompressionError(needs_extra("max_memory (--max-memory)", "accelerate", "accelerate"))
    if not any((base.folder / file).is_file() for file in SAFETENSORS):
        raise CompressionError(
            f"The weights of '{base.name}' are pickled, and max_memory (--max-memory) reads tensors one by one, from "
            "safetensors; save the model again with save_pretrained."
        )
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is wanted here
    with tempfile.TemporaryDirectory() as nothing:  # only what has to be converted would be written there
        model = _stock_model(base, architecture, dtype, device_map={"": "disk"}, offload_folder=nothing)
        converted = any(Path(nothing).iterdir())
    shards = shards_of(model, dtype)
    names = {name for name, _ in model.named_parameters()}
    if converted or not names <= set(shards):
        raise CompressionError(
            f"The files of '{base.name}' hold its weights in another form than {architecture} has them in, so they cannot be "
            "read one by one; leave max_memory (--max-memory) out, or save the model again with save_pretrained."
        )
    return model, shards


def _stock_model(base: BaseCheckpoint, architecture: str, dtype: Any, **how: Any) -> PreTrainedModel:
    """Return the stock model of a base; `how` it is loaded goes to transformers."""
    import transformers

    stock = getattr(transformers, architecture)
    what = f"'{base.name}' does not load as {architecture} from its config.json and weights"
    options: dict[str, Any] = {"output_loading_info": True, "local_files_only": True, "key_mapping": UNWRAPPED, **how}
    with quiet_transformers(), refusing(what, ADVICE):
        model, info = stock.from_pretrained(base.folder, dtype=dtype, ignore_mismatched_sizes=True, **options)
    check_fit(info, what, ADVICE)
    # transformers itself only warns of what it has filled at random.
    missing = drop_absent(model, base.family.entry, info["missing_keys"])
    if missing:
        lacks = f"'{base.name}' has no weights for {listing(missing[:3])}{' …' if len(missing) > 3 else ''} of {architecture}"
        if len(info["missing_keys"]) >= len(model.state_dict()):
            others = sorted(info["unexpected_keys"])
            found = f"are named {listing(others[:2])}{' …' if len(others) > 2 else ''}" if others else "are of no model"
            raise CompressionError(f"{lacks}: those in its files {found}. Save the model again with save_pretrained.")
        raise CompressionError(f"{lacks}; pass the auto_class that it was saved from, e.g. auto_class='AutoModel'.")
    return model.eval()


def drop_absent(model: Any, entry: Architecture, missing: Iterable[str]) -> list[str]:
    """Take out of a base model the modules that its checkpoint lacks, and return what else is missing.

    Args:
        model: a stock model, with what was missing filled at random.
        entry: its architecture.
        missing: full names of parameters.
    """
    if model.base_model is not model:  # heads use what they have
        return sorted(missing)
    optional = tuple(f"{part}." for part in entry.optional)
    for name in missing:
        if name.startswith(optional):
            setattr(model, name.split(".")[0], None)
    return sorted(name for name in missing if not name.startswith(optional))


def load_tokenizer(base: BaseCheckpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the base's tokenizer, whichever AutoTokenizer finds; None if there is none.

    Raises:
        CompressionError: its files cannot be read, or its vocabulary is not there.
    """
    from transformers import AutoConfig, AutoTokenizer

    files = [file for file in TOKENIZER_FILES if (base.folder / file).is_file()]
    if not files:
        return None
    what = f"The tokenizer of '{base.name}' ({listing(files)}) cannot be read"
    advice = "Download these files again, save a tokenizer there with save_pretrained, or pass tokenizer=."
    config = AutoConfig.for_model(base.family.model_type)  # of the class alone, which some files leave out
    with refusing(what, advice):
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        tokenizer = clamp_length(tokenizer, base.config)
    if not known:  # transformers makes one of special tokens alone where it finds no vocabulary
        wanted = sorted(set(tokenizer.vocab_files_names.values()))
        raise CompressionError(
            f"The tokenizer of '{base.name}' ({listing(files)}) has no vocabulary: {type(tokenizer).__name__} reads "
            f"{listing(wanted)}. Get what is missing, or name the class that its files are of, as tokenizer_class in "
            "tokenizer_config.json."
        )
    return tokenizer


def clamp_length(tokenizer: Any, config: Any) -> Any:
    """Return the tokenizer, told how many positions the model has if it claims to know no limit."""
    values = config if isinstance(config, dict) else config.to_dict()
    if positions := token_limit(values):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def copy_companions(source: Path, target: Path, *, pruned: bool = False) -> list[str]:
    """Copy what users rely on beside config and weights, into a folder where it is not yet; return the names.

    Where the vocabulary was pruned, files that number its tokens stay behind: those of the new one are there already.

    Weights of sentence-transformers' own modules that are pickled are stored as safetensors. Where the model lies in a
    folder of such a pipeline, as in its first version, the pipeline comes along, with the model in its root.
    """
    copied = []
    root = pipeline_root(source)
    inner = source.resolve().name if root != source else None
    for name in (each for each in COMPANIONS if not (pruned and each in NUMBERED)):
        place = next((folder for folder in (source, root) if _is_own(root, folder / name)), None)
        if place is not None and not (target / name).exists():
            _copy(place / name, target / name)
            copied.append(name)
    if inner and "modules.json" in copied:
        _move_model_to_root(target / "modules.json", inner)
    for folder in _module_folders(root):
        if folder == inner:
            continue
        (target / folder).mkdir(parents=True, exist_ok=True)
        for file in sorted((root / folder).iterdir()):
            if file.suffix in (".json", ".txt", ".safetensors") and _is_own(root, file):
                _copy(file, target / folder / file.name)
                copied.append(f"{folder}/{file.name}")
        pickled, stored = root / folder / "pytorch_model.bin", target / folder / "model.safetensors"
        if _is_own(root, pickled) and not stored.exists():
            _unpickle(pickled, stored)
            copied.append(f"{folder}/{stored.name}")
    return copied


def companion_bytes(base: str | Path, *, pruned: bool = False) -> int | None:
    """Return the bytes of a base's tokenizer and of what else travels along; None where it is not a folder on this disk.

    A tokenizer.json counts as it will be written, without white space; where the vocabulary is pruned, no file counts that
    numbers its tokens.
    """
    if (folder := _folder(base)) is None:
        return None
    inner = _locate(base, None, None).inner
    places = ([folder / inner / name, folder / name] for name in COMPANIONS if not (pruned and name in NUMBERED))
    found = [next((file for file in each if file.is_file()), None) for each in places]
    modules = [folder / each for each in _module_folders(folder) if each != inner]
    found += [f for each in modules for f in each.iterdir() if f.suffix in (".json", ".txt", ".safetensors")]
    return sum(_written_bytes(file) for file in found if file is not None and belongs_to(folder, file))


def _written_bytes(file: Path) -> int:
    if file.name == TOKENIZER_FILE:
        with suppress(ValueError, RecursionError):
            return len(without_spaces(file.read_text("utf-8")).encode())
    return file.stat().st_size


def pipeline_root(source: Path) -> Path:
    """Return the folder of the pipeline that a base's folder is a module of, e.g. 0_Transformer; else the base's own."""
    place = source.resolve()
    within = re.fullmatch(MODULE, place.name) and place.name in _module_folders(place.parent)
    return place.parent if within else source


def _move_model_to_root(file: Path, folder: str) -> None:
    """Say in a modules.json that the model, which lay in a folder, lies in the root, as it does today."""
    modules = json.loads(file.read_text("utf-8-sig"))
    for module in modules:
        if module.get("path") == folder:
            module |= {"path": "", "type": "sentence_transformers.models.Transformer"}
    file.write_text(json.dumps(modules, indent=2) + "\n", "utf-8")


def _is_own(source: Path, file: Path) -> bool:
    """Whether a file of a base is there, and is its own; a link to elsewhere on this disk is passed over, and said so."""
    if not file.is_file():
        return False
    if not belongs_to(source, file):
        logger.warning("'%s' of the base is a link to a file outside the folder and is not copied.", file.name)
        return False
    return True


def _module_folders(source: Path) -> list[str]:
    """Return the folders of a sentence-transformers pipeline, as its modules.json names them."""
    if not (source / "modules.json").is_file():
        return []
    modules = read_base_json(source / "modules.json", source.name, list)
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
        except (ValueError, RecursionError):  # reported where it is read
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


def check_fit(info: dict[str, Any], what: str, advice: str, body: str = "") -> None:
    """Raise CompressionError where weights have other shapes than config.json says.

    Args:
        info: what transformers says of loading, with `ignore_mismatched_sizes`.
        what: for the error: which folder does not load.
        advice: what to do, for the error.
        body: how names begin that must fit; those of a new head need not.
    """
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        if key.startswith(body):
            raise CompressionError(
                f"{what}: {key} has shape {list(stored)}, and config.json says {list(wanted)}. {advice}"
            )
