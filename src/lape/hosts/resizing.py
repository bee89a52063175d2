"""How a table made for one grid of patches serves another: what each library does with its own tables."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lape.errors import UsageError
from lape.method import Grid


def resize_as_timm(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bicubic with antialiasing, as in timm; equal grids leave the table as it is."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)


def _interpolated(table: Tensor, new: Grid, old: Grid, prefix: int, mode: str) -> Tensor:
    patches = table[:, prefix:].mT.unflatten(2, old)
    patches = F.interpolate(patches, new, mode=mode, align_corners=False).flatten(2).mT
    return torch.cat([table[:, :prefix], patches], dim=1)


def resize_bicubic(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bicubic without antialiasing (ViT-Adapter, transformers)."""
    return table if new == old else _interpolated(table, new, old, prefix, "bicubic")


def resize_bilinear(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bilinear without antialiasing (DPT)."""
    return table if new == old else _interpolated(table, new, old, prefix, "bilinear")


def resize_by_count(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bilinear without antialiasing, and not at all where another grid has as many patches (Segmenter)."""
    same = new[0] * new[1] == old[0] * old[1]
    return table if same else _interpolated(table, new, old, prefix, "bilinear")


def cut(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Return the first rows of a table for a shorter sequence: `lape.Host(resize=lape.hosts.cut)`.

    Args:
        table: (1, prefix + old length, D).
        new: (1, new length).
        old: (1, old length).
        prefix: The number of tokens before them that have a row.

    Raises:
        UsageError: For a longer sequence, for whose end there is no row.

    Example:
        >>> import torch
        >>> import lape.hosts
        >>> lape.hosts.cut(torch.zeros(1, 513, 8), new=(1, 20), old=(1, 512), prefix=1).shape
        torch.Size([1, 21, 8])
    """
    if new == old:
        return table
    if new[1] > old[1]:
        raise UsageError(
            f"The position table is for {old[1]} tokens, and the input has {new[1]}. Give the longest length: "
            f"lape.apply(model, grid=(1, {new[1]})), or take a sinusoid, pe='sinusoidal-1d'."
        )
    return table[:, : prefix + new[1]]
