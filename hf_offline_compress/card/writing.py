"""From inputs to the card's text, and into the folder."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.reading import REPORT_FILE, last_norm_kept, note_on_errors
from ..errors import CompressionError, needs_extra
from ..foundation.files import write_whole
from ..foundation.parsing import read_yaml
from . import tables
from .citations import citations
from .command import TEXTS, reproduction
from .inputs import CardInputs, read_inputs
from .limits import limits
from .metadata import KEPT, WRITTEN, base_on_hub, card_data, check_given, inherited_metadata
from .onnx import onnx_texts

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD_FILE = "README.md"
BEGIN, END = "<!-- your notes: begin -->", "<!-- your notes: end -->"
FOLD = 12  # longer lists of groups are folded
# Which auto class a snippet uses, where several load the same class.
AUTO_CLASSES = (
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForPreTraining",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModel",
)
logger = logging.getLogger(__name__)


def write_card(
    folder: str | Path,
    *,
    license: str | None = None,  # noqa: A002 (the Hub's word)
    base_model: str | None = None,
    language: Sequence[str] | None = None,
    base: str | Path | None = None,
    name: str | None = None,
    model_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a compressed folder's model card, README.md, and return its path.

    The user's notes and metadata of a card that is there already are kept.

    Args:
        folder: one that `compress` has written.
        license: the Hub's name of the licence; by default the base's if that is known, else none.
        base_model: the base's id on the Hub; by default it is given if the base came from there.
        language: of the model, e.g. ["en"]; by default the base's, if that is known.
        base: a local folder of the base, whose own card says what licence and languages it has.
        name: the card's title; by default the folder's name.
        model_id: what snippets load; by default `name`.
        overwrite: replace a README.md that is not our card.

    Raises:
        CompressionError: Jinja2 is not installed, the folder is no compressed one, or something in the request or in the
            folder's README.md prevents it. Nothing has been written.
    """
    text = card_text(
        folder,
        license=license,
        base_model=base_model,
        language=language,
        base=base,
        name=name,
        model_id=model_id,
        overwrite=overwrite,
    )
    path = Path(folder) / CARD_FILE
    write_whole(path, text)
    return path


def card_text(
    folder: str | Path,
    *,
    license: str | None = None,  # noqa: A002
    base_model: str | None = None,
    language: Sequence[str] | None = None,
    base: str | Path | None = None,
    name: str | None = None,
    model_id: str | None = None,
    overwrite: bool = False,
) -> str:
    """Return what `write_card` would write; see there."""
    require_jinja()
    inputs = read_inputs(folder, name=name)
    if base is not None and not Path(base).is_dir():
        raise CompressionError(f"There is no folder '{base}' of the base; pass a local one, or leave it out.")
    path = Path(folder) / CARD_FILE
    known: dict[str, Any] = inherited_metadata(base) if base is not None else {}
    notes = ""
    if old := _earlier(path, overwrite):
        kept = free_section(old)
        if kept is not None:
            notes = kept
            known |= _kept_metadata(old)
        elif not overwrite:
            raise CompressionError(
                f"'{Path(folder).name}' has a {CARD_FILE} that this command did not write (the marks '{BEGIN}' and '{END}' "
                "are not in it); move your text away, or pass --overwrite (overwrite=True) to replace it."
            )
    given = {"license": license, "base_model": base_model, "language": list(language) if language else None}
    check_given(given)
    return render_card(inputs, {**known, **{k: v for k, v in given.items() if v}}, notes=notes, model_id=model_id)


def _earlier(path: Path, overwrite: bool) -> str:
    """Return the text of a README.md; empty where there is none, or none that can be read and it is to be replaced."""
    if not os.path.lexists(path):
        return ""
    name = f"The {CARD_FILE} of '{path.parent.name}'"
    if not path.is_file():
        raise CompressionError(f"{name} is not a file; move it away.")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if overwrite:
            return ""
        raise CompressionError(
            f"{name} cannot be read as text in UTF-8; move it away, or pass --overwrite (overwrite=True) to replace it."
        ) from error


def renew_card(old: Path, new: Path, base: str | Path | None = None) -> None:
    """Write the card of a folder that takes another's place, with the user's notes of the old one.

    A README.md that is no card of ours is kept as it is. Without Jinja2 no card is written.

    Args:
        old: the folder that is replaced, or none yet; the new card has its name.
        new: the folder, still under another name.
        base: where the base's card lies; see `write_card`.
    """
    if _keep_notes(old / CARD_FILE, new / CARD_FILE):
        if find_spec("jinja2") is None:
            logger.info("No model card was written. %s", needs_extra("A card", "Jinja2", "card"))
        else:
            write_card(new, name=old.resolve().name, base=base)


def _keep_notes(old: Path, new: Path) -> bool:
    """Begin the new card with the user's notes of the old one; return whether there is a card to write.

    A README.md that is no card of ours is kept as it is.
    """
    try:
        text = old.read_text("utf-8") if old.is_file() else ""
    except (OSError, UnicodeDecodeError):
        text = None
    notes = free_section(text) if text else None
    if text is None or (text.strip() and notes is None):
        shutil.copyfile(old, new)
        return False
    if notes is not None:  # its metadata is of what the old folder was made from
        new.write_text(f"---\n{{}}\n---\n{BEGIN}\n{notes}{END}\n", "utf-8")
    return True


def render_card(
    inputs: CardInputs, known: Mapping[str, Any] | None = None, *, notes: str = "", model_id: str | None = None
) -> str:
    """Return the text of a card: the same text from the same arguments, and every number from the inputs.

    Args:
        inputs: report, evaluations, config and file sizes.
        known: metadata that the inputs do not have: `license`, `language`, `base_model`, or any other.
        notes: the user's, between the marks.
        model_id: what snippets load; by default the inputs' name.

    Raises:
        CompressionError: Jinja2 is not installed.
    """
    require_jinja()
    from huggingface_hub import ModelCard

    given = {key: value for key, value in (known or {}).items() if value}
    facts = {**((inputs.report.get("base") or {}).get("metadata") or {}), **given}
    inherited = "license" in facts and "license" not in given
    if "base_model" not in facts and (hub := base_on_hub(inputs.report)):
        facts["base_model"] = hub
    data = card_data(inputs, facts)
    template = (files(__package__) / "templates" / "card.md.jinja").read_text("utf-8")
    context = _context(inputs, facts, inherited, model_id or inputs.name)
    card = ModelCard.from_template(data, template_str=template, notes=f"{BEGIN}\n{notes}{END}", **context)
    return str(card).rstrip() + "\n"


def free_section(text: str) -> str | None:
    """Return what the user wrote between the marks of a card, the line break behind it included; None without marks."""
    found = re.search(f"{re.escape(BEGIN)}\r?\n?(.*?){re.escape(END)}", text, re.DOTALL)
    return found[1] if found else None


def parse_card(text: str) -> ModelCard:
    """Return a card, parsed.

    Raises:
        CompressionError: its metadata is no YAML, or larger than metadata can be.
        ValueError: results in it are not of the Hub's form.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if block := REGEX_YAML_BLOCK.search(text):
        read_yaml(block[2], "The card's metadata")
    return ModelCard(text)


def require_jinja() -> None:
    """Raise CompressionError if Jinja2 is not installed."""
    if find_spec("jinja2") is None:
        raise CompressionError(needs_extra("A model card", "Jinja2", "card"))


def _kept_metadata(text: str) -> dict[str, Any]:
    """Return the metadata of our earlier card that is not written anew: what users set, or have added."""
    try:
        found = parse_card(text).data.to_dict()
    except Exception as error:  # yaml and huggingface_hub raise several kinds
        raise CompressionError(
            f"The metadata of the {CARD_FILE} that is there cannot be read: {' '.join(str(error).split())[:200]} Fix it, or "
            "delete the file."
        ) from error
    return {key: value for key, value in found.items() if key in (*KEPT, "tags") or key not in WRITTEN}


def _context(inputs: CardInputs, facts: Mapping[str, Any], inherited: bool, model_id: str) -> dict[str, Any]:
    """Return all texts of the template."""
    benchmark = inputs.benchmark
    structures: dict[str, Any] = {"recipe": {}, "groups": [{"structure": name} for name in inputs.structures]}
    bibtex, references = citations(inputs.report or structures)
    auto, load = _loading(inputs, model_id)
    _, load_trusting = _loading(inputs, model_id, ", trust_remote_code=True")
    groups = len(inputs.config["compression"]["groups"])
    return {
        "title": tables.cell(inputs.name),
        "model_id": _literal(model_id),
        "summary": "\n".join([*_summary(inputs, facts), _licence(facts, inherited)]),
        "headline": tables.headline(inputs),
        "load_with": "import hf_offline_compress  # AutoModel can load this model\n" + load,
        "load_without": load_trusting if auto else _remote_loading(inputs, model_id),
        "sentence_transformers": inputs.is_sentence_encoder,
        **onnx_texts(inputs, model_id),
        "results": tables.results(inputs) if inputs.evaluations else None,
        "conditions": _bullets(tables.conditions(inputs)),
        "speeds": tables.speeds(benchmark) if benchmark else None,
        "benchmarked": _benchmarked(benchmark) if benchmark else None,
        "limits": _bullets(limits(inputs)),
        "folded": f"{groups} groups" if groups > FOLD else None,
        "bibtex": "\n\n".join(bibtex),
        "references": _bullets(references),
        **(_reported(inputs, facts) if inputs.report else _unreported(inputs)),
    }


def _reported(inputs: CardInputs, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts of the template that are made from the report."""
    versions = inputs.report["versions"]
    command, recipe = reproduction(inputs, _first(facts.get("base_model")))
    return {
        "made": f"With hf-offline-compress {versions.get('hf-offline-compress', '')}:".replace(" :", ":"),
        "command": command,
        "recipe": recipe.rstrip() if recipe else None,
        "fence": tables.fence(f"{command} {recipe}"),
        "circumstances": _bullets(_circumstances(inputs, facts)),
        "sizes": tables.sizes(inputs),
        "compressed": "Error is ‖W − Ŵ‖ / ‖W‖ of the weights; on real inputs it is weighted by the calibration text's."
        + (f" {note}" if (note := note_on_errors(inputs.report.get("rounds"))) else ""),
        "group_table": tables.group_table(inputs),
        "chart": tables.chart(inputs),
        "dense": _bullets(_dense(inputs)),
        "versions": tables.cell(", ".join(f"{name} {number}" for name, number in versions.items())) + ".",
    }


def _unreported(inputs: CardInputs) -> dict[str, Any]:
    """Return these texts where there is no report, from the config."""
    version = inputs.config.get("transformers_version")
    return {
        "made": f"With hf-offline-compress. {inputs.since} The folder has no {REPORT_FILE} with further details.",
        "group_table": tables.config_table(inputs),
        "versions": f"transformers {tables.cell(version)}." if version else None,
    }


def _summary(inputs: CardInputs, facts: Mapping[str, Any]) -> list[str]:
    """Return what the model is, and how large."""
    size = f"The weights take {inputs.weight_bytes / tables.MEGA:.2f} MB on disk"
    whole = f"All files together, tokenizer and code included, take {inputs.folder_bytes / tables.MEGA:.2f} MB."
    if not inputs.report:
        hub = _first(facts.get("base_model"))
        base = f" of [{hub}](https://huggingface.co/{hub})" if hub else ""
        members = sum(len(group["members"]) for group in inputs.config["compression"]["groups"].values())
        return [
            f"This is a compressed form{base} ({tables.cell(inputs.architecture)}): "
            f"{tables.count(members)} of its weight matrices are stored compactly, and {_rest(inputs)}.",
            str(inputs.since),
            f"{size}.",
            whole,
        ]
    report = inputs.report
    base, hub = tables.cell(inputs.base_name), _first(facts.get("base_model"))
    shown = f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{base}`"
    revision = f" at revision `{report['base']['revision']}`" if report["base"].get("revision") else ""
    matrices = sum(len(group["members"]) for group in inputs.groups)
    recipe = report["recipe"]
    parameters = tables.base_parameters(report)
    dense = parameters * tables.FLOAT32
    return [
        f"This is {shown}{revision} ({tables.cell(report['architecture'])}, {tables.count(parameters)} parameters), "
        f"compressed without fine-tuning: {tables.count(matrices)} of its weight matrices are stored compactly, and "
        f"{_rest(inputs)}.",
        f"The recipe is `{tables.cell(recipe['name'])}`"
        + (f": {_sentence(recipe)}" if recipe.get("description") else "."),
        *([inputs.since] if inputs.since else []),
        f"{size}, {dense / inputs.weight_bytes:.2f} times less than the base in float32.",
        whole,
    ]


def _rest(inputs: CardInputs) -> str:
    """Return what became of everything else: the dtype that it is stored in, and whether the last norm was fitted."""
    asked = (inputs.report.get("options") or {}).get("dtype")
    dtype = inputs.config["compression"].get("rest") or asked
    narrow = {"float16": "half precision", "bfloat16": "bfloat16"}.get(str(dtype))
    kept = f"everything else is kept in {narrow}" if narrow else "nothing else is changed"
    fitted = last_norm_kept(inputs.report.get("rounds"))
    but = " and" if narrow else ", except that"
    return f"{kept}{but} the norm before the head was fitted to the base's predictions" if fitted else kept


def _sentence(recipe: Mapping[str, Any]) -> str:
    text = tables.cell(recipe["description"])
    return (text[0].lower() if text[1:2].islower() else text[0]) + text[1:].rstrip(".") + "."


def _licence(facts: Mapping[str, Any], inherited: bool) -> str:
    names = _listed(facts.get("license"))
    if not names:
        return (
            "The licence of the base is not known here, so none is given: check the base's licence before you use or "
            "share this model."
        )
    return f"Its licence is {', '.join(names)}{', that of the base' if inherited else ''}."


def _literal(text: str) -> str:
    """Return a text as Python has it, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _loading(inputs: CardInputs, model_id: str, options: str = "") -> tuple[str | None, str]:
    """Return the auto class that loads the model, if there is one, and the lines that load it."""
    own = inputs.config["architectures"][0]
    found = [name for name, cls in (inputs.config.get("auto_map") or {}).items() if cls.endswith(f".{own}")]
    auto = next((name for name in AUTO_CLASSES if name in found), None)
    imports = [auto] if auto else []
    lines = [f"model = {auto or f'hf_offline_compress.{own}'}.from_pretrained({_literal(model_id)}{options})"]
    if inputs.has_tokenizer:
        imports.append("AutoTokenizer")
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({_literal(model_id)}{options})")
    head = [f"from transformers import {', '.join(imports)}", ""] if imports else []
    return auto, "\n".join([*head, *lines])


def _remote_loading(inputs: CardInputs, model_id: str) -> str:
    """Return the lines that load a head which no auto class knows, by the class beside its body's."""
    own = inputs.config["architectures"][0]
    return "\n".join(
        (
            "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
            "",
            f'cls = get_class_from_dynamic_module("modeling_compressed.{own}", {_literal(model_id)}, trust_remote_code=True)',
            f"model = cls.from_pretrained({_literal(model_id)})",
        )
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _circumstances(inputs: CardInputs, facts: Mapping[str, Any]) -> list[str]:
    """Return what else the result depends on: the base, seed, texts, times."""
    report = inputs.report
    lines = [f"base: `{tables.cell(inputs.base_name)}`"]
    if not report["base"].get("revision"):
        lines[0] += (
            ", a local copy" if facts.get("base_model") else ", a local checkpoint: the command takes its folder"
        )
    lines.append(f"seed: {report['seed']}; dtype: {report['dtype']}")
    record = report.get("calibration")
    if record:
        source = {"bundled": "the package's own text", "caller": f"texts passed in Python, here as {TEXTS}"}.get(
            record["source"], f"`{tables.cell(record['source'])}`"
        )
        lines.append(
            f"calibration: {source}, {tables.count(record['tokens'])} tokens in {tables.count(record['texts'])} texts, seed "
            f"{record['seed']}, SHA-256 of the text `{record['sha256']}`"
        )
    else:
        lines.append("calibration: none (no text was used)")
    if record := report.get("validation"):
        lines.append(f"validation: `{tables.cell(record['source'])}`, SHA-256 of the text `{record['sha256']}`")
    times = ", ".join(
        f"{stage.replace('_', ' ')} {seconds:.1f} s" for stage, seconds in (report.get("seconds") or {}).items()
    )
    return [*lines, f"time: {times}"] if times else lines


def _benchmarked(benchmark: Mapping[str, Any]) -> str:
    parts = [f"device {benchmark.get('device', 'unknown')}"]
    parts += [f"{key} {benchmark[key]}" for key in ("threads", "repeats", "seed") if benchmark.get(key) is not None]
    parts += [f"{name} {number}" for name, number in (benchmark.get("versions") or {}).items()]
    if benchmark.get("memory_kind"):
        kind = str(benchmark["memory_kind"])
        parts.append("memory is " + kind.replace(" (memory_bytes)", "").replace(" (loaded_bytes)", " (loaded)"))
    parts += [f"{item['name']} not measured: {item['reason']}" for item in benchmark.get("unavailable") or []]
    return "; ".join(tables.cell(part).rstrip(".") for part in parts) + "."


def _dense(inputs: CardInputs) -> list[str]:
    """Return what stays dense, a line a reason."""
    items = inputs.report["dense"]
    lines = []
    for reason in dict.fromkeys(item["reason"] for item in items):
        chosen = [item for item in items if item["reason"] == reason]
        names = ", ".join(
            f"`{tables.cell(item['name'])}`" if " " not in item["name"] else tables.cell(item["name"])
            for item in chosen[:3]
        )
        names += f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
        parameters = sum(item["parameters"] for item in chosen)
        lines.append(f"dense: {names}, {tables.count(parameters)} parameters ({tables.cell(reason)})")
    return lines


def _first(value: Any) -> str | None:
    return next(iter(_listed(value)), None)


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)] if value else []
