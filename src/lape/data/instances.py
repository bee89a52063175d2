"""Pictures whose objects have boxes, classes and masks: COCO, and sets of one's own in its layout."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lape.data.pictures import open_picture, orientation, read_through, upright, upright_size
from lape.data.sources import PictureSource, PictureSplit
from lape.errors import RunError, UsageError, first_line
from lape.experiment import Augmentation, Dense
from lape.extras import require
from lape.files import reading

LEAST_SIDE = 32  # of a training picture
FARTHEST = 1e5  # pixels from the picture: memory for drawing a polygon grows with its length
OFF = 3  # pixels by which the sides of a box may be beside those of its mask
OVERLAP = 0.5  # least share that a box and its mask have in common of what they cover, otherwise they are far
BETTER = 0.2  # by so much more does a box fit that is two corners
NAMED = 3  # of the annotations that a remark is of

# ViT-Adapter's recipe with multi-scale training
MIRRORED = Augmentation(hflip=0.5)
MULTI_SCALE = Dense(
    short_side=tuple(range(480, 801, 32)), long_side=1333, zoom=(400, 500, 600), zoom_crop=(384, 600), crop=1024
)


@dataclass(frozen=True)
class Instances:
    """The n objects of one picture: `boxes` (n, 4) float32, x0 y0 x1 y1 in pixels; `labels` (n,) int64 from 0; `masks`
    (n, H, W) uint8, 0 or 1; `areas` (n,) float32; `crowd` (n,) bool, where a region holds many objects.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    areas: Tensor
    crowd: Tensor


class InstanceSplit(PictureSplit, Protocol):
    """Pictures and their objects, in any form."""

    def instances(self, index: int) -> Instances:
        """Return the objects of picture `index`."""
        ...


@dataclass(frozen=True)
class InstanceSource(PictureSource[InstanceSplit]):
    """A dataset for detection."""

    kind = "instances"
    content = "an object that is no crowd"

    dense: Dense


@dataclass(frozen=True)
class CocoSplit:
    """N pictures of a folder with M objects; those of picture i are the rows first[i] to first[i + 1].

    All numbers lie in a few arrays, which the processes that prepare batches share; of a million objects of Python's
    each would come to hold a copy.
    """

    name: str
    folder: Path
    files: tuple[str, ...]  # (N,), below the folder
    sizes: NDArray[np.int64]  # (N, 2), height and width
    first: NDArray[np.int64]  # (N + 1,)
    boxes: NDArray[np.float32]  # (M, 4)
    labels: NDArray[np.int64]  # (M,)
    areas: NDArray[np.float32]  # (M,)
    crowd: NDArray[np.bool_]  # (M,)
    runs: NDArray[np.uint8]  # COCO's compressed runs of all masks, one after the other
    ends: NDArray[np.int64]  # (M + 1,), where in `runs` those of a mask begin and end
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def title(self, index: int) -> str:
        """What a person finds picture `index` by."""
        return str(self.folder / self.files[index])

    def picture(self, index: int) -> Image.Image:
        """Return picture `index`, RGB, upright; raises RunError naming one that cannot be read or has another size."""
        with open_picture(self.folder / self.files[index]) as image:
            self._compare(index, image)
            return upright(image)

    def instances(self, index: int) -> Instances:
        """Return the objects of picture `index`."""
        from faster_coco_eval import mask

        rows = slice(self.first[index], self.first[index + 1])
        bounds = self.ends[rows.start : rows.stop + 1]
        size = self.sizes[index].tolist()
        masks = np.empty((rows.stop - rows.start, *size), np.uint8)
        for row, (start, end) in enumerate(pairwise(bounds)):
            masks[row] = mask.decode({"size": size, "counts": self.runs[start:end].tobytes()})
        return Instances(
            boxes=torch.tensor(self.boxes[rows]),
            labels=torch.tensor(self.labels[rows]),
            masks=torch.from_numpy(masks),
            areas=torch.tensor(self.areas[rows]),
            crowd=torch.tensor(self.crowd[rows]),
        )

    def check(self, index: int) -> bool:
        """Open picture `index` wholly; raises as `picture` does. Returns whether it has an object that is no crowd."""
        with open_picture(self.folder / self.files[index]) as image:
            self._compare(index, image)
            read_through(image)
        return not self.crowd[self.first[index] : self.first[index + 1]].all()

    def _compare(self, index: int, image: Image.Image) -> None:
        height, width = self.sizes[index].tolist()
        across, down = upright_size(image)
        if (across, down) == (width, height):
            return
        if image.size == (width, height):
            raise RunError(
                f"{self.title(index)} was annotated lying on its side: people see {across}×{down} pixels, as its EXIF "
                f"orientation {orientation(image)} turns it, and its annotations say {width}×{height}. Remove the "
                "orientation from the file, or annotate it upright."
            )
        raise RunError(
            f"{self.title(index)} has {across}×{down} pixels and {width}×{height} by its annotations. "
            "Put the picture there that was annotated."
        )


def coco(data_dir: Path | None, download: bool = False) -> InstanceSource:
    """COCO 2017 as everybody has it: `data_dir` holds annotations/, train2017/ and val2017/ (or images/train2017/ ...).

    Raises as `instances` does, and UsageError where no folder is named.
    """
    if data_dir is None:
        raise UsageError(
            "COCO is not downloaded; its folder was not named. Give --data_dir the folder that holds annotations/, "
            "train2017/ and val2017/."
        )
    return replace(_source(data_dir, "2017"), name="coco")


def instances(root: Path) -> InstanceSource:
    """A set in COCO's layout: `root`/annotations/instances_train*.json and instances_val*.json, and pictures in the
    folders of the same endings (train2017 for instances_train2017.json), in `root` or `root`/images.

    Classes are the categories, by rising id. Training leaves out crowds, and pictures without an object or with a side
    below 32 pixels. Raises UsageError for a file or folder that is missing, for two files that name different
    categories and for a set without objects, and RunError for a file whose content cannot be used.
    """
    return _source(root, "*")


def _source(root: Path, year: str) -> InstanceSource:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    require("A set of COCO's", "faster_coco_eval")
    files = [_annotations(root / "annotations", f"instances_{part}{year}.json") for part in ("train", "val")]
    pictures = [_pictures(root, file) for file in files]
    validation_categories, validation = _read_annotations(files[1], pictures[1], training=False)
    categories, train = _read_annotations(files[0], pictures[0], training=True)
    if categories != validation_categories:
        unlike = dict(categories.items() ^ validation_categories.items())
        number = min(unlike)
        raise UsageError(
            f"{files[0]} and {files[1]} must have the same categories; category {number} is "
            f"{categories.get(number)!r} in the first and {validation_categories.get(number)!r} in the second. "
            "Write both with one list of categories."
        )
    return InstanceSource(
        root.resolve().name,
        tuple(categories.values()),
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        train=train,
        validation=validation,
        augmentation=MIRRORED,
        dense=MULTI_SCALE,
    )


def _annotations(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        here = " and ".join(path.name for path in found) or "none"
        raise UsageError(
            f"A set in COCO's layout needs exactly one file {folder / pattern}, not {here}. Put one there and no more."
        )
    return found[0]


def _pictures(root: Path, file: Path) -> Path:
    ending = file.stem.removeprefix("instances_")
    folders = (root / ending, root / "images" / ending)
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise UsageError(f"The pictures of {file} must lie in {folders[0]} or {folders[1]}; there is no such folder.")
    return found


def _read_annotations(file: Path, folder: Path, training: bool) -> tuple[dict[int, str], CocoSplit]:
    """Return the names of the categories by rising id, and what an annotation file says of a folder's pictures."""
    try:
        content = reading.values(file, reading.ANNOTATIONS)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read as JSON ({error}). Fetch or write it again.") from error
    images, annotations, categories = (_by_id(content, part, file) for part in ("images", "annotations", "categories"))
    for number, image in images.items():
        sides = (image.get("height"), image.get("width"))
        if not all(type(side) is int and side > 0 for side in sides) or not isinstance(image.get("file_name"), str):
            raise RunError(
                f"{file}, image {number}: an image needs a height and a width, whole numbers of pixels, and a "
                f"file_name, not {brief(sides[0])}, {brief(sides[1])} and {brief(image.get('file_name'))}. "
                "Correct it."
            )
    for number, category in categories.items():
        if not isinstance(category.get("name"), str):
            raise RunError(
                f"{file}, category {number}: its name must be a text, not {brief(category.get('name'))}. Name it."
            )
    labels = {number: label for label, number in enumerate(sorted(categories))}

    objects: dict[int, list[Object]] = {number: [] for number in images}
    without: dict[str, list[int]] = {}  # annotations that are left out, by the reason
    far: list[int] = []  # annotations whose box lies elsewhere than their mask
    corners: list[int] = []  # those of them whose box would lie there if it were two corners
    for number, annotation in annotations.items():
        try:
            image, label = annotation.get("image_id"), annotation.get("category_id")
            if image not in images:
                raise ValueError(f"there is no image {brief(image)}")
            if label not in labels:
                raise ValueError(f"there is no category {brief(label)}")
            size = images[image]["height"], images[image]["width"]
            one = _object(annotation, size, labels[label], training)
            objects[image].append(one)
            if one.corners:
                corners.append(number)
            elif one.far:
                far.append(number)
        except LeftOut as reason:
            without.setdefault(str(reason), []).append(number)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise RunError(f"{file}, annotation {number}: {first_line(error)}. Correct or remove it.") from error

    empty = [number for number in images if training and not objects[number]]
    small = [n for n, image in images.items() if training and min(image["height"], image["width"]) < LEAST_SIDE]
    dropped = {"nothing to be learnt in them": empty, f"a side below {LEAST_SIDE} pixels": small}
    kept = [number for number in images if number not in {*empty, *small}]
    remarks = [
        *_remark(f"{file} leaves out annotations", without, len(annotations)),
        *_remark(f"{file} leaves out images", dropped, len(images)),
        *_remark(f"{file} has boxes that are far from their masks", {"annotations": far}, len(annotations)),
    ]
    objects_kept = sum(map(len, objects.values()))
    wrong = {"annotations": corners}
    if 2 * len(corners) > objects_kept:
        (which,) = _remark("It reads so", wrong, objects_kept)
        raise RunError(
            f"{file}: bbox is x y width height, and most boxes fit their masks as two corners, x0 y0 x1 y1. Write "
            f"width and height. {which}"
        )
    remarks += _remark(f"{file} has boxes that fit their masks as two corners alone", wrong, objects_kept)
    names = tuple(images[number]["file_name"] for number in kept)
    if not names:
        needed = f"images of at least {LEAST_SIDE} pixels a side with an object" if training else "images"
        raise UsageError(
            f"{file}, of {len(images)} images and {len(annotations)} annotations, leaves no picture, and {needed} are "
            f"needed: add some. {' '.join(remarks)}".strip()
        )
    if missing := _missing(folder, names):
        raise RunError(
            f"{missing[0]}, of which {file} tells, does not exist; {len(missing)} of {len(names)} are missing. "
            "Put them there, or remove them from the file."
        )
    rows = [row for number in kept for row in objects[number]]
    split = CocoSplit(
        name=folder.name,
        folder=folder,
        files=names,
        sizes=np.array([(images[number]["height"], images[number]["width"]) for number in kept], np.int64),
        first=np.cumsum([0, *(len(objects[number]) for number in kept)]),
        boxes=np.array([row.box for row in rows], np.float32).reshape(-1, 4),
        labels=np.array([row.label for row in rows], np.int64),
        areas=np.array([row.area for row in rows], np.float32),
        crowd=np.array([row.crowd for row in rows], np.bool_),
        runs=np.frombuffer(b"".join(row.runs for row in rows), np.uint8),
        ends=np.cumsum([0, *(len(row.runs) for row in rows)]),
        remarks=tuple(remarks),
    )
    return {number: categories[number]["name"] for number in labels}, split


def _remark(what: str, numbers: Mapping[str, Sequence[int]], of: int) -> list[str]:
    """Say what is so of which of many, by their ids; nothing where it is so of none."""
    parts = [
        f"{why}: {', '.join(map(str, ids[:NAMED]))}{' ...' if len(ids) > NAMED else ''}"
        for why, ids in numbers.items()
        if ids
    ]
    count = len({number for ids in numbers.values() for number in ids})
    return [f"{what}, {count} of {of} ({'; '.join(parts)})."] if parts else []


def _by_id(content: Any, part: str, file: Path) -> dict[int, dict[str, Any]]:
    rows = content.get(part) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunError(
            f'{file} is not in COCO\'s layout: it must hold one object, and "{part}" in it a list of objects. '
            "Export it as COCO's instances."
        )
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = row.get("id")
        if type(number) is not int:
            raise RunError(
                f"{file}: the id of each of its {part} must be a whole number, not {brief(number)}. Correct it."
            )
        if number in found:
            raise RunError(f"{file}: two of its {part} have the id {number}. Give every one an id of its own.")
        found[number] = row
    return found


def _missing(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files that do not exist, by one listing of every folder: asking for each file takes minutes on a network disk."""
    listed: dict[Path, frozenset[str]] = {}
    missing = []
    for path in (folder / name for name in names):
        if path.parent not in listed:
            listed[path.parent] = frozenset(os.listdir(path.parent) if path.parent.is_dir() else ())
        if path.name not in listed[path.parent]:
            missing.append(path)
    return missing


Box = tuple[float, float, float, float]  # x0 y0 x1 y1


@dataclass(frozen=True, slots=True)
class Object:
    """One object: x0 y0 x1 y1 within the picture, and its mask as COCO's compressed runs."""

    box: NDArray[np.float32]
    label: int
    area: float
    crowd: bool
    runs: bytes
    far: bool  # its box lies elsewhere than its mask
    corners: bool  # its box would fit the mask, if it were two corners


class LeftOut(Exception):
    """An annotation is left out, as mmdetection does; the message says why."""


def _object(annotation: Mapping[str, Any], size: tuple[int, int], label: int, training: bool) -> Object:
    """Return what an annotation of a picture of `size` (H, W) tells.

    Raises LeftOut, and ValueError, TypeError, OverflowError or RuntimeError for what is not an annotation.
    """
    from faster_coco_eval import mask

    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"bbox takes 4 numbers, x y width height, not {brief(box)}")
    x, y, across, down = (_finite(number, "bbox") for number in box)
    height, width = size
    area = _finite(annotation["area"], "area") if "area" in annotation else None
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd is 0 or 1, not {brief(crowd)}")
    if across < 1 or down < 1:
        raise LeftOut("a box less than a pixel wide or high")
    if area is not None and area <= 0:
        raise LeftOut("no area")
    if annotation.get("ignore"):
        raise LeftOut("marked to be ignored")
    if crowd and training:
        raise LeftOut("crowds, which validation alone takes account of")
    within = np.array([x, y, x + across, y + down]).clip(0, (width, height, width, height)).astype(np.float32)
    if (within[:2] >= within[2:]).any():
        raise LeftOut("a box outside of its image")
    runs = _runs(annotation.get("segmentation"), size)
    pixels = float(mask.area(runs))
    if not pixels:
        raise LeftOut("a mask outside of its image")
    left, top, wide, high = mask.toBbox(runs).tolist()
    drawn = (left, top, left + wide, top + high)
    overlap = _overlap((x, y, x + across, y + down), drawn, size)
    as_corners = 0.0 if overlap == 1 else _overlap((x, y, across, down), drawn, size)
    return Object(
        box=within,
        label=label,
        area=pixels if area is None else area,
        crowd=bool(crowd),
        runs=runs["counts"],
        far=overlap < OVERLAP,
        corners=as_corners >= max(OVERLAP, overlap + BETTER),
    )


def _overlap(box: Box, drawn: Box, size: tuple[int, int]) -> float:
    """The share that a box, within a picture of `size` (H, W), and that of its mask have in common of what they cover.

    1 where their sides are as near to each other as those that people draw. Both are x0 y0 x1 y1.
    """
    height, width = size
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
    left, top, right, bottom = drawn
    if max(abs(x0 - left), abs(y0 - top), abs(x1 - right), abs(y1 - bottom)) <= OFF:
        return 1.0
    shared = max(min(x1, right) - max(x0, left), 0) * max(min(y1, bottom) - max(y0, top), 0)
    return shared / (max(x1 - x0, 0) * max(y1 - y0, 0) + (right - left) * (bottom - top) - shared)


def _finite(number: Any, what: str) -> float:
    if type(number) not in (int, float) or not math.isfinite(number):
        raise ValueError(f"{what} takes finite numbers, not {brief(number)}")
    return float(number)


def _runs(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's compressed runs of a mask, as far as it lies in a picture of `size` (H, W)."""
    from faster_coco_eval import mask
    from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

    match segmentation:
        case None | []:
            raise ValueError("it has no segmentation, and detection needs masks")
        case list():
            polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
            for polygon in polygons:
                if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
                    raise ValueError(
                        f"a polygon takes 3 or more pairs of coordinates, x y x y ..., not {brief(polygon.tolist())}"
                    )
                if (outside := ~(np.abs(polygon) <= FARTHEST)).any():  # what is not a number is not
                    value = polygon[outside][0]
                    raise ValueError(f"coordinates of polygons are finite and at most {FARTHEST:.0f}, not {value}")
            drawn: Any = mask.frPyObjects([polygon.tolist() for polygon in polygons], *size)
            return mask.merge(drawn)
        case {"size": list() as stated, "counts": list() | str() as counts}:
            if stated != list(size):
                raise ValueError(
                    f"the size of its segmentation, {brief(stated)}, is not that of its image, {list(size)}"
                )
            if isinstance(counts, str):
                counts = toUncompressedRLE([{"size": stated, "counts": counts.encode()}])[0]["counts"]
            if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != math.prod(size):
                raise ValueError(f"the runs of its segmentation do not add up to an image of {list(size)}")
            packed: Any = mask.frPyObjects({"size": stated, "counts": counts}, *size)
            return packed
        case _:
            raise ValueError("segmentation takes a list of polygons, or runs with size and counts")
