"""Law: each snippet of docs/ecosystem.md runs by itself, where what it imports is installed."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text()
SNIPPETS = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, flags=re.S | re.M)


def _missing(code: str) -> list[str]:
    """Return the packages that a snippet imports and that are not installed."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [one.module if isinstance(one, ast.ImportFrom) else one.names[0].name for one in imports]
    return sorted({root for name in named if name and find_spec(root := name.partition(".")[0]) is None})


def _case(title: str, code: str) -> Any:
    missing = _missing(code)
    why = f"{' and '.join(missing)} not installed"
    marks = [pytest.mark.skip(reason=why)] if missing else []
    return pytest.param(code, id=f"{title}: {why}" if missing else title, marks=marks)


def test_the_page_has_a_snippet_for_each_of_its_parts() -> None:
    assert len(SNIPPETS) == PAGE.count("\n## ") == PAGE.count("```python")


@pytest.mark.parametrize("code", [_case(title, code) for title, code in SNIPPETS])
def test_a_snippet_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "docs/ecosystem.md", "exec"), {"__name__": "prose"})
