"""Every encoder of the table, and every kind of head, as an ONNX file: what torch says, and what int8 in torch says."""

import os

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from common import HEADS, make_model, make_tokenizer
from inputs import inputs_for
from transformers.pytorch_utils import Conv1D

from hf_offline_compress import Recipe, Rule, compress
from hf_offline_compress.architectures.families import FAMILIES, objective_of
from hf_offline_compress.export.dense import stock_model
from hf_offline_compress.export.onnx.model import onnx_models
from hf_offline_compress.export.onnx.source import LARGEST
from hf_offline_compress.structures import Quantized

ENCODERS = [
    (model_type, head)
    for model_type, head in HEADS
    if not FAMILIES[model_type].entry.causal and objective_of(head) != "causal"
]
# An export takes seconds: each family once, and each kind of head once, unless all are asked for. XLM-RoBERTa and CamemBERT
# are RoBERTa under other names.
TRIED = [
    ("bert", "BertForPreTraining"),
    ("bert", "BertForNextSentencePrediction"),
    ("roberta", "RobertaForQuestionAnswering"),
    ("distilbert", "DistilBertForMultipleChoice"),
    ("electra", "ElectraForPreTraining"),
    ("mpnet", "MPNetForSequenceClassification"),
    ("deberta-v2", "DebertaV2ForMaskedLM"),
    ("modernbert", "ModernBertModel"),
    ("albert", "AlbertForTokenClassification"),
]
SAME = {"xlm-roberta", "camembert"}
RECIPE = Recipe("q", (Rule(Quantized(), ratio=4.0, storage="float16"),), modules=(".+",))


def kind_of(model_type, head):
    """Return what a head does: its name without the family's."""
    return head.removeprefix(FAMILIES[model_type].entry.base.removesuffix("Model"))


def test_no_family_and_no_kind_of_head_is_left_out():
    assert set(TRIED) <= set(ENCODERS)
    assert {model_type for model_type, _ in TRIED} | SAME == {model_type for model_type, _ in ENCODERS}
    assert {kind_of(*pair) for pair in TRIED} == {kind_of(*pair) for pair in ENCODERS}


def in_integers(stock, parts=1):
    """Give a stock model products of integers, as the file has them: weights by rows, inputs as they come."""

    def in_two_parts(_, arguments):
        x = arguments[0].numpy()
        largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        first = np.rint(x / largest * 127) / np.float32(127)
        rest = np.rint((x / largest - first) * 254 * 127) / np.float32(254 * 127)
        return (torch.from_numpy((first + rest) * largest),)

    normed = []

    def remember(_, __, out):
        normed.append(out)

    def rounded(_, arguments):
        x = arguments[0].numpy()
        largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        if any(arguments[0] is each for each in normed):  # what a layer norm gives has one scale for all tokens
            largest = np.ones_like(largest)
        x = x / largest
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        step = (high - low) / np.float32(255)
        zero = np.rint(-low / step)
        return (torch.from_numpy((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step * largest),)

    for module in stock.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(remember)
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            weight = module.weight.detach()
            scales = weight.abs().amax(dim=0 if isinstance(module, Conv1D) else 1, keepdim=True) / LARGEST
            scales = scales.clamp(min=1e-30)
            module.weight = torch.nn.Parameter(torch.round(weight / scales) * scales)
            module.register_forward_pre_hook(rounded if parts == 1 else in_two_parts)
    return stock


def session_of(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(file).SerializeToString(), options)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(model_type, head):
    """Export a tiny model, and compare; return the errors of int8, by output."""
    base = make_model(model_type, head, layers=1)
    model = compress(base, RECIPE, tokenizer=make_tokenizer(model_type), progress=False).model.eval()
    stock = stock_model(model)
    files = onnx_models(model, stock, ("float32", "int8"), opset=18)
    feeds = inputs_for(head)  # of another length than the graph was traced with
    with torch.no_grad():
        said = model(**feeds)
        rounded = in_integers(stock)(**feeds)
    errors = {}
    for weights, file in files.items():
        session = session_of(file)
        names = [output.name for output in session.get_outputs()]
        assert set(names) == {name for name, value in said.items() if torch.is_tensor(value)}
        found = dict(zip(names, session.run(None, {k: v.numpy() for k, v in feeds.items()}), strict=True))
        for name in names:
            if weights == "float32":
                np.testing.assert_allclose(found[name], said[name].numpy(), atol=1e-4)
            else:
                # The noise of 8 bits is large where a tiny model's logits are small by chance: it has to be the same
                # noise. A number that is rounded the other way moves the rest a little.
                assert distance(found[name], rounded[name].numpy()) < 5e-3
                errors[name] = distance(found[name], said[name].numpy())
    return errors


@pytest.mark.parametrize("model_type,head", ENCODERS if os.environ.get("EVERY_ONNX_HEAD") else TRIED)
def test_onnx_runtime_says_what_torch_says(model_type, head):
    errors = check(model_type, head)
    assert min(errors.values()) > 1e-4  # really of integers
