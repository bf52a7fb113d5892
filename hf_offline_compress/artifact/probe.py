"""A model's outputs on fixed small inputs: recorded when a folder is saved, compared wherever it is loaded again.

This file is also a program, `python probe.py FOLDER OUT {with,without}`, which loads a folder in a clean process, with
the package or without it, and writes what it found as JSON. So it imports nothing of the package.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LENGTH = 12
VALUES = 32
PACKAGE = "hf_offline_compress"


def probe_inputs(config: Any, head: str) -> dict[str, Any]:
    """Return inputs that every head of a model takes, as plain lists: ids spread over the vocabulary, some padding.

    Args:
        config: of the model.
        head: its class name; heads of several choices take [batch, choices, length], the others [batch, length].
    """
    pad: Any = getattr(config, "pad_token_id", None)
    length = min(LENGTH, getattr(config, "token_limit", None) or LENGTH)
    golden = (math.sqrt(5) - 1) / 2
    if pad is not None and pad >= config.vocab_size:  # a token that the tokenizer alone has
        pad = None
    # Without a padding token some heads take one sequence only.
    batch = 1 if pad is None else 2
    ids = [[int(config.vocab_size * ((golden * i + 0.3 * row) % 1)) for i in range(length)] for row in range(batch)]
    ids = [[(token + 1) % config.vocab_size if token == pad else token for token in row] for row in ids]
    mask = [[1] * length for _ in ids]
    for i in range(length * 2 // 3, length) if pad is not None else ():
        ids[1][i], mask[1][i] = pad, 0
    if "MultipleChoice" in head or "DoubleHeads" in head:
        return {"input_ids": [[row, row[::-1]] for row in ids], "attention_mask": [[row, row[::-1]] for row in mask]}
    return {"input_ids": ids, "attention_mask": mask}


def probe_outputs(model: Any, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a digest of every output tensor: its shape, root mean square, and some values spread over it.

    What is not finite is None. Weights are decoded in the model's dtype, however it is told to hold them: the outputs are
    those of every machine. The model is left as it was: its mode, and what it has decoded.

    Args:
        model: any compressed model, on any device.
        inputs: from `probe_inputs`.
    """
    import torch

    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    modules = [module for module in model.modules() if getattr(module, "_cache", 0) is None]
    rounded = [module for module in model.modules() if getattr(module, "decoding", "") in ("int8", "auto")]
    decodings = [module.decoding for module in rounded]
    for module in rounded:
        module.decoding = "cached"
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            result = model(**{name: torch.tensor(value, device=device) for name, value in inputs.items()})
    finally:
        model.train(training)
        for module, decoding in zip(rounded, decodings, strict=True):
            module.decoding = decoding
            module.forget()
        for module in modules:
            module._cache = None
    return {name: _digest(value) for name, value in result.items() if isinstance(value, torch.Tensor)}


def _digest(tensor: torch.Tensor) -> dict[str, Any]:
    flat = tensor.detach().double().cpu().flatten()
    spread = flat[:: max(1, len(flat) // VALUES)][:VALUES]
    return {
        "shape": list(tensor.shape),
        "root_mean_square": _number(float(flat.square().mean().sqrt())),
        "values": [_number(float(value)) for value in spread],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def difference(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> float:
    """Return the largest difference of two digests, relative to the root mean square of the output that it is in.

    It is infinite where outputs are missing, of other shapes, or not finite.
    """
    if one.keys() != other.keys():
        return math.inf
    worst = 0.0
    for name, first in one.items():
        second = other[name]
        numbers, others = ([digest["root_mean_square"], *digest["values"]] for digest in (first, second))
        if first["shape"] != second["shape"] or len(numbers) != len(others) or None in numbers + others:
            return math.inf
        scale = max(numbers[0], 1e-12)
        worst = max([worst, *(abs(a - b) / scale for a, b in zip(numbers, others, strict=True))])
    return worst


def load_in_clean_process(folder: Path, *, trust: bool, inputs: dict[str, Any] | None) -> dict[str, Any]:
    """Load a folder through the auto class of its head, run the probe and return what was found, as plain JSON.

    Args:
        folder: a compressed folder.
        trust: run the folder's own code; without it, the package must be there.
        inputs: of the probe; made afresh if None.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    head = config["architectures"][0]
    auto = next((name for name, target in config["auto_map"].items() if target.endswith(f".{head}")), None)
    if auto is None:  # no auto class has it: the class beside the one of the base model
        base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=trust)
        model, info = getattr(sys.modules[type(base).__module__], head).from_pretrained(
            folder, output_loading_info=True
        )
    else:
        model, info = getattr(modeling_auto, auto).from_pretrained(
            folder, trust_remote_code=trust, output_loading_info=True
        )
    inputs = inputs or probe_inputs(model.config, head)
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = type(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)).__name__
    return {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "compressed_modules": len(model.compressed_modules()),
        "outputs": probe_outputs(model, inputs),
        "tokenizer": tokenizer,
    }


def _main(folder: Path, out: Path, mode: str) -> None:
    if mode == "without":
        sys.modules[PACKAGE] = None  # type: ignore[assignment]  # any import of it now fails
    else:
        __import__(PACKAGE)
    try:
        record = json.loads((folder / "verification.json").read_text("utf-8"))
        inputs = record["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        inputs = None
    found: dict[str, Any]
    try:
        found = load_in_clean_process(folder, trust=mode == "without", inputs=inputs)
    except Exception as error:  # whatever it is, a user would see it too
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    out.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
