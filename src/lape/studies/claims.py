"""The paper's claims as data: a sentence, where it stands, and what of a study it is measured by.

A claim compares two series of numbers, seed by seed. It holds where Student's 95 % interval of the mean difference lies
wholly on its side of zero, does not hold where it lies wholly on the other, and is undecided in between.
"""

import math
import statistics as descriptive
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from lape.studies.statistics import BASELINE, LAPE, Difference, Verdict, Way, difference
from lape.studies.study import Result, Study

if TYPE_CHECKING:
    from lape.studies.study import RunAnalysis

BySeed = Mapping[int, float]
Series = Callable[[Study], BySeed]  # one number for each seed that has one


class Outcome(Enum):
    """What runs say of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"
    UNTESTED = "not tested"


# --- Series -------------------------------------------------------------------------------------------------------


def of_runs(way: Way, pe: str, number: Callable[[Result], float]) -> Series:
    """A number of each run of one way with one table."""
    return lambda study: {seed: number(result) for seed, result in study.of(way, pe).items()}


def of_models(way: Way, pe: str, number: "Callable[[RunAnalysis], float | None]") -> Series:
    """A number of each trained model of one way with one table, where it has one."""

    def series(study: Study) -> BySeed:
        by_seed = {
            one.seed: number(analysis) for one, analysis in study.analyses.items() if (one.way, one.pe) == (way, pe)
        }
        return {seed: value for seed, value in by_seed.items() if value is not None and not math.isnan(value)}

    return series


def together(function: Callable[..., float], *series: Series) -> Series:
    """A function of several series, for the seeds that all of them have."""

    def of(study: Study) -> BySeed:
        by_series = [each(study) for each in series]
        return {
            seed: function(*(each[seed] for each in by_series))
            for seed in by_series[0]
            if all(seed in f for f in by_series)
        }

    return of


def zero(series: Series) -> Series:
    """0 for each seed of a series: what is compared with it is compared with zero."""
    return lambda study: dict.fromkeys(series(study), 0.0)


def score(way: Way, pe: str) -> Series:
    """The score after the last step."""
    return of_runs(way, pe, lambda result: result.run.score)


def third(way: Way, pe: str) -> Series:
    """The score at one third of training."""
    return of_runs(way, pe, lambda result: result.run.third.score)


def mean(*series: Series) -> Series:
    """The mean of several series."""
    return together(lambda *values: descriptive.fmean(values), *series)


def apart(one: Series, other: Series) -> Series:
    """How far two series lie apart: |a - b|."""
    return together(lambda a, b: abs(a - b), one, other)


def with_depth(values: Sequence[float]) -> float | None:
    """Return the rank correlation (Spearman's) of values with their layer, 0 where all values are alike.

    Ties share ranks, inf ranks last; None for fewer than two layers, and where a value is missing (nan).
    """
    from scipy.stats import rankdata

    if len(values) < 2 or any(map(math.isnan, values)):
        return None
    ranks = rankdata(values).tolist()
    return 0.0 if len(set(ranks)) == 1 else descriptive.correlation(ranks, range(len(ranks)))


def surplus(study: Study) -> BySeed:
    """Parameters that LaPE adds to the default join, less 2·D a layer: what that misses by, over all tables."""
    missing: dict[int, float] = {}
    for pe in study.pes:
        usual, lape = study.of(BASELINE, pe), study.of(LAPE, pe)
        added = of_models(LAPE, pe, lambda analysis: 2 * analysis.width * len(analysis.half_distance))(study)
        for seed in usual.keys() & added.keys():
            missed = lape[seed].run.parameters - usual[seed].run.parameters - added[seed]
            missing[seed] = missing.get(seed, 0.0) + abs(missed)
    return missing


# --- Claims -------------------------------------------------------------------------------------------------------


def above(difference: Difference) -> Outcome:
    """Whether the difference is above zero."""
    return {Verdict.ABOVE: Outcome.HOLDS, Verdict.BELOW: Outcome.FAILS}.get(difference.verdict, Outcome.UNDECIDED)


def not_below(difference: Difference) -> Outcome:
    """Whether the difference is zero or above."""
    return Outcome.HOLDS if difference.interval and difference.interval[0] >= 0 else above(difference)


def exactly(difference: Difference) -> Outcome:
    """Whether every single difference is zero: of what is counted, there is nothing to estimate."""
    return Outcome.FAILS if any(difference.by_seed.values()) else Outcome.HOLDS


class Unit(NamedTuple):
    """What a difference is counted in, and the decimals that it is written with."""

    name: str
    decimals: int


POINTS, SIMILARITY, RANK, RATIO, COUNT = (
    Unit("points", 2),
    Unit("similarity", 3),
    Unit("rank correlation", 2),
    Unit("ratio", 3),
    Unit("parameters", 0),
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: `these` lie above `those`, unless `outcome` says otherwise."""

    sentence: str
    place: str
    these: Series
    those: Series
    unit: Unit = POINTS
    outcome: Callable[[Difference], Outcome] = above


@dataclass(frozen=True)
class Finding:
    """What a study says of a claim."""

    claim: Claim
    outcome: Outcome
    difference: Difference | None  # None where it is not tested


def judged(study: Study) -> tuple[Finding, ...]:
    """Return what a study says of every claim, in the order of CLAIMS."""
    return tuple(_judged(claim, study) for claim in CLAIMS)


def _judged(claim: Claim, study: Study) -> Finding:
    measured = difference(claim.these(study), claim.those(study))
    return Finding(claim, Outcome.UNTESTED if measured is None else claim.outcome(measured), measured)


TABLES = {"learnable": "Tables 1 and 7", "sinusoidal-1d": "Table 7", "sinusoidal-2d": "Table 7"}
SHARING = Way("lape-sharing")
WITH_NORM, WITHOUT = (
    ("norm", "scalar-norm", "scale-norm"),
    ("identity", "scalar", "scale", "affine"),
)


def _stand_in(norm: str) -> Series:
    return score(Way("lape", norm), "learnable")


def _lambda2(pe: str) -> Series:
    def falling(analysis: "RunAnalysis") -> float | None:
        rising = None if analysis.weights is None else with_depth(analysis.weights[1])
        return None if rising is None else -rising

    return of_models(BASELINE, pe, falling)


def _two_dimensionality(way: Way) -> Series:
    return of_models(way, "sinusoidal-1d", lambda analysis: analysis.shape.two_dimensionality)


def _layer_difference(way: Way) -> Series:
    return of_models(way, "learnable", lambda analysis: analysis.shape.layer_difference)


def _gap(way: Way) -> Series:
    return apart(score(way, "learnable"), score(way, "sinusoidal-1d"))


def _reach() -> Series:
    return of_models(LAPE, "learnable", lambda analysis: with_depth(analysis.half_distance))


def _above_zero(sentence: str, place: str, these: Series, unit: Unit) -> Claim:
    return Claim(sentence, place, these, zero(these), unit)


CLAIMS: tuple[Claim, ...] = (
    *(
        Claim(f"LaPE is above the default join ({pe})", place, score(LAPE, pe), score(BASELINE, pe))
        for pe, place in TABLES.items()
    ),
    *(
        Claim(
            f"LaPE is ahead at one third of training ({pe})",
            "Table 1, Figure 5",
            third(LAPE, pe),
            third(BASELINE, pe),
        )
        for pe in ("learnable", "sinusoidal-1d")
    ),
    *(
        Claim(f"LaPE is above {join} ({pe})", "Table 7", score(LAPE, pe), score(Way(join), pe))
        for join, pes in (("shared", TABLES), ("unshared", ("learnable",)))
        for pe in pes
    ),
    *(
        Claim(
            f"LaPE is not below LaPE (sharing) ({pe})",
            "Table 7",
            score(LAPE, pe),
            score(SHARING, pe),
            outcome=not_below,
        )
        for pe in TABLES
    ),
    Claim(
        "Under LaPE the tables sinusoidal-1d and learnable are nearer to each other than by default",
        "Table 7 (3.84 and 0.59 points apart)",
        _gap(BASELINE),
        _gap(LAPE),
    ),
    *(
        Claim(
            f"LaPE with LN is above LaPE with {norm} in its place", "Table 8", _stand_in("layernorm"), _stand_in(norm)
        )
        for norm in (*WITHOUT, *WITH_NORM)
    ),
    Claim(
        "Normalising is what matters: stand-ins with Norm are above those without, on average",
        "Table 8",
        mean(*map(_stand_in, WITH_NORM)),
        mean(*map(_stand_in, WITHOUT)),
    ),
    Claim(
        "With the table sinusoidal-1d, correlation is more two-dimensional under LaPE than by default",
        "Figures 1 and 3",
        _two_dimensionality(LAPE),
        _two_dimensionality(BASELINE),
        RATIO,
    ),
    Claim(
        "With the table learnable, layers differ more from one another under LaPE than by default",
        "Figure 4",
        _layer_difference(LAPE),
        _layer_difference(BASELINE),
        SIMILARITY,
    ),
    _above_zero(
        "Under LaPE correlation reaches farther with depth, from local to global (learnable)",
        "Figure 4",
        _reach(),
        RANK,
    ),
    *(
        _above_zero(
            f"By default λ2, the share of positions, shrinks with depth ({pe})", "Section 3.2", _lambda2(pe), RANK
        )
        for pe in TABLES
    ),
    Claim("LaPE adds exactly 2·D parameters a layer", "Table 5", surplus, zero(surplus), COUNT, exactly),
)
