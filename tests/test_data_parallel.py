"""Replicas as `nn.DataParallel` makes them, on one CPU: each uses tensors of its own, never the original's."""

import copy
import importlib

import pytest
import torch
from common import TEXTS, make_model, make_tokenizer, outputs_of
from inputs import inputs_for
from test_round_trip import RECIPES

from hf_offline_compress import compress


@pytest.fixture
def replica_of(monkeypatch):
    """Return torch's own `replicate`, for one replica; what it would copy to a GPU is copied on the CPU."""

    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    module = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of this name
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return lambda network: module.replicate(network, [0])[0]


SHARED = ("low_rank_shared", "autoencoder_shared", "residual", "kronecker", "tucker")
CASES = [("BertForMaskedLM", name) for name in (*SHARED, "sparse", "quantized", "codebook_int8")]


@pytest.mark.parametrize(("head", "recipe"), [*CASES, ("GPT2LMHeadModel", "trellis_int8")])
def test_a_replica_stands_on_its_own(head, recipe, replica_of):
    """Its numbers are its own, within another module too, and gradients go through it to the original."""
    model_type = "gpt2" if head.startswith("GPT2") else "bert"
    result = compress(
        make_model(model_type, head),
        RECIPES[recipe],
        tokenizer=make_tokenizer(model_type),
        calibration=TEXTS,
        progress=False,
    )
    model = copy.deepcopy(result.model)
    expected = outputs_of(model, head)
    with torch.no_grad():
        replica = replica_of(torch.nn.Sequential(model))[0]
        for tensor in model.parameters():
            tensor.fill_(torch.nan)
    torch.testing.assert_close(outputs_of(replica, head), expected)
    torch.testing.assert_close(outputs_of(replica, head), expected)
    model = copy.deepcopy(result.model)
    taken = []
    for network in (model, replica_of(model)):
        model.zero_grad()
        network(**inputs_for(head)).logits.square().mean().backward()
        taken.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in taken[1].values())
    torch.testing.assert_close(taken[1], taken[0])
