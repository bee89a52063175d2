"""`benchmarks/gpu.py` says what it would do, does a small version of it without a card, and keeps to its time."""

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    folder = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))  # it imports another
    spec = spec_from_file_location("gpu", folder / "gpu.py")
    module = module_from_spec(spec)
    sys.modules["gpu"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(folder))


def test_without_a_card_the_benchmark_says_what_it_would_do(gpu, tmp_path, capsys) -> None:
    assert gpu.main(["--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}, {part.seconds:.0f} s at most: " in said for name, part in gpu.PARTS.items())
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.SECONDS == 480
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["kernel", "laws"])
def test_a_part_writes_its_results_as_they_come(name, gpu, tmp_path) -> None:
    gpu.one_part(name, gpu.Place("cpu", True, tmp_path))
    gpu.write_table(tmp_path, [f"{name}: done"])
    table = (tmp_path / "table.md").read_text()
    assert "laws, 0 broken\n" in table
    assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) > 9


def test_a_part_is_stopped_after_its_time_and_the_next_one_begins(gpu, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(gpu.kernel, 2) for name in ("kernel", "laws")})
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sleep")  # in place of a process that does not end
    monkeypatch.setattr(gpu, "__file__", "60")
    real = gpu.subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: real(command[:2], **options))
    outcomes = gpu.all_parts(["kernel", "laws"], gpu.Place("cpu", True, tmp_path), 3.5)
    assert outcomes[0].startswith("kernel: stopped after its 2 s")
    assert outcomes[1].startswith(("laws: stopped after its 1 s", "laws: stopped after its 2 s"))
    assert "kernel: stopped" in (tmp_path / "table.md").read_text()
