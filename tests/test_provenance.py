"""Laws of what a result says of the code that made it."""

import subprocess
from pathlib import Path

import pytest

from lape.training import provenance


def git(root: Path, *words: str) -> str:
    named = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
    return subprocess.run(["git", *named, *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a file of code, which is lape's as far as `commit` knows, and a filed result."""
    for name in ("src/lape/provenance.py", "benchmarks/results/speed/table.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("as committed\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src/lape/provenance.py"))
    return tmp_path


def test_the_commit_is_that_of_the_repository(clone: Path) -> None:
    assert provenance.commit() == git(clone, "rev-parse", "HEAD")


def test_changed_code_is_told_and_a_changed_result_is_none(clone: Path) -> None:
    (clone / "benchmarks/results/speed/table.md").write_text("measured anew\n")
    assert provenance.commit() == git(clone, "rev-parse", "HEAD")
    (clone / "src/lape/provenance.py").write_text("changed\n")
    assert provenance.commit() == git(clone, "rev-parse", "HEAD") + "-dirty"


def test_code_in_no_repository_has_no_commit(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clone / "site-packages").mkdir()
    installed = clone / "site-packages/provenance.py"  # within a repository, and none of its files
    installed.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.commit() is None
