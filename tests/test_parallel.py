"""Tasks side by side: all are done, errors stay with their task, a killed process costs one task, closing ends all."""

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

import pytest

from lape.errors import RunError, UsageError
from lape.studies import parallel
from lape.studies.parallel import Done, Reported, side_by_side
from lape.studies.places import Memory, Places


def at_once(jobs):
    return Places.of(jobs, [], cores=jobs, processes=1)


def echo(task, tell):
    tell(f"{task} at work in {os.getpid()}")


def in_parts(task, tell):
    if task == "usage":
        raise UsageError("this breaks a rule")
    if task == "failure":
        raise RunError("the disk is full")
    if task == "bug":
        raise ZeroDivisionError("unforeseen")
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    tell(task)


def marks_and_sleeps(task, tell):
    tell(os.getpid())
    time.sleep(60)


def warns(task, tell):
    warnings.warn(f"beware of {task}\x1b[2J\nand more", stacklevel=1)


def count_threads(task, tell):
    import torch

    tell(torch.get_num_threads())


def test_every_task_is_done_once_by_as_many_processes_as_jobs():
    events = list(side_by_side(echo, list("abcde"), room=at_once(2), threads=1))
    told = [event for event in events if isinstance(event, Reported)]
    assert sorted(event.task for event in told) == list("abcde")
    assert sorted(event.task for event in events if isinstance(event, Done)) == list("abcde")
    assert all(event.report.startswith(f"{event.task} ") for event in told)
    assert len({event.report.split()[-1] for event in told}) <= 2


def test_a_warning_of_a_process_is_one_line_that_does_nothing_to_the_terminal(capfd):
    list(side_by_side(warns, ["a\u202eb"], room=at_once(1), threads=1))
    assert capfd.readouterr().err == "lape: beware of a\\u202eb\\x1b[2J and more\n"


def tells_its_card(task, tell):
    tell((os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()))
    time.sleep(0.5)


class LaterMore:
    """Tasks of which one comes into sight when another is done."""

    def __init__(self):
        self.seen = ["a", "b", None, "c"]

    def __iter__(self):
        return self

    def __next__(self):
        task = self.seen.pop(0) if self.seen else None
        if task is None:
            raise StopIteration
        return task


def test_a_process_sees_the_card_that_it_is_for_and_tasks_that_come_into_sight_later_are_done():
    events = list(side_by_side(tells_its_card, LaterMore(), Places.of(2, ["GPU-7", "3"], cores=2, processes=1), 1))
    told = {event.task: (event.card, *event.report) for event in events if isinstance(event, Reported)}
    assert all(card == seen for card, seen, _ in told.values())
    assert sorted(told[task][0] for task in "ab") == ["3", "GPU-7"]
    assert told["c"] in (told["a"], told["b"])  # no third process


# --- Where there is room

GB = 1 << 30


def filled(places, most=100):
    """Put tasks where there is room until there is none; returns how many each card has."""
    busy = []
    while len(busy) < most and (card := places.free(busy)) is not None:
        busy.append(card)
    return {card: busy.count(card) for card in places.room}


def test_without_cards_as_many_runs_go_on_at_once_as_there_are_cores_or_as_asked_for():
    assert filled(Places.of(None, [], cores=6, processes=1)) == {"": 6}
    assert filled(Places.of(9, [], cores=6, processes=1)) == {"": 9}


def test_on_cards_one_run_each_is_measured_and_then_memory_and_cores_say_how_many():
    places = Places.of(None, ["0", "1"], cores=16, processes=1)
    assert filled(places) == {"0": 1, "1": 1}
    places.measure("0", Memory(free=70 * GB, total=80 * GB, taken=10 * GB), step=1)  # its first steps take less
    places.measure("0", None, step=9)
    assert filled(places) == {"0": 1, "1": 1}
    places.measure("0", Memory(free=50 * GB, total=80 * GB, taken=10 * GB), step=5)
    assert filled(places) == {"0": 5, "1": 1}  # 42 of the 50 GB, the rest of a tenth stays free
    places.measure("0", Memory(free=0, total=80 * GB, taken=10 * GB), step=90)  # by then the others run there
    places.measure("1", Memory(free=2 * GB, total=80 * GB, taken=60 * GB), step=5)  # somebody else's card
    assert filled(places) == {"0": 5, "1": 1}
    places = Places.of(None, ["0", "1"], cores=6, processes=1)
    for card in "01":
        places.measure(card, Memory(free=79 * GB, total=80 * GB, taken=GB), step=5)
    assert filled(places) == {"0": 3, "1": 3}
    assert filled(Places.of(None, ["0", "1"], cores=16, processes=17)) == {"0": 1, "1": 1}  # each has loaders
    assert filled(Places.of(5, ["0", "1"], cores=2, processes=1)) == {"0": 3, "1": 2}


def test_no_tasks_start_no_process():
    assert list(side_by_side(echo, [], room=at_once(2), threads=1)) == []


def test_processes_have_the_threads_they_are_given():
    told = [
        event.report
        for event in side_by_side(count_threads, ["a"], room=at_once(1), threads=1)
        if isinstance(event, Reported)
    ]
    assert told == [1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_stays_with_its_task(jobs):
    """A killed process too costs no other task than its own."""
    tasks = ["first", "usage", "failure", "bug", "killed", "last"]
    ended = {
        event.task: event.error
        for event in side_by_side(in_parts, tasks, at_once(jobs), threads=1)
        if isinstance(event, Done)
    }
    assert ended.keys() == set(tasks)
    assert ended["first"] is None
    assert ended["last"] is None
    assert isinstance(ended["usage"], UsageError)
    assert isinstance(ended["failure"], RunError)
    assert str(ended["failure"]) == "the disk is full"
    assert "ZeroDivisionError" in str(ended["bug"])
    assert "test_parallel.py" in str(ended["bug"])
    assert "status -9" in str(ended["killed"])


def test_closing_ends_the_processes():
    events = side_by_side(marks_and_sleeps, ["a", "b"], room=at_once(2), threads=1)
    pids = [event.report for event in islice(events, 2) if isinstance(event, Reported)]
    events.close()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def deaf(task, tell):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell("deaf")
    time.sleep(600)


def test_a_process_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(parallel, "GRACE", 1)
    events = side_by_side(deaf, [0], room=at_once(1), threads=1)
    next(events)
    begun = time.monotonic()
    events.close()
    assert time.monotonic() - begun < 30


def deaf_at_the_end(task, send):
    """Hear the signal when all is done but the telling, as a run does in its last validation."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    send("at work")
    while not heard:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, before)


def talkative(task, send):
    """Say more than a pipe holds before it ends."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    send("at work")
    while not heard:
        time.sleep(0.01)
    for _ in range(20):
        send("x" * 100_000)


@pytest.mark.parametrize("work", [deaf_at_the_end, talkative])
def test_a_process_that_hears_the_signal_late_ends_by_itself(work):
    events = side_by_side(work, [0], room=at_once(1), threads=1)
    next(events)
    begun = time.monotonic()
    events.close()
    assert time.monotonic() - begun < parallel.GRACE - 5


ORPHAN = """
import os, signal, sys, time
from lape.studies.parallel import side_by_side
from lape.studies.places import Places
def work(task, send):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    send(os.getpid())
    while not heard:
        send("still at work")
        time.sleep(0.01)
    open(task, "w").write("kept")
if __name__ == "__main__":
    for event in side_by_side(work, [sys.argv[1]], Places.of(1, [], 1, 1), 1):
        if isinstance(event.report, int):
            print(event.report, flush=True)
"""


def test_a_process_whose_parent_is_killed_keeps_what_it_has_and_ends(tmp_path):
    (tmp_path / "script.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "kept")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (tmp_path / "kept").read_text() == "kept"


def test_to_hear_how_far_a_run_is_loads_nothing_that_trains():
    """While the parent of several runs loads it, on a busy machine for a minute, all of them wait in full pipes."""
    from lape.training.loop import Progress

    told = pickle.dumps(Progress(1, 2, 3, 4, 5.0, 6.0, 7.0, "accuracy", None))
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).step, 'torch' in sys.modules)"
    heard = subprocess.run([sys.executable, "-c", script], input=told, capture_output=True, check=True)
    assert heard.stdout.split() == [b"3", b"False"]
