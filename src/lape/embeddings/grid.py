"""Where patches are: the row and the column of each, and how far two are apart."""

import torch
from torch import Tensor

Grid = tuple[int, int]


def rows_and_columns(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each patch, row by row: two of (H·W,), in float64 where the device has it."""
    height, width = grid
    exact = torch.float32 if device.type == "mps" else torch.float64
    # Expanded, not repeated: the sizes stay open in ONNX.
    row = torch.arange(height, device=device, dtype=exact)[:, None].expand(height, width)
    return row.flatten(), torch.arange(width, device=device, dtype=exact).expand(height, width).flatten()


def offsets(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return Δrow and Δcolumn from each patch (query) to each (key): two of (H·W, H·W)."""
    row, column = rows_and_columns(grid, device)
    return row - row[:, None], column - column[:, None]


def distances(row: Tensor, column: Tensor) -> Tensor:
    """Return √(Δrow² + Δcolumn²) of offsets; torch.hypot has no translation to ONNX."""
    return (row**2 + column**2).sqrt()
