"""Everything here is offline, seeded and on one thread a worker."""

import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from processes import warm
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()


# Modules that take longest, so that at the end no process waits for another; all others as they come.
LONGEST = (
    "docs",
    "round_trip",
    "onnx_causal",
    "benchmark",
    "push",
    "onnx_families",
    "cli",
    "browser",
    "resuming",
    "runtime",
    "compress",
    "space",
    "in_order",
)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    # Nothing of all that is imported by now ever becomes garbage, and looking for garbage in it takes its time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def forked(monkeypatch):
    """Let processes that the package starts be forks; see processes.py."""
    for name, value in warm().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", warm()["WARM_PYTHON"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_grad_enabled(True)  # no test depends on what another has left behind
