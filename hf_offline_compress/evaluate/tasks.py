"""The supported tasks: dataset, columns, labels, metrics."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CompressionError, listing


@dataclass(frozen=True)
class Task:
    """A task, and where its data are on the Hub.

    Attributes:
        name: how users call it.
        title: in words.
        kind: "classification", "regression" (similarity of two sentences) or "question answering".
        dataset: id on the Hub.
        config: of the data set.
        splits: evaluated splits, each with what is added to the names of its metrics.
        texts: columns of the texts; behind the first name of each, others that are taken too.
        labels: names of the classes in the order of their numbers; none for a number.
        metrics: see `metrics.METRICS`.
    """

    name: str
    title: str
    kind: str
    dataset: str
    config: str | None
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: tuple[tuple[str, str], ...] = (("validation", ""),)

    @property
    def hub_type(self) -> str:
        """The Hub's name for such tasks."""
        return "question-answering" if self.kind == "question answering" else "text-classification"


@dataclass(frozen=True)
class Settings:
    """How a task is presented to a model, and how a model is fine-tuned on it.

    Attributes:
        learning_rate: its maximum, from which it decreases linearly to 0.
        batch_size: examples in one step of training, of all processes together.
        length: tokens of an example, or of a window of SQuAD.
        stride: tokens that neighbouring windows of SQuAD have in common.
        epochs: passes over the training data.
        limit: at most this many training examples, from their beginning; None for all.
    """

    learning_rate: float
    batch_size: int
    length: int
    stride: int
    epochs: float
    limit: int | None


@dataclass(frozen=True)
class TaskSettings:
    """Settings that users may change; None stands for those of arXiv 2302.04045, which depend on the task.

    Attributes:
        learning_rate: see `Settings`. GLUE 2e-5, SQuAD 3e-5.
        batch_size: 32.
        length: GLUE 128, SQuAD 384.
        stride: 128.
        epochs: 3.
        limit: none; of "classification", examples of each class: as many as MTEB draws.
    """

    learning_rate: float | None = None
    batch_size: int | None = None
    length: int | None = None
    stride: int | None = None
    epochs: float | None = None
    limit: int | None = None

    def for_task(self, task: Task, positions: int) -> Settings:
        """Return complete settings.

        Args:
            task: whose settings of the paper are taken.
            positions: tokens that the model takes; an example has no more.

        Raises:
            CompressionError: one of the settings makes no sense.
        """
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise CompressionError(f"The {name} of a task must be above 0, not {value}.")
        answers = task.kind == "question answering"
        return Settings(
            learning_rate=self.learning_rate or (3e-5 if answers else 2e-5),
            batch_size=self.batch_size or 32,
            length=min(self.length or (384 if answers else 128), positions),
            stride=self.stride or 128,
            epochs=self.epochs or 3.0,
            limit=self.limit,
        )


ONE = (("sentence", "text", "review", "content"),)
TWO = (("sentence1", "text1", "premise"), ("sentence2", "text2", "hypothesis"))
LABEL_COLUMNS = ("label", "labels", "score", "class", "similarity")


def _glue(
    name: str,
    title: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    texts: tuple[tuple[str, ...], ...] = TWO,
    kind: str = "classification",
    splits: tuple[tuple[str, str], ...] = (("validation", ""),),
) -> Task:
    return Task(name, title, kind, "nyu-mll/glue", name, texts, labels, metrics, splits)


ENTAILED = ("entailment", "not_entailment")
_ALL = (
    _glue("cola", "CoLA, acceptability", ("unacceptable", "acceptable"), ("matthews_correlation",), ONE),
    _glue("sst2", "SST-2, sentiment", ("negative", "positive"), texts=ONE),
    _glue("mrpc", "MRPC, paraphrases", ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    _glue(
        "qqp",
        "QQP, duplicate questions",
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        (("question1", "sentence1", "text1"), ("question2", "sentence2", "text2")),
    ),
    _glue("stsb", "STS-B, similarity of sentences", (), ("pearson", "spearman"), kind="regression"),
    _glue(
        "mnli",
        "MNLI, entailment",
        ("entailment", "neutral", "contradiction"),
        texts=(("premise", "sentence1", "text1"), ("hypothesis", "sentence2", "text2")),
        splits=(("validation_matched", " (matched)"), ("validation_mismatched", " (mismatched)")),
    ),
    _glue("qnli", "QNLI, answers to questions", ENTAILED, texts=(("question",), ("sentence", "text"))),
    _glue("rte", "RTE, entailment", ENTAILED),
    _glue("wnli", "WNLI, coreference", ("not_entailment", "entailment")),
    Task(
        "squad",
        "SQuAD v1.1, question answering",
        "question answering",
        "rajpurkar/squad",
        None,
        (("question",), ("context",)),
        (),
        ("exact_match", "f1"),
    ),
)
TASKS = {task.name: task for task in _ALL}
# Those that have modules of their own, for who is told what there is.
EMBEDDING_TASKS = ("nanobeir[:SET]", "classification[:SET]")


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        CompressionError: there is none of that name.
    """
    if name.lower() not in TASKS:
        raise CompressionError(f"There is no task '{name}'; known: {listing((*TASKS, *EMBEDDING_TASKS))}.")
    return TASKS[name.lower()]
