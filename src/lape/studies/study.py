"""Finished runs that differ in way of joining, table and seed alone: read from their folders, and put together."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.data.sizes import Size
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import reading
from lape.files.characters import LONE, plural
from lape.names import SchemeNames
from lape.studies.statistics import (
    BASELINE,
    LAPE,
    Chance,
    Combination,
    FinishedRun,
    Gap,
    Point,
    Side,
    SummaryRow,
    Way,
    family,
    gaps,
    reference,
    rows,
)
from lape.tasks.measures import TITLES
from lape.training.checkpoints import RESULT
from lape.training.contents import PARTS

if TYPE_CHECKING:
    from lape.analysis import Shape
    from lape.training.evaluation import AtSize

LeftOut = Mapping[str, Sequence[tuple[Way, str]]]  # ways and tables, by the reason
Numbers = tuple[float, ...]  # (layers,)
VARIED = (*SchemeNames._fields, "seed")

# What a model scores that has learnt nothing, by the classes and the validation images of its set: by a guess, a share
# of images or pixels; by one class for every pixel, at best the one IoU that is not 0; without a box, no precision.
CHANCE: Mapping[str, Callable[[int, int], Chance]] = {
    "val_accuracy": lambda classes, images: Chance(100 / classes, images),
    "val_pixel_accuracy": lambda classes, images: Chance(100 / classes, None),
    "val_miou": lambda classes, images: Chance(100 / classes, None),
    "val_box_ap": lambda classes, images: Chance(0.0, None),
    "val_mask_ap": lambda classes, images: Chance(0.0, None),
}


@dataclass(frozen=True)
class Result:
    """A finished run: its numbers, its folder, and all that `result.json` says."""

    run: FinishedRun
    folder: Path
    record: Mapping[str, Any]

    @property
    def experiment(self) -> Experiment:
        """What was asked for."""
        return Experiment.of(self.record["experiment"])


def combination(experiment: Experiment) -> Combination:
    """Return what a comparison varies of an experiment."""
    way = Way(experiment.join, experiment.pe_norm, experiment.start)
    return Combination(way, experiment.pe, experiment.seed)


def read_result(folder: Path) -> Result:
    """Read the `result.json` of a finished run; raise RunError where it is not what a run writes."""
    path = folder / RESULT
    try:
        record = reading.values(path, reading.RECORD)
        if lone := LONE.search(json.dumps(record, ensure_ascii=False)):
            raise ValueError(f"{lone[0]!r} in it is no character")
        _refuse_odd_provenance(record)
        score = record["score"]
        run = FinishedRun(
            combination(Experiment.of(record["experiment"])),
            measure=TITLES[score],
            score=_finite(record["final"][score]),
            curve=tuple(
                Point(int(_finite(row["epoch"])), int(_finite(row["step"])), _finite(row[score]))
                for row in record["curve"]
            ),
            parameters=int(_finite(record["parameters"])),
            seconds_per_step=_finite(record["seconds_per_step"]),
            chance=_chance(record),
        )
        if not 0 <= run.score <= 100:
            raise ValueError(f"a score of {run.score} is no percentage")
        if not run.curve:
            raise ValueError("its curve has no point")
        for name, value in record["final"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"the final {name} is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RunError(
            f"{path} is not the result of a finished run ({type(error).__name__}: {error}). "
            "Move its folder away, and the same command trains this run again."
        ) from None
    return Result(run, folder, record)


def _refuse_odd_provenance(record: Mapping[str, Any]) -> None:
    """Raise ValueError where what is said of a run's origin is no text."""
    commit, versions, machine = ({**PROVENANCE, **record}[name] for name in PROVENANCE)
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise ValueError("its versions are no texts by name")
    for name, value in {"commit": commit or "", "machine": machine, "command": record.get("command", "")}.items():
        if not isinstance(value, str):
            raise ValueError(f"its {name} is no text")


def _chance(record: Mapping[str, Any]) -> Chance | None:
    """Return what guessing would score in a run's set; None for a run that does not say what is in it."""
    contents = record.get("contents")
    if contents is None:
        return None
    classes, *counts = contents["classes"], *(contents[part]["pictures"] for part in PARTS)
    if not isinstance(classes, list) or not classes or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError("its contents name no classes, or no images")
    images = counts[PARTS.index("validation")]
    return CHANCE[record["score"]](len(classes), images)


def _finite(number: Any) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is no score or time")
    return number


@dataclass(frozen=True)
class RunAnalysis:
    """What one trained model's attention is told of positions, layer by layer (see `lape.analysis`)."""

    width: int  # D
    two_dimensionality: Numbers
    half_distance: Numbers
    layer_difference: Numbers
    shape: "Shape"  # the three as one number each
    weights: tuple[Numbers, ...] | None  # λ1, λ2, λ3 (3, layers), where the join has them and its images were there


@dataclass(frozen=True)
class RunAtSizes:
    """What one trained model gets right on images of several sizes, with the same weights."""

    trained: Size | None  # that it was trained at; None where its checkpoint cannot be read
    by_size: "Mapping[Size, AtSize]"


@dataclass(frozen=True)
class Study:
    """Finished runs that differ in way of joining, table and seed alone, and what is known of how they came about."""

    results: Mapping[Combination, Result]  # tables outside, then ways, then seeds
    command: str
    failures: Mapping[Combination, Exception] = field(default_factory=dict)
    elsewhere: Mapping[Combination, Exception] = field(default_factory=dict)  # at work in other processes, and whose
    left_out: LeftOut = field(default_factory=dict)  # combinations of what was asked for that mean nothing
    images: tuple[int, int] | None = None  # for training, for validation
    jobs: int | None = None  # runs side by side, where one call trained all of them; None where that is not known
    analyses: Mapping[Combination, RunAnalysis] = field(default_factory=dict)
    not_analysed: LeftOut = field(default_factory=dict)
    sizes: tuple[Size, ...] = ()  # of images at which every run is judged, where that was asked for
    at_sizes: Mapping[Combination, RunAtSizes] = field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        """The settings of one of the runs."""
        return next(iter(self.results.values())).experiment

    @cached_property
    def asked(self) -> tuple[Combination, ...]:
        """The finished runs, the failed ones, and those that others work on."""
        return (*self.results, *self.failures, *self.elsewhere)

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways of joining."""
        return tuple(dict.fromkeys(one.way for one in self.asked))

    @property
    def pes(self) -> tuple[str, ...]:
        """The tables."""
        return tuple(dict.fromkeys(one.pe for one in self.asked))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(dict.fromkeys(one.seed for one in self.asked))

    @cached_property
    def rows(self) -> tuple[SummaryRow, ...]:
        """One row for each way and table of which a run is finished."""
        return rows(result.run for result in self.results.values())

    @property
    def reference(self) -> Side | None:
        """What positions of all kinds are held against; None for one kind alone."""
        return reference(one.pe for one in self.results)

    @property
    def compares_positions(self) -> bool:
        """Whether positions of several kinds are to be held against each other: some come with the baseline alone."""
        ways: dict[str, set[Way]] = {}
        for row in self.rows:
            ways.setdefault(row.pe, set()).add(row.way)
        return len(ways) > 1 and {BASELINE} in ways.values() and any(row.beside for row in self.rows)

    @cached_property
    def gaps(self) -> tuple[Gap, ...]:
        """The distance between the tables under each way of joining."""
        return gaps(self.rows)

    def rows_at(self, size: Size) -> tuple[SummaryRow, ...]:
        """Return the rows of those runs that take images of a size; `score` and `difference` are of these images.

        The differences at all sizes are one family for Holm's correction.
        """
        return self._rows_by_size[size]

    @cached_property
    def _rows_by_size(self) -> Mapping[Size, tuple[SummaryRow, ...]]:
        by_size = {
            size: rows(
                replace(result.run, score=self.at_sizes[one].by_size[size].metrics[result.record["score"]])
                for one, result in self.results.items()
                if self.at_sizes[one].by_size[size].refusal is None
            )
            for size in self.sizes
        }
        together = iter(family([row for some in by_size.values() for row in some]))
        return {size: tuple(next(together) for _ in some) for size, some in by_size.items()}

    def refused_at(self, size: Size) -> LeftOut:
        """Return the ways and tables of which a run does not take images of a size, by the reason."""
        reasons: dict[str, dict[tuple[Way, str], None]] = {}
        for one, judged in self.at_sizes.items():
            if (refusal := judged.by_size[size].refusal) is not None:
                reasons.setdefault(refusal, {})[one.way, one.pe] = None
        return {reason: tuple(pairs) for reason, pairs in reasons.items()}

    @property
    def trained(self) -> frozenset[Size]:
        """The sizes of images that the runs were trained at, as far as they were judged at sizes."""
        return frozenset(judged.trained for judged in self.at_sizes.values() if judged.trained is not None)

    @property
    def contents(self) -> Any:
        """What was in the set, as the runs tell it (`lape.training.contents`); None where they do not."""
        return next(iter(self.results.values())).record.get("contents")

    @property
    def measure(self) -> str:
        """What the runs are scored by."""
        return self.rows[0].measure

    @cached_property
    def _groups(self) -> Mapping[tuple[Way, str], dict[int, Result]]:
        groups: dict[tuple[Way, str], dict[int, Result]] = {}
        for one, result in self.results.items():
            groups.setdefault((one.way, one.pe), {})[one.seed] = result
        return groups

    def of(self, way: Way, pe: str) -> Mapping[int, Result]:
        """Return the finished runs of one way with one table, by seed."""
        return self._groups.get((way, pe), {})

    def provenances(self) -> list[dict[str, Any]]:
        """Return the distinct commits, versions and machines of the runs: more than one where runs were kept."""
        records = [
            {key: result.record.get(key, usual) for key, usual in PROVENANCE.items()}
            for result in self.results.values()
        ]
        return [record for place, record in enumerate(records) if record not in records[:place]]

    def raise_missing(self) -> None:
        """Raise one error for all failed runs: UsageError where every one of them was a wrong request, else RunError.

        Where none has failed, raise RunError for those that others work on.
        """
        if self.failures:
            reasons = " ".join(f"{combination}: {error}" for combination, error in self.failures.items())
            usage = all(isinstance(error, UsageError) for error in self.failures.values())
            raise (UsageError if usage else RunError)(
                f"{len(self.failures)} of {plural(len(self.asked), 'run')} failed. {reasons}"
            )
        for combination, error in self.elsewhere.items():
            raise RunError(
                f"{len(self.elsewhere)} of {plural(len(self.asked), 'run')} are not finished, and others work on them: "
                f"the same command puts them on the page later. The first: {combination}. {error}"
            )


PROVENANCE: Mapping[str, Any] = {"commit": None, "versions": {}, "machine": "an unknown machine"}


@dataclass(frozen=True)
class Gathered:
    """What lies below some folders: studies, and for each run that is in none of them why."""

    studies: tuple[Study, ...]
    left_out: Mapping[Path, str]


def result_files(folders: Iterable[Path]) -> list[Path]:
    """Return every `result.json` below the folders; raises UsageError where there is none."""
    folders = list(folders)
    results = sorted({file for folder in folders for file in folder.rglob(RESULT)})
    if not results:
        looked = ", ".join(map(str, folders))
        raise UsageError(f"No finished run ({RESULT}) below {looked}. Train one, or name the folder of your runs.")
    return results


def gather(folders: Iterable[Path]) -> Gathered:
    """Put every `result.json` below the folders into the study that it belongs to.

    Runs that went on from others, each from its own like (`lape train --weights RUN --img_size ...`), are one study.
    One that cannot be read, names what there is not (a recipe that has moved), or is there twice is left out, and
    said. Raises UsageError where there is none.
    """
    groups: dict[str, dict[Combination, Result]] = {}
    left_out: dict[Path, str] = {}
    read: dict[Path, Result] = {}
    for file in result_files(folders):
        try:
            result = read_result(file.parent)
            _sound(result)
            read[Path(os.path.abspath(file.parent))] = result
        except (RunError, UsageError) as error:
            left_out[file.parent] = str(error)
    for result in read.values():
        common = _common(result)
        before = read.get(_of_checkpoint(result.experiment.weights))
        if before is not None and before.run.combination == result.run.combination:
            common["weights"] = _common(before)
        group = groups.setdefault(json.dumps(common, sort_keys=True), {})
        first = group.setdefault(result.run.combination, result)
        if first is not result:
            left_out[result.folder] = f"{result.run.combination} is there twice; {first.folder} stands for both."
    return Gathered(tuple(map(_study, groups.values())), left_out)


def _common(result: Result) -> dict[str, Any]:
    """Return what runs of one study have in common."""
    common = {name: value for name, value in result.experiment.identity().items() if name not in VARIED}
    common["contents"] = result.record.get("contents")  # of one name, what is in a set may have changed
    return common


def _of_checkpoint(weights: str | None) -> Path:
    """Return the folder of the run that weights are a checkpoint of, where they are one."""
    path = Path(os.path.abspath(weights or "none"))
    return path.parent if path.suffix == ".pt" else path


def _sound(result: Result) -> None:
    from lape import recipes
    from lape.method import scheme

    one, recipe = result.run.combination, result.experiment.recipe
    if recipe is not None:
        recipes.load(recipe)
    scheme(*one.names)  # pyright: ignore[reportArgumentType]  # a run names its pe


def _study(results: Mapping[Combination, Result]) -> Study:
    from lape.embeddings.sums import place as place_of_embedding
    from lape.method import JOINS, POSITION_NORMS, STARTS

    joins, norms, starts = map(list, (JOINS, POSITION_NORMS, STARTS))
    norms = [LAPE.pe_norm, *norms]

    def place(one: Combination) -> tuple[list[int] | int, ...]:
        way = one.way
        return (
            place_of_embedding(one.pe),
            starts.index(way.start),
            norms.index(way.pe_norm),
            joins.index(way.join),
            one.seed,
        )

    commands = dict.fromkeys(str(result.record.get("command", "")) for result in results.values())
    return Study({one: results[one] for one in sorted(results, key=place)}, "\n".join(filter(None, commands)))
