"""A set of our own: drawn shapes on photographs, for runs of minutes. Nothing is downloaded.

The photographs are read from the installed scikit-image and are not redistributed. They are in the public domain or
under CC0: astronaut (NASA), coffee (Rachel Michetti), brick and gravel (CC0Textures), clock and chelsea (Stefan van der
Walt), camera (Lav Varshney), grass (linolafett). All are PNG files, which every machine decodes alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lape.data.instances import Instances, InstanceSource
from lape.data.maps import CROPPED, MapSource
from lape.experiment import Augmentation, Dense
from lape.extras import require

Field = NDArray[np.float64]  # one number for every pixel
Outline = Callable[[Field, Field], Field]  # below 0 inside the shape of radius 1, above 0 outside
Texture = Callable[[Field, Field, np.random.Generator], Field]  # from 0, the one colour, to 1, the other

SIDE = 128
RADII = (0.1, 0.3)  # of the side of a picture
MOST = 4  # objects in a picture
LEAST_SHARE, LEAST_PIXELS = 1 / 3, 12  # of an object that are visible


def _disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 1


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.76) - 0.24


def _pointed(points: int, inner: float) -> Outline:
    """A star with corners at distances 1 and `inner` by turns; a regular polygon where `inner` is its inradius."""
    half = math.pi / points  # the angle from one corner to the next
    along, across = inner * math.cos(half) - 1, inner * math.sin(half)  # the edge between them
    length = math.hypot(along, across)

    def outline(x: Field, y: Field) -> Field:
        angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)  # all edges folded onto one
        radius = np.hypot(x, y)
        return (across * (radius * np.cos(angle) - 1) - along * radius * np.sin(angle)) / length

    return outline


SHAPES: Mapping[str, Outline] = MappingProxyType(
    {
        "disc": _disc,
        "ring": _ring,
        "square": _pointed(4, math.cos(math.pi / 4)),
        "triangle": _pointed(3, math.cos(math.pi / 3)),
        "star": _pointed(5, 0.45),
    }
)


def _ramp(x: Field, y: Field, random: np.random.Generator) -> Field:
    return np.clip((1 + x) / 2, 0, 1)


def _stripes(x: Field, y: Field, random: np.random.Generator) -> Field:
    return (1 + np.sin(random.uniform(5, 12) * x)) / 2


def _checks(x: Field, y: Field, random: np.random.Generator) -> Field:
    size = random.uniform(0.25, 0.6)
    return (np.floor(x / size) + np.floor(y / size)) % 2


def _speckles(x: Field, y: Field, random: np.random.Generator) -> Field:
    return random.random(x.shape)


TEXTURES: tuple[Texture, ...] = (_ramp, _stripes, _checks, _speckles)


@dataclass(frozen=True)
class Shapes:
    """Pictures of one split, both of instances and as maps; picture i is a pure function of `seed`, i and `side`."""

    name: str
    photographs: Sequence[Image.Image]
    pictures: int
    seed: int
    side: int = SIDE
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.pictures

    def title(self, index: int) -> str:
        """What a person finds picture `index` by."""
        return f"{self.name} picture {index}"

    def picture(self, index: int) -> Image.Image:
        """Draw picture `index`, RGB."""
        return Image.fromarray(self._draw(index)[0])

    def instances(self, index: int) -> Instances:
        """Return what is visible of the shapes in picture `index`."""
        _, labels, owners = self._draw(index)
        masks = owners == np.arange(1, len(labels) + 1)[:, None, None]  # (n, H, W)
        boxes = np.stack([_box(mask) for mask in masks])
        return Instances(
            boxes=torch.from_numpy(boxes),
            labels=torch.tensor(labels),
            masks=torch.from_numpy(masks.astype(np.uint8)),
            areas=torch.from_numpy(masks.sum((1, 2), dtype=np.float32)),
            crowd=torch.zeros(len(labels), dtype=torch.bool),
        )

    def map(self, index: int) -> Tensor:
        """Return the class of every pixel of picture `index` (H, W), int64; 0 is the photograph."""
        _, labels, owners = self._draw(index)
        return torch.from_numpy(np.array([0, *(1 + label for label in labels)])[owners])

    def check(self, index: int) -> bool:
        """Nothing can be wrong with a file: there is none."""
        return True

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], list[int], NDArray[np.int64]]:
        """Return the picture (H, W, 3), the shapes' labels, and whose a pixel is (H, W): 0 of none, k of shape k."""
        random = np.random.default_rng((self.seed, index))
        margin = math.ceil(RADII[1] * self.side) + 1  # a shape may stick out of the picture, not of the canvas
        canvas = self.side + 2 * margin
        seen = slice(margin, -margin), slice(margin, -margin)
        pixels = _cut(self.photographs[int(random.integers(len(self.photographs)))], canvas, random)
        owners = np.zeros((canvas, canvas), np.int64)
        labels: list[int] = []
        sizes: list[int] = []  # pixels that a shape has where nothing hides it
        for _ in range(random.integers(1, MOST + 1)):
            label = int(random.integers(len(SHAPES)))
            radius = self.side * math.exp(random.uniform(*np.log(RADII)))
            row, column = margin + random.integers(self.side // 10, self.side - self.side // 10, 2)
            reach = math.ceil(radius) + 1
            window = slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1)
            cover, colours = _stamp(tuple(SHAPES.values())[label], radius, reach, pixels[window], random)
            inside = cover >= 0.5
            covered = owners.copy()
            covered[window][inside] = len(labels) + 1
            visible = np.bincount(covered[seen].ravel(), minlength=len(labels) + 2)[1:]
            enough = np.maximum(np.array([*sizes, inside.sum()]) * LEAST_SHARE, LEAST_PIXELS)
            if (visible >= enough).all():  # otherwise this shape would hide one, or be hidden: it is left out
                owners = covered
                labels.append(label)
                sizes.append(int(inside.sum()))
                pixels[window] += cover[..., None] * (colours - pixels[window])
        return np.rint(pixels[seen]).astype(np.uint8), labels, owners[seen]


def _cut(photograph: Image.Image, side: int, random: np.random.Generator) -> Field:
    """A random square of a photograph, of half its shorter side or more, tinted: float64 (side, side, 3)."""
    width, height = photograph.size
    square = int(min(width, height) * random.uniform(0.5, 1))
    left, top = random.integers(0, (width - square + 1, height - square + 1))
    box = (left, top, left + square, top + square)
    resized = np.asarray(photograph.resize((side, side), Image.Resampling.BILINEAR, box), np.float64)
    return np.clip(resized * random.uniform(0.6, 1.3, 3), 0, 255)  # colour alone does not tell a shape from a grey wall


def _stamp(
    outline: Outline, radius: float, reach: int, under: Field, random: np.random.Generator
) -> tuple[Field, Field]:
    """Return how much a shape covers of each pixel (size, size), 0 to 1, and its colours (size, size, 3)."""
    turn, stretch = random.uniform(0, 2 * math.pi), random.uniform(0.7, 1)  # as if seen at a slant
    steps = np.arange(-reach, reach + 1) / radius
    across, down = np.meshgrid(steps, steps)
    x = across * math.cos(turn) + down * math.sin(turn)
    y = down * math.cos(turn) - across * math.sin(turn)
    cover = np.clip(0.5 - radius * stretch * outline(x, y / stretch), 0, 1)
    ground = under[cover >= 0.5].mean(0)
    candidates = random.uniform(30, 225, (3, 1)) + random.uniform(-60, 60, (3, 3))
    one = max(candidates, key=lambda colour: np.abs(colour - ground).sum())  # a colour that shows
    other = one + random.uniform(-80, 80, 3)
    mix = TEXTURES[random.integers(len(TEXTURES))](x, y, random)[..., None]
    light = 1 + random.uniform(0, 0.35) * across[..., None]  # falls from one side
    return cover, np.clip((one + mix * (other - one)) * light, 0, 255)


def _box(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def shapes_detection(data_dir: Path | None, download: bool = False) -> InstanceSource:
    """600 and 150 pictures of 1 to 4 shapes, 128×128; raises UsageError where scikit-image is not installed."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    train, validation = _splits()
    return InstanceSource(
        "shapes-detection",
        tuple(SHAPES),
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        train=train,
        validation=validation,
        augmentation=Augmentation(hflip=0.5),
        dense=Dense(short_side=(SIDE,), long_side=SIDE, zoom=(), crop=SIDE),
    )


def shapes_segmentation(data_dir: Path | None, download: bool = False) -> MapSource:
    """The pictures of shapes_detection, where every pixel is background or one of the shapes; raises as that does."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    train, validation = _splits()
    return MapSource(
        "shapes-segmentation",
        ("background", *SHAPES),
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        train=train,
        validation=validation,
        augmentation=Augmentation(hflip=0.5),
        dense=replace(
            CROPPED,
            short_side=(SIDE,),
            long_side=2 * SIDE,
            crop=SIDE,
            scale_jitter=(0.75, 1.5),
            class_cap=1.0,
            photometric=False,
            stride=96,
        ),
    )


def _splits() -> tuple[Shapes, Shapes]:
    """Training and validation, whose backgrounds are different photographs."""
    require("The set shapes", "skimage")
    from skimage import data

    train = data.astronaut, data.coffee, data.brick, data.gravel, data.clock
    validation = data.chelsea, data.camera, data.grass
    train, validation = ([Image.fromarray(read()).convert("RGB") for read in part] for part in (train, validation))
    return Shapes("training", train, 600, seed=0), Shapes("validation", validation, 150, seed=1)
