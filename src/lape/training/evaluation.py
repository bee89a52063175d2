"""What a model gets right: the validation that training does, and that of a checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from lape.data import pipeline
from lape.data.pipeline import Batches, InOrder
from lape.data.sizes import Size
from lape.data.sources import SPLITS, Source, find_set, set_of
from lape.errors import RunError, UsageError, choose
from lape.experiment import Execution, Experiment
from lape.files.characters import plural
from lape.models.rebuilding import LikeItsFile
from lape.tasks.answers import NamedClasses
from lape.tasks.work import Meter, OneSizeWork, Task, Work, set_without_pictures, work_of
from lape.training.assembly import launch
from lape.training.checkpoints import BEST, read
from lape.weights import fill, judged_weights


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's metrics on the images of a split, one of `SPLITS`; they are the validation images of `source`.

    `answers` are what was said of each of them, in tasks that know such.
    """

    checkpoint: Path
    experiment: Experiment
    source: Source
    split: str
    metrics: Mapping[str, float]
    answers: NamedClasses | None = None

    @property
    def data(self) -> str:
        """The name of the set."""
        return self.source.name

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.source.validation)

    @property
    def images_in_words(self) -> str:
        """Say how many there are, and of which split."""
        return plural(self.images, f"{SPLITS[self.split]} image")


@dataclass(frozen=True)
class AtSize:
    """A model's metrics on images of one size; or none, and why."""

    size: Size
    metrics: Mapping[str, float]
    refusal: str | None = None


@dataclass(frozen=True)
class SizesEvaluation:
    """A checkpoint's metrics on the images of a split, at several sizes."""

    checkpoint: Path
    data: str
    images: int
    split: str
    trained: Size  # that the model was trained at
    results: tuple[AtSize, ...]


def evaluate(fabric: Fabric, task: Task, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Return the task's metrics of a model, one that Fabric does not wrap, over all processes' batches."""
    return filled(fabric, task.meter(), model, batches).compute()


def filled(fabric: Fabric, meter: Meter, model: nn.Module, batches: Batches) -> Meter:
    """Return an account with all batches of this process counted, of a model that Fabric does not wrap."""
    meter = meter.to(fabric.device)
    was_training = model.training
    model.eval()
    with closing(batches), torch.no_grad(), fabric.autocast():
        for batch in batches:
            images, targets = fabric.to_device(batch)
            meter.update(model, (fabric.strategy.precision.convert_input(images), targets))
    model.train(was_training)
    return meter


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint, brought back to what made it."""

    path: Path
    experiment: Experiment
    fabric: Fabric
    work: Work  # with the checkpoint's weights
    task: Task
    metrics: Mapping[str, float]  # of its validation; none where it was not validated


def load_run(checkpoint: Path, source_of: Callable[[Experiment, Source], Source], **changed: object) -> LoadedRun:
    """Bring back a checkpoint, or the best one of a run folder, with its experiment's settings but for those changed.

    `source_of` is handed the experiment and its set without pictures, and returns the set that it is wanted for.
    Devices and workers are not the run's: it may have been computed elsewhere. Raises RunError for a file that is no
    checkpoint of its model.
    """
    path = checkpoint / BEST if checkpoint.is_dir() else checkpoint
    saved = read(path)
    experiment = Experiment.of(saved["experiment"])
    elsewhere = {field.name: field.default for field in fields(Execution) if field.name != "data_dir"}
    taught = {"teacher": None, "teacher_weights": None, "balance": None}
    asked = {name: value for name, value in changed.items() if value is not None}
    experiment = replace(experiment, **(elsewhere | taught | asked))
    weights = judged_weights(saved)
    try:
        stored = set_without_pictures(saved["set"])
    except UsageError as error:
        raise RunError(f"{path} does not tell of the set that it was trained on ({error}). Give another.") from error
    try:
        source = source_of(experiment, stored)
        fabric = launch(experiment)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    try:
        work = work_of(experiment, source, LikeItsFile(weights, path))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    fill(work.module, weights, path)
    work.module = fabric.strategy.precision.convert_module(work.module.to(fabric.device)).eval()
    return LoadedRun(path, experiment, fabric, work, work.task(fabric), saved.get("metrics") or {})


def evaluate_checkpoint(checkpoint: Path, split: str = "val", **changed: object) -> Evaluation:
    """Judge a checkpoint, or the best one of a run folder, with its experiment's settings but for those changed.

    Raises UsageError for a set of other classes or without that split, RunError for a file that is no checkpoint of its
    model.
    """
    run = _with_pictures(checkpoint, split, changed)
    meter = _judged(run, run.work, keep=True)
    metrics, answers = meter.compute(), meter.answers()
    if answers is not None:
        answers = answers.at(dealt_out(len(answers.labels), run.fabric.world_size).argsort())
    return Evaluation(run.path, run.experiment, run.work.source, split, metrics, answers)


def dealt_out(images: int, processes: int) -> Tensor:
    """Return the places of images in the order in which they lie when one process's follow another's."""
    return torch.cat([torch.cat(InOrder(images, images, process, processes).batches) for process in range(processes)])


def evaluate_at_sizes(
    checkpoint: Path, sizes: Sequence[Size], split: str = "val", **changed: object
) -> SizesEvaluation:
    """Judge a checkpoint as `evaluate_checkpoint` does, on images of sizes that it need not be trained at.

    Raises the same, and UsageError for a model that sees pictures of many sizes.
    """
    run = _with_pictures(checkpoint, split, changed)
    results = tuple(at_sizes(run, sizes))
    source = run.work.source
    return SizesEvaluation(run.path, source.name, len(source.validation), split, trained_size(run), results)


def trained_size(run: LoadedRun) -> Size:
    """Return the size of the images that a model is trained at; raises UsageError where that is no one size."""
    return _of_one_size(run).size


def at_sizes(run: LoadedRun, sizes: Iterable[Size]) -> Iterator[AtSize]:
    """Judge a run's model at sizes, one after another, with the same weights; a size that it does not take is told.

    Raises UsageError for a model that sees pictures of many sizes.
    """
    work = _of_one_size(run)
    for size in sizes:
        try:
            there = work.at(size)
        except UsageError as error:
            yield AtSize(size, {}, str(error))
        else:
            yield AtSize(size, _judged(run, there).compute())


def _of_one_size(run: LoadedRun) -> OneSizeWork:
    if not run.work.one_size:
        raise UsageError(
            f"sizes are for classifiers, which see all images at one size; {run.experiment.model} takes the pictures "
            f"of {run.work.source.name} as large as they are. Leave out sizes; short_side says how they are resized."
        )
    return cast(OneSizeWork, run.work)


def _with_pictures(checkpoint: Path, split: str, changed: Mapping[str, object]) -> LoadedRun:
    """Bring back a checkpoint with the images of a split of its set in the place of its validation images."""
    choose(SPLITS, split, "a split")
    may_download = changed.get("data_dir") is not None  # and never where the checkpoint says
    own = changed.get("data") is None

    def with_pictures(experiment: Experiment, stored: Source) -> Source:
        if not own and (unsplit := stored.with_folder(Path(experiment.data))) is not None:
            if split != "val":
                raise UsageError(f"{experiment.data} has no splits, and all of it is judged: leave out split {split}.")
            return unsplit
        data, folder = experiment.data, experiment.data_dir
        source = set_of(experiment, may_download, stored) if own else find_set(data, folder, may_download)
        if source.classes != stored.classes:
            raise UsageError(
                f"{checkpoint} was trained to tell {_named(stored.classes)} apart, and {source.name} has "
                f"{_named(source.classes)}. Give --data a set of the same classes."
            )
        return source.on_split(split)

    return load_run(checkpoint, with_pictures, **changed)


def _judged(run: LoadedRun, work: Work, keep: bool = False) -> Meter:
    """Return the account of all images of this process."""
    fabric, held_out = run.fabric, work.source.validation
    at_once = work.validation_batch or run.experiment.batch_size
    share = InOrder(len(held_out), at_once, fabric.global_rank, fabric.world_size)
    batches = pipeline.load(work.validation(), share, run.experiment.workers, fabric.device.type == "cuda")
    return filled(fabric, run.task.meter(keep), work.module, batches)


def _named(classes: Sequence[str]) -> str:
    return f"{plural(len(classes), 'class', 'classes')} ({', '.join(classes[:3])} ...)"
