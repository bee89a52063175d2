"""What finished runs amount to: means over seeds, paired differences, gaps between tables. Numbers in, numbers out."""

import math
import statistics as descriptive
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from lape.names import SchemeNames
from lape.studies import inference
from lape.studies.inference import ERROR, FEWEST, Estimator, NoVerdict, student


class Way(NamedTuple):
    """A way of joining positions with tokens: the join, what normalises them (Table 8), and the start."""

    join: str
    pe_norm: str = "layernorm"
    start: str = "fresh"

    @property
    def other_than_usual(self) -> tuple[str, ...]:
        """The names of a stand-in for LN_ω, and of a start other than from nothing, where there are."""
        return tuple(name for name, usual in zip(self[1:], LAPE[1:], strict=True) if name != usual)

    def __str__(self) -> str:
        stand_in = "" if self.pe_norm == LAPE.pe_norm else f" with {self.pe_norm}"
        return f"{self.join}{stand_in}" + ("" if self.start == LAPE.start else f", {self.start}")


BASELINE, LAPE = Way("default"), Way("lape")

Side = tuple[Way, str]  # a way of joining with a table


class Point(NamedTuple):
    """One evaluation on the way: after `step` optimiser steps, the end of epoch `epoch`."""

    epoch: int
    step: int
    score: float  # percent


class Combination(NamedTuple):
    """What a comparison varies: the way of joining, the position embedding, the seed."""

    way: Way
    pe: str
    seed: int

    @property
    def names(self) -> SchemeNames:
        """What is asked of the model's positions."""
        return SchemeNames(self.way.join, self.pe, self.way.pe_norm, self.way.start)

    def __str__(self) -> str:
        return f"{self.way} × {self.pe}, seed {self.seed}"


class Chance(NamedTuple):
    """What a model scores that has learnt nothing."""

    score: float  # percent
    images: int | None  # of which the score is a share; None where it is none of images


@dataclass(frozen=True)
class FinishedRun:
    """One finished run, as far as a comparison looks at it."""

    combination: Combination
    measure: str  # what the score is: accuracy, box AP, mIoU
    score: float  # percent, after the last step
    curve: tuple[Point, ...]
    parameters: int
    seconds_per_step: float
    chance: Chance | None = None  # None where the run does not say what its set is

    @cached_property
    def learnt(self) -> bool:
        """Whether the score is above chance: the whole 95 % interval (Clopper and Pearson's) of a share of images."""
        if self.chance is None:
            return False
        if self.chance.images is None:
            return self.score > self.chance.score
        hits = round(self.score / 100 * self.chance.images)
        return 100 * inference.lowest_share(hits, self.chance.images) > self.chance.score

    def reaches(self, score: float) -> Point | None:
        """Return the first evaluation that is not below a score; None where there is none."""
        return next((point for point in self.curve if point.score >= score), None)

    @property
    def third(self) -> Point:
        """The evaluation nearest to one third of the steps, the earlier of two that are equally near."""
        return min(self.curve, key=lambda point: abs(3 * point.step - self.curve[-1].step))


@dataclass(frozen=True)
class Sample:
    """Mean, and standard deviation with n - 1 below the sum (None where n = 1)."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        """Summarise one value or more."""
        return cls(descriptive.fmean(values), descriptive.stdev(values) if len(values) > 1 else None, len(values))


class Verdict(Enum):
    """What an interval says of a difference."""

    ABOVE = "significant (95 % interval above 0)"
    BELOW = "significant (95 % interval below 0)"
    UNDECIDED = "not significant (95 % interval includes 0)"
    NONE = "no verdict"


@dataclass(frozen=True)
class Difference:
    """Score minus the baseline's, seed by seed, its mean and the 95 % interval of that, and what may be concluded."""

    by_seed: Mapping[int, float]
    unpaired: tuple[int, ...]  # seeds that only one of the two has
    mean: float
    interval: tuple[float, float] | None = None  # None where nothing can be estimated
    p: float | None = None  # two-sided, of a mean that is `bound`; None where there is no verdict
    p_holm: float | None = None  # the same with Holm's correction over a family (`corrected`)
    effect: float | None = None  # |mean - bound| in standard deviations of one seed's
    bound: float = 0.0  # what the difference is held against
    no_verdict: str | None = None  # why there is none

    @property
    def verdict(self) -> Verdict:
        """Which side of the bound the whole interval lies on, if any; an end that touches it decides nothing."""
        if self.interval is None or self.p is None:
            return Verdict.NONE
        low, high = self.interval
        return Verdict.ABOVE if low > self.bound else Verdict.BELOW if high < self.bound else Verdict.UNDECIDED

    @property
    def corrected(self) -> Verdict:
        """The verdict with Holm's correction: a significant one is undecided where p is not below 0.05 any more."""
        lost = self.p_holm is not None and self.p_holm >= ERROR
        return Verdict.UNDECIDED if lost and self.p is not None else self.verdict

    @property
    def seeds_to_decide(self) -> int | None:
        """The seeds that would decide what is undecided, four times in five, if mean and spread stay as they are.

        None for more than 1,000, and where nothing is undecided.
        """
        if self.verdict is not Verdict.UNDECIDED or self.effect is None:
            return None
        return inference.seeds_to_decide(self.effect)

    def without_verdict(self, reason: str) -> "Difference":
        """Return the same numbers, from which nothing is concluded."""
        return replace(self, p=None, p_holm=None, effect=None, no_verdict=reason)


ROUNDING = 1e-6  # of a score: differences that are no further apart than this are alike


def difference(
    scores: Mapping[int, float], baseline: Mapping[int, float], bound: float = 0.0, estimator: Estimator | None = None
) -> Difference | None:
    """Pair two sets of runs by seed, and return the mean difference with Student's 95 % interval.

    The interval is d̄ ± t(0.975, n-1)·s/√n of the n differences. There is no verdict, and `no_verdict` says why, where
    a number is not finite, for fewer than three pairs, and where all differences are alike.

    Args:
        scores: From seed to score.
        baseline: The same of what it is compared with.
        bound: What the difference is held against; the verdict says on which side of it the interval lies.
        estimator: Another interval than Student's, as Fisher's of correlations.

    Returns:
        The difference, with `mean`, `interval`, `p` and `verdict`; None where no seed is in both.

    Example:
        >>> from lape.studies.statistics import difference
        >>> found = difference({0: 95.0, 1: 95.5, 2: 94.9}, {0: 94.1, 1: 94.6, 2: 94.4})
        >>> print(f"{found.mean:.2f}, {found.interval[0]:.2f} to {found.interval[1]:.2f}, p = {found.p:.2f}")
        0.77, 0.19 to 1.34, p = 0.03
    """
    seeds = sorted(scores.keys() & baseline.keys())
    if not seeds:
        return None
    by_seed = {seed: scores[seed] - baseline[seed] for seed in seeds}
    values = list(by_seed.values())
    unpaired = tuple(sorted(scores.keys() ^ baseline.keys()))
    if missing := [seed for seed, value in by_seed.items() if not math.isfinite(value)]:
        return Difference(by_seed, unpaired, math.nan, no_verdict=f"no finite number for seed {missing[0]}")
    mean = descriptive.fmean(values)
    if len(values) < 2:
        return Difference(by_seed, unpaired, mean, no_verdict=_too_few(1))
    largest = max(abs(some[seed]) for some in (scores, baseline) for seed in seeds)
    if max(values) - min(values) <= ROUNDING * largest:
        values = [mean] * len(values)
    try:
        found = estimator(values) if estimator else student(values, bound)
    except NoVerdict as reason:
        return Difference(by_seed, unpaired, mean, no_verdict=str(reason))
    measured = Difference(by_seed, unpaired, found.mean, found.interval, found.p, effect=found.effect, bound=bound)
    return measured if len(values) >= FEWEST else measured.without_verdict(_too_few(len(values)))


def _too_few(pairs: int) -> str:
    return f"too few pairs of runs: {pairs}, of at least {FEWEST}"


def corrected(family: Sequence[Difference | None]) -> list[Difference | None]:
    """Return the differences of a family with Holm's correction of their p-values, those without one as they are."""
    places = [place for place, one in enumerate(family) if one is not None and one.p is not None]
    values = inference.holm([one.p for one in family if one is not None and one.p is not None])
    by_place = dict(zip(places, values, strict=True))
    return [one and replace(one, p_holm=by_place.get(place)) for place, one in enumerate(family)]


def doubt(runs: Iterable[FinishedRun]) -> str | None:
    """Return why nothing can be concluded from runs: one is at chance, or does not say what chance is."""
    doubtful = [run for run in runs if not run.learnt]
    if not doubtful:
        return None
    first, more = doubtful[0], f", and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
    if first.chance is None:
        return f"{first.combination} does not say how many classes and validation images its set has{more}"
    return f"at chance: {first.combination} ({first.score:.2f} %, guessing {first.chance.score:.2f} %){more}"


@dataclass(frozen=True)
class SummaryRow:
    """One way of joining with one table, over its seeds."""

    way: Way
    pe: str
    measure: str
    score: Sample
    third: Sample
    parameters: int
    seconds_per_step: float  # median over the runs
    difference: Difference | None  # to the baseline with the same positions; None for itself, or without a pair
    beside: Difference | None = None  # to the study's reference; None for itself, and where there is no pair
    reached: tuple[int | None, ...] = ()  # epochs, by seed, until what the baseline ends with; None for never


@dataclass(frozen=True)
class Gap:
    """How far apart the tables are under one way of joining: the best mean score minus the worst."""

    way: Way
    best: str
    worst: str
    points: float


USUAL_TABLE = "learnable"


def reference(pes: Iterable[str]) -> Side | None:
    """Return what positions of all kinds are held against: the baseline, with the learnable table or the first one.

    None for one kind alone.
    """
    kinds = list(dict.fromkeys(pes))
    return (BASELINE, USUAL_TABLE if USUAL_TABLE in kinds else kinds[0]) if len(kinds) > 1 else None


def rows(runs: Iterable[FinishedRun]) -> tuple[SummaryRow, ...]:
    """Summarise runs by way and table, in the order in which these first occur, tables outside, ways inside.

    The differences to the baselines are one family for Holm's correction, those to the reference another.
    """
    groups: dict[str, dict[Way, dict[int, FinishedRun]]] = {}
    for run in runs:
        groups.setdefault(run.combination.pe, {}).setdefault(run.combination.way, {})[run.combination.seed] = run
    against = reference(groups)
    held_against = groups[against[1]].get(BASELINE, {}) if against else {}
    return family(
        [
            SummaryRow(
                way,
                pe,
                measure=next(iter(members.values())).measure,
                score=Sample.of([run.score for run in members.values()]),
                third=Sample.of([run.third.score for run in members.values()]),
                parameters=next(iter(members.values())).parameters,
                seconds_per_step=descriptive.median(run.seconds_per_step for run in members.values()),
                difference=None if way == BASELINE else _between(members, ways.get(BASELINE, {})),
                beside=None if (way, pe) == against else _between(members, held_against),
                reached=_reached(members, ways.get(BASELINE, {})),
            )
            for pe, ways in groups.items()
            for way, members in ways.items()
        ]
    )


def family(rows: Sequence[SummaryRow]) -> tuple[SummaryRow, ...]:
    """Return rows with Holm's correction over all differences to baselines, and over all to the reference."""
    families = corrected([row.difference for row in rows]), corrected([row.beside for row in rows])
    both = zip(rows, *families, strict=True)
    return tuple(replace(row, difference=difference, beside=beside) for row, difference, beside in both)


def _reached(runs: Mapping[int, FinishedRun], others: Mapping[int, FinishedRun]) -> tuple[int | None, ...]:
    """Return for each seed that both have the epoch at which a run first is where the other one ends."""
    points = (run.reaches(others[seed].score) for seed, run in runs.items() if seed in others)
    return tuple(point and point.epoch for point in points)


def _between(runs: Mapping[int, FinishedRun], others: Mapping[int, FinishedRun]) -> Difference | None:
    scores, baseline = ({seed: run.score for seed, run in some.items()} for some in (runs, others))
    found = difference(scores, baseline)
    if found is None:
        return None
    reason = doubt(some[seed] for some in (runs, others) for seed in found.by_seed)
    return found if reason is None else found.without_verdict(reason)


def gaps(rows: Sequence[SummaryRow]) -> tuple[Gap, ...]:
    """Return, for each way of joining with two tables or more, the range of its mean scores over the tables."""
    spans = []
    for way in dict.fromkeys(row.way for row in rows):
        ranked = sorted((row for row in rows if row.way == way), key=lambda row: row.score.mean)
        if len(ranked) > 1:
            points = ranked[-1].score.mean - ranked[0].score.mean
            spans.append(Gap(way, best=ranked[-1].pe, worst=ranked[0].pe, points=points))
    return tuple(spans)
