"""LoRA adapters beside compressed layers: found, trained, saved and loaded; never merged."""

import pytest
import torch
from test_decoding import model_of

from hf_offline_compress import CompressionError, Rule
from hf_offline_compress.adapters import lora_config
from hf_offline_compress.structures import Trellis


def test_an_adapter_is_trained_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["query", "value"], "r": 2}
    ids = torch.tensor([[5, 9, 30, 41]])
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model_of(Rule(Trellis(), ratio=8.0)), lora_config(**options))
    codes = {name: tensor.clone() for name, tensor in tuned.named_buffers()}
    trained = {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    tuned.train()
    for _ in range(2):  # the second factor is zero at first
        optimizer.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
    now = dict(tuned.named_parameters())
    assert all(not now[name].equal(before) for name, before in trained.items())
    assert all(tensor.equal(codes[name]) for name, tensor in tuned.named_buffers())
    tuned.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tuned(ids).logits
        config = lora_config(**options)
        again = peft.PeftModel.from_pretrained(model_of(Rule(Trellis(), ratio=8.0)), str(tmp_path), config=config)
        torch.testing.assert_close(again(ids).logits, expected)
    with pytest.raises(CompressionError, match="cannot be merged"):
        again.merge_and_unload()
