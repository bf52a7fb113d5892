"""Retrieval, as in NanoBEIR: queries find documents by the cosine of embeddings, judged by nDCG at 10 (Järvelin 2002)."""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from .task_data import read_json_lines, text_of

TASK = "nanobeir"
TOP = 10
LENGTH = 512  # tokens of a query or document, at most
SETS = (
    "ArguAna", "ClimateFEVER", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "QuoraRetrieval",
    "SCIDOCS", "SciFact", "Touche2020",
)  # fmt: skip
OWNER = "zeta-alpha-ai"
FILES = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, queries, and which documents answer which query.

    Attributes:
        documents: id → text, at least one.
        queries: id → text; each has a relevant document.
        relevant: query id → document id → grade above 0.
        data: for the record.
    """

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, float]]
    data: Data


def is_retrieval(task: str | None) -> bool:
    """Whether a task's name is that of retrieval: `nanobeir`, or one of its sets, e.g. `nanobeir:NFCorpus`."""
    return task is not None and task.partition(":")[0].lower() == TASK


def evaluate_retrieval(pair: Pair, task: str, options: EvaluationOptions, processes: Processes) -> list[Evaluation]:
    """Return base and compressed model on retrieval, an evaluation for each set.

    Besides both models with their own documents, compressed queries search the base's documents: an index that was built
    with the base.

    Args:
        pair: base and compressed model.
        task: see `is_retrieval`.
        options: `data` is a folder with `FILES`, as BEIR has them, or None for the sets on the Hub; `limit` is of queries,
            and all documents are searched.
        processes: that share the work.

    Raises:
        CompressionError: there is no such set, or its data cannot be read.
    """
    data, limit, dtype = options.data, options.limit, options.dtype
    require(*(("datasets",) if data is None else ()))
    with stage("reading the task's data"):
        sets = [_from_folder(Path(data), limit)] if data is not None else [_from_hub(n, limit) for n in _names(task)]
    prompts = query_and_document_prompts(pair.base.folder)
    embedded: dict[str, list[tuple[Tensor, Tensor]]] = {}
    seconds: dict[str, float] = {}
    for name, loader in (("base", pair.load_base), ("compressed", pair.load_compressed)):
        started = time.perf_counter()
        model = loader(dtype=dtype).to(processes.device)
        embedded[name] = [
            _embed(model, pair.tokenizers[name], each, prompts, options.forward(processes)) for each in sets
        ]
        seconds[name] = round(time.perf_counter() - started, 3)
    found = []
    for i, each in enumerate(sets):
        (base_queries, base_documents), (queries, documents) = embedded["base"][i], embedded["compressed"][i]
        reference = ndcg(base_queries @ base_documents.T, each)
        metrics = (
            metric(f"ndcg_at_{TOP}", "higher", reference, ndcg(queries @ documents.T, each)),
            metric(
                f"ndcg_at_{TOP} (documents of the base)", "higher", reference, ndcg(queries @ base_documents.T, each)
            ),
        )
        record = {"method": "embeddings", "length": LENGTH, "dtype": dtype, "limit": limit, "prompts": list(prompts)}
        task_record = {"type": "text-retrieval", "name": f"NanoBEIR, {each.data.name}"}
        found.append(Evaluation(f"{TASK}:{each.data.name}", task_record, each.data, record, metrics, seconds))
    return found


def ndcg(scores: Tensor, judged: RetrievalSet) -> float:
    """Return the mean nDCG at `TOP` over queries: Σ grade / log₂(rank + 1), over that of the best order.

    Args:
        scores: [queries, documents], in the order of `judged`.
        judged: the set.
    """
    documents = list(judged.documents)
    discounts = 1 / torch.log2(torch.arange(TOP, dtype=torch.float64) + 2)
    total = 0.0
    for row, query in zip(scores, judged.queries, strict=True):
        grades = judged.relevant[query]
        top = row.topk(min(TOP, len(documents))).indices.tolist()
        gains = torch.tensor([grades.get(documents[i], 0.0) for i in top], dtype=torch.float64)
        best = torch.tensor(sorted(grades.values(), reverse=True)[:TOP], dtype=torch.float64)
        total += float((gains * discounts[: len(gains)]).sum() / (best * discounts[: len(best)]).sum())
    return total / len(judged.queries)


def query_and_document_prompts(folder: Path) -> tuple[str, str]:
    """Return what a sentence-transformers base puts before queries, and before documents; empty where it has none."""
    known, _ = read_prompts(folder)
    return str(known.get("query") or ""), str(known.get("document") or known.get("passage") or "")


def _embed(
    model: Any, tokenizer: Any, each: RetrievalSet, prompts: tuple[str, str], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return embeddings of queries [queries, width] and of documents [documents, width]."""
    before_query, before_document = prompts
    queries = [before_query + text for text in each.queries.values()]
    documents = [before_document + text for text in each.documents.values()]
    first, second = (
        sentence_embeddings(model, tokenizer, t, max_length=LENGTH, **options) for t in (queries, documents)
    )
    return first, second


def _names(task: str) -> tuple[str, ...]:
    """Return the sets that a task's name stands for."""
    name = task.partition(":")[2]
    if not name:
        return SETS
    known = {each.lower(): each for each in SETS}
    if name.lower() not in known:
        raise CompressionError(f"NanoBEIR has no set '{name}'; known: {listing(SETS)}.")
    return (known[name.lower()],)


def _from_hub(name: str, limit: int | None) -> RetrievalSet:
    import datasets

    where = f"{OWNER}/Nano{name}"
    try:
        parts = {part: datasets.load_dataset(where, part, split="train") for part in ("corpus", "queries", "qrels")}
    except Exception as error:  # datasets raises many kinds
        raise CompressionError(
            f"The dataset '{where}' could not be loaded; pass a folder with {listing(FILES)} as --data (data=): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    judged = [(row["query-id"], row["corpus-id"], 1.0) for row in parts["qrels"]]
    return _set(where, parts["corpus"], parts["queries"], judged, limit, lambda n: Data(where, n, None, "train"))


def _from_folder(folder: Path, limit: int | None) -> RetrievalSet:
    """Return a set from a folder as BEIR has them: JSON lines with `_id`, `text` and `title`; query, document, grade."""
    qrels = folder / FILES[2] if (folder / FILES[2]).is_file() else folder / "qrels" / "test.tsv"
    files = (folder / FILES[0], folder / FILES[1], qrels)
    if lacking := [file.name for file in files if not file.is_file()]:
        raise CompressionError(f"The folder '{folder}' has no {listing(lacking)}; {TASK} needs {listing(FILES)}.")
    try:
        corpus, queries = (read_json_lines(f.read_text("utf-8")) for f in files[:2])
        lines = list(csv.reader(qrels.read_text("utf-8").splitlines(), delimiter="\t"))
        judged = [(line[0], line[-2], float(line[-1])) for line in lines if line and _is_number(line[-1])]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        return _set(folder.name, corpus, queries, judged, limit, lambda n: Data(folder.name, n, sha256=digest))
    except CompressionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CompressionError(f"The files of '{folder.name}' cannot be read as a BEIR set: {error!r}.") from error


def _is_number(text: str) -> bool:
    return text.strip().lstrip("-").replace(".", "", 1).isdecimal()


def _set(
    name: str,
    corpus: Any,
    queries: Any,
    judged: list[tuple[str, str, float]],
    limit: int | None,
    data: Callable[[int], Data],
) -> RetrievalSet:
    """Return a set of the queries that have a relevant document."""
    documents = {
        str(row["_id"]): " ".join(text_of(part, name) for part in (row.get("title") or "", row["text"])).strip()
        for row in corpus
    }
    relevant: dict[str, dict[str, float]] = {}
    for query, document, grade in judged:
        if grade > 0 and document in documents:
            relevant.setdefault(query, {})[document] = grade
    asked = {str(row["_id"]): text_of(row["text"], name) for row in queries if str(row["_id"]) in relevant}
    asked = dict(list(asked.items())[:limit])
    if not asked:
        raise CompressionError(f"'{name}' has no query with a relevant document among its documents.")
    return RetrievalSet(documents, asked, relevant, data(len(asked)))
