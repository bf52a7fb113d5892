"""Numbers and tables of a card, as deterministic Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

from ..structures import STRUCTURES
from .inputs import CardInputs, file_name

FLOAT32 = 4
MEGA = 10**6
WIDTH = 24  # of a bar, in characters
EIGHTHS = " ▏▎▍▌▋▊▉"
NOTHING = "–"
ARROWS = {"lower": "↓", "higher": "↑"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are text, the others numbers."""
    rule = [":---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [[*header], rule, *rows])


def count(number: float) -> str:
    """Return an integer with commas, e.g. "90,868,376"."""
    return f"{int(number):,}" if isfinite(number) else NOTHING


def value(number: object) -> str:
    """Return a measured value, rounded to its significant places."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
        return NOTHING
    if isinstance(number, int):
        return count(number)
    size = abs(number)
    return f"{number:,.1f}" if size >= 1000 else f"{number:.2f}" if size >= 10 else f"{number:.4f}"


def cell(text: object) -> str:
    """Return text on one line that does not end a table's cell or a code span, or begin a tag, a link or an image."""
    return re.sub(r"([|\[\]])", r"\\\1", " ".join(str(text).split()).replace("`", "'").replace("<", "&lt;"))


def fence(text: str) -> str:
    """Return the backticks around a block of code, more than the text itself has in a row."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def data_name(evaluation: dict[str, Any]) -> str:
    """Return how an evaluation's data is called: name, configuration, split."""
    data = evaluation["data"]
    source = {"bundled": "the package's own text", "caller": "texts passed in Python"}.get(data["name"])
    parts = [source or file_name(str(data["name"])), data.get("config"), data.get("split")]
    return cell(" ".join(str(part) for part in parts if part))


def main_metric(inputs: CardInputs) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the evaluation and metric of the headline: the first that was measured on base and model alike.

    In an agreement the base is compared with itself, so it comes last.
    """
    ordered = sorted(inputs.evaluations, key=lambda e: str(e["id"]).startswith("agreement"))
    return next(((e, m) for e in ordered for m in e["metrics"] if value(m.get("compressed")) != NOTHING), None)


def headline(inputs: CardInputs) -> str:
    """Return the table of bytes and the main metric, base beside compressed."""
    found = main_metric(inputs)
    header, base, own = ["", "bytes of weights", "MB"], "", ""
    if found:
        evaluation, metric = found
        header.append(f"{cell(metric['name'])} on {data_name(evaluation)} {ARROWS.get(metric.get('better', ''), '')}")
        base, own = value(metric.get("base")), value(metric["compressed"])
    rows = [[name, count(size), f"{size / MEGA:.2f}", ""][: len(header)] for name, size in base_sizes(inputs.report)]
    if not rows and found:
        rows = [["base", NOTHING, NOTHING, ""]]
    rows.append(["**this model**", f"**{count(inputs.weight_bytes)}**", f"**{inputs.weight_bytes / MEGA:.2f}**"])
    if found:
        rows[0][-1] = base  # evaluations hold both models in float32, unless their settings say otherwise
        rows[-1].append(f"**{own}**")
    return table(header, rows)


def base_parameters(report: dict[str, Any]) -> int:
    """Return how many parameters the base has, before its vocabulary was pruned."""
    return int(report["totals"]["parameters"] + (report.get("vocabulary") or {}).get("removed_parameters", 0))


def base_sizes(report: dict[str, Any]) -> list[tuple[str, float]]:
    """Return what the base takes, in words and bytes; nothing where there is no report."""
    if not report:
        return []
    totals, dtype, stored = report["totals"], report["dtype"], report["base"].get("weight_bytes")
    lines: list[tuple[str, float]] = [("base, in float32", base_parameters(report) * FLOAT32)]
    if stored:
        lines.append(("base, as stored", stored))
    elif dtype != "float32":
        lines.append((f"base, in {dtype}", totals["dense_bytes"]))
    return lines


def sizes(inputs: CardInputs) -> str:
    """Return the table of all sizes."""
    totals = inputs.report["totals"]
    rows = [
        ("parameters of the base", count(base_parameters(inputs.report))),
        ("bytes of all tensors, base in float32", count(base_parameters(inputs.report) * FLOAT32)),
        (f"bytes of all tensors, base in {inputs.report['dtype']}", count(totals["dense_bytes"])),
        ("bytes of all tensors, this model", count(totals["stored_bytes"])),
        ("bytes of its weight files, headers included", count(inputs.weight_bytes)),
        ("bytes of all files but this card", count(inputs.folder_bytes)),
        ("parameters of the compressed matrices", count(totals["compressed_parameters"])),
        ("bytes that are stored for them", count(totals["compressed_stored_bytes"])),
        ("ratio of the compressed matrices", f"{totals['ratio']:.2f}"),
        ("total ratio", f"{totals['total_ratio']:.2f}"),
    ]
    pruned = inputs.report.get("vocabulary")
    if pruned:
        rows[-1] = ("total ratio, of the base with the pruned vocabulary", rows[-1][1])
        rows.insert(1, ("parameters after its vocabulary was pruned", count(totals["parameters"])))
    if inputs.report["dtype"] == "float32" or pruned:
        del rows[3 if pruned else 2]
    return table(("", ""), rows)


def results(inputs: CardInputs) -> str:
    """Return the table of all evaluations."""
    rows = [
        (
            cell(evaluation["task"].get("name") or evaluation["task"]["type"]),
            f"{data_name(evaluation)}{_examples(evaluation)}",
            f"{cell(metric['name'])} {ARROWS.get(metric.get('better', ''), '')}".strip(),
            value(metric.get("base")),
            value(metric.get("compressed")),
        )
        for evaluation in inputs.evaluations
        for metric in evaluation["metrics"]
    ]
    return table(("task", "data", "metric", "base", "this model"), rows, left=3)


def conditions(inputs: CardInputs) -> list[str]:
    """Return under which settings each evaluation was made, a line each."""
    lines = []
    for evaluation in inputs.evaluations:
        settings = ", ".join(f"{key} {_setting(item)}" for key, item in (evaluation.get("settings") or {}).items())
        sha = evaluation["data"].get("sha256")
        parts = [settings, f"SHA-256 of the data `{sha[:16]}…`" if sha else ""]
        if text := "; ".join(part for part in parts if part):
            lines.append(f"{cell(evaluation['task'].get('name') or evaluation['id'])}, {data_name(evaluation)}: {text}")
    return lines


def speeds(benchmark: dict[str, Any]) -> str:
    """Return the benchmark's table: bytes, load time and memory of every model, and its latency at every size."""
    cells = list(
        dict.fromkeys((each["batch"], each["length"]) for model in benchmark["models"] for each in _latencies(model))
    )
    loaded = any(model.get("loaded_bytes") is not None for model in benchmark["models"])
    header = [
        "",
        "MB on disk",
        "load, s",
        "memory, MB",
        *(["loaded, MB"] if loaded else []),
        *(f"ms, {batch} × {length}" for batch, length in cells),
    ]
    rows = []
    for model in benchmark["models"]:
        times = {(each["batch"], each["length"]): each for each in _latencies(model)}
        rows.append(
            [
                cell(model["name"]),
                _scaled(model.get("disk_bytes")),
                value(model.get("load_seconds")),
                _scaled(model.get("memory_bytes")),
                *([_scaled(model.get("loaded_bytes"))] if loaded else []),
                *(_latency(times.get(size)) for size in cells),
            ]
        )
    return table(header, rows)


def group_table(inputs: CardInputs) -> str:
    """Return a row for every group: shape, structure, bytes and errors."""
    calibrated = any(group["calibrated_error"] is not None for group in inputs.groups)
    measured = _measured(inputs)
    header = ["group", "structure", "matrices", "rows × columns", "stored in", "bytes", "ratio", "error"]
    rows = []
    for group in inputs.groups:
        structure = STRUCTURES.get(group["structure"])
        unit = structure.unit if structure else "size"
        rows.append(
            [
                cell(group["name"]),
                f"{cell(structure.title.lower() if structure else group['structure'])}, {unit} {group['size']}",
                count(len(group["members"])),
                f"{count(group['rows'])} × {count(group['columns'])}",
                cell(group["storage"]),
                count(group["stored_bytes"]),
                f"{group['ratio']:.2f}",
                f"{group['relative_error']:.4f}" if isfinite(group["relative_error"]) else NOTHING,
            ]
        )
        if calibrated:
            rows[-1].append(value(group["calibrated_error"]))
        if measured:
            losses = (group.get("forecast"), group.get("measured"))
            rows[-1] += [NOTHING if loss is None else f"{loss:.2g}" for loss in losses]
    header += ["error on real inputs"] * calibrated + ["loss, expected", "loss, measured"] * measured
    return table(header, rows, left=2)


def config_table(inputs: CardInputs) -> str:
    """Return a row for every group, of what the config knows of it."""
    rows = [
        [
            cell(name),
            cell(structure.title.lower() if (structure := STRUCTURES.get(group["structure"])) else group["structure"]),
            count(len(group["members"])),
            cell(group.get("storage", NOTHING)),
        ]
        for name, group in inputs.config["compression"]["groups"].items()
    ]
    return table(["group", "structure", "matrices", "stored in"], rows, left=2)


def chart(inputs: CardInputs) -> str:
    """Return bars of every group's error and bytes, and of its loss where that was measured, as lines of text."""
    groups = inputs.groups
    losses = [float(group.get("measured") or 0.0) for group in groups] if _measured(inputs) else []
    errors = [float(group["relative_error"]) for group in groups]
    sizes_ = [int(group["stored_bytes"]) for group in groups]
    names = max(len("group"), *(len(group["name"]) for group in groups))
    digits = max(len("bytes"), *(len(count(size)) for size in sizes_))
    lines = [
        f"{'group':{names}}  {'error':>6} {'':{WIDTH}}  {'bytes':>{digits}} {'':{WIDTH}}  {'loss' if losses else ''}"
    ]
    for i, (group, error, size) in enumerate(zip(groups, errors, sizes_, strict=True)):
        line = f"{group['name']:{names}}  {error:.4f} {bar(error, max(errors))}  {count(size):>{digits}} {bar(size, max(sizes_))}"
        if losses:
            line += f"  {losses[i]:<8.2g} {bar(losses[i], max(losses))}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def _measured(inputs: CardInputs) -> bool:
    """Whether the loss of each group was measured in the dense model."""
    return any(group.get("measured") is not None for group in inputs.groups)


def bar(number: float, largest: float) -> str:
    """Return a bar of `WIDTH` characters at most, padded to that width."""
    share = number / largest if largest > 0 else 0.0
    eighths = round(min(share, 1.0) * WIDTH * 8) if isfinite(share) else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(WIDTH)


def _latencies(model: dict[str, Any]) -> list[dict[str, Any]]:
    return list(model.get("latency") or [])


def _latency(found: dict[str, Any] | None) -> str:
    if not found:
        return NOTHING
    text = value(found["median_ms"])
    if found.get("low_ms") is None or found.get("high_ms") is None:
        return text
    return f"{text} ({value(found['low_ms'])} to {value(found['high_ms'])})"


def _scaled(number: Any) -> str:
    return NOTHING if number is None or not isfinite(number) else f"{number / MEGA:.2f}"


def _examples(evaluation: dict[str, Any]) -> str:
    examples = evaluation["data"].get("examples")
    return f", {count(examples)} examples" if examples else ""


def _setting(item: object) -> str:
    """Return a setting of an evaluation as text."""
    if isinstance(item, dict):
        return "(" + ", ".join(f"{key} {_setting(each)}" for key, each in item.items()) + ")"
    if isinstance(item, list):
        return " ".join(_setting(each) for each in item) or "none"
    if item is None or isinstance(item, bool):
        return "none" if item is None else "yes" if item else "no"
    return cell(file_name(item) if isinstance(item, str) else item)
