"""Bars that keep to one line each, however narrow the terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

    from lape.training.progress import Progress


def bars(console: "Console") -> "Bars":
    """Return bars with a description before, and a count and a note behind: what has no room is cut, the bar stays.

    Their tasks have fields `count` and `note`.
    """
    from rich import progress
    from rich.table import Column

    def column(text: str, ratio: int | None = None, most: int | None = None) -> progress.TextColumn:
        shape = Column(no_wrap=True, overflow="ellipsis", ratio=ratio, max_width=most)
        return progress.TextColumn(text, markup=False, table_column=shape)

    return progress.Progress(
        column("{task.description}", most=console.width // 2),
        progress.BarColumn(bar_width=min(24, console.width // 5)),
        column("{task.fields[count]}"),
        column("{task.fields[note]}", ratio=1),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        expand=True,
    )


def epoch(progress: "Progress") -> int:
    """Return the number of the epoch that a run is in, from 1 on."""
    return min(progress.step * progress.epochs // progress.steps + 1, progress.epochs)
