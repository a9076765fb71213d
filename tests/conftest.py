"""Settings of every test: one thread, no gradients, no accelerator plug-ins."""

from __future__ import annotations

import os

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # read when torch is imported

import torch

torch.set_num_threads(1)
torch.set_grad_enabled(False)
