"""What attention is told about positions, in numbers (3.2 to 3.4): any join, table and grid, trained or fresh."""

import copy
import math
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
from lape.positions import Positions, by
from lape.surgery import positions

# What float64 is trusted to: equation 6 may miss by so much beside the largest number that it makes, and a similarity
# that falls by less does not fall.
EXACT = 1e-9


# --- Position correlation (12) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """s_ij of equation 12, the cosine similarity of what the positions of patches i and j bring to attention.

    The paper shows these maps. Three numbers say what is to be seen in them, per layer and as a whole (`Shape`).
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
    tokens meet λ2·LN_l(s_l), and λ2, one positive number per token, leaves the cosine as it is. A norm of tokens and
    table together, before the first block, is met in the same way.

    Prefix tokens are left out. Raises UsageError where no join is applied, where no table is joined with tokens, where
    it is joined in two ways at once, where the layers have no common grid, and where the stream does not keep what is
    put into it.
    """
    record = _comparable(model)
    height, width = record.own_grid() if grid is None else grid
    if min(height, width) < 1:
        raise UsageError(f"A grid has a row and a column of patches at least; received {(height, width)}.")
    stream, layers, joint = torch.zeros((), dtype=torch.float64), [], _joint_norm(record)
    for rung, block in zip(record.ladder((height, width)), record.blocks, strict=True):
        if rung.residual is not None:
            stream = stream + rung.residual.double().cpu()
        if joint is not None and not layers:
            stream = _normed(joint, stream)
        entered = _normed(_norm_of(record, block), stream) if rung.attention is None else rung.attention.double().cpu()
        layers.append(entered[0, -height * width :])  # patches come after all prefix tokens
    return torch.stack(layers)


def _normed(norm: nn.Module, position: Tensor) -> Tensor:
    """Apply a model's norm to what it has put into the stream, in float64."""
    state = {name: value.double().cpu() for name, value in norm.state_dict().items()}
    return functional_call(norm, state, (position,))


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
    def of_prefix(self) -> Tensor:
        """The weights of prefix tokens alone, (3, layers, images, prefix)."""
        return self.weights[..., : -self.grid[0] * self.grid[1]]

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
    Raises UsageError as `entering` does, where the join has no norm that tokens and positions share, where that norm is
    no LayerNorm, and for batches of several grids or none; RunError where (6) does not hold to 1e-9.
    """
    record = _comparable(model)
    if record.scheme.join.normed:
        raise UsageError(
            f"Equation 6 is about a norm that tokens and positions share, and join={record.scheme.join.name!r} gives "
            "positions one of their own. Take a model with join='default'."
        )
    if _joint_norm(record) is not None:
        raise UsageError(
            f"This {record.host.name} normalises the sum of tokens and table before its first block, so no layer meets "
            "the table as it was. Take a model without that norm, or join='shared'."
        )
    device = next(model.parameters()).device
    if device.type == "mps":  # it has no float64
        device = torch.device("cpu")
    model = copy.deepcopy(model).to(device, torch.float64).eval()
    record = positions(model)
    norms: list[Any] = [_norm_of(record, block) for block in record.blocks]
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            raise UsageError(f"Equation 6 is about LayerNorm, and this model has {type(norm).__name__} in its place.")
    seen: list[tuple[Tensor, Tensor]] = []
    for norm in norms:
        norm.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    weights, grids, error = [], set(), 0.0
    for batch in batches:
        seen.clear()
        model(batch.to(device, torch.float64 if batch.is_floating_point() else None))
        grids.add(record.forward.grid)
        stream, layers = torch.zeros((), dtype=torch.float64, device=device), []
        for rung, norm, passed in zip(record.ladder(record.forward.grid), norms, seen, strict=True):
            whole, normed = (_batched(record, tokens) for tokens in passed)  # (B, N, D) each
            stream = stream if rung.residual is None else stream + rung.residual
            parts_of, missed = _decomposed(norm, whole, stream.expand_as(whole), normed)
            layers.append(parts_of.cpu())
            error = max(error, missed)
        weights.append(torch.stack(layers, dim=1))
    if len(grids) != 1:
        found = ", ".join(by(grid) for grid in sorted(grids)) or "no image at all"
        raise UsageError(f"Weights are compared on one grid of patches; received {found}. Give images of one size.")
    if not error <= EXACT:
        raise RunError(f"Equation 6 is missed by {error:.1e} of its largest number in float64; it holds to {EXACT:g}.")
    return Decomposition(torch.cat(weights, dim=2), grids.pop(), error)


def _decomposed(norm: Any, whole: Tensor, position: Tensor, normed: Tensor) -> tuple[Tensor, float]:
    """Return λ1, λ2, λ3 (3, B, N) of a norm's input (B, N, D), and by how much (6) misses what the norm made of it."""
    tokens = whole - position
    found = torch.stack(decompose(tokens, position, norm.eps))
    first, second, third = found[..., None]
    layer_norm = partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias)
    total = first * layer_norm(tokens, eps=norm.eps) + second * layer_norm(position, eps=norm.eps)
    if norm.bias is not None:
        total = total + third * norm.bias
    return found, float((total - normed).abs().max() / normed.abs().max())


def _batched(record: Positions, tokens: Tensor) -> Tensor:
    """Return tokens (B, N, D), (N, B, D) or (N, D) as (B, N, D)."""
    if tokens.ndim == 2:
        return tokens[None]
    return tokens if record.tokens_axis(tokens) else tokens.transpose(0, 1)


def _comparable(model: nn.Module) -> Positions:
    """Return the positions of a model whose layers can be set beside one another; raises UsageError as `entering`."""
    record = positions(model)
    scheme = record.scheme
    if record.crossings:
        raise UsageError(
            f"The analysis compares layers on one grid; a {record.host.name}'s have several. Take a model of one stage."
        )
    if record.host.stream_is_normed and not scheme.join.normed:
        raise UsageError(
            f"A {record.host.name} puts a norm on its residual stream, so what join={scheme.join.name!r} adds "
            "there does not reach later layers as it was. Use join='lape' or 'lape-sharing'."
        )
    if scheme.start.preserves:
        raise UsageError(
            f"start={scheme.start.name!r} brings positions to attention in two ways, and how they add up depends "
            "on the tokens. Take a model with start='fresh'."
        )
    if scheme.embedding.table is None:
        raise UsageError(
            f"The analysis is about the rows of a table, and pe={scheme.embedding.name!r} joins no table with "
            "the tokens. Use a model with one, as pe='learnable'."
        )
    return record


def _joint_norm(record: Positions) -> nn.Module | None:
    """Return the norm that ω goes through with the tokens before the first block, where there is one."""
    path = record.host.joint_norm
    norm = record.model.get_submodule(path) if path and record.scheme.with_tokens else None
    return None if isinstance(norm, nn.Identity) else norm


def _norm_of(record: Positions, block: nn.Module) -> nn.Module:
    """Return the norm before a block's attention."""
    return parts(block, block_row(record.host, block).norms)[0]
