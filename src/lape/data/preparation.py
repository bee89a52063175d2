"""What happens to a training batch on its device, before the model sees it."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lape.data.batched import sent
from lape.data.classes import ImageSource
from lape.data.erasing import FILLINGS, Erasing
from lape.data.mixing import Mixing
from lape.data.pipeline import Batch, Normalise
from lape.errors import UsageError
from lape.experiment import Augmentation

# So many samples are augmented at once: on a card, where a kernel takes as long for a few as for many, more of them.
ROWS, ROWS_ON_A_CARD = 1024, 8192


class Preparation:
    """From a batch as the workers leave it to normalised images and the shares of their classes.

    The workers leave images normalised and, where asked for, erased: they are only mixed. Or they leave whole colour
    values, for which the rest is done here: augmented as a batch (`batched`), and mixed before they are erased
    (`erase_after_mix`) or afterwards. What is random is drawn on the host, from the generators that `pipeline.reseed`
    sets: on the device a step is always the same, which can be compiled. Only what erased pixels become is drawn there.

    `share` is the number of images in a part, and `size` their (H, W). Raises UsageError where an odd number is mixed.
    """

    def __init__(
        self,
        source: ImageSource,
        chosen: Augmentation,
        size: tuple[int, int],
        share: int,
        device: torch.device | str = "cpu",
        compile: bool = False,
    ) -> None:
        self.size, self.device, self.chosen = size, torch.device(device), chosen
        self.augment = _augmenter(source, chosen, size)
        rows = ROWS_ON_A_CARD if self.device.type == "cuda" else ROWS
        self.at_once = max(1, rows // share) if chosen.batched else 1
        self.mixing = _mixing(chosen, share)
        whole = chosen.erase_after_mix or chosen.batched  # colour values, and nothing is erased yet
        self.normalise = Normalise(source, device) if whole else nn.Identity()
        self.erasing = Erasing(chosen.reprob, FILLINGS[chosen.remode or "const"]) if whole and chosen.reprob else None
        self.classes = torch.arange(len(source.classes), device=device)
        self.off = (chosen.smoothing or 0.0) / len(source.classes)
        self.on = 1 - (chosen.smoothing or 0.0) + self.off
        self.finish: Callable[..., tuple[Tensor, Tensor]] = self._finished
        if compile:
            self.finish = torch.compile(self._finished, dynamic=False)

    def ahead(self, batches: Iterator[Batch], to_device: Callable[[Any], Any]) -> Iterator[Batch]:
        """Bring batches to the device, and augment some of them at once where the device does it.

        A sample's augmentation depends on its own draws alone, so that only the time is another: a thousand rows take
        half the time at once that eight parts of them take one by one. Draws stay on the host: what they choose is
        known there without waiting for the device.
        """

        def moved(batch: Batch) -> Batch:
            return (*to_device(tuple(batch[:2])), *batch[2:])

        while few := [moved(batch) for batch in islice(batches, self.at_once)]:
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
        shares = self.mixing.shares(epoch, self.size) if self.mixing else []
        marks: list[Any] = []
        if self.erasing:
            marks = self.erasing.marks(np.random.random_sample((len(labels), self.erasing.columns)), self.size)
        return self.finish(images, labels, *(self._sent(part) for part in (shares, marks)))

    def _sent(self, arrays: Sequence[Any]) -> list[Tensor]:
        return [sent(torch.from_numpy(array), self.device) for array in arrays]

    def _finished(
        self, images: Tensor, labels: Tensor, shares: Sequence[Tensor], marks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mix, normalise and erase, by what was drawn."""
        targets = torch.where(labels[:, None] == self.classes, self.on, self.off)
        if self.chosen.erase_after_mix:
            images = self._erased(self._mixed(images, shares[:1]).round(), marks)
        else:
            images = self._mixed(self._erased(images, marks), shares[:1])
        return images, self._mixed(targets, shares[1:])

    def _mixed(self, values: Tensor, shares: Sequence[Tensor]) -> Tensor:
        return self.mixing(values, *shares) if self.mixing else values

    def _erased(self, images: Tensor, marks: Sequence[Tensor]) -> Tensor:
        images = self.normalise(images)
        return self.erasing(images, *marks) if self.erasing else images


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


def _mixing(chosen: Augmentation, share: int) -> Mixing | None:
    if not (chosen.mixup or chosen.cutmix):
        return None
    if share % 2:
        raise UsageError(
            f"mixup and cutmix pair the images of a part, and {share} is odd: use an even number of images "
            "on each process (batch_size / accumulate / processes)."
        )
    return Mixing(chosen.mixup or 0.0, chosen.cutmix or 0.0, chosen.mix_epochs)
