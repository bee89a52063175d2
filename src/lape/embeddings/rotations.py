"""Rotations (RoPE): queries and keys of patches are turned, pair of channels by pair, by angles of their places.

(x, y) becomes (x·cos a - y·sin a, x·sin a + y·cos a), so that the product of a query and a key of two patches depends
on the offset of the two alone. Values are not turned, and prefix tokens have angle 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lape.embeddings.grid import Grid, rows_and_columns
from lape.errors import UsageError

Turn = Callable[[Tensor, Tensor], Tensor]  # (B, heads, N, d) by (2, 1 or B, 1 or heads, N, d/2)


def turn_pairs(channels: Tensor, rotation: Tensor) -> Tensor:
    """Return (B, heads, N, d) turned in the pairs of channels (0, 1), (2, 3) and so on.

    Args:
        channels: Queries or keys.
        rotation: Cosine and sine of the angle of each pair, (2, 1 or B, 1 or heads, N, d/2).

    Example:
        >>> import torch
        >>> from lape.embeddings import turn_pairs
        >>> turn_pairs(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([0., 1., 1., 0.])
    """
    cosine, sine = rotation
    one, other = channels.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([one * cosine - other * sine, one * sine + other * cosine], dim=-1)
    return turned.flatten(-2).to(channels.dtype)


def turn_halves(channels: Tensor, rotation: Tensor) -> Tensor:
    """Return (B, heads, N, d) turned in the pairs of channels (0, d/2), (1, d/2 + 1) and so on.

    Args:
        channels: Queries or keys.
        rotation: Cosine and sine of the angle of each pair, (2, 1 or B, 1 or heads, N, d/2).

    Example:
        >>> import torch
        >>> from lape.embeddings import turn_halves
        >>> turn_halves(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([0., 1., 1., 0.])
    """
    cosine, sine = rotation
    one, other = channels.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1).to(channels.dtype)


def cosine_and_sine(angles: Tensor, prefix: int) -> Tensor:
    """Return angles (1 or heads, H·W, d/2) as (2, 1, 1 or heads, prefix + H·W, d/2); prefix tokens are not turned."""
    angles = F.pad(angles, (0, 0, prefix, 0))
    return torch.stack([angles.cos(), angles.sin()])[:, None]


def _falling(base: float, head_dim: int, like: Tensor) -> Tensor:
    """base^(-4k/d) for k from 0 to d/4 - 1."""
    return base ** (-4 * torch.arange(head_dim // 4, device=like.device, dtype=like.dtype) / head_dim)


def _counted(grid: Grid, over: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each patch, laid over a grid of so many rows and columns unless that is 0.

    The centres are laid upon one another, as images and tables are resized: (row + 1/2)·over/H - 1/2.
    """
    row, column = rows_and_columns(grid, device)
    if not over:
        return row, column
    height, width = grid
    return (row + 0.5) * over / height - 0.5, (column + 0.5) * over / width - 0.5


def _refuse_grid(over: int, name: str) -> None:
    if over < 0:
        raise UsageError(
            "grid is how many rows and columns of patches there are in training, 1 or more; received "
            f"{over}. For 14 rows and columns: pe='{name}:grid=14'."
        )


@dataclass(frozen=True)
class AxialRotation:
    """RoPE axial (Heo et al., arXiv 2403.13298): the first d/4 pairs turn with the column, the others with the row.

    The angles of pair k are column·f_k and row·f_k with f_k = theta^(-4k/d), in whole patches, in all layers alike.
    With `grid` every picture is laid over so many rows and columns, those of training: (row + 1/2)·grid/H - 1/2.

    Example:
        >>> import torch
        >>> from lape.embeddings import AxialRotation
        >>> AxialRotation().angles((1, 3), head_dim=4, device=torch.device("cpu"))[0, :, 0]
        tensor([0., 1., 2.], dtype=torch.float64)
    """

    theta: float = 100.0
    grid: int = 0  # rows and columns over which all others are laid; 0: patches are counted
    turn: ClassVar[Turn] = staticmethod(turn_pairs)
    learns: ClassVar[bool] = False
    planar: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("theta", "grid")

    def __post_init__(self) -> None:
        _refuse_grid(self.grid, "rope-axial")

    def angles(self, grid: Grid, head_dim: int, device: torch.device, training: bool = False) -> Tensor:
        """Return the angle of each patch and pair, (1, H·W, d/2)."""
        row, column = _counted(grid, self.grid, device)
        frequency = _falling(self.theta, head_dim, row)
        return torch.cat([column[:, None] * frequency, row[:, None] * frequency], dim=-1)[None]


@dataclass(frozen=True)
class MixedRotation:
    """RoPE mixed (Heo et al., arXiv 2403.13298): column·f + row·f' with learnt f and f' for every layer, head and pair.

    With `grid` rows and columns are laid over those of training, as in `AxialRotation`.

    Example:
        >>> from lape.embeddings import MixedRotation
        >>> MixedRotation().start(heads=3, head_dim=64).shape
        torch.Size([2, 3, 32])
    """

    theta: float = 10.0
    grid: int = 0  # rows and columns over which all others are laid; 0: patches are counted
    turn: ClassVar[Turn] = staticmethod(turn_pairs)
    learns: ClassVar[bool] = True
    planar: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("theta", "grid")

    def __post_init__(self) -> None:
        _refuse_grid(self.grid, "rope-mixed")

    def start(self, heads: int, head_dim: int) -> Tensor:
        """Return new frequencies (2, heads, d/2) of one layer: of the column, then of the row.

        Two directions at right angles a head, the first in a direction drawn evenly, each with the lengths
        theta^(-4k/d).
        """
        direction = 2 * math.pi * torch.rand(heads, 1)
        length = _falling(self.theta, head_dim, direction)
        towards = torch.cat([direction.expand(-1, head_dim // 4), direction.expand(-1, head_dim // 4) + math.pi / 2], 1)
        return torch.stack([towards.cos(), towards.sin()]) * length.repeat(2)

    def angles(self, frequencies: Tensor, grid: Grid) -> Tensor:
        """Return the angle of each head, patch and pair, (heads, H·W, d/2), in float32 at least."""
        row, column = _counted(grid, self.grid, frequencies.device)
        exact = torch.promote_types(frequencies.dtype, torch.float32)
        of_column, of_row = frequencies.to(exact)[:, :, None]  # (heads, 1, d/2) each
        return column.to(exact)[:, None] * of_column + row.to(exact)[:, None] * of_row


Scale = Callable[[int, int], tuple[int, int]]  # from (H, W) to what rows and columns are divided by

COORDINATES: dict[str, Scale] = {
    "separate": lambda height, width: (height, width),
    "max": lambda height, width: (max(height, width), max(height, width)),
    "min": lambda height, width: (min(height, width), min(height, width)),
}


@dataclass(frozen=True)
class CentredRotation:
    """DINOv3's RoPE (arXiv 2508.10104): the first d/4 pairs turn with the row, the others with the column.

    The angles of pair k are 2π·u / 100^(4k/d), u the centre of the patch, from -1 to 1 over the picture. In training
    the centres may be shifted, stretched along each side and enlarged, by amounts that are drawn once a forward.

    Example:
        >>> import torch
        >>> from lape.embeddings import ROTATIONS
        >>> ROTATIONS["rope-dinov3"].angles((2, 1), head_dim=4, device=torch.device("cpu"))[0, :, 0] / torch.pi
        tensor([-1.,  1.], dtype=torch.float64)
    """

    divided: Scale
    theta: float = 100.0
    shift: float = 0.0  # in training, what is added to each coordinate is drawn from -shift to shift
    jitter: float = 1.0  # and each is multiplied by something between 1/jitter and jitter
    rescale: float = 1.0  # and both by something between 1/rescale and rescale
    turn: ClassVar[Turn] = staticmethod(turn_halves)
    learns: ClassVar[bool] = False
    planar: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("theta", "shift", "jitter", "rescale")

    def __post_init__(self) -> None:
        if self.shift < 0 or self.jitter < 1 or self.rescale < 1:
            raise UsageError(
                "DINOv3's rotations are shifted in training by 0 and more, and stretched by factors of 1 and more; "
                f"received shift={self.shift:g}, jitter={self.jitter:g}, rescale={self.rescale:g}. As published: "
                "pe='rope-dinov3:rescale=2'."
            )

    def angles(self, grid: Grid, head_dim: int, device: torch.device, training: bool = False) -> Tensor:
        """Return the angle of each patch and pair, (1, H·W, d/2)."""
        row, column = rows_and_columns(grid, device)
        height, width = self.divided(*grid)
        centres = torch.stack([2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1], dim=-1)
        if training:
            centres = self._moved(centres)
        frequency = 2 * math.pi * _falling(self.theta, head_dim, row)
        return (centres[:, :, None] * frequency).flatten(1)[None]

    def _moved(self, centres: Tensor) -> Tensor:  # (H·W, 2)
        def drawn(count: int) -> Tensor:  # from -1 to 1
            return 2 * torch.rand(count, device=centres.device, dtype=centres.dtype) - 1

        if self.shift:
            centres = centres + self.shift * drawn(2)
        for most, count in ((self.jitter, 2), (self.rescale, 1)):
            if most != 1:
                centres = centres * most ** drawn(count)
        return centres


Rotation = AxialRotation | MixedRotation | CentredRotation

ROTATIONS: dict[str, Rotation] = {
    "rope-axial": AxialRotation(),
    "rope-mixed": MixedRotation(),
    "rope-dinov3": CentredRotation(COORDINATES["separate"]),
    "rope-dinov3-max": CentredRotation(COORDINATES["max"]),
    "rope-dinov3-min": CentredRotation(COORDINATES["min"]),
}
