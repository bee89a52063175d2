"""Which start is best where a trained model learns another task, and which join bears another resolution.

A small ViT learns garments. From there it learns digits (starts), or sees its garments at twice the size
(resolution). What is finished is kept: the same command goes on.

python benchmarks/starts.py --runs runs/starts --out benchmarks/results/starts
"""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jsonargparse import auto_cli

from lape.experiment import Experiment
from lape.report import words
from lape.studies.parallel import Done, side_by_side
from lape.studies.places import Places
from lape.studies.statistics import FinishedRun, Sample, difference
from lape.studies.study import read_result
from lape.training.provenance import provenance

SEEDS = range(5)
PRETRAINED = Experiment(
    data="fashion-mnist", model="vit_nano_patch4_28", epochs=4, batch_size=128, lr=2e-3, weight_decay=0.05,
    accelerator="cpu", workers=0,
)  # fmt: skip
TUNED = replace(PRETRAINED, data="digits", img_size=28, epochs=10, batch_size=32, lr=5e-4, shift=0, hflip=0.0)
LARGER = replace(PRETRAINED, img_size=56, epochs=1, steps=240, batch_size=64, lr=5e-4)

# The join of the pretraining (None: none), and that of the tuning with its start.
STARTS: dict[str, tuple[str | None, dict[str, str]]] = {
    "default, as it is": ("default", {"join": "default"}),
    "default, then LaPE fresh": ("default", {"join": "lape"}),
    "default, then LaPE preserving": ("default", {"join": "lape", "start": "preserve"}),
    "LaPE from the beginning": ("lape", {"join": "lape"}),
    "default, untrained": (None, {"join": "default"}),
    "LaPE, untrained": (None, {"join": "lape"}),
}
JOINS = ("default", "shared", "unshared", "lape-sharing", "lape")


class Plan(NamedTuple):
    """A run, and its folder."""

    experiment: Experiment
    folder: Path


def _train(plan: Plan, tell: Callable[[object], None]) -> None:
    from lape.training.loop import train

    train(plan.experiment, plan.folder, resume=True)


def trained(plans: list[Plan], jobs: int) -> None:
    """Train what is not finished."""
    todo = [plan for plan in plans if not (plan.folder / "result.json").exists()]
    with closing(side_by_side(_train, todo, Places.of(jobs, [], jobs, 1), 1)) as events:
        for event in events:
            if isinstance(event, Done):
                if event.error:
                    raise event.error
                print(f"{event.task.folder.name}: {read_result(event.task.folder).run.score:.2f} %", flush=True)


def table(runs: dict[str, list[FinishedRun]], base: str) -> list[str]:
    """Lines of a Markdown table: the scores at the first validation and at the last, and the difference to a base."""
    steps = [point.step for point in runs[base][0].curve]
    places = [0, -1] if len(steps) > 1 else [-1]
    headings = ["", *(f"after {steps[place]} steps, %" for place in places), f"minus {base}", "95 % interval"]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for name, own in runs.items():
        scores = [words.percent(Sample.of([run.curve[place].score for run in own])) for place in places]
        apart = difference(*({run.combination.seed: run.score for run in each} for each in (own, runs[base])))
        shown = ["–", "–"] if name == base or apart is None else [words.signed(apart.mean), words.interval(apart)]
        lines.append([name, *scores, *shown])
    return [f"| {' | '.join(line)} |" for line in lines]


def main(runs: Path = Path("runs/starts"), out: Path | None = None, jobs: int = 2) -> None:
    """Print the tables

    Args:
        runs: Folder of the runs.
        out: Folder for table.md and table.json.
        jobs: Runs at once.
    """
    before = {join: Plan(replace(PRETRAINED, join=join), runs / f"pretrained-{join}") for join in JOINS}
    trained(list(before.values()), jobs)

    def tuned(base: Experiment, kind: str, name: str, join: str | None, names: dict[str, str]) -> list[Plan]:
        weights = str(before[join].folder / "last.pt") if join else None
        return [
            Plan(replace(base, seed=seed, weights=weights, **names), runs / f"{kind}-{name.replace(', ', '-')}-{seed}")
            for seed in SEEDS
        ]

    starts = {name: tuned(TUNED, "start", name, *given) for name, given in STARTS.items()}
    larger = {join: tuned(LARGER, "larger", join, join, {"join": join}) for join in JOINS}
    trained([plan for kind in (starts, larger) for plans in kind.values() for plan in plans], jobs)
    lines, found = [], {}
    for title, kind, base in (("starts", starts, "default, as it is"), ("resolution", larger, "default")):
        found[title] = {name: [read_result(plan.folder).run for plan in plans] for name, plans in kind.items()}
        lines += [f"{title.capitalize()}, {len(SEEDS)} seeds:", "", *table(found[title], base), ""]
    record = provenance()
    scores = ", ".join(f"{join} {read_result(plan.folder).run.score:.2f} %" for join, plan in before.items())
    lines += [f"Before: {scores}.", "", f"`{record['command']}` at commit {record['commit']}, {record['machine']}"]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if out:
        plain = {
            title: {name: [[*run.combination, *run.curve] for run in own] for name, own in kind.items()}
            for title, kind in found.items()
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text)
        (out / "table.json").write_text(json.dumps({"provenance": record, "runs": plain}, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main)
