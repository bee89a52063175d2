"""Pictures with a class for every pixel: ADE20K, and sets of one's own in its layout."""

import csv
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lape.data.pictures import open_image, open_picture, orientation, read_picture, read_through, upright_size
from lape.data.sources import PictureSource, PictureSplit, others_left_out
from lape.errors import RunError, UsageError
from lape.experiment import Augmentation, Dense
from lape.files import reading

IGNORED = 255  # where nobody said what there is: neither learnt nor measured
ADE_CLASSES = tuple(str(number) for number in range(1, 151))  # where the file of their names is not there

# UPerNet's and Segmenter's recipe
MIRRORED = Augmentation(hflip=0.5)
CROPPED = Dense(
    short_side=(512,),
    long_side=2048,
    crop=512,
    scale_jitter=(0.5, 2.0),
    class_cap=0.75,
    photometric=True,
    stride=341,
    test_scales=(1.0,),
    test_flip=False,
)


class MapSplit(PictureSplit, Protocol):
    """Pictures and the class of each of their pixels, in any form."""

    def map(self, index: int) -> Tensor:
        """Return the class of every pixel of picture `index` (H, W), int64 from 0, or IGNORED."""
        ...


@dataclass(frozen=True)
class MapSource(PictureSource[MapSplit]):
    """A dataset for segmentation."""

    kind = "maps"
    content = "a labelled pixel"

    dense: Dense


@dataclass(frozen=True)
class AdeSplit:
    """Files of pictures and of their maps, whose value k is class k - 1; 0 is unlabelled."""

    name: str
    pictures: tuple[Path, ...]
    maps: tuple[Path, ...]
    classes: int
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def title(self, index: int) -> str:
        """What a person finds picture `index` by."""
        return str(self.pictures[index])

    def picture(self, index: int) -> Image.Image:
        """Return picture `index`, RGB, upright; raises RunError naming a file that cannot be read."""
        return read_picture(self.pictures[index])

    def map(self, index: int) -> Tensor:
        """Return the class of every pixel of picture `index` (H, W), int64 from 0, or IGNORED.

        Raises RunError naming a map that cannot be read, is no PNG of 8 bits, has another size than its picture as
        people see it, or a value above the number of classes.
        """
        with open_picture(self.pictures[index]) as picture:
            size = upright_size(picture)
        path = self.maps[index]
        with open_image(path) as image:
            if image.format != "PNG":
                raise RunError(
                    f"{path} is a {image.format} whatever its name says, and maps are PNG: other formats may change "
                    "their values. Write it anew from what was annotated."
                )
            if image.size != size:
                raise RunError(
                    f"{path} has {image.width}×{image.height} pixels, and its picture {self.title(index)} "
                    f"{size[0]}×{size[1]}. Make them equal."
                )
            if image.mode not in ("L", "P"):
                raise RunError(
                    f"{path} must have one channel of 8 bits, whose value is the class (modes L and P of Pillow), and "
                    f"has mode {image.mode}. Save it so."
                )
            tiles: Any = getattr(image, "tile")  # noqa: B009 (files alone have it)
            if image.mode == "L" and any(tile.args != "L" for tile in tiles):  # their values would be stretched to 255
                raise RunError(
                    f"{path} must have 8 bits for the class of a pixel, and has fewer, which stand for shades of grey. "
                    "Save it with 8."
                )
            if (number := orientation(image)) != 1:
                raise RunError(
                    f"{path} has the EXIF orientation {number}, and nothing says whether its values are turned "
                    "already. Save it upright, without one."
                )
            values = np.array(image)  # of a palette its indices, not its colours
        if (highest := int(values.max())) > self.classes:
            raise RunError(
                f"{path} has the value {highest}, and there are {self.classes} classes: values go from 0, unlabelled, "
                f"to {self.classes}. Correct it, or name the missing classes."
            )
        return torch.from_numpy((values - 1).astype(np.int64))  # of bytes, 0 - 1 is 255: IGNORED

    def check(self, index: int) -> bool:
        """Open picture and map `index` wholly; raises as `map` does. Returns whether any pixel is labelled."""
        with open_picture(self.pictures[index]) as picture:
            read_through(picture)
        return bool((self.map(index) != IGNORED).any())


def ade20k(data_dir: Path | None, download: bool = False) -> MapSource:
    """ADE20K's 150 classes as everybody has them: `data_dir` is or holds ADEChallengeData2016.

    Raises as `maps` does, and UsageError where no folder is named. Classes without a file of names have numbers.
    """
    if data_dir is None:
        raise UsageError(
            "ADE20K is not downloaded; its folder was not named. Give --data_dir the folder that holds "
            "ADEChallengeData2016."
        )
    root = _root(data_dir)
    return replace(_source(root, _classes(root) or ADE_CLASSES), name="ade20k")


def maps(root: Path) -> MapSource:
    """A set in ADE20K's layout: images/training, images/validation, annotations/training and annotations/validation,
    where a picture and its map, an 8-bit image, have one name. Value k of a map is class k of objectInfo150.txt or of
    classes.txt (a name a line), counted from 1; 0 is unlabelled.

    Raises UsageError for classes without names, for folders without pictures, and for a picture or a map alone.
    """
    found = _root(root)
    if not (classes := _classes(found)):
        raise UsageError(f"The classes of {found} have no names. Write them into {found / 'classes.txt'}, one a line.")
    return _source(found, classes)


def _root(folder: Path) -> Path:
    inner = folder / "ADEChallengeData2016"
    return inner if inner.is_dir() else folder


def _classes(root: Path) -> tuple[str, ...]:
    """Names of the classes; none where no file has them."""
    table, lines = root / "objectInfo150.txt", root / "classes.txt"
    path = table if table.exists() else lines
    if not path.exists():
        return ()
    try:
        text = reading.text(path, reading.SETTINGS).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}). Write it again, in UTF-8.") from error
    if path == table:
        rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
        if [(row.get("Idx") or "").strip() for row in rows] != [str(number) for number in range(1, len(rows) + 1)]:
            raise RunError(f"{path} must have a column Idx that counts from 1, and a column Name. Fetch it again.")
        names = [(row.get("Name") or "").strip() for row in rows]
    else:
        names = [line.strip() for line in text]
    if not names or not all(names):
        raise RunError(
            f"{path} must name every class; line {[*names, ''].index('') + 1} of its names is empty. Fill it."
        )
    return tuple(names)


def _source(root: Path, classes: tuple[str, ...]) -> MapSource:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    train, validation = (_split(root, name, len(classes)) for name in ("training", "validation"))
    return MapSource(
        root.resolve().name,
        classes,
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        train=train,
        validation=validation,
        augmentation=MIRRORED,
        dense=CROPPED,
    )


def _split(root: Path, name: str, classes: int) -> AdeSplit:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    shown, marked = root / "images" / name, root / "annotations" / name
    pictures, annotated = _by_stem(shown, IMG_EXTENSIONS), _by_stem(marked, (".png",))
    if not pictures and not annotated:
        raise UsageError(f"A set in ADE20K's layout has pictures in {shown}; there is none. Put some there.")
    for one, other, folder, what in ((pictures, annotated, marked, "map"), (annotated, pictures, shown, "picture")):
        if alone := sorted(one.keys() - other.keys()):
            raise UsageError(
                f"{one[alone[0]]} has no {what} in {folder}, and {len(alone)} of {len(one)} have none. "
                "Put it there, or remove the other."
            )
    remarks = [
        remark
        for folder, read in ((shown, pictures), (marked, annotated))
        for remark in others_left_out(folder, [str(path) for path in set(_files(folder)) - set(read.values())])
    ]
    stems = sorted(pictures)
    return AdeSplit(
        name,
        tuple(pictures[stem] for stem in stems),
        tuple(annotated[stem] for stem in stems),
        classes,
        tuple(remarks),
    )


def _files(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, by name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _by_stem(folder: Path, endings: Collection[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _files(folder):
        if path.suffix.lower() not in endings:
            continue
        if path.stem in found:
            raise UsageError(f"{found[path.stem]} and {path} have one name, and one map belongs to it. Rename one.")
        found[path.stem] = path
    return found
