"""What a run begins with, as its folder keeps it: the command, what its settings came to, which images are held out.

A run that was cut off is gone on with by another command; the one that began it stands in `start.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape.data.sources import Source
from lape.errors import RunError
from lape.experiment import Experiment
from lape.files import reading, writing
from lape.tasks.work import Work
from lape.training.assembly import highest_rate, warmup_of
from lape.training.checkpoints import START
from lape.training.provenance import command


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    command: str  # that began it
    experiment: Experiment
    set: str  # what the set is called
    images: tuple[int, int]  # for training, for validation
    held_out: tuple[str, ...]  # of these the ones that were drawn, by their names
    left_out: tuple[str, ...]  # images that could not be read
    parameters: int
    steps: int
    resolved: Mapping[str, Any]  # in plain values, as `result.json` keeps it


def start_of(experiment: Experiment, source: Source, work: Work, epoch: int) -> Start:
    """Return what a run begins with on a set, an epoch of which has so many steps."""
    unit = 1 if experiment.lr_by_epoch else epoch
    warmup = warmup_of(experiment, experiment.steps or experiment.epochs * unit, unit)
    return Start(
        command=command(),
        experiment=experiment,
        set=source.name,
        images=(len(source.train), len(source.validation)),
        held_out=getattr(source, "held_out", None) or (),
        left_out=source.left_out,
        parameters=sum(parameter.numel() for parameter in work.module.parameters()),
        steps=experiment.all_steps(epoch),
        resolved={
            **work.resolved(),
            "steps_per_epoch": epoch,
            "lr": highest_rate(experiment),
            "warmup_steps": warmup * epoch / unit,
        },
    )


def keep(folder: Path, start: Start, again: bool) -> str:
    """Write what a run begins with into its folder; returns the command that began it, which `again` may be another.

    Which images are held out, and which are left out, stands there by name, for people to read: a run that goes on
    takes it from its checkpoint.
    """
    path = folder / START
    first = _command_in(path) if again else None
    began = first or start.command
    lists = {"held_out": list(start.held_out), "left_out": list(start.left_out)}
    writing.write_json(path, {"command": began, "resolved": start.resolved, **lists})
    return began


def _command_in(path: Path) -> str | None:
    """Return the command that a folder keeps; None where it tells of none."""
    try:
        stored = reading.values(path, reading.RECORD)
    except (OSError, ValueError, RunError):  # of an older version, or damaged: it decides nothing
        return None
    told = stored.get("command") if isinstance(stored, dict) else None
    return told if isinstance(told, str) else None
