"""A run that is killed goes on to what it would have been. `benchmarks/kills.py` kills more often and files a table."""

import errno
import os
import resource
import signal
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from lape.errors import RunError
from lape.files.writing import unfinished
from lape.training import checkpoints
from lape.training.curves import Curves
from lape.training.loop import train


def _benchmark(name: str) -> ModuleType:
    spec = spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


kills = _benchmark("kills")
SHORT = replace(kills.EXPERIMENT, epochs=6)
TWO = replace(kills.TWO, epochs=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "a"
    train(SHORT, folder)
    return kills.left(folder)


@pytest.mark.slow
def test_a_run_that_is_killed_within_its_writes_loses_nothing(whole, tmp_path):
    folder = tmp_path / "a"
    moments = [
        kills.within_a_write(folder),
        kills.within_a_write(folder, share=0.5),
        kills.within_a_write(folder, "best.pt"),
    ]
    killed = kills.lives(SHORT, folder, moments)
    assert [kill.writing for kill in killed] == ["last.pt", "last.pt", "best.pt"]
    assert 0 < killed[0].step < killed[1].step < killed[2].step < 108
    assert kills.left(folder) == whole


@pytest.mark.slow
def test_torchrun_starts_both_again_where_one_of_two_processes_is_killed(tmp_path):
    (killed,) = kills.restarts(TWO, tmp_path / "killed", [kills.after(0.1)])
    assert 0 < killed.step < 108
    whole = kills.finished(TWO, tmp_path / "whole", kills.TORCHRUN)
    assert kills.left(tmp_path / "killed") == kills.left(whole)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_run_goes_on_ends_it_with_one_line(whole, tmp_path, monkeypatch):
    """The kernel refuses to write more into any file than half a checkpoint."""
    folder = tmp_path / "a"
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # it could not write its own file either

    def full(_):
        limit = (folder / checkpoints.LAST).stat().st_size // 2
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        return True

    with kills.begun(SHORT, folder) as process:
        kills.looked_at(process, folder, full)
        process.send_signal(signal.SIGCONT)
        _, told = process.communicate()
    (line,) = (line for line in told.splitlines() if line.startswith("lape: "))
    assert line.startswith(f"lape: {folder}/last.pt could not be written (File too large); the one before it is whole")
    assert "Traceback" not in told
    assert process.returncode == 1
    kills.readable(folder)
    assert not unfinished(folder)
    train(SHORT, folder, resume=True)
    assert kills.left(folder) == whole


def test_a_full_disk_beneath_the_curves_names_the_file(tmp_path, capfd, monkeypatch):
    row = {"epoch": 1, "step": 2, "val_loss": 1.0}
    curves = Curves(tmp_path, [])
    for path in (curves.path, curves.board):

        def full(descriptor, path=path):
            if unfinished(path.parent) and Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == path.parent:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        before = path.read_bytes()
        with pytest.raises(RunError, match=rf"{path.name} could not be written \(No space left on device\)"):
            curves.add([row])
        assert path.read_bytes() == before
        assert not unfinished(path.parent)
    assert capfd.readouterr().err == ""
