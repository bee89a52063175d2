"""From a set of images to batches. What a sample looks like depends on (seed, epoch, number), and on nothing else:
not on the number of workers or processes, nor on where in a run one starts. Of N images sample number k is image
k mod N: with repeated augmentation an epoch has several samples of one image.
"""

import os
import random
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lape.data.classes import ImageSource, Split
from lape.data.sources import Source
from lape.errors import RunError, UsageError, first_line
from lape.experiment import Augmentation
from lape.names import CHOICES

Key = tuple[int, Tensor]  # epoch, numbers of samples (B,)
Batch = tuple[Tensor, ...]  # images (B, C, H, W), labels (B,), and where the device augments draws (B, columns)
Batches = Generator[Batch, None, None]

SETTLED = {"random": "bicubic"}  # an interpolation by chance, and what validation has in its place


def seed_of(*key: int) -> int:
    """A seed of 64 bits that depends on every number of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def reseed(seed: int) -> None:
    """Set the three generators that transforms and modules on a CPU draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class Draws:
    """Uniform random numbers for every sample of an epoch: row k of the table (samples, columns) is sample k's."""

    def __init__(self, seed: int, samples: int, columns: int, dtype: torch.dtype = torch.float64) -> None:
        self.seed, self.shape, self.dtype = seed, (samples, columns), dtype
        self.epoch = -1

    def __call__(self, epoch: int, numbers: Tensor) -> Tensor:
        """Return rows (B, columns) in [0, 1)."""
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, 1))
            self.table = torch.rand(self.shape, generator=generator, dtype=self.dtype)
            self.epoch = epoch
        return self.table[numbers]


class Normalise:
    """Whole colour values, 0 to 255, to mean 0 and deviation 1: (x / 255 - mean) / std in every channel."""

    def __init__(self, source: Source, device: torch.device | str = "cpu") -> None:
        scale = torch.tensor([source.mean, source.std], dtype=torch.float32, device=device)
        self.mean, self.std = scale.view(2, 1, -1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) as float32."""
        return (images - self.mean) / self.std


class Stored(Dataset[Batch]):
    """Images in memory as they are, uint8, and random numbers with them by which the device augments."""

    def __init__(self, split: Split, seed: int, repeats: int, columns: int) -> None:
        assert isinstance(split.pictures, Tensor)  # what the caller chose this class by
        self.pictures, self.labels = split.pictures, split.labels
        # Rounding a float64 could make a 1 of a number below 1, and not every device has float64.
        self.draws = Draws(seed, repeats * len(split), columns, torch.float32)

    def __getitem__(self, key: Key) -> Batch:
        epoch, numbers = key
        indices = numbers % len(self.labels)
        return self.pictures[indices], self.labels[indices], self.draws(epoch, numbers)


class Shifted(Dataset[Batch]):
    """Images in memory, shifted and mirrored a whole batch at a time (some 0.1 ms for 64 digits)."""

    def __init__(
        self,
        split: Split,
        finish: Callable[[Tensor], Tensor],
        seed: int = 0,
        repeats: int = 1,
        shift: int = 0,
        hflip: float = 0,
        vflip: float = 0,
    ) -> None:
        assert isinstance(split.pictures, Tensor)
        self.pictures, self.labels, self.finish = split.pictures, split.labels, finish
        self.shift, self.hflip, self.vflip = shift, hflip, vflip
        self.draws = Draws(seed, repeats * len(split), columns=4)

    def __getitem__(self, key: Key) -> Batch:
        epoch, numbers = key
        indices = numbers % len(self.labels)
        images = self.pictures[indices]
        if self.shift or self.hflip or self.vflip:
            images = self._moved(images, self.draws(epoch, numbers))
        return self.finish(images), self.labels[indices]

    def _moved(self, images: Tensor, draws: Tensor) -> Tensor:
        samples, channels, height, width = images.shape
        down, right = (draws[:, :2] * (2 * self.shift + 1)).long().unbind(1)  # (B,) each, 0 to 2·shift
        rows = _line(height, draws[:, 2] < self.vflip) + down[:, None]  # (B, H)
        columns = _line(width, draws[:, 3] < self.hflip) + right[:, None]  # (B, W)
        padded = F.pad(images, 4 * [self.shift])
        return padded[
            torch.arange(samples)[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


def _line(length: int, mirrored: Tensor) -> Tensor:
    """Positions 0 to length - 1 (B, length), backwards where mirrored."""
    line = torch.arange(length).expand(len(mirrored), length)
    return torch.where(mirrored[:, None], line.flip(1), line)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a batch with a file that cannot be read; an exception would come out of a worker as a traceback."""

    message: str


class Pictures(Dataset[Batch | Unreadable]):
    """Images opened one by one and sent through a transform of timm's or torchvision's."""

    def __init__(self, split: Split, channels: int, transform: Any, seed: int = 0, repeats: int = 1) -> None:
        self.split, self.channels, self.transform = split, channels, transform
        self.draws = Draws(seed, repeats * len(split), columns=1)

    def __getitem__(self, key: Key) -> Batch | Unreadable:
        epoch, numbers = key
        indices = numbers % len(self.split)
        images = []
        try:
            for index, draw in zip(indices.tolist(), self.draws(epoch, numbers)[:, 0].tolist(), strict=True):
                reseed(int(draw * 2**53))
                images.append(self.transform(self.split.picture(index, self.channels)))
        except RunError as error:
            return Unreadable(str(error))
        # default_collate writes a worker's images straight into shared memory: a tenth less time for an image.
        return default_collate(images), self.split.labels[indices]


def augmentation(asked: Augmentation, source: ImageSource) -> Augmentation:
    """What was asked for, filled up with the set's own: a shift, or else a random resized crop's scale and ratio.

    Raises UsageError for a shift with a random resized crop, and for names that timm does not know.
    """
    from timm.data.transforms_factory import create_transform

    names = Augmentation.__dataclass_fields__
    given = {name: value for name in names if (value := getattr(asked, name)) is not None}
    cropped = given.keys() & {"scale", "ratio"}
    if cropped and given.get("shift"):
        raise UsageError(f"Training images are shifted or cropped, not both: leave out shift or {cropped.pop()}.")
    for option in ("interpolation", "remode"):
        if (name := getattr(asked, option)) is not None:
            CHOICES[option].refuse_other(name)
    if asked.auto_augment:
        try:
            create_transform(1, is_training=True, auto_augment=asked.auto_augment)
        except (AssertionError, ValueError) as error:
            raise UsageError(
                f"auto_augment {asked.auto_augment!r} is no policy of timm's ({first_line(error)}). Take one as "
                "rand-m9-mstd0.5-inc1."
            ) from error
    filled = asdict(source.augmentation) | given
    if cropped:
        filled["shift"] = None
    elif filled["shift"] is not None:
        filled |= {"scale": None, "ratio": None}
    return Augmentation(**filled)


def training_images(source: ImageSource, asked: Augmentation, size: tuple[int, int], seed: int) -> Dataset[Any]:
    """The training images of a set, augmented anew in every epoch; what `Preparation` still has to do is left to it.

    Raises UsageError for files that are to be augmented in batches.
    """
    from timm.data.transforms_factory import create_transform

    chosen = augmentation(asked, source)
    repeats = chosen.repeats or 1
    in_memory = isinstance(source.train.pictures, Tensor)
    if chosen.batched:
        from lape.data.batched import Augmenter

        if not in_memory:
            raise UsageError(f"batched augments images in memory, and those of {source.name} are files: leave it out.")
        return Stored(source.train, seed, repeats, Augmenter(size, source.mean, chosen).columns)
    one_by_one = chosen.auto_augment or chosen.color_jitter or (chosen.reprob and not chosen.erase_after_mix)
    if in_memory and source.size == size and chosen.shift is not None and not one_by_one:
        finish = nn.Identity() if chosen.erase_after_mix else Normalise(source)
        return Shifted(source.train, finish, seed, repeats, chosen.shift, chosen.hflip or 0, chosen.vflip or 0)
    options: dict[str, Any] = {
        "scale": chosen.scale,
        "ratio": chosen.ratio,
        "hflip": chosen.hflip,
        "vflip": chosen.vflip,
        "color_jitter": chosen.color_jitter or None,
        "auto_augment": chosen.auto_augment or None,
        "interpolation": chosen.interpolation,
        "re_prob": chosen.reprob,
        "re_mode": chosen.remode,
        "mean": source.mean,
        "std": source.std,
        "use_prefetcher": bool(chosen.erase_after_mix),  # then colour values are left whole, and nothing is erased
    }
    transform: Any = create_transform(size, is_training=True, **options)
    steps = transform.transforms
    if chosen.shift is not None:
        steps[0] = _shift(size, chosen)
    for step in steps:
        pairs = getattr(step, "policy", None) or [getattr(step, "ops", [])]
        for operation in (operation for pair in pairs for operation in pair if operation.name.startswith("Posterize")):
            operation.aug_fn = Posterize(operation.aug_fn)
    return Pictures(source.train, source.channels, transform, seed, repeats)


@dataclass(frozen=True)
class Posterize:
    """timm's rand-m9-mstd0.5 at times asks that no bit of a colour is kept. Pillow 13 refuses; before, it was black."""

    keep: Callable[..., Image.Image]

    def __call__(self, image: Image.Image, bits: int, **options: Any) -> Image.Image:
        return self.keep(image, bits, **options) if bits else image.point(lambda _: 0)


def settled(chosen: Augmentation) -> str:
    """How images are resized where nothing may be random."""
    asked = chosen.interpolation or "bilinear"
    return SETTLED.get(asked, asked)


def _shift(size: tuple[int, int], chosen: Augmentation) -> Callable[[Image.Image], Image.Image]:
    """timm's random resized crop is replaced by a shift, as its own recipes do for small images."""
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    mode: Any = str_to_interp_mode(settled(chosen))
    resize = transforms.Resize(size, mode)
    return transforms.Compose([resize, transforms.RandomCrop(size, padding=chosen.shift)])


def validation_images(source: ImageSource, asked: Augmentation, size: tuple[int, int]) -> Dataset[Any]:
    """The validation images of a set: resized and cut at the centre, otherwise as they are."""
    chosen = augmentation(asked, source)
    if isinstance(source.validation.pictures, Tensor) and source.size == size and chosen.crop_pct == 1:
        return Shifted(source.validation, Normalise(source))
    return Pictures(source.validation, source.channels, validation_transform(source, chosen, size))


def validation_transform(source: Source, chosen: Augmentation, size: tuple[int, int]) -> Any:
    """Return what makes a normalised image (C, H, W) of a picture as validation sees it."""
    from timm.data.transforms_factory import create_transform

    options: dict[str, Any] = {"interpolation": settled(chosen), "crop_pct": chosen.crop_pct}
    return create_transform(size, mean=source.mean, std=source.std, **options)


@dataclass(frozen=True)
class Order:
    """Which samples make up which optimiser step, and which of them are whose: a pure function of its fields.

    An epoch is a permutation of the images, cut into steps of `batch`; what is left over at its end is not used. With
    repeated augmentation every image stands `repeats` times in a row, and the epoch ends after as many samples as there
    are images, rounded down to 256. A step is cut into `parts` that are computed one after the other, and each part is
    dealt out among `processes`, so that an image's copies fall on different ones.
    """

    seed: int
    images: int
    batch: int
    parts: int = 1
    processes: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.parts * self.processes):
            raise UsageError(
                f"batch_size {self.batch} must divide into {self.parts} accumulated parts on each of "
                f"{self.processes} processes: use a multiple of {self.parts * self.processes}."
            )
        if self.batch > self.samples:
            raise UsageError(
                f"batch_size {self.batch} is more than the {self.samples} training images of an epoch: use that many "
                "or fewer."
            )

    @property
    def samples(self) -> int:
        """Samples in an epoch, before it is cut into steps."""
        whole = self.images // 256 * 256
        return whole if self.repeats > 1 and whole else self.images

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.samples // self.batch

    @property
    def share(self) -> int:
        """Samples of one process in one part."""
        return self.batch // (self.parts * self.processes)

    def epoch(self, epoch: int) -> Tensor:
        """Return the numbers of an epoch's samples (steps, parts, processes, samples of each).

        The c-th copy of image i, from 0 on, is sample number i + c · images.
        """
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, 0))
        order = torch.randperm(self.images, generator=generator)
        numbers = order[:, None] + torch.arange(self.repeats) * self.images  # (images, repeats)
        shown = numbers.flatten()[: self.steps * self.batch]
        return shown.view(self.steps, self.parts, self.share, self.processes).transpose(2, 3)


class Shares(Sampler[Key]):
    """One process's share of every part of every step, from step `first` up to step `last`."""

    def __init__(self, order: Order, process: int, first: int, last: int) -> None:
        self.order, self.process, self.first, self.last = order, process, first, last

    def __iter__(self) -> Iterator[Key]:
        for epoch in range(self.first // self.order.steps, -(-self.last // self.order.steps)):
            start = epoch * self.order.steps
            for parts in self.order.epoch(epoch)[max(self.first - start, 0) : self.last - start, :, self.process]:
                yield from ((epoch, numbers) for numbers in parts)


class InOrder(Sampler[Key]):
    """Every sample once, in order; process p of P takes every P-th."""

    def __init__(self, samples: int, batch: int, process: int = 0, processes: int = 1) -> None:
        self.batches = torch.arange(process, samples, processes).split(batch)

    def __iter__(self) -> Iterator[Key]:
        return ((0, indices) for indices in self.batches)


def load(images: Dataset[Any], keys: Sampler[Key], workers: int | None, pin: bool) -> Batches:
    """Yield batches, prepared by `workers` processes; raises RunError for an image that cannot be read.

    Unless a number is given, images in memory are prepared here, and others by a process a core, at most 24, which
    torchrun's processes share. Closing the generator ends them.
    """
    if workers is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = 0 if isinstance(images, Stored | Shifted) else max(1, min(24, _cores() // sharing))
    loader = DataLoader(
        images,
        sampler=keys,
        batch_size=None,  # a key is a batch
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_group,
    )
    with _signals_held():
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, Unreadable):
            raise RunError(batch.message)
        yield batch


# A signal to the group of a run, as Ctrl-C in a terminal sends it, is for the run alone: it ends its workers. One that
# comes while a worker starts waits until the worker has left the group, and is then forgotten there.
STOPS = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _signals_held() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where a group has no signals
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_group(_: int) -> None:
    if not hasattr(signal, "pthread_sigmask"):
        return
    os.setpgrp()
    while waiting := signal.sigpending() & STOPS:
        signal.sigwait(waiting)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
