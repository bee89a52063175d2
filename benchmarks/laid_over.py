"""Do rotations that count patches follow images of other sizes, once every picture is laid over the grid of training?

The weights of `lape compare ... --sizes ... --out runs/positions` (docs/results.md has the whole command) are judged
with the option `grid` of their rotation, which changes nothing at the trained size, beside what the runs keep of the
same sizes without it. Differences to the default join with the learnable table are paired by seed, with Holm's
correction for all ways and sizes.

python benchmarks/laid_over.py --runs runs/positions --out benchmarks/results/laid-over
"""

from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from turns import file

from lape.data.sizes import Size
from lape.data.sources import Source, set_of
from lape.experiment import Experiment
from lape.report import words
from lape.report.tables import marked
from lape.studies.sizes import with_kept
from lape.studies.statistics import BASELINE, LAPE, Difference, Sample, Side, corrected, difference
from lape.studies.study import Study, gather
from lape.training.checkpoints import LAST
from lape.training.evaluation import at_sizes, load_run

WAYS: tuple[Side, ...] = ((BASELINE, "rope-axial"), (BASELINE, "rope-mixed"), (LAPE, "learnable+rope-mixed"))
REFERENCE: Side = (BASELINE, "learnable")
PATCHES = 7  # rows and columns of them in training

Scores = dict[Size, dict[int, float]]  # by size and seed


def kept(study: Study, side: Side) -> Scores:
    """Return what the runs keep of their sizes, but for the trained one."""
    runs = {seed: study.at_sizes[result.run.combination] for seed, result in study.of(*side).items()}
    sizes = [size for size in study.sizes if size not in study.trained]
    return {size: {seed: run.by_size[size].metrics["val_accuracy"] for seed, run in runs.items()} for size in sizes}


def judged(study: Study, side: Side, sizes: list[Size]) -> Scores:
    """Return the accuracy of the same weights with every picture laid over the grid of training."""
    way, pe = side
    scores: Scores = {size: {} for size in sizes}
    runs = study.of(way, pe)
    for seed in track(runs, f"{way} × {pe}", console=Console(stderr=True)):
        run = load_run(runs[seed].folder / LAST, images, pe=f"{pe}:grid={PATCHES}", accelerator="cpu")
        for one in at_sizes(run, sizes):
            scores[one.size][seed] = one.metrics["val_accuracy"]
    return scores


def images(experiment: Experiment, stored: Source) -> Source:
    """Return the set of a run, with its images."""
    return set_of(experiment, download=False, stored=stored)


def main(runs: Path = Path("runs/positions"), out: Path | None = None) -> None:
    """Judge rotations laid over the grid of training, and print what came out

    Args:
        runs: Folder of the comparison.
        out: Folder for table.md and table.json.
    """
    (study,) = map(with_kept, gather([runs]).studies)
    reference = kept(study, REFERENCE)
    sizes = list(reference)
    subjects: dict[Side, Scores] = {}
    for way, pe in WAYS:
        subjects[way, pe] = kept(study, (way, pe))
        subjects[way, f"{pe}:grid={PATCHES}"] = judged(study, (way, pe), sizes)
    places = [(side, size) for side in subjects for size in sizes]
    found = corrected([difference(subjects[side][size], reference[size]) for side, size in places])
    differences: dict[tuple[Side, Size], Difference | None] = dict(zip(places, found, strict=True))

    def row(side: Side, scores: Scores) -> list[str]:
        means = {size: Sample.of([*scores[size].values()]).mean for size in sizes}
        return [str(side[0]), side[1], *(marked(means[size], differences.get((side, size))) for size in sizes)]

    table = [["join", "positions", *map(str, sizes)], row(REFERENCE, reference)]
    table += [row(side, scores) for side, scores in subjects.items()]
    content = [
        {
            "join": str(way), "pe": pe, "size": str(size), "accuracy": subjects[way, pe][size],
            "difference": beside and beside.mean, "interval": beside and beside.interval,
            "p": beside and beside.p, "p_holm": beside and beside.p_holm,
        }
        for ((way, pe), size), beside in differences.items()
    ]  # fmt: skip
    said = (
        f"Accuracy in percent, {words.plural(len(study.seeds), 'seed')}; + and −: significantly above or below "
        f"{REFERENCE[0]} × {REFERENCE[1]} at this size, with Holm’s correction for all ways and sizes."
    )
    file(out, table, said, words=2, differences=content)


if __name__ == "__main__":
    auto_cli(main)
