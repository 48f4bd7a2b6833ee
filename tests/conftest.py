"""What all tests share: one thread, so that the same bits come out wherever they run."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
