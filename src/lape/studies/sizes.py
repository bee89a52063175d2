"""Finished runs judged on images of several sizes: each at each size once, and kept in the run's folder."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lape import __version__
from lape.data.sizes import Size, sizes_of
from lape.data.sources import Source, set_of
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import reading, writing
from lape.models.registry import Family, learns_from
from lape.studies.analysis import state_of_checkpoint
from lape.studies.study import Result, RunAtSizes, Study
from lape.training.checkpoints import LAST
from lape.training.evaluation import AtSize, LoadedRun, at_sizes, load_run, trained_size

KEPT = "sizes.json"  # in the folder of a run


def refuse_dense(experiment: Experiment) -> None:
    """Raise UsageError where the runs would see pictures of many sizes, before any of them is trained."""
    if learns_from(experiment.model) != Family.learns_from:
        raise UsageError(
            f"sizes are for classifiers, which see all images at one size; {experiment.model} takes pictures as large "
            "as they are. Leave out sizes."
        )


def judged_at(
    study: Study, sizes: Sequence[Size], experiment: Experiment, tell: Callable[[], None] = lambda: None
) -> Study:
    """Return the study with every run judged at sizes, on the set and the device of an experiment.

    A run is judged as its last score was taken: by the last weights, or their average. `tell` hears of every run that
    is done. What a run's folder keeps is computed again where its checkpoint has changed. A run that cannot be judged
    has the reason in place of its numbers, and costs no other run.
    """
    images = _Images(experiment)
    judged = {}
    for combination, result in study.results.items():
        judged[combination] = _of_run(result, sizes, images)
        tell()
    return replace(study, sizes=tuple(sizes), at_sizes=judged)


def with_kept(study: Study) -> Study:
    """Return the study with what the folders of its runs keep of other sizes; nothing is judged."""
    known = {one: _known(result) for one, result in study.results.items()}
    sizes = tuple(sorted({size for run in known.values() for size in run.by_size}))
    if not sizes:
        return study

    def at(run: RunAtSizes, size: Size) -> AtSize:
        return run.by_size.get(size) or AtSize(size, {}, f"It was not judged there: lape compare --sizes {size}.")

    judged = {one: RunAtSizes(run.trained, {size: at(run, size) for size in sizes}) for one, run in known.items()}
    return replace(study, sizes=sizes, at_sizes=judged)


def _known(result: Result) -> RunAtSizes:
    """Return what a run's folder keeps; where its checkpoint is gone, what was judged before stands."""
    gone = not (result.folder / LAST).exists()
    with suppress(RunError):
        return _kept(result.folder / KEPT, None if gone else state_of_checkpoint(result))
    return RunAtSizes(None, {})


class _Images:
    """The set of all runs, read when the first of them needs it."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.source: Source | None = None

    def __call__(self, _: Experiment, stored: Source) -> Source:
        self.source = self.source or set_of(self.experiment, download=False, stored=stored)
        return self.source

    def load(self, result: Result) -> LoadedRun:
        """Bring back a run with these images."""
        asked = self.experiment
        there = {"accelerator": asked.accelerator, "workers": asked.workers, "devices": 1, "nodes": 1}
        return load_run(result.folder / LAST, self, **there)


def _of_run(result: Result, sizes: Sequence[Size], images: _Images) -> RunAtSizes:
    known = _known(result)
    try:
        missing = [size for size in sizes if size not in known.by_size]
        if missing:
            state, run = state_of_checkpoint(result), images.load(result)
            for one in at_sizes(run, missing):
                known = RunAtSizes(trained_size(run), {**known.by_size, one.size: one})
                _keep(result.folder / KEPT, state, known)
    except (UsageError, RunError, OSError) as error:
        known = replace(known, by_size={**{size: AtSize(size, {}, str(error)) for size in sizes}, **known.by_size})
    return RunAtSizes(known.trained, {size: known.by_size[size] for size in sizes})


def _kept(path: Path, state: dict[str, Any] | None) -> RunAtSizes:
    """Return what a folder keeps of a run whose checkpoint is in this state, or gone; nothing where it is no record."""
    with suppress(RunError, UsageError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        content = reading.values(path, reading.RECORD)
        if state is None or content["checkpoint"] == state:
            (trained,), sizes = sizes_of([content["trained"]]), sizes_of(list(content["sizes"]))
            of_sizes = map(_back, sizes, content["sizes"].values())
            return RunAtSizes(trained, dict(zip(sizes, of_sizes, strict=True)))
    return RunAtSizes(None, {})


def _back(size: Size, entry: Any) -> AtSize:
    metrics = {str(name): float(value) for name, value in entry["metrics"].items()}
    refusal = entry["refusal"]
    if (refusal is None) != bool(metrics) or not isinstance(refusal, str | None):
        raise ValueError("a size has metrics, or a reason why not")
    if not all(map(math.isfinite, metrics.values())):
        raise ValueError("a metric is a number")
    return AtSize(size, metrics, refusal)


def _keep(path: Path, state: dict[str, Any], known: RunAtSizes) -> None:
    entries = {str(size): {"metrics": dict(one.metrics), "refusal": one.refusal} for size, one in known.by_size.items()}
    content = {writing.MARK: __version__, "checkpoint": state, "trained": str(known.trained), "sizes": entries}
    with suppress(RunError, UsageError, OSError):  # it is computed again the next time
        writing.write_marked({path: json.dumps(content, indent=1) + "\n"})
