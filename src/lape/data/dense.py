"""From pictures with objects or maps to batches. As in `pipeline`, a sample depends on (seed, epoch, number) alone.

What ViT-Adapter and Segmenter were trained with is mmdetection's 2.x and mmsegmentation's 0.x steps. A step here is
torchvision's where it has that step; where its own differs, a class below says in what.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from lape.data.instances import InstanceSource, InstanceSplit
from lape.data.maps import IGNORED, MapSource, MapSplit
from lape.data.pipeline import Draws, Key, Unreadable, reseed
from lape.errors import RunError
from lape.experiment import Augmentation, Dense

Size = tuple[int, int]  # height, width
Target = dict[str, Tensor]

TRIES = 10  # windows that are looked at for one in which no class has too much


class Scaled:
    """Whole colour values, 0 to 255, to the numbers from 0 to 1 that torchvision's detectors normalise themselves."""

    def __call__(self, images: Any) -> Any:
        """Return images (B, C, H, W), or a list of images (C, H, W) each of its own size, as float32."""
        return images / 255 if isinstance(images, Tensor) else [image / 255 for image in images]


def within(size: Size, shorter: int, longer: int) -> Size:
    """The size, at least 1, of a picture enlarged as far as the limits on its sides allow, its ratio kept."""
    factor = min(shorter / min(size), longer / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def _uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


def _whole(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


class Resized(v2.Transform):
    """Resize to one of some shorter sides; a factor by chance goes with it and with the longest side.

    torchvision's RandomShortestSize has no factor, and rounds down: 427 may become 426, and a narrow side 0.
    """

    def __init__(self, shorter: Sequence[int], longer: int, jitter: tuple[float, float] = (1, 1)) -> None:
        super().__init__()
        self.shorter, self.longer, self.jitter = shorter, longer, jitter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = _uniform(*self.jitter)
        shorter = self.shorter[_whole(0, len(self.shorter) - 1)]
        return {"size": within(v2.query_size(flat_inputs), int(shorter * factor), int(self.longer * factor))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # OpenCV's bilinear, by which the published models were trained and measured, does not antialias. Masks and maps
        # are resized by the nearest pixel, as mmdetection's bitmaps are.
        return functional.resize(inpt, **params, antialias=False)


class Window(v2.Transform):
    """Cut out a window at a uniform place, each side uniform between two limits, or the picture's own if that is less.

    torchvision's RandomCrop has one size, to which it fills up smaller pictures or refuses them.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = v2.query_size(flat_inputs)
        height, width = (_whole(min(side, self.smallest), min(side, self.largest)) for side in size)
        return {
            "top": _whole(0, size[0] - height),
            "left": _whole(0, size[1] - width),
            "height": height,
            "width": width,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.crop(inpt, **params)


class MixedWindow(Window):
    """A window in which each class has less than `cap` of the labelled pixels, if one of ten is such; else any."""

    def __init__(self, side: int, cap: float) -> None:
        super().__init__(side, side)
        self.cap = cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels = next(inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask))
        for _ in range(TRIES):
            window = super().make_params(flat_inputs)
            counts = functional.crop(labels, **window).flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if 0 < counts.max() < self.cap * counts.sum():
                return window
        return super().make_params(flat_inputs)


class FilledUp(v2.Transform):
    """Fill up at the right and at the bottom to a square; torchvision's Pad adds the same to pictures of any size."""

    def __init__(self, side: int, colour: Sequence[int]) -> None:
        super().__init__()
        self.side = side
        self.fill = {tv_tensors.Image: list(colour), tv_tensors.Mask: IGNORED}

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, self.side - width, self.side - height]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.pad(inpt, **params, fill=self.fill[type(inpt)])


class Brightness(v2.Transform):
    """Add up to `most` to all colour values, or take it off; torchvision multiplies."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"added": _uniform(-self.most, self.most)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        changed = (inpt + params["added"]).clamp_(0, 255)
        return tv_tensors.Image(changed.to(torch.uint8))


class Saturation(v2.Transform):
    """Multiply HSV's saturation: a colour moves from or to its largest value; torchvision moves it from or to grey."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"factor": _uniform(self.low, self.high)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        smallest, largest = inpt.float().aminmax(dim=-3, keepdim=True)
        full = largest / (largest - smallest).clamp_(min=1)  # the factor by which saturation is 1
        changed = largest - (largest - inpt) * full.clamp_(max=params["factor"])
        return tv_tensors.Image(changed.round_().to(torch.uint8))


def distortion() -> v2.Transform:
    """mmsegmentation's photometric distortion; torchvision's also exchanges colours, and differs where steps here do.

    What mmsegmentation calls contrast multiplies all colour values, which torchvision calls brightness. Its hue moves
    by whole steps of 2°, this one by any angle between the same limits.
    """
    contrast = v2.RandomApply([v2.ColorJitter(brightness=(0.5, 1.5))])
    colours = [v2.RandomApply([Saturation(0.5, 1.5)]), v2.RandomApply([v2.ColorJitter(hue=18 / 180)])]
    orders = [v2.Compose([contrast, *colours]), v2.Compose([*colours, contrast])]
    return v2.Compose([v2.RandomApply([Brightness(32)]), v2.RandomChoice(orders)])


def visible(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Leave boxes, labels and masks of the objects whose box and mask are not empty.

    torchvision's SanitizeBoundingBoxes looks at no mask, and drops every box thinner than a pixel.
    """
    boxes, masks = target["boxes"], target["masks"]
    seen = (boxes[:, 2:] > boxes[:, :2]).all(1) & (masks.amax((1, 2)) > 0)
    rows = seen.nonzero()[:, 0]  # of masks, seen itself would take ten times as long to select them
    return image, {name: target[name].index_select(0, rows) for name in ("boxes", "labels", "masks")}


def objects(split: InstanceSplit, index: int) -> tuple[Tensor, Target]:
    """Open a picture (3, H, W) and its objects: boxes (n, 4), labels (n,) from 1, masks (n, H, W), iscrowd, area (n,).

    Raises RunError for files that cannot be read, as `labelled` does.
    """
    image, found = tv_tensors.Image(split.picture(index)), split.instances(index)
    corners: Any = {"format": tv_tensors.BoundingBoxFormat.XYXY, "canvas_size": tuple(image.shape[-2:])}
    return image, {
        "boxes": tv_tensors.BoundingBoxes(found.boxes, **corners),
        "labels": found.labels + 1,
        "masks": tv_tensors.Mask(found.masks),
        "iscrowd": found.crowd.long(),
        "area": found.areas,
    }


def labelled(split: MapSplit, index: int) -> tuple[Tensor, Tensor]:
    """Open a picture (3, H, W) and its map (H, W)."""
    labels = split.map(index).to(torch.uint8)  # of which IGNORED is the largest
    return tv_tensors.Image(split.picture(index)), tv_tensors.Mask(labels)


def listed(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch of pictures of any size, and of their targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def stacked(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of pictures of one size (B, 3, H, W), and of their maps (B, H, W) in int64."""
    images, maps = zip(*samples, strict=True)
    return default_collate(list(images)), default_collate([labels.long() for labels in maps])


class AnnotatedPictures(Dataset[Any]):
    """Pictures opened one by one with what is to be found in them, and sent through steps together."""

    def __init__(
        self,
        split: InstanceSplit | MapSplit,
        read: Callable[[Any, int], tuple[Tensor, Any]],
        batch: Callable[[list[Any]], Any],
        steps: Sequence[Callable[..., Any]] = (),
        seed: int = 0,
    ) -> None:
        self.split, self.read, self.batch = split, read, batch
        self.transform = v2.Compose([*steps, v2.ToPureTensor()])
        self.draws = Draws(seed, len(split), columns=1)

    def __getitem__(self, key: Key) -> Any:
        epoch, numbers = key
        samples = []
        try:
            for index, draw in zip(numbers.tolist(), self.draws(epoch, numbers)[:, 0].tolist(), strict=True):
                reseed(int(draw * 2**53))
                samples.append(self.transform(*self.read(self.split, index)))
        except RunError as error:
            return Unreadable(str(error))
        return self.batch(samples)


def detection_training(
    source: InstanceSource, augmentation: Augmentation, dense: Dense, seed: int
) -> AnnotatedPictures:
    """The training pictures of a set with their objects, augmented anew in every epoch.

    A batch is images, a list of (3, H, W) in uint8, and a list of targets: boxes (n, 4), labels (n,) from 1, and masks
    (n, H, W). Objects that are cut away are left out, and a picture may have none.
    """
    assert dense.short_side is not None  # every set has these three
    assert dense.long_side is not None
    assert dense.crop is not None
    resized = Resized(dense.short_side, dense.long_side)
    sized: v2.Transform = resized
    if dense.zoom and dense.zoom_crop:
        zoomed = v2.Compose([Resized(dense.zoom, dense.long_side), Window(*dense.zoom_crop), resized])
        sized = v2.RandomChoice([resized, zoomed])
    flip = v2.RandomHorizontalFlip(augmentation.hflip or 0)
    return AnnotatedPictures(
        source.train, objects, listed, [flip, sized, Window(dense.crop, dense.crop), visible], seed
    )


def detection_validation(source: InstanceSource) -> AnnotatedPictures:
    """The validation pictures of a set as they are, with all their objects, and of these iscrowd and area (n,) too."""
    return AnnotatedPictures(source.validation, objects, listed)


def segmentation_training(source: MapSource, augmentation: Augmentation, dense: Dense, seed: int) -> AnnotatedPictures:
    """The training pictures of a set with their maps, augmented anew in every epoch.

    A batch is images (B, 3, S, S) in uint8 and maps (B, S, S) in int64, S = dense.crop.
    """
    assert dense.short_side is not None  # every set has these three
    assert dense.long_side is not None
    assert dense.crop is not None
    cap = 1 if dense.class_cap is None else dense.class_cap
    steps: list[Callable[..., Any]] = [
        Resized(dense.short_side, dense.long_side, dense.scale_jitter or (1, 1)),
        MixedWindow(dense.crop, cap) if cap < 1 else Window(dense.crop, dense.crop),
        v2.RandomHorizontalFlip(augmentation.hflip or 0),
    ]
    if dense.photometric:
        steps.append(distortion())
    # mmsegmentation fills up with 0 after it has normalised: with the mean colour.
    steps.append(FilledUp(dense.crop, [round(255 * mean) for mean in source.mean]))
    return AnnotatedPictures(source.train, labelled, stacked, steps, seed)


def segmentation_validation(source: MapSource) -> AnnotatedPictures:
    """The validation pictures of a set and their maps as they are: pictures of one size make up a batch."""
    return AnnotatedPictures(source.validation, labelled, stacked)
