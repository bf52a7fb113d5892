"""Make a causal language model of few tokens, and text for it: IgLM's antibodies, for seeds.py.

usage: pip download --no-deps iglm==0.1.0 && python -m zipfile -e iglm-0.1.0-*.whl unpacked
       python benchmarks/iglm.py unpacked OUT [--name IgLM-S] [--text-of IgLM-S]
       python benchmarks/seeds.py --data OUT --causal OUT --models causal --by-line

The package `iglm` (for non-commercial use) has GPT-2s of 33 tokens. OUT gets one of them in float32, with its tokenizer, and
calibration.txt (500), validation.txt and test.txt (100 each): sequences sampled from the model --text-of, by default itself.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

STARTS = ("[HEAVY] [HUMAN]", "[LIGHT] [HUMAN]", "[HEAVY] [MOUSE]", "[LIGHT] [MOUSE]")
PARTS = {"calibration.txt": 500, "validation.txt": 100, "test.txt": 100}
BATCH, LONGEST = 50, 170


def tokenizer_of(vocabulary: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that spaces separate."""
    numbers = {token: number for number, token in enumerate(vocabulary.read_text("utf-8").split())}
    words = Tokenizer(WordLevel(numbers, "[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **special)


def sampled(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
    """Return different sequences of amino acids, a part of each taken out and put to the end, as the model was trained."""
    found: dict[str, None] = {}
    number = 0
    while len(found) < count:
        start = torch.tensor([tokenizer(STARTS[number % len(STARTS)], add_special_tokens=False).input_ids] * BATCH)
        with torch.no_grad():
            output = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_length=LONGEST,
                do_sample=True,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.cls_token_id,
            )
        ended = [ids[: ids.index(tokenizer.cls_token_id)] for ids in output.tolist() if tokenizer.cls_token_id in ids]
        found |= dict.fromkeys(" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in ended)
        number += 1
    return list(found)[:count]


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", choices=("IgLM", "IgLM-S"), default="IgLM-S")
    parser.add_argument("--text-of", choices=("IgLM", "IgLM-S"))
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = options.unpacked / "iglm" / "trained_models"
    tokenizer = tokenizer_of(folder / "vocab.txt")
    model = GPT2LMHeadModel.from_pretrained(folder / options.name, dtype=torch.float32).eval()
    speaker = model
    if options.text_of not in (None, options.name):
        speaker = GPT2LMHeadModel.from_pretrained(folder / options.text_of, dtype=torch.float32).eval()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    lines = sampled(speaker, tokenizer, sum(PARTS.values()))
    for name, count in PARTS.items():
        (options.out / name).write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
        lines = lines[count:]


if __name__ == "__main__":
    main()
