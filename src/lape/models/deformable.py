"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159, equation 3) in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.method import Grid


class DeformableAttention(nn.Module):
    """Σ_h W_h Σ_l Σ_k A_hlk · V_h,l(reference + offset_hlk): every query looks at K points of every level.

    Query (B, N, D), its places of reference (N, 2) as (x, y) in [0, 1], features (B, Σ H·W, D) of `grids`: (B, N, D).
    """

    def __init__(self, dim: int, heads: int, points: int, levels: int, ratio: float) -> None:
        super().__init__()
        inner = int(dim * ratio)
        self.heads, self.points, self.levels = heads, points, levels
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Offsets start on rings about the place of reference, one direction a head; all points weigh alike."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rays = rays / rays.abs().amax(-1, keepdim=True)  # (heads, 2)
        rings = rays[:, None, None] * torch.arange(1, self.points + 1)[:, None]  # (heads, 1, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(rings.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        values = self.value_proj(features).unflatten(-1, (self.heads, -1))  # (B, Σ H·W, heads, d)
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2))  # (B, N, heads, levels, points, 2)
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        sizes = reference.new_tensor([(width, height) for height, width in grids])  # (levels, 2)
        places = reference[:, None, None, None] + offsets / sizes[:, None]
        return self.output_proj(sampled(values, grids, places, weights))


def sampled(values: Tensor, grids: Sequence[Grid], places: Tensor, weights: Tensor) -> Tensor:
    """Return Σ over levels and points of weight times the value at its place, bilinear and zero outside.

    Values (B, Σ H·W, heads, d), places (B, N, heads, levels, points, 2) as (x, y) in [0, 1], weights without the last
    axis: (B, N, heads·d).
    """
    batch, _, _, width = values.shape
    total = values.new_zeros(())
    levels = values.split([rows * columns for rows, columns in grids], dim=1)
    for number, (level, grid) in enumerate(zip(levels, grids, strict=True)):
        # Weighed and summed level by level: putting all levels into one tensor first takes a fifth more time.
        image = level.flatten(2).mT.reshape(-1, width, *grid)  # (B·heads, d, H, W)
        spots = (2 * places[:, :, :, number] - 1).transpose(1, 2).flatten(0, 1)  # (B·heads, N, points, 2)
        shares = weights[:, :, :, number].transpose(1, 2).flatten(0, 1)[:, None]  # (B·heads, 1, N, points)
        total = total + (F.grid_sample(image, spots, align_corners=False) * shares).sum(-1)
    return total.view(batch, -1, total.shape[-1]).mT  # (B·heads, d, N) to (B, N, heads·d)
