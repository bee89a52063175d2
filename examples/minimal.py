"""A vision transformer with LaPE (Yu et al., ICCV 2023) in one file; equation numbers are the paper's.

LaPE is `pe_norm` and the lines marked (8) to (11). An ordinary ViT has `x = x + self.pos_embed` behind (8) instead.
Shapes: B images, N tokens (the class token, then the patches row by row), D channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Block(nn.Module):
    """One pre-norm layer: attention, which is told the position of each token, and an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.pe_norm = LayerNorm(dim)  # LN_ω of this layer: LaPE's only new parameters
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Take tokens (B, N, D) and ω_l (1, N, D); return the new tokens and ω_{l+1}."""
        position = self.pe_norm(position)  # (11) p_l = LN_ω(ω_l), which is also ω_{l+1}
        x = x + self.attention(self.norm1(x) + position)  # (9) attention sees LN(x_l) + p_l
        x = x + self.mlp(self.norm2(x))  # (4), (5): the MLP sees the tokens alone
        return x, position

    def attention(self, x: Tensor) -> Tensor:
        """Multi-head self-attention (3)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """A classifier of square images."""

    def __init__(self, image: int, patch: int, dim: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image // patch) ** 2, dim))  # the table ω
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Take images (B, 3, H, W); return logits (B, classes)."""
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (8) x_0 = α: the table is not added here
        position = self.pos_embed  # (10) ω_0 = ω
        for block in self.blocks:
            x, position = block(x, position)
        return self.head(self.norm(x)[:, 0])
