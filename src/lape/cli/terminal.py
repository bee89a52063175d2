"""What is printed: all of it goes through `say` and `console`, and a name in it can do nothing but be read."""

import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import IO, TYPE_CHECKING, Any, NoReturn

from lape.files.characters import visible

if TYPE_CHECKING:
    from rich.console import Console

NOBODY_READS = 141  # exit status: 128 + SIGPIPE, as a shell tells of a program whose reader has left


def open_streams() -> None:
    """Let both streams write a stand-in for what their encoding has no character for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not where a program was started without it
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Write what still waits to be written."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except BrokenPipeError:
                leave(stream)


def say(line: str, error: bool = False) -> None:
    """Print a line; a character in it that would act on the terminal, or begin another line, is written out."""
    stream = sys.stderr if error else sys.stdout
    behind = getattr(stream, "rich_proxied_file", stream)  # rich's bar takes all lines to its own terminal
    stream = stream if behind is None or behind.isatty() else behind
    if stream is not None:
        try:
            print(visible(line), file=stream, flush=True)
        except BrokenPipeError:
            leave(stream)


def leave(stream: IO[str]) -> NoReturn:
    """End the program in silence: whoever read the stream, as `head` does, has enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what still waits goes nowhere when Python ends
    raise SystemExit(NOBODY_READS)


def console(stderr: bool = False) -> "Console":
    """A rich console on which text is text: no markup in it is read, and as with `say` nothing in it acts.

    A `Text` or string is one line, or several where it is too long for one: what stands below it is another.
    """
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class Plain(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            if isinstance(renderable, Text) and (plain := visible(renderable.plain)) != renderable.plain:
                renderable = renderable.copy()
                renderable.plain = plain
            for segment in super().render(renderable, options):
                if not segment.control:  # rich's own, as are by now the ends of lines
                    segment = segment._replace(text="\n".join(map(visible, segment.text.split("\n"))))
                yield segment

        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(visible(text), **how)

        def on_broken_pipe(self) -> None:
            self.quiet = True
            leave(self.file)

    return Plain(stderr=stderr, markup=False, emoji=False)
