"""Random erasing of a batch at once, by the law of timm's, which erases one image after another."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

# What is erased becomes 0, one normal colour for an image, or normal colours in every pixel.
FILLINGS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "const": torch.zeros_like,
        "rand": lambda images: torch.randn_like(images[..., :1, :1]),
        "pixel": torch.randn_like,
    }
)


@dataclass(frozen=True)
class Erasing:
    """Erases one rectangle of an image, with some probability.

    Ten tries look for one that is lower and narrower than the image; where none is found, nothing is erased. Whether
    and where is drawn on the host (`marks`), so that a device has three things to do for a whole batch.
    """

    probability: float
    filling: Callable[[Tensor], Tensor]  # from images (B, C, H, W) to what takes the place of pixels

    tries: ClassVar[int] = 10
    columns: ClassVar[int] = 3 + 2 * tries  # whether, the area and the aspect of every try, and where it lies
    area: ClassVar[tuple[float, float]] = (0.02, 1 / 3)  # smallest and largest, of the image's
    aspect: ClassVar[float] = 0.3  # the smallest; the largest is its inverse

    def marks(self, draws: Any, size: tuple[int, int]) -> list[Any]:
        """Return which rows (B, H) and which columns (B, W) are erased, by uniform draws (B, columns) in [0, 1)."""
        whether, areas, aspects, lies = np.split(draws, np.cumsum([1, self.tries, self.tries]), 1)
        least, most = self.area
        areas = math.prod(size) * (least + (most - least) * areas)
        aspects = np.exp(math.log(self.aspect) * (1 - 2 * aspects))
        sides: Any = np.rint(np.sqrt((areas * aspects, areas / aspects)))  # (2, B, tries)
        fitting = (sides < np.reshape(size, (2, 1, 1))).all(0)
        sides = np.take_along_axis(sides, fitting.argmax(1)[None, :, None], 2)  # (2, B, 1), of the first that fits
        sides *= fitting.any(1, keepdims=True) & (whether <= self.probability)
        return [_marked(side, lie[:, None], length) for side, lie, length in zip(sides, lies.T, size, strict=True)]

    def __call__(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return images (B, C, H, W) with what is marked erased."""
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], self.filling(images), images)


def _marked(side: Any, lies: Any, length: int) -> Any:
    """Return (B, length): a part of so many pixels (B, 1), which lies anywhere between the ends."""
    start = np.floor(lies * (length - side + 1))
    line = np.arange(length)
    return (line >= start) & (line < start + side)
