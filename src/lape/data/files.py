"""Whether all files of a set can be used: asked before a run of days."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lape.data.instances import InstanceSource, InstanceSplit
from lape.data.maps import MapSource, MapSplit
from lape.errors import RunError


def check_files(source: InstanceSource | MapSource, report: Callable[[float], None]) -> None:
    """Open every file of both splits, telling `report` after each picture what share is done, from 0 to 1.

    Raises RunError for the first bad one in the order of the set, and says how many there are.
    """

    def fault(sample: tuple[InstanceSplit | MapSplit, int]) -> RunError | None:
        split, index = sample
        try:
            split.check(index)
        except RunError as error:
            return error
        return None

    samples = [(split, index) for split in (source.train, source.validation) for index in range(len(split))]
    faults: list[RunError] = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes beside Python's lock
        for done, found in enumerate(pool.map(fault, samples), start=1):  # left early, it cancels what remains
            faults += [found] if found else []
            report(done / len(samples))
    if faults:
        raise RunError(f"{faults[0]} ({len(faults)} of {len(samples)} pictures of {source.name} are bad.)")
