"""The step, the run and what survives it: both DeepSpeed engines behind one `Engine`."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, which warns when it has to find out
