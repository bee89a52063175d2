"""Finished runs as files say them, with numbers of our own making: what comparison and report are tested on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lape.comparison import Comparison, read
from lape.experiment import Experiment
from lape.statistics import Combination

BASE = Experiment(epochs=6, model_args={"embed_dim": 8, "depth": 2, "num_heads": 2})
Curve = Callable[[str, str, int], Sequence[float]]


def write_run(
    folder: Path, combination: Combination, accuracies: Sequence[float], base: Experiment = BASE, **other: object
) -> None:
    """Write the result of a run whose validation accuracy after each epoch is given; an epoch has 10 steps."""
    experiment = replace(base, join=combination.join, pe=combination.pe, seed=combination.seed)
    curve = [
        {"epoch": epoch, "step": 10 * epoch, "lr": 1e-3, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": accuracy}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    record = {
        "experiment": experiment.settings(),
        "command": "lape compare",
        "commit": "0123abc",
        "versions": {"lape": "0.1.0", "torch": "2.15.0"},
        "machine": "a machine, 2 cores",
        "parameters": 1000 + 24 * (combination.join == "lape"),
        "steps": 10 * len(curve),
        "seconds_per_step": 0.0125,
        "score": "val_accuracy",
        "curve": curve,
        "final": {"val_accuracy": curve[-1]["val_accuracy"], "val_loss": 1.0},
        "best": {"epoch": len(curve)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record | other), encoding="utf-8")


def comparison_of(
    folder: Path,
    finals: Mapping[tuple[str, str], Mapping[int, float]],
    base: Experiment = BASE,
    failures: Mapping[Combination, Exception] | None = None,
    jobs: int = 2,
    curve: Callable[[float], Sequence[float]] = lambda final: [final - 50, final - 30, final - 10, final],
) -> Comparison:
    """Return a comparison whose accuracies by (join, table) and seed are given; each curve ends on the final one."""
    results = {}
    for (join, pe), by_seed in finals.items():
        for seed, final in by_seed.items():
            combination = Combination(join, pe, seed)
            write_run(folder / str(combination), combination, curve(final), base)
            results[combination] = read(folder / str(combination))
    failures = failures or {}
    every = [*results, *failures]
    return Comparison(
        base=base,
        images=(1198, 599),
        joins=tuple(dict.fromkeys(join for join, _, _ in every)),
        pes=tuple(dict.fromkeys(pe for _, pe, _ in every)),
        seeds=tuple(sorted({seed for _, _, seed in every})),
        jobs=jobs,
        command="lape compare --data digits",
        results=results,
        failures=failures,
    )
