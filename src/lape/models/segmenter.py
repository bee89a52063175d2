"""Segmenter (Strudel et al., arXiv 2105.05633): a plain ViT, then a transformer over patches and one token a class.

Facts from github.com/rstrudel/segmenter at 20d1bfa. The decoder knows no positions, so no join reaches it.
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm
from timm.layers.weight_init import trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lape.hosts import class_name, register, resize_by_count
from lape.hosts.timm import VISION_TRANSFORMER
from lape.method import Grid
from lape.models.whole import Whole

NORM = partial(LayerNorm, eps=1e-5)


class SegmenterViT(VisionTransformer):
    """A VisionTransformer whose table is resized as Segmenter's (bilinear, by the number of patches)."""


HOST = register(replace(VISION_TRANSFORMER, name="Segmenter", model=class_name(SegmenterViT), resize=resize_by_count))


class MaskTransformer(nn.Module):
    """Patch tokens (B, H·W, D) to logits (B, classes, H, W): the cosine of each patch and each class token, normed."""

    def __init__(self, classes: int, encoder_dim: int, dim: int, depth: int, heads: int, drop: float = 0.1) -> None:
        super().__init__()
        self.proj_dec = nn.Linear(encoder_dim, dim)
        self.cls_emb = nn.Parameter(trunc_normal_(torch.empty(1, classes, dim), std=0.02))
        options: dict[str, Any] = {"qkv_bias": True, "proj_drop": drop, "attn_drop": drop, "norm_layer": NORM}
        self.blocks = nn.ModuleList(Block(dim, heads, **options) for _ in range(depth))
        self.decoder_norm = NORM(dim)
        self.proj_patch, self.proj_classes = (nn.Parameter(torch.randn(dim, dim) * dim**-0.5) for _ in range(2))
        self.mask_norm = NORM(classes)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        x = self.proj_dec(patches)
        x = torch.cat([x, self.cls_emb.expand(x.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        count = patches.shape[1]
        tokens, classes = x[:, :count] @ self.proj_patch, x[:, count:] @ self.proj_classes
        tokens, classes = (part / part.norm(dim=-1, keepdim=True) for part in (tokens, classes))
        return self.mask_norm(tokens @ classes.mT).mT.unflatten(2, grid)


class Segmenter(Whole):
    """Images (B, C, H, W) of any size to logits (B, classes, H, W): filled up to whole patches, and cut back."""

    multiple = 1  # what the sides of images are multiples of
    grow = True  # enlarge an image that is smaller than a window
    loss_weights = (1.0,)  # of each output
    unlabelled_count = False  # in the mean of the loss

    def __init__(self, encoder: VisionTransformer, decoder: MaskTransformer) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def no_weight_decay(self) -> set[str]:
        """Return the names of tables and tokens."""
        return super().no_weight_decay() | {"decoder.cls_emb"}

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        down, right = self.encoder.patch_embed.patch_size
        images = F.pad(images, (0, -width % right, 0, -height % down))
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        grid = images.shape[2] // down, images.shape[3] // right
        logits = F.interpolate(self.decoder(tokens, grid), images.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]


def segmenter(num_classes: int = 150, **options: Any) -> Segmenter:
    """Create a Segmenter whose encoder has `options`; its decoder has two blocks as wide with as many heads."""
    encoder = SegmenterViT(num_classes=0, dynamic_img_size=True, norm_layer=NORM, **options)
    dim, first = encoder.embed_dim, cast(Any, encoder.blocks[0])
    return Segmenter(encoder, MaskTransformer(num_classes, dim, dim, depth=2, heads=first.attn.num_heads))


_DEIT = {"img_size": 512, "patch_size": 16, "depth": 12, "drop_path_rate": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "segmenter_tiny_patch16": {**_DEIT, "embed_dim": 192, "num_heads": 3},
    "segmenter_small_patch16": {**_DEIT, "embed_dim": 384, "num_heads": 6},
}
NANO: dict[str, dict[str, Any]] = {
    "segmenter_nano_patch8": {"img_size": 128, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
}
