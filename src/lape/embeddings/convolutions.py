"""Convolutions that tell patches of positions by what lies around them: at the rim there is nothing."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lape.embeddings.grid import Grid


class PositionEncodingGenerator(nn.Conv2d):
    """PEG (Chu et al., arXiv 2102.10882): patches as a map, y = DWConv3×3(x) + x; prefix tokens stay as they are.

    Example:
        >>> import torch
        >>> from lape.embeddings import PositionEncodingGenerator
        >>> PositionEncodingGenerator(8)(torch.randn(2, 1 + 6, 8), grid=(2, 3), prefix=1).shape
        torch.Size([2, 7, 8])
    """

    def __init__(self, dim: int, **new: Any) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, **new)

    def reset_parameters(self) -> None:
        """Begin as Twins: normal with standard deviation sqrt(2/9), and no shift."""
        nn.init.normal_(self.weight, std=sqrt(2 / 9))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, tokens: Tensor, grid: Grid, prefix: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, prefix + H·W, D) to the same shape."""
        image = tokens[:, prefix:].mT.unflatten(2, grid)
        patches = (super().forward(image) + image).flatten(2).mT
        return torch.cat([tokens[:, :prefix], patches], dim=1) if prefix else patches


@dataclass(frozen=True)
class Convolution:
    """A PEG behind each of the first blocks.

    Example:
        >>> from lape.embeddings import CONVOLUTIONS
        >>> CONVOLUTIONS["peg-5"].blocks
        5
    """

    blocks: int  # how many
    planar: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()


CONVOLUTIONS = {"peg": Convolution(1), "peg-5": Convolution(5)}
