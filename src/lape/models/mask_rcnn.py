"""Mask R-CNN (He et al., arXiv 1703.06870) with a feature pyramid on ViT-Adapter: torchvision's engine.

Numbers, losses and initial weights are those of mmdetection 2.x, which ViT-Adapter (github.com/czczup/ViT-Adapter at
fd64a51) trains with. What torchvision does otherwise is left: anchors have whole pixels, an object's best anchor learns
it however small their overlap is (there from 0.3 on), and masks are pasted into boxes of whole pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from lape.errors import UsageError
from lape.models.vit_adapter import COARSEST, DETECTION, ViTAdapter
from lape.models.vit_adapter import VARIANTS as BACKBONES
from lape.models.whole import Whole

STRIDES = (4, 8, 16, 32)  # of the maps that regions are cut out of; the proposals see one of stride 64 beside them
BOX, MASK = 7, 14  # sides of what is cut out of them


class Pyramid(nn.Module):
    """Images (B, C, H, W), H and W multiples of 32, to five named maps (B, D, H/s, W/s), s = 4, 8, 16, 32, 64."""

    def __init__(self, body: ViTAdapter, channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork([info["num_chs"] for info in body.feature_info], channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): features for level, features in enumerate(self.body(images))})


class Anchors(AnchorGenerator):
    """Anchors in single precision at least: in bfloat16 the places of an image would be four pixels wide."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, with an L1 loss of boxes."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(sampled).bool() for sampled in self.fg_bg_sampler(labels))
        sampled = positive | negative
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        distance = (pred_bbox_deltas[positive] - torch.cat(regression_targets)[positive]).abs()
        return loss, distance.sum() / sampled.sum()


class RegionAlign(nn.Module):
    """Cut regions out of a pyramid's first four maps, each out of that of its size: (regions, D, side, side).

    mmcv's RoIAlign: unlike in torchvision's own pooler, the middle of a pixel is where half of it lies.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.level_of = LevelMapper(k_min=2, k_max=5)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        levels = self.level_of(boxes)
        boxes_of_images = torch.cat([F.pad(box, (1, 0), value=image) for image, box in enumerate(boxes)])
        finest = pyramid["0"]
        regions = finest.new_zeros(len(levels), finest.shape[1], self.side, self.side)
        for level, stride in enumerate(STRIDES):
            here = levels == level
            pooled = _cut(pyramid[str(level)].to(boxes_of_images), boxes_of_images[here], self.side, 1 / stride)
            regions[here] = pooled.to(regions.dtype)
        return regions


def _cut(maps: Tensor, boxes: Tensor, side: int, scale: float) -> Tensor:
    return roi_align(maps, boxes, side, spatial_scale=scale, sampling_ratio=0, aligned=True)


class BoxPredictor(nn.Module):
    """Regions (N, D) to logits (N, 1 + classes) and to corrections of boxes (N, 4·(1 + classes)).

    The background stands first, and has no correction: zeros, where torchvision's engine looks for one.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, 1 + classes), nn.Linear(width, 4 * classes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(regions), F.pad(self.bbox_pred(regions), (4, 0))


class MaskPredictor(MaskRCNNPredictor):
    """Regions (N, D, 14, 14) to logits (N, 1 + classes, 28, 28); that of the background is 0."""

    def forward(self, regions: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.pad(super().forward(regions), (0, 0, 0, 0, 1, 0))


class RegionHeads(RoIHeads):
    """torchvision's, with an L1 loss of boxes, and masks that are learnt as 0 or 1."""

    mask_roi_pool: Any
    mask_head: Any
    mask_predictor: Any

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Any = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        boxes, objects, labels_of_images, corrections = self.select_training_samples(proposals, targets)
        logits, corrected = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        labels = torch.cat(labels_of_images)
        positive = labels > 0
        of_label = corrected.unflatten(1, (-1, 4))[positive, labels[positive]]
        count = max(len(labels), 1)
        distance = (of_label - torch.cat(corrections)[positive]).abs()

        shown = [image > 0 for image in labels_of_images]
        boxes, objects = ([part[at] for part, at in zip(parts, shown, strict=True)] for parts in (boxes, objects))
        masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        own_masks = masks[torch.arange(len(masks), device=labels.device), labels[positive]]
        learnt = torch.cat([_masks(*parts, masks.shape[-1]) for parts in zip(targets, objects, boxes, strict=True)])
        differ = F.binary_cross_entropy_with_logits(own_masks, learnt.to(own_masks), reduction="sum")
        return [], {
            "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
            "loss_box_reg": distance.sum() / count,
            "loss_mask": differ / max(learnt.numel(), 1),
        }


def _masks(target: dict[str, Tensor], objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return what of each object's mask lies in its box, of objects (n,) and boxes (n, 4): booleans (n, side, side)."""
    numbered = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    return _cut(target["masks"][:, None].to(boxes), numbered, side, 1.0)[:, 0] >= 0.5


class MaskRCNN(Whole, GeneralizedRCNN):
    """Images in [0, 1], a list of (C, H, W) of any sizes, to boxes, classes (counted from 1) and masks.

    In training, with targets {"boxes" (n, 4), "labels" (n,), "masks" (n, H, W)}, it returns its five losses; in
    evaluation {"boxes", "labels", "scores", "masks" (n, 1, H, W)} of each image, masks as probabilities. It normalises
    the images, and in evaluation resizes them.
    """


def mask_rcnn(
    num_classes: int = 80,
    in_chans: int = 3,
    min_size: int = 800,
    max_size: int = 1333,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    channels: int = 256,
    anchor_scale: int = 8,
    anchor_samples: int = 256,
    candidates: int = 2000,
    candidates_in_evaluation: int = 1000,
    proposals: int = 1000,
    region_samples: int = 512,
    box_width: int = 1024,
    mask_convolutions: int = 4,
    **options: Any,
) -> MaskRCNN:
    """Create a Mask R-CNN on a ViT-Adapter with `options`.

    `anchor_scale` is the side of an anchor in cells of its map; of the `candidates` of all maps, the best `proposals`
    are looked at. Raises UsageError where mean and std are not of as many channels as images have.
    """
    if not in_chans == len(mean) == len(std):
        raise UsageError(
            f"The detector normalises its images by channel, and {in_chans} channels, {len(mean)} means and {len(std)} "
            "deviations were received. Give mean and std as many numbers as in_chans."
        )
    body = ViTAdapter(in_chans=in_chans, **options)
    ratios = (0.5, 1.0, 2.0)
    proposer = ProposalNetwork(
        Anchors(
            tuple((anchor_scale * stride,) for stride in (*STRIDES, 2 * STRIDES[-1])), (ratios,) * (1 + len(STRIDES))
        ),
        RPNHead(channels, len(ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=anchor_samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": candidates, "testing": candidates_in_evaluation},
        post_nms_top_n={"training": proposals, "testing": proposals},
        nms_thresh=0.7,
    )
    heads = RegionHeads(
        RegionAlign(BOX),
        TwoMLPHead(channels * BOX**2, box_width),
        BoxPredictor(box_width, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=region_samples,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=RegionAlign(MASK),
        mask_head=MaskRCNNHeads(channels, [channels] * mask_convolutions, dilation=1),
        mask_predictor=MaskPredictor(channels, channels, num_classes),
    )
    _init(heads)
    resize = GeneralizedRCNNTransform(
        min_size, max_size, list(mean), list(std), size_divisible=COARSEST, _skip_resize=True
    )
    return MaskRCNN(Pyramid(body, channels), proposer, heads, resize)


def _init(heads: Any) -> None:
    """Start the heads of boxes as mmdetection does; the others start so already."""
    for part in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(part.bias)
    for part, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(part.weight, std=std)
        nn.init.zeros_(part.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    "mask_rcnn_vit_adapter_tiny": {**BACKBONES["tiny"], **DETECTION},
    "mask_rcnn_vit_adapter_small": {**BACKBONES["small"], **DETECTION},
}
NANO: dict[str, dict[str, Any]] = {
    "mask_rcnn_vit_adapter_nano": {
        **BACKBONES["nano"],
        "min_size": 128,
        "max_size": 128,
        "channels": 64,
        "anchor_scale": 4,
        "anchor_samples": 64,
        "candidates": 200,
        "candidates_in_evaluation": 200,
        "proposals": 100,
        "region_samples": 64,
        "box_width": 128,
        "mask_convolutions": 2,
    }
}
