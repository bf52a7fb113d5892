"""A model larger than the memory that it is compressed within: peak memory and seconds.

usage: python benchmarks/larger_than_memory.py [--size large] [--vocabulary N] [--recipe small] [--max-memory 2.5GB]

A GPT-2 of the given size, of random parameters in float16 shards, is written shard by shard, compressed by the command line
with `--max-memory` in a process of its own, and loaded again by AutoModel in another one, which decodes on use.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from hf_offline_compress.measure.texts import load_texts

# Layers, width and heads.
SIZES = {
    "tiny": (2, 128, 2),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
LOAD = """
import sys, torch, hf_offline_compress
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.set_decoding("on_the_fly")
with torch.no_grad():
    logits = model(input_ids=torch.arange(100)[None]).logits
assert logits.isfinite().all()
print(f"loaded: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} numbers in parameters")
"""


def write_base(folder: Path, size: str, vocabulary: int) -> int:
    """Write a checkpoint with a shard a layer, and return the number of its parameters."""
    layers, width, heads = SIZES[size]
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, dtype="float16")
    config.architectures = ["GPT2LMHeadModel"]
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if name.startswith("transformer.h.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, own in shards.items():
        tensors = {}
        for name, shape in own.items():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            tensors[name] = (mean + 0.02 * torch.randn(shape, generator=generator)).half()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer().save_pretrained(folder)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _tokenizer() -> GPT2Tokenizer:
    """Return a tokenizer of GPT-2's kind, trained on the bundled text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = load_texts("bundled")
    assert texts is not None
    bpe.train_from_iterator(texts.texts, trainer)
    content = json.loads(bpe.to_str())["model"]
    return GPT2Tokenizer(vocab=content["vocab"], merges=[tuple(merge) for merge in content["merges"]])


def run(*command: object) -> tuple[float, float]:
    """Run a process, and return its seconds and its largest resident set in GB."""
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, *map(str, command)])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"it ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", choices=SIZES)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--max-memory", default="2.5GB", help="none to hold it whole")
    parser.add_argument("--vocabulary", type=int, default=50257, help="8000 or more tokens")
    parser.add_argument("--folder", type=Path, help="where base and result are kept")
    parser.add_argument("more", nargs="*", help="further options of compress, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        base = folder / f"gpt2-{options.size}-{options.vocabulary}"
        out = folder / f"{base.name}-{options.recipe}"
        if not base.exists():
            base.mkdir(parents=True)
            count = write_base(base, options.size, options.vocabulary)
            print(f"{base.name}: {count:,} parameters, {4 * count / 1e9:.2f} GB in float32", flush=True)
        bound = [] if options.max_memory == "none" else ["--max-memory", options.max_memory]
        arguments = ["--recipe", options.recipe, "--effort", "fast", "--overwrite", *bound, *options.more]
        seconds, peak = run("-m", "hf_offline_compress", "compress", base, out, *arguments)
        print(
            f"compressed by {options.recipe} within {options.max_memory}: {seconds:.0f} s, peak {peak:.2f} GB",
            flush=True,
        )
        seconds, peak = run("-c", LOAD, out)
        print(f"loaded and run on the fly: {seconds:.0f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
