"""A folder's evaluations as one page, HTML or Markdown: base and compressed model side by side, with figures."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..card import tables
from ..card.inputs import CardInputs, read_inputs
from ..errors import CompressionError, listing
from ..foundation.files import write_whole
from ..version import __version__

FORMS = (".html", ".md")
# By which a report is known again: only a report is replaced.
MARK = "<!-- hf-offline-compress wrote this report -->"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
h1, h2 { line-height: 1.25; } h1 { overflow-wrap: anywhere; }
.scroll, pre { overflow-x: auto; } pre, code { font: 13px/1.4 ui-monospace, monospace; }
table { border-collapse: collapse; } th, td { border: 1px solid #d0d7de; padding: .3rem .6rem; }
th { text-align: left; } .number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; font: 13px system-ui, sans-serif; } svg text { fill: currentColor; }
.base { fill: #8c959f; } .compressed { fill: #3f51b5; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; } th, td { border-color: #30363d; } .compressed { fill: #8c9eff; }
}
""".strip()
# How Markdown marks the kinds of blocks that are not plain.
FORMATS = {
    "title": "# {}",
    "heading": "## {}",
    "item": "- {}",
    "lines": "```text\n{}\n```",
    "figure": "```text\n{}\n```",
}
# Of the figure in HTML, in pixels, and characters of a label.
BAR, VALUES, LINE, GAP, CHARACTERS = 290, 80, 16, 12, 56


@dataclass(frozen=True)
class Block:
    """A part of the report.

    Attributes:
        kind: how it is shown; `text` is Markdown of the kinds that `tables` writes.
        text: of a figure nothing.
        bars: of a figure, its `Bars`.
    """

    kind: Literal["title", "heading", "paragraph", "table", "item", "lines", "figure"]
    text: str = ""
    bars: tuple[Bars, ...] = ()


@dataclass(frozen=True)
class Bars:
    """One number of base and compressed model, as two bars.

    Attributes:
        label: what it is.
        numbers: the base's and the compressed model's; None: not known.
        shown: both as text.
    """

    label: str
    numbers: tuple[float | None, float | None]
    shown: tuple[str, str]


def check_report(file: str | Path) -> Path:
    """Return where a report is to be written.

    Raises:
        CompressionError: it is of no known form, its folder is not there or cannot be written to, or it would replace
            something else than a report.
    """
    path = Path(file)
    if path.suffix not in FORMS:
        raise CompressionError(f"The report '{file}' must end in {listing(FORMS)}.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise CompressionError(
            f"The report '{file}' cannot be written: '{path.parent}' is not a folder that you may write to; pass another path."
        )
    if os.path.lexists(path):
        try:
            ours = path.is_file() and MARK in path.read_text("utf-8")[:200]
        except (OSError, UnicodeDecodeError):
            ours = False
        if not ours:
            raise CompressionError(f"'{file}' is there and is not a report; move it away, or pass another path.")
    return path


def write_report(file: Path, folder: str | Path, evaluation: Mapping[str, Any]) -> None:
    """Write a folder's report, whole or not at all.

    Args:
        file: see `check_report`.
        folder: the compressed one.
        evaluation: what evaluation.json holds, or would hold.

    Raises:
        CompressionError: the disk is full, or the folder cannot be read.
    """
    blocks = report_blocks(replace(read_inputs(folder), evaluation=dict(evaluation)))
    write_whole(file, as_html(blocks) if file.suffix == ".html" else as_markdown(blocks))


def report_blocks(inputs: CardInputs) -> list[Block]:
    """Return the report: sizes, figures, results, speed, settings, and what each group of matrices lost."""
    named = f", compressed from `{tables.cell(inputs.base_name)}`" if inputs.report else ""
    found = [
        Block("title", f"Evaluation of {tables.cell(inputs.name)}"),
        Block("paragraph", f"`{tables.cell(inputs.name)}`{named}, beside its base. MB are 10⁶ bytes."),
        Block("table", tables.headline(inputs)),
        Block("figure", bars=tuple(figure_bars(inputs))),
    ]
    if inputs.evaluations:
        found += [Block("heading", "Results"), Block("table", tables.results(inputs))]
    if inputs.benchmark:
        found += [
            Block("heading", "Speed"),
            Block("paragraph", "Milliseconds per forward pass (batch × tokens), median and quartiles."),
            Block("table", tables.speeds(inputs.benchmark)),
        ]
    if lines := tables.conditions(inputs):
        found += [Block("heading", "Settings"), *(Block("item", line) for line in lines)]
    if inputs.groups:
        found += [
            Block("heading", "Error and bytes of each group"),
            Block("paragraph", "Relative error of the weights, 0 for an exact copy, and bytes stored."),
            Block("lines", tables.chart(inputs)),
        ]
    return [*found, Block("paragraph", f"Written by hf-offline-compress {__version__}.")]


def figure_bars(inputs: CardInputs) -> list[Bars]:
    """Return bytes of the weights, and every metric."""
    sizes = tables.base_sizes(inputs.report)[-1:]
    base = sizes[0][1] if sizes else None
    numbers = (base, float(inputs.weight_bytes))
    shown = tuple(tables.NOTHING if number is None else f"{number / tables.MEGA:.2f} MB" for number in numbers)
    found = [Bars("weights on disk", numbers, (shown[0], shown[1]))]
    for evaluation in inputs.evaluations:
        title = str(evaluation["task"].get("name") or evaluation["task"]["type"])
        for each in evaluation["metrics"]:
            arrow = tables.ARROWS.get(each.get("better", ""), "")
            pair = (each.get("base"), each.get("compressed"))
            found.append(
                Bars(f"{title}: {each['name']} {arrow}".strip(), pair, (tables.value(pair[0]), tables.value(pair[1])))
            )
    return found


def as_markdown(blocks: Sequence[Block]) -> str:
    """Return the report as Markdown; its figure is made of block characters."""
    parts = [MARK]
    previous = ""
    for block in blocks:
        text = _text_figure(block.bars) if block.kind == "figure" else block.text
        text = FORMATS.get(block.kind, "{}").format(text)
        parts.append("\n" * (1 if block.kind == previous == "item" else 2) + text)
        previous = block.kind
    return "".join(parts) + "\n"


def as_html(blocks: Sequence[Block]) -> str:
    """Return the report as one HTML file that loads nothing; its figure is SVG."""
    title = html.escape(_plain(next(block.text for block in blocks if block.kind == "title")))
    body = []
    for block in blocks:
        if block.kind == "table":
            body.append(_html_table(block.text))
        elif block.kind == "lines":
            body.append(f"<pre>{html.escape(block.text)}</pre>")
        elif block.kind == "figure":
            body.append(_svg(block.bars))
        else:
            tag = {"title": "h1", "heading": "h2", "item": "li"}.get(block.kind, "p")
            body.append(f"<{tag}>{_inline(block.text)}</{tag}>")
    content = re.sub(
        r"(?:^<li>.*\n?)+", lambda m: f"<ul>\n{m[0].rstrip()}\n</ul>\n", "\n".join(body), flags=re.MULTILINE
    )
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style>\n{content.rstrip()}\n</html>\n"
    )


def _text_figure(bars: Sequence[Bars]) -> str:
    """Return two lines a number: the base's bar, the compressed model's."""
    width = max(len(each.label) for each in bars)
    lines = []
    for each in bars:
        for i, name in enumerate(("base", "compressed")):
            bar = tables.bar(_share(each, i), 1.0)
            lines.append(f"{each.label if i == 0 else '':{width}}  {name:10}  {bar}  {each.shown[i]}")
    return "\n".join(lines)


def _svg(bars: Sequence[Bars]) -> str:
    """Return the same as SVG, narrow enough for a phone: each label above its two bars, with the numbers behind them."""
    step, width = 3 * LINE + GAP, BAR + VALUES
    parts = [
        f'<svg viewBox="0 0 {width} {step * len(bars)}" width="{width}" role="img" aria-label="Base and compressed model">'
    ]
    for row, each in enumerate(bars):
        top = row * step
        label = each.label if len(each.label) <= CHARACTERS else f"{each.label[: CHARACTERS - 1]}…"
        title = f"<title>{html.escape(each.label)}</title>"
        parts.append(f'<text x="0" y="{top + LINE - 4}">{html.escape(label)}{title}</text>')
        for i, name in enumerate(("base", "compressed")):
            y, length = top + (i + 1) * LINE, max(1.0, BAR * _share(each, i))
            parts.append(f'<rect class="{name}" x="0" y="{y}" width="{length:.1f}" height="{LINE - 3}"/>')
            parts.append(f'<text x="{length + 6:.1f}" y="{y + LINE - 5}">{html.escape(each.shown[i])}</text>')
    legend = '<svg width="12" height="12"><rect class="{0}" width="12" height="12"/></svg> {0}'
    legends = " &nbsp; ".join(legend.format(name) for name in ("base", "compressed"))
    return f"<p>{legends}</p>\n" + "\n".join(parts) + "\n</svg>"


def _share(bars: Bars, which: int) -> float:
    """Return a bar's length as a share of the longest of its pair; 0 for numbers that are not known or below 0."""
    largest = max((number for number in bars.numbers if number is not None), default=0.0)
    number = bars.numbers[which]
    return max(0.0, number / largest) if number is not None and largest > 0 else 0.0


def _html_table(markdown: str) -> str:
    """Return a table of `tables.table` as HTML; its cells have no tags already."""
    header, rule, *rows = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in markdown.splitlines()
    )
    marks = [' class="number"' if cell.endswith(":") else "" for cell in rule]

    def row(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{mark}>{_inline(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
            + "</tr>"
        )

    lines = [row(header, "th"), *(row(cells, "td") for cells in rows)]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _inline(markdown: str) -> str:
    """Return a line of Markdown as `tables` writes it in HTML: code, bold, escapes."""
    text = html.escape(_plain(markdown))
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _plain(markdown: str) -> str:
    """Return a line of Markdown without what `tables.cell` has escaped."""
    return re.sub(r"\\([|\[\]])", r"\1", markdown).replace("&lt;", "<")
