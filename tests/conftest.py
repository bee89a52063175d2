"""Every test computes with one thread: sums are rounded alike, and tests that run side by side do not wait in turns.

Random cases have all the time that they need, and in CI they are the same ones each time. Ctrl-C is heard, also where a
shell started the tests in the background, with that signal ignored.
"""

import os
import signal

import torch
from hypothesis import settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("lape", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lape")
