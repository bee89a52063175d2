"""Whether all files of a set can be used: asked before a run of days."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from lape.data.classes import ImageSource
from lape.data.instances import InstanceSource
from lape.data.maps import MapSource
from lape.data.sources import Source
from lape.errors import RunError
from lape.files.characters import plural

AT_ONCE = 16  # pictures that a thread looks at in one go: account of a million alone would take a gigabyte
MOST_NAMED = 20
Outcome = RunError | bool  # of one picture: what is wrong with it, or whether there is anything in it to be learnt


def _looked_at(source: Any, report: Callable[[float], None]) -> tuple[list[Outcome], list[Outcome]]:
    """Open every file of both splits, telling `report` after each what share is done, from 0 to 1."""
    splits = source.train, source.validation
    whole = sum(map(len, splits))

    def look(part: tuple[Any, range]) -> list[Outcome]:
        split, indices = part
        outcomes: list[Outcome] = []
        for index in indices:
            try:
                outcomes.append(split.check(index))
            except RunError as error:
                outcomes.append(error)
        return outcomes

    parts = [
        (split, range(first, min(first + AT_ONCE, len(split))))
        for split in splits
        for first in range(0, len(split), AT_ONCE)
    ]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes beside Python's lock
        for some in pool.map(look, parts):  # left early, it cancels what remains
            for outcome in some:
                outcomes.append(outcome)
                report(len(outcomes) / whole)
    return outcomes[: len(source.train)], outcomes[len(source.train) :]


def unreadable(source: Source, report: Callable[[float], None]) -> dict[str, RunError]:
    """Return what is wrong with the images of classes that cannot be read, by their names, in the set's order.

    `report` is told as in `check_files`. Images in memory can be read, and other sets are looked at by that.
    """
    if not isinstance(source, ImageSource) or isinstance(source.train.pictures, Tensor):
        return {}
    faults: dict[str, RunError] = {}
    for split, outcomes in zip((source.train, source.validation), _looked_at(source, report), strict=True):
        wrong = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, RunError)}
        names = split.names() if wrong else []
        faults |= {names[index]: error for index, error in wrong.items()}
    return faults


def refusal(source: Source, faults: Mapping[str, RunError]) -> str:
    """Say that images cannot be read, naming the first and how many there are; nothing where there is none."""
    if not faults:
        return ""
    count = plural(len(source.train) + len(source.validation), "image")
    return (
        f"{next(iter(faults.values()))} ({len(faults)} of the {count} of {source.name} cannot be read; "
        "--skip_unreadable names them and leaves them out.)"
    )


def left_out(faults: Mapping[str, RunError]) -> list[str]:
    """Name the images that are left out because they cannot be read, those beyond MOST_NAMED by their number."""
    remarks = [f"Left out: {error}" for error in faults.values()]
    more = [f"Left out: {plural(len(remarks) - MOST_NAMED, 'more image')} that cannot be read."]
    return remarks[:MOST_NAMED] + (more if len(remarks) > MOST_NAMED else [])


def check_files(source: InstanceSource | MapSource, report: Callable[[float], None]) -> list[str]:
    """Open every file of both splits, telling `report` after each picture what share is done, from 0 to 1.

    Returns what a person should know of the set before it is used. Raises RunError for the first bad file in the order
    of the set, saying how many there are, and for a split in which there is nothing to be learnt or measured.
    """
    splits = source.train, source.validation
    both = _looked_at(source, report)
    outcomes = [*both[0], *both[1]]
    if faults := [outcome for outcome in outcomes if isinstance(outcome, RunError)]:
        raise RunError(f"{faults[0]} ({len(faults)} of {len(outcomes)} pictures of {source.name} are bad.)")
    remarks: list[str] = []
    for split, of_split in zip(splits, both, strict=True):
        remarks += split.remarks
        empty = [index for index, useful in enumerate(of_split) if not useful]
        named = f"{split.title(empty[0])} is the first" if empty else ""
        if len(empty) == len(split):
            raise RunError(
                f"Of the {len(split)} pictures of {split.name} none has {source.content}; {named}. Annotate some, or "
                f"change the set. {' '.join(split.remarks)}".strip()
            )
        if empty:
            remarks.append(f"{len(empty)} of {len(split)} pictures of {split.name} have not {source.content}; {named}.")
    return remarks
