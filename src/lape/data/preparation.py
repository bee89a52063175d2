"""What happens to a training batch on its device, before the model sees it."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lape.data.classes import ImageSource
from lape.data.pipeline import Batch, Normalise
from lape.errors import UsageError
from lape.experiment import Augmentation

Step = Callable[[Tensor], Tensor]

ROWS = 1024  # so many are augmented at once


class Preparation:
    """From a batch as the workers leave it to normalised images and the shares of their classes.

    The workers leave images normalised and, where asked for, erased: they are only mixed. Or they leave whole colour
    values, for which the rest is done here: augmented as a batch (`batched`), and mixed before they are erased
    (`erase_after_mix`) or afterwards. What is random is drawn from the generators that `pipeline.reseed` sets.

    `share` is the number of images in a part, and `size` their (H, W). Raises UsageError where an odd number is mixed.
    """

    def __init__(
        self,
        source: ImageSource,
        chosen: Augmentation,
        size: tuple[int, int],
        share: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.augment = _augmenter(source, chosen, size)
        self.at_once = max(1, ROWS // share) if chosen.batched else 1
        self.mix = _mixing(len(source.classes), chosen, share)
        finish: list[Step] = [Normalise(source, device), *_erasing(chosen, device)]
        self.before: list[Step] = []
        self.after: list[Step] = []
        if chosen.erase_after_mix:
            self.before, self.after = [Tensor.float], [torch.round, *finish]
        elif chosen.batched:
            self.before = finish

    def ahead(self, batches: Iterator[Batch], to_device: Callable[[Any], Any]) -> Iterator[Batch]:
        """Bring batches to the device, and augment some of them at once where the device does it.

        A sample's augmentation depends on its own draws alone, so that only the time is another: a thousand rows take
        half the time at once that eight parts of them take one by one.
        """
        while few := [to_device(batch) for batch in islice(batches, self.at_once)]:
            if len(few) == 1 or len(few[0]) == 2:
                yield from few
                continue
            images, labels, draws = (torch.cat(parts) for parts in zip(*few, strict=True))
            sizes = [len(batch[1]) for batch in few]
            yield from zip(self.augment(images, draws).split(sizes), labels.split(sizes), strict=True)

    def __call__(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) and targets (B, classes), smoothed and mixed."""
        images, labels, *draws = batch
        if draws:
            images = self.augment(images, *draws)
        for step in self.before:
            images = step(images)
        images, targets = self.mix(images, labels, epoch)
        for step in self.after:
            images = step(images)
        return images, targets


class Finishing:
    """From a batch whose images the workers left whole, uint8, to what the model takes."""

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self.finish = finish

    def ahead(self, batches: Iterator[Batch], to_device: Callable[[Any], Any]) -> Iterator[Batch]:
        """Bring batches to the device."""
        return map(to_device, batches)

    def __call__(self, batch: Batch, epoch: int) -> tuple[Any, Any]:
        """Return images and targets."""
        images, targets = batch
        return self.finish(images), targets


def _augmenter(source: ImageSource, chosen: Augmentation, size: tuple[int, int]) -> Callable[..., Tensor]:
    if not chosen.batched:
        return nn.Identity()
    from lape.data.batched import Augmenter

    return Augmenter(size, source.mean, chosen)


def _mixing(classes: int, chosen: Augmentation, share: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """Mixup and cutmix, one draw for a batch, in the epochs that have them; targets are smoothed in all."""
    from timm.data.mixup import Mixup, mixup_target

    smoothing = chosen.smoothing or 0.0
    if not (chosen.mixup or chosen.cutmix):
        return lambda images, labels, _: (images, mixup_target(labels, classes, smoothing=smoothing))
    if share % 2:
        raise UsageError(
            f"mixup and cutmix pair the images of a part, and {share} is odd: use an even number of images "
            "on each process (batch_size / accumulate / processes)."
        )
    mixup = Mixup(chosen.mixup or 0.0, chosen.cutmix or 0.0, label_smoothing=smoothing, num_classes=classes)

    def mix(images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        mixup.mixup_enabled = chosen.mix_epochs is None or epoch < chosen.mix_epochs
        return mixup(images, labels)

    return mix


def _erasing(chosen: Augmentation, device: torch.device | str) -> list[Step]:
    from timm.data.random_erasing import RandomErasing

    return [RandomErasing(chosen.reprob, mode=chosen.remode or "const", device=str(device))] if chosen.reprob else []
