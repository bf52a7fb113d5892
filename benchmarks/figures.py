"""The figures of the README, from recorded tables: quality against bytes on disk, on light and on dark ground.

usage: python benchmarks/figures.py [--measured docs/measured.md] [--out docs/figures]

The points are those of the table "Whole models" of docs/measured.md, which benchmarks/pareto.py prints. MB are those of
MiniLM, 90.9 in float32; quality is the Spearman correlation (x 100) on STS-B dev.
"""

import argparse
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
DENSE_MB = 90.9
# Series: label, how its rows begin, mark.
SERIES = (
    ("hf-offline-compress", "**`", "o-"),
    ("rounded (int8, int4, int3)", r"int[843], rounded", "s"),
    ("GPTQ (int4, int3, int2)", r"int[432], GPTQ", "D"),
    ("calibrated SVD", "`calibrated-svd`", "^"),
    ("autoencoder", "`ae`", "v"),
    ("bfloat16", "bfloat16", "P"),
)
COLORS = {
    "light": ("#24292f", ("#4051b5", "#b35900", "#a3195b", "#5c6670", "#5c6670", "#1a7f37")),
    "dark": ("#e6edf3", ("#8c9eff", "#ffa657", "#ff7bb0", "#8b949e", "#8b949e", "#56d364")),
}
LOWEST = 83.0  # SVD at few bytes is far below


def rows(page: Path) -> list[tuple[str, float, float]]:
    """Return name, share of float32 in percent, and correlation of the rows of the table."""
    text = page.read_text("utf-8").split("## Whole models\n", 1)[1]
    found = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \|", text.split("\n##", 1)[0], re.MULTILINE)
    return [(name, float(percent), float(value)) for name, percent, value in found]


def draw(points: list[tuple[str, float, float]], mode: str, out: Path) -> None:
    """Draw all series on transparent ground."""
    ink, colors = COLORS[mode]
    plt.rcParams.update({"svg.hashsalt": "0", "font.size": 11, "font.family": "sans-serif", "svg.fonttype": "none"})
    plt.rcParams.update(
        dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    )
    figure, axes = plt.subplots(figsize=(7.6, 3.8))
    for (label, start, mark), color in zip(SERIES, colors, strict=True):
        own = [p for p in points if (p[0].startswith(start) if start.startswith(("*", "`")) else re.match(start, p[0]))]
        own = [p for p in own if p[2] >= LOWEST]
        width = 2.2 if mark == "o-" else 1.0
        axes.plot(
            [DENSE_MB * p[1] / 100 for p in own], [p[2] for p in own], mark, color=color, label=label, lw=width, ms=6
        )
    dense = next(p for p in points if p[0] == "dense, float32")
    axes.axhline(dense[2], color=ink, lw=0.8, ls=":")
    axes.annotate("float32, 90.9 MB", (DENSE_MB, dense[2]), xytext=(-4, 6), textcoords="offset points", ha="right")
    axes.set_xscale("log")
    ticks = [3, 5, 10, 20, 50, 90]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(2.6, 95)
    axes.set_ylim(LOWEST, 87.8)
    axes.set_xlabel("MB on disk (all-MiniLM-L6-v2)")
    axes.set_ylabel("STS-B, Spearman × 100")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(out / f"quality-{mode}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=ROOT / "docs/measured.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for mode in COLORS:
        draw(rows(options.measured), mode, options.out)


if __name__ == "__main__":
    main()
