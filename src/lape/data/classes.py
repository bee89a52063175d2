"""Images with one class each: named sets, and folders with one folder per class."""

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lape.data.pictures import MODES, is_hidden, read_picture
from lape.data.sources import PictureSource, others_left_out
from lape.errors import RunError, UsageError
from lape.experiment import Augmentation
from lape.files import reading
from lape.files.characters import LONE

Read = TypeVar("Read")

CACHE = Path.home() / ".cache" / "lape"
LARGEST_IDX = 1 << 28  # bytes; five times the largest file of Fashion-MNIST
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist

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
    should know before it is used.
    """

    name: str
    pictures: Tensor | Sequence[Path]
    labels: Tensor
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int) -> "Split":
        """Return that many of the images, drawn once and for all; UsageError where there are fewer."""
        if count > len(self):
            raise UsageError(
                f"There are {len(self)} images for training, and train_images is {count}: lower or leave it out."
            )
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].sort().values
        pictures = self.pictures
        own = pictures[rows] if isinstance(pictures, Tensor) else [pictures[row] for row in rows.tolist()]
        return replace(self, pictures=own, labels=self.labels[rows])

    def title(self, index: int) -> str:
        """What a person finds image `index` by."""
        if isinstance(self.pictures, Tensor):
            return f"{self.name} image {index}"
        return str(self.pictures[index])

    def picture(self, index: int, channels: int) -> Image.Image:
        """Return image `index` as people see it; raises RunError naming a file that cannot be read."""
        mode = MODES[channels]
        if isinstance(self.pictures, Tensor):
            return Image.fromarray(self.pictures[index].permute(1, 2, 0).squeeze(-1).numpy()).convert(mode)
        return read_picture(self.pictures[index]).convert(mode)


@dataclass(frozen=True)
class ImageSource(PictureSource[Split]):
    """A dataset for classification."""

    kind = "classes"

    def on_split(self, name: str, folder: Path) -> Self:
        """Return the set with the images of another split, train or test, in the place of its validation images.

        Those of test are read from `folder`. Raises UsageError where there are none.
        """
        splits: Mapping[str, Callable[[], Split]] = {
            "train": lambda: self.train,
            "val": lambda: self.validation,
            "test": lambda: images_of_test(folder, self.classes),
        }
        return replace(self, validation=splits[name]())

    def with_folder(self, root: Path) -> Self | None:
        """Return the set with all images in `root`/<class>/ as its validation images; None where there is a train/.

        A class may be missing. Raises UsageError for a folder that is no class of the set.
        """
        if not root.is_dir() or (root / "train").is_dir():
            return None
        return replace(self, name=root.resolve().name, validation=_labelled(root, self.classes))

    def with_training_images(self, count: int) -> Self:
        """Return the set with that many of its training images, as `Split.some` draws them."""
        return replace(self, train=self.train.some(count))


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
    """Images in `root`/train/<class>/ and `root`/val/<class>/ (or validation, or test), at any depth below a class.

    Raises UsageError naming the folder that is missing, has no class, has an empty class, or has a class of its own.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    train = root / "train"
    held_out = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), root / "val")
    classes, own = (
        [path.name for path in sorted(part.glob("*/")) if not path.name.startswith(".")] for part in (train, held_out)
    )
    for part, found in ((train, classes), (held_out, own)):
        if not found:
            raise UsageError(f"A folder of images needs one folder per class in {part}; there is none.")
    if lone := next(filter(LONE.search, classes), None):
        raise UsageError(f"A class is named by Unicode text, and the folder {lone!r} in {train} is not. Rename it.")
    if foreign := sorted(set(own) - set(classes)):
        raise UsageError(
            f"{held_out / foreign[0]} is a class that {train} does not have. "
            "Every validation class must be a training class: add its images there, or remove it."
        )
    numbers = {name: number for number, name in enumerate(classes)}

    def split(part: Path, found: list[str]) -> Split:
        here = {name: numbers[name] for name in found}
        others: list[str] = []

        def is_image(path: str) -> bool:
            if not (read := path.lower().endswith(IMG_EXTENSIONS)) and not Path(path).name.startswith("."):
                others.append(path)
            return read

        samples = ImageFolder.make_dataset(str(part), here, is_valid_file=is_image, allow_empty=True)
        if empty := sorted(set(here.values()) - {label for _, label in samples}):
            raise UsageError(
                f"{part / classes[empty[0]]} holds no image ({', '.join(IMG_EXTENSIONS)}). "
                "Put some there, or remove the folder."
            )
        paths, labels = zip(*samples, strict=True)
        remarks = others_left_out(part, others)
        return Split(part.name, [Path(path) for path in paths], torch.tensor(labels), remarks)

    return ImageSource(
        root.resolve().name,
        tuple(classes),
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        train=split(train, classes),
        validation=split(held_out, own),
        augmentation=PHOTOGRAPHS,
    )


def images_of_test(root: Path, classes: Sequence[str]) -> Split:
    """Return the images of `root`/test/<class>/, which no training sees, labelled by their places in `classes`.

    Raises UsageError where there is no such folder, and for a class that is not among those.
    """
    if not (root / "test").is_dir():
        raise UsageError(f"There is no folder {root / 'test'}, whose images are those of the split test. Put it there.")
    return _labelled(root / "test", classes)


def _labelled(root: Path, classes: Sequence[str]) -> Split:
    """Return all images in `root`/<class>/, at any depth, of classes that are known; what is hidden is left out."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = {path.name for path in root.glob("*/") if not is_hidden(path.relative_to(root))}
    if foreign := sorted(folders - set(classes)):
        raise UsageError(
            f"{root / foreign[0]} is no class that the model was trained to tell ({', '.join(classes[:3])} ...). Name "
            "a folder that holds a folder for each class, or remove that one."
        )
    here = {name: number for number, name in enumerate(classes) if name in folders}

    def is_image(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and not is_hidden(Path(path).relative_to(root))

    samples = ImageFolder.make_dataset(str(root), here, is_valid_file=is_image, allow_empty=True) if here else []
    if not samples:
        raise UsageError(
            f"{root} has no image in a folder for its class ({', '.join(classes[:3])} ...; "
            f"{', '.join(IMG_EXTENSIONS)}). Name another folder."
        )
    paths, labels = zip(*samples, strict=True)
    return Split(root.name, [Path(path) for path in paths], torch.tensor(labels))


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
