"""How to run a folder's ONNX files, for its card: in Python with ONNX Runtime, in a web page with transformers.js."""

from __future__ import annotations

import json

from ..architectures.families import objective_of
from ..artifact.reading import ONNX_FOLDER
from ..runtime.architectures_compressed import architecture_of
from .inputs import CardInputs

# What loaders ask for first.
FILES = ("model_quantized.onnx", "model.onnx")
# End of a head's name → task of a pipeline, and the dtype by which transformers.js names a file.
TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}
DTYPES = dict(zip(FILES, ("q8", "fp32"), strict=True))


def onnx_texts(inputs: CardInputs, model_id: str) -> dict[str, str | None]:
    """Return the texts of the template on ONNX files; empty where the folder has none."""
    found = [name for name in FILES if f"{ONNX_FOLDER}/{name}" in inputs.files]
    if not found or not inputs.has_tokenizer:
        return {}
    sizes = [f"`{ONNX_FOLDER}/{name}` ({inputs.files[f'{ONNX_FOLDER}/{name}'] / 1e6:.2f} MB)" for name in found]
    entry = architecture_of(str(inputs.config["model_type"]))
    cached = bool(entry and entry.causal) and objective_of(inputs.architecture) == "causal"
    return {
        "onnx_files": " and ".join(sizes),
        "onnx_python": _python(found[0], model_id, cached),
        "onnx_javascript": _javascript(inputs, found[0], model_id, cached),
    }


def _python(file: str, model_id: str, cached: bool) -> str:
    """Return lines that run a file on a text with onnxruntime and tokenizers, from a folder or a repository."""
    lines = [
        "from pathlib import Path",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from tokenizers import Tokenizer",
        "",
        f"model_id = {json.dumps(model_id, ensure_ascii=False)}",
        "folder = Path(model_id)",
        "if not folder.is_dir():",
        "    from huggingface_hub import snapshot_download",
        "",
        f'    folder = Path(snapshot_download(model_id, allow_patterns=["{ONNX_FOLDER}/*", "tokenizer.json"]))',
        f'session = onnxruntime.InferenceSession(folder / "{ONNX_FOLDER}/{file}")  # decodes the weights',
        'encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("A man plays the guitar.")',
        'feeds = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask}',
    ]
    if cached:
        lines.append('feeds["position_ids"] = list(range(len(encoded.ids)))')
    else:
        lines.append('feeds["token_type_ids"] = encoded.type_ids')
    lines += ["feeds = {name: np.array([values]) for name, values in feeds.items()}"]
    if cached:
        lines += [
            "for value in session.get_inputs():  # an empty cache",
            '    if value.name.startswith("past_key_values."):',
            "        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)",
        ]
    lines.append("outputs = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})")
    return "\n".join(lines)


def _javascript(inputs: CardInputs, file: str, model_id: str, cached: bool) -> str | None:
    """Return lines that run a file in a page; None for heads that transformers.js has no pipeline for."""
    ends = (task for end, task in TASKS.items() if inputs.architecture.endswith(end))
    task = "text-generation" if cached else next(ends, None)
    if task is None:
        return None
    call = 'await run("A man plays the guitar.");'
    if task == "feature-extraction" and inputs.is_sentence_encoder:
        call = 'await run("A man plays the guitar.", { pooling: "mean", normalize: true });'
    if task == "question-answering":
        call = 'await run("Who plays?", "A man plays the guitar.");'
    return "\n".join(
        (
            'import { pipeline } from "@huggingface/transformers";',
            "",
            f"const model_id = {json.dumps(model_id, ensure_ascii=False)};",
            f"const address = `https://huggingface.co/${{model_id}}/resolve/main/{ONNX_FOLDER}/config.json`;",
            "const config = await (await fetch(address)).json(); // stock, unlike the config.json beside the weights",
            f'const run = await pipeline("{task}", model_id, {{ config, dtype: "{DTYPES[file]}" }});',
            f"const outputs = {call}",
        )
    )
