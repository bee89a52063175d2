"""What a row says of a model, held against what the model does: the norm before attention, the grid of patches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lape.errors import UsageError
from lape.hosts import Block, Host, block_row, pair, parts, value_at
from lape.surgery.building import dtype_and_device
from lape.surgery.hooks import called
from lape.surgery.layers import grid_text
from lape.surgery.positions import Positions

FEW = 8  # tokens that a block is tried with
MANY = 1024  # and at most


def refuse_norms(record: Positions) -> None:
    """Raise UsageError for a row whose norm does not stand before attention: one block of each class is tried."""
    for block in {type(block): block for block in record.blocks}.values():
        row = block_row(record.host, block)
        if _reaches_others(record, block, row) is False:
            raise UsageError(norm_elsewhere(record.host, block, row))


def norm_elsewhere(host: Host, block: nn.Module, row: Block) -> str:
    """Return what is said of a norm that does not stand before attention."""
    return (
        f"The row of {host.name!r} names {row.norms!r} as the norm before attention, and what it hands out at one "
        f"token of a {type(block).__name__} changes that token alone: it stands before an MLP, or behind attention. "
        "Give lape.Block the path to the norm whose output enters attention."
    )


def _reaches_others(record: Positions, block: nn.Module, row: Block) -> bool | None:
    """Whether a block brings to other tokens what its norm hands out at one; None: this block cannot be tried so."""
    unit, some = called(block, row), dtype_and_device(record.model)
    compiled = getattr(unit, "_compiled_call_impl", None) is not None
    if some["device"].type == "meta" or not some["dtype"].is_floating_point or row.tokens or compiled:
        return None
    (rows, columns), batch_first = record.grid, value_at(record.model, record.host.batch_first)
    shapes = [(FEW,), (record.prefix + rows * columns,), (rows, columns)]
    modes = {part: part.training for part in unit.modules()}
    try:
        for part in modes:
            part.training = False
        for sides in (sides for sides in shapes if math.prod(sides) <= MANY):
            shape = (1, *sides, record.width) if batch_first else (*sides, 1, record.width)
            tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**some)
            try:
                return reaches_others(partial(unit, tokens), parts(block, row.norms), row)
            except Exception:  # another shape is wanted, or more than tokens
                continue
        return None
    finally:
        for part, mode in modes.items():
            part.training = mode


def reaches_others(run: Callable[[], Any], norms: list[nn.Module], row: Block) -> bool | None:
    """Whether a run of a block brings to other tokens what its norms hand out at the first one.

    None: what they hand out changes nothing at all, so nothing is known.
    """
    outputs = []
    for amount in (0.0, 1.0):
        handles = [norm.register_forward_hook(partial(_moved, amount)) for norm in norms]
        try:
            with torch.no_grad():
                output = run()
        finally:
            for handle in handles:
                handle.remove()
        outputs.append(output[row.tokens] if isinstance(output, tuple) else output)
    still, moved = outputs
    changed = (still != moved).any(-1).flatten()
    if not changed.any():
        return None
    return int(changed.sum()) > 1


def _moved(amount: float, norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Move what a norm hands out at the first token, (B, N, D), (N, B, D) or (B, H, W, D), of the first image."""
    moved = output.clone()
    direction = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype, device=output.device).sin()
    moved.view(-1, output.shape[-1])[0] += amount * direction
    return moved


@dataclass
class PatchGrid:
    """A hook on the convolution that cuts an image into patches: it refuses a row that gives them another grid.

    So that a wrong grid and a wrong prefix are found where their numbers of rows add up to those of the table.
    """

    positions: Positions

    def __call__(self, patches: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Compare the grid of what the convolution hands out, (B, D, H, W)."""
        positions, host = self.positions, self.positions.host
        if torch.compiler.is_compiling() or isinstance(output, fx.Proxy):
            return
        if isinstance(host.grid, tuple) and tuple(inputs[0].shape[-2:]) != pair(
            value_at(positions.model, host.grid[0])
        ):
            return  # an image of another size than the table's
        (rows, columns), (height, width) = positions.own_grid(), output.shape[-2:]
        if (height, width) != (rows, columns) and height * width <= positions.prefix + rows * columns:
            raise UsageError(
                f"The row of {host.name!r} says that the patches have the grid {grid_text((rows, columns))} behind "
                f"{positions.prefix} other tokens, and the model cuts this image into {grid_text((height, width))}. "
                "Mend the row's grid and prefix."
            )


def cut_by(positions: Positions) -> nn.Module | None:
    """Return the convolution that cuts images into patches: to the width of tokens, and without overlap."""
    inside = {part for block in positions.blocks for part in block.modules()}
    return next(
        (
            part
            for part in positions.model.modules()
            if isinstance(part, nn.Conv2d)
            and part not in inside
            and part.out_channels == positions.width
            and part.kernel_size == part.stride
            and part.stride != (1, 1)
        ),
        None,
    )
