"""Whether all files of a set can be used: asked before a run of days."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lape.data.instances import InstanceSource, InstanceSplit
from lape.data.maps import MapSource, MapSplit
from lape.errors import RunError


def check_files(source: InstanceSource | MapSource, report: Callable[[float], None]) -> list[str]:
    """Open every file of both splits, telling `report` after each picture what share is done, from 0 to 1.

    Returns what a person should know of the set before it is used. Raises RunError for the first bad file in the order
    of the set, saying how many there are, and for a split in which there is nothing to be learnt or measured.
    """

    def look(sample: tuple[InstanceSplit | MapSplit, int]) -> RunError | bool:
        split, index = sample
        try:
            return split.check(index)
        except RunError as error:
            return error

    splits = (source.train, source.validation)
    samples = [(split, index) for split in splits for index in range(len(split))]
    outcomes: list[RunError | bool] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes beside Python's lock
        for outcome in pool.map(look, samples):  # left early, it cancels what remains
            outcomes.append(outcome)
            report(len(outcomes) / len(samples))
    if faults := [outcome for outcome in outcomes if isinstance(outcome, RunError)]:
        raise RunError(f"{faults[0]} ({len(faults)} of {len(samples)} pictures of {source.name} are bad.)")
    remarks: list[str] = []
    for split, of_split in zip(splits, (outcomes[: len(source.train)], outcomes[len(source.train) :]), strict=True):
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
