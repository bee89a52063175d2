"""DeiT (Touvron et al., arXiv 2012.12877), plain and distilled: timm's models, with the class token of the recipe."""

from typing import Any

from timm.layers.weight_init import trunc_normal_
from torch import nn

NAMES = tuple(
    f"deit_{size}{distilled}_patch16_224" for distilled in ("", "_distilled") for size in ("tiny", "small", "base")
)


def as_published(model: nn.Module) -> None:
    """Start the class token as the original does, truncated normal of 0.02; timm starts it at 1e-6."""
    token: Any = model.cls_token
    if token is not None:
        trunc_normal_(token, std=0.02)
