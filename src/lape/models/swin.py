"""Swin Transformer (Liu et al., arXiv 2103.14030): timm's model, with the windows of the original.

Facts from github.com/microsoft/Swin-Transformer at f82860b.
"""

from typing import Any

import timm
from torch import nn

from lape.errors import RunError, first_line

NAMES = ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224")


def as_published(model: nn.Module) -> None:
    """Give a stage whose shorter side fits into a window one square window of that side, and no shift.

    timm decides for each side alone. For square images, as for all of the paper's, the two are the same.
    """
    swin: Any = model
    for stage in swin.layers:
        sides = stage.output_resolution
        for number, block in enumerate(stage.blocks):
            window = min(*sides, *block.window_size)
            shift = window // 2 if number % 2 and min(sides) > window else 0
            block.target_shift_size = (shift, shift)
            try:
                block.set_input_size(sides, (window, window), always_partition=True)
            except RuntimeError as error:  # it takes every table for that of a square window
                raise RunError(
                    f"timm {timm.__version__} cannot change Swin's windows, as images that are not square ask for it "
                    f"({first_line(error)}). Install timm 1.0.31 or newer, or take square images."
                ) from error
