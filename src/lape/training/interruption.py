"""Being told to stop: a run hears it, keeps what it has, and leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """Raised after SIGINT or SIGTERM, when the checkpoint is written; ends a program with status 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message


@contextmanager
def stopped_by_sigterm(message: str) -> Iterator[None]:
    """Let SIGTERM end what is inside as Ctrl-C does, by an exception (Stopped); a second one acts as it would have."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number, message)

    here = threading.current_thread() is threading.main_thread()
    ours = here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # another's handler stays
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Hear SIGINT and SIGTERM into a list, so that a step can be finished; a second one acts as it would have."""
    heard: list[int] = []
    before: dict[int, Any] = {}

    def hear(number: int, _: FrameType | None) -> None:
        heard.append(number)
        give_back()

    def give_back() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # whoever started this process keeps it out
                before[number] = signal.signal(number, hear)
    try:
        yield heard
    finally:
        give_back()
