"""Position correlation (3.4, equation 12): which patches are alike to attention, in maps and in three numbers."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lape.analysis.comparable import EXACT, comparable, joint_norm, norm_before_attention, of_one_grid
from lape.errors import UsageError
from lape.method import Grid
from lape.surgery.positions import Positions


@dataclass(frozen=True)
class Correlation:
    """The position correlation of every layer: s_ij of equation 12, as `correlation` returns it.

    The paper shows these maps. Three numbers say what is to be seen in them, per layer and as a whole (`Shape`).

    Example:
        >>> import torch
        >>> from lape.analysis import Correlation
        >>> independent = Correlation(torch.eye(16, dtype=torch.float64)[None], grid=(4, 4))
        >>> independent.half_distance.item(), independent.two_dimensionality.item()
        (0.5, 1.0)
    """

    maps: Tensor  # (layers, H·W, H·W), float64
    grid: Grid  # (H, W)

    @property
    def reach(self) -> float:
        """The longest distance in the grid, in patches."""
        return math.dist((1, 1), self.grid)

    @property
    def token(self) -> int:
        """The patch at (⌊H/2⌋, ⌊W/2⌋): the centre, or the patch below and right of it."""
        height, width = self.grid
        return height // 2 * width + width // 2

    @property
    def of_token(self) -> Tensor:
        """Its similarity to every patch, as images (layers, H, W)."""
        return self.maps[:, self.token].unflatten(-1, self.grid)

    @cached_property
    def two_dimensionality(self) -> Tensor:
        """Whether similarity falls off along columns as along rows: the smaller fall over the larger, (layers,).

        A fall is 1 minus the mean similarity of the pairs of patches in one row (or one column), every distance from 1
        to min(H, W) - 1 counting alike. 1: similarity falls alike in both directions; 0: in one of them not at all;
        nan: in neither, or the grid is a line.
        """
        height, width = self.grid
        pairs = self.maps.unflatten(2, self.grid).unflatten(1, self.grid)  # (layers, H, W, H, W)
        in_a_row, in_a_column = pairs.diagonal(dim1=1, dim2=3), pairs.diagonal(dim1=2, dim2=4)  # (layers, W, W, H) ...
        reach = range(1, min(height, width))
        if not reach:
            return self.maps.new_full((len(self.maps),), torch.nan)
        falls = torch.stack(
            [
                1 - torch.stack([some.diagonal(far, 1, 2).mean((1, 2)) for far in reach]).mean(0)
                for some in (in_a_row, in_a_column)
            ]
        )
        small, large = falls.clamp(min=0).aminmax(dim=0)
        return torch.where(large > EXACT, small / large, torch.nan)

    @cached_property
    def half_distance(self) -> Tensor:
        """How far similarity reaches, in patches: where its mean has fallen to half of that at distance 0, (layers,).

        The mean is over all pairs of patches at one Euclidean distance, and runs straight between those that occur. inf
        where it stays above half in the whole grid; nan where it is not positive at distance 0.
        """
        height, width = self.grid
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
        kinds, kind = squared.flatten().unique(return_inverse=True)
        total = self.maps.new_zeros(len(self.maps), len(kinds)).index_add(1, kind, self.maps.flatten(1))
        profiles, distances = total / kind.bincount(), kinds.double().sqrt()
        return torch.stack([_crossing(distances, profile) for profile in profiles])

    @cached_property
    def layer_difference(self) -> Tensor:
        """How far a layer is from the others: |s_ij - s'_ij|, the mean over i ≠ j and the other layers, (layers,).

        nan where there is one layer, or one patch.
        """
        layers, patches, _ = self.maps.shape
        apart = torch.stack([(self.maps - one).abs().sum((1, 2)) for one in self.maps])  # no difference where i = j
        return apart.sum(1) / (patches * (patches - 1)) / (layers - 1)

    @cached_property
    def shape(self) -> "Shape":
        """The three numbers over all layers: the mean, the median (of two in the middle the lower), the mean."""
        return Shape(
            float(self.two_dimensionality.nanmean()),
            float(self.half_distance.nanmedian()),
            float(self.layer_difference.mean()),
        )


@dataclass(frozen=True)
class Shape:
    """The three numbers of one model's correlation maps; `Correlation.shape` is one.

    Example:
        >>> import lape
        >>> from lape.analysis import correlation
        >>> 0 <= correlation(lape.create_model("vit_nano_patch2_8", depth=2)).shape.two_dimensionality <= 1
        True
    """

    two_dimensionality: float  # 0: similarity falls along rows or columns alone; 1: along both alike
    half_distance: float  # where similarity has fallen to half, in patches
    layer_difference: float  # how different the maps of the layers are


def _crossing(distances: Tensor, profile: Tensor) -> Tensor:
    """Return the first distance at which a profile (distances,) has fallen to half of its start."""
    half = profile[0] / 2
    below = (profile <= half).nonzero()
    if half <= 0:
        return profile.new_tensor(torch.nan)
    if not len(below):
        return profile.new_tensor(torch.inf)
    after = int(below[0])
    share = (profile[after - 1] - half) / (profile[after - 1] - profile[after])
    return distances[after - 1] + share * (distances[after] - distances[after - 1])


@torch.no_grad()
def entering(model: nn.Module, grid: Grid | None = None) -> Tensor:
    """Return what the position of each patch brings to the attention of each layer, (layers, H·W, D) in float64.

    Under `lape` and `lape-sharing`, that is p_l itself. Where positions are in the residual stream, it is LN_l(s_l)
    with layer l's own norm before attention and s_l the sum of all that the rungs have put into the stream so far: ω
    for `default`, (l + 1)·ω for `shared`, ω^(0) + ... + ω^(l) for `unshared`. Equation 6 holds for s_l as it does for
    ω, so tokens meet λ2·LN_l(s_l), and λ2, one positive number per token, does not change the cosine. A norm of tokens
    and table together, before the first block, is treated in the same way. Prefix tokens are left out.

    Args:
        model: A model that a join is applied to.
        grid: (rows, columns) of patches; None stands for the model's own grid.

    Raises:
        UsageError: Where no join is applied, where no table is joined with tokens, where it is joined in two ways at
            once, where the layers have no common grid, and where the stream does not keep what is put into it.

    Example:
        >>> import lape
        >>> from lape.analysis import entering
        >>> entering(lape.create_model("vit_nano_patch2_8", depth=2), grid=(3, 5)).shape
        torch.Size([2, 15, 48])
    """
    record = comparable(model)
    height, width = _grid(record, grid)
    stream, layers, joint = torch.zeros((), dtype=torch.float64), [], joint_norm(record)
    for rung, block in zip(record.ladder((height, width)), record.blocks, strict=True):
        if rung.residual is not None:
            stream = stream + rung.residual.double().cpu()
        if joint is not None and not layers:
            stream = _normed(joint, stream)
        entered = (
            _normed(norm_before_attention(record, block), stream)
            if rung.attention is None
            else rung.attention.double().cpu()
        )
        layers.append(entered[0, -height * width :])  # patches come after all prefix tokens
    return torch.stack(layers)


def _grid(record: Positions, grid: Grid | None) -> Grid:
    height, width = record.own_grid() if grid is None else grid
    if min(height, width) < 1:
        raise UsageError(f"A grid has a row and a column of patches at least; received {(height, width)}.")
    return height, width


def _normed(norm: nn.Module, position: Tensor) -> Tensor:
    """Apply a model's norm to what it has put into the stream, in float64."""
    state = {name: value.double().cpu() for name, value in norm.state_dict().items()}
    return functional_call(norm, state, (position,))


def correlation(model: nn.Module, grid: Grid | None = None) -> Correlation:
    """Return the position correlation of every layer: s_ij = cos(e_i, e_j) with e = `entering(model, grid)` (12).

    A row of zeros has similarity 0 to all. A model without a table has what its attention makes of two patches of equal
    content (not in the paper): with a rotation by angles a, s_ij is the mean of cos(a_i - a_j) over heads and pairs of
    channels; with a bias b on the logits, the mean of exp(b_ij - b_ii) over heads.

    Args:
        model: A model that a join is applied to.
        grid: (rows, columns) of patches; None stands for the model's own grid.

    Raises:
        UsageError: As `entering` does, and for a model without a table, a rotation or a bias, or with both of these.

    Example:
        >>> import lape
        >>> from lape.analysis import correlation
        >>> maps = correlation(lape.create_model("vit_nano_patch2_8", depth=2)).maps
        >>> maps.shape, maps.diagonal(dim1=1, dim2=2).mean().item() > 0.999
        (torch.Size([2, 16, 16]), True)
    """
    record = of_one_grid(model)
    if record.scheme.embedding.table is None:
        at = _grid(record, grid)
        return Correlation(_within_attention(record, at), at)
    unit = F.normalize(entering(model, grid), dim=-1, eps=1e-30)
    return Correlation(unit @ unit.mT, _grid(record, grid))


@torch.no_grad()
def _within_attention(record: Positions, grid: Grid) -> Tensor:
    """Return how alike two patches of equal content are to each layer by bias or rotation, (layers, H·W, H·W)."""
    patches = grid[0] * grid[1]
    layers = []
    for rung in record.ladder(grid):
        if (rung.bias is None) == (rung.rotation is None):
            kind = "a bias and a rotation" if rung.bias is not None else "neither a table nor a bias nor a rotation"
            raise UsageError(
                f"Position correlation is defined for a table, a bias or a rotation, and "
                f"pe={record.scheme.embedding.name!r} has {kind}. Use a model with one of them, as pe='learnable'."
            )
        if rung.rotation is not None:
            parts = rung.rotation.double().cpu()[:, 0, :, -patches:]  # cosine and sine (2, heads, H·W, d/2)
            alike = torch.einsum("phic,phjc->ij", parts, parts) / (parts.shape[1] * parts.shape[3])
        else:
            assert rung.bias is not None
            bias = rung.bias.double().cpu()[0, :, -patches:, -patches:]
            alike = (bias - bias.diagonal(dim1=1, dim2=2)[:, :, None]).exp().mean(0)
        layers.append(alike)
    return torch.stack(layers)
