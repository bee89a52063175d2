"""Tasks side by side in spawned processes, each of which imports torch once and serves one task after another.

`concurrent.futures` is not used: when one of its processes is killed (out of memory, say) it gives up all the others.
"""

import multiprocessing
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from lape.characters import visible
from lape.errors import RunError, UsageError

GRACE = 30  # seconds that a process has to keep its state, once it is told to end

Task = TypeVar("Task")
News = TypeVar("News")
Tell = Callable[[News], None]


@dataclass(frozen=True)
class Told(Generic[Task, News]):
    """A task at work said how far it is."""

    task: Task
    news: News


@dataclass(frozen=True)
class Done(Generic[Task]):
    """A task ended, well or with an error."""

    task: Task
    error: UsageError | RunError | None


def side_by_side(
    work: Callable[[Task, Tell[News]], None], tasks: Sequence[Task], jobs: int, threads: int
) -> Generator[Told[Task, News] | Done[Task], None, None]:
    """Run `work(task, tell)` for every task, `jobs` at a time with `threads` torch threads each; yield what happens.

    `work` is a function of a module, so that a new process finds it. Close the generator (`contextlib.closing`) to end
    the processes, also after an exception such as Ctrl-C: work must be such that it can be cut off at any moment.
    """
    waiting, processes = deque(tasks), dict[Connection, BaseProcess]()
    idle, busy = list[Connection](), dict[Connection, Task]()
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                link = idle.pop() if idle else _hire(processes, work, threads)
                busy[link] = waiting.popleft()
                with suppress(ConnectionError):  # a process that died in between is noticed below
                    link.send(busy[link])
            ready = wait(list(busy))
            for link in [link for link in busy if link in ready]:
                try:
                    news: News | Done[Task] = link.recv()
                except (EOFError, ConnectionError):
                    yield Done(busy.pop(link), _death(processes.pop(link)))
                    continue
                if isinstance(news, Done):
                    idle.append(link)
                    yield Done(busy.pop(link), news.error)
                else:
                    yield Told(busy[link], news)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join(GRACE)  # it keeps what it has; some, on a busy machine, then never end
            if process.is_alive():
                process.kill()
                process.join()


def _hire(
    processes: dict[Connection, BaseProcess], work: Callable[[Task, Tell[News]], None], threads: int
) -> Connection:
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    # Not a daemon: data loaders in it may have processes of their own.
    process = context.Process(target=_serve, args=(theirs, work, threads))
    process.start()
    theirs.close()  # the one other end is the process's, so its death ends the link
    processes[link] = process
    return link


def _death(process: BaseProcess) -> RunError:
    process.join()
    return RunError(
        f"its process ended with status {process.exitcode} before the run did (-9 is what a machine out of memory "
        "does: try fewer jobs); the same command takes it up again"
    )


def _serve(link: Connection, work: Callable[[Task, Tell[News]], None], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    os.environ["OMP_NUM_THREADS"] = str(threads)
    warnings.formatwarning = _on_one_line  # of the loaders that this process starts too
    import torch

    torch.set_num_threads(threads)
    try:
        while True:
            task = link.recv()
            link.send(Done(task, _outcome(work, task, link.send)))
    except (EOFError, ConnectionError):
        return  # the parent has no more work, or is gone


def _on_one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"lape: {visible(' '.join(str(message).splitlines()))}\n"


def _outcome(work: Callable[[Task, Tell[News]], None], task: Task, tell: Tell[News]) -> UsageError | RunError | None:
    try:
        work(task, tell)
    except (UsageError, RunError) as error:
        return type(error)(str(error))
    except ConnectionError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return RunError(f"{type(error).__name__} in {os.path.basename(frame.filename)}:{frame.lineno}: {error}")
    return None
