"""Every combination of way of joining, position table and seed, trained side by side, each at most once per folder."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.errors import UsageError, choose
from lape.experiment import Experiment
from lape.files import writing
from lape.studies.parallel import Done, side_by_side
from lape.studies.statistics import BASELINE, LAPE, Combination, Way
from lape.studies.study import LeftOut, Result, Study, read_result
from lape.training.checkpoints import RESULT

if TYPE_CHECKING:
    from lape.data.sources import Source
    from lape.training.progress import Progress


@dataclass(frozen=True)
class Plan:
    """One run to train, and its folder."""

    combination: Combination
    experiment: Experiment
    folder: Path


class Watch:
    """Is told how a comparison goes; this one does nothing with it."""

    def begins(self, kept: Sequence[Combination], todo: Sequence[Combination], jobs: int) -> None:
        """`kept` are finished from an earlier call, `todo` are about to be trained, `jobs` at a time."""

    def moves(self, combination: Combination, progress: "Progress") -> None:
        """A run has come so far."""

    def ends(self, combination: Combination, outcome: Result | Exception) -> None:
        """A run is finished, or has failed."""


def seeds_of(numbers: Sequence[int]) -> tuple[int, ...]:
    """Read `--seeds`: one number counts (5 is 0, 1, 2, 3, 4), several are the seeds themselves."""
    if len(numbers) == 1 and numbers[0] > 0:
        return tuple(range(numbers[0]))
    if len(numbers) > 1 and len(set(numbers)) == len(numbers) and min(numbers) >= 0:
        return tuple(numbers)
    raise UsageError(
        f"seeds is how many (5 means 0 to 4), or two and more different seeds from 0 on; "
        f"{' '.join(map(str, numbers)) or 'nothing'} was received. Use for instance --seeds 3, or --seeds 0 7 21."
    )


@dataclass(frozen=True)
class Factors:
    """What a comparison varies: every sound combination of these names is trained."""

    joins: Sequence[str]
    pes: Sequence[str]
    seeds: Sequence[int]
    pe_norms: Sequence[str] = (LAPE.pe_norm,)
    starts: Sequence[str] = (LAPE.start,)

    def ways(self) -> tuple[Way, ...]:
        """Return the ways of joining: those without PE norms once, the others with every stand-in and start.

        Raises UsageError for a name twice, and for a misspelt one.
        """
        from lape.method import JOINS, POSITION_EMBEDDINGS, POSITION_NORMS, STARTS

        lists = (
            ("joins", self.joins, JOINS, "a join"),
            ("pe", self.pes, POSITION_EMBEDDINGS, "a position embedding (pe)"),
            ("pe_norm", self.pe_norms, POSITION_NORMS, "a PE norm (pe_norm)"),
            ("start", self.starts, STARTS, "a start"),
        )
        for what, names, there_are, kind in lists:
            if len(set(names)) < len(names) or not names:
                received = " ".join(names) or "nothing"
                raise UsageError(f"{what} lists names, at least one and none twice; {received} was received.")
            for name in names:
                choose(there_are, name, kind)
        return tuple(
            Way(join, norm, start)
            for join in self.joins
            for start, norm in (product(self.starts, self.pe_norms) if JOINS[join].normed else [BASELINE[:0:-1]])
        )


def plans(base: Experiment, factors: Factors, out: Path) -> tuple[list[Plan], LeftOut]:
    """Return the runs, and the combinations that mean nothing, by the reason.

    Seeds are outside and ways inside, so that runs which are paired are trained side by side. Raises UsageError as
    `ways` does, and for a name of which nothing sound is left, before anything is trained.
    """
    from lape.method import scheme

    runs: list[Plan] = []
    left_out: dict[str, dict[tuple[Way, str], None]] = {}
    for seed, pe, way in product(factors.seeds, factors.pes, factors.ways()):
        try:
            scheme(*Combination(way, pe, seed).names)  # pyright: ignore[reportArgumentType]  # pe is named
        except UsageError as error:
            left_out.setdefault(str(error), {})[way, pe] = None
            continue
        experiment = replace(base, **way._asdict(), pe=pe, seed=seed, devices=1)
        # The folder's name holds what the result depends on: other settings are another run and lose nothing.
        names = (way.join, *way.other_than_usual, pe, f"seed{seed}", experiment.fingerprint()[:8])
        runs.append(Plan(Combination(way, pe, seed), experiment, out / "runs" / "-".join(names)))
    _refuse_idle(factors, runs, left_out)
    return runs, {reason: tuple(pairs) for reason, pairs in left_out.items()}


def _refuse_idle(factors: Factors, runs: Sequence[Plan], left_out: Mapping[str, Iterable[tuple[Way, str]]]) -> None:
    """Raise UsageError where a name that was given is in no run."""
    from lape.method import scheme

    used = {name for plan in runs for name in (*plan.combination.way, plan.combination.pe)} | {*LAPE[1:]}
    for name in (*factors.joins, *factors.pes):
        if name not in used:
            raise UsageError(next(why for why, pairs in left_out.items() for way, pe in pairs if name in (*way, pe)))
    for norm, start in product(factors.pe_norms, factors.starts):
        if not {norm, start} <= used:  # of the joins, none has PE norms
            scheme(runs[0].combination.way.join, runs[0].combination.pe, norm, start)


def compare(
    base: Experiment,
    factors: Factors,
    out: Path,
    jobs: int | None = None,
    watch: Watch = Watch(),  # noqa: B008 (it holds nothing)
) -> Study:
    """Train what is not finished yet under `out`/runs, going on where a run was cut off, and return all results.

    `jobs` runs go on at once, by default one for every core, or one alone where there is CUDA. A run that fails is
    told in `failures` and costs no other run. Ctrl-C and SIGTERM leave everything so that the same call goes on.

    Raises UsageError for a request that cannot be met, and for a finished run of other data; RunError for a
    `result.json` that cannot be read; Stopped after SIGTERM.
    """
    from lape.training.contents import contents
    from lape.training.interruption import stopped_by_sigterm

    todo, left_out = plans(base, factors, out)
    if base.devices not in (1, "auto") or base.nodes != 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"compare trains each run on one device, several runs at once; devices={base.devices}, nodes={base.nodes} "
            "was received. Leave devices and nodes at 1, start it without torchrun, and set jobs."
        )
    writing.make_folder(out)
    for plan in todo:
        writing.refuse_links(out, plan.folder)
    source = _whole(base)  # once, before several processes would download the same files
    here = contents(source)
    results = {plan.combination: _kept(plan, here) for plan in todo if (plan.folder / RESULT).exists()}
    failures: dict[Combination, Exception] = {}
    todo = [plan for plan in todo if plan.combination not in results]
    jobs, threads = _share(jobs, base)
    watch.begins(list(results), [plan.combination for plan in todo], jobs)
    # A signal may be heard in `watch` too: the processes end at once, not when the iterator is collected.
    stopped = stopped_by_sigterm("Stopped. The same command goes on from here.")
    with stopped, closing(side_by_side(_train, todo, jobs, threads)) as events:
        for event in events:
            combination = event.task.combination
            if not isinstance(event, Done):
                watch.moves(combination, event.report)
                continue
            if event.error is None:
                outcome = results[combination] = read_result(event.task.folder)
            else:
                outcome = failures[combination] = event.error
            watch.ends(combination, outcome)
    order = [Combination(way, pe, seed) for pe, way, seed in product(factors.pes, factors.ways(), factors.seeds)]
    return Study(
        results={combination: results[combination] for combination in order if combination in results},
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        failures={combination: failures[combination] for combination in order if combination in failures},
        left_out=left_out,
        images=(len(source.train), len(source.validation)),
        jobs=jobs,
    )


def _whole(base: Experiment) -> "Source":
    """Return the set as each of the runs will have it."""
    from lape.data.files import unreadable
    from lape.data.sources import set_of

    source = set_of(base)
    return source.without(tuple(unreadable(source, lambda _: None))) if base.skip_unreadable else source


def _kept(plan: Plan, here: Mapping[str, Any]) -> Result:
    from lape.training.checkpoints import refuse_other, refuse_other_data

    path, result = plan.folder / RESULT, read_result(plan.folder)
    refuse_other(path, result.record["experiment"], plan.experiment)
    refuse_other_data(path, result.record, here, plan.experiment)
    return result


def _share(jobs: int | None, base: Experiment) -> tuple[int, int]:
    """Return how many runs go on at once, and the threads of each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        jobs = 1 if base.accelerator != "cpu" and torch.cuda.is_available() else cores
    if jobs < 1:
        raise UsageError(f"jobs is how many runs go on at once, 1 or more; {jobs} was received.")
    return jobs, max(1, cores // jobs)


def _train(plan: Plan, tell: Callable[["Progress"], None]) -> None:
    from lape.training.loop import train

    train(plan.experiment, plan.folder, resume=True, report=tell)
