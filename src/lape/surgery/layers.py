"""The layers of a model as the ladder meets them: blocks in their order, each on the grid of its stage."""

from dataclasses import dataclass

from torch import Tensor, nn

from lape.hosts import Host, parts
from lape.method import Grid
from lape.surgery.proxy import Proxies


@dataclass(frozen=True)
class Layer:
    """One layer, the grid of its tokens, and what they came through from the stage before."""

    block: nn.Module
    grid: Grid
    crossing: nn.Module | None


def layers_of(model: nn.Module, host: Host, grid: Grid) -> list[Layer]:
    """Return the layers that a model has now, for a grid of (rows, columns) patches, which every crossing halves."""
    if host.stages is None:
        return [Layer(block, grid, None) for block in parts(model, host.blocks)]
    layers: list[Layer] = []
    for stage in parts(model, host.stages.path):
        crossing = getattr(stage, host.stages.crossing)
        if isinstance(crossing, nn.Identity):
            crossing = None
        if crossing is not None:
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        for number, block in enumerate(parts(stage, host.blocks)):
            layers.append(Layer(block, grid, None if number else crossing))
    return layers


def cross_stage(merging: nn.Module, position: Tensor, grid: Grid, proxies: Proxies) -> Tensor:
    """Take a position map (1, H·W, C) to the next stage (1, ⌈H/2⌉·⌈W/2⌉, C').

    It goes the tokens' road, the same 2×2 gather and the same linear reduction, around a norm of its own: this is our
    reading of the paper, which does not say how the PE crosses a stage of a Swin Transformer.
    """
    road, _ = proxies.of(merging, {"norm": merging.pe_norm})
    return proxies.base.forward(road, position.unflatten(1, grid)).flatten(1, 2)


def same(grid: Grid, other: Grid) -> bool:
    """Return whether two grids are equal. One that torch.export leaves open never is: its graph has to serve all."""
    return all(isinstance(side, int) for side in (*grid, *other)) and grid == other


def grid_text(grid: Grid) -> str:
    """Return a grid as people write it.

    >>> grid_text((14, 14))
    '14x14'
    """
    return f"{grid[0]}x{grid[1]}"
