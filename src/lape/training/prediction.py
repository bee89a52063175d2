"""What a checkpoint says of pictures that nobody has labelled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lape.data.pictures import open_picture
from lape.data.sources import Source
from lape.errors import UsageError
from lape.experiment import Experiment
from lape.tasks.work import Answer
from lape.training.evaluation import load_run


@dataclass(frozen=True)
class Predicted:
    """A picture, what was found in it, and what the classes are called."""

    path: Path
    picture: Image.Image
    answer: Answer
    classes: tuple[str, ...]


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Return pictures, and for a folder those in it; raises UsageError for a path that is neither."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    pictures: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if path.is_dir() and not inside:
            raise UsageError(f"{path} holds no picture ({', '.join(IMG_EXTENSIONS)}). Name another folder, or files.")
        if not path.exists():
            raise UsageError(f"There is no picture or folder {path}. Check the path.")
        pictures += inside or [path]
    return pictures


def predict(
    checkpoint: Path, pictures: Sequence[Path], threshold: float = 0.5, **changed: object
) -> Iterator[Predicted]:
    """Yield what a checkpoint, or the best one of a run folder, says of each picture, in their order.

    Of objects those with a score of `threshold` or more. Raises RunError for a file that is no checkpoint, and for a
    picture that cannot be read.
    """

    def without_pictures(_: Experiment, source: Source) -> Source:
        return source

    run: Any = load_run(checkpoint, without_pictures, devices=1, nodes=1, **changed)
    for path in pictures:
        with open_picture(path) as file:
            picture = file.convert("RGB")
        with torch.no_grad(), run.fabric.autocast():
            answer = run.work.answer(run.task, picture, run.fabric.device, threshold)
        yield Predicted(path, picture, answer, run.work.source.classes)
