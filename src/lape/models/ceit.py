"""CeiT (Yuan et al., arXiv 2103.11816): a convolutional stem, convolutions among patches in every MLP, and attention
over the class tokens of all layers at the end. Facts from github.com/coeusguo/ceit at 44c16d3.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.weight_init import trunc_normal_
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lape.errors import UsageError
from lape.hosts import Files, class_name, register
from lape.hosts.timm import AUTHORS_NAMES, FILTER, VISION_TRANSFORMER
from lape.method import Grid
from lape.models.stem import Size, Stem, Step
from lape.surgery.proxy import Proxies

CONVOLUTION, POOLING = Step(7, 2, 3), Step(3, 2, 1)


class ImageToTokens(Stem):
    """A convolution, a batch norm and max-pooling, then patches of the map."""

    def __init__(self, img_size: Size, in_chans: int, embed_dim: int, stem_dim: int, patch: int) -> None:
        super().__init__(img_size, [CONVOLUTION, POOLING, Step(patch, patch)])
        self.conv = nn.Conv2d(in_chans, stem_dim, *CONVOLUTION, bias=False)
        self.bn = nn.BatchNorm2d(stem_dim)
        self.proj = nn.Conv2d(stem_dim, embed_dim, patch, patch)

    def tokens(self, images: Tensor) -> Tensor:
        return self.proj(F.max_pool2d(self.bn(self.conv(images)), *POOLING)).permute(0, 2, 3, 1)


class LocallyEnhancedFeedForward(nn.Module):
    """1×1, depthwise k×k and 1×1 convolutions over the grid of patches; the class token is handed on as it is.

    Without `with_bn` no batch norm stands behind a convolution.
    """

    def __init__(
        self, in_features: int, hidden_features: int, local_size: int = 3, with_bn: bool = True, **_: Any
    ) -> None:
        super().__init__()

        def norm(features: int) -> nn.Module:
            return nn.BatchNorm2d(features) if with_bn else nn.Identity()

        self.conv1 = nn.Conv2d(in_features, hidden_features, 1)
        self.bn1 = norm(hidden_features)
        self.conv2 = nn.Conv2d(
            hidden_features, hidden_features, local_size, padding=local_size // 2, groups=hidden_features
        )
        self.bn2 = norm(hidden_features)
        self.conv3 = nn.Conv2d(hidden_features, in_features, 1)
        self.bn3 = norm(in_features)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, 1 + H·W, D) to the same shape."""
        # Contiguous: BatchNorm of PyTorch 2.15 gives wrong gradients for one transposed image.
        image = tokens[:, 1:].mT.unflatten(2, grid).contiguous()
        image = F.gelu(self.bn1(self.conv1(image)))
        image = F.gelu(self.bn2(self.conv2(image)))
        image = self.bn3(self.conv3(image))
        return torch.cat([tokens[:, :1], image.flatten(2).mT], dim=1)


class CeiTBlock(Block):
    """A ViT block whose MLP sees the grid of patches."""

    def forward(self, x: Tensor, grid: Grid, **mask: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), grid)))


class LayerClassAttention(Block):
    """The last of the layers' class tokens (B, layers, D) attends to all of them: (B, 1, D)."""

    def forward(self, tokens: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        attn: Any = self.attn
        qkv = attn.qkv(self.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, layers, D / heads) each
        attended = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
        last = tokens[:, -1:] + attn.proj(attended.transpose(1, 2).flatten(2))
        return last + self.mlp(self.norm2(last))


class CeiT(VisionTransformer):
    """A VisionTransformer with these parts.

    `leff_local_size` is the side of the depthwise convolution in each block, `leff_with_bn` whether batch norms stand
    behind its convolutions.
    """

    def __init__(
        self,
        stem_dim: int = 64,
        patch_size: int = 4,
        leff_local_size: int = 3,
        leff_with_bn: bool = True,
        **options: Any,
    ) -> None:
        if options.get("patch_drop_rate"):
            raise UsageError("CeiT's convolutions need every patch in its place. Leave patch_drop_rate out.")
        if leff_local_size < 1 or leff_local_size % 2 == 0:
            raise UsageError(
                f"A window of {leff_local_size} patches has none in its middle, and leff_local_size is the side of one "
                "around each patch. Give an odd number."
            )
        fixed = {
            "embed_layer": partial(_stem, stem_dim, patch_size),
            "block_fn": CeiTBlock,
            "mlp_layer": partial(LocallyEnhancedFeedForward, local_size=leff_local_size, with_bn=leff_with_bn),
            "dynamic_img_size": True,
        }
        super().__init__(**options | fixed)
        dim, depth = self.embed_dim, len(self.blocks)
        self.lca = LayerClassAttention(
            dim,
            options.get("num_heads", 12),
            options.get("mlp_ratio", 4.0),
            qkv_bias=options.get("qkv_bias", True),
            norm_layer=type(self.norm) if "norm_layer" not in options else options["norm_layer"],
        )
        self.pos_layer_embed = nn.Parameter(torch.empty(1, depth, dim))
        self._as_the_original()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As the original: a class token as wide as a ViT's table at first, and no difference between layers."""
        super().init_weights(mode, needs_reset)
        if hasattr(self, "pos_layer_embed"):  # timm's constructor asks before it is there
            self._as_the_original()

    def _as_the_original(self) -> None:
        nn.init.zeros_(self.pos_layer_embed)
        for part in self.lca.modules():
            if isinstance(part, nn.Linear):
                trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the names of tables and tokens."""
        return super().no_weight_decay() | {"pos_layer_embed"}

    def forward_features(self, x: Tensor, **mask: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images (B, C, H, W) to tokens (B, 1 + patches, D); the class token is that of the last attention."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = self.norm_pre(self._pos_embed(x))
        class_tokens = []
        masked = any(part is not None and part is not False for part in mask.values())
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing and not masked else block(x, grid, **mask)
            class_tokens.append(x[:, 0])
        summary = self.lca(torch.stack(class_tokens, dim=1) + self.pos_layer_embed)
        return self.norm(torch.cat([summary, x[:, 1:]], dim=1))

    def forward_intermediates(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """Return the tokens after blocks, as timm's VisionTransformer does."""
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        proxy, _ = _BLOCKS_WITH_GRID.of(self, {"blocks": [partial(block, grid=grid) for block in self.blocks]})
        return VisionTransformer.forward_intermediates(proxy, x, *arguments, **options)


_BLOCKS_WITH_GRID = Proxies(CeiT, ["blocks"])
HOST = register(
    replace(
        VISION_TRANSFORMER,
        name="CeiT",
        model=class_name(CeiT),
        files=Files(
            FILTER,
            (
                (r"^i2t\.backbone\.", "patch_embed."),
                (r"^i2t\.proj\.", "patch_embed.proj."),
                (r"^(blocks\.\d+)\.leff\.", r"\1.mlp."),
                (r"^lca\.feedforward\.", "lca.mlp."),
                *AUTHORS_NAMES,
            ),
        ),
    )
)


def _stem(stem_dim: int, patch: int, img_size: Size, in_chans: int, embed_dim: int, **_: Any) -> ImageToTokens:
    return ImageToTokens(img_size, in_chans, embed_dim, stem_dim, patch)


VARIANTS: dict[str, dict[str, Any]] = {
    "ceit_tiny_patch16_224": {"img_size": 224, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "ceit_small_patch16_224": {"img_size": 224, "embed_dim": 384, "depth": 12, "num_heads": 6},
}
