"""Programs of others that are told of a run as it goes, where one is asked for: Weights & Biases, MLflow."""

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from time import time
from typing import TYPE_CHECKING, Any, ClassVar

from lape.errors import RunError, UsageError, choose, first_line
from lape.experiment import Experiment
from lape.extras import require
from lape.files import reading, writing
from lape.files.characters import visible
from lape.training.curves import CurveRow

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRACKED = "tracker.json"  # in the run's folder: under which number trackers know the run
PROJECT = "lape"  # unless the tracker's own variable names another
MOST_AT_ONCE = 100  # parameters that MLflow takes in one call

Numbers = Mapping[str, float]
Tell = Callable[[CurveRow], None]


@dataclass(frozen=True)
class Beginning:
    """What a tracker is told of a run first."""

    number: str  # of the run, the same when it goes on
    name: str
    settings: Mapping[str, Any]
    folder: Path


class Tracker(ABC):
    """One such program. Each method may raise what its package raises."""

    package: ClassVar[str]

    @abstractmethod
    def begin(self, run: Beginning) -> int:
        """Begin the run, or go on with it; returns the last step that is known of it already, -1 where none is."""

    @abstractmethod
    def add(self, step: int, numbers: Numbers) -> None:
        """Tell of the numbers after a step."""

    @abstractmethod
    def end(self, finished: bool) -> None:
        """End the run, finished or not."""


class WeightsAndBiases(Tracker):
    """Weights & Biases, with the account and the mode of its own variables (WANDB_API_KEY, WANDB_MODE=offline)."""

    package = "wandb"

    def begin(self, run: Beginning) -> int:
        """Begin the run; what wandb itself writes is in the run's folder."""
        import wandb  # pyright: ignore[reportMissingImports]

        writing.make_folder(run.folder / "wandb", below=run.folder)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run.folder),
            id=run.number,
            resume="allow",
            name=run.name,
            config=dict(run.settings),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        return self.run.step - 1  # the next one

    def add(self, step: int, numbers: Numbers) -> None:
        """Tell of the numbers; they are sent by wandb's own process."""
        self.run.log(dict(numbers), step=step)

    def end(self, finished: bool) -> None:
        """Wait until all is sent."""
        self.run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
    """MLflow, with the server or folder of its own variable (MLFLOW_TRACKING_URI)."""

    package = "mlflow"

    def begin(self, run: Beginning) -> int:
        """Look the run up by its number, or begin it with all settings as parameters."""
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client: Any = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = self.client.get_experiment_by_name(name)
        place = there.experiment_id if there else self.client.create_experiment(name)
        if before := self.client.search_runs([place], f"tags.`lape.run` = '{run.number}'"):
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return max((point.step for point in self.client.get_metric_history(self.id, "epoch")), default=-1)
        self.id = self.client.create_run(place, tags={"lape.run": run.number}, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)) for key, value in run.settings.items()]
        for first in range(0, len(parameters), MOST_AT_ONCE):
            self.client.log_batch(self.id, params=parameters[first : first + MOST_AT_ONCE])
        return -1

    def add(self, step: int, numbers: Numbers) -> None:
        """Tell of the numbers, and wait until they are there."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def end(self, finished: bool) -> None:
        """Say how the run ended."""
        self.client.set_terminated(self.id, "FINISHED" if finished else "FAILED")


TRACKERS: Mapping[str, type[Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def tracker_of(name: str | None) -> Tracker | None:
    """Return a tracker by its name; raises UsageError for one that there is not, RunError without its package."""
    if name is None:
        return None
    tracker = choose(TRACKERS, name, "a tracker")
    require(f"--tracker {name}", tracker.package)
    return tracker()


@contextmanager
def tracking(
    tracker: Tracker | None, folder: Path, experiment: Experiment, curve: list[dict[str, Any]], fabric: "Fabric"
) -> Iterator[Tell]:
    """Tell a tracker of a run, by the first process alone; yields what tells it of one more row of the curve.

    It is told of those rows of `curve` that it does not know. Raises RunError where it does not begin; where it fails
    later, that is said once, and the run goes on without it.
    """
    if tracker is None:
        yield lambda row: None
        return
    telling: _Telling | None = None
    trouble: UsageError | RunError | None = None
    if fabric.is_global_zero:
        try:
            telling = _Telling(tracker, folder, experiment)
        except (UsageError, RunError) as error:
            trouble = error
    if fabric.broadcast(trouble is not None):
        raise trouble or SystemExit(1)  # one process tells
    if telling is None:
        yield lambda row: None
        return
    for row in curve:
        telling(row)
    try:
        yield telling
    except BaseException:
        telling.end(finished=False)
        raise
    telling.end(finished=True)


class _Telling:
    """A tracker at work; it is dropped where it fails."""

    def __init__(self, tracker: Tracker, folder: Path, experiment: Experiment) -> None:
        name = visible(folder.resolve().name)
        kept = folder / TRACKED
        number = _number(kept) if os.path.lexists(kept) else token_hex(16)
        run = Beginning(number, name, experiment.settings(), folder)
        try:
            self.known = tracker.begin(run)
        except (UsageError, RunError):
            raise
        except Exception as error:
            raise RunError(
                f"{tracker.package} does not begin ({first_line(error)}). Mend that, or leave out --tracker; nothing "
                "of the run is lost."
            ) from error
        self.tracker: Tracker | None = tracker
        writing.write_json(kept, {"run": number})

    def __call__(self, row: CurveRow) -> None:
        step = int(row["step"])
        if step > self.known:
            self._try(lambda tracker: tracker.add(step, {name: row[name] for name in row if name != "step"}))

    def end(self, finished: bool) -> None:
        self._try(lambda tracker: tracker.end(finished))

    def _try(self, tell: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            tell(self.tracker)
        except Exception as error:
            failed, self.tracker = self.tracker, None
            with suppress(Exception):
                failed.end(finished=False)
            warnings.warn(
                f"{failed.package} takes nothing more of this run ({first_line(error)}). The run goes on, and all "
                "numbers are in its curve.csv.",
                stacklevel=1,
            )


def _number(path: Path) -> str:
    """Return the number under which trackers know a run; raises RunError where it is none of ours."""
    try:
        number = reading.values(path, reading.RECORD)["run"]
        if not re.fullmatch("[0-9a-f]{32}", number):
            raise ValueError(f"{number!r} is none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} holds no number of a run ({first_line(error)}). Remove it, and the tracker begins a new one."
        ) from None
    return number
