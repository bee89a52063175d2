"""Biases of (1, heads, N, N) on attention logits, from the offset of two patches; zero for prefix tokens."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.embeddings.grid import Grid, distances, offsets
from lape.errors import UsageError


@dataclass(frozen=True)
class RelativeBias:
    """A 2-D relative bias in every layer: a table ((2H-1)(2W-1), heads), with or without a LayerNorm of its own.

    Example:
        >>> import torch
        >>> from lape.embeddings import RelativeBias
        >>> table = torch.randn(3 * 3, 2)  # 2×2 patches, two heads
        >>> RelativeBias(normed=False)(table, grid=(2, 2), prefix=1).shape
        torch.Size([1, 2, 5, 5])
    """

    normed: bool  # whether a LayerNorm over the keys follows the table
    learns: ClassVar[bool] = True
    planar: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()

    def __call__(self, table: Tensor, grid: Grid, prefix: int, norm: nn.Module | None = None) -> Tensor:
        """Return the bias (1, heads, N, N), zero for prefix tokens.

        Query i and key j read entry (Δrow + H - 1)(2W - 1) + Δcolumn + W - 1 of the table, Δ being i's minus j's.
        """
        height, width = grid
        row = torch.arange(height, device=table.device).repeat_interleave(width)  # (H·W,)
        column = torch.arange(width, device=table.device).repeat(height)
        delta_row = row[:, None] - row + height - 1
        delta_column = column[:, None] - column + width - 1
        bias = table[delta_row * (2 * width - 1) + delta_column].movedim(-1, 0)[None]  # (1, heads, H·W, H·W)
        if norm is not None:
            bias = norm(bias)  # over the keys
        return F.pad(bias, (prefix, 0, prefix, 0))


@dataclass(frozen=True)
class Alibi:
    """2D-ALiBi: -m_h·sqrt(Δrow² + Δcolumn²), the same in every layer, without parameters.

    The slopes of n heads are 2^(-8h/n), h = 1 to n, where n is a power of two; else those of the next lower power, and
    then every second one of twice as many heads (antofuller/CROMA).

    Example:
        >>> from lape.embeddings import Alibi
        >>> Alibi().slopes(3)
        [0.0625, 0.00390625, 0.25]
    """

    learns: ClassVar[bool] = False
    normed: ClassVar[bool] = False
    planar: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()

    def slopes(self, heads: int) -> list[float]:
        """Return m_h of every head."""
        power = 2 ** int(math.log2(heads))
        fewer, more = ([2 ** (-8 * (h + 1) / n) for h in range(n)] for n in (power, 2 * power))
        return fewer + more[::2][: heads - power]

    def refuse(self, name: str, heads: int) -> None:
        """Take every number of heads."""

    def make(self, grid: Grid, prefix: int, heads: int, device: torch.device) -> Tensor:
        """Return the bias (1, heads, N, N) that all layers share."""
        row, column = offsets(grid, device)
        slopes = torch.tensor(self.slopes(heads), device=device, dtype=row.dtype)
        return F.pad(-slopes[:, None, None] * distances(row, column), (prefix, 0, prefix, 0))[None]

    def of_layer(self, bias: Tensor, layer: int, depth: int) -> Tensor:
        """Return what one layer of `depth` adds, of what they share."""
        return bias


View = Callable[[Tensor, Tensor], Tensor]  # from Δrow and Δcolumn, key's minus query's, to whether the query sees it

HALVES: tuple[View, ...] = (
    lambda row, column: row <= 0,  # what lies above, in one's own row too
    lambda row, column: row >= 0,
    lambda row, column: column <= 0,
    lambda row, column: column >= 0,
)
CORNERS: tuple[View, ...] = (
    lambda row, column: (row <= 0) & (column <= 0),
    lambda row, column: (row <= 0) & (column >= 0),
    lambda row, column: (row >= 0) & (column <= 0),
    lambda row, column: (row >= 0) & (column >= 0),
)
TRIANGLES: tuple[View, ...] = (
    lambda row, column: row <= -column.abs(),
    lambda row, column: row >= column.abs(),
    lambda row, column: column <= -row.abs(),
    lambda row, column: column >= row.abs(),
)


def _and(one: View, other: View) -> View:
    return lambda row, column: one(row, column) & other(row, column)


_UP, _DOWN, _LEFT, _RIGHT = HALVES
EIGHTHS_1 = tuple(map(_and, TRIANGLES, (_LEFT, _LEFT, _UP, _UP)))
EIGHTHS_2 = tuple(map(_and, TRIANGLES, (_RIGHT, _RIGHT, _DOWN, _DOWN)))


def _everything(row: Tensor, column: Tensor) -> Tensor:
    return torch.ones_like(row, dtype=torch.bool)


Heads = tuple[tuple[View, float], ...]  # what each head sees, and its slope


def _alike(views: tuple[View, ...], slope: float = 1 / 2) -> Heads:
    return tuple((view, slope) for view in views)


_UNDIRECTED: Heads = tuple((_everything, slope) for slope in (1 / 4, 1 / 16, 1 / 64, 1 / 256))


@dataclass(frozen=True)
class LookHere:
    """LookHere (Fuller et al., arXiv 2405.13985): each head looks one way and loses sight with distance.

    What head h of layer l sees gets -g·s_l·m_h·sqrt(Δrow² + Δcolumn²), s falling evenly from 1.5 in the first layer to
    0.5 in the last; what it does not see is excluded. Without parameters.

    Example:
        >>> from lape.embeddings import BIASES
        >>> sorted(BIASES["lookhere-90"].heads)
        [4, 6, 12]
    """

    heads: Mapping[int, Heads] = field(hash=False, repr=False)  # by the number of heads
    slope: float = 1.0  # g
    rounded: bool = False  # to bfloat16, as the authors' tables are
    learns: ClassVar[bool] = False
    normed: ClassVar[bool] = False
    planar: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("slope", "rounded")

    def refuse(self, name: str, heads: int) -> None:
        """Raise UsageError for a number of heads that there are no directions for."""
        if heads not in self.heads:
            raise UsageError(
                f"pe={name!r} has directions for {', '.join(map(str, self.heads))} heads; this model has {heads}. "
                "Use pe='alibi-2d', which takes every number, or a model of so many heads."
            )

    def make(self, grid: Grid, prefix: int, heads: int, device: torch.device) -> Tensor:
        """Return the bias (1, heads, N, N) at layer scale 1; what is not seen is -inf."""
        row, column = offsets(grid, device)
        distance = self.slope * distances(row, column)
        biases = [torch.where(view(row, column), -slope * distance, -torch.inf) for view, slope in self.heads[heads]]
        return F.pad(torch.stack(biases), (prefix, 0, prefix, 0))[None]

    def of_layer(self, bias: Tensor, layer: int, depth: int) -> Tensor:
        """Return what one layer of `depth` adds, of what they share."""
        scaled = bias * (1.5 - layer / max(depth - 1, 1))
        return scaled.bfloat16().to(bias.dtype) if self.rounded else scaled


BIASES = {
    "relative": RelativeBias(normed=False),
    "relative-layernorm": RelativeBias(normed=True),
    "alibi-2d": Alibi(),
    # Six heads: four directed, two undirected, as the authors have it for 180 degrees.
    "lookhere-180": LookHere(
        {
            4: _alike(HALVES),
            6: _alike(HALVES) + _UNDIRECTED[:2],
            12: _alike(HALVES) + _alike(HALVES, 1 / 4) + _UNDIRECTED,
        }
    ),
    "lookhere-90": LookHere(
        {
            4: _alike(CORNERS),
            6: _alike(CORNERS) + _UNDIRECTED[:2],
            12: _alike(CORNERS) + _alike(TRIANGLES) + _UNDIRECTED,
        }
    ),
    "lookhere-45": LookHere(
        {
            4: _alike(EIGHTHS_1),
            6: _alike(EIGHTHS_1) + _UNDIRECTED[:2],
            12: _alike(EIGHTHS_1) + _alike(EIGHTHS_2) + _UNDIRECTED,
        }
    ),
}
