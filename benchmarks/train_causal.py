"""Train a small causal language model from scratch, for pareto.py and model cards where no checkpoint is at hand.

usage: python benchmarks/train_causal.py TEXT OUT [--minutes 70] [--layers 4] [--width 256] [--vocabulary 8192]

TEXT has one document a line. OUT gets a GPT2LMHeadModel in half precision and its byte-level tokenizer. The learning rate
follows the clock, so the result depends on the machine.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

END = "<|endoftext|>"
LENGTH, SEQUENCES, RATE = 256, 16, 2e-3


def rate_at(share: float) -> float:
    """Return the learning rate when a share of the time has passed: a short rise, then half a cosine."""
    falling = min(1.0, max(0.0, (share - 0.05) / 0.95))
    return RATE * min(1.0, share / 0.05) * (0.51 + 0.5 * math.cos(math.pi * falling))


def fast_in_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 faster than in float32; without instructions for it, it takes 40 times as long."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        left @ right
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return seconds[1] < seconds[0]


def main() -> None:
    """Train for so many minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    options = parser.parse_args()
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train([str(options.text)], vocab_size=options.vocabulary, special_tokens=[END])
    trained.save_model(str(options.out))
    tokenizer = GPT2TokenizerFast.from_pretrained(options.out)
    end = tokenizer.convert_tokens_to_ids(END)
    documents = options.text.read_text("utf-8").splitlines()
    tokens = torch.tensor([i for ids in tokenizer(documents, verbose=False)["input_ids"] for i in [*ids, end]])
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=LENGTH,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.width // 64,
            bos_token_id=end,
            eos_token_id=end,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).train()
    print(f"{len(tokens):,} tokens, {model.num_parameters():,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(0)
    narrow = fast_in_bfloat16()
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(share)
        places = torch.randint(0, len(tokens) - LENGTH, (SEQUENCES,), generator=generator)
        batch = torch.stack([tokens[place : place + LENGTH] for place in places])
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    model.eval().half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
