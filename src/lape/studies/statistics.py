"""What finished runs amount to: means over seeds, paired differences, gaps between tables. Numbers in, numbers out."""

import math
import statistics as descriptive
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


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


class Point(NamedTuple):
    """One evaluation on the way: after `step` optimiser steps, the end of epoch `epoch`."""

    epoch: int
    step: int
    score: float  # percent


class Combination(NamedTuple):
    """What a comparison varies: the way of joining, the position table, the seed."""

    way: Way
    pe: str
    seed: int

    def __str__(self) -> str:
        return f"{self.way} × {self.pe}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """One finished run, as far as a comparison looks at it."""

    combination: Combination
    measure: str  # what the score is: accuracy, box AP, mIoU
    score: float  # percent, after the last step
    curve: tuple[Point, ...]
    parameters: int
    seconds_per_step: float

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
    """What an interval says of a difference; the value completes "the difference is ..."."""

    ABOVE = "above zero"
    BELOW = "below zero"
    UNDECIDED = "not told from zero"
    ONE_PAIR = "from one pair of runs, which gives no interval"


@dataclass(frozen=True)
class Difference:
    """Score minus the baseline's, seed by seed, and Student's 95 % interval of its mean (None with one pair)."""

    by_seed: Mapping[int, float]
    unpaired: tuple[int, ...]  # seeds that only one of the two has
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> Verdict:
        """Which side of zero the whole interval lies on, if any; an end that touches zero decides nothing."""
        if self.interval is None:
            return Verdict.ONE_PAIR
        low, high = self.interval
        return Verdict.ABOVE if low > 0 else Verdict.BELOW if high < 0 else Verdict.UNDECIDED


def difference(scores: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Pair two sets of runs by seed, and return the mean difference with Student's 95 % interval.

    The interval is d̄ ± t(0.975, n-1)·s/√n of the n differences.

    Args:
        scores: From seed to score.
        baseline: The same of what it is compared with.

    Returns:
        The difference, with `mean`, `interval` and `verdict`; None where no seed is in both.

    Example:
        >>> from lape.studies.statistics import difference
        >>> found = difference({0: 95.0, 1: 95.5, 2: 94.9}, {0: 94.1, 1: 94.6, 2: 94.4})
        >>> print(f"{found.mean:.2f}, {found.interval[0]:.2f} to {found.interval[1]:.2f}")
        0.77, 0.19 to 1.34
    """
    from scipy.stats import t

    by_seed = {seed: scores[seed] - baseline[seed] for seed in sorted(scores.keys() & baseline.keys())}
    if not by_seed:
        return None
    sample = Sample.of(list(by_seed.values()))
    interval = None
    if sample.std is not None:
        half = float(t.ppf(0.975, sample.count - 1)) * sample.std / math.sqrt(sample.count)
        interval = (sample.mean - half, sample.mean + half)
    return Difference(by_seed, tuple(sorted(scores.keys() ^ baseline.keys())), sample.mean, interval)


@dataclass(frozen=True)
class Row:
    """One way of joining with one table, over its seeds."""

    way: Way
    pe: str
    measure: str
    score: Sample
    third: Sample
    parameters: int
    seconds_per_step: float  # median over the runs
    difference: Difference | None  # to the baseline with the same table; None for itself, and where there is no pair


@dataclass(frozen=True)
class Gap:
    """How far apart the tables are under one way of joining: the best mean score minus the worst."""

    way: Way
    best: str
    worst: str
    points: float


def rows(runs: Iterable[Run]) -> tuple[Row, ...]:
    """Summarise runs by way and table, in the order in which these first occur, tables outside, ways inside."""
    groups: dict[str, dict[Way, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.combination.pe, {}).setdefault(run.combination.way, []).append(run)
    return tuple(
        Row(
            way,
            pe,
            measure=members[0].measure,
            score=Sample.of([run.score for run in members]),
            third=Sample.of([run.third.score for run in members]),
            parameters=members[0].parameters,
            seconds_per_step=descriptive.median(run.seconds_per_step for run in members),
            difference=None if way == BASELINE else difference(_by_seed(members), _by_seed(ways.get(BASELINE, []))),
        )
        for pe, ways in groups.items()
        for way, members in ways.items()
    )


def _by_seed(runs: Iterable[Run]) -> dict[int, float]:
    return {run.combination.seed: run.score for run in runs}


def gaps(rows: Sequence[Row]) -> tuple[Gap, ...]:
    """Return, for each way of joining with two tables or more, the range of its mean scores over the tables."""
    found = []
    for way in dict.fromkeys(row.way for row in rows):
        own = sorted((row for row in rows if row.way == way), key=lambda row: row.score.mean)
        if len(own) > 1:
            points = own[-1].score.mean - own[0].score.mean
            found.append(Gap(way, best=own[-1].pe, worst=own[0].pe, points=points))
    return tuple(found)
