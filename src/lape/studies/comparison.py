"""Every combination of way of joining, position embedding and seed, trained side by side, each at most once per folder.

Several processes may share a folder: each run is trained by the one that holds the lock of its folder.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.errors import UsageError, choose
from lape.experiment import Experiment
from lape.files import writing
from lape.files.locks import Occupied, occupant, working_in
from lape.studies.parallel import Done, side_by_side
from lape.studies.places import Memory, Places, cards, memory
from lape.studies.statistics import BASELINE, LAPE, Combination, Way
from lape.studies.study import VARIED, LeftOut, Result, Study, gather, read_result
from lape.training.checkpoints import LAST, RESULT, SETTINGS, other_settings, refuse_other, refuse_other_data

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

    def elsewhere(self, combination: Combination, occupied: Occupied) -> None:
        """A run is trained by another process, which may share the folder from another machine."""


def seeds_of(numbers: Sequence[int] | None = None, listed: Sequence[int] | None = None) -> tuple[int, ...]:
    """Read `--seeds`, one number that counts (5 is 0, 1, 2, 3, 4) or several seeds, and `--seed_list`, seeds alone."""
    if numbers is not None and listed is not None:
        raise UsageError(
            f"seeds and seed_list both say which seeds there are; {_typed(numbers)} and {_typed(listed)} were "
            "received. Leave one of them out."
        )
    if listed is None and numbers is None:
        return tuple(range(8))
    if listed is None and numbers is not None and len(numbers) == 1 and numbers[0] > 0:
        return tuple(range(numbers[0]))
    seeds = tuple(numbers or () if listed is None else listed)
    if len(seeds) > (listed is None) and len(set(seeds)) == len(seeds) and min(seeds) >= 0:
        return seeds
    rule = (
        "seeds is how many (5 means 0 to 4), or two and more different seeds from 0 on"
        if listed is None
        else "seed_list is different seeds from 0 on, one or more"
    )
    raise UsageError(
        f"{rule}; {_typed(seeds) or 'nothing'} was received. Use for instance --seeds 3, --seeds 0 7 21, or "
        "--seed_list 7 for the seed 7 alone."
    )


def _typed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


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


class Queue:
    """Hands out runs that are not finished and that nobody works on; what others work on is looked at again later."""

    def __init__(self, plans: Iterable[Plan], watch: Watch) -> None:
        self.watch = watch
        self.waiting = list(plans)
        self.at_work: dict[Combination, Occupied] = {}  # elsewhere, when it was last looked

    def __iter__(self) -> Iterator[Plan]:
        return self

    def __next__(self) -> Plan:
        for plan in list(self.waiting):
            self.waiting.remove(plan)
            if occupied := occupant(plan.folder):
                self.put_back(plan, occupied)
            elif not _is_finished(plan):
                self.at_work.pop(plan.combination, None)
                return plan
        raise StopIteration

    def put_back(self, plan: Plan, occupied: Occupied) -> None:
        """Set a run aside on which somebody works."""
        if plan.combination not in self.at_work:
            self.watch.elsewhere(plan.combination, occupied)
        self.at_work[plan.combination] = occupied
        self.waiting.append(plan)


def compare(
    base: Experiment,
    factors: Factors,
    out: Path,
    jobs: int | None = None,
    watch: Watch = Watch(),  # noqa: B008 (it holds nothing)
    lean: bool = True,
    tracker: str | None = None,
) -> Study:
    """Train what is not finished yet under `out`/runs, going on where a run was cut off, and return all results.

    `jobs` runs go on at once, by default one for every core, or where there is CUDA as many on each card as its memory
    and the cores allow. Several calls, also on other machines, may share `out`: each run is trained by one of them, and
    what another still works on at the end is told in `elsewhere`. A run that fails is told in `failures` and costs no
    other run. Ctrl-C and SIGTERM leave everything so that the same call goes on. With `lean` a finished run keeps of
    its last checkpoint what evaluation needs, and no more. A `tracker` (`lape.training.trackers`) is told of every run.

    Raises UsageError for a request that cannot be met, and for a finished run of other data; RunError for a
    `result.json` that cannot be read; Stopped after SIGTERM.
    """
    from lape.training.interruption import stopped_by_sigterm

    todo, left_out, source, here = _prepared(base, factors, out)
    results = {plan.combination: _kept(plan, here) for plan in todo if _is_finished(plan)}
    failures: dict[Combination, Exception] = {}
    begun_before = {*results, *(plan.combination for plan in todo if (plan.folder / LAST).exists())}
    queue = Queue([plan for plan in todo if plan.combination not in results], watch)
    places, threads = _places(jobs, base, source, len(queue.waiting))
    watch.begins(list(results), [plan.combination for plan in queue.waiting], places.most)
    # A signal may be heard in `watch` too: the processes end at once, not when the iterator is collected.
    stopped = stopped_by_sigterm("Stopped. The same command goes on from here.")
    work = partial(_train, lean=lean, tracker=tracker)
    with stopped, closing(side_by_side(work, queue, places, threads)) as events:
        for event in events:
            combination = event.task.combination
            if not isinstance(event, Done):
                progress, seen = event.report
                places.measure(event.card, seen, progress.step)
                watch.moves(combination, progress)
            elif isinstance(event.error, Occupied):  # another was faster
                queue.put_back(event.task, event.error)
            else:
                outcome = event.error or _kept(event.task, here)
                if isinstance(outcome, Exception):
                    failures[combination] = outcome
                else:
                    results[combination] = outcome
                watch.ends(combination, outcome)
    trained_here = results.keys() - begun_before
    for plan in todo:
        if plan.combination not in results.keys() | failures.keys() and _is_finished(plan):  # by another
            results[plan.combination] = _kept(plan, here)
            watch.ends(plan.combination, results[plan.combination])
    elsewhere = {one: occupied for one, occupied in queue.at_work.items() if one not in results}
    all_here = results.keys() <= trained_here and not elsewhere
    order = [Combination(way, pe, seed) for pe, way, seed in product(factors.pes, factors.ways(), factors.seeds)]
    return Study(
        results={combination: results[combination] for combination in order if combination in results},
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        failures={combination: failures[combination] for combination in order if combination in failures},
        elsewhere={combination: elsewhere[combination] for combination in order if combination in elsewhere},
        left_out=left_out,
        images=(len(source.train), len(source.validation)),
        jobs=min(places.most, sum(places.room.values())) if all_here else None,
    )


def _prepared(base: Experiment, factors: Factors, out: Path) -> tuple[list[Plan], LeftOut, Any, Mapping[str, Any]]:
    """Return the runs, what is left out, the set, and what is in it; raises as `compare` does before it trains."""
    from lape.training.contents import contents

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
    return todo, left_out, source, contents(source)


def write_plan(base: Experiment, factors: Factors, out: Path, file: Path, tracker: str | None = None) -> int:
    """Write the commands of all unfinished runs that nobody works on into a file, one a line; return their number.

    Each run's settings are put into its folder, from which its command takes them. Raises as `compare` does before it
    trains, and UsageError where another's file is in the way.
    """
    from lape.training.folder import claim

    writing.refuse_others([file])
    todo, _, _, here = _prepared(base, factors, out)
    commands = []
    for plan in todo:
        if _is_finished(plan):
            _kept(plan, here)
        else:
            with suppress(Occupied), working_in(plan.folder):
                claim(plan.folder, plan.experiment, resume=True)
                writing.write_json(plan.folder / SETTINGS, plan.experiment.settings())
                commands.append(shlex.join(_command(plan, tracker)))
    writing.write_marked({file: "".join(f"{line}\n" for line in (*commands, f"# {writing.MARK}"))})
    return len(commands)


def _command(plan: Plan, tracker: str | None) -> list[str]:
    """Return the words that train a run by itself; what a folder's settings do not decide is said again."""
    settings = {name: getattr(plan.experiment, name) for name in ("weights", "teacher", "teacher_weights")}
    settings["tracker"] = tracker
    opened = [word for name, value in settings.items() if value for word in (f"--{name}", str(value))]
    return ["lape", "train", "--resume", "--out", str(plan.folder), *opened]


def with_others(study: Study, out: Path) -> tuple[Study, Mapping[Path, str]]:
    """Add to a study the other finished runs below `out`/runs that were made with the same settings and data.

    They are of other ways, tables and seeds. Returned too is why each of the rest is left out.
    """
    folders = {result.folder for result in study.results.values()}
    gathered = gather([out / "runs"])
    results, left_out = dict(study.results), dict(gathered.left_out)
    for other in gathered.studies:
        if not folders.isdisjoint(result.folder for result in other.results.values()):
            results = results | {one: result for one, result in other.results.items() if one not in results}
            continue
        different = other_settings(other.experiment, study.experiment, but=VARIED) or ["it is of other data"]
        reason = f"{'; '.join(different)}. lape report {out} shows it."
        left_out |= dict.fromkeys((result.folder for result in other.results.values()), reason)
    jobs = study.jobs if len(results) == len(study.results) else None
    return replace(study, results=results, jobs=jobs), left_out


def prune(study: Study) -> None:
    """Remove the last checkpoints of a study's runs; their best ones stay, and all numbers."""
    paths = [result.folder / LAST for result in study.results.values()]
    writing.remove([path for path in paths if path.exists()])


def _is_finished(plan: Plan) -> bool:
    return (plan.folder / RESULT).exists()


def _whole(base: Experiment) -> "Source":
    """Return the set as each of the runs will have it."""
    from lape.data.files import unreadable
    from lape.data.sources import set_of

    source = set_of(base)
    return source.without(tuple(unreadable(source, lambda _: None))) if base.skip_unreadable else source


def _kept(plan: Plan, here: Mapping[str, Any]) -> Result:
    path, result = plan.folder / RESULT, read_result(plan.folder)
    refuse_other(path, result.record["experiment"], plan.experiment)
    refuse_other_data(path, result.record, here, plan.experiment)
    return result


def _places(jobs: int | None, base: Experiment, source: Any, runs: int) -> tuple[Places, int]:
    """Return where runs go, and the torch threads of each."""
    from torch import Tensor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    in_memory = isinstance(getattr(source.train, "pictures", None), Tensor)
    workers = base.workers if base.workers is not None else 0 if in_memory else cores
    places = Places.of(jobs, [] if base.accelerator in ("cpu", "mps") else cards(), cores, processes=1 + workers)
    return places, max(1, cores // max(1, min(places.most, runs)))


def _train(
    plan: Plan, tell: Callable[[tuple["Progress", Memory | None]], None], lean: bool, tracker: str | None
) -> None:
    from lape.training.loop import train
    from lape.training.trackers import tracker_of

    def report(progress: "Progress") -> None:
        tell((progress, memory()))

    train(plan.experiment, plan.folder, resume=True, report=report, lean=lean, tracker=tracker_of(tracker))
