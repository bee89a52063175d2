"""What a few numbers, one for each seed, say of their mean: an interval, a p-value, and how many seeds would decide."""

import math
import statistics as descriptive
from collections.abc import Callable, Sequence
from typing import NamedTuple

ERROR = 0.05  # the share of intervals that miss, and what a p-value must be below
FEWEST = 3  # pairs of runs: two leave one degree of freedom, and an interval 13 standard errors wide to each side
FEWEST_LAYERS = 4  # of a rank correlation: Fisher's standard error divides by the layers less three
POWER = 0.8  # of a test that is said to decide
MOST_SEEDS = 1000  # beyond these no number is named


class NoVerdict(Exception):
    """Numbers that nothing can be concluded from; the message says why."""


class Estimate(NamedTuple):
    """A mean, and how sure it is that it lies on one side of a bound."""

    mean: float
    interval: tuple[float, float]  # at 95 %
    p: float  # two-sided, of a mean that is the bound
    effect: float  # |mean - bound| in standard deviations of one seed's number


Estimator = Callable[[Sequence[float]], Estimate]


def student(values: Sequence[float], bound: float = 0.0) -> Estimate:
    """Estimate a mean by Student's interval, d̄ ± t(0.975, n-1)·s/√n; raises NoVerdict where s = 0."""
    if min(values) == max(values):
        raise NoVerdict(f"no variance: all {len(values)} pairs of runs differ by the same")
    return _estimate(values, 0.0, bound)


def fisher(correlations: Sequence[float], length: int) -> Estimate:
    """Estimate a mean rank correlation over `length` layers by Fisher's z, so that its interval stays within ±1.

    z = artanh(r). Its standard deviation is that between the seeds, and at least that of one correlation,
    √(1.06 / (length - 3)) (Fieller, Hartley and Pearson, 1957): seeds that agree on +1.00 have an interval too. A
    correlation of ±1 counts as half the smallest step away from it. Raises NoVerdict for fewer than four layers.
    """
    if length < FEWEST_LAYERS:
        raise NoVerdict(f"too few layers for the interval of a rank correlation: {length}, of at least {FEWEST_LAYERS}")
    largest = 1 - 6 / (length * (length**2 - 1))
    scores = [math.atanh(max(-largest, min(largest, one))) for one in correlations]
    found = _estimate(scores, math.sqrt(1.06 / (length - 3)), 0.0)
    low, high = found.interval
    return found._replace(mean=math.tanh(found.mean), interval=(math.tanh(low), math.tanh(high)))


def _estimate(values: Sequence[float], least_deviation: float, bound: float) -> Estimate:
    from scipy.special import stdtr, stdtrit  # Student's distribution, and its inverse

    mean, count = descriptive.fmean(values), len(values)
    deviation = max(least_deviation, math.dist(values, [mean] * count) / math.sqrt(count - 1))
    error = deviation / math.sqrt(count)
    half = float(stdtrit(count - 1, 1 - ERROR / 2)) * error
    apart = abs(mean - bound)
    return Estimate(mean, (mean - half, mean + half), 2 * float(stdtr(count - 1, -apart / error)), apart / deviation)


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values of a family by Holm's correction: without any effect, one family in 20 has one below 0.05.

    Written out, as SciPy has no such function, and statsmodels would bring pandas for three lines.
    """
    ranked = sorted(range(len(values)), key=values.__getitem__)
    corrected, least = [0.0] * len(values), 0.0
    for place, index in enumerate(ranked):
        corrected[index] = least = max(least, min(1.0, (len(values) - place) * values[index]))
    return corrected


def seeds_to_decide(effect: float) -> int | None:
    """Return the seeds at which Student's test sees this effect four times in five; None for more than 1,000."""
    import numpy as np
    from scipy.special import nctdtr, stdtrit

    counts = np.arange(FEWEST, MOST_SEEDS + 1)
    seen = 1 - nctdtr(counts - 1, effect * np.sqrt(counts), stdtrit(counts - 1, 1 - ERROR / 2)) >= POWER
    return int(counts[seen.argmax()]) if seen.any() else None


def lowest_share(hits: int, count: int) -> float:
    """Return the lower end of the 95 % interval (Clopper and Pearson's) of a share, from `hits` of `count`."""
    from scipy.special import betaincinv

    return 0.0 if hits == 0 else float(betaincinv(hits, count - hits + 1, ERROR / 2))
