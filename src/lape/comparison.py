"""Every combination of join, position table and seed, trained side by side, each at most once per folder."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.checkpoints import RESULT
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.measures import TITLES
from lape.parallel import Done, side_by_side
from lape.statistics import Combination, Gap, Point, Row, Run, gaps, rows

if TYPE_CHECKING:
    from torch import nn

    from lape.training import Progress


@dataclass(frozen=True)
class Plan:
    """One run to be had, and the folder that is its own."""

    combination: Combination
    experiment: Experiment
    folder: Path


@dataclass(frozen=True)
class Result:
    """A finished run: its numbers, its folder, and all that `result.json` says."""

    run: Run
    folder: Path
    record: Mapping[str, Any]


class Watch:
    """Is told how a comparison goes; this one does nothing with it."""

    def begins(self, kept: Sequence[Combination], todo: Sequence[Combination], jobs: int) -> None:
        """`kept` are finished from an earlier call, `todo` are about to be trained, `jobs` at a time."""

    def moves(self, combination: Combination, progress: "Progress") -> None:
        """A run has come so far."""

    def ends(self, combination: Combination, outcome: Result | Exception) -> None:
        """A run is finished, or has failed."""


@dataclass(frozen=True)
class Comparison:
    """What was asked for and what came of it."""

    base: Experiment
    images: tuple[int, int]  # for training, for validation
    joins: tuple[str, ...]
    pes: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    command: str
    results: Mapping[Combination, Result]  # tables outside, then joins, then seeds
    failures: Mapping[Combination, Exception]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row for each join and table of which a run is finished."""
        return rows(result.run for result in self.results.values())

    @cached_property
    def gaps(self) -> tuple[Gap, ...]:
        """The distance between the tables under each join."""
        return gaps(self.rows)

    @property
    def measure(self) -> str:
        """What the runs are scored by."""
        return self.rows[0].measure

    def of(self, join: str, pe: str) -> list[Result]:
        """Return the finished runs of one join with one table, by seed."""
        return [result for (j, p, _), result in self.results.items() if (j, p) == (join, pe)]

    def provenances(self) -> list[dict[str, Any]]:
        """Return the distinct commits, versions and machines of the runs: more than one where runs were kept."""
        records = [
            {key: result.record[key] for key in ("commit", "versions", "machine")} for result in self.results.values()
        ]
        return [record for place, record in enumerate(records) if record not in records[:place]]

    def raise_failures(self) -> None:
        """Raise one error for all failed runs: UsageError where every one of them was a wrong request."""
        if not self.failures:
            return
        told = "\n".join(f"{combination}: {error}" for combination, error in self.failures.items())
        usage = all(isinstance(error, UsageError) for error in self.failures.values())
        asked = len(self.results) + len(self.failures)
        raise (UsageError if usage else RunError)(f"{len(self.failures)} of {asked} runs failed.\n{told}")


def seeds_of(given: Sequence[int]) -> tuple[int, ...]:
    """Read `--seeds`: one number counts (5 is 0, 1, 2, 3, 4), several are the seeds themselves."""
    if len(given) == 1 and given[0] > 0:
        return tuple(range(given[0]))
    if len(given) > 1 and len(set(given)) == len(given) and min(given) >= 0:
        return tuple(given)
    raise UsageError(
        f"seeds is how many (5 means 0 to 4), or two and more different seeds from 0 on; "
        f"{' '.join(map(str, given)) or 'nothing'} was received. Use for instance --seeds 3, or --seeds 0 7 21."
    )


def plans(
    base: Experiment, joins: Sequence[str], pes: Sequence[str], seeds: Sequence[int], out: Path
) -> tuple[Plan, ...]:
    """Return the runs, seeds outside and joins inside, so that runs which are paired are trained side by side.

    `pe_norm` and `start` are given to the joins that have PE norms. Raises UsageError for a name twice, a misspelt name
    and a combination that means nothing, before anything is trained.
    """
    from lape.method import JOINS, scheme

    for what, names in (("joins", joins), ("pe", pes)):
        if len(set(names)) < len(names) or not names:
            given = " ".join(names) or "nothing"
            raise UsageError(f"{what} lists names, at least one and none twice; {given} was received.")
    made = []
    for seed, pe, join in product(seeds, pes, joins):
        normed = join not in JOINS or JOINS[join].normed
        norm, start = (base.pe_norm, base.start) if normed else ("layernorm", "fresh")
        scheme(join, pe, norm, start)
        experiment = replace(base, join=join, pe=pe, pe_norm=norm, start=start, seed=seed, devices=1)
        # The folder's name holds what the result depends on: other settings are another run and lose nothing.
        folder = out / "runs" / f"{join}-{pe}-seed{seed}-{experiment.fingerprint()[:8]}"
        made.append(Plan(Combination(join, pe, seed), experiment, folder))
    return tuple(made)


def compare(
    base: Experiment,
    joins: Sequence[str],
    pes: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    jobs: int | None = None,
    watch: Watch = Watch(),  # noqa: B008 (it holds nothing)
) -> Comparison:
    """Train what is not finished yet under `out`/runs, going on where a run was cut off, and return all results.

    `jobs` runs go on at once, by default one for every core, or one alone where there is CUDA. A run that fails is
    told in `failures` and costs no other run. Ctrl-C leaves everything so that the same call goes on.

    Raises UsageError for a request that means nothing, RunError for a `result.json` that cannot be read.
    """
    from lape.data import sources

    todo = plans(base, joins, pes, seeds, out)
    if base.devices not in (1, "auto") or base.nodes != 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"compare trains each run on one device, several runs at once; devices={base.devices}, nodes={base.nodes} "
            "was received. Leave devices and nodes at 1, start it without torchrun, and set jobs."
        )
    source = sources.of(base)  # once, before several processes would download the same files
    results = {plan.combination: _kept(plan) for plan in todo if (plan.folder / RESULT).exists()}
    failures: dict[Combination, Exception] = {}
    todo = tuple(plan for plan in todo if plan.combination not in results)
    jobs, threads = _share(jobs, base)
    watch.begins(list(results), [plan.combination for plan in todo], jobs)
    # Ctrl-C may be heard in `watch` too: the processes end at once, not when the iterator is collected.
    with closing(side_by_side(train_one, todo, jobs, threads)) as events:
        for event in events:
            combination = event.task.combination
            if not isinstance(event, Done):
                watch.moves(combination, event.news)
                continue
            if event.error is None:
                outcome = results[combination] = read(event.task.folder)
            else:
                outcome = failures[combination] = event.error
            watch.ends(combination, outcome)
    order = [Combination(join, pe, seed) for pe, join, seed in product(pes, joins, seeds)]
    return Comparison(
        base=base,
        images=(len(source.train), len(source.validation)),
        joins=tuple(joins),
        pes=tuple(pes),
        seeds=tuple(seeds),
        jobs=jobs,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        results={combination: results[combination] for combination in order if combination in results},
        failures={combination: failures[combination] for combination in order if combination in failures},
    )


def _kept(plan: Plan) -> Result:
    from lape.checkpoints import refuse_other

    result = read(plan.folder)
    refuse_other(plan.folder / RESULT, result.record["experiment"], plan.experiment)
    return result


def read(folder: Path) -> Result:
    """Read the `result.json` of a finished run; raise RunError where it is not what a run writes."""
    path = folder / RESULT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        asked, score = record["experiment"], record["score"]
        run = Run(
            Combination(asked["join"], asked["pe"], asked["seed"]),
            measure=TITLES[score],
            score=record["final"][score],
            curve=tuple(Point(row["epoch"], row["step"], row[score]) for row in record["curve"]),
            parameters=record["parameters"],
            seconds_per_step=record["seconds_per_step"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not the result of a finished run ({type(error).__name__}: {error}). "
            "Move its folder away, and the same command trains this run again."
        ) from None
    return Result(run, folder, record)


def trained(result: Result) -> "nn.Module":
    """Return the model of a finished run as its last score was taken: the weights, or their average (EMA)."""
    from lape import checkpoints
    from lape.data.sources import find
    from lape.evaluation import judged_weights
    from lape.work import work_of

    experiment = Experiment.of(result.record["experiment"])
    model = work_of(experiment, find(experiment.data, experiment.data_dir)).module
    path = result.folder / checkpoints.LAST
    saved = checkpoints.read(path)
    checkpoints.load(model, judged_weights(saved), path)
    return model.eval()


def _share(jobs: int | None, base: Experiment) -> tuple[int, int]:
    """Return how many runs go on at once, and the threads of each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        jobs = 1 if base.accelerator != "cpu" and torch.cuda.is_available() else cores
    if jobs < 1:
        raise UsageError(f"jobs is how many runs go on at once, 1 or more; {jobs} was received.")
    return jobs, max(1, cores // jobs)


def train_one(plan: Plan, tell: Callable[["Progress"], None]) -> None:
    """Train one run to its end, or go on with it where it was cut off."""
    from lape.training import train

    train(plan.experiment, plan.folder, resume=True, report=tell)
