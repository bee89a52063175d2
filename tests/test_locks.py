"""One process at a time in a folder: who works there is told, and a dead one's lock is taken over by one alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from lape.files import locks, writing
from lape.files.locks import LOCK, Occupied, Worker, in_turn, occupant, working_in

HOLD = """
import sys, time
from pathlib import Path
from lape.files.locks import working_in
with working_in(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds=600.0):
    """Start another process that works in a folder; returns when it does."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.stdout.close()
    return process


def left_by(folder, **changed):
    """Leave a lock as a process would that was killed; returns its record."""
    folder.mkdir(exist_ok=True)
    record = json.dumps(asdict(replace(Worker.this(), **changed))).encode()
    assert writing.create(folder / LOCK, record)
    return record


def test_a_second_process_is_told_who_works_there_and_a_killed_ones_lock_is_taken_over(tmp_path):
    folder = tmp_path / "a"
    process = holder(folder)
    with pytest.raises(Occupied) as told, working_in(folder):
        pass
    machine = os.uname().nodename
    assert f"Somebody works in {folder}: process {process.pid} on {machine}, since 20" in str(told.value)
    assert str(occupant(folder)) == str(told.value)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked how it ended: it is still listed
    assert occupant(folder) is None
    with working_in(folder):
        assert Worker.of((folder / LOCK).read_bytes()).pid == os.getpid()
    process.wait()
    assert list(folder.iterdir()) == []


def test_the_same_process_does_not_work_in_a_folder_twice_and_a_folder_with_something_in_it_stays(tmp_path):
    with working_in(tmp_path / "deep" / "a"):
        with pytest.raises(Occupied, match=f"process {os.getpid()} "), working_in(tmp_path / "deep" / "a"):
            pass
        (tmp_path / "deep" / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "deep" / "a").iterdir()] == ["kept"]
    with working_in(tmp_path / "new" / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]  # nothing was written there


@pytest.mark.parametrize(
    ("changed", "free"),
    [
        ({"started": "another time"}, True),  # its number was given again: to this very process
        ({"machine": "elsewhere"}, False),
        ({"numbering": "of a container"}, False),
        ({"started": ""}, False),
    ],
    ids=["reused", "other machine", "container", "no telling"],
)
def test_a_lock_is_taken_over_only_where_its_process_is_known_to_have_ended(tmp_path, changed, free):
    record = left_by(tmp_path / "a", **changed)
    if free:
        with working_in(tmp_path / "a"):
            assert (tmp_path / "a" / LOCK).read_bytes() != record
        assert list((tmp_path / "a").iterdir()) == []
        return
    with pytest.raises(Occupied, match=f"If it does not, remove {tmp_path / 'a' / LOCK}"), working_in(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / LOCK).read_bytes() == record


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff" * 10, b"[" * 100_000])
def test_a_lock_that_cannot_be_read_is_not_taken_over(tmp_path, record, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    (tmp_path / LOCK).write_bytes(record)
    with pytest.raises(Occupied, match="a process that cannot be told"), working_in(tmp_path):
        pass
    assert (tmp_path / LOCK).read_bytes() == record


RACE = """
import sys, time
from pathlib import Path
from lape.files.locks import Occupied, working_in
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with working_in(folder):
        print("in", flush=True)
        sys.stdin.readline()
except Occupied as error:
    print("out", error, flush=True)
"""


def test_of_many_that_find_a_dead_ones_lock_one_gets_it(tmp_path):
    left_by(tmp_path / "a", started="another time")
    command = [sys.executable, "-c", RACE, str(tmp_path / "a")]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    for racer in racers:
        racer.stdout.readline()
    for racer in racers:
        racer.stdin.write("\n")
    told = [racer.stdout.readline().split()[0] for racer in racers]
    for racer in racers:
        racer.communicate("\n")
    assert sorted(told) == ["in", "out", "out", "out"]
    assert list((tmp_path / "a").iterdir()) == []


def test_one_that_is_late_leaves_the_lock_to_the_faster(tmp_path, monkeypatch):
    """Both saw the same dead one; the faster has taken it over when this one begins to."""
    left_by(tmp_path, started="another time")
    create, faster = writing.create, []

    def late(path, content):
        if path.name != LOCK and not faster:
            faster.append(json.dumps(asdict(Worker.this())).encode())
            (tmp_path / LOCK).write_bytes(faster[0])
        return create(path, content)

    monkeypatch.setattr(writing, "create", late)
    with pytest.raises(Occupied, match=f"process {os.getpid()} "), working_in(tmp_path):
        pass
    assert (tmp_path / LOCK).read_bytes() == faster[0]
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_turn_waits_and_tells_once(tmp_path):
    process = holder(tmp_path, 0.5)
    heard = []
    with in_turn(tmp_path, heard.append):
        assert Worker.of((tmp_path / LOCK).read_bytes()).pid == os.getpid()
    process.wait()
    assert len(heard) == 1
    assert f"process {process.pid} " in str(heard[0])


def test_where_a_file_system_has_no_links_a_lock_is_one_all_the_same(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with working_in(tmp_path), pytest.raises(Occupied), working_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nobody_works_where_there_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    assert occupant(tmp_path / "file") is None
    assert occupant(tmp_path / "none") is None


def test_a_lock_that_was_removed_by_hand_and_taken_by_another_stays_the_others(tmp_path):
    with working_in(tmp_path):
        (tmp_path / LOCK).unlink()
        record = left_by(tmp_path)
    assert (tmp_path / LOCK).read_bytes() == record
