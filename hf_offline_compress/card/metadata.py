"""The card's metadata, which the Hub reads: base, licence, tags, task, results."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CompressionError
from ..foundation.parsing import read_yaml
from .inputs import CardInputs, file_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

logger = logging.getLogger(__name__)

# How names of stock classes end → the Hub's name of the task.
PIPELINES = {
    "ElectraForPreTraining": None,  # finds replaced tokens
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "DoubleHeadsModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": None,
    "ForNextSentencePrediction": None,
    "Model": "feature-extraction",
}
# What a compressed model has from its base.
INHERITED = ("license", "license_name", "license_link")
LICENSE, LANGUAGE = r"[a-z0-9][a-z0-9.-]*", r"[A-Za-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual"
# What users may set, or have set, and what is written anew each time.
KEPT = (*INHERITED, "language", "base_model")
WRITTEN = ("base_model_relation", "eval_results", "library_name", "model-index", "model_name", "pipeline_tag", "tags")


def inherited_metadata(base: str | Path) -> dict[str, Any]:
    """Return what a base's own card says of its licence and languages; empty where it says nothing, or cannot be read.

    Args:
        base: a local folder, of a checkpoint or of the Hub's cache.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    path = Path(base) / "README.md"
    if not path.is_file():
        return {}
    try:
        text = path.read_text("utf-8-sig")
        if block := REGEX_YAML_BLOCK.search(text):
            read_yaml(block[2], "The base's card")
        found = ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except Exception:  # a card may hold anything; one that cannot be read says nothing
        return {}
    said = {key: _single(found.get(key)) for key in INHERITED}
    kept = {key: value for key, value in said.items() if isinstance(value, str)}
    kept["license"] = kept.get("license", "").strip().lower()  # the Hub's names of licences are in small letters
    if not re.fullmatch(LICENSE, kept["license"]):
        if found.get("license"):
            logger.warning(
                "The licence in the base's card, %r, is not one that the Hub knows; give it by --license.",
                found["license"],
            )
        kept = {}
    languages = found.get("language")
    listed = ["no" if each is False else each for each in (languages if isinstance(languages, list) else [languages])]
    known = [each for each in listed if _is_language(each)]
    if lost := [each for each in listed if each is not None and each not in known]:
        logger.warning("Languages in the base's card are not known to the Hub: %s.", ", ".join(map(repr, lost))[:200])
    return {**kept, "language": known} if known else kept


def _single(value: object) -> object:
    """Return the only entry of a list, or the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_language(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(LANGUAGE, value) is not None


def card_data(inputs: CardInputs, known: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata of a card.

    Args:
        inputs: what the card is written from.
        known: licence, languages and base model as far as they are known, and whatever the user has added.
    """
    from huggingface_hub import ModelCardData

    results = _eval_results(inputs)
    extra = {key: value for key, value in known.items() if key not in (*KEPT, *WRITTEN)}
    return ModelCardData(
        language=known.get("language"),
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        library_name="sentence-transformers" if inputs.is_sentence_encoder else "transformers",
        pipeline_tag="sentence-similarity" if inputs.is_sentence_encoder else pipeline_tag(inputs.architecture),
        base_model=known.get("base_model"),
        base_model_relation="quantized" if known.get("base_model") else None,
        tags=[*dict.fromkeys([*_tags(inputs), *(known.get("tags") or [])])],
        model_name=inputs.name if results else None,
        eval_results=results or None,
        **extra,
    )


def pipeline_tag(architecture: str) -> str | None:
    """Return the Hub's name of the task that a stock class is for; None where there is none."""
    return next((task for end, task in PIPELINES.items() if architecture.endswith(end)), None)


def base_on_hub(report: Mapping[str, Any]) -> str | None:
    """Return the base's id if it is known to be one of the Hub; None otherwise."""
    if not report:
        return None
    name, revision = str(report["base"]["name"]), report["base"].get("revision")
    return name if _is_id(name) and (revision or "/" in name) else None


def check_given(given: Mapping[str, Any]) -> None:
    """Check what a user says of the licence, the languages and the base.

    Raises:
        CompressionError: it is none that the Hub takes.
    """
    if (base := given.get("base_model")) and (not _is_id(base) or "/" not in base):
        raise CompressionError(
            f"The base model '{base}' is not a Hub id; pass owner/name, e.g. google-bert/bert-base-uncased."
        )
    if (license_ := given.get("license")) and not re.fullmatch(LICENSE, license_):
        raise CompressionError(
            f"The licence '{license_}' is not one that the Hub knows; pass its short name, e.g. apache-2.0."
        )
    for language in given.get("language") or ():
        if not _is_language(language):
            raise CompressionError(f"The language '{language}' is not one that the Hub knows; pass its code, e.g. en.")


def _is_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _tags(inputs: CardInputs) -> list[str]:
    structures = [name.replace("_", "-") for name in inputs.structures]
    family = str(inputs.config["model_type"]).removeprefix("compressed_")
    # Both libraries load it; the Hub shows the snippet of library_name alone, and finds others by their tag.
    sentences = ["sentence-transformers", "transformers"] if inputs.is_sentence_encoder else []
    return ["hf-offline-compress", "compressed", *structures, family, *sentences]


def _eval_results(inputs: CardInputs) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    found = []
    for evaluation in inputs.evaluations:
        task, data = evaluation["task"], evaluation["data"]
        name = file_name(str(data["name"]))
        for metric in evaluation["metrics"]:
            value = metric.get("compressed")
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            found.append(
                EvalResult(
                    task_type=task["type"],
                    task_name=task.get("name"),
                    dataset_type=name,
                    dataset_name=name,
                    dataset_config=data.get("config"),
                    dataset_split=data.get("split"),
                    dataset_revision=data.get("revision"),
                    metric_type=str(metric["name"]).lower().replace(" ", "_"),
                    metric_name=metric["name"],
                    metric_value=value,
                )
            )
    return found
