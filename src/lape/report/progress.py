"""A comparison as it runs: bars in a terminal, a line now and then elsewhere."""

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Self

from lape.files.characters import plural
from lape.files.locks import Occupied
from lape.report.bars import bars, epoch
from lape.studies.comparison import Watch
from lape.studies.statistics import Combination
from lape.studies.study import Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from lape.training.progress import Progress

SECONDS_BETWEEN_LINES = 30.0


class Display(Watch):
    """Shows all runs in one bar, with the time left, and below it a line for each run at work."""

    def __init__(self, console: "Console") -> None:
        self.console = console
        self.bars = bars(console)
        self.lines: dict[Combination, TaskID] = {}
        self.shares: dict[Combination, float] = {}  # of each run that is not kept, how much is done
        self.ended = 0
        self.begun = self.spoke = monotonic()

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bars.stop()
        if kind is KeyboardInterrupt:
            self._say("Stopped. The same command goes on from here.")

    def begins(self, kept: Sequence[Combination], todo: Sequence[Combination], jobs: int) -> None:
        """Say what there is to do."""
        self.shares = dict.fromkeys(todo, 0.0)
        self.begun = self.spoke = monotonic()
        self.all = self.bars.add_task("all runs", total=max(len(todo), 1), count="", note="starting")
        if kept:
            self._say(f"{plural(len(kept), 'finished run')} kept.")
        if todo:
            self._say(f"{plural(len(todo), 'run')} to train, up to {min(jobs, len(todo))} at once.")

    def moves(self, combination: Combination, progress: "Progress") -> None:
        """Move a run's bar, and all runs' with it."""
        if combination not in self.lines:
            self.lines[combination] = self.bars.add_task(str(combination), total=1.0, count="", note="")
        share = self.shares[combination] = progress.step / progress.steps
        self.bars.update(self.lines[combination], completed=share, count=f"{share:.0%}", note=_note(progress))
        self._move_all()

    def ends(self, combination: Combination, outcome: Result | Exception) -> None:
        """Take a run's bar away and say what came of it."""
        self.shares[combination] = 1.0
        self.ended += 1
        if combination in self.lines:
            self.bars.remove_task(self.lines.pop(combination))
        if isinstance(outcome, Exception):
            self._say(f"{combination}: failed. {outcome}")
        else:
            self._say(f"{combination}: {outcome.run.measure} {outcome.run.score:.2f} %")
        self._move_all()

    def elsewhere(self, combination: Combination, occupied: Occupied) -> None:
        """Say who works on a run."""
        self.shares.pop(combination, None)
        self._say(f"{combination}: left to another. {occupied}")

    def _move_all(self) -> None:
        done = sum(self.shares.values())
        left = (monotonic() - self.begun) / done * (len(self.shares) - done) if done else None
        note = f"{self.ended} of {len(self.shares)} done" + (f", about {_clock(left)} left" if left else "")
        self.bars.update(self.all, completed=done, count=f"{done / max(len(self.shares), 1):.0%}", note=note)
        if not self.console.is_terminal and monotonic() - self.spoke > SECONDS_BETWEEN_LINES:
            self._say(f"{done / len(self.shares):.0%} trained, {note}")

    def _say(self, line: str) -> None:
        self.spoke = monotonic()
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _note(progress: "Progress") -> str:
    seen = "" if progress.score is None else f", {progress.measure} {progress.score:.1f} %"
    return f"epoch {epoch(progress)} of {progress.epochs}{seen}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
