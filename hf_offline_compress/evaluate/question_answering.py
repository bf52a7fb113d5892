"""Extractive question answering as in SQuAD: long contexts in overlapping windows, and the best span of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError
from ..foundation.processes import ALONE, Processes
from ..metrics.perplexity import evaluating
from .task_data import Example

# As in SQuAD's reference implementations: so many starts and ends are tried, and no longer answers.
BEST = 20
LONGEST = 30


@dataclass(frozen=True)
class Window:
    """A question with a part of its context.

    Attributes:
        inputs: what the model takes: name → [length].
        example: number of the example.
        spans: of each token its first and last character in the context; None outside the context.
    """

    inputs: dict[str, list[int]]
    example: int
    spans: list[tuple[int, int] | None]


def make_windows(examples: Sequence[Example], tokenizer: Any, *, length: int = 384, stride: int = 128) -> list[Window]:
    """Return windows of at most `length` tokens; neighbours have `stride` tokens of the context in common.

    Raises:
        CompressionError: the tokenizer does not know places, or a window has no room for the context.
    """
    if not tokenizer.is_fast:
        raise CompressionError("Question answering needs a fast tokenizer, which records token positions.")
    windows = []
    for number, example in enumerate(examples):
        question = tokenizer(example.texts[0].strip(), add_special_tokens=False, truncation=True, max_length=length)
        room = length - len(question["input_ids"]) - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= stride:
            raise CompressionError(
                f"Windows of {length} tokens with a stride of {stride} have no room for the context of a question of "
                f"{len(question['input_ids'])} tokens; pass a larger length or a smaller stride."
            )
        encoded = tokenizer(
            example.texts[0].strip(),
            example.texts[1],
            truncation="only_second",
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, offsets in enumerate(encoded["offset_mapping"]):
            spans = [
                (begin, end) if part == 1 else None
                for (begin, end), part in zip(offsets, encoded.sequence_ids(i), strict=True)
            ]
            inputs = {name: encoded[name][i] for name in tokenizer.model_input_names if name in encoded}
            windows.append(Window(inputs, number, spans))
    return windows


def training_features(examples: Sequence[Example], windows: Sequence[Window]) -> list[dict[str, Any]]:
    """Return the windows with the first and last token of the first answer; the first token where it is not in the window."""
    features = []
    for window in windows:
        example = examples[window.example]
        begin = example.starts[0]
        end = begin + len(example.answers[0])
        inside = [i for i, span in enumerate(window.spans) if span is not None]
        places = [i for i in inside if _overlaps(window.spans[i], begin, end)]
        spans = [window.spans[i] for i in inside]
        whole = bool(places) and min(s[0] for s in spans if s) <= begin and max(s[1] for s in spans if s) >= end
        first, last = (places[0], places[-1]) if whole else (0, 0)
        features.append({**window.inputs, "start_positions": first, "end_positions": last})
    return features


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    length: int = 384,
    stride: int = 128,
    batch_size: int = 32,
    progress: bool = False,
    processes: Processes = ALONE,
) -> list[str]:
    """Return the answer to each example: of all windows, the span of the highest summed logits of start and end.

    Args:
        model: with the head of a question answering model.
        tokenizer: the model's, a fast one.
        examples: question and context.
        length: tokens of a window, at most.
        stride: tokens that neighbouring windows have in common.
        batch_size: windows in one forward pass.
        progress: show a progress bar.
        processes: that share the work.

    Raises:
        CompressionError: see `make_windows`.
    """
    windows = make_windows(examples, tokenizer, length=length, stride=stride)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].spans))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def best(chosen: list[int]) -> list[tuple[int, float, str]]:
        encoded = tokenizer.pad([windows[i].inputs for i in chosen], return_tensors="pt").to(model.device)
        output = model(**encoded)
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        found = []
        for row, i in enumerate(chosen):
            value, span = best_span(starts[row], ends[row], windows[i].spans)
            context = examples[windows[i].example].texts[1]
            found.append((i, value, context[span[0] : span[1]].strip()))
        return found

    with evaluating(model):
        found = [item for batch in processes.map(best, batches, desc="answers", progress=progress) for item in batch]
    chosen: dict[int, tuple[float, str]] = {}
    for i, value, text in sorted(found):  # in the order of windows: of equal values the first
        if value > chosen.get(windows[i].example, (-float("inf"), ""))[0]:
            chosen[windows[i].example] = (value, text)
    return [chosen.get(number, (0.0, ""))[1] for number in range(len(examples))]


def best_span(starts: Tensor, ends: Tensor, spans: Sequence[tuple[int, int] | None]) -> tuple[float, tuple[int, int]]:
    """Return the highest summed logits of a window's span in the context, and its characters (0, 0 if there is none).

    Args:
        starts: logits of the first token [length], padding included.
        ends: of the last.
        spans: of each token, see `Window`.
    """
    best, where = -float("inf"), (0, 0)
    inside = torch.tensor([i for i, span in enumerate(spans) if span is not None], dtype=torch.long)
    likely = [inside[logits[inside].topk(min(BEST, len(inside))).indices].tolist() for logits in (starts, ends)]
    for first in likely[0]:
        for last in likely[1]:
            value = float(starts[first] + ends[last])
            begin, end = spans[first], spans[last]
            if first <= last < first + LONGEST and value > best and begin is not None and end is not None:
                best, where = value, (begin[0], end[1])
    return best, where


def _overlaps(span: tuple[int, int] | None, begin: int, end: int) -> bool:
    return span is not None and span[0] < end and span[1] > begin and span[0] < span[1]
