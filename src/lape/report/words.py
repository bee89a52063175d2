"""What a comparison found, in sentences and cells; the same words whichever way a result goes."""

import shlex
from dataclasses import dataclass

from lape.comparison import Comparison
from lape.experiment import Experiment
from lape.statistics import BASELINE, Difference, Row, Run, Sample, Verdict


def listed(names: tuple[str, ...] | list[str]) -> str:
    """Join names as prose does: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def percent(sample: Sample) -> str:
    """Write "97.12 ± 0.30", or "97.12" where one run gives no spread."""
    return f"{sample.mean:.2f}" if sample.std is None else f"{sample.mean:.2f} ± {sample.std:.2f}"


def signed(points: float) -> str:
    """Write "+0.31", "−0.31" or "0.00"."""
    return "0.00" if f"{abs(points):.2f}" == "0.00" else f"{points:+.2f}".replace("-", "−")


def interval(difference: Difference) -> str:
    """Write "+0.10 to +0.52", or "no interval" for one pair."""
    if difference.interval is None:
        return "no interval"
    return " to ".join(map(signed, difference.interval))


def duration(seconds: float) -> str:
    """Write the time of a step: "12.3 ms", "1.23 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def third_epoch(comparison: Comparison) -> str:
    """Name the epoch that stands for one third of training: "epoch 10 of 30"."""
    runs = [result.run for result in comparison.results.values()]
    return listed(list(dict.fromkeys(f"epoch {run.third.epoch} of {_epochs(run)}" for run in runs)))


def _epochs(run: Run) -> int:
    return run.curve[-1].epoch


def question(comparison: Comparison) -> str:
    """Say in one sentence what was compared on what data."""
    base, (train, validation), seeds = comparison.base, comparison.images, len(comparison.seeds)
    return (
        f"{_counted('Join', comparison.joins)} compared on {base.data} ({train:,} training and {validation:,} "
        f"validation images): {base.model} with the {_counted('position table', comparison.pes)}, "
        f"{_length(base)}, {seeds} {'seeds' if seeds > 1 else 'seed'}."
    )


def _length(base: Experiment) -> str:
    return f"{base.steps:,} steps" if base.steps else f"{base.all_steps(1)} epochs"


def _counted(noun: str, names: tuple[str, ...]) -> str:
    return f"{noun}{'s' if len(names) > 1 else ''} {listed(names)}"


def finding(row: Row, baseline: Row) -> str:
    """Say how a row differs from the baseline of the same table, how sure that is, and in how many pairs."""
    found = row.difference
    assert found is not None
    lead = f"With the table {row.pe}, {row.join} differs from {BASELINE} by {signed(found.mean)} points"
    levels = f"{row.score.mean:.2f} % against {baseline.score.mean:.2f} %"
    if found.verdict is Verdict.ONE_PAIR:
        return f"{lead} ({levels}): {Verdict.ONE_PAIR.value} and decides nothing."
    return (
        f"{lead} ({levels}; 95 % interval {interval(found)}, {len(found.by_seed)} pairs of runs): "
        f"{found.verdict.value}."
    )


@dataclass(frozen=True)
class Findings:
    """The sentences at the top of a report: `main` of one join, the gap between tables, and what to keep in mind."""

    main: tuple[str, ...]
    gap: str | None
    remarks: tuple[str, ...]


def findings(comparison: Comparison) -> Findings:
    """Return the findings of `lape`, or of the last join where it was not compared, and all reservations."""
    rows = comparison.rows
    baselines = {row.pe: row for row in rows if row.join == BASELINE}
    compared = [row for row in rows if row.difference is not None]
    joins = [row.join for row in compared]
    chosen = "lape" if "lape" in joins else joins[-1] if joins else None
    main = tuple(finding(row, baselines[row.pe]) for row in compared if row.join == chosen)
    gap = None
    if comparison.gaps:
        spans = [f"{gap.points:.2f} points for {gap.join} ({gap.worst} to {gap.best})" for gap in comparison.gaps]
        gap = f"From the worst table to the best, mean {comparison.measure} rises by {listed(spans)}."
    return Findings(main, gap, tuple(_remarks(comparison)))


def _remarks(comparison: Comparison) -> list[str]:
    rows, seeds = comparison.rows, comparison.seeds
    said = []
    if len(seeds) == 1:
        more = shlex.join(["--seeds", "5"])
        said.append(
            f"One seed gives no spread and no interval, so that nothing is decided here; {more} would tell more."
        )
    if BASELINE not in comparison.joins:
        said.append(f"The join {BASELINE} was not trained, so there is nothing to take a difference to.")
    for combination, error in comparison.failures.items():
        said.append(f"Failed and missing: {combination} ({error}).")
    for row in rows:
        if row.difference is not None and row.difference.unpaired:
            lost = listed([str(seed) for seed in row.difference.unpaired])
            said.append(
                f"{row.join} × {row.pe} is paired with {BASELINE} without seed {lost}, which only one of them has."
            )
        elif row.difference is None and row.join != BASELINE and BASELINE in comparison.joins:
            said.append(f"{row.join} × {row.pe} has no run of {BASELINE} with the same table and seed: no difference.")
    told = [row.difference for row in rows if row.difference is not None and row.difference.interval is not None]
    if len(told) > 1:
        said.append(f"Each of the {len(told)} intervals holds for itself at 95 %, not all of them together.")
    if comparison.jobs > 1:
        said.append(
            f"Times per step were taken with up to {comparison.jobs} runs side by side: compare them roughly, and "
            "measure cost with lape cost."
        )
    if len(comparison.provenances()) > 1:
        said.append("Some runs were kept from an earlier call with another commit, version or machine: see below.")
    return said
