"""Settings of every test: one thread, no gradients, no accelerator plug-ins; inputs that no test changes."""

from __future__ import annotations

import os

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # read when torch is imported

import pytest
import torch
from tiny import make_checkpoint
from words import write_tokenizer, write_words

torch.set_num_threads(1)
torch.set_grad_enabled(False)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of the tiny models' words."""
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny checkpoint with a tokenizer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", head_dim=16, intermediate_size=128)
    write_tokenizer(folder)
    return folder
