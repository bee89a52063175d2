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
    maps = values.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in grids], dim=-1)
    spots = (2 * places - 1).transpose(1, 2).flatten(0, 1).unbind(2)  # levels of (B·heads, N, points, 2)
    shares = weights.transpose(1, 2).flatten(0, 1).unbind(2)  # levels of (B·heads, N, points)
    total = sum(
        (F.grid_sample(level.unflatten(-1, grid), spot, align_corners=False) * share[:, None]).sum(-1)
        for level, grid, spot, share in zip(maps, grids, spots, shares, strict=True)
    )
    assert isinstance(total, Tensor)
    return total.unflatten(0, (values.shape[0], -1)).flatten(1, 2).mT  # (B·heads, d, N) to (B, N, heads·d)
