"""What a model gets right: the validation that training does, and that of a checkpoint."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from lape.assembly import launch, model_of
from lape.checkpoints import BEST, load, read
from lape.data import pipeline
from lape.data.pipeline import Batches, Whole
from lape.data.sources import find
from lape.errors import UsageError
from lape.experiment import Experiment
from lape.tasks.classification import Classification


@dataclass(frozen=True)
class Judged:
    """A checkpoint's metrics on the validation images of a set."""

    checkpoint: Path
    data: str
    images: int
    metrics: Mapping[str, float]


def evaluate(fabric: Fabric, task: Classification, model: nn.Module, batches: Batches) -> dict[str, float]:
    """Return the task's metrics of a model, one that Fabric does not wrap, over all processes' batches."""
    meter = task.meter().to(fabric.device)
    was_training = model.training
    model.eval()
    with closing(batches), torch.no_grad(), fabric.autocast():
        for batch in batches:
            meter.update(model, fabric.strategy.precision.convert_input(fabric.to_device(batch)))
    model.train(was_training)
    return meter.compute()


def evaluate_checkpoint(checkpoint: Path, **changed: object) -> Judged:
    """Judge a checkpoint, or the best one of a run folder, with its experiment's settings but for those changed.

    Raises UsageError for a set of other classes, RunError for a file that is no checkpoint of its model.
    """
    path = checkpoint / BEST if checkpoint.is_dir() else checkpoint
    saved = read(path)
    experiment = Experiment.of(saved["experiment"])
    experiment = replace(experiment, **{name: value for name, value in changed.items() if value is not None})  # pyright: ignore
    source = find(experiment.data, experiment.data_dir)
    if list(source.classes) != saved["classes"]:
        raise UsageError(
            f"{path} was trained to tell {_named(saved['classes'])} apart, and {source.name} has "
            f"{_named(source.classes)}. Give --data a set of the same classes."
        )
    fabric = launch(experiment)
    model, size = model_of(experiment, source)
    load(model, judged_weights(saved), path)
    model = fabric.strategy.precision.convert_module(model.to(fabric.device))
    task = Classification(len(source.classes))
    images = pipeline.validation_images(source, experiment, size)
    share = Whole(len(source.validation), experiment.batch_size, fabric.global_rank, fabric.world_size)
    batches = pipeline.load(images, share, experiment.workers, pin=fabric.device.type == "cuda")
    return Judged(path, source.name, len(source.validation), evaluate(fabric, task, model, batches))


def judged_weights(saved: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return those weights of a checkpoint that its run validates: their average (EMA), or the weights themselves."""
    averaged = saved.get("ema") if Experiment.of(saved["experiment"]).ema_evaluated else None
    return averaged or saved["model"]


def _named(classes: list[str] | tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])} ...)"
