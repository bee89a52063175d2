"""Object detection with masks: the detector's own losses; COCO's average precision of boxes and masks in percent."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from lape.data import dense
from lape.data.instances import InstanceSource
from lape.data.preparation import Finishing
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.models.rebuilding import Build
from lape.models.registry import models_for
from lape.tasks.answers import Sheet
from lape.tasks.building import build_model, filled, refuse_a_table_of_no_patch, refuse_foreign
from lape.tasks.dense import DenseWork

Target = dict[str, Tensor]  # boxes (n, 4), labels (n,) from 1, masks (n, H, W); to be judged also iscrowd, area (n,)
Batch = tuple[list[Tensor], list[Target]]  # images (3, H, W), uint8

SETTINGS = {"hflip", "short_side", "long_side", "zoom", "zoom_crop", "crop"}
INSIDE = 0.5  # least probability of a pixel of a mask

# What is measured: our names and torchmetrics'.
OUTLINES = {"box": "bbox", "mask": "segm"}
PRECISIONS = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
}


@dataclass(frozen=True)
class DetectedObjects:
    """The objects found in a picture: boxes (n, 4) as x0 y0 x1 y1, labels (n,) from 0, masks (n, H, W), scores (n,)."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    scores: Tensor

    def line(self, classes: Sequence[str]) -> str:
        """How many of each class."""
        return ", ".join(text for _, text in self.legend(classes)) or "nothing found"

    def legend(self, classes: Sequence[str]) -> list[tuple[int, str]]:
        """Each class, with the number of its objects."""
        labels = self.labels.tolist()
        return [(label, f"{labels.count(label)} {classes[label]}") for label in dict.fromkeys(labels)]

    def records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Each object with its score and the corners of its box, in pixels; its mask is drawn alone."""
        found = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        corners = ("x0", "y0", "x1", "y1")
        return [
            {"class": classes[label], "score": score, **dict(zip(corners, box, strict=True))}
            for label, score, box in found
        ]

    def rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each object."""
        return self.records(classes)

    def draw(self, sheet: Sheet) -> None:
        """Draw boxes with scores, and masks."""
        scores = [f"{score:.2f}" for score in self.scores.tolist()]
        sheet.outline_objects(self.boxes, self.masks, self.labels.tolist(), scores)


class Detection:
    """Finds each object's box and mask, and names its class."""

    score = "val_box_ap"
    reported = ("val_box_ap", "val_mask_ap")

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> Tensor:
        """Sum of the model's losses for images (3, H, W) in [0, 1], a scalar."""
        return reduce(torch.add, model(images, targets).values())

    def meter(self, keep: bool = False) -> "DetectionMeter":
        """A new account of validation results."""
        return DetectionMeter()

    @torch.no_grad()
    def predict(self, model: nn.Module, picture: Tensor, threshold: float) -> DetectedObjects:
        """Return what has a score of `threshold` or more in a picture (3, H, W), uint8; the model is in eval mode."""
        (found,) = _find(model, [picture])
        sure = found["scores"] >= threshold
        boxes, labels, masks, scores = (found[name][sure] for name in ("boxes", "labels", "masks", "scores"))
        return DetectedObjects(boxes, labels - 1, masks.bool(), scores)


class DetectionMeter(nn.Module):
    """COCO's average precision over batches and processes; masks are kept run-length encoded."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.detection import MeanAveragePrecision

        self.precision = MeanAveragePrecision(
            iou_type=("bbox", "segm"), backend="faster_coco_eval", sync_on_compute=False
        )
        self.precision.warn_on_many_detections = False  # COCO counts the hundred surest of a class, as it should

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Count a batch."""
        images, targets = batch
        found = [{name: value.cpu() for name, value in one.items()} for one in _find(model, images)]
        self.precision.update(found, [{name: value.cpu() for name, value in one.items()} for one in targets])

    def compute(self) -> dict[str, float]:
        """What is known of all batches of all processes, in percent: `val_box_ap`, `val_mask_ap`, at IoU 0.5 and 0.75
        (`val_box_ap50` ...) and of small, medium and large objects (`val_box_ap_small` ...).

        A size that no object of the set has is left out. Raises RunError where there is no object but in crowds.
        """
        whole = copy(self.precision)
        for name, entries in _of_all_processes(self.precision.metric_state).items():
            setattr(whole, name, entries)
        result = whole.compute()
        precisions = {
            f"val_{outline}_{name}": float(result[f"{theirs}_{key}"])
            for name, key in PRECISIONS.items()
            for outline, theirs in OUTLINES.items()
        }
        if precisions[Detection.score] < 0:  # COCO's sign for: not defined
            raise RunError(
                "Average precision is of single objects, and the validation images have none: annotate some, or change "
                "the set."
            )
        return {name: 100 * value for name, value in precisions.items() if value >= 0}

    def answers(self) -> None:
        """Nothing: there is no class of a whole image."""


def _find(model: nn.Module, images: list[Tensor]) -> list[Target]:
    """What a model finds in images (3, H, W), uint8; its masks are (n, H, W), uint8."""
    like = next(model.parameters())
    found: list[Target] = model([image.to(like) / 255 for image in images])
    return [
        {
            "boxes": one["boxes"].float(),
            "labels": one["labels"],
            "masks": (one["masks"][:, 0] >= INSIDE).byte(),
            "scores": one["scores"].float(),
        }
        for one in found
    ]


def _of_all_processes(states: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join the states of all processes, in the order of the images: process p of P has every P-th.

    torchmetrics' own way fails where one process has more images than another.
    """
    if not torch.distributed.is_initialized():
        return states
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, states)
    return {
        name: [entry for turn in zip_longest(*(share[name] for share in shares)) for entry in turn if entry is not None]
        for name in states
    }


class DetectionWork(DenseWork):
    """Pictures with objects, and a detector."""

    source_type = InstanceSource

    def __init__(self, experiment: Experiment, source: InstanceSource, build: Build) -> None:
        refuse_foreign(experiment, source, SETTINGS)
        if experiment.precision.endswith("16-true"):
            raise UsageError(
                f"precision {experiment.precision} would round boxes to whole pixels and more: take bf16-mixed, "
                "16-mixed or 32-true."
            )
        self.experiment, self.source = experiment, source
        self.augmentation = filled(experiment, source.augmentation)
        self.dense = filled(experiment, source.dense)
        sides = {"min_size": self.dense.short_side[-1], "max_size": self.dense.long_side}  # pyright: ignore
        if experiment.model not in (detectors := models_for(source.kind)):
            raise UsageError(
                f"{source.name} is a set for detection, and {experiment.model} is no detector. Take one of "
                f"{', '.join(detectors)}, or another set."
            )
        self.module = build_model(experiment, source, build, sides)
        refuse_a_table_of_no_patch(experiment, self.module)

    def task(self, fabric: Fabric) -> Detection:
        """Create what is learned: boxes, classes and masks."""
        return Detection()

    def preparation(self, share: int, device: torch.device) -> Finishing:
        """Create what is left to do to a batch on the device."""
        return Finishing(dense.Scaled())

    def training(self) -> Dataset[Any]:
        """The training pictures, augmented."""
        return dense.detection_training(self.source, self.augmentation, self.dense, self.experiment.seed)

    def validation(self) -> Dataset[Any]:
        """The validation pictures."""
        return dense.detection_validation(self.source)

    def answers(self, task: Detection, views: Sequence[Tensor], threshold: float) -> list[DetectedObjects]:
        """Find the objects of pictures, those with a score of `threshold` or more."""
        return [task.predict(self.module, picture, threshold) for picture in views]
