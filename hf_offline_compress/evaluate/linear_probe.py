"""Classification by logistic regression on sentence embeddings, as in MTEB (Muennighoff et al. 2023)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..base.texts import read_prompts
from ..errors import CompressionError, listing
from ..foundation.processes import Processes
from ..foundation.progress import stage
from ..metrics.agreement import sentence_embeddings
from ..metrics.scores import require
from .options import EvaluationOptions
from .pair import Pair
from .records import Data, Evaluation, metric
from .task_data import Row, find_columns, rows_from_file, rows_from_hub, text_of
from .tasks import ONE, Task, TaskSettings

TASK = "classification"
OWNER = "mteb"
# MTEB's data set → its configuration, and how many training examples of each class are drawn.
SETS: Mapping[str, tuple[str | None, int]] = {
    "amazon_counterfactual": ("en", 32),
    "banking77": (None, 8),
    "emotion": (None, 16),
    "imdb": (None, 32),
    "toxic_conversations_50k": (None, 16),
    "tweet_sentiment_extraction": (None, 32),
}
PER_CLASS = 8  # of all other data
DRAWS = 10  # training sets drawn; their mean is reported
ITERATIONS = 100
LENGTH = 512  # tokens of a text, at most


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their classes.

    Attributes:
        texts: at least one.
        labels: the class of each.
        data: for the record.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    data: Data


def is_linear_probe(task: str | None) -> bool:
    """Whether a task's name is `classification`, alone or with a data set, e.g. `classification:banking77`."""
    return task is not None and task.partition(":")[0].lower() == TASK


def check_linear_probe(task: str, options: EvaluationOptions) -> None:
    """Raise CompressionError unless both files are given, or a data set; or if a setting makes no sense."""
    data, train_data, settings = options.data, options.train_data, options.task_settings or TaskSettings()
    for name in ("length", "limit"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise CompressionError(f"The {name} of a task must be above 0, not {value}.")
    named = task.partition(":")[2]
    if named and (data is not None or train_data is not None):
        raise CompressionError(f"{task} names a data set, so it takes no files; pass --task {TASK} with files.")
    if not named and (data is None or train_data is None):
        raise CompressionError(
            f"--task {TASK} needs texts to train on and to test on; pass --train-data and --data (train_data=, data=), or "
            f"a data set, e.g. {TASK}:banking77. Known: {listing(SETS)}; or any OWNER/NAME with a train and a test split."
        )


def evaluate_linear_probe(pair: Pair, task: str, options: EvaluationOptions, processes: Processes) -> Evaluation:
    """Return base and compressed model on classification by a logistic regression on their embeddings.

    `DRAWS` training sets of a few examples of each class are drawn, the same for both models, and metrics are means over
    them. Besides, classifiers that were trained on the base's embeddings are given the compressed model's.

    Args:
        pair: base and compressed model.
        task: see `is_linear_probe`.
        options: of `task_settings`, `length` is `LENGTH` by default, and `limit`, of training examples of each class, MTEB's
            number for the data set, else `PER_CLASS`; the other `limit` is of test examples.
        processes: that share the work.

    Raises:
        CompressionError: there is no such data set, or its examples do not fit.
    """
    settings = options.task_settings or TaskSettings()
    require("sklearn", *(("datasets",) if options.data is None else ()))
    with stage("reading the task's data"):
        training, test, drawn = _load(task, options)
    per_class, length = settings.limit or drawn, settings.length or LENGTH
    sets = draws(training.labels, per_class, options.seed)
    used = sorted({index for each in sets for index in each})
    prompt = classification_prompt(pair.base.folder)
    texts = [prompt + text for text in (*(training.texts[index] for index in used), *test.texts)]
    embedded: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name, loader in (("base", pair.load_base), ("compressed", pair.load_compressed)):
        started = time.perf_counter()
        model = loader(dtype=options.dtype).to(processes.device)
        embedded[name] = sentence_embeddings(
            model, pair.tokenizers[name], texts, max_length=length, **options.forward(processes)
        )
        seconds[name] = round(time.perf_counter() - started, 3)
    places = {index: place for place, index in enumerate(used)}
    rows = [[places[index] for index in each] for each in sets]
    labels = [training.labels[index] for index in used]
    reference = probe(embedded["base"], embedded["base"], rows, labels, test.labels)
    own = probe(embedded["compressed"], embedded["compressed"], rows, labels, test.labels)
    kept = probe(embedded["base"], embedded["compressed"], rows, labels, test.labels)
    metrics = [metric(name, "higher", reference[name], own[name]) for name in reference]
    metrics.append(metric("accuracy (classifier of the base)", "higher", reference["accuracy"], kept["accuracy"]))
    record = {
        "method": "logistic regression on embeddings",
        "length": length,
        "dtype": options.dtype,
        "limit": options.limit,
        "per_class": per_class,
        "draws": DRAWS,
        "seed": options.seed,
        "prompt": prompt,
        "training": asdict(training.data),
    }
    shown = {"type": "text-classification", "name": f"Classification by logistic regression, {test.data.name}"}
    return Evaluation(f"{TASK}:{test.data.name}", shown, test.data, record, tuple(metrics), seconds)


def draws(labels: Sequence[str], per_class: int, seed: int) -> list[list[int]]:
    """Return `DRAWS` sets of indices, each of at most `per_class` examples of each class, drawn without replacement."""
    order = np.arange(len(labels))
    found = []
    for number in range(DRAWS):
        shuffled = np.random.default_rng((seed, number)).permutation(order)
        left = dict.fromkeys(labels, per_class)
        chosen = []
        for index in shuffled.tolist():
            if left[labels[index]]:
                left[labels[index]] -= 1
                chosen.append(index)
        found.append(chosen)
    return found


def probe(
    trained_on: Tensor,
    asked: Tensor,
    rows: Sequence[Sequence[int]],
    labels: Sequence[str],
    expected: Sequence[str],
) -> dict[str, float]:
    """Return accuracy and macro-averaged F1, means over classifiers.

    Args:
        trained_on: embeddings [training texts, then test texts; width]; a classifier is trained on the first.
        asked: embeddings of the same texts, of the same width; the classifier is tested on the last.
        rows: of each classifier, the rows of its training examples.
        labels: class of each training text.
        expected: class of each test text.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    if not (trained_on.isfinite().all() and asked.isfinite().all()):
        return {"accuracy": math.nan, "f1_macro": math.nan}
    test = asked[len(labels) :].numpy()
    accuracy, f1 = [], []
    for chosen in rows:
        classifier = LogisticRegression(max_iter=ITERATIONS, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ends after `ITERATIONS`, as MTEB's does
            classifier.fit(trained_on[list(chosen)].numpy(), [labels[row] for row in chosen])
        predicted = classifier.predict(test)
        accuracy.append(float(accuracy_score(expected, predicted)))
        f1.append(float(f1_score(expected, predicted, average="macro", zero_division=0.0)))
    return {"accuracy": sum(accuracy) / len(rows), "f1_macro": sum(f1) / len(rows)}


def classification_prompt(folder: Path) -> str:
    """Return what a sentence-transformers base puts before texts to classify: its prompt of that name, or the default one."""
    prompts, default = read_prompts(folder)
    known = {str(name).lower(): text for name, text in prompts.items()}
    return str(known.get(TASK) or known.get(str(default).lower()) or "")


def _load(task: str, options: EvaluationOptions) -> tuple[LabelledTexts, LabelledTexts, int]:
    """Return training and test texts, and how many examples of each class are drawn by default."""
    data, train_data, columns, limit = options.data, options.train_data, options.columns, options.limit
    name = task.partition(":")[2]
    per_class = PER_CLASS
    if data is not None and train_data is not None:
        form = Task(TASK, "", TASK, "", None, ONE, (), ())
        training = _labelled(form, *rows_from_file(form, Path(train_data), columns, None), columns)
        test = _labelled(form, *rows_from_file(form, Path(data), columns, limit), columns)
    else:
        form, per_class = _on_the_hub(name)
        training = _labelled(form, *rows_from_hub(form, "train", None), None)
        test = _labelled(form, *rows_from_hub(form, "test", limit), None)
    classes = sorted(set(training.labels))
    if len(classes) < 2:
        raise CompressionError(
            f"'{training.data.name}' has the class '{classes[0]}' alone; training needs two or more."
        )
    if unknown := sorted(set(test.labels) - set(classes)):
        raise CompressionError(
            f"'{test.data.name}' has the class '{unknown[0]}', and the training data have only {listing(classes[:10])}"
            f"{' …' if len(classes) > 10 else ''}; use the same classes in both."
        )
    return training, test, per_class


def _on_the_hub(name: str) -> tuple[Task, int]:
    """Return a data set's form, and how many examples of each class are drawn: one of `SETS`, or OWNER/NAME[:CONFIG]."""
    config, per_class = SETS.get(name.lower(), (None, PER_CLASS))
    dataset = f"{OWNER}/{name.lower()}"
    if name.lower() not in SETS:
        dataset, _, given = name.partition(":")
        config = given or None
        if "/" not in dataset:
            raise CompressionError(
                f"There is no classification set '{name}'; known: {listing(SETS)}, or any OWNER/NAME on the Hub with a "
                "train and a test split."
            )
    return Task(TASK, "", TASK, dataset, config, ONE, (), ()), per_class


def _labelled(form: Task, rows: Sequence[Row], data: Data, columns: Sequence[str] | None) -> LabelledTexts:
    """Return the texts and classes of rows."""
    text, label = find_columns(form, rows[0], columns, data.name)
    for number, row in enumerate(rows, start=1):
        if any(str(row.get(name, "")).strip() == "" for name in (text, label)):
            raise CompressionError(f"Example {number} of '{data.name}' has no {text} or no {label}; it needs both.")
    texts = tuple(text_of(row[text], data.name) for row in rows)
    return LabelledTexts(texts, tuple(str(row[label]).strip() for row in rows), data)
