"""The checkpoints of a run, and what stands beside them in its folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import reading, writing
from lape.training.contents import differences
from lape.training.curves import CSV, TENSORBOARD
from lape.weights import opened

LAST, BEST = "last.pt", "best.pt"
START = "start.json"  # what a run begins with (`lape.training.start`)
SETTINGS, RESULT, BROKEN_BATCH = "experiment.json", "result.json", "broken-batch.json"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values."""
    writing.write(path, lambda file: torch.save(dict(state), file))


def read(path: Path) -> dict[str, Any]:
    """Return what `save` wrote, on the CPU; raises RunError naming a file that is something else, or carries code."""
    state = opened(path)
    if not isinstance(state, dict) or not {"experiment", "set", "model"} <= state.keys():
        raise RunError(
            f"{path} is no checkpoint of a training run of this version: it names no experiment or no set. Give one of "
            "lape train's."
        )
    experiment_of(state["experiment"], path)
    for weights in (state["model"], state.get("ema") or {}):
        if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise RunError(f"{path} is no checkpoint of a training run: its weights are no tensors. Give another.")
    return state


def experiment_of(stored: Any, path: Path) -> Experiment:
    """Return the experiment that a file tells of; raises RunError, naming the file, where it tells of none."""
    try:
        return Experiment.of(stored)
    except UsageError as error:
        raise RunError(f"{path} names settings that this version does not know ({error}). Move it away.") from error


def kept_settings(path: Path) -> Any:
    """Return what a run wrote of its settings; raises RunError, naming the file, where that is none."""
    try:
        stored = reading.values(path, reading.SETTINGS)
    except ValueError as error:
        raise RunError(f"{path} cannot be read as JSON ({error}). Give another --out.") from error
    experiment_of(stored, path)
    return stored


def refuse_other(path: Path, stored: Any, asked: Experiment) -> None:
    """Raise UsageError where a file belongs to another experiment, saying in what they differ."""
    mine = asked.identity()
    known = {name: value for name, value in stored.items() if name in mine} if isinstance(stored, dict) else stored
    theirs = experiment_of(known, path).identity()
    if different := [
        f"{name} is {theirs[name]} there, {mine[name]} here" for name in mine if mine[name] != theirs[name]
    ]:
        raise UsageError(
            f"{path} belongs to another experiment ({'; '.join(different)}). Ask for the same, or give another --out."
        )


def refuse_other_data(path: Path, stored: Mapping[str, Any], here: Mapping[str, Any], asked: Experiment) -> None:
    """Raise UsageError where a file tells of a run whose set was not what is `here` now, saying in what they differ."""
    if different := differences(stored.get("contents"), here):
        before = experiment_of(stored["experiment"], path).data_dir
        moved = f"; data_dir was {before} and is {asked.data_dir}" if before != asked.data_dir else ""
        raise UsageError(
            f"{path} was made from other data than {asked.data} holds now: {'; '.join(different)}{moved}. Bring them "
            "back, or give another --out."
        )


def claim(folder: Path, asked: Experiment, resume: bool) -> None:
    """See that a run folder is free for `asked`, or holds it and may be gone on with; raises UsageError otherwise."""
    settings = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, and a run needs a folder. Give another --out.")
    if not settings.exists():
        names = (LAST, BEST, RESULT, START, BROKEN_BATCH, CSV, TENSORBOARD)
        if there := [name for name in names if os.path.lexists(folder / name)]:
            raise UsageError(
                f"A run would replace {', '.join(there)} in {folder}, and without {SETTINGS} there they are of no run. "
                "Give another --out."
            )
        return
    writing.refuse_links(folder, folder / TENSORBOARD)
    refuse_other(settings, kept_settings(settings), asked)
    if not resume:
        state = "a finished" if (folder / RESULT).exists() else "an unfinished"
        raise UsageError(f"{folder} holds {state} run of this experiment. Add --resume to go on, or another --out.")
