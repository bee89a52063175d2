"""Compact Transformers for small images (Hassani et al., arXiv 2104.05704): ViT-Lite, CVT and CCT.

Facts from github.com/SHI-Labs/Compact-Transformers at cd11f09. The names say depth, patch or kernel × convolutions, and
image, as the original's do; the sinusoidal and table-less forms are `pe="sinusoidal-1d"` and `pe="none"`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers.norm import LayerNorm
from timm.layers.weight_init import trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lape.hosts import Embedding, Files, class_name, register
from lape.hosts.timm import FILTER, VISION_TRANSFORMER
from lape.models.stem import Size, Stem, Step

POOLING = Step(3, 2, 1)
BETWEEN = 64  # channels between two convolutions


class CompactBlock(Block):
    """x ← x + MSA(LN(x)); x ← LN'(x); x ← x + MLP(x): the second norm stands on the residual stream itself."""

    def forward(self, x: Tensor, **mask: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **mask)))
        x = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(x)))


class SequencePool(nn.Module):
    """Σ softmax(s(x))·x over the tokens: (B, N, D) to (B, D), s a linear layer with one output."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.score(tokens).softmax(dim=1)  # (B, N, 1)
        return (weights.mT @ tokens).squeeze(1)


class ConvolutionalTokenizer(Stem):
    """Convolutions, each with ReLU and max-pooling (CCT), or one that cuts patches (ViT-Lite, CVT)."""

    def __init__(self, img_size: Size, in_chans: int, embed_dim: int, kernel: int, convolutions: int) -> None:
        self.pooled = convolutions > 0
        # The original's rule: a wider kernel takes a wider stride.
        step = Step(kernel, max(1, kernel // 2 - 1), max(1, kernel // 2)) if convolutions else Step(kernel, kernel)
        super().__init__(img_size, [step, POOLING] * convolutions or [step])
        between = [BETWEEN] * (convolutions - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, *step, bias=not self.pooled)
            for before, after in zip([in_chans, *between], [*between, embed_dim], strict=True)
        )

    def tokens(self, images: Tensor) -> Tensor:
        for convolution in self.convs:
            images = convolution(images)
            if self.pooled:
                images = F.max_pool2d(images.relu(), *POOLING)
        return images.permute(0, 2, 3, 1)


class CompactTransformer(VisionTransformer):
    """A VisionTransformer of these blocks: `convolutions` 0 cuts patches, `class_token` false pools the sequence."""

    def __init__(
        self, kernel: int = 4, convolutions: int = 0, class_token: bool = False, patch_size: Any = None, **options: Any
    ) -> None:
        tokenizer = partial(_tokenizer, kernel, convolutions)
        fixed = {"embed_layer": tokenizer, "block_fn": CompactBlock, "dynamic_img_size": True, "qkv_bias": False}
        pooling = {"class_token": True} if class_token else {"class_token": False, "global_pool": "avg"}
        norm = partial(LayerNorm, eps=1e-5)
        chosen = {"norm_layer": norm, **options, **fixed, **pooling, "fc_norm": False, "weight_init": "skip"}
        super().__init__(**chosen)
        if not class_token:
            self.attn_pool, self.global_pool = SequencePool(self.embed_dim), "map"
        self.weight_init_mode = ""
        self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As the original: a table ten times as wide as ViT's, a class token of zeros, Kaiming's convolutions."""
        super().init_weights(mode, needs_reset)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.2)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        for part in self.patch_embed.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)


HOST = register(
    replace(
        VISION_TRANSFORMER,
        name="Compact Transformer",
        model=class_name(CompactTransformer),
        embedding=Embedding(scale=10.0),
        stream_is_normed=True,
        files=Files(
            FILTER,
            (
                (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"patch_embed.convs.\1."),
                (r"^classifier\.positional_emb(\d+)$", r"blocks.\1.pos_embed"),
                (r"^classifier\.positional_emb$", "pos_embed"),
                (r"^classifier\.class_emb$", "cls_token"),
                (r"^classifier\.attention_pool\.", "attn_pool.score."),
                (r"^classifier\.fc\.", "head."),
                # The norm that stands on the stream goes out of the way before the one before attention takes its name.
                (r"^classifier\.(blocks\.\d+)\.norm1\.", r"\1.norm2."),
                (r"^classifier\.(blocks\.\d+)\.pre_norm\.", r"\1.norm1."),
                (r"^classifier\.(blocks\.\d+)\.self_attn\.", r"\1.attn."),
                (r"^classifier\.(blocks\.\d+)\.linear(\d)\.", r"\1.mlp.fc\2."),
                (r"^classifier\.", ""),
            ),
        ),
    )
)


def _tokenizer(
    kernel: int, convolutions: int, img_size: Size, in_chans: int, embed_dim: int, **_: Any
) -> ConvolutionalTokenizer:
    return ConvolutionalTokenizer(img_size, in_chans, embed_dim, kernel, convolutions)


SIZES: dict[int, dict[str, Any]] = {
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}
_DROP: dict[str, Any] = {"attn_drop_rate": 0.1, "drop_path_rate": 0.1}


def _patches(depth: int, class_token: bool) -> dict[str, Any]:
    return {**SIZES[depth], **_DROP, "img_size": 32, "kernel": 4, "class_token": class_token}


def _convolved(depth: int, kernel: int, convolutions: int, img_size: int) -> dict[str, Any]:
    return {**SIZES[depth], **_DROP, "img_size": img_size, "kernel": kernel, "convolutions": convolutions}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"vit_{depth}_4_32": _patches(depth, class_token=True) for depth in (2, 4, 6, 7)},
    **{f"cvt_{depth}_4_32": _patches(depth, class_token=False) for depth in (2, 4, 6, 7)},
    "cct_2_3x2_32": _convolved(2, 3, 2, 32),
    "cct_4_3x2_32": _convolved(4, 3, 2, 32),
    "cct_6_3x1_32": _convolved(6, 3, 1, 32),
    "cct_6_3x2_32": _convolved(6, 3, 2, 32),
    "cct_7_3x1_32": _convolved(7, 3, 1, 32),
    "cct_7_3x2_32": _convolved(7, 3, 2, 32),
    "cct_7_7x2_224": _convolved(7, 7, 2, 224),
    "cct_14_7x2_224": _convolved(14, 7, 2, 224),
    "cct_14_7x2_384": _convolved(14, 7, 2, 384),
}
