"""Law: each snippet of docs/ecosystem.md runs by itself."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text()
SNIPPETS = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, flags=re.S | re.M)


def test_the_page_has_a_snippet_for_each_of_its_parts() -> None:
    assert len(SNIPPETS) == PAGE.count("\n## ") == PAGE.count("```python")


@pytest.mark.parametrize("code", [pytest.param(code, id=title) for title, code in SNIPPETS])
def test_a_snippet_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "docs/ecosystem.md", "exec"), {"__name__": "prose"})
