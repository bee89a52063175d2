"""UperNet (Xiao et al., arXiv 1807.10221) with an FCN beside it, on a backbone of four maps: transformers' heads.

Facts from mmsegmentation 0.30.0, whose heads drop channels before the classifier; transformers' do not.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

POOLS = (1, 2, 3, 6)
DROP = 0.1
# What mmsegmentation calls the parts, and what transformers does.
NAMES = ((r"(^|\.)bn\.", r"\1batch_norm."), (r"(^|\.)conv_seg\.", r"\1classifier.1."))


def uper_head(in_channels: Sequence[int], channels: int, classes: int) -> nn.Module:
    """Return the head that takes four maps (B, C, H/s, W/s), finest first, to logits (B, classes, H/4, W/4)."""
    from transformers.models.upernet.modeling_upernet import UperNetHead

    config: Any = SimpleNamespace(pool_scales=POOLS, hidden_size=channels, num_labels=classes)
    return _dropping(UperNetHead(config, list(in_channels)))


def fcn_head(in_channels: int, channels: int, classes: int, level: int = 2) -> nn.Module:
    """Return the head that takes one of the maps, the one at stride 16, to logits of its size; it trains beside."""
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead

    config: Any = SimpleNamespace(
        auxiliary_in_channels=in_channels,
        auxiliary_channels=channels,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
        num_labels=classes,
    )
    return _dropping(UperNetFCNHead(config, [], in_index=level))


def _dropping(head: Any) -> nn.Module:
    """Start a head as mmsegmentation does, with dropout of channels before its classifier."""
    for part in head.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out")
    nn.init.normal_(head.classifier.weight, std=0.01)
    nn.init.zeros_(head.classifier.bias)
    head.classifier = nn.Sequential(nn.Dropout2d(DROP), head.classifier)
    return head


class UperNet(nn.Module):
    """Images (B, C, H, W) to logits (B, classes, H, W), and to those of the FCN (B, classes, H/16, W/16)."""

    names = NAMES

    def __init__(self, backbone: Any, classes: int, channels: int = 512, auxiliary_channels: int = 256) -> None:
        super().__init__()
        widths = [info["num_chs"] for info in backbone.feature_info]
        self.backbone = backbone
        self.decode_head = uper_head(widths, channels, classes)
        self.auxiliary_head = fcn_head(widths[2], auxiliary_channels, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)
        logits = F.interpolate(self.decode_head(maps), images.shape[2:], mode="bilinear", align_corners=False)
        return logits, self.auxiliary_head(maps)
