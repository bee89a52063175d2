"""All results of recipes beside the paper's numbers: mean and spread over seeds, and what was run otherwise."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape import recipes
from lape.errors import UsageError
from lape.experiment import Experiment
from lape.recipes import Recipe
from lape.studies import study
from lape.studies.statistics import Sample
from lape.tasks.measures import TITLES


@dataclass(frozen=True)
class Row:
    """The runs of one recipe under one join, made with the same settings, by one measure."""

    recipe: Recipe
    join: str
    measure: str
    seeds: tuple[int, ...]
    score: Sample  # after the last step
    expected: float | None  # the paper's, where it has this row and the settings are the recipe's
    changed: Mapping[str, Any]  # settings that are not the recipe's
    places: tuple[Path, ...]


@dataclass(frozen=True)
class Results:
    """What lies below some folders: rows of recipes, and finished runs of no recipe."""

    rows: tuple[Row, ...]
    others: tuple[Path, ...]


def find(folders: Sequence[Path]) -> Results:
    """Gather every `result.json` below the folders.

    Raises UsageError where there is none, or two of the same experiment; RunError for one that cannot be read.
    """
    groups: dict[str, list[tuple[Experiment, Mapping[str, Any], Path]]] = {}
    others: list[Path] = []
    for file in study.files(folders):
        result = study.read(file.parent)
        record, experiment = result.record, result.experiment
        if experiment.recipe is None:
            others.append(file)
            continue
        unseeded = {name: value for name, value in experiment.identity().items() if name != "seed"}
        key = json.dumps([experiment.recipe, unseeded], sort_keys=True)
        groups.setdefault(key, []).append((experiment, record, file))
    rows = [row for runs in groups.values() for row in _rows(runs)]
    return Results(tuple(sorted(rows, key=_place)), tuple(others))


def _rows(runs: Iterable[tuple[Experiment, Mapping[str, Any], Path]]) -> list[Row]:
    runs = sorted(runs, key=lambda run: run[0].seed)
    seeds = tuple(experiment.seed for experiment, _, _ in runs)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        places = ", ".join(str(file) for experiment, _, file in runs if experiment.seed == twice)
        raise UsageError(f"Seed {twice} of one experiment is there twice, and would count twice: {places}. Leave one.")
    experiment = runs[0][0]
    try:
        recipe = recipes.load(experiment.recipe or "")
    except UsageError as error:
        raise UsageError(f"{runs[0][2]}: {error}") from error
    changed = recipe.changed(experiment)
    finals = [record["final"] for _, record, _ in runs]
    kept = {TITLES[name]: name for name in finals[0] if name in TITLES}
    scored = TITLES[runs[0][1]["score"]]
    if foreign := [measure for measure in recipe.expected if measure not in kept]:
        raise UsageError(
            f"{recipe.name} expects a number of {foreign[0]}, and the run in {runs[0][2].parent} has "
            f"{', '.join(kept)}. Mend `expected` in the recipe."
        )
    return [
        Row(
            recipe,
            experiment.join,
            measure,
            seeds,
            score=Sample.of([final[kept[measure]] for final in finals]),
            expected=None if changed else by_join.get(experiment.join),
            changed=changed,
            places=tuple(file.parent for _, _, file in runs),
        )
        for measure, by_join in (recipe.expected or {scored: {}}).items()
    ]


def _place(row: Row) -> tuple[Any, ...]:
    return row.recipe.table, row.recipe.name, bool(row.changed), row.join
