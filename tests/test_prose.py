"""Law: what README and docs show runs, and what they name exists."""

import json
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Each snippet of ecosystem.md runs by itself: test_ecosystem.py. The others only lead to pages and pictures.
WITHOUT_PYTHON = ("ecosystem", "index", "gallery")
WITH_PYTHON = pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in WITHOUT_PYTHON], ids=lambda page: page.name
)
EVERY_PAGE = pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)


@WITH_PYTHON
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    assert blocks, f"{page} shows no Python"
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "prose"})


@EVERY_PAGE
def test_what_a_page_names_exists(page: Path) -> None:
    for name in re.findall(r"`(lape(?:\.\w+)+)[`(]", page.read_text()):
        resolve_name(name)


@EVERY_PAGE
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", _without_code(page.read_text())):
        if target.startswith("https://"):
            continue
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not heading or heading in _anchors(place.read_text()), f"{target}#{heading}"


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def _anchors(text: str) -> set[str]:
    """Return what GitHub calls the headings of a page: small letters and digits, - for blanks, nothing for the rest."""
    headings = re.findall(r"^#+ (.+)$", _without_code(text), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_the_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lape.cli.command_line import parsed
    from lape.experiment import Experiment

    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^(?:\$ )?(?:\.venv/bin/)?lape (.+)$", page.read_text(), flags=re.M):
        words = shlex.split(line.split("  #")[0])
        if "--resume" in words and "--out" in words:  # there is a run to go on with
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "experiment.json").write_text(json.dumps(Experiment().settings()))
        parsed(words)


def test_every_equation_of_the_paper_has_its_function() -> None:
    page = (ROOT / "docs" / "equations.md").read_text()
    assert all(f"({number})" in page for number in range(2, 13))


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/speed.md"])
def test_the_numbers_of_a_page_are_those_filed(page: str) -> None:
    """Each row of a page's tables has the cells of the row with its name in the table that a command wrote."""
    filed = [
        _cells(line) for path in (ROOT / "benchmarks/results").rglob("*.md") for line in path.read_text().split("\n")
    ]
    rows = [_cells(line) for line in (ROOT / page).read_text().split("\n") if re.search(r"\d ?[±M%]|\d\.\d", line)]
    rows = [row for row in rows if len(row) > 1]
    assert len(rows) >= 4
    for row in rows:
        assert any(set(row) <= set(other) and row[0] == other[0] for other in filed), row


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
