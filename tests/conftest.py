"""Every test computes with one thread: sums are rounded alike, and tests that run side by side do not wait in turns.

Random cases have all the time that they need, and in CI they are the same ones each time.
"""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("lape", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lape")
