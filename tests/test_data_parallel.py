"""Replicas as `nn.DataParallel` makes them, on one CPU: each uses tensors of its own, never the original's."""

import copy

import pytest
import torch
from common import make_model, make_tokenizer, outputs_of
from test_round_trip import RECIPES

from hf_offline_compress import compress


def replica_of(network):
    """Return a replica of a model, as torch's `replicate` builds one on each GPU."""
    modules = list(network.modules())
    copies = [module._replicate_for_data_parallel() for module in modules]
    places = {module: i for i, module in enumerate(modules)}
    for module, replica in zip(modules, copies, strict=True):
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, copies[places[child]])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
                replica._former_parameters[name] = getattr(replica, name)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return copies[0]


SHARED = ("low_rank_shared", "autoencoder_shared", "residual", "kronecker", "tucker")
CASES = [("BertForMaskedLM", name) for name in (*SHARED, "sparse", "quantized", "codebook_int8")]


@pytest.mark.parametrize(("head", "recipe"), [*CASES, ("GPT2LMHeadModel", "trellis_int8")])
def test_a_replica_stands_on_its_own(head, recipe):
    model_type = "gpt2" if head.startswith("GPT2") else "bert"
    result = compress(
        make_model(model_type, head), RECIPES[recipe], tokenizer=make_tokenizer(model_type), progress=False
    )
    model = copy.deepcopy(result.model)
    expected = outputs_of(model, head)
    replica = replica_of(model)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(torch.nan)
    torch.testing.assert_close(outputs_of(replica, head), expected)
    torch.testing.assert_close(outputs_of(replica, head), expected)
