"""One process at a time in a folder: a lock is a small file that says who works there, and that file alone decides.

The kernel's locks are not used, because many network folders have none. A file that only one process can make is had
everywhere. A dead process cannot remove its lock: the next process sees that it is dead, and takes the lock over.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import Self

from lape.errors import RunError
from lape.files import reading, writing

LOCK = ".lape-lock"
PATIENCE = 1.0  # seconds for a record to be written, where a file system cannot do it at once
BETWEEN_LOOKS = 0.2  # seconds, where a turn is waited for


class Occupied(RunError):
    """Somebody else works in the folder; the message says who, since when, and what to do."""


@dataclass(frozen=True)
class Worker:
    """A process as its lock describes it: numbers of processes are used again, so the time of its start is kept too."""

    machine: str
    numbering: str  # of the processes among which `pid` is one: a container counts by itself
    pid: int
    started: str  # empty where the system does not tell
    since: str
    key: str  # no two locks are alike

    @classmethod
    def this(cls) -> Self:
        """Describe the process that asks."""
        pid = os.getpid()
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(platform.node(), _numbering(), pid, _started(pid) or "", since, token_hex(8))

    @classmethod
    def of(cls, record: bytes) -> Self | None:
        """Read a lock's record; None where it is none."""
        with suppress(ValueError, RecursionError):
            facts = json.loads(record)
            if isinstance(facts, dict) and facts.keys() == {field.name for field in fields(cls)}:
                whole = all(type(facts[field.name]) is field.type for field in fields(cls))
                return cls(**facts) if whole and 0 < facts["pid"] < 1 << 31 else None
        return None

    @property
    def can_be_seen(self) -> bool:
        """Whether this process, which asks, would know if that one had ended."""
        return bool(self.started) and (self.machine, self.numbering) == (platform.node(), _numbering())

    @property
    def has_ended(self) -> bool:
        """Whether it is sure that the process is no more."""
        return self.can_be_seen and _started(self.pid) not in (self.started, "")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine}, since {self.since}"


def _numbering() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """Return when a process began, in the system's words; empty where it does not tell, None where there is none."""
    if os.name != "posix":
        return ""  # there os.kill would end it
    with suppress(OSError, IndexError):
        fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        ended = fields[0] in "ZX"  # it waits for its parent to notice
        return None if ended else f"{_text('/proc/sys/kernel/random/boot_id').strip()} {fields[19]}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    with suppress(OSError, subprocess.CalledProcessError):
        words = ["ps", "-o", "lstart=", "-p", str(pid)]
        environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    return ""


def _text(path: str) -> str:
    with reading.opened(Path(path)) as file:
        return file.read(4096).decode(errors="replace")


def occupant(folder: Path) -> Occupied | None:
    """Return who works in a folder, as the error that taking its lock would raise; None where nobody does."""
    path = folder / LOCK
    record = _record(path)
    if record is None or ((worker := Worker.of(record)) and worker.has_ended):
        return None
    return _occupied(path, worker)


def _record(path: Path) -> bytes | None:
    """Return what a lock holds, None where there is none; what cannot be read is empty."""
    if not os.path.lexists(path):
        return None
    try:
        return reading.content(path, reading.SETTINGS)
    except (OSError, RunError):
        return b"" if os.path.lexists(path) else None


def _occupied(path: Path, worker: Worker | None) -> Occupied:
    who = str(worker) if worker else "a process that cannot be told"
    if worker and worker.can_be_seen:
        advice = "Wait for it, stop it, or give another --out."
    else:
        advice = f"Whether it still does cannot be seen from here. If it does not, remove {path}; else wait for it."
    return Occupied(f"Somebody works in {path.parent}: {who}. {advice}")


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keep others out of a folder, which is made where it is not there; raises Occupied where one works there.

    A process that is killed leaves its lock: the next one on the same machine takes it over. A folder that was made
    for this, and in which nothing was written, is removed again.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    record = json.dumps(asdict(Worker.this())).encode()
    path = folder / LOCK
    try:
        _take(path, record)
        try:
            yield
        finally:
            _release(path, record)
    finally:
        for one in new:
            writing.remove_empty(one)


@contextmanager
def in_turn(folder: Path, waiting: Callable[[Occupied], None]) -> Iterator[None]:
    """Keep others out of a folder as `working_in` does, and wait while one works there; `waiting` hears of it once."""
    with ExitStack() as working:
        heard = False
        while True:
            try:
                working.enter_context(working_in(folder))
                break
            except Occupied as there:
                if not heard:
                    waiting(there)
                heard = True
            time.sleep(BETWEEN_LOOKS)
        yield


def _take(path: Path, record: bytes) -> None:
    """Make a lock's file, or take over that of a process that has ended; raises Occupied where neither can be."""
    begun = time.monotonic()
    while True:
        writing.make_folder(path.parent)
        try:
            if writing.create(path, record):
                return
        except FileNotFoundError:  # somebody has just removed the folder, which was empty
            continue
        there = _record(path)
        if there is None:
            continue
        worker = Worker.of(there)
        if worker is None and time.monotonic() - begun < PATIENCE:
            time.sleep(0.05)
            continue
        if worker is None or not worker.has_ended:
            raise _occupied(path, worker)
        # Several may see that it has ended, and one of them takes it over: who holds the lock of this one record.
        turn = path.with_name(f"{path.name}-{blake2b(there, digest_size=8).hexdigest()}")
        _take(turn, record)
        try:
            if _record(path) == there:
                writing.write(path, lambda file: file.write(record))
                return
        finally:
            _release(turn, record)


def _release(path: Path, record: bytes) -> None:
    """Remove a lock, unless it has become another's."""
    with suppress(OSError):
        if _record(path) == record:
            writing.remove([path])
