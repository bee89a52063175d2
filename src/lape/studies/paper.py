"""What is published: the paper's Tables 5 to 8 of DeiT on ImageNet, and what its successor measured of LaPE anew."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from lape import recipes
from lape.studies.statistics import BASELINE, LAPE, Way
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


class Replication(NamedTuple):
    """A model that others trained anew, and its scores by each join in percent."""

    name: str
    measure: str
    pe: str
    default: float
    lape: float
    pvg: float
    mpvg: float

    @property
    def scores(self) -> Mapping[tuple[Way, str], float]:
        """The scores by way of joining and table."""
        ways = BASELINE, LAPE, Way("pvg"), Way("mpvg")
        return {(way, self.pe): score for way, score in zip(ways, self[3:], strict=True)}


# Lee, Ham and Kim (MPVG), AAAI 2025, arXiv 2502.02919: on ImageNet, COCO and ADE20K; classifiers without class token.
DEIT_TI = Replication("DeiT-Ti", "accuracy", "learnable", 72.14, 72.94, 73.17, 73.51)
REPLICATIONS: Mapping[str, Replication] = {
    "deit_tiny_patch16_224": DEIT_TI,
    "deit_small_patch16_224": Replication("DeiT-S", "accuracy", "learnable", 79.81, 80.39, 80.38, 80.61),
    "deit_base_patch16_224": Replication("DeiT-B", "accuracy", "learnable", 81.85, 82.15, 82.21, 82.42),
    "swin_tiny_patch4_window7_224": Replication("Swin-Ti", "accuracy", "learnable", 81.37, 81.48, 81.52, 81.64),
    "ceit_tiny_patch16_224": Replication("CeiT-Ti", "accuracy", "learnable", 76.62, 76.89, 77.14, 77.20),
    "t2t_vit_7": Replication("T2T-ViT-7", "accuracy", "sinusoidal-1d", 71.76, 72.01, 71.91, 72.28),
    "mask_rcnn_vit_adapter_tiny": Replication("ViT-Adapter-Ti", "box AP", "learnable", 45.9, 46.2, 46.1, 46.5),
    "upernet_vit_adapter_tiny": Replication("ViT-Adapter-Ti", "mIoU", "learnable", 40.55, 41.42, 41.07, 41.69),
}


def replication(study: Study) -> Replication | None:
    """Return what others measured of a study's model, of DeiT-Ti where they did not; None by another measure."""
    found = REPLICATIONS.get(study.experiment.model, DEIT_TI)
    return found if found.measure == study.measure else None


@cache
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
    return MappingProxyType(accuracies)


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
