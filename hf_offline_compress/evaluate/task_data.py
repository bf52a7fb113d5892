"""Examples of a task: from a data set on the Hub, or from a local CSV or JSON file."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CompressionError, listing
from ..measure.texts import encodable
from .records import Data
from .tasks import LABEL_COLUMNS, Task

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A question and its answer.

    Attributes:
        texts: one or two; of question answering, question and context.
        label: number of the class, or a score; of question answering 0.
        answers: of question answering, the right ones.
        starts: of each answer, where it begins in the context, in characters.
    """

    texts: tuple[str, ...]
    label: float = 0
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Split:
    """Examples, and where they are from.

    Attributes:
        examples: at least one.
        data: for the record.
        suffix: what is added to the names of metrics, e.g. " (matched)".
    """

    examples: tuple[Example, ...]
    data: Data
    suffix: str = ""


def load_splits(task: Task, file: str | Path | None, columns: Sequence[str] | None, limit: int | None) -> list[Split]:
    """Return what a task is evaluated on.

    Args:
        task: the task.
        file: local CSV, TSV, JSON or JSON lines; None for the task's data set on the Hub.
        columns: of a file, those of the texts and of the label, in this order: names, or, of a file without a header,
            numbers that count from 1. Found by their names if not given.
        limit: so many examples at most of each split, from its beginning.

    Raises:
        CompressionError: there is no such file or data set, or it does not have what the task needs.
    """
    if file is None:
        return [_from_hub(task, split, suffix, limit) for split, suffix in task.splits]
    return [_from_file(task, Path(file), columns, limit)]


def load_training(task: Task, file: str | Path | None, columns: Sequence[str] | None, limit: int | None) -> Split:
    """Return what a task is fine-tuned on; see `load_splits`."""
    return _from_hub(task, "train", "", limit) if file is None else _from_file(task, Path(file), columns, limit)


def _from_hub(task: Task, split: str, suffix: str, limit: int | None) -> Split:
    where = " ".join(part for part in (task.dataset, task.config, split) if part)
    rows, data = rows_from_hub(task, split, limit)
    return Split(_examples(task, rows, None, where), data, suffix)


def _from_file(task: Task, path: Path, columns: Sequence[str] | None, limit: int | None) -> Split:
    rows, data = rows_from_file(task, path, columns, limit)
    return Split(_examples(task, rows, columns, path.name), data)


def rows_from_hub(task: Task, split: str, limit: int | None) -> tuple[list[Row], Data]:
    """Return at most `limit` rows of a split of the task's data set on the Hub, as it has them.

    Raises:
        CompressionError: it cannot be loaded.
    """
    import datasets

    where = " ".join(part for part in (task.dataset, task.config, split) if part)
    try:
        found = datasets.load_dataset(task.dataset, task.config, split=split)
    except Exception as error:  # datasets raises many kinds
        raise CompressionError(
            f"The data set '{where}' could not be loaded; pass a local file with --data (data=): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    rows: list[Row] = [dict(row) for row in (found.select(range(min(limit, len(found)))) if limit else found)]
    commits = [
        match[1] for key in (found.info.download_checksums or {}) if (match := re.search(r"@([0-9a-f]{40})/", str(key)))
    ]
    return rows, Data(task.dataset, len(rows), task.config, split, commits[0] if commits else None)


def rows_from_file(task: Task, path: Path, columns: Sequence[str] | None, limit: int | None) -> tuple[list[Row], Data]:
    """Return at most `limit` rows of a local file; see `load_splits`.

    Raises:
        CompressionError: there is no such file, it cannot be read, or it has no row.
    """
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise CompressionError(
            f"There is no data file '{path}'; pass one of {listing(SUFFIXES)}."
            if not path.is_file()
            else f"The data file '{path.name}' must be one of {listing(SUFFIXES)}."
        )
    try:
        rows = _read_json(path) if path.suffix in (".json", ".jsonl") else _read_csv(task, path, columns)
    except CompressionError:
        raise
    except (OSError, ValueError, csv.Error, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CompressionError(
            f"The data file '{path.name}' cannot be read as {path.suffix[1:]}: {error!r}. Get it again, or pass another of "
            f"{listing(SUFFIXES)}."
        ) from error
    if not rows:
        raise CompressionError(f"The data file '{path.name}' has no example; pass one with a row per example.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise CompressionError(
                f"Example {number} of the data file '{path.name}' is not a mapping; pass a list of objects with named columns."
            )
    rows = rows[:limit]
    return rows, Data(path.name, len(rows), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _read_csv(task: Task, path: Path, columns: Sequence[str] | None) -> list[Row]:
    """Return the rows of a file with a header by its names, of one without by numbers from 1."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # In files of cells between tabs, as GLUE and STS-B have them, a quotation mark is a character like any other.
        form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        lines = [line for line in csv.reader(file, **form) if line]
    if not lines:
        return []
    known = {name for names in (*task.texts, LABEL_COLUMNS) for name in names} | {"answers", "answer"}
    numbered = columns is not None and all(column.isdecimal() for column in columns)
    has_header = not numbered and (columns is not None or bool(known & {cell.strip().lower() for cell in lines[0]}))
    names = [cell.strip() for cell in lines[0]] if has_header else [str(i + 1) for i in range(len(lines[0]))]
    body = lines[1:] if has_header else lines
    for number, line in enumerate(body, start=len(lines) - len(body) + 1):
        if len(line) != len(names):
            raise CompressionError(
                f"Row {number} of '{path.name}' has {len(line)} cells, and the first has {len(names)}."
            )
    return [dict(zip(names, line, strict=True)) for line in body]


def _read_json(path: Path) -> list[Row]:
    """Return the rows of a JSON list, of JSON lines, or of SQuAD's own nested file."""
    text = path.read_text("utf-8-sig")
    if path.suffix == ".jsonl":
        return read_json_lines(text)
    content = json.loads(text)
    if isinstance(content, dict):
        content = content["data"]
    if content and "paragraphs" in content[0]:
        return [
            {**question, "context": paragraph["context"]}
            for article in content
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    return list(content)


def read_json_lines(text: str) -> list[Any]:
    """Return what the lines of a text hold; within strings, JSON may have what else ends a line."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def text_of(value: Any, source: str) -> str:
    """Return a text of an example as it is tokenized.

    Raises:
        CompressionError: it is none.
    """
    if not isinstance(value, str | int | float):
        raise CompressionError(
            f"'{source}' has an example whose text is {repr(value)[:60]}; every text must be a string."
        )
    return encodable(str(value))


def _examples(task: Task, rows: Sequence[Row], columns: Sequence[str] | None, source: str) -> tuple[Example, ...]:
    if task.kind == "question answering":
        return tuple(_question(row, columns, source) for row in rows)
    *texts, label = find_columns(task, rows[0], columns, source)
    found = []
    for number, row in enumerate(rows, start=1):
        if lacking := [column for column in (*texts, label) if column not in row]:
            raise CompressionError(f"Example {number} of '{source}' has no {lacking[0]}; every example needs one.")
        value = _label(task, row[label], source)
        found.append(Example(tuple(text_of(row[column], source) for column in texts), value))
    return tuple(found)


def find_columns(task: Task, row: Row, columns: Sequence[str] | None, source: str) -> list[str]:
    """Return the names of the columns of the texts and of the label.

    Raises:
        CompressionError: the given columns are not in the row, or none are given and they cannot be told by their names.
    """
    wanted = [*task.texts, LABEL_COLUMNS]
    if columns is not None:
        if len(columns) != len(wanted) or any(column not in row for column in columns):
            raise CompressionError(
                f"The columns '{','.join(columns)}' do not fit '{source}', which has {','.join(row)}; {task.name} needs "
                f"{len(task.texts)} text columns and one label column, in this order."
            )
        return list(columns)
    by_name = {name.lower(): name for name in row}
    found = [next((by_name[name] for name in names if name in by_name), None) for names in wanted]
    if all(found):
        return [str(name) for name in found]
    # Without a header, three columns of which one holds numbers leave no doubt.
    if all(name.isdecimal() for name in row) and len(row) == len(wanted):
        labels = [name for name in row if _is_label(task, row[name])]
        if len(labels) == 1:
            return [*(name for name in row if name not in labels), labels[0]]
    raise CompressionError(
        f"'{source}' has the columns {','.join(row)}, and {task.name} needs {listing(n[0] for n in task.texts)} and label; "
        "name them with --columns, texts first, then the label (numbers from 1 if the file has no header)."
    )


def _is_label(task: Task, value: Any) -> bool:
    try:
        _label(task, value, "")
    except CompressionError:
        return False
    return True


def _label(task: Task, value: Any, source: str) -> float:
    """Return the number of a class, given it or its name; of a regression the number."""
    if task.labels and str(value).strip().lower() in task.labels:
        return task.labels.index(str(value).strip().lower())
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if task.labels and number in range(len(task.labels)):
        return int(number)
    if not task.labels and math.isfinite(number):
        return number
    wanted = f"one of {listing(task.labels)}, or its number from 0" if task.labels else "a number"
    raise CompressionError(f"'{source}' has the label '{value}', and {task.name} needs {wanted}.")


def _question(row: Row, columns: Sequence[str] | None, source: str) -> Example:
    """Return an example of question answering; where an answer begins is searched for if the row does not say."""
    names = list(columns or ("question", "context", "answers" if "answers" in row else "answer"))
    if len(names) != 3 or any(name not in row for name in names):
        raise CompressionError(
            f"'{source}' has the columns {','.join(row)}, and squad needs question, context and answers; "
            "name them with --columns."
        )
    question, context = text_of(row[names[0]], source), text_of(row[names[1]], source)
    try:
        texts, places = _answers(row, names[2], context)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CompressionError(
            f"'{source}' has answers that cannot be read ('{str(row[names[2]])[:60]}'); squad needs a text, or a mapping of "
            "text and answer_start, both lists."
        ) from error
    if not texts or any(not text for text in texts):
        raise CompressionError(
            f"'{source}' has a question without an answer ('{question[:60]}'), which squad v1.1 does not have."
        )
    if len(places) != len(texts) or any(
        context[at : at + len(text)] != text for at, text in zip(places, texts, strict=True)
    ):
        raise CompressionError(f"'{source}' has an answer that is not in its context ('{texts[0][:60]}').")
    return Example((question, context), 0, texts, places)


def _answers(row: Row, name: str, context: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the right answers of a question, and where each begins."""
    known = row[name]
    if isinstance(known, str):
        known = json.loads(known) if known.lstrip().startswith("{") else {"text": [known]}
    if isinstance(known, list):  # as in SQuAD's own file
        known = {key: [answer[key] for answer in known] for key in ("text", "answer_start")}
    texts = tuple(str(text) for text in known["text"])
    starts = known.get("answer_start") or (
        [row["answer_start"]] if str(row.get("answer_start", "")).isdecimal() else None
    )
    return texts, tuple(int(start) for start in starts) if starts else tuple(context.find(text) for text in texts)
