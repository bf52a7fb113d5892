"""Everything here is offline, seeded and on one thread a worker."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_grad_enabled(True)  # no test depends on what another has left behind
