"""What a checkpoint says of pictures that nobody has labelled."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lape.data.pictures import is_hidden, read_picture
from lape.data.sources import Source
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.tasks.answers import Answer
from lape.training.evaluation import LoadedRun, load_run

AT_ONCE = 32  # pictures of one size, where nothing else is asked for
READERS = 8  # threads; each holds a picture as large as its file


@dataclass(frozen=True)
class Predicted:
    """A picture, what is said of it, and what the classes are called."""

    path: Path
    answer: Answer
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Unread:
    """A picture that could not be read, and why."""

    path: Path
    reason: str


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Return pictures, and for a folder those in it at any depth; raises UsageError for a path that is neither.

    What is hidden, and the copies that archives of macOS bring, is left out.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    pictures: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"There is no picture or folder {path}. Check the path.")
        if not path.is_dir():
            pictures.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        seen = [file for file in inside if not is_hidden(file.relative_to(path)) and file.is_file()]
        if not seen:
            raise UsageError(f"{path} holds no picture ({', '.join(IMG_EXTENSIONS)}). Name another folder, or files.")
        pictures += seen
    return pictures


def predict(
    checkpoint: Path,
    pictures: Sequence[Path],
    threshold: float = 0.5,
    batch_size: int | None = None,
    **changed: object,
) -> Iterator[Predicted | Unread]:
    """Yield what a checkpoint, or the best one of a run folder, says of each picture, in their order.

    Pictures are seen as validation sees them, `batch_size` at once; one that cannot be read is told in its turn. Of
    objects those with a score of `threshold` or more are told. Raises RunError for a file that is no checkpoint.
    """

    def without_pictures(_: Experiment, source: Source) -> Source:
        return source

    run = load_run(checkpoint, without_pictures, devices=1, nodes=1, batch_size=batch_size, **changed)
    at_once = batch_size or run.work.validation_batch or AT_ONCE

    def view(path: Path) -> Tensor | Unread:
        try:
            return run.work.view(read_picture(path))
        except RunError as error:
            return Unread(path, str(error))

    with ThreadPoolExecutor(READERS) as readers:  # Pillow decodes and resizes beside Python's lock
        for first in range(0, len(pictures), at_once):
            few = pictures[first : first + at_once]
            views = list(readers.map(view, few))
            answers = iter(_answers(run, [one for one in views if isinstance(one, Tensor)], threshold))
            for path, one in zip(few, views, strict=True):
                yield Predicted(path, next(answers), run.work.source.classes) if isinstance(one, Tensor) else one


def _answers(run: LoadedRun, views: list[Tensor], threshold: float) -> Sequence[Answer]:
    if not views:
        return ()
    shown = run.fabric.strategy.precision.convert_input(run.fabric.to_device(views))
    with torch.no_grad(), run.fabric.autocast():
        return run.work.answers(run.task, shown, threshold)
