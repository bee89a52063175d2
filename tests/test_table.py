"""Law: a table says the same in the terminal, in Markdown, in LaTeX and as CSV, whatever stands in its cells."""

import csv
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lape.files.characters import in_latex, in_markdown, visible
from lape.report.table import Table

CELLS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
TABLES = st.lists(st.tuples(CELLS, CELLS, st.floats(allow_nan=False) | st.none()), max_size=4)


@given(TABLES)
def test_markdown_and_csv_hold_every_cell(rows):
    table = Table(("a", "b", "c"), rows, names=2)
    _, rule, *lines = table.markdown().split("\n")
    assert rule == "| --- | --- | ---: |"
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line[1:-1]) for line in lines]
    assert [len(line) for line in cells] == [3] * len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line == f"| {' | '.join(in_markdown(str(cell)) for cell in row)} |"
    read = list(csv.reader(io.StringIO(table.csv(), newline="")))
    assert read == [["a", "b", "c"], *([*map(visible, row[:2]), "" if row[2] is None else str(row[2])] for row in rows)]


# What stands for one character or shows nothing; what is left must be plain.
TEX = re.compile(
    r"\\[{}$&#%_]|\\text\w+\{\}|\\ldots\{\}|\\[`'^~\"rvc]\{\w\}|\$(?:-|\\\w+|_2)\$|\{(?:\[|\]|\*|''|)\}", re.ASCII
)


@given(TABLES.filter(bool))
def test_latex_shows_every_cell_as_text_whatever_it_is(rows):
    """No cell ends its cell, line, comment or table, opens a group or runs a command, and each engine has its signs."""
    text = Table(("a", "b", "c"), rows, names=2).latex(rows[0][0])
    assert text.isascii()
    lines = text.split("\n")
    (caption,) = (line for line in lines if line.startswith(r"\caption{"))
    first, last = lines.index(r"\midrule"), lines.index(r"\bottomrule")
    assert last - first - 1 == len(rows)
    for line in lines[first + 1 : last]:
        cells = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
        assert len(cells) == 3
        assert not any(re.search(r"[\\{}$&#%_^~\[\]*]", TEX.sub("", cell)) for cell in cells), line
    assert not re.search(r"[\\{}$&#%_^~\[\]*]", TEX.sub("", caption.removeprefix(r"\caption{")[:-1]))


def test_latex_stacks_headings_that_are_wider_than_their_numbers():
    text = Table(("way", "epochs to 50 %", "accuracy"), [("a", "7", "98.63 ± 0.32")], names=1).latex("")
    assert r"way & \shortstack[r]{epochs \\ to 50 \\ \%} & accuracy \\" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\input{/etc/passwd}%", r"\textbackslash{}input\{/etc/passwd\}\%"),
        ("a_b & $x$ #1", r"a\_b \& \$x\$ \#1"),
        ("[2ex] * --seeds", r"{[}2ex{]} {*} -{}-seeds"),
        ("é ü 中 \x1b\n", r"\'{e} \"{u} {[}U+4E2D{]} \textbackslash{}x1b\textbackslash{}n"),
        ("−0.5 ± 1 – λ2", r"$-$0.5 $\pm$ 1 -- $\lambda$2"),
    ],
)
def test_latex_of_strange_names(text, expected):
    assert in_latex(text) == expected


def _shown(table, width=200, **how):
    out = io.StringIO()
    Console(file=out, width=width).print(table.terminal(**how))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_terminal_breaks_names_and_headings_and_no_number():
    table = Table(("name", "a long heading"), [("a name that is long", "12.34 ± 0.12"), ("b", "1.00 ± 0.10")])
    lines = _shown(table, width=24)
    assert any(line.endswith("12.34 ± 0.12") for line in lines)
    assert all(len(line) <= 24 for line in lines)
    assert "heading" in "".join(lines)


@pytest.mark.parametrize("width", [30, 45, 60, 80])
def test_in_a_narrow_terminal_rows_keep_their_names_and_every_number_is_there(width):
    names, headings = ("lape", "lape, preserve"), [f"measure {number}" for number in range(7)]
    rows = [(name, *(f"{row}{column}.25±0.5" for column in range(7))) for row, name in enumerate(names)]
    lines = _shown(Table(("join", *headings), rows), width=width, groups=["learnable", "learnable"])
    assert max(map(len, lines)) <= width
    for name, *numbers in rows:
        begun = [line for line in lines if line.startswith(f" {name} ")]
        assert [number for line in begun for number in line.split() if number in numbers] == numbers
    assert len(_shown(Table(("join", *headings), rows), width=100)) == 4


def test_groups_stand_above_their_rows_and_rules_between_models():
    table = Table(("join", "score"), [("default", "1"), ("lape", "2"), ("lape", "3")])
    lines = _shown(table, groups=["learnable", "learnable", "none"])
    assert [line.split() for line in lines[2:]] == [
        ["learnable"],
        ["default", "1"],
        ["lape", "2"],
        ["none"],
        ["lape", "3"],
    ]
    assert len(_shown(table, ruled=True)) == len(_shown(table)) + 1


def test_columns_can_be_left_out():
    table = Table(("name", "kind", "score"), [("a", "b", "1")], names=2)
    assert table.without("kind") == Table(["name", "score"], [["a", "1"]], names=1)
