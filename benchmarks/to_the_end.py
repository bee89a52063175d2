"""Does LaPE's gain remain when training has come to its end? Does it remain where patches are pooled?

The rule was written down before any of its runs was trained. The settings were found with the default join and seeds 0
and 100: without augmentation, and with a moving average of the weights, its accuracy stops rising after some 150,000
images (a set of 4,000); with augmentation it still rises after 600,000, for which there was no time.

1. The default join is trained so long that it gains less than 0.3 points in the last third of its epochs. If it gains
   more, the table says so.
2. Each way has its own learning rate: the best of three, by the accuracy at the end of a training that is a third as
   long, with a seed that is not among those compared. Where two are equal, the lower one. Where the best is the lowest
   or the highest that was tried, its half or its double is tried too, until it is not. (This sentence was added when
   four ways had their best at the lowest of the three.)
3. Ways with a class token are held against the default join with a class token, ways that pool against the default
   join that pools; differences are paired by seed, with Holm's correction for all of them.

What is finished is kept: the same command goes on. Two calls at once share the runs (each with --jobs 1, on one core of
two, they leave no core idle between studies).

python benchmarks/to_the_end.py --runs runs/to-the-end --out benchmarks/results/to-the-end
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import sleep
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from turns import file

from lape.experiment import Experiment
from lape.report import words
from lape.report.plots import learning_curves, png
from lape.report.progress import Display
from lape.studies.comparison import Factors, compare
from lape.studies.statistics import Difference, FinishedRun, Sample, SummaryRow, Way, corrected, rows
from lape.studies.study import Result, Study

PATCHES = {"patch_size": 7}
HEADS = {"class token": PATCHES, "pooling": PATCHES | {"class_token": False, "global_pool": "avg", "fc_norm": False}}
BASE = Experiment(
    data="fashion-mnist", train_images=10_000, model="vit_nano_patch4_28", epochs=36, validate_every=3, batch_size=64,
    weight_decay=0.05, shift=0, hflip=0, ema=0.998, accelerator="cpu", workers=0,
)  # fmt: skip
RATES = (2e-3, 4e-3, 8e-3)
SEED_FOR_RATES = 100
STILL_LEARNING = 0.3  # points in the last third


@dataclass(frozen=True)
class Subject:
    """A way of telling a model positions, and where the model reads its answer."""

    head: str
    join: str
    pe: str = "learnable"

    def __str__(self) -> str:
        return f"{self.head}, {self.join}" + ("" if self.pe == "learnable" else f", {self.pe}")


SUBJECTS = (
    Subject("class token", "default", "none"),
    *(Subject("class token", join) for join in ("default", "lape-sharing", "lape", "pvg", "mpvg")),
    *(Subject("pooling", join) for join in ("default", "lape", "pvg", "mpvg")),
)


def studies(
    base: Experiment, rates: dict[Subject, float], seeds: Sequence[int], folder: Path, jobs: int
) -> Iterator[tuple[list[Subject], Study]]:
    """Train what is not finished, but for what another call works on; ways with one experiment are one study."""
    for head, rate, pe in dict.fromkeys((one.head, rate, one.pe) for one, rate in rates.items()):
        some = [one for one in rates if (one.head, rates[one], one.pe) == (head, rate, pe)]
        experiment = replace(base, model_args=HEADS[head], lr=rate)
        with Display(Console(stderr=True)) as display:
            study = compare(experiment, Factors([one.join for one in some], [pe], seeds), folder, jobs, display)
        if study.failures:
            study.raise_missing()
        yield some, study


def trained(
    base: Experiment, rates: dict[Subject, float], seeds: Sequence[int], folder: Path, jobs: int
) -> dict[Subject, list[Result]]:
    """Return the results once all are there, trained by this call or by another."""
    while True:
        found = list(studies(base, rates, seeds, folder, jobs))
        if not any(study.elsewhere for _, study in found):
            return {one: [*study.of(Way(one.join), one.pe).values()] for some, study in found for one in some}
        sleep(10)


def best(by_rate: dict[float, float]) -> float:
    """Return the rate with the highest accuracy; the lower one where two are equal."""
    return max(sorted(by_rate), key=by_rate.__getitem__)


def beyond(scores: dict[Subject, dict[float, float]]) -> dict[float, list[Subject]]:
    """Return the rates to try next, each with the ways whose best rate is the lowest or the highest so far."""
    found: dict[float, list[Subject]] = {}
    for one, by_rate in scores.items():
        rate = best(by_rate)
        if rate == min(by_rate):
            found.setdefault(rate / 2, []).append(one)
        elif rate == max(by_rate):
            found.setdefault(rate * 2, []).append(one)
    return found


def tuned(folder: Path, jobs: int) -> dict[Subject, dict[float, float]]:
    """Return the accuracy at each rate, after the short training."""
    short = replace(BASE, epochs=BASE.epochs // 3)
    scores: dict[Subject, dict[float, float]] = {one: {} for one in SUBJECTS}
    asked = {rate: list(SUBJECTS) for rate in RATES}
    while asked:
        for rate, some in asked.items():  # all of them, before another call is waited for
            list(studies(short, dict.fromkeys(some, rate), [SEED_FOR_RATES], folder, jobs))
        for rate, some in asked.items():
            for one, (result,) in trained(short, dict.fromkeys(some, rate), [SEED_FOR_RATES], folder, jobs).items():
                scores[one][rate] = result.run.score
        asked = beyond(scores)
    return scores


def compared(runs: dict[Subject, list[FinishedRun]]) -> dict[Subject, tuple[Difference | None, SummaryRow]]:
    """Return each way's difference to the default join with a table and the same head, and its row."""
    by_head = [[one for one in SUBJECTS if one.head == head] for head in HEADS]
    found = [row for some in by_head for row in rows(run for one in some for run in runs[one])]
    differences = corrected([row.difference or row.beside for row in found])
    together = zip([one for some in by_head for one in some], differences, found, strict=True)
    return {
        one: (difference, replace(row, reached=reached(runs[one], runs[Subject(one.head, "default")])))
        for one, difference, row in together
    }


def reached(some: Sequence[FinishedRun], default: Sequence[FinishedRun]) -> tuple[int | None, ...]:
    """Return for each seed the epoch at which a run first is where the default join ends; None for never."""
    points = (run.reaches(end.score) for run, end in zip(some, default, strict=True))
    return tuple(point and point.epoch for point in points)


def at_thirds(runs: Iterable[FinishedRun]) -> list[Sample]:
    """Return the accuracy after one, two and three thirds of the epochs."""
    last = BASE.epochs // BASE.validate_every
    return [Sample.of([run.curve[round(last * third / 3) - 1].score for run in runs]) for third in (1, 2, 3)]


def draw(results: dict[Subject, list[Result]], out: Path) -> None:
    """Write a picture of the learning curves for each head."""
    out.mkdir(parents=True, exist_ok=True)
    for head in HEADS:
        runs = {each.run.combination: each for one, some in results.items() if one.head == head for each in some}
        picture = png(learning_curves(Study(results=runs, command="")), dots_per_inch=150)
        (out / f"curves-{head.replace(' ', '-')}.png").write_bytes(picture)


def main(
    runs: Path = Path("runs/to-the-end"),
    out: Path | None = None,
    seeds: int = 5,
    jobs: int = 2,
    accelerator: str = BASE.accelerator,
) -> None:
    """Train what is not finished, and print what came out

    Args:
        runs: Folder of the runs.
        out: Folder for table.md, table.json and the pictures of the curves.
        seeds: How many.
        jobs: Runs at once.
        accelerator: What computes; what another has computed already is kept.
    """
    scores = tuned(runs / "rates", jobs)
    rates = {one: best(by_rate) for one, by_rate in scores.items()}
    base, folder = replace(BASE, accelerator=accelerator), runs / "compared"
    for seed in range(seeds):  # one after the other: what is finished can be paired
        list(studies(base, rates, [seed], folder, jobs))
    results = trained(base, rates, range(seeds), folder, jobs)
    finished = {one: [result.run for result in some] for one, some in results.items()}
    headings = ["head, join", "rate", "after a third", "after two", "at the end, %", "last third"]
    headings += ["at its best epoch, %", "minus default", "95 % interval", "p (Holm)", "epochs to default’s end"]
    table = [headings]
    content: list[dict[str, Any]] = []
    for one, (difference, row) in compared(finished).items():
        thirds = at_thirds(finished[one])
        rise = thirds[2].mean - thirds[1].mean
        still = "" if rise < STILL_LEARNING else " (still learning)"
        told = ["–", "–", "–"]
        if difference is not None:
            told = [words.signed(difference.mean), words.interval(difference), words.probabilities(difference)]
        start = [str(one), f"{rates[one]:g}", f"{thirds[0].mean:.2f}", f"{thirds[1].mean:.2f}"]
        best_epoch = Sample.of([max(point.score for point in run.curve) for run in finished[one]])
        ends = [words.percent(thirds[2]), words.signed(rise) + still, words.percent(best_epoch)]
        table.append([*start, *ends, *told, words.reached(row)])
        content.append(
            {
                "head": one.head, "join": one.join, "pe": one.pe, "rate": rates[one], "by_rate": scores[one],
                "curves": [[point._asdict() for point in run.curve] for run in finished[one]],
                "difference": difference and difference.mean, "interval": difference and difference.interval,
                "p": difference and difference.p, "p_holm": difference and difference.p_holm, "epochs": row.reached,
            }
        )  # fmt: skip
    machines = Counter(result.record["machine"] for some in results.values() for result in some)
    said = (
        f"{BASE.train_images:,} images of Fashion-MNIST, {BASE.epochs} epochs, {seeds} seeds, tested on 10,000 images. "
        f"Trained on: {'; '.join(f'{machine} ({count} runs)' for machine, count in machines.items())}."
    )
    file(out, table, said, ways=content)
    if out:
        draw(results, out)


if __name__ == "__main__":
    auto_cli(main)
