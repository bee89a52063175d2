"""What a set is, whatever is to be learnt from it, and how one is found by its name or its folder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from PIL import Image

from lape.data import CLASSES, LAYOUTS, SETS
from lape.errors import UsageError, choose
from lape.experiment import Augmentation, Experiment

SplitType = TypeVar("SplitType")

# The splits of sets, and what people call the images in each.
SPLITS: Mapping[str, str] = MappingProxyType({"train": "training", "val": "validation", "test": "test"})


class PictureSplit(Protocol):
    """Pictures with something to be found in each, in any form."""

    @property
    def name(self) -> str:
        """What a person calls the split."""
        ...

    def __len__(self) -> int: ...

    def title(self, index: int) -> str:
        """What a person finds picture `index` by."""
        ...

    def picture(self, index: int) -> Image.Image:
        """Return picture `index`, RGB; raises RunError naming a file that cannot be read."""
        ...

    @property
    def remarks(self) -> Sequence[str]:
        """What a person should know of the split before it is used: what is left out of it, what looks wrong."""
        ...

    def check(self, index: int) -> bool:
        """Open the files of picture `index` wholly; raises RunError naming what is wrong with them.

        Returns whether there is anything in it to be learnt or measured.
        """
        ...


@dataclass(frozen=True)
class PictureSource(Generic[SplitType]):
    """A dataset: what is in it, and how its pictures are augmented where nothing else is asked for."""

    kind: ClassVar[str]  # of `lape.tasks.KINDS`: what can be learnt from it
    content: ClassVar[str] = "a class"  # what a picture has in which there is anything to be learnt

    name: str
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int] | None  # (H, W); None where pictures have any size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: SplitType
    validation: SplitType
    augmentation: Augmentation
    left_out: tuple[str, ...] = field(default=(), kw_only=True)  # names of pictures that could not be read

    def splits(self) -> Mapping[str, Callable[[], SplitType]]:
        """Return what reads each split of `SPLITS` that a model may be judged on; one may be read only then."""
        return {"val": lambda: self.validation}

    def on_split(self, name: str) -> Self:
        """Return the set with a split in the place of its validation pictures; raises UsageError where it has none."""
        readers = self.splits()
        if name not in readers:
            raise UsageError(
                f"{self.name} has no split {name} that models are judged on, only {', '.join(readers)} (a folder's "
                "are train/, val/ and test/). Name one of these."
            )
        return replace(self, validation=readers[name]())

    def with_folder(self, root: Path) -> Self | None:
        """Return the set with all pictures of a folder that has no splits as its validation images.

        None where the folder is of another layout. Raises UsageError where it has other classes.
        """
        return None

    def with_training_images(self, count: int) -> Self:
        """Return the set with that many of its training images; raises UsageError where no such part is drawn."""
        raise UsageError(f"train_images {count} means nothing for the pictures of {self.name}: leave it out.")

    def divided(self, share: float | None, seed: int) -> Self:
        """Return the set with training and validation pictures; raises UsageError for a share of what has both."""
        if share is not None:
            raise UsageError(
                f"val_split {share} is of a set that nobody has divided, and {self.name} has pictures for validation: "
                "leave it out."
            )
        return self

    def like(self, stored: "PictureSource[SplitType]") -> Self:
        """Return the set divided as a run tells of its own (`stored`)."""
        return self

    def without(self, names: Collection[str]) -> Self:
        """Return the set without some of its pictures, by their names."""
        assert not names  # only images of classes are left out
        return self


Source = PictureSource[Any]


def others_left_out(folder: Path, others: Sequence[str]) -> tuple[str, ...]:
    """Say that a folder has other files than are read, which no ending tells to be pictures."""
    if not others:
        return ()
    return (f"{folder} leaves out {len(others)} files whose endings are not read; {min(others)} is the first.",)


# The reader of a named set: it is told the folder of the set, and whether the set may be downloaded to there.
Reader = Callable[[Path | None, bool], Source]


def find_set(data: str, data_dir: Path | None = None, download: bool = True) -> Source:
    """Return the set of that name, or of the folder, by its layout; UsageError where there is neither.

    Without `download` a set that is not in `data_dir` is a RunError: what only a file names is not written to. The
    cache of the user always may be.
    """
    if data not in SETS and Path(data).is_dir():
        return _in_folder(Path(data))
    if data not in SETS and Path(data).name != data:
        raise UsageError(f"There is no folder {data}. --data takes one of {', '.join(SETS)}, or a folder of images.")
    reader: Reader = resolve_name(choose(SETS, data, "a dataset or a folder"))
    return reader(data_dir, download or data_dir is None)


def set_of(experiment: Experiment, download: bool = True, stored: Source | None = None) -> Source:
    """Return the set of an experiment, divided as it asks, with all of its training images or some.

    Of a run that told of its set (`stored`) it is divided as it was then, without what was left out. Raises as
    `find_set`, `PictureSource.divided`, `like` and `with_training_images` do.
    """
    source = find_set(experiment.data, experiment.data_dir, download)
    if stored is not None and stored.kind != source.kind:
        raise UsageError(
            f"{source.name} is a set of {source.kind}, and the run's was one of {stored.kind}: bring it back."
        )
    divided = source.divided(experiment.val_split, experiment.split_seed) if stored is None else source.like(stored)
    some = divided.with_training_images(experiment.train_images) if experiment.train_images else divided
    return some if stored is None else some.without(stored.left_out)


def holds_classes(data: str) -> bool:
    """Whether `--data` names a folder that is read as one of classes."""
    return data not in SETS and Path(data).is_dir() and _layout(Path(data)) == CLASSES


def _layout(root: Path) -> str:
    """Return the first of the layouts that a folder has a part of."""
    return next((part for part in LAYOUTS if any(root.glob(part))), CLASSES)


def _in_folder(root: Path) -> Source:
    reader: Callable[[Path], Source] = resolve_name(LAYOUTS[_layout(root)])
    return reader(root)
