"""A training run as it goes: a bar in a terminal, a line an epoch elsewhere."""

import math
from typing import TYPE_CHECKING, Self

from lape.report.bars import bars, epoch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from lape.training.progress import Progress


class Bar:
    """Shows what a run does before its first step, then how far it is, how fast, and how long it will take."""

    def __init__(self, console: "Console", compiled: bool = False) -> None:
        self.console = console
        self.epoch = 0
        self.bar = bars(console)
        self.compiling = "compiling" if compiled else ""
        self.task = self._waiting("reading data, making the model")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _waiting(self, what: str) -> "TaskID":
        return self.bar.add_task(what, total=None, count="", note=self.compiling)

    def check(self, share: float) -> None:
        """Show how many of the files have been looked at before training."""
        if share < 1:
            self.bar.update(
                self.task, description="checking the files", total=1.0, completed=share, count=f"{share:.0%}", note=""
            )
        else:
            self.bar.remove_task(self.task)  # of a bar whose end was known rich does not forget it
            self.task = self._waiting("first step")

    def __call__(self, now: "Progress") -> None:
        """Move the bar; a new epoch leaves a line above it."""
        left = f"{int(now.seconds_left) // 60}:{int(now.seconds_left) % 60:02d} left"
        loss = [] if math.isnan(now.train_loss) else [f"loss {now.train_loss:.3f}"]
        note = [*loss, f"{now.images_per_second:,.0f} images/s", left]
        self.bar.update(
            self.task,
            description=f"epoch {epoch(now)}/{now.epochs}",
            total=now.steps,
            completed=now.step,
            count=f"{now.step}/{now.steps}",
            note=", ".join([left, *note[:-1]]),  # in a narrow terminal its end is cut
        )
        if now.epoch > self.epoch:
            self.epoch = now.epoch
            line = f"epoch {now.epoch}/{now.epochs}: {now.measure} {now.score:.2f} %, {', '.join(note)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
