"""The folder of a run: free, or that of the same experiment, and one launch at a time works in it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning_fabric import Fabric

from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import reading, writing
from lape.files.locks import working_in
from lape.training.checkpoints import (
    BEST,
    BROKEN_BATCH,
    LAST,
    RESULT,
    SETTINGS,
    START,
    experiment_of,
    kept_settings,
    refuse_other,
)
from lape.training.curves import CSV, TENSORBOARD
from lape.training.longer import LENGTH
from lape.training.trackers import TRACKED

OF_A_RUN = (LAST, BEST, RESULT, START, BROKEN_BATCH, CSV, TENSORBOARD, TRACKED)


def claim(folder: Path, asked: Experiment, resume: bool) -> None:
    """See that a run folder is free for `asked`, or holds it and may be gone on with; raises UsageError otherwise.

    A run that goes on may be asked for with another length; whether that is the same run is seen later.
    """
    settings = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, and a run needs a folder. Give another --out.")
    if not settings.exists():
        if there := [name for name in OF_A_RUN if os.path.lexists(folder / name)]:
            raise UsageError(
                f"A run would replace {', '.join(there)} in {folder}, and without {SETTINGS} there they are of no run. "
                "Give another --out."
            )
        return
    writing.refuse_links(folder, folder / TENSORBOARD)
    refuse_other(settings, kept_settings(settings), asked, but=LENGTH if resume else ())
    if not resume:
        state = "a finished" if (folder / RESULT).exists() else "an unfinished"
        raise UsageError(f"{folder} holds {state} run of this experiment. Add --resume to go on, or another --out.")


def is_finished(folder: Path, asked: Experiment) -> bool:
    """Whether a folder that was claimed holds the result of this experiment, and not of one that was shorter."""
    path = folder / RESULT
    if not path.exists():
        return False
    try:
        before = experiment_of(reading.values(path, reading.RECORD)["experiment"], path)
    except (RunError, OSError, ValueError, KeyError, TypeError):
        return True  # whoever reads it says what is wrong with it
    return all(getattr(before, name) == getattr(asked, name) for name in LENGTH)


@contextmanager
def claimed(folder: Path, asked: Experiment, resume: bool, fabric: Fabric) -> Iterator[None]:
    """Claim a run folder for all processes of a launch, and write its settings there before anything else is done.

    The first process alone looks and holds the lock: to one that comes later its settings would be of another run.
    Where a new run is refused before it has begun, nothing of it stays. Raises UsageError as `claim` does, and Occupied
    where another process works there; all but the first process raise SystemExit.
    """
    with ExitStack() as held:
        trouble: UsageError | RunError | OSError | None = None
        new = False
        if fabric.is_global_zero:
            try:
                claim(folder, asked, resume)
                held.enter_context(working_in(folder))
                claim(folder, asked, resume)  # another may have worked there in between
                if new := not (folder / SETTINGS).exists():
                    writing.write_json(folder / SETTINGS, asked.settings())
            except (UsageError, RunError, OSError) as error:
                trouble = error
        if fabric.broadcast(trouble is not None):
            raise trouble or SystemExit(1)  # one process tells
        try:
            yield
        except Exception:
            if new and not any(os.path.lexists(folder / name) for name in OF_A_RUN):
                writing.remove([folder / SETTINGS])
            raise
