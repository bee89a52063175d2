"""Tasks side by side in spawned processes, each of which imports torch once and serves one task after another.

`concurrent.futures` is not used: when one of its processes is killed (out of memory, say) it gives up all the others.
"""

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Generic, Protocol, TypeVar

from lape.errors import RunError, UsageError, first_line, lacking
from lape.files.characters import visible

GRACE = 30  # seconds that a process has to keep its state, once it is told to end

Task = TypeVar("Task")
Report = TypeVar("Report")
Send = Callable[[Report], None]


@dataclass(frozen=True)
class Reported(Generic[Task, Report]):
    """A task at work said how far it is."""

    task: Task
    report: Report
    card: str = ""


@dataclass(frozen=True)
class Done(Generic[Task]):
    """A task ended, well or with an error."""

    task: Task
    error: UsageError | RunError | None


class Room(Protocol):
    """Says where there is room for one more task."""

    def free(self, busy: Iterable[str]) -> str | None:
        """Return the CUDA card for one more beside those that are busy, empty for a process that sees what this one
        does; None where there is no room."""
        ...


def side_by_side(
    work: Callable[[Task, Send[Report]], None], tasks: Iterable[Task], room: Room, threads: int
) -> Generator[Reported[Task, Report] | Done[Task], None, None]:
    """Run `work(task, send)` for every task, where `room` says, with `threads` torch threads each; yield what happens.

    `work` is a function of a module, so that a new process finds it. An iterator of tasks is asked whenever there is
    room, and one that has none is asked again when a task is done. Close the generator (`contextlib.closing`) to end
    the processes, also after an exception such as Ctrl-C: work must be such that it can be cut off at any moment.
    """
    waiting, processes = iter(tasks), dict[Connection, BaseProcess]()
    cards = dict[Connection, str]()  # on which a process computes, as long as it lives
    idle, busy = list[Connection](), dict[Connection, Task]()
    asked_in_vain: int | None = None  # while so many were busy
    try:
        while True:
            while asked_in_vain != len(busy) and (card := room.free([cards[link] for link in busy])) is not None:
                if (task := next(waiting, None)) is None:
                    asked_in_vain = len(busy)
                    break
                link = next((link for link in idle if cards[link] == card), None)
                if link is None:
                    link = _start(processes, work, threads, card)
                    cards[link] = card
                else:
                    idle.remove(link)
                busy[link] = task
                with suppress(ConnectionError):  # a process that died in between is noticed below
                    link.send(task)
            if not busy:
                return
            ready = wait(list(busy))
            for link in [link for link in busy if link in ready]:
                try:
                    report: Report | Done[Task] = link.recv()
                except (EOFError, ConnectionError):
                    yield Done(busy.pop(link), _ended_early(processes.pop(link)))
                    continue
                if isinstance(report, Done):
                    idle.append(link)
                    yield Done(busy.pop(link), report.error)
                else:
                    yield Reported(busy[link], report, cards[link])
    finally:
        _end(processes)


def _start(
    processes: dict[Connection, BaseProcess], work: Callable[[Task, Send[Report]], None], threads: int, card: str
) -> Connection:
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    # Not a daemon: data loaders in it may have processes of their own.
    process = context.Process(target=_work_through, args=(theirs, work, threads, card))
    process.start()
    theirs.close()  # the one other end is the process's, so its death ends the link
    processes[link] = process
    return link


def _end(processes: dict[Connection, BaseProcess]) -> None:
    """Tell processes to end, give them time to keep what they have, and end those that do not."""
    for link, process in processes.items():
        with suppress(ConnectionError):
            link.send(None)  # for one that heard the signal when its task was all but done, and now waits for another
        process.terminate()
    begun, talking = monotonic(), set(processes)
    while any(process.is_alive() for process in processes.values()) and monotonic() - begun < GRACE:
        ready = wait(list(talking), timeout=0.05)
        for link in [link for link in talking if link in ready]:
            try:
                link.recv_bytes()  # pyright: ignore[reportAttributeAccessIssue]  # unread, reports fill the pipe, and their process waits there for ever
            except (EOFError, ConnectionError):
                talking.discard(link)
    for process in processes.values():
        process.kill()
        process.join()


def _ended_early(process: BaseProcess) -> RunError:
    process.join()
    return RunError(
        f"its process ended with status {process.exitcode} before the run did (-9 is what a machine out of memory "
        "does: try fewer jobs); the same command takes it up again"
    )


def _work_through(link: Connection, work: Callable[[Task, Send[Report]], None], threads: int, card: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    if card:
        os.environ["CUDA_VISIBLE_DEVICES"] = card  # CUDA reads it when it is first used
    os.environ["OMP_NUM_THREADS"] = str(threads)
    warnings.formatwarning = _on_one_line  # of the loaders that this process starts too
    import torch

    torch.set_num_threads(threads)
    alone = False

    def send(report: Report) -> None:
        nonlocal alone
        try:
            link.send(report)
        except ConnectionError:
            if not alone:  # the parent was killed: this process ends as if it had been told to
                alone = True
                signal.raise_signal(signal.SIGTERM)

    try:
        while (task := link.recv()) is not None:
            link.send(Done(task, _outcome(work, task, send)))
    except (EOFError, ConnectionError):
        return  # the parent has no more work, or is gone


def _on_one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"lape: {visible(' '.join(str(message).splitlines()))}\n"


def _outcome(
    work: Callable[[Task, Send[Report]], None], task: Task, send: Send[Report]
) -> UsageError | RunError | None:
    try:
        work(task, send)
    except (UsageError, RunError) as error:
        return type(error)(str(error))
    except Exception as error:
        if lack := lacking(error):
            return lack
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return RunError(f"{type(error).__name__} in {place}: {first_line(error)}")
    return None
