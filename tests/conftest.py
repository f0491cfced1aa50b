"""Offline by construction, one thread (the suite runs in parallel), quiet."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start: sums are the same to the bit only in one order
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from tests.reader import Reader

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def fresh():
    """Another process, with the plugin, that saved nothing itself."""
    with Reader(plugin=True) as reader:
        yield reader


@pytest.fixture(scope="session")
def plain():
    """Another process with plain transformers: no plugin."""
    with Reader(plugin=False) as reader:
        yield reader


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
