"""What the paper's Tables 5 to 8 report of DeiT on ImageNet; Tables 7 and 8 from the recipes of their rows."""

from collections.abc import Mapping
from typing import NamedTuple

from lape import recipes
from lape.studies.statistics import Way
from lape.studies.study import Study, combination


class TrainingCost(NamedTuple):
    """A row of Tables 5 and 6: the default join's, then LaPE's."""

    parameters: tuple[float, float]  # millions
    memory: tuple[int, int]  # MB on each of 4 or 8 V100
    seconds: tuple[int, int]  # an epoch


COSTS = {
    "deit_tiny_patch16_224": TrainingCost((5.717, 5.722), (10799, 10822), (410, 412)),
    "deit_small_patch16_224": TrainingCost((22.051, 22.06), (18051, 18073), (511, 516)),
    "deit_base_patch16_224": TrainingCost((86.568, 86.586), (19489, 19537), (588, 590)),
}


def joining() -> Mapping[tuple[Way, str], float]:
    """Return top-1 accuracy in percent by way of joining and table."""
    rows = [
        recipes.load(path.relative_to(recipes.HERE).with_suffix("").as_posix())
        for path in sorted(recipes.HERE.glob("table[78]/*.yaml"))
    ]
    accuracies = {}
    for row in rows:
        way, pe, _ = combination(row.experiment())
        accuracies[way, pe] = row.expected["accuracy"][way.join]
    return accuracies


def of_recipe(study: Study) -> Mapping[tuple[Way, str], float]:
    """Return what the paper expects of the runs themselves, where these are of its recipes and nothing was changed."""
    scores = {}
    for (way, pe, _), result in study.results.items():
        experiment = result.experiment
        if experiment.recipe is None:
            continue
        recipe = recipes.load(experiment.recipe)
        expected = recipe.expected.get(result.run.measure, {}).get(way.join)
        if expected is not None and not recipe.changed(experiment):
            scores[way, pe] = expected
    return scores
