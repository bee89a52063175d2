"""The checkpoints of a run, and what stands beside them in its folder."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import reading, writing
from lape.training.contents import differences
from lape.weights import opened

LAST, BEST = "last.pt", "best.pt"
START = "start.json"  # what a run begins with (`lape.training.start`)
SETTINGS, RESULT, BROKEN_BATCH = "experiment.json", "result.json", "broken-batch.json"
TO_GO_ON = ("optimizer", "precision")  # parts of a checkpoint


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


def other_settings(theirs: Experiment, mine: Experiment, but: Collection[str] = ()) -> list[str]:
    """Say in which settings two experiments differ, apart from those in `but`; nothing where in none."""
    there, here = theirs.identity(), mine.identity()
    return [
        f"{name} is {there[name]} there, {here[name]} here"
        for name in here
        if there[name] != here[name] and name not in but
    ]


def refuse_other(path: Path, stored: Any, asked: Experiment, but: Collection[str] = ()) -> None:
    """Raise UsageError where a file belongs to another experiment, saying in what they differ; `but` may differ."""
    known = asked.identity().keys()
    kept = {name: value for name, value in stored.items() if name in known} if isinstance(stored, dict) else stored
    if different := other_settings(experiment_of(kept, path), asked, but):
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


def keep_for_evaluation(path: Path) -> None:
    """Leave out of a finished run's checkpoint what it takes to go on: the optimiser's numbers, twice the weights."""
    state = read(path)
    save(path, {name: value for name, value in state.items() if name not in TO_GO_ON})
