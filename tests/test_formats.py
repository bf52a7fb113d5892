"""Folders of earlier formats still load and say what they said; one was kept of each, as the code of its time wrote it."""

from pathlib import Path

import pytest
import torch
from common import outputs_of
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import hf_offline_compress  # noqa: F401

KEPT = sorted(Path(__file__).with_name("data").glob("format-*"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.name)
def test_a_folder_of_an_earlier_format_says_what_it_said(kept):
    model, info = AutoModelForMaskedLM.from_pretrained(kept / "bert", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(model.compressed_modules()) == 15
    recorded = load_file(kept / "outputs.safetensors")["outputs"].float()
    torch.testing.assert_close(outputs_of(model, "BertForMaskedLM"), recorded, atol=2e-3, rtol=1e-3)
