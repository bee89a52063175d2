"""What the paper's Tables 7 and 8 report of DeiT-Ti on ImageNet, from the recipes of their rows."""

from collections.abc import Mapping

from lape import recipes
from lape.statistics import Way
from lape.study import Study, combination


def joining() -> Mapping[tuple[Way, str], float]:
    """Return top-1 accuracy in percent by way of joining and table."""
    rows = [
        recipes.load(path.relative_to(recipes.HERE).with_suffix("").as_posix())
        for path in sorted(recipes.HERE.glob("table[78]/*.yaml"))
    ]
    found = {}
    for row in rows:
        way, pe, _ = combination(row.experiment())
        found[way, pe] = row.expected["accuracy"][way.join]
    return found


def of_recipe(study: Study) -> Mapping[tuple[Way, str], float]:
    """Return what the paper expects of the runs themselves, where these are of its recipes and nothing was changed."""
    found = {}
    for (way, pe, _), result in study.results.items():
        experiment = result.experiment
        if experiment.recipe is None:
            continue
        recipe = recipes.load(experiment.recipe)
        expected = recipe.expected.get(result.run.measure, {}).get(way.join)
        if expected is not None and not recipe.changed(experiment):
            found[way, pe] = expected
    return found
