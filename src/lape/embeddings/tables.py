"""Tables ω of (1, N, D), which a join brings to the tokens: learnt, sinusoids, and a learnt function of coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.embeddings.grid import Grid, rows_and_columns
from lape.errors import UsageError

SPREAD = 0.02  # the standard deviation with which what is learnt of positions begins


def learnable(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return a new table (1, prefix + H·W, D), truncated normal with standard deviation 0.02.

    Example:
        >>> from lape.embeddings import learnable
        >>> learnable((2, 3), prefix=1, dim=8).shape
        torch.Size([1, 7, 8])
    """
    return nn.init.trunc_normal_(torch.empty(1, prefix + grid[0] * grid[1], dim), std=SPREAD)


def sinusoidal_1d(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return the table (1, prefix + H·W, D) whose row p is sin (even i) or cos (odd i) of p / 10000^(2⌊i/2⌋/D).

    Example:
        >>> from lape.embeddings import sinusoidal_1d
        >>> sinusoidal_1d((1, 2), prefix=0, dim=2)
        tensor([[[0.0000, 1.0000],
                 [0.8415, 0.5403]]])
    """
    return _sinusoid(torch.arange(prefix + grid[0] * grid[1]), dim)[None]


def sinusoidal_2d(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return the table (1, prefix + H·W, D): half the channels for the column, half for the row; prefix rows are zero.

    Raises:
        UsageError: Where 4 does not divide D: each half interleaves a sine and a cosine.

    Example:
        >>> from lape.embeddings import sinusoidal_2d
        >>> sinusoidal_2d((2, 2), prefix=1, dim=4)[0, 0]
        tensor([0., 0., 0., 0.])
    """
    if dim % 4:
        raise UsageError(f"A 2-D sinusoid needs a width that 4 divides; this model's is {dim}. Use pe='sinusoidal-1d'.")
    height, width = grid
    column = _sinusoid(torch.arange(width), dim // 2).expand(height, width, dim // 2)
    row = _sinusoid(torch.arange(height), dim // 2)[:, None].expand(height, width, dim // 2)
    patches = torch.cat([column, row], dim=-1).reshape(1, height * width, dim)
    return F.pad(patches, (0, 0, prefix, 0))


def _sinusoid(positions: Tensor, dim: int) -> Tensor:  # (P,) -> (P, dim)
    # The angle is rounded to float32 before its sine is taken, as the authors do.
    channel = torch.arange(dim, dtype=torch.float64)
    angle = (positions[:, None] / 10000 ** (2 * (channel // 2) / dim)).float()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


@dataclass(frozen=True)
class Table:
    """A kind of (1, N, D) table that a model stores: how it is made, and whether it learns.

    A learnable table is resized for a new grid, a fixed one is made anew.

    Example:
        >>> from lape.embeddings import TABLES
        >>> TABLES["sinusoidal-1d"].learns, TABLES["learnable"].make((2, 2), 0, 8).shape
        (False, torch.Size([1, 4, 8]))
    """

    make: Callable[[Grid, int, int], Tensor]
    learns: bool
    planar: bool = False  # it tells rows from columns
    stored: ClassVar[bool] = True  # as a parameter of its own
    options: ClassVar[tuple[str, ...]] = ()

    def holds(self, values: Tensor, grid: Grid, prefix: int) -> bool:
        """Return whether values (..., N, D) can be of this kind: a fixed table has its own, up to half precision."""
        rows, dim = values.shape[-2:]
        if self.learns or rows != prefix + grid[0] * grid[1]:
            return self.learns
        fixed = self.make(grid, prefix, dim).to(values.device).view_as(values)
        return torch.allclose(values.float(), fixed, rtol=0, atol=5e-3)


@dataclass(frozen=True)
class FourierTable:
    """A table that a small network makes of the coordinates of each patch, for every grid anew (Li et al., 2021).

    Example:
        >>> from lape.embeddings import TABLES
        >>> TABLES["fourier"].module(48)((2, 3), prefix=1).shape
        torch.Size([1, 7, 48])
    """

    features: int = 0  # F, the number of Fourier features; 0: as many as channels
    hidden: int = 32  # the width between the two layers
    gamma: float = 1.0  # frequencies are drawn with standard deviation 1 / gamma
    learns: ClassVar[bool] = True
    planar: ClassVar[bool] = True
    stored: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("features", "hidden", "gamma")

    def __post_init__(self) -> None:
        if self.features < 0 or self.features % 2 or self.hidden < 1 or self.gamma <= 0:
            raise UsageError(
                "A Fourier table has an even number of features (a cosine and a sine of each frequency), a hidden "
                f"width of 1 and more, and gamma above 0; received features={self.features}, hidden={self.hidden}, "
                f"gamma={self.gamma:g}. Leave them out, as pe='fourier'."
            )

    def module(self, dim: int, **new: Any) -> "FourierFeatures":
        """Return a new network for a model of D channels; `new` are the device and dtype of its parameters."""
        return FourierFeatures(self.features or dim, self.hidden, dim, self.gamma, **new)


class Frequencies(nn.Linear):
    """Wr, from (row, column) to F/2 angles."""

    def __init__(self, count: int, gamma: float, **new: Any) -> None:
        self.gamma = gamma
        super().__init__(2, count, bias=False, **new)

    def reset_parameters(self) -> None:
        """Draw them anew, normal with standard deviation 1 / gamma."""
        nn.init.normal_(self.weight, std=1 / self.gamma)


class FourierFeatures(nn.Module):
    """W2·gelu(W1·r + b1) + b2 with r = [cos(Wr·x); sin(Wr·x)] / sqrt(F), x = ((row + ½)/H, (column + ½)/W).

    The form is Algorithm 1 of Li et al. (arXiv 2106.02795), whose coordinates are not settled: these are ours. Prefix
    tokens get zeros.

    Example:
        >>> from lape.embeddings import FourierFeatures
        >>> sum(part.numel() for part in FourierFeatures(192, 32, 192, 1.0).parameters())
        12704
    """

    def __init__(self, features: int, hidden: int, dim: int, gamma: float, **new: Any) -> None:
        super().__init__()
        if features % 2:
            raise UsageError(
                f"Fourier features are a cosine and a sine of each frequency; {features} were asked for. Give an even "
                f"number, as pe='fourier:features={features + 1}'."
            )
        self.Wr = Frequencies(features // 2, gamma, **new)
        self.mlp = nn.Sequential(nn.Linear(features, hidden, **new), nn.GELU(), nn.Linear(hidden, dim, **new))

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in (self.Wr, self.mlp[0], self.mlp[2]):
            part.reset_parameters()  # pyright: ignore[reportCallIssue]

    def forward(self, grid: Grid, prefix: int) -> Tensor:
        """Return the table (1, prefix + H·W, D) of a grid."""
        weight = self.Wr.weight
        row, column = rows_and_columns(grid, weight.device)
        places = torch.stack([(row + 0.5) / grid[0], (column + 0.5) / grid[1]], dim=-1).to(weight.dtype)
        angles = self.Wr(places)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1) / sqrt(2 * angles.shape[-1])
        return F.pad(self.mlp(features)[None], (0, 0, prefix, 0))


TABLES = {
    "learnable": Table(learnable, learns=True),
    "sinusoidal-1d": Table(sinusoidal_1d, learns=False),
    "sinusoidal-2d": Table(sinusoidal_2d, learns=False, planar=True),
    "fourier": FourierTable(),
}
