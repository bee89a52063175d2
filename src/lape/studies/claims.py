"""The paper's claims as data: a sentence, where it stands, and what of a study it is measured by.

A claim compares two series of numbers, seed by seed. It holds where the 95 % interval of the mean difference lies
wholly above its bound, does not hold where it lies wholly below, and is undecided in between. There is no verdict where
a run is at chance, where there is no variance, and for too few pairs. What is counted and not estimated is a fact, and
stands apart.
"""

import math
import statistics as descriptive
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lape.studies.inference import fisher
from lape.studies.statistics import BASELINE, LAPE, Difference, Side, Verdict, Way, corrected, difference, doubt
from lape.studies.study import Result, Study

if TYPE_CHECKING:
    from lape.studies.study import Numbers, RunAnalysis

BySeed = Mapping[int, float]
Measure = Callable[[Study], Difference | None]  # None where no seed has both sides


class Outcome(Enum):
    """What runs say of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"
    NO_VERDICT = "no verdict"
    UNTESTED = "not tested"


OF_VERDICT = {
    Verdict.ABOVE: Outcome.HOLDS,
    Verdict.BELOW: Outcome.FAILS,
    Verdict.UNDECIDED: Outcome.UNDECIDED,
    Verdict.NONE: Outcome.NO_VERDICT,
}

# Points. Half of what LaPE gains on DeiT-Ti in other hands (+0.80, see `lape.studies.paper`), the smaller of the two
# gains that are published: to keep half of the gain is what trials of non-inferiority ask for.
MARGIN = 0.4

# Two runs that differ by seed alone lie further apart in one case of 20: 1.96·√2 standard deviations, the limit of
# repeatability of ISO 5725. A change over the layers must exceed it.
REPEATABILITY = 1.96 * math.sqrt(2)


# --- Series -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One number for each seed that has one, and the ways and tables of the runs that it is taken from."""

    sides: tuple[Side, ...]
    numbers: Callable[[Study], BySeed]


def of_runs(side: Side, number: Callable[[Result], float]) -> Series:
    """A number of each run of one way with one table."""
    return Series((side,), lambda study: {seed: number(result) for seed, result in study.of(*side).items()})


def of_models(side: Side, number: "Callable[[RunAnalysis], float | None]") -> Series:
    """A number of each trained model of one way with one table, where it has one."""
    return Series((side,), lambda study: _numbers(study, side, number))


def _numbers(study: Study, side: Side, number: "Callable[[RunAnalysis], float | None]") -> BySeed:
    by_seed = {one.seed: number(analysis) for one, analysis in study.analyses.items() if (one.way, one.pe) == side}
    return {seed: value for seed, value in by_seed.items() if value is not None and math.isfinite(value)}


def together(function: Callable[..., float], *series: Series) -> Series:
    """A function of several series, for the seeds that all of them have."""

    def numbers(study: Study) -> BySeed:
        by_series = [each.numbers(study) for each in series]
        common = [seed for seed in by_series[0] if all(seed in some for some in by_series)]
        return {seed: function(*(each[seed] for each in by_series)) for seed in common}

    return Series(tuple(side for each in series for side in each.sides), numbers)


def score(side: Side) -> Series:
    """The score after the last step."""
    return of_runs(side, lambda result: result.run.score)


def third(side: Side) -> Series:
    """The score at one third of training."""
    return of_runs(side, lambda result: result.run.third.score)


def mean(*series: Series) -> Series:
    """The mean of several series."""
    return together(lambda *values: descriptive.fmean(values), *series)


def apart(one: Series, other: Series) -> Series:
    """How far two series lie apart: |a - b|."""
    return together(lambda a, b: abs(a - b), one, other)


# --- Measures -----------------------------------------------------------------------------------------------------


def compared(these: Series, those: Series, bound: float = 0.0) -> Measure:
    """These minus those, held against a bound; no verdict where a run of either is at chance."""

    def measure(study: Study) -> Difference | None:
        found = difference(these.numbers(study), those.numbers(study), bound)
        return found and _of_what_learnt(found, study, (*these.sides, *those.sides))

    return measure


def _of_what_learnt(found: Difference, study: Study, sides: Sequence[Side]) -> Difference:
    reason = doubt(study.of(*side)[seed].run for side in dict.fromkeys(sides) for seed in found.by_seed)
    return found if reason is None else found.without_verdict(reason)


def nearer(first: str, second: str) -> Measure:
    """How much nearer two tables are to each other under LaPE than by default.

    Distances have no sign, so noise alone sets tables apart, and a noisier join further than a calmer one: there is no
    verdict where the tables are not apart by default.
    """
    by_default, by_lape = (apart(score((way, first)), score((way, second))) for way in (BASELINE, LAPE))
    gap = compared(score((BASELINE, first)), score((BASELINE, second)))

    def measure(study: Study) -> Difference | None:
        found, there = compared(by_default, by_lape)(study), gap(study)
        if found is None or found.no_verdict or (there and there.verdict in (Verdict.ABOVE, Verdict.BELOW)):
            return found
        return found.without_verdict("by default these tables do not differ significantly, so there is no gap to close")

    return measure


def with_depth(layers: "Sequence[Numbers]") -> list[float]:
    """Return for each model the rank correlation (Spearman's) of its numbers with their layer, 0 where all are alike.

    Ties share ranks, inf ranks last.
    """
    import numpy as np
    from scipy.stats import rankdata

    ranks = rankdata(layers, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    depth = np.arange(ranks.shape[1]) - (ranks.shape[1] - 1) / 2
    lengths = np.sqrt((ranks**2).sum(axis=1) * (depth**2).sum())
    return np.divide(ranks @ depth, lengths, out=np.zeros(len(ranks)), where=lengths > 0).tolist()


def growing(side: Side, by_layer: "Callable[[RunAnalysis], Numbers | None]") -> Measure:
    """The rank correlation of numbers by layer with depth, by Fisher's interval.

    No verdict where a run is at chance, for fewer than four layers, and where the change from the first layer to the
    last is within noise: what two runs that differ by seed alone differ by in one layer, in 19 cases of 20.
    """

    def measure(study: Study) -> Difference | None:
        found = {one.seed: by_layer(some) for one, some in study.analyses.items() if (one.way, one.pe) == side}
        known = {seed: some for seed, some in found.items() if some and not any(map(math.isnan, some))}
        depth = min(map(len, known.values()), default=0)
        layers = [some[:depth] for some in known.values()]
        ranks = dict(zip(known, with_depth(layers), strict=True)) if known else {}
        measured = difference(ranks, dict.fromkeys(ranks, 0.0), estimator=partial(fisher, length=depth))
        if measured is None:
            return None
        measured = _of_what_learnt(measured, study, [side])
        return measured if measured.no_verdict else _beyond_noise(measured, layers)

    return measure


def _beyond_noise(found: Difference, layers: "Sequence[Numbers]") -> Difference:
    import numpy as np

    bounded = np.array([_bounded(values) for values in layers])
    depth = np.arange(bounded.shape[1]) - (bounded.shape[1] - 1) / 2
    slope = float(bounded.mean(axis=0) @ depth / (depth @ depth))  # least squares
    change, noise = slope * (len(depth) - 1), REPEATABILITY * math.sqrt(bounded.var(axis=0, ddof=1).mean())
    if math.copysign(1, found.mean) * change > noise:
        return found
    return found.without_verdict(
        f"a change of {change:.2g} from the first layer to the last is within noise, {noise:.2g} between two seeds"
    )


def _bounded(values: Sequence[float]) -> list[float]:
    """Put the largest finite number in the place of inf, as it is at least as far, and the smallest in that of -inf."""
    finite = [*filter(math.isfinite, values)] or [0.0]
    return [max(min(finite), min(value, max(finite))) for value in values]


# --- Claims -------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """What a difference is counted in, and the decimals that it is written with."""

    name: str
    decimals: int


POINTS, SIMILARITY, RANK, RATIO = (
    Unit("points", 2),
    Unit("similarity", 3),
    Unit("rank correlation", 2),
    Unit("ratio", 3),
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: its measure lies above its bound."""

    sentence: str
    place: str
    measure: Measure
    unit: Unit = POINTS
    sides: tuple[Side, Side] | None = None  # whose final scores are compared, where it is that

    def published(self, scores: Mapping[Side, float]) -> float | None:
        """Return the difference that published scores of both sides make; None where there are none."""
        if self.sides is None or not all(side in scores for side in self.sides):
            return None
        these, those = self.sides
        return scores[these] - scores[those]


@dataclass(frozen=True)
class Finding:
    """What a study says of a claim."""

    claim: Claim
    difference: Difference | None  # None where it is not tested

    @property
    def outcome(self) -> Outcome:
        """What the plain 95 % interval says."""
        return Outcome.UNTESTED if self.difference is None else OF_VERDICT[self.difference.verdict]

    @property
    def corrected(self) -> Outcome:
        """What remains of it with Holm's correction over all claims that were judged together."""
        return Outcome.UNTESTED if self.difference is None else OF_VERDICT[self.difference.corrected]


def judged(studies: Sequence[Study]) -> list[tuple[Finding, ...]]:
    """Return what each study says of every claim, in the order of CLAIMS; all together are one family for Holm."""
    found = [Finding(claim, claim.measure(study)) for study in studies for claim in CLAIMS]
    differences = corrected([one.difference for one in found])
    findings = [replace(one, difference=difference) for one, difference in zip(found, differences, strict=True)]
    return [tuple(findings[start : start + len(CLAIMS)]) for start in range(0, len(findings), len(CLAIMS))]


@dataclass(frozen=True)
class Fact:
    """What the paper says and is counted, not estimated: how many are too many or missing, by seed."""

    sentence: str
    place: str
    off: Callable[[Study], BySeed]


def surplus(study: Study) -> BySeed:
    """Parameters that LaPE adds to the default join, less 2·D a layer: what that misses by, over all tables."""
    missing: dict[int, float] = {}
    for pe in study.pes:
        usual, lape = study.of(BASELINE, pe), study.of(LAPE, pe)
        added = _numbers(study, (LAPE, pe), lambda analysis: 2 * analysis.width * len(analysis.half_distance))
        for seed in usual.keys() & added.keys():
            missed = lape[seed].run.parameters - usual[seed].run.parameters - added[seed]
            missing[seed] = missing.get(seed, 0.0) + abs(missed)
    return missing


FACTS: tuple[Fact, ...] = (Fact("LaPE adds exactly 2·D parameters a layer", "Table 5", surplus),)


TABLES = {"learnable": "Tables 1 and 7", "sinusoidal-1d": "Table 7", "sinusoidal-2d": "Table 7"}
SHARING = Way("lape-sharing")
WITH_NORM, WITHOUT = (
    ("norm", "scalar-norm", "scale-norm"),
    ("identity", "scalar", "scale", "affine"),
)


def _stand_in(norm: str) -> Side:
    return Way("lape", norm), "learnable"


def _mean_of(norms: Sequence[str]) -> Series:
    return mean(*(score(_stand_in(norm)) for norm in norms))


def _scores(sentence: str, place: str, these: Side, those: Side, bound: float = 0.0) -> Claim:
    return Claim(sentence, place, compared(score(these), score(those), bound), sides=(these, those))


def _falling_lambda2(analysis: "RunAnalysis") -> "Numbers | None":
    return None if analysis.weights is None else tuple(-value for value in analysis.weights[1])


def _two_dimensionality(way: Way) -> Series:
    return of_models((way, "sinusoidal-1d"), lambda analysis: analysis.shape.two_dimensionality)


def _layer_difference(way: Way) -> Series:
    return of_models((way, "learnable"), lambda analysis: analysis.shape.layer_difference)


CLAIMS: tuple[Claim, ...] = (
    *(
        _scores(f"LaPE is above the default join ({pe})", place, (LAPE, pe), (BASELINE, pe))
        for pe, place in TABLES.items()
    ),
    *(
        Claim(
            f"LaPE is ahead at one third of training ({pe})",
            "Table 1, Figure 5",
            compared(third((LAPE, pe)), third((BASELINE, pe))),
        )
        for pe in ("learnable", "sinusoidal-1d")
    ),
    *(
        _scores(f"LaPE is above {join} ({pe})", "Table 7", (LAPE, pe), (Way(join), pe))
        for join, pes in (("shared", TABLES), ("unshared", ("learnable",)))
        for pe in pes
    ),
    *(
        _scores(
            f"LaPE is not more than {MARGIN} points below LaPE (sharing) ({pe})",
            "Table 7",
            (LAPE, pe),
            (SHARING, pe),
            bound=-MARGIN,
        )
        for pe in TABLES
    ),
    Claim(
        "Under LaPE the tables sinusoidal-1d and learnable are nearer to each other than by default",
        "Table 7 (3.84 and 0.59 points apart)",
        nearer("learnable", "sinusoidal-1d"),
    ),
    *(
        _scores(f"LaPE with LN is above LaPE with {norm} in its place", "Table 8", (LAPE, "learnable"), _stand_in(norm))
        for norm in (*WITHOUT, *WITH_NORM)
    ),
    Claim(
        "Normalising is what matters: stand-ins with Norm are above those without, on average",
        "Table 8",
        compared(_mean_of(WITH_NORM), _mean_of(WITHOUT)),
    ),
    Claim(
        "With the table sinusoidal-1d, correlation is more two-dimensional under LaPE than by default",
        "Figures 1 and 3",
        compared(_two_dimensionality(LAPE), _two_dimensionality(BASELINE)),
        RATIO,
    ),
    Claim(
        "With the table learnable, layers differ more from one another under LaPE than by default",
        "Figure 4",
        compared(_layer_difference(LAPE), _layer_difference(BASELINE)),
        SIMILARITY,
    ),
    Claim(
        "Under LaPE correlation reaches farther with depth, from local to global (learnable)",
        "Figure 4",
        growing((LAPE, "learnable"), lambda analysis: analysis.half_distance),
        RANK,
    ),
    *(
        Claim(
            f"By default λ2, the share of positions, shrinks with depth ({pe})",
            "Section 3.2",
            growing((BASELINE, pe), _falling_lambda2),
            RANK,
        )
        for pe in TABLES
    ),
)
