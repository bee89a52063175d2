"""What of a norm's output is token, position and bias (3.2, equations 6 and 7)."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.analysis.comparable import EXACT, comparable, joint_norm, norm_before_attention
from lape.errors import RunError, UsageError
from lape.method import Grid, decompose
from lape.surgery.forwards import Forward
from lape.surgery.layers import grid_text
from lape.surgery.operation import positions
from lape.surgery.positions import Positions


@dataclass(frozen=True)
class Decomposition:
    """λ1, λ2, λ3 of LN_l(x_l) = λ1·LN_l(x̃_l) + λ2·LN_l(s_l) + λ3·β_l (6)-(7), as `decomposition` returns them.

    Example:
        >>> import torch
        >>> from lape.analysis import Decomposition
        >>> Decomposition(torch.zeros(3, 2, 4, 17), grid=(4, 4), error=0.0).of_patches.shape
        torch.Size([3, 2, 4, 16])
    """

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
    """Return how much of the output of each layer's norm comes from tokens, positions and bias: λ1, λ2, λ3 of (6)-(7).

    Works on a copy in float64, in evaluation mode, with each norm's own eps. x_l is the input of the norm before
    attention of layer l, s_l what the rungs have put into the stream so far (ω for the join `default`), x̃_l = x_l -
    s_l.

    Args:
        model: A model whose join is `default`, `shared` or `unshared`.
        batches: What the model takes, as images (B, C, H, W), all on one grid.

    Raises:
        UsageError: As `entering` does, where tokens and positions share no norm (`lape`, `lape-sharing`), where that
            norm is not a LayerNorm, and for batches of several grids or none.
        RunError: Where (6) does not hold to 1e-9.

    Example:
        >>> import torch
        >>> import lape
        >>> from lape.analysis import decomposition
        >>> model = lape.create_model("vit_nano_patch2_8", join="default", depth=2)
        >>> weights = decomposition(model, [torch.randn(4, 3, 8, 8)])
        >>> weights.mean.shape, weights.error < 1e-9  # λ1, λ2, λ3 of two layers
        (torch.Size([3, 2]), True)
    """
    record = comparable(model)
    if record.scheme.join.normed:
        raise UsageError(
            f"Equation 6 is about a norm that tokens and positions share, and join={record.scheme.join.name!r} gives "
            "positions one of their own. Take a model with join='default'."
        )
    if joint_norm(record) is not None:
        raise UsageError(
            f"This {record.host.name} normalises the sum of tokens and table before its first block, so no layer meets "
            "the table as it was. Take a model without that norm, or join='shared'."
        )
    device = next(model.parameters()).device
    if device.type == "mps":  # it has no float64
        device = torch.device("cpu")
    model = copy.deepcopy(model).to(device, torch.float64).eval()
    record = positions(model)
    norms: list[Any] = [norm_before_attention(record, block) for block in record.blocks]
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            raise UsageError(f"Equation 6 is about LayerNorm, and this model has {type(norm).__name__} in its place.")
    passed: list[tuple[Tensor, Tensor]] = []  # what enters each norm and what comes out
    running: list[Forward] = []  # that of each

    def note(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert record.forwards.latest is not None
        running.append(record.forwards.latest)
        passed.append((inputs[0], output))

    for norm in norms:
        norm.register_forward_hook(note)
    weights, grids, error = [], set[Grid](), 0.0
    for batch in batches:
        passed.clear()
        running.clear()
        model(batch.to(device, torch.float64 if batch.is_floating_point() else None))
        stream, layers = torch.zeros((), dtype=torch.float64, device=device), []
        for layer, (norm, tensors) in enumerate(zip(norms, passed, strict=True)):
            rung = running[layer].rung(layer)
            whole, normed = (_batched(record, tokens) for tokens in tensors)  # (B, N, D) each
            stream = stream if rung.residual is None else stream + rung.residual
            parts_of, missed = _decomposed(norm, whole, stream.expand_as(whole), normed)
            layers.append(parts_of.cpu())
            error = max(error, missed)
        grids.add(_grid_of(record, running[0], layers[0].shape[-1]))
        weights.append(torch.stack(layers, dim=1))
    if len(grids) != 1:
        received = ", ".join(grid_text(grid) for grid in sorted(grids)) or "no image at all"
        raise UsageError(f"Weights are compared on one grid of patches; received {received}. Give images of one size.")
    if not error <= EXACT:
        raise RunError(f"Equation 6 is missed by {error:.1e} of its largest number in float64; it holds to {EXACT:g}.")
    return Decomposition(torch.cat(weights, dim=2), grids.pop(), error)


def _grid_of(record: Positions, forward: Forward, count: int) -> Grid:
    """Return the grid of so many tokens; raise UsageError where patches are not in its order."""
    rows = forward.rows
    if record.host.kept is not None and rows is not None:
        in_order = torch.arange(count, device=rows.device).expand(len(rows), -1)
        if rows.shape != in_order.shape or not torch.equal(rows, in_order):
            raise UsageError(
                f"Weights are those of each place of an image, and this {record.host.name} shuffles its patches or "
                "drops some. Take a model of the same weights that leaves them as they are: a ViT."
            )
    return (1, count - record.prefix) if record.host.sequence and forward.grid[0] == 1 else forward.grid


def _decomposed(norm: Any, whole: Tensor, position: Tensor, normed: Tensor) -> tuple[Tensor, float]:
    """Return λ1, λ2, λ3 (3, B, N) of a norm's input (B, N, D), and by how much (6) misses what the norm made of it."""
    tokens = whole - position
    weights = torch.stack(decompose(tokens, position, norm.eps))
    first, second, third = weights[..., None]
    layer_norm = partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias)
    total = first * layer_norm(tokens, eps=norm.eps) + second * layer_norm(position, eps=norm.eps)
    if norm.bias is not None:
        total = total + third * norm.bias
    return weights, float((total - normed).abs().max() / normed.abs().max())


def _batched(record: Positions, tokens: Tensor) -> Tensor:
    """Return tokens (B, N, D), (B, H, W, D), (N, B, D) or (N, D) as (B, N, D)."""
    if tokens.ndim == 2:
        return tokens[None]
    return tokens.flatten(1, -2) if record.tokens_axis(tokens) else tokens.transpose(0, 1)
