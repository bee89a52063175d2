"""From images to a grid of tokens by overlapping steps; what timm's models ask of a patch embedding."""

from collections.abc import Sequence
from typing import NamedTuple

from timm.layers.helpers import to_2tuple
from torch import Tensor, nn

from lape.errors import UsageError
from lape.method import Grid

Size = int | tuple[int, int]


class Step(NamedTuple):
    """A window that slides over the map: a convolution, a pooling or an unfolding."""

    kernel: int
    stride: int
    padding: int = 0

    def sides(self, sides: Grid) -> Grid:
        """Return the sides of the map that it makes."""
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in sides)
        return height, width


class Stem(nn.Module):
    """Images (B, C, H, W) to tokens (B, rows, columns, D); `tokens` of a subclass does it.

    A last step whose windows do not overlap takes sides that its stride divides, as a patch embedding does; any other
    takes every size.
    """

    def __init__(self, img_size: Size, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        stride = 1
        for step in self.steps:
            stride *= step.stride
        self.patch_size = (stride, stride)
        cut = self.steps[-1].kernel == self.steps[-1].stride and self.steps[-1].padding == 0
        self.multiple_of = self.patch_size if cut else (1, 1)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Set the size of images that the model's table is for."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise UsageError(
                f"{type(self).__name__} has its strides from its steps, {self.patch_size[0]} in all; patch_size="
                f"{patch_size} was received. Leave patch_size out."
            )
        if img_size is not None:
            height, width = to_2tuple(img_size)
            self.img_size = (int(height), int(width))
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        """Return the grid (rows, columns) of images of a size; raise UsageError for a size that it cannot take."""
        sides = img_size
        for step in self.steps:
            sides = step.sides(sides)
        if min(sides) < 1 or any(side % unit for side, unit in zip(img_size, self.multiple_of, strict=True)):
            what = "must be larger" if min(sides) < 1 else f"must have sides that {self.multiple_of[0]} divides"
            raise UsageError(f"Images for {type(self).__name__} {what}; {img_size[0]}x{img_size[1]} was received.")
        return sides

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return how many pixels of a side are one token's."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        self.dynamic_feat_size((images.shape[2], images.shape[3]))  # refuses
        return self.tokens(images)

    def tokens(self, images: Tensor) -> Tensor:
        raise NotImplementedError
