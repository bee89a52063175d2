"""ViT-Adapter (Chen et al., arXiv 2205.08534): a plain ViT and a convolutional pyramid that exchange features.

Facts from github.com/czczup/ViT-Adapter at fd64a51. The detection and the segmentation form differ in one sum: which
token map is added to which output.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm
from timm.layers.weight_init import trunc_normal_
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lape.errors import UsageError
from lape.hosts import Files, class_name, register, resize_bicubic
from lape.hosts.timm import AUTHORS_NAMES, FILTER, VISION_TRANSFORMER
from lape.method import Grid
from lape.models.deformable import DeformableAttention

COARSEST, OUTPUTS = 32, 4  # the stride of the last map, and how many there are


class AdapterBlock(Block):
    """A ViT block whose attention may look at windows of the grid; `window` None looks at all of it."""

    window: int | None = None

    def forward(self, x: Tensor, grid: Grid, **mask: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens = self.norm1(x)
        if self.window is None:
            attended = self.attn(tokens, **mask)
        elif all(part is None or part is False for part in mask.values()):
            attended = self._windowed(tokens, grid, self.window)
        else:
            raise UsageError(
                f"A bias or a mask is over the whole grid, and this block looks at windows of {self.window}. "
                "Use a pe without a bias, or windows=None."
            )
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _windowed(self, tokens: Tensor, grid: Grid, side: int) -> Tensor:
        """The grid is filled up behind the projection: what is added has no bias, and is a key of zeros."""
        attn: Any = self.attn
        (height, width), dim = grid, tokens.shape[-1]
        rows, columns = -(-height // side), -(-width // side)
        q, k, v = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, dim // attn.num_heads)).permute(2, 0, 3, 1, 4)
        qkv = torch.stack([attn.q_norm(q), attn.k_norm(k), v]).unflatten(3, grid)  # (3, B, heads, H, W, d)
        qkv = F.pad(qkv, (0, 0, 0, columns * side - width, 0, rows * side - height))
        qkv = qkv.unflatten(4, (columns, side)).unflatten(3, (rows, side)).permute(0, 1, 3, 5, 2, 4, 6, 7)
        q, k, v = qkv.flatten(1, 3).flatten(3, 4)  # (windows, heads, side², d) each
        attended = F.scaled_dot_product_attention(q, k, v).unflatten(2, (side, side)).unflatten(0, (-1, rows, columns))
        attended = attended.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)  # (B, H, W, D)
        return attn.proj(attended[:, :height, :width].flatten(1, 2))


class SpatialPrior(nn.Module):
    """Images (B, C, H, W) to maps (B, D, H/s, W/s) at the strides s = 4, 8, 16, 32."""

    def __init__(self, width: int, dim: int, in_chans: int) -> None:
        super().__init__()

        def convolved(before: int, after: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

        stem = [*convolved(in_chans, width, 2), *convolved(width, width, 1), *convolved(width, width, 1)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*convolved(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*convolved(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*convolved(4 * width, 4 * width, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(times * width, dim, 1) for times in (1, 2, 4, 4))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in (self.conv2, self.conv3, self.conv4):
            maps.append(stage(maps[-1]))
        return [fc(level) for fc, level in zip((self.fc1, self.fc2, self.fc3, self.fc4), maps, strict=True)]


class Injector(nn.Module):
    """Tokens look at the pyramid: x + γ·attention(LN(x), LN(c))."""

    def __init__(self, dim: int, norm: Any, **attention: Any) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = norm(dim), norm(dim)
        self.attn = DeformableAttention(dim, levels=3, **attention)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, grid: Grid, pyramid: Tensor, grids: Sequence[Grid]) -> Tensor:
        attended = self.attn(self.query_norm(tokens), _centres([grid], tokens), self.feat_norm(pyramid), grids)
        return tokens + self.gamma * attended


class ConvolutionalFeedForward(nn.Module):
    """An MLP with one depthwise 3×3 convolution for all levels of the pyramid between its layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, pyramid: Tensor, grids: Sequence[Grid]) -> Tensor:
        levels = _levels(self.fc1(pyramid), grids)
        convolved = torch.cat([self.dwconv(level).flatten(2).mT for level in levels], dim=1)
        return self.fc2(F.gelu(convolved))


class Extractor(nn.Module):
    """The pyramid looks at the tokens: c + attention(LN(c), LN(x)), then c + FFN(LN(c))."""

    def __init__(self, dim: int, norm: Any, ffn_ratio: float, drop_path: float, **attention: Any) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = norm(dim), norm(dim)
        self.attn = DeformableAttention(dim, levels=1, **attention)
        self.ffn = ConvolutionalFeedForward(dim, int(dim * ffn_ratio))
        self.ffn_norm = norm(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, pyramid: Tensor, grids: Sequence[Grid], tokens: Tensor, grid: Grid) -> Tensor:
        centres = _centres(grids, tokens)
        pyramid = pyramid + self.attn(self.query_norm(pyramid), centres, self.feat_norm(tokens), [grid])
        return pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), grids))


class Interaction(nn.Module):
    """A group of blocks between an injector and an extractor; the last group has two extractors more."""

    def __init__(self, dim: int, norm: Any, extra: int, ffn_ratio: float, drop_path: float, **attention: Any) -> None:
        super().__init__()
        self.injector = Injector(dim, norm, **attention)
        self.extractor, *others = (Extractor(dim, norm, ffn_ratio, drop_path, **attention) for _ in range(1 + extra))
        self.extra_extractors = nn.ModuleList(others)


class ViTAdapter(VisionTransformer):
    """Images (B, C, H, W), H and W multiples of 32, to maps (B, D, H/s, W/s) at the strides s = 4, 8, 16, 32.

    `interactions` are the first and the last block of each group, `windows` the side of each block's windows (None: the
    whole grid). To every output the last token map is added (detection), or with `token_map_of_group` that of the
    output's own group (segmentation). Raises UsageError for sides that 32 does not divide.
    """

    def __init__(
        self,
        interactions: Sequence[Sequence[int]] = ((0, 2), (3, 5), (6, 8), (9, 11)),
        windows: Sequence[int | None] | None = None,
        token_map_of_group: bool = False,
        prior_width: int = 64,
        deform_heads: int = 6,
        deform_points: int = 4,
        deform_ratio: float = 1.0,
        ffn_ratio: float = 0.25,
        **options: Any,
    ) -> None:
        fixed: dict[str, Any] = {
            "class_token": False,
            "global_pool": "",
            "num_classes": 0,
            "final_norm": False,
            "dynamic_img_size": True,
            "block_fn": AdapterBlock,
        }
        super().__init__(**{"init_values": 1.0, **options, **fixed})
        if token_map_of_group and len(interactions) != OUTPUTS:
            raise UsageError(
                f"Each of {OUTPUTS} outputs gets the token map of its own group; {len(interactions)} groups were "
                "received. Give as many, or leave token_map_of_group out."
            )
        self.groups = [(group[0], group[-1] + 1) for group in interactions]
        self.token_map_of_group = token_map_of_group
        blocks: Any = self.blocks
        windows = windows or [None] * len(blocks)
        if len(windows) != len(blocks):
            raise UsageError(
                f"windows has the side of each block's windows; {len(windows)} were received for {len(blocks)} blocks. "
                "Give as many."
            )
        for block, window in zip(blocks, windows, strict=True):
            block.window = window
        dim, norm = self.embed_dim, options.get("norm_layer", LayerNorm)
        attention = {"heads": deform_heads, "points": deform_points, "ratio": deform_ratio}
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.spm = SpatialPrior(prior_width, dim, self.in_chans)
        self.interactions = nn.ModuleList(
            Interaction(
                dim,
                norm,
                2 * (group == len(interactions) - 1),
                ffn_ratio,
                options.get("drop_path_rate", 0),
                **attention,
            )
            for group in range(len(interactions))
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in range(OUTPUTS))
        self.feature_info = [{"num_chs": dim, "reduction": 4 * 2**level} for level in range(OUTPUTS)]
        for part in (self.spm, self.interactions, self.up):
            part.apply(_init)

    def no_weight_decay(self) -> set[str]:
        """Return the names of tables and tokens."""
        return super().no_weight_decay() | {"level_embed"}

    def forward_features(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> list[Tensor]:
        """Return the four maps, finest first."""
        height, width = x.shape[2], x.shape[3]
        if height % COARSEST or width % COARSEST:
            raise UsageError(
                f"ViT-Adapter's maps go down to 1/{COARSEST} of an image, whose sides {COARSEST} must divide; "
                f"{height}x{width} was received. Pad it."
            )
        if self.training and len(x) * height * width == COARSEST**2:
            raise UsageError(
                f"BatchNorm learns from two values and more, and the coarsest map of one {height}x{width} image has "
                "one. Train with larger images, or with more at once."
            )
        finest, *levels = self.spm(x)
        grids = [(level.shape[2], level.shape[3]) for level in levels]
        flat = [level.flatten(2).mT + embed for level, embed in zip(levels, self.level_embed, strict=True)]
        pyramid = torch.cat(flat, dim=1)  # (B, Σ H·W, D)
        patches = self.patch_embed(x)
        grid = (patches.shape[1], patches.shape[2])
        tokens = self._pos_embed(patches)
        maps = []
        for (first, last), exchange in zip(self.groups, self.interactions, strict=True):
            tokens, pyramid = self._group(exchange, tokens, grid, pyramid, grids, self.blocks[first:last])
            maps.append(tokens.mT.unflatten(2, grid))
        coarser = _levels(pyramid, grids)
        outputs = [finest + self.up(coarser[0]), *coarser]
        added = maps if self.token_map_of_group else [maps[-1]] * OUTPUTS
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return [
            norm((output + F.interpolate(tokens, output.shape[2:], mode="bilinear", align_corners=False)).contiguous())
            for output, tokens, norm in zip(outputs, added, norms, strict=True)
        ]

    def _group(
        self, exchange: Any, tokens: Tensor, grid: Grid, pyramid: Tensor, grids: Sequence[Grid], blocks: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = exchange.injector(tokens, grid, pyramid, grids)
        for block in blocks:
            tokens = checkpoint(block, tokens, grid) if self.grad_checkpointing else block(tokens, grid)
        for extract in (exchange.extractor, *exchange.extra_extractors):
            pyramid = extract(pyramid, grids, tokens, grid)
        return tokens, pyramid

    def forward(self, x: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.forward_features(x)


HOST = register(
    replace(
        VISION_TRANSFORMER,
        name="ViT-Adapter",
        model=class_name(ViTAdapter),
        resize=resize_bicubic,
        files=Files(
            FILTER,
            (
                (r"^(blocks\.\d+)\.gamma(\d)$", r"\1.ls\2.gamma"),
                (r"\.dwconv\.dwconv\.", ".dwconv."),
                *AUTHORS_NAMES,
            ),
        ),
    )
)


def _levels(pyramid: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Return the maps (B, D, H, W) of a flat pyramid (B, Σ H·W, D)."""
    parts = pyramid.split([height * width for height, width in grids], dim=1)
    # Contiguous: BatchNorm of PyTorch 2.15 gives wrong gradients for one transposed image.
    return [part.mT.unflatten(2, grid).contiguous() for part, grid in zip(parts, grids, strict=True)]


def _centres(grids: Sequence[Grid], like: Tensor) -> Tensor:
    """Return the centres (Σ H·W, 2) of the cells of grids, as (x, y) in [0, 1]."""
    new = {"device": like.device, "dtype": like.dtype}
    lines = [((torch.arange(h, **new) + 0.5) / h, (torch.arange(w, **new) + 0.5) / w) for h, w in grids]
    pairs = [torch.meshgrid(rows, columns, indexing="ij") for rows, columns in lines]
    return torch.cat([torch.stack([x, y], dim=-1).flatten(0, 1) for y, x in pairs])


def _init(part: nn.Module) -> None:
    if isinstance(part, DeformableAttention):
        part.init_weights()
    elif isinstance(part, nn.Linear):
        trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
        nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
        if part.bias is not None:
            nn.init.zeros_(part.bias)


_DEIT = {"img_size": 224, "patch_size": 16, "depth": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {**_DEIT, "embed_dim": 192, "num_heads": 3, "drop_path_rate": 0.1},
    "small": {**_DEIT, "embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.2},
    "nano": {
        "img_size": 128,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 2,
        "interactions": ((0, 0), (1, 1), (2, 2), (3, 3)),
        "prior_width": 16,
        "deform_heads": 4,
    },
}
DETECTION: dict[str, Any] = {"windows": (14, 14, None) * 4}
SEGMENTATION: dict[str, Any] = {"token_map_of_group": True}
