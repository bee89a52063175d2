"""A training run as it goes: a bar in a terminal, a line an epoch elsewhere."""

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

    from lape.training.progress import Progress


class Bar:
    """Shows how far a run is, how fast, and how long it will take."""

    def __init__(self, console: "Console") -> None:
        from rich import progress

        self.console = console
        self.epoch = 0
        self.looking: progress.TaskID | None = None
        self.bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None, epoch="", note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def check(self, share: float) -> None:
        """Show how many of the files have been looked at before training."""
        if self.looking is None:
            self.looking = self.bar.add_task("", total=1.0, epoch="", note="looking at the files")
        self.bar.update(self.looking, completed=share, visible=share < 1)

    def __call__(self, now: "Progress") -> None:
        """Move the bar; a new epoch leaves a line above it."""
        left = f"{int(now.seconds_left) // 60}:{int(now.seconds_left) % 60:02d} left"
        note = f"loss {now.train_loss:.3f}, {now.images_per_second:,.0f} images/s, {left}"
        shown = f"{min(now.step * now.epochs // now.steps + 1, now.epochs)}/{now.epochs}"
        self.bar.update(self.task, total=now.steps, completed=now.step, epoch=shown, note=note)
        if now.epoch > self.epoch:
            self.epoch = now.epoch
            line = f"epoch {now.epoch}/{now.epochs}: {now.measure} {now.score:.2f} %, {note}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
