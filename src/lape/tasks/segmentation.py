"""Semantic segmentation: cross-entropy of every pixel; mean IoU in percent, by sliding windows at one or more scales.

Facts from mmsegmentation 0.x and from github.com/rstrudel/segmenter at 20d1bfa.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from lape.data import dense
from lape.data.dense import within
from lape.data.maps import IGNORED, MapSource
from lape.data.pipeline import Normalise
from lape.data.preparation import Finishing
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.models.rebuilding import Build
from lape.models.registry import models_for
from lape.tasks.answers import Sheet
from lape.tasks.building import build_model, filled, refuse_a_table_of_no_patch, refuse_foreign
from lape.tasks.dense import DenseWork

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), uint8, maps (B, H, W)

SETTINGS = {
    *("hflip", "short_side", "long_side", "crop", "scale_jitter", "class_cap", "photometric"),
    *("stride", "test_scales", "test_flip"),
}
WINDOWS_AT_ONCE = 8  # even: a window and its mirror image go together
IN_A_LINE = 3  # classes


@dataclass(frozen=True)
class ClassMap:
    """The class of every pixel of a picture: labels (H, W)."""

    labels: Tensor

    def line(self, classes: Sequence[str]) -> str:
        """The largest classes, with their shares of the picture."""
        shares = ((label, count / self.labels.numel()) for label, count in self._counts()[:IN_A_LINE])
        return ", ".join(f"{classes[label]} {share:.1%}" for label, share in shares)

    def legend(self, classes: Sequence[str]) -> list[tuple[int, str]]:
        """Each class that there is, the largest first."""
        return [(label, classes[label]) for label, _ in self._counts()]

    def records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Each class that there is, with its share of the picture, the largest first."""
        return [{"class": classes[label], "share": count / self.labels.numel()} for label, count in self._counts()]

    def rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each class."""
        return self.records(classes)

    def draw(self, sheet: Sheet) -> None:
        """Draw every pixel in the colour of its class."""
        sheet.fill_pixels(self.labels)

    def _counts(self) -> list[tuple[int, int]]:
        """Classes and their pixels, the largest first."""
        counts = self.labels.flatten().bincount()
        order = counts.argsort(descending=True).tolist()
        return [(label, int(counts[label])) for label in order if counts[label]]


@dataclass(frozen=True)
class Inference:
    """How a picture of any size is judged by a model of windows: the mean of its answers over scales and mirror images.

    Args:
        normalise: From whole colour values (B, 3, H, W) to what the model takes.
        window: Largest side of what the model sees at once.
        stride: Distance from one window to the next; the last one ends with the picture.
        short_side: Shorter side that a picture is resized to, at scale 1.
        long_side: Longer side that it has at most after that.
        multiple: Sides are then enlarged to a multiple of this.
        grow: Enlarge a picture that is smaller than a window; otherwise windows get smaller.
        scales: Factors of short_side and long_side.
        flip: Judge the mirror image too.

    Raises UsageError for windows with pixels between them, and for scales that leave nothing.
    """

    normalise: Callable[[Tensor], Tensor]
    window: int
    stride: int
    short_side: int
    long_side: int
    multiple: int = 1
    grow: bool = False
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise UsageError(
                f"stride is at least 1 and at most the side of a window, {self.window}, so that every pixel is in one; "
                f"it is {self.stride}. Change stride, or crop, which windows are as large as."
            )
        if not self.scales or min(self.scales) <= 0:
            raise UsageError(f"test_scales are one or more numbers above 0, not {list(self.scales)}: change them.")

    def __call__(self, model: nn.Module, picture: Tensor, classes: int) -> Tensor:
        """Return the probability of every class at every pixel (classes, H, W) of a picture (3, H, W), uint8."""
        like = next(model.parameters())
        image = self.normalise(picture[None].to(like.device)).to(like.dtype)
        answers = (self._at(scale, model, image, classes) for scale in self.scales)
        return reduce(torch.add, answers) / len(self.scales)

    def _at(self, scale: float, model: nn.Module, image: Tensor, classes: int) -> Tensor:
        """Return probabilities (classes, H, W) of an image (1, 3, H, W), judged at one scale."""
        _, _, height, width = image.shape
        for size in self._sizes(height, width, scale):
            image = _resize(image, size)
        views = torch.cat([image, image.flip(3)]) if self.flip else image
        logits = _resize(self._slide(model, views, classes), (height, width))
        if self.flip:
            logits = torch.stack([logits[0], logits[1].flip(2)])
        return logits.softmax(1).mean(0)

    def _sizes(self, height: int, width: int, scale: float) -> Iterator[tuple[int, int]]:
        """The sizes (H, W) that an image is brought to, one after the other."""
        height, width = within((height, width), int(self.short_side * scale), int(self.long_side * scale))
        yield height, width
        height, width = (math.ceil(side / self.multiple) * self.multiple for side in (height, width))
        yield height, width
        if self.grow and (least := min(height, width)) < self.window:
            yield int(height / least * self.window), int(width / least * self.window)

    def _slide(self, model: nn.Module, views: Tensor, classes: int) -> Tensor:
        """Return logits (V, classes, H, W) of views (V, 3, H, W), averaged where windows overlap."""
        count, _, height, width = views.shape
        places = list(product(*(_spans(side, self.window, self.stride) for side in (height, width))))
        windows = torch.cat([views[:, :, rows, columns] for rows, columns in places])  # (places · V, 3, h, w)
        answers = (
            answer for part in windows.split(WINDOWS_AT_ONCE) for answer in _outputs(model, part)[0].split(count)
        )
        total = views.new_zeros(count, classes, height, width, dtype=torch.float32)
        times = total.new_zeros(height, width)
        for (rows, columns), answer in zip(places, answers, strict=True):
            total[:, :, rows, columns] += answer
            times[rows, columns] += 1
        return total / times


class Segmentation:
    """Names the class of every pixel.

    `weights` are those of the model's outputs in the loss: of its logits, and of such as only train beside. The mean is
    over the labelled pixels, or over all of them with `unlabelled_count`: so it is in mmsegmentation.
    """

    score = "val_miou"
    reported = ("val_miou", "val_pixel_accuracy")

    def __init__(
        self, classes: int, inference: Inference, weights: tuple[float, ...] = (1.0,), unlabelled_count: bool = False
    ) -> None:
        self.classes, self.inference = classes, inference
        self.weights, self.unlabelled_count = weights, unlabelled_count

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Weighted sum of the outputs' mean cross-entropies for images (B, 3, H, W) and maps (B, H, W), a scalar.

        Zero where no pixel is labelled.
        """
        loss = images.new_zeros(())
        for weight, logits in zip(self.weights, _outputs(model, images), strict=True):
            logits = _resize(logits, targets.shape[1:])
            loss = loss + weight * F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").mean()
        labelled = (targets != IGNORED).sum().clamp(min=1)
        return loss if self.unlabelled_count else loss * (targets.numel() / labelled)

    def meter(self, keep: bool = False) -> "SegmentationMeter":
        """A new account of validation results."""
        return SegmentationMeter(self)

    @torch.no_grad()
    def predict(self, model: nn.Module, picture: Tensor) -> Tensor:
        """Return the class of every pixel (H, W), int64, of a picture (3, H, W), uint8; the model is in eval mode."""
        return self.inference(model, picture, self.classes).argmax(0)


class SegmentationMeter(nn.Module):
    """Mean IoU and the share of right pixels, over batches and processes; unlabelled pixels do not count."""

    def __init__(self, task: Segmentation) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        self.task = task
        self.iou = MulticlassJaccardIndex(task.classes, average="macro", ignore_index=IGNORED, validate_args=False)
        self.right = MulticlassAccuracy(task.classes, average="micro", ignore_index=IGNORED, validate_args=False)

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Count a batch."""
        for picture, truth in zip(*batch, strict=True):
            named = self.task.predict(model, picture)
            self.iou.update(named, truth)
            self.right.update(named, truth)

    def compute(self) -> dict[str, float]:
        """What is known of all batches of all processes, in percent: `val_miou`, over the classes that there are in
        the maps or were named, and `val_pixel_accuracy`.

        Raises RunError where no pixel is labelled.
        """
        miou, right = (100 * float(metric.compute()) for metric in (self.iou, self.right))
        if math.isnan(miou):
            raise RunError(
                "IoU is of labelled pixels, and the validation maps have none: label some, or change the set."
            )
        return {"val_miou": miou, "val_pixel_accuracy": right}

    def answers(self) -> None:
        """Nothing: there is no class of a whole image."""


def _outputs(model: nn.Module, images: Tensor) -> Sequence[Tensor]:
    """A model's logits, and behind them those that only train beside."""
    outputs = model(images)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, H, W) as OpenCV does, without antialiasing."""
    return maps if maps.shape[2:] == size else F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def _spans(side: int, window: int, stride: int) -> list[slice]:
    """Where windows lie along a side: one every `stride`, and the last one flush with its end."""
    window = min(window, side)
    return [slice(start, start + window) for start in (*range(0, side - window, stride), side - window)]


class SegmentationWork(DenseWork):
    """Pictures with a class for every pixel, and a model that tells it."""

    source_type = MapSource

    def __init__(self, experiment: Experiment, source: MapSource, build: Build) -> None:
        refuse_foreign(experiment, source, SETTINGS)
        self.experiment, self.source = experiment, source
        self.augmentation = filled(experiment, source.augmentation)
        self.dense = filled(experiment, source.dense)
        if experiment.model not in (segmenters := models_for(source.kind)):
            raise UsageError(
                f"{source.name} is a set for segmentation, and {experiment.model} does not tell the class of a pixel. "
                f"Take one of {', '.join(segmenters)}, or another set."
            )
        self.module = build_model(experiment, source, build, {})
        refuse_a_table_of_no_patch(experiment, self.module)

    def task(self, fabric: Fabric) -> Segmentation:
        """Create what is learned: the class of every pixel."""
        chosen: Any = self.dense
        inference = Inference(
            window=chosen.crop,
            stride=chosen.stride,
            short_side=chosen.short_side[-1],
            long_side=chosen.long_side,
            scales=chosen.test_scales,
            flip=chosen.test_flip,
            multiple=self.module.multiple,
            grow=self.module.grow,
            normalise=Normalise(self.source, fabric.device),
        )
        module = self.module
        return Segmentation(len(self.source.classes), inference, module.loss_weights, module.unlabelled_count)

    def preparation(self, share: int, device: torch.device) -> Finishing:
        """Create what is left to do to a batch on the device."""
        return Finishing(Normalise(self.source, device))

    def training(self) -> Dataset[Any]:
        """The training pictures, augmented."""
        return dense.segmentation_training(self.source, self.augmentation, self.dense, self.experiment.seed)

    def validation(self) -> Dataset[Any]:
        """The validation pictures."""
        return dense.segmentation_validation(self.source)

    def answers(self, task: Segmentation, views: Sequence[Tensor], threshold: float) -> list[ClassMap]:
        """Name the class of every pixel (H, W) of pictures."""
        return [ClassMap(task.predict(self.module, picture)) for picture in views]
