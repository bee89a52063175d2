"""Images with one class each: named sets, and folders with one folder per class."""

import gzip
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lape.data.pictures import MODES, is_hidden, open_picture, read_picture, read_through
from lape.data.sources import PictureSource
from lape.errors import RunError, UsageError
from lape.experiment import Augmentation
from lape.files import reading
from lape.files.characters import LONE, plural

Read = TypeVar("Read")

CACHE = Path.home() / ".cache" / "lape"
LARGEST_IDX = 1 << 28  # bytes; five times the largest file of Fashion-MNIST
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

# What the parts of a folder of images are called. By the validation images the best weights are chosen; those of `test`
# are only ever measured on.
TRAINING, TEST = "train", "test"
VALIDATION = ("valid", "val", "validation", "dev")
NO_CLASSES = (TRAINING, "training", *VALIDATION, TEST, "testing")  # names that are parts of a set, in any case

SHARE = 0.2  # of every class, held out for validation where nobody has divided a folder
UNREAD = (".heic", ".heif", ".avif", ".gif", ".jxl", ".dng", ".cr2", ".nef", ".arw")  # pictures of other kinds
MOST_NAMED = 5

# What a photograph of any size gets where neither its set nor the user says otherwise.
PHOTOGRAPHS = Augmentation(
    hflip=0.5,
    vflip=0.0,
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    interpolation="bicubic",
    crop_pct=0.875,
    auto_augment="",
    color_jitter=0.0,
    reprob=0.0,
    remode="pixel",
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.1,
)
# Small images are shifted, not cropped, and seen whole; a digit fills its 8×8 and is not even shifted.
OBJECTS = replace(PHOTOGRAPHS, shift=4, crop_pct=1.0)
GARMENTS = replace(OBJECTS, shift=2)
DIGITS = replace(OBJECTS, shift=0, hflip=0.0)


@dataclass(frozen=True)
class Split:
    """Labelled images, in memory or as the files that hold them.

    `pictures` is a uint8 tensor (N, C, H, W) or N paths; `labels` is an int64 tensor (N,). `remarks` are what a person
    should know before it is used. `root` is the folder of the set that files are in.
    """

    name: str
    pictures: Tensor | Sequence[Path]
    labels: Tensor
    remarks: tuple[str, ...] = field(default=(), compare=False)
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int) -> "Split":
        """Return that many of the images, drawn once and for all; UsageError where there are fewer."""
        if count > len(self):
            raise UsageError(
                f"There are {len(self)} images for training, and train_images is {count}: lower or leave it out."
            )
        return self.rows(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].sort().values)

    def rows(self, rows: Tensor) -> "Split":
        """Return the images of some numbers (n,), or where a mask (N,) is true."""
        numbers = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        pictures = self.pictures
        chosen = pictures[numbers] if isinstance(pictures, Tensor) else [pictures[row] for row in numbers.tolist()]
        return replace(self, pictures=chosen, labels=self.labels[numbers])

    def title(self, index: int) -> str:
        """What a person finds image `index` by."""
        if isinstance(self.pictures, Tensor):
            return f"{self.name} image {index}"
        return str(self.pictures[index])

    def names(self) -> list[str]:
        """Return what files are called below the folder of their set, alike on every machine; images in memory: none.

        A set may be moved, and its files keep these names.
        """
        if isinstance(self.pictures, Tensor) or self.root is None:
            return []
        return [Path(os.path.relpath(path, self.root)).as_posix() for path in self.pictures]

    def picture(self, index: int, channels: int) -> Image.Image:
        """Return image `index` as people see it; raises RunError naming a file that cannot be read."""
        mode = MODES[channels]
        if isinstance(self.pictures, Tensor):
            return Image.fromarray(self.pictures[index].permute(1, 2, 0).squeeze(-1).numpy()).convert(mode)
        return read_picture(self.pictures[index]).convert(mode)

    def check(self, index: int) -> bool:
        """Read the file of image `index` to its end; raises as `picture` does. Every image has a class to be learnt."""
        if not isinstance(self.pictures, Tensor):
            with open_picture(self.pictures[index]) as image:
                read_through(image)
        return True


@dataclass(frozen=True)
class ImageSource(PictureSource[Split]):
    """A dataset for classification.

    `held_out` names the images that were drawn for validation from a set that nobody had divided. It is empty where
    that is still to be done, and `train` and `validation` are both the whole; None where the set came divided.
    """

    kind = "classes"

    held_out: tuple[str, ...] | None = field(default=None, kw_only=True)

    def splits(self) -> Mapping[str, Callable[[], Split]]:
        """Return what reads each split; a folder may have one more, `test`."""
        root = self.train.root
        both = {"train": lambda: self.train, **super().splits()}
        if root is None or not (root / TEST).is_dir():
            return both
        return {**both, TEST: partial(_part, root, TEST, self.classes)}

    def with_folder(self, root: Path) -> Self | None:
        """Return the set with all images in `root`/<class>/ as its validation images; None where there is a train/.

        A class may be missing. Raises UsageError for a folder that is no class of the set, and where there is no image.
        """
        if not root.is_dir() or (root / TRAINING).is_dir():
            return None
        own = _classes_in(root)
        foreign = sorted({*own} - {*self.classes})
        if foreign or not own:
            wrong = f"{root / foreign[0]} is no class" if foreign else f"{root} holds no folder of a class"
            raise UsageError(
                f"{wrong} that the model was trained to tell ({', '.join(self.classes[:3])} ...). Name a folder that "
                "holds a folder for each class."
            )
        judged = _split(root.name, root, root, self.classes, own)
        return replace(self, name=root.resolve().name, validation=judged)

    def with_training_images(self, count: int) -> Self:
        """Return the set with that many of its training images, as `Split.some` draws them."""
        return replace(self, train=self.train.some(count))

    def divided(self, share: float | None, seed: int) -> Self:
        """Return the set with a share of every class held out for validation, drawn by a seed.

        Raises UsageError for a share of a set that came divided, and for a class of one image.
        """
        if self.held_out is None:
            return super().divided(share, seed)
        labels = self.train.labels
        drawn = torch.zeros(len(labels), dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        for label, name in enumerate(self.classes):
            own = (labels == label).nonzero().flatten()
            if len(own) < 2:
                raise UsageError(
                    f"The class {name} of {self.name} has 1 image, and two or more are needed: one of them is held out "
                    "for validation. Add some, or remove the class."
                )
            count = min(max(round((share or SHARE) * len(own)), 1), len(own) - 1)
            drawn[own[torch.randperm(len(own), generator=generator)[:count]]] = True
        return self._holding_out(drawn)

    def like(self, stored: "PictureSource[Split]") -> Self:
        """Return the set divided as a run tells of its own (`stored`).

        Raises RunError where it came divided then and does not now, or the other way round, and where an image is gone
        that was held out.
        """
        assert isinstance(stored, ImageSource)
        if (self.held_out is None) != (stored.held_out is None):
            then, now = ("came", "does not") if stored.held_out is None else ("did not come", "does")
            raise RunError(
                f"{self.name} {then} with images for validation when the run was trained, and {now} now "
                f"({', '.join(f'{name}/' for name in VALIDATION)} are for validation, {TEST}/ is not). Bring it back."
            )
        if stored.held_out is None:
            return self
        names, held = self.train.names(), {*stored.held_out}
        if gone := sorted(held - {*names, *stored.left_out}):
            raise RunError(
                f"{len(gone)} of the {plural(len(held), 'image')} that the run held out for validation are not in "
                f"{self.name} any more; {gone[0]} is the first. Bring them back."
            )
        return self._holding_out(torch.tensor([name in held for name in names]))

    def _holding_out(self, drawn: Tensor) -> Self:
        """Return the set with the images of a mask (N,) for validation, and all others for training."""
        validation = replace(self.train.rows(drawn), name="validation", remarks=())
        train = replace(self.train.rows(~drawn), name="training")
        return replace(self, train=train, validation=validation, held_out=tuple(validation.names()))

    def without(self, names: Collection[str]) -> Self:
        """Return the set without some of its images; raises RunError where a class then has none for training."""
        left = {*names}
        if not left:
            return self
        train, validation = (
            split.rows(torch.tensor([name not in left for name in split.names()], dtype=torch.bool))
            for split in (self.train, self.validation)
        )
        counts = torch.bincount(train.labels, minlength=len(self.classes)).tolist()
        if empty := [name for name, count in zip(self.classes, counts, strict=True) if not count]:
            raise RunError(
                f"The class {empty[0]} of {self.name} has no training image that can be read. Add some, or remove it."
            )
        if not len(validation):
            raise RunError(f"{self.name} has no validation image that can be read. Add some.")
        return replace(self, train=train, validation=validation, left_out=(*self.left_out, *names))

    def evened(self) -> Self:
        """Return the set with the training images of each class repeated in turn until it has as many as the largest.

        Every repetition is a sample of its own, augmented by itself.
        """
        labels = self.train.labels
        own = [(labels == label).nonzero().flatten() for label in labels.unique()]
        most = max(map(len, own))
        return replace(self, train=self.train.rows(torch.cat([each[torch.arange(most) % len(each)] for each in own])))

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return how many training and how many validation images each class has."""
        both = (torch.bincount(split.labels, minlength=len(self.classes)) for split in (self.train, self.validation))
        return dict(zip(self.classes, zip(*(counts.tolist() for counts in both), strict=True), strict=True))


def digits(data_dir: Path | None, download: bool) -> ImageSource:
    """scikit-learn's 1,797 digits, 8×8: a fixed third of every class is for validation (1,198 and 599 images)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
    pictures = torch.from_numpy(np.rint(images * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    parts = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    train, validation = (
        Split(name, pictures[rows], torch.from_numpy(labels[rows]))
        for name, rows in zip(("training", "validation"), parts, strict=True)
    )
    classes = tuple("0123456789")
    return ImageSource("digits", classes, 1, (8, 8), (0.305,), (0.376,), train, validation, DIGITS)


def fashion_mnist(data_dir: Path | None, download: bool) -> ImageSource:
    """70,000 garments, 28×28: from a folder of IDX files, gzipped or not, or torchvision's download."""
    from torchvision.datasets import FashionMNIST

    stem = "train-images-idx3-ubyte"
    root = data_dir or (DEBIAN_FASHION if DEBIAN_FASHION.is_dir() else CACHE)
    folders = (root, root / "FashionMNIST" / "raw")
    if not any((folder / name).exists() for folder in folders for name in (stem, f"{stem}.gz")):
        _downloaded("fashion-mnist", root, lambda: FashionMNIST(str(root), download=download))
    folder = next(folder for folder in folders if (folder / stem).exists() or (folder / f"{stem}.gz").exists())
    train, validation = (
        Split(
            name,
            torch.from_numpy(_idx(folder, f"{prefix}-images-idx3-ubyte"))[:, None],
            torch.from_numpy(_idx(folder, f"{prefix}-labels-idx1-ubyte")).long(),
        )
        for name, prefix in (("training", "train"), ("validation", "t10k"))
    )
    classes = tuple(FashionMNIST.classes)
    return ImageSource("fashion-mnist", classes, 1, (28, 28), (0.286,), (0.353,), train, validation, GARMENTS)


def cifar10(data_dir: Path | None, download: bool) -> ImageSource:
    """60,000 objects of 10 classes, 32×32, by torchvision."""
    return _cifar("cifar10", data_dir, download, "CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(data_dir: Path | None, download: bool) -> ImageSource:
    """60,000 objects of 100 classes, 32×32, by torchvision."""
    return _cifar("cifar100", data_dir, download, "CIFAR100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def _cifar(
    name: str,
    data_dir: Path | None,
    download: bool,
    reader: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageSource:
    from torchvision import datasets

    read = getattr(datasets, reader)
    root = data_dir or CACHE
    train, test = _downloaded(name, root, lambda: [read(root, train=part, download=download) for part in (True, False)])
    training, validation = (
        Split(title, torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for title, part in (("training", train), ("validation", test))
    )
    return ImageSource(name, tuple(train.classes), 3, (32, 32), mean, std, training, validation, OBJECTS)


def imagenet(data_dir: Path | None, download: bool) -> ImageSource:
    """ImageNet-1K as everybody has it: `data_dir` holds train/ and val/ with a folder for each class."""
    if data_dir is None:
        raise UsageError(
            "ImageNet is not downloaded; its folder was not named. Give --data the folder that holds train/ and val/."
        )
    return replace(folder(data_dir), name="imagenet")


def folder(root: Path) -> ImageSource:
    """Images in `root`/train/<class>/ and `root`/valid/<class>/, or in `root`/<class>/, at any depth below a class.

    Validation may also be called val, validation or dev. Without it the set is not divided yet (`ImageSource.divided`).
    A folder `test` is left alone (`ImageSource.splits`). Raises UsageError naming a folder that is missing, has no
    class, has an empty class, or has a class of its own; and for a single class.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    _refuse_mixed(root)
    held_out = [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(held_out) > 1:
        names = " and ".join(f"{path.name}/" for path in held_out)
        raise UsageError(f"{root} has {names}, and one of them is for validation. Rename or move the others.")
    whole = root / TRAINING if (root / TRAINING).is_dir() else root
    classes = _classes_in(whole)
    if not classes:
        raise UsageError(
            f"A folder of images needs one folder per class in {whole}; there is none. Put the images of each class "
            "into a folder of its name."
        )
    if lone := next(filter(LONE.search, classes), None):
        raise UsageError(f"A class is named by Unicode text, and the folder {lone!r} in {whole} is not. Rename it.")
    if len(classes) == 1:
        raise UsageError(
            f"{whole} has one class, {classes[0]}, and a classifier tells two or more apart. Add a folder with images "
            "of another."
        )
    train = _split("train", root, whole, classes, _classes_in(whole))
    return ImageSource(
        root.resolve().name,
        tuple(classes),
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        train=train,
        validation=_part(root, held_out[0].name, classes) if held_out else train,
        augmentation=PHOTOGRAPHS,
        held_out=None if held_out else (),
    )


def _refuse_mixed(root: Path) -> None:
    """Raise UsageError for a part of a set that would be read as a class, or as nothing."""
    here = sorted(path.name for path in root.glob("*/"))
    parts = [name for name in here if name.lower() in NO_CLASSES]
    known = (TRAINING, *VALIDATION, TEST)
    if TRAINING in parts:
        parts = [name for name in parts if name not in known]
    if parts:
        raise UsageError(
            f"{root / parts[0]} is called as a part of a set, and in a folder of images these are {TRAINING}/, "
            f"{VALIDATION[0]}/ and {TEST}/, all of them beside {TRAINING}/ and in small letters. Rename it."
        )


def _classes_in(part: Path) -> list[str]:
    return [path.name for path in sorted(part.glob("*/")) if not is_hidden(Path(path.name))]


def _part(root: Path, name: str, classes: Sequence[str]) -> Split:
    """Read a part of a set that is judged on: each of its classes is one of those in training."""
    own = _classes_in(root / name)
    if not own:
        raise UsageError(f"A folder of images needs one folder per class in {root / name}; there is none.")
    if foreign := sorted({*own} - {*classes}):
        raise UsageError(
            f"{root / name / foreign[0]} is a class that {root / TRAINING} does not have. "
            "Every validation class must be a training class: add its images there, or remove it."
        )
    return _split(name, root, root / name, classes, own)


def _split(name: str, root: Path, part: Path, classes: Sequence[str], own: Sequence[str]) -> Split:
    """Read the images of some of the classes; what is left out is told by its kind."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    here = {each: number for number, each in enumerate(classes) if each in {*own}}
    others: dict[str, list[str]] = {}

    def is_image(path: str) -> bool:
        *folders, file = Path(path).relative_to(part).parts
        aside = next((folder for folder in folders if is_hidden(Path(folder))), None)
        if aside or file.startswith("._"):
            others.setdefault(f"in {aside}" if aside else "._* of macOS", []).append(path)
            return False
        if path.lower().endswith(IMG_EXTENSIONS):
            return True
        if not file.startswith("."):
            others.setdefault(Path(file).suffix.lower() or "without an ending", []).append(path)
        return False

    samples = ImageFolder.make_dataset(str(part), here, is_valid_file=is_image, allow_empty=True)
    if empty := sorted({*here.values()} - {label for _, label in samples}):
        class_folder = part / classes[empty[0]]
        unread = [path for files in others.values() for path in map(Path, files) if class_folder in path.parents]
        kinds = Counter(path.suffix.lower() or path.name for path in unread).most_common(3)
        there = f" but {', '.join(f'{count} {kind}' for kind, count in kinds)}" if kinds else ""
        raise UsageError(
            f"{class_folder} holds no image ({', '.join(IMG_EXTENSIONS)}){there}. Put some there, or remove the folder."
        )
    for path in sorted(part.iterdir()):
        if path.is_dir() and is_hidden(Path(path.name)):
            files = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in sorted(names)]
            others.setdefault(f"in {path.name}", []).extend(files)
        elif path.suffix.lower() in (*IMG_EXTENSIONS, *UNREAD) and not path.name.startswith("."):
            others.setdefault("in no class", []).append(str(path))
    paths, labels = zip(*samples, strict=True)
    return Split(name, [Path(path) for path in paths], torch.tensor(labels), _left_out(part, others), root)


def _left_out(part: Path, others: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Say which files are not read, by their kinds, the most frequent first."""
    kinds = {kind: files for kind, files in sorted(others.items(), key=lambda item: -len(item[1])) if files}
    if not kinds:
        return ()
    first = {kind: f"{min(files)}{' is the first' if len(files) > 1 else ''}" for kind, files in kinds.items()}
    named = [f"{len(files)} {kind} ({first[kind]})" for kind, files in kinds.items()]
    more = f", {plural(len(named) - MOST_NAMED, 'more kind')}" if len(named) > MOST_NAMED else ""
    advice = " Save those that are pictures as JPEG or PNG." if any(kind in UNREAD for kind in kinds) else ""
    count = plural(sum(map(len, kinds.values())), "file")
    return (f"{part} leaves out {count} that are not read: {', '.join(named[:MOST_NAMED])}{more}.{advice}",)


def _downloaded(name: str, root: Path, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{root} does not hold {name} whole, and it could not be downloaded ({error}). Give --data_dir the folder "
            "that holds its files."
        ) from error


def _idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: two zeros, type 8, the number of axes, their lengths as big-endian words, the data."""
    axes = int(stem.removesuffix("-ubyte")[-1])
    packed = folder / f"{stem}.gz"
    try:
        with ExitStack() as files:
            file = files.enter_context(reading.opened(packed if packed.exists() else folder / stem))
            stream = files.enter_context(gzip.GzipFile(fileobj=file)) if packed.exists() else file
            if (kind := stream.read(4)) != bytes((0, 0, 8, axes)):
                raise ValueError(f"it begins with {kind.hex()}")
            shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
            if (size := math.prod(shape)) > LARGEST_IDX:
                raise ValueError(f"it says that it holds {size} bytes, and {LARGEST_IDX} are the most")
            content = bytearray(stream.read(size + 1))  # a byte too many is seen, and no more than that is unpacked
            if len(content) != size:
                raise ValueError(f"it holds {'more' if len(content) > size else 'less'} than the {size} bytes it says")
            return np.frombuffer(content, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise RunError(f"{folder / stem} cannot be read as an IDX file ({error}). Fetch it again.") from error
