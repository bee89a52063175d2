"""Small models of every kind of host, and the schemes that are applied to them."""

from typing import Any

import pytest
import timm
import torch
import torch.distributed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lape.surgery.positions import BIAS_TABLE

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
# One of every kind of host: prefix tokens, tables with and without their rows, blocks, norms, pools.
HOSTS_TO_TRY: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": (32, 64)},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 32, "init_values": 0.1},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_base_patch16_xp_224": {"img_size": 32},
    "vit_small_patch16_18x2_224": {"img_size": 32},
    "vit_medium_patch16_gap_240": {"img_size": 32},
    "vit_xsmall_patch16_clip_224": {"img_size": 32},
    "vit_base_patch16_siglip_224": {"img_size": 32},
    "vit_small_r26_s32_224": {"img_size": 64},
}
EVERY_HOST = pytest.mark.parametrize("name", HOSTS_TO_TRY)
OF_EVERY_KIND = [{"join": "lape", "pe": "fourier+alibi-2d+rope-mixed+peg"}]
SCHEMES: list[dict[str, str]] = [
    {"join": "default", "pe": "sinusoidal-2d"},
    {"join": "default", "pe": "none"},
    {"join": "default", "pe": "relative"},
    {"join": "default", "pe": "relative-layernorm"},
    {"join": "shared"},
    {"join": "shared", "pe": "sinusoidal-1d"},
    {"join": "unshared"},
    {"join": "lape-sharing", "pe": "sinusoidal-2d"},
    {"join": "lape"},
    {"join": "lape", "pe": "sinusoidal-1d"},
    {"join": "lape", "pe_norm": "scalar-norm"},
    {"join": "lape", "pe": "learnable+relative"},
    {"join": "lape", "pe": "learnable+relative-layernorm"},
    *OF_EVERY_KIND,
    {"join": "pvg", "pe": "learnable+rope-dinov3"},
]
EVERY_SCHEME = pytest.mark.parametrize("names", SCHEMES, ids=lambda names: "-".join(names.values()))


def host(name: str = "vit_tiny_patch16_224", **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **HOSTS_TO_TRY.get(name, {}), **options})
    for parameter in model.parameters():  # nothing may hide behind a zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images(model: nn.Module, count: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size)


def shaken(model: nn.Module) -> nn.Module:
    """Move every parameter of the join from where it starts."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "pe_norm" in name or BIAS_TABLE in name or (name.startswith("blocks") and name.endswith("pos_embed")):
            nn.init.normal_(parameter)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
