"""The analysis of finished runs in numbers: computed once for each, and kept beside the page that shows them."""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lape import __version__
from lape.analysis import Correlation, Shape, correlation, decomposition
from lape.data.sources import Source, set_of
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import reading, writing
from lape.studies.statistics import Combination, Way
from lape.studies.study import Numbers, Result, RunAnalysis, Study
from lape.surgery.operation import positions
from lape.training.checkpoints import LAST
from lape.training.evaluation import LoadedRun, load_run

IMAGES = 64  # of the validation set, drawn once and for all, for the decomposition


def load_result(
    result: Result, source_of: Callable[[Experiment, Source], Source] = lambda _, stored: stored
) -> LoadedRun:
    """Bring back the model of a finished run as its last score was taken: the weights, or their average (EMA)."""
    return load_run(result.folder / LAST, source_of, accelerator="cpu", devices=1, nodes=1)


def correlation_of(result: Result) -> Correlation:
    """Return the position correlation of a finished run's model; raises UsageError where it is not defined."""
    return correlation(load_result(result).work.module)


def analysed(study: Study, kept: "Kept", tell: Callable[[], None] = lambda: None) -> Study:
    """Return the study with the analysis of each run; `tell` hears of every run that is done.

    What is kept is computed again where its checkpoint has changed; where that is gone it stands. What cannot be
    analysed is in `not_analysed`, with the reason, and costs nothing else.
    """
    analyses: dict[Any, RunAnalysis] = {}
    reasons: dict[str, dict[tuple[Way, str], None]] = {}
    images = _Images()
    for combination, result in study.results.items():
        try:
            analyses[combination] = analysis = kept.of(result) or kept.keep(result, _analysis(result))
            if analysis.weights is None and _meets_tokens(combination):
                analyses[combination] = kept.keep(result, replace(analysis, weights=_weights(result, images)))
        except (UsageError, RunError, OSError) as error:  # a name in settings may be none for the disk
            reasons.setdefault(str(error), {})[combination.way, combination.pe] = None
        tell()
    return replace(study, analyses=analyses, not_analysed={why: tuple(some) for why, some in reasons.items()})


def _meets_tokens(combination: Combination) -> bool:
    """Say whether a table and tokens go through one norm, which equation 6 takes apart."""
    from lape.method import scheme

    asked = scheme(*combination.names)  # pyright: ignore[reportArgumentType]  # a run names its pe
    return asked.embedding.table is not None and not asked.join.normed


def _analysis(result: Result) -> RunAnalysis:
    model = load_result(result).work.module
    correlations = correlation(model)
    two_dimensionality, half_distance, layer_difference = map(
        _numbers, (correlations.two_dimensionality, correlations.half_distance, correlations.layer_difference)
    )
    width = positions(model).width
    return RunAnalysis(width, two_dimensionality, half_distance, layer_difference, correlations.shape, None)


class _Images:
    """The images of one study's set, read once; or why there are none."""

    def __init__(self) -> None:
        self.source: Source | None = None
        self.missing: UsageError | RunError | None = None

    def __call__(self, experiment: Experiment, stored: Source) -> Source:
        if self.missing is not None:
            raise self.missing
        try:
            self.source = self.source or set_of(experiment, download=False, stored=stored)
        except (UsageError, RunError) as error:
            self.missing = RunError(f"The decomposition needs images of {experiment.data}. {error}")
            raise self.missing from None
        return self.source


def _weights(result: Result, source_of: Callable[[Experiment, Source], Source]) -> tuple[Numbers, ...]:
    work = load_result(result, source_of).work
    if not work.one_size:
        raise UsageError("The decomposition takes images of one size, as classifiers do.")
    count = min(IMAGES, len(work.source.validation))
    model, images = work.transformer_images(count, IMAGES)
    return tuple(map(_numbers, decomposition(model, list(images)).mean))


def _numbers(values: Tensor) -> Numbers:
    return tuple(values.tolist())


def state_of_checkpoint(result: Result) -> dict[str, Any]:
    """Return what is known of a run's checkpoint without reading it; raises RunError where there is none."""
    path = result.folder / LAST
    try:
        seen = path.stat()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); without it the model cannot be looked at.") from None
    return {"lape": __version__, "bytes": seen.st_size, "changed": seen.st_mtime_ns}


class Kept:
    """The analyses of a page, in `NAME.analysis.json` beside it: the runs' own folders are only read.

    Raises UsageError where another's file has that name.
    """

    def __init__(self, page: Path) -> None:
        self.path = page.with_suffix(".analysis.json")
        self.entries: dict[str, Any] = {}
        writing.refuse_others([self.path])
        with suppress(RunError, OSError, ValueError, KeyError, TypeError):  # then all are computed
            self.entries.update(reading.values(self.path, reading.RECORD)["analyses"])

    def of(self, result: Result) -> RunAnalysis | None:
        """Return the analysis of a run, unless its checkpoint is another than it was; None where there is none."""
        try:
            entry = self.entries[self._name(result)]
            there = (result.folder / LAST).exists()  # where it was removed, what was computed before stands
            if there and entry["checkpoint"] != state_of_checkpoint(result):
                return None
            lists = {name: _back(entry[name]) for name in ("two_dimensionality", "half_distance", "layer_difference")}
            shape = Shape(**{name: float(value) for name, value in entry["shape"].items()})
            weights = None if entry["weights"] is None else tuple(map(_back, entry["weights"]))
            return RunAnalysis(int(entry["width"]), shape=shape, weights=weights, **lists)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    def keep(self, result: Result, analysis: RunAnalysis) -> RunAnalysis:
        """Note the analysis of a run, where the disk allows it, and return it."""
        self.entries[self._name(result)] = _plain({"checkpoint": state_of_checkpoint(result), **asdict(analysis)})
        text = json.dumps({writing.MARK: __version__, "analyses": self.entries}, indent=1) + "\n"
        with suppress(RunError, OSError):  # it is computed again the next time
            writing.write_marked({self.path: text})
        return analysis

    def _name(self, result: Result) -> str:
        return os.path.relpath(result.folder / LAST, self.path.parent)  # both may be moved together


def _plain(value: Any) -> Any:
    """Write inf and nan as words, which JSON has no numbers for; `float` reads them."""
    if isinstance(value, dict):
        return {name: _plain(some) for name, some in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(some) for some in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _back(values: Sequence[Any]) -> Numbers:
    return tuple(map(float, values))
