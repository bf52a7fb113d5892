"""Limitations of a compressed model: what became worse or slower, and what it cannot do."""

from __future__ import annotations

from typing import Any

from .inputs import CardInputs
from .tables import MEGA, cell, data_name, value

# Structures as the runtime knows them. Applied as they are, without making the dense weight:
FACTORED = ("low_rank",)
# With nothing that belongs to a single row, so that an embedding cannot get another one:
NOT_RESIZED = ("kronecker", "tucker", "sparse", "codebook", "trellis")
BASE, OURS = "base", "compressed"


def limits(inputs: CardInputs) -> list[str]:
    """Return the costs and limits of a model, a sentence or two each; what was measured comes first."""
    return [
        *_measured(inputs),
        *_vocabulary(inputs),
        *_speed(inputs),
        *_decoding(inputs),
        *_resizing(inputs),
        *_training(inputs),
    ]


def _measured(inputs: CardInputs) -> list[str]:
    if not inputs.evaluations:
        known = ": the errors below are matrix errors and do not predict task quality" if inputs.groups else ""
        return [f"It has not been evaluated{known}. Evaluate it on your own task before you use it."]
    found = [line for evaluation in inputs.evaluations for line in _worse(evaluation)]
    return found or [
        "No metric in the results above is worse than the base's. Other tasks may be worse: evaluate your own."
    ]


def _worse(evaluation: dict[str, Any]) -> list[str]:
    """Return what is worse than the base in one evaluation; of an agreement, how far it is from a perfect copy."""
    worse = [
        metric
        for metric in evaluation["metrics"]
        if metric.get("base") is not None
        and metric.get("compressed") is not None
        and (
            (metric.get("better") == "lower" and metric["compressed"] > metric["base"])
            or (metric.get("better") == "higher" and metric["compressed"] < metric["base"])
        )
    ]
    if worse and str(evaluation["id"]).startswith("agreement"):
        shown = ", ".join(
            f"{cell(m['name'])} {value(m['compressed'])} (identical outputs: {value(m['base'])})" for m in worse
        )
        return [f"Its outputs differ from the base model's: on {data_name(evaluation)}, {shown}."]
    return [
        f"Worse than the base: {cell(m['name'])} on {data_name(evaluation)} is {value(m['compressed'])}; the base has "
        f"{value(m['base'])}."
        for m in worse
    ]


def _speed(inputs: CardInputs) -> list[str]:
    benchmark = inputs.benchmark
    models = {model["name"]: model for model in benchmark["models"]} if benchmark else {}
    if BASE not in models or OURS not in models:
        return ["Its speed and memory have not been compared with the base's."]
    base, own = models[BASE], models[OURS]
    found = [
        f"Slower than the base: batch {ours['batch']}, length {ours['length']} takes {value(ours['median_ms'])} ms; the "
        f"base takes {value(dense['median_ms'])} ms."
        for dense, ours in _pairs(base, own)
        if ours["median_ms"] > dense["median_ms"]
    ]
    for key, verb, scale, unit in (
        ("load_seconds", "Loads in", 1, "s"),
        ("memory_bytes", "Takes", MEGA, "MB of memory"),
    ):
        if base.get(key) is not None and own.get(key) is not None and own[key] > base[key]:
            shown = (
                [value(own[key]), value(base[key])] if scale == 1 else [f"{x[key] / scale:.2f}" for x in (own, base)]
            )
            found.append(f"{verb} {shown[0]} {unit}, the base {shown[1]} {unit}.")
    smaller = [
        f"{cell(name)} ({model['disk_bytes'] / MEGA:.2f} MB)"
        for name, model in models.items()
        if name not in (BASE, OURS)
        and not name.startswith(OURS)
        and 0 < (model.get("disk_bytes") or 0) <= own["disk_bytes"]
    ]
    if smaller:
        found.append(f"As small or smaller on disk, without this package: {', '.join(smaller)}.")
    return found or ["In the benchmark above it is never slower or larger than the base."]


def _pairs(base: dict[str, Any], own: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the latencies of two models at the sizes that both were measured at."""
    dense = {(each["batch"], each["length"]): each for each in base.get("latency") or []}
    return [
        (dense[size], each) for each in own.get("latency") or [] if (size := (each["batch"], each["length"])) in dense
    ]


def _decoding(inputs: CardInputs) -> list[str]:
    compression = inputs.config["compression"]
    structures = {group["structure"] for group in compression["groups"].values()}
    packed = any("integers" in group for group in compression["groups"].values())
    if structures <= set(FACTORED) and packed and compression["decoding"] == "cached":
        return [
            "Its matrices are applied as factors, never expanded. The factors are packed integers on disk; they are "
            "unpacked once, so they take more memory than disk."
        ]
    if structures <= set(FACTORED):
        return ["Its matrices are applied as factors, never expanded: it saves memory as well as disk."]
    if compression["decoding"] == "cached":
        return [
            "Small on disk, not in memory: weights are decoded once, at the first forward pass, and are dense from then on. "
            '`model.set_decoding("on_the_fly")` decodes them at every use instead, which takes less memory and more time.'
        ]
    if compression["decoding"] in ("int8", "auto"):
        where = "On a CPU" if compression["decoding"] == "int8" else "On a CPU with VNNI, or an ARM CPU"
        return [
            f"{where}, weights are decoded once, to int8 with a scale for each row, and multiplied by integer kernels, "
            'which rounds its outputs slightly. `from_pretrained(..., decoding="cached")` decodes them exactly.'
        ]
    return [
        "Weights are decoded at every use, which takes little memory and more time. "
        '`model.set_decoding("cached")` decodes them once.'
    ]


def _vocabulary(inputs: CardInputs) -> list[str]:
    """Return what was pruned from the vocabulary, by which text, and what that costs."""
    record = inputs.report.get("vocabulary")
    if not record:
        return []
    source = record["text"]["source"]
    text = {"bundled": "hf-offline-compress's own English text", "caller": "text supplied by the author"}.get(
        source, f"`{cell(source)}`"
    )
    scripts = ", ".join(cell(name.capitalize()) for name in record["writing_systems"]) or "none"
    shown = [
        f"Its vocabulary was pruned from {record['tokens_before']:,} tokens to {record['tokens']:,}, those of {text}. Text "
        "in other languages is split into small pieces or characters, or becomes unknown: these languages are lost partly or "
        f"completely. Writing systems that were kept: {scripts}."
    ]
    for purpose in ("calibration", "validation"):
        if found := record["coverage_of"].get(purpose):
            shown.append(
                f"{found['kept']:.2%} of the tokens of the {purpose} text were kept; with the new vocabulary it is "
                f"{found['growth']:.3f} times as long, and {found['unknown']:.2%} of its tokens are unknown."
            )
    return [" ".join(shown)]


def _resizing(inputs: CardInputs) -> list[str]:
    words = inputs.config["compression"]["groups"].get("word_embeddings")
    if words and (words["structure"] in NOT_RESIZED or "integers" in words):
        return ["Its vocabulary cannot be resized: resize the vocabulary of the base, then compress it again."]
    return []


def _training(inputs: CardInputs) -> list[str]:
    found = [inputs.since or "It was not fine-tuned after compression; fine-tuning may recover part of what was lost."]
    if inputs.since and inputs.groups:
        found[0] += " The errors below were measured before that."
    if record := inputs.report.get("calibration"):
        text = {"bundled": "hf-offline-compress's own English text", "caller": "text supplied by the author"}.get(
            record["source"], f"`{cell(record['source'])}`"
        )
        found.append(f"It was calibrated on {text}: on other kinds of text, results may be worse than measured here.")
    return found
