"""The summary that `compress` prints: where the bytes went, the expected loss, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import WIDTH, megabytes, print_table, print_text

if TYPE_CHECKING:
    from ..artifact.report import GroupReport, Report


def print_summary(out: Path, base: str, report: Report, written: int, whole: int, seconds: float) -> None:
    """Print a line for each kind of matrices, one for the whole, and the next command.

    Args:
        out: the folder.
        base: as it was given on the command line.
        report: of the compression.
        written: bytes of all weight files.
        whole: bytes of all files of the folder.
        seconds: that all of it took, loading and saving too.
    """
    from ..artifact.reading import note_on_errors

    kinds: dict[str, list[GroupReport]] = {}
    for group in report.groups:
        kinds.setdefault(group.kind, []).append(group)
    rows = [
        (
            kind,
            f"{sum(group.stored_bytes for group in groups):,}",
            f"{sum(group.parameters for group in groups) * 4 / sum(group.stored_bytes for group in groups):.2f}",
            f"{sum(group.seconds for group in groups):.1f}",
            f"{expected_loss(groups):.3%}",
        )
        for kind, groups in kinds.items()
    ]
    dense = report.totals["parameters"] * 4
    left = dense - report.totals["compressed_parameters"] * 4
    rest = written - sum(group.stored_bytes for group in report.groups)
    rows.append(("everything else", f"{rest:,}", f"{left / rest:.2f}", "", ""))
    rows.append(("whole model", f"{written:,}", f"{dense / written:.2f}", f"{seconds:.1f}", ""))
    print_table(("", "bytes", "ratio", "seconds", "expected loss"), rows)
    on_text = any(group.calibrated_error is not None for group in report.groups)
    print()
    print(f"{out}: {megabytes(written)} of weights, {dense / written:.2f} x smaller than the base in float32")
    print_text(f"all files, tokenizer and code included: {megabytes(whole)}")
    print_text(
        "expected loss: relative squared change of these layers' outputs on the calibration text"
        if on_text
        else "expected loss: relative squared change of these weights; no text was used"
    )
    if note := note_on_errors(report.rounds):
        print_text(note)
    if report.vocabulary:
        print_vocabulary(report.vocabulary)
    if report.search:
        print(f"loss on held-out text: {_searched_loss(report.search):.2%}")
    print(f"\nnext, compare it with the base on your own text:\n{_next(out, base)}")


def print_vocabulary(record: dict[str, Any]) -> None:
    """Print how many tokens stay, and what becomes of each text."""
    print(f"\nvocabulary       {record['tokens_before']:,} -> {record['tokens']:,} tokens")
    rows = [
        (
            purpose,
            text["source"],
            f"{text['tokens']:,}",
            f"{text['kept']:.2%}",
            f"{text['growth']:.3f}",
            f"{text['unknown']:.2%}",
        )
        for purpose, text in record["coverage_of"].items()
    ]
    print_table(("text", "source", "tokens", "kept", "length", "unknown"), rows)
    print_text("kept: share of the text's tokens that stay; length: tokens after pruning over tokens before.")


def expected_loss(groups: list[GroupReport]) -> float:
    """Return the mean squared relative error of groups, on real inputs where they are known."""
    errors = [group.relative_error if group.calibrated_error is None else group.calibrated_error for group in groups]
    weights = [group.parameters for group in groups]
    return sum(error**2 * weight for error, weight in zip(errors, weights, strict=True)) / sum(weights)


def _searched_loss(search: dict[str, Any]) -> float:
    """Return the loss of the size that was chosen: the largest ratio within what is allowed."""
    trials = [trial for trial in search["trials"] if trial["loss"] <= search["max_loss"]]
    return float(max(trials, key=lambda trial: trial["total_ratio"])["loss"])


def _next(out: Path, base: str) -> str:
    parts = [f"hf-offline-compress evaluate {shlex.quote(str(out))}", f"--base {shlex.quote(base)}", "--text FILE"]
    line = "  " + " ".join(parts)
    return line if len(line) <= WIDTH else "  " + " \\\n    ".join(parts)
