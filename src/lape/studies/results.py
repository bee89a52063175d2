"""All results of recipes beside the paper's numbers: mean and spread over seeds, and what was run otherwise."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape import recipes
from lape.errors import RunError, UsageError
from lape.recipes import Recipe
from lape.studies import study
from lape.studies.statistics import Sample
from lape.studies.study import Result
from lape.tasks.measures import TITLES
from lape.training.checkpoints import RESULT


@dataclass(frozen=True)
class RecipeRow:
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
    """What lies below some folders: rows of recipes, finished runs of no recipe, and for each in neither why."""

    rows: tuple[RecipeRow, ...]
    others: tuple[Path, ...]
    left_out: Mapping[Path, str]


def find_results(folders: Sequence[Path]) -> Results:
    """Gather every `result.json` below the folders.

    One that cannot be read, whose recipe cannot or expects another measure, or that is there twice is left out, and
    said. Raises UsageError where there is none.
    """
    groups: dict[str, dict[int, Result]] = {}
    others: list[Path] = []
    left_out: dict[Path, str] = {}
    for file in study.result_files(folders):
        try:
            result = study.read_result(file.parent)
        except RunError as error:
            left_out[file.parent] = str(error)
            continue
        experiment = result.experiment
        if experiment.recipe is None:
            others.append(file)
            continue
        unseeded = {name: value for name, value in experiment.identity().items() if name != "seed"}
        measures = sorted(result.record["final"])
        key = json.dumps([experiment.recipe, unseeded, result.record.get("contents"), measures], sort_keys=True)
        first = groups.setdefault(key, {}).setdefault(experiment.seed, result)
        if first is not result:
            left_out[file.parent] = (
                f"Seed {experiment.seed} of one experiment is there twice; {first.folder} stands for both."
            )
    rows: list[RecipeRow] = []
    for by_seed in groups.values():
        try:
            rows += _rows(by_seed)
        except UsageError as error:
            reason = f"{RESULT} names a recipe that cannot stand beside it. {error}"
            left_out |= dict.fromkeys((result.folder for result in by_seed.values()), reason)
    return Results(tuple(sorted(rows, key=_place)), tuple(others), left_out)


def _rows(by_seed: Mapping[int, Result]) -> list[RecipeRow]:
    seeds = tuple(sorted(by_seed))
    runs = [by_seed[seed] for seed in seeds]
    experiment = runs[0].experiment
    recipe = recipes.load(experiment.recipe or "")
    changed = recipe.changed(experiment)
    finals = [result.record["final"] for result in runs]
    kept = {TITLES[name]: name for name in finals[0] if name in TITLES}
    scored = runs[0].run.measure
    if foreign := [measure for measure in recipe.expected if measure not in kept]:
        raise UsageError(
            f"{recipe.name} expects a number of {foreign[0]}, and the run in {runs[0].folder} has "
            f"{', '.join(kept)}. Mend `expected` in the recipe."
        )
    return [
        RecipeRow(
            recipe,
            experiment.join,
            measure,
            seeds,
            score=Sample.of([final[kept[measure]] for final in finals]),
            expected=None if changed else by_join.get(experiment.join),
            changed=changed,
            places=tuple(result.folder for result in runs),
        )
        for measure, by_join in (recipe.expected or {scored: {}}).items()
    ]


def _place(row: RecipeRow) -> tuple[Any, ...]:
    return row.recipe.table, row.recipe.name, bool(row.changed), row.join
