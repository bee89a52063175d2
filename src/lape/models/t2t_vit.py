"""T2T-ViT-7 (Yuan et al., arXiv 2101.11986): a Performer soft-splits the image into tokens, then plain ViT blocks.

Facts from github.com/yitu-opensource/T2T-ViT at 0f63dc9.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm
from timm.layers.weight_init import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lape.hosts import Embedding, Files, class_name, register
from lape.hosts.timm import AUTHORS_NAMES, FILTER, VISION_TRANSFORMER
from lape.method import sinusoidal_1d
from lape.models.stem import Size, Stem, Step
from lape.surgery.proxy import Proxies

SOFT_SPLITS = (Step(7, 4, 2), Step(3, 2, 1), Step(3, 2, 1))
EPSILON = 1e-8


class TokenPerformer(nn.Module):
    """One layer of Performer attention that narrows tokens: (B, N, D) to (B, N, token_dim).

    φ(x) = exp(Wx − ‖x‖²/2) / √m with m random features; attention is φ(q)·(φ(k)ᵀv) / (φ(q)·Σφ(k) + ε), around v.
    """

    def __init__(self, dim: int, token_dim: int, drop: float = 0.1) -> None:
        super().__init__()
        features = token_dim // 2
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim), nn.Dropout(drop)
        )
        self.w = nn.Parameter(torch.empty(features, token_dim), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the random features anew."""
        nn.init.orthogonal_(self.w, gain=sqrt(len(self.w)))

    def forward(self, x: Tensor) -> Tensor:
        keys, queries, values = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = values + self.drop(self.proj(self._attend(keys, queries, values)))
        return x + self.mlp(self.norm2(x))

    def _attend(self, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        kind, device = torch.promote_types(values.dtype, torch.float32), values.device.type
        # An exponential does not fit into half precision.
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            k, q = (self._features(part.to(kind)) for part in (keys, queries))  # (B, N, m)
            attended = q @ (k.mT @ values.to(kind))
            return (attended / (q @ k.sum(1)[:, :, None] + EPSILON)).to(values.dtype)

    def _features(self, x: Tensor) -> Tensor:
        w = self.w.to(x.dtype)
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / sqrt(len(w))


class TokensToToken(Stem):
    """Three unfoldings, with a Performer layer after the first and the second: images to tokens of width D."""

    def __init__(self, img_size: Size, in_chans: int, embed_dim: int, token_dim: int) -> None:
        super().__init__(img_size, SOFT_SPLITS)
        first, second, third = (step.kernel**2 for step in SOFT_SPLITS)
        self.attention1 = TokenPerformer(in_chans * first, token_dim)
        self.attention2 = TokenPerformer(token_dim * second, token_dim)
        self.project = nn.Linear(token_dim * third, embed_dim)

    def tokens(self, images: Tensor) -> Tensor:
        for step, narrow in zip(self.steps, (self.attention1, self.attention2, self.project), strict=True):
            grid = step.sides((images.shape[2], images.shape[3]))
            unfolded = F.unfold(images, step.kernel, padding=step.padding, stride=step.stride)  # (B, C·k², N)
            images = narrow(unfolded.mT).mT.unflatten(2, grid)
        return images.permute(0, 2, 3, 1)


class T2TViT(VisionTransformer):
    """A VisionTransformer behind a tokens-to-token module, with a fixed 1-D sinusoid."""

    def __init__(self, token_dim: int = 64, patch_size: Any = None, **options: Any) -> None:
        stem = partial(_stem, token_dim)
        fixed = {"embed_layer": stem, "dynamic_img_size": True, "weight_init": "skip"}
        super().__init__(**{"qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5), **options, **fixed})
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
        self.weight_init_mode = ""
        self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As the original: a class token as wide as a ViT's table at first, and the sinusoid."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None and not self.pos_embed.requires_grad:  # a join may have put a learnt one there
            self.pos_embed = nn.Parameter(self._sinusoid(self.patch_embed.grid_size), requires_grad=False)

    def _sinusoid(self, grid: tuple[int, int]) -> Tensor:
        some = next(self.parameters())
        return sinusoidal_1d(grid, self.num_prefix_tokens, self.embed_dim).to(some)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """A sinusoid follows another grid by being made anew, not by resizing."""
        if self.pos_embed is not None and x.ndim == 4 and tuple(x.shape[1:3]) != tuple(self.patch_embed.grid_size):
            table = self._sinusoid((x.shape[1], x.shape[2]))
            there, _ = _ON_ANOTHER_GRID.of(self, {"pos_embed": table, "dynamic_img_size": False})
            return VisionTransformer._pos_embed(there, x.flatten(1, 2))
        return super()._pos_embed(x)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Set the size of images that the table is for."""
        super().set_input_size(img_size, patch_size)  # pyright: ignore[reportArgumentType]
        if self.pos_embed is not None and not self.pos_embed.requires_grad:
            self.pos_embed = nn.Parameter(self._sinusoid(self.patch_embed.grid_size), requires_grad=False)


_ON_ANOTHER_GRID = Proxies(T2TViT, ["pos_embed", "dynamic_img_size"])
HOST = register(
    replace(
        VISION_TRANSFORMER,
        name="T2T-ViT",
        model=class_name(T2TViT),
        embedding=Embedding(own="sinusoidal-1d", joined="sinusoidal-1d"),
        files=Files(FILTER, ((r"^tokens_to_token\.", "patch_embed."), *AUTHORS_NAMES)),
    )
)


def _stem(token_dim: int, img_size: Size, in_chans: int, embed_dim: int, **_: Any) -> TokensToToken:
    return TokensToToken(img_size, in_chans, embed_dim, token_dim)


VARIANTS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": {"img_size": 224, "embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
}
