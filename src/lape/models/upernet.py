"""UperNet (Xiao et al., arXiv 1807.10221) with an FCN beside it, on a backbone of four maps: transformers' heads.

Facts from mmsegmentation 0.30.0, whose heads drop channels before the classifier; transformers' do not.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lape.extras import require
from lape.models.vit_adapter import COARSEST, SEGMENTATION, ViTAdapter
from lape.models.vit_adapter import VARIANTS as BACKBONES
from lape.models.whole import Whole

POOLS = (1, 2, 3, 6)
DROP = 0.1
# What mmsegmentation calls the parts, and what transformers does.
NAMES = ((r"(^|\.)bn\.", r"\1batch_norm."), (r"(^|\.)conv_seg\.", r"\1classifier.1."))


def uper_head(in_channels: Sequence[int], channels: int, classes: int) -> nn.Module:
    """Return the head that takes four maps (B, C, H/s, W/s), finest first, to logits (B, classes, H/4, W/4)."""
    config: Any = SimpleNamespace(pool_scales=POOLS, hidden_size=channels, num_labels=classes)
    return _dropping(_theirs().UperNetHead(config, list(in_channels)))


def fcn_head(in_channels: int, channels: int, classes: int, level: int = 2) -> nn.Module:
    """Return the head that takes one of the maps, the one at stride 16, to logits of its size; it trains beside."""
    config: Any = SimpleNamespace(
        auxiliary_in_channels=in_channels,
        auxiliary_channels=channels,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
        num_labels=classes,
    )
    return _dropping(_theirs().UperNetFCNHead(config, [], in_index=level))


def _theirs() -> Any:
    require("UperNet", "transformers")
    from transformers.models.upernet import modeling_upernet

    return modeling_upernet


def _dropping(head: Any) -> nn.Module:
    """Start a head as mmsegmentation does, with dropout of channels before its classifier."""
    for part in head.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out")
    nn.init.normal_(head.classifier.weight, std=0.01)
    nn.init.zeros_(head.classifier.bias)
    head.classifier = nn.Sequential(nn.Dropout2d(DROP), head.classifier)
    return head


class UperNet(Whole):
    """Images (B, C, H, W) to logits (B, classes, H, W), and to those of the FCN (B, classes, H/16, W/16)."""

    names = NAMES
    multiple = COARSEST  # what the sides of images are multiples of
    grow = False  # let a window be smaller where an image is
    loss_weights = (1.0, 0.4)  # of each output
    unlabelled_count = True  # in the mean of the loss, as in mmsegmentation

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


def upernet(num_classes: int = 150, channels: int = 512, auxiliary_channels: int = 256, **options: Any) -> UperNet:
    """Create a UperNet on a ViT-Adapter with `options`; UsageError where transformers is not installed."""
    return UperNet(ViTAdapter(**options), num_classes, channels, auxiliary_channels)


VARIANTS: dict[str, dict[str, Any]] = {
    "upernet_vit_adapter_tiny": {**BACKBONES["tiny"], **SEGMENTATION},
    "upernet_vit_adapter_small": {**BACKBONES["small"], **SEGMENTATION},
}
NANO: dict[str, dict[str, Any]] = {
    "upernet_vit_adapter_nano": {**BACKBONES["nano"], **SEGMENTATION, "channels": 64, "auxiliary_channels": 32}
}
