"""What attention is told about positions, in numbers (3.2 to 3.4): any join, table and grid, trained or fresh."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lape.errors import RunError, UsageError
from lape.hosts import block_row, parts
from lape.method import Grid, decompose
from lape.positions import Positions
from lape.surgery import positions

EXACT = 1e-9  # what equation 6 may miss by in float64, beside the largest number that it makes


# --- Position correlation (12) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """s_ij of equation 12, the cosine similarity of what the positions of patches i and j bring to attention.

    The paper shows these maps. Three numbers say what is to be seen in them, per layer and as a whole (`Shape`).
    """

    maps: Tensor  # (layers, H·W, H·W), float64
    grid: Grid  # (H, W)

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
        to min(H, W) - 1 counting alike. 1: both directions are told apart equally; 0: one of them not at all; nan:
        neither is, or the grid is a line.
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
        """How far a layer is from the others: |s_ij - s'_ij|, the mean over i ≠ j and the other layers, (layers,)."""
        layers, patches, _ = self.maps.shape
        apart = torch.stack([(self.maps - one).abs().sum((1, 2)) for one in self.maps])  # no difference where i = j
        return apart.sum(1) / (patches * (patches - 1)) / (layers - 1)

    @cached_property
    def shape(self) -> "Shape":
        """The three numbers over all layers: mean, median and mean."""
        return Shape(
            float(self.two_dimensionality.nanmean()),
            float(self.half_distance.nanmedian()),
            float(self.layer_difference.mean()),
        )


@dataclass(frozen=True)
class Shape:
    """What one model's correlation looks like: how two-dimensional, how local, how different from layer to layer."""

    two_dimensionality: float
    half_distance: float
    layer_difference: float


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

    Where LaPE or LaPE (sharing) joins ω, that is p_l itself. Where positions are in the residual stream, it is
    LN_l(s_l) with layer l's own norm before attention and s_l all that the rungs have put into the stream so far: ω for
    `default`, (l + 1)·ω for `shared`, ω^(0) + ... + ω^(l) for `unshared`. Equation 6 holds for s_l as it does for ω, so
    tokens meet λ2·LN_l(s_l), and λ2, one positive number per token, leaves the cosine as it is.

    Prefix tokens are left out. Raises UsageError where no join is applied, where no table is joined with tokens, and
    where the layers have no common grid or the stream does not keep what is put into it.
    """
    record = _comparable(model)
    height, width = record.own_grid() if grid is None else grid
    stream, layers = torch.zeros((), dtype=torch.float64), []
    for rung, block in zip(record.ladder((height, width)), record.blocks, strict=True):
        if rung.residual is not None:
            stream = stream + rung.residual.double().cpu()
        if rung.attention is not None:
            entered = rung.attention.double().cpu()
        else:
            norm = _norm_of(record, block)
            state = {name: value.double().cpu() for name, value in norm.state_dict().items()}
            entered = functional_call(norm, state, (stream,))
        layers.append(entered[0, -height * width :])  # patches come after all prefix tokens
    return torch.stack(layers)


def correlation(model: nn.Module, grid: Grid | None = None) -> Correlation:
    """Return the position correlation of every layer of an operated model, for its own grid of patches or another.

    s_ij = cos(e_i, e_j), e = `entering(model, grid)`; a row of zeros has similarity 0 to all. Raises UsageError as
    `entering` does.
    """
    unit = F.normalize(entering(model, grid), dim=-1, eps=1e-30)
    return Correlation(unit @ unit.mT, positions(model).own_grid() if grid is None else grid)


# --- Decomposition (6)-(7) ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decomposition:
    """λ1, λ2, λ3 of LN_l(x_l) = λ1·LN_l(x̃_l) + λ2·LN_l(s_l) + λ3·β_l (6)-(7), for every layer, image and token."""

    weights: Tensor  # (3, layers, images, N), float64; prefix tokens first
    grid: Grid  # (H, W)
    error: float  # the largest difference between the sides of (6), beside the largest number on them

    @property
    def of_patches(self) -> Tensor:
        """The weights of patches alone, (3, layers, images, H·W)."""
        return self.weights[..., -self.grid[0] * self.grid[1] :]

    @property
    def mean(self) -> Tensor:
        """Their mean over images and patches, (3, layers)."""
        return self.of_patches.mean((2, 3))

    @property
    def spread(self) -> Tensor:
        """Their standard deviation over images and patches, (3, layers)."""
        return self.of_patches.flatten(2).std(2, correction=0)

    @property
    def of_positions(self) -> Tensor:
        """The mean of λ2 over the images, as images (layers, H, W)."""
        return self.of_patches[1].mean(1).unflatten(-1, self.grid)


@torch.no_grad()
def decomposition(model: nn.Module, batches: Iterable[Tensor]) -> Decomposition:
    """Return what of a layer's norm belongs to tokens, positions and bias, for batches of what the model takes.

    Works on a copy in float64, in evaluation mode, with each norm's own eps. x_l is what enters the norm before
    attention of layer l, s_l what the rungs have put into the stream so far (ω for the join default), x̃_l = x_l - s_l.
    Raises UsageError as `entering` does, where the join has no norm that tokens and positions share, and where that
    norm is no LayerNorm; RunError where (6) does not hold to 1e-9.
    """
    record = _comparable(model)
    if record.scheme.join.normed:
        raise UsageError(
            f"Equation 6 is about a norm that tokens and positions share, and join={record.scheme.join.name!r} gives "
            "positions one of their own. Take a model with join='default'."
        )
    some = next(model.parameters())
    model = copy.deepcopy(model).double().eval()
    record = positions(model)
    norms: list[Any] = [_norm_of(record, block) for block in record.blocks]
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            raise UsageError(f"Equation 6 is about LayerNorm, and this model has {type(norm).__name__} in its place.")
    entered: list[Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    weights, error = [], 0.0
    for images in batches:
        entered.clear()
        model(images.to(some.device, torch.float64))
        stream, layers = torch.zeros((), dtype=torch.float64, device=some.device), []
        for rung, norm, whole in zip(record.ladder(record.forward.grid), norms, list(entered), strict=True):
            if rung.residual is not None:
                stream = stream + record.laid_out(rung.residual, whole)
            position = stream.expand_as(whole)
            tokens = whole - position
            parts_of = decompose(tokens, position, norm.eps)
            first, second, third = (part[..., None] for part in parts_of)
            normed = partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias)
            found = first * normed(tokens, eps=norm.eps) + second * normed(position, eps=norm.eps)
            found = found if norm.bias is None else found + third * norm.bias
            expected = normed(whole, eps=norm.eps)
            error = max(error, float((found - expected).abs().max() / expected.abs().max()))
            layers.append(torch.stack(parts_of).cpu())
        weights.append(torch.stack(layers, dim=1))
    if error > EXACT:
        raise RunError(f"Equation 6 is missed by {error:.1e} of its largest number in float64; it holds to {EXACT:g}.")
    return Decomposition(torch.cat(weights, dim=2), record.forward.grid, error)


def _comparable(model: nn.Module) -> Positions:
    """Return the positions of a model whose layers can be set beside one another; raises UsageError as `entering`."""
    record = positions(model)
    if record.crossings:
        raise UsageError(f"Position correlation compares layers on one grid; a {record.host.name}'s have several.")
    if record.host.stream_is_normed and not record.scheme.join.normed:
        raise UsageError(
            f"A {record.host.name} puts a norm on its residual stream, so what join={record.scheme.join.name!r} adds "
            "there does not reach later layers as it was. Use join='lape' or 'lape-sharing'."
        )
    if record.scheme.embedding.table is None:
        raise UsageError(
            f"The analysis is about the rows of a table, and pe={record.scheme.embedding.name!r} joins no table with "
            "the tokens. Use a model with one, as pe='learnable'."
        )
    return record


def _norm_of(record: Positions, block: nn.Module) -> nn.Module:
    """Return the norm before a block's attention."""
    return parts(block, block_row(record.host, block).norms)[0]
