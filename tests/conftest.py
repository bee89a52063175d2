"""Every test computes with one thread: sums are rounded alike, and tests that run side by side do not wait in turns."""

import torch

torch.set_num_threads(1)
