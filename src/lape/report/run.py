"""A training run as it goes: a bar in a terminal, a line an epoch elsewhere."""

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

    from lape.training import Progress


class Bar:
    """Shows how far a run is, how fast, and how long it will take."""

    def __init__(self, console: "Console") -> None:
        from rich import progress

        self.console = console
        self.epoch = 0
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

    def __call__(self, now: "Progress") -> None:
        """Move the bar; a new epoch leaves a line above it."""
        left = f"{int(now.seconds_left) // 60}:{int(now.seconds_left) % 60:02d} left"
        note = f"loss {now.train_loss:.3f}, {now.images_per_second:,.0f} images/s, {left}"
        shown = f"{min(now.epoch + 1, now.epochs)}/{now.epochs}"
        self.bar.update(self.task, total=now.steps, completed=now.step, epoch=shown, note=note)
        if now.epoch > self.epoch:
            self.epoch = now.epoch
            line = f"epoch {now.epoch}/{now.epochs}: {now.val_accuracy:.2f} % right, {note}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
