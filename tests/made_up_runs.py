"""Finished runs as files say them, with numbers of our own making: what comparison, claims and report are tested on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lape.analysis import Shape
from lape.experiment import Experiment
from lape.studies.statistics import Combination, Way
from lape.studies.study import RunAnalysis, Study, read_result

CONTENTS = {  # chance is 10 %
    "classes": [f"class {place}" for place in range(10)],
    "train": {"pictures": 1198, "digest": "0" * 32},
    "validation": {"pictures": 599, "digest": "1" * 32},
}
BASE = Experiment(epochs=6, model_args={"embed_dim": 8, "depth": 2, "num_heads": 2})
Ways = Mapping[tuple[Way | str, str], Mapping[int, float]]  # a join's name stands for its usual way


def write_run(
    folder: Path, combination: Combination, accuracies: Sequence[float], base: Experiment = BASE, **other: object
) -> None:
    """Write the result of a run whose validation accuracy after each epoch is given; an epoch has 10 steps."""
    experiment = replace(base, **combination.way._asdict(), pe=combination.pe, seed=combination.seed)
    curve = [
        {"epoch": epoch, "step": 10 * epoch, "lr": 1e-3, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": accuracy}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    record = {
        "experiment": experiment.settings(),
        "contents": CONTENTS,
        "command": "lape compare",
        "commit": "0123abc",
        "versions": {"lape": "0.1.0", "torch": "2.15.0"},
        "machine": "a machine, 2 cores",
        "parameters": 1000 + 24 * (combination.way.join == "lape"),
        "steps": 10 * len(curve),
        "seconds_per_step": 0.0125,
        "score": "val_accuracy",
        "curve": curve,
        "final": {"val_accuracy": curve[-1]["val_accuracy"], "val_loss": 1.0},
        "best": {"epoch": len(curve)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record | other), encoding="utf-8")


def study_of(
    folder: Path,
    finals: Ways,
    base: Experiment = BASE,
    failures: Mapping[Combination, Exception] | None = None,
    jobs: int = 2,
    curve: Callable[[float], Sequence[float]] = lambda final: [final - 50, final - 30, final - 10, final],
) -> Study:
    """Return a study whose accuracies by (way, table) and seed are given; each curve ends on the final one."""
    results = {}
    for (way, pe), by_seed in finals.items():
        for seed, final in by_seed.items():
            combination = Combination(Way(way) if isinstance(way, str) else way, pe, seed)
            write_run(folder / str(combination), combination, curve(final), base)
            results[combination] = read_result(folder / str(combination))
    return Study(
        results=results,
        command="lape compare --data digits",
        failures=failures or {},
        images=(1198, 599),
        jobs=jobs,
    )


def analysis_of(
    two_dimensionality: float = 0.5,
    layer_difference: float = 0.1,
    half_distance: Sequence[float] = (1.0, 2.0, 3.0),
    lambda2: Sequence[float] | None = None,
    width: int = 4,
) -> RunAnalysis:
    """Return an analysis of as many layers as there are half distances."""
    alike, apart = ((number,) * len(half_distance) for number in (two_dimensionality, layer_difference))
    weights = None if lambda2 is None else tuple(tuple(some) for some in ([0.9] * len(lambda2), lambda2, lambda2))
    shape = Shape(two_dimensionality, half_distance[0], layer_difference)
    return RunAnalysis(width, alike, tuple(half_distance), apart, shape, weights)
