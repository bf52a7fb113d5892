"""All methods at equal stored bytes, one kind of matrix replaced at a time, beside the dense model and plain SVD.

usage: python benchmarks/methods.py --data FOLDER --mlm FOLDER [--out FOLDER] [--papers [all]]
       python benchmarks/methods.py --data FOLDER --models minilm --kinds key --ratios 10 --presets svd ae

--data holds stsb-en-train.csv and stsb-en-dev.csv (MiniLM's calibration; judged on), calibration.txt and test.txt (the same
for the masked language model), --mlm that model. With --out, methods.md and methods.csv are written after every row, and a
later run adds what they lack; remove them to begin anew. methods-summary.md has the measured values side by side.

`loss` is 0.9091 · cosine distance + 0.0909 · RMSE over all rows of the kind, whatever a method minimises. `solve` is seconds
of solving, `text` those of measuring and allocating on text before that. A tied embedding is compressed in both uses.
--papers adds paper-d and paper-r, which are slow; on word embeddings only with `--papers all`.
"""

import argparse
from pathlib import Path
from typing import Any

from common import Subject, Table, distances, masked_lm, minilm, own_loss

from hf_offline_compress.errors import CompressionError

MODELS = ("minilm", "mlm")
KINDS = ("word_embeddings", "key", "output")
PAPERS = ("paper-d", "paper-r")
PRESETS = (
    "svd",
    "fwsvd",
    "calibrated-svd",
    "allocated-svd",
    "direction-ae",
    "ae",
    "calibrated-ae",
    "kronecker",
    "tucker",
    "pruning",
    "quantized",
    "codebook",
)
DENSE = "dense"
COLUMNS = {
    "model": "",
    "kind": "",
    "asked": "",
    "preset": "",
    "ratio": ".2f",
    "bytes": ".0f",
    "cosine distance": ".5f",
    "RMSE": ".6f",
    "loss": ".5f",
    "measure": "",
    "value": ".5g",
    "solve": ".1f",
    "text": ".1f",
    "note": "",
}


def measured(subject: Subject, kind: str, ratio: float, preset: str) -> dict[str, Any]:
    """Return what a preset makes of one kind of a model's matrices."""
    try:
        result = subject.compressed(preset, ratio, kind)
    except CompressionError as error:
        return {"note": f"n/a: {error}"}
    dense = subject.matrices(subject.model, kind)
    distance, rmse = distances(subject.matrices(result.model, kind), dense)
    seconds, totals = result.report.seconds, result.report.totals
    # A matrix that would not shrink stays dense, and its bytes count.
    size = totals["compressed_stored_bytes"] + 4 * (sum(w.numel() for w in dense) - totals["compressed_parameters"])
    return {
        "ratio": 4 * sum(w.numel() for w in dense) / size,
        "bytes": size,
        "cosine distance": distance,
        "RMSE": rmse,
        "loss": own_loss(distance, rmse),
        "value": subject.judge(result.model),
        "solve": seconds["solve"],
        "text": seconds.get("calibrate", 0.0) + seconds.get("allocate", 0.0),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the measured values, a row a preset and a column a model, kind and ratio; and how `ae` stands against `svd`."""
    cells = {(row["model"], row["kind"], row["asked"], row["preset"]): row for row in rows}
    columns = list(dict.fromkeys(key[:3] for key in cells if key[3] != DENSE))
    presets = list(
        dict.fromkeys(key[3] for key in sorted(cells, key=lambda key: (*PRESETS, *PAPERS, DENSE).index(key[3])))
    )
    lines = ["| preset | " + " | ".join(f"{m} {k} {r}" for m, k, r in columns) + " |", "|---|" + "---|" * len(columns)]
    for preset in presets:
        values = []
        for model, kind, ratio in columns:
            row = cells.get((model, kind, "1" if preset == DENSE else ratio, preset))
            values.append("" if row is None else f"{row['value']:.4g}" if row["value"] != "" else "n/a")
        lines.append(f"| {preset} | " + " | ".join(values) + " |")
    for column in columns:
        ae, svd = cells.get((*column, "ae")), cells.get((*column, "svd"))
        if ae and svd:
            better = ae["value"] > svd["value"] if ae["measure"] == "agreement" else ae["value"] < svd["value"]
            lost = ["its own loss"] if ae["loss"] > svd["loss"] else []
            lost += [] if better else [ae["measure"]]
            lines.append(
                f"\n{' '.join(column)}: ae against svd: loss {ae['loss']:.4f} against {svd['loss']:.4f}, {ae['measure']} "
                f"{ae['value']:.4g} against {svd['value']:.4g}{'; LOST: ' + ', '.join(lost) if lost else ''}"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mlm", type=Path, help="folder of the masked language model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--ratios", nargs="+", type=float, default=(3.0, 10.0, 25.0))
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--papers", nargs="?", const="layers", choices=("layers", "all"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="judge on a tenth of the text, to try the script out")
    options = parser.parse_args()
    if "mlm" in options.models and not options.mlm:
        parser.error("the masked language model needs --mlm FOLDER; without it, pass --models minilm")
    presets = [*options.presets, *(p for p in PAPERS if options.papers and p not in options.presets)]
    known = [DENSE, *PRESETS, *PAPERS, *presets]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        kind = KINDS.index(row["kind"]) if row["kind"] in KINDS else len(KINDS)
        preset = known.index(row["preset"]) if row["preset"] in known else len(known)
        return MODELS.index(row["model"]), kind, row["kind"], float(row["asked"]), preset, row["preset"]

    table = Table(
        options.out,
        "methods-quick" if options.quick else "methods",
        COLUMNS,
        ("model", "kind", "asked", "preset"),
        order,
    )
    for name in options.models:
        judged = {"judged": 60 if name == "minilm" else 10} if options.quick else {}
        subject = minilm(options.data, **judged) if name == "minilm" else masked_lm(options.mlm, options.data, **judged)
        for kind in options.kinds:
            size = sum(4 * weight.numel() for weight in subject.matrices(subject.model, kind))
            fixed: dict[str, Any] = {"model": name, "kind": kind, "measure": subject.measure}
            if not table.has(name, kind, "1", DENSE):
                value = subject.judge(subject.model)
                exact = {"ratio": 1.0, "bytes": size, "cosine distance": 0.0, "RMSE": 0.0, "loss": 0.0}
                table.add(**fixed, asked="1", preset=DENSE, value=value, **exact)
            for ratio in options.ratios:
                for preset in presets:
                    slow = preset in PAPERS and kind == "word_embeddings" and options.papers != "all"
                    if not slow and not table.has(name, kind, f"{ratio:g}", preset):
                        found = measured(subject, kind, ratio, preset)
                        table.add(**fixed, asked=f"{ratio:g}", preset=preset, **found)
    text = summary(table.sorted())
    print(f"\n{text}")
    if options.out:
        (options.out / "methods-summary.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
