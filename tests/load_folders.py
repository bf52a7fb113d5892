"""Run in a fresh process: load every folder of a directory in a clean process, and write what was found.

usage: load_folders.py {package,remote} OUT FOLDERS…. With "remote" the package cannot be imported.
"""

import json
import sys
from pathlib import Path

mode, out, roots = sys.argv[1], Path(sys.argv[2]), [Path(root) for root in sys.argv[3:]]
if mode == "remote":
    sys.modules["hf_offline_compress"] = None  # any import of it now fails
else:
    import hf_offline_compress

import torch
import transformers
from inputs import TEXT, inputs_for
from transformers import AutoTokenizer
from transformers.models.auto import modeling_auto

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HEADS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}


def auto_class(head):
    """Return the auto class that users load a head with; GPT2DoubleHeadsModel has none."""
    return None if "DoubleHeads" in head else next(auto for suffix, auto in HEADS.items() if head.endswith(suffix))


facts, outputs = {}, {}
for folder in sorted(folder for root in roots for folder in root.iterdir()):
    head = folder.name.split("-")[0]
    trust = {"trust_remote_code": True} if mode == "remote" else {}
    name = auto_class(head)
    if name is None and mode == "remote":  # through the class that the base model's reference leads to
        base = transformers.AutoModel.from_pretrained(folder, **trust)
        cls = getattr(sys.modules[type(base).__module__], f"Compressed{head}")
    elif name is None:
        cls = getattr(hf_offline_compress, f"Compressed{head}")
    else:
        cls = getattr(modeling_auto, name)
    options = {} if name is None else trust
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    with torch.no_grad():
        result = model.eval()(**inputs_for(head))
    outputs[folder.name] = torch.cat([v.float().flatten() for v in result.values() if isinstance(v, torch.Tensor)])
    facts[folder.name] = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "compressed": len(model.compressed_modules()),
        "tokens": AutoTokenizer.from_pretrained(folder, **trust)(TEXT).input_ids,
    }
assert (mode == "remote") == (sys.modules["hf_offline_compress"] is None)
(out / "facts.json").write_text(json.dumps(facts))
torch.save(outputs, out / "outputs.pt")
