"""What an experiment does with a set, whatever the kind: the parts that every file of a kind has, and their table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pkgutil import resolve_name
from typing import Any, ClassVar, Protocol, Self

import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lape.data.pipeline import Batch
from lape.data.sizes import Size
from lape.data.sources import Source
from lape.errors import UsageError, choose
from lape.experiment import Experiment, parse
from lape.models.rebuilding import Build, as_asked
from lape.tasks import KINDS
from lape.tasks.answers import Answer, NamedClasses


class Meter(Protocol):
    """An account of validation results, over batches and processes."""

    def to(self, device: torch.device) -> Any:
        """Move what is counted to a device; returns the account."""
        ...

    def update(self, model: nn.Module, batch: Any) -> None:
        """Count a batch."""
        ...

    def compute(self) -> dict[str, float]:
        """What is known of all batches of all processes: names beginning with `val_`, and numbers."""
        ...

    def answers(self) -> NamedClasses | None:
        """What was said of every image, process by process; None where it was not kept."""
        ...


class Task(Protocol):
    """What is learned and measured."""

    score: ClassVar[str]  # of what `Meter.compute` returns, the one by which the best weights are kept, in percent
    reported: ClassVar[tuple[str, ...]]  # what is kept of a run's end, the score first

    def loss(self, model: nn.Module, images: Any, targets: Any) -> Tensor:
        """Return the loss of a prepared batch, a scalar."""
        ...

    def meter(self, keep: bool = False) -> Meter:
        """A new account of validation results, which with `keep` has `Meter.answers` too, in tasks that know such."""
        ...


class Preparation(Protocol):
    """From a batch as the workers leave it to what the model takes."""

    def ahead(self, batches: Iterator[Batch], to_device: Callable[[Any], Any]) -> Iterator[Batch]:
        """Bring batches to the device."""
        ...

    def __call__(self, batch: Batch, epoch: int) -> tuple[Any, Any]:
        """Return images and targets."""
        ...


class Work(Protocol):
    """An experiment on a set of one kind: its model, what it learns, and how pictures reach it.

    Raises UsageError for a model, a setting or a size that does not go with the set.
    """

    source_type: ClassVar[type[Any]]  # of the sets of this kind
    one_size: ClassVar[bool]  # whether the model sees all pictures at one size
    validation_batch: ClassVar[int | None]  # pictures at once; None: as many as in training
    source: Source
    module: Any  # the model
    repeats: int  # times that a picture is shown in a row

    def task(self, fabric: Fabric) -> Task:
        """Create what is learned, on the devices where it is."""
        ...

    def check(self, report: Callable[[float], None]) -> None:
        """Look at the set before the first step, and tell which share is done; raises RunError for what is wrong."""
        ...

    def resolved(self) -> dict[str, Any]:
        """Return in plain values what the settings came to: the size of images, what is in each class, augmentation."""
        ...

    def preparation(self, share: int, device: torch.device) -> Preparation:
        """Create what is left to do to a batch of `share` images on the device."""
        ...

    def training(self) -> Dataset[Any]:
        """The training pictures, augmented."""
        ...

    def validation(self) -> Dataset[Any]:
        """The validation pictures."""
        ...

    def input_config(self) -> dict[str, Any]:
        """Return what timm's models say of their images: of these, and of their size where there is but one."""
        ...

    def view(self, picture: Image.Image) -> Tensor:
        """Return what is shown of a picture, RGB, to `answers`."""
        ...

    def answers(self, task: Any, views: Sequence[Tensor], threshold: float) -> Sequence[Answer]:
        """Say what is in each of some pictures; of objects those with a score of `threshold` or more."""
        ...

    def transformer_images(self, count: int, at_once: int) -> tuple[nn.Module, Iterator[Tensor]]:
        """Return the model's transformer, and `count` validation pictures as it takes them, drawn once and for all."""
        ...


class OneSizeWork(Work, Protocol):
    """The work of a kind whose model sees all pictures at one size (`one_size`)."""

    size: Size

    def at(self, size: Size) -> Self:
        """Return the same for pictures of another size, with the same weights.

        Raises UsageError for a size that the model does not take.
        """
        ...


def work_of(experiment: Experiment, source: Source, build: Build = as_asked) -> Work:
    """Return the work of an experiment on a set, with its model, which is new, and built so.

    Raises UsageError for a model, a setting or a size that does not go with the set.
    """
    return resolve_name(KINDS[source.kind])(experiment, source, build)


def describe_set(source: Source) -> dict[str, Any]:
    """Say in plain values what a checkpoint must know of a set: all but its pictures."""
    facts = asdict(replace(source, train=(), validation=()))
    return {"kind": source.kind} | {name: value for name, value in facts.items() if name not in ("train", "validation")}


def set_without_pictures(description: Mapping[str, Any]) -> Source:
    """Return a set as `describe_set` tells of it: enough to create its model and to ask that something.

    Raises UsageError where that is no set.
    """
    if not isinstance(description, Mapping):
        raise UsageError("a set is told of by names with their values")
    facts = dict(description)
    work = resolve_name(choose(KINDS, str(facts.pop("kind", None)), "a kind of set"))
    sections: dict[str, Any] = {f.name: f.type for f in fields(work.source_type) if is_dataclass(f.type)}
    facts |= {name: parse(sections[name], facts[name]) for name in sections.keys() & facts.keys()}
    return parse(work.source_type, facts, train=(), validation=())
